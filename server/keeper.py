"""Sees to it that the runs that are wanted go on: starts one again that ended before its time.

    python -m wardround.server.keeper COORDINATOR

Run by the coordinator, as a child of `wardround server start`. Enters: COORDINATOR/runs/NAME/wanted.json, which
`wardround server run` writes and `server stop` takes away; how far the run has come (server/run_status.py); what Flower
says of it. Leaves: calls of the loopback Control API. Private: the control token.

A ServerApp that was killed, a SuperLink whose database is new, a machine that was started again: each leaves a wanted
run that nobody works on. Its next ServerApp continues from the journal, so nothing that was acknowledged is asked for
again. A pause between two starts doubles from 2 s to 5 min, and begins anew when the journal has grown. Too few
hospitals is no reason to give up; a mistake that only a person can mend is, and so are ten starts that got nowhere. On
a full disk nothing is started, and nothing counted.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import WardroundError
from ..common.files import write_atomic
from . import run_status
from .cohort import QuorumError
from .coordinator import CoordinatorFolder
from .disk import full

if TYPE_CHECKING:
    from .control import Control, FlowerRun

WANTED = "wanted.json"
FIRST_PAUSE_S, LONGEST_PAUSE_S, TRIES = 2.0, 300.0, 10
_LOOK_S = 1.0


def want(out: Path, flower_run: int) -> None:
    """Notes that a run shall go on, and which of Flower's runs it is now."""
    write_atomic(out / WANTED, json.dumps({"flower_run": flower_run, "since": time.time()}).encode() + b"\n")


def unwant(out: Path) -> None:
    """Notes that a run shall rest; what it has is kept."""
    (out / WANTED).unlink(missing_ok=True)


def wanted(out: Path) -> int | None:
    """Flower's number of a run that shall go on."""
    try:
        return int(json.loads((out / WANTED).read_bytes())["flower_run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(eq=False)
class _Care:
    """What is remembered of a run between two looks."""

    pause_s: float = FIRST_PAUSE_S
    due: float = 0.0  # monotonic
    tries: int = 0
    journal: tuple[int, float] = (0, 0.0)
    judged: set[int] = field(default_factory=set)  # Flower's runs whose end was seen


@dataclass(eq=False)
class Keeper:
    """Looks after the wanted runs of a folder."""

    folder: CoordinatorFolder
    control: Control
    _cares: dict[str, _Care] = field(default_factory=dict)

    def look(self) -> None:
        """Once over all of them.

        Raises:
            NotRunningError, ControlError: of the SuperLink; the next look may fare better.
        """
        idle = [
            name for name in self.folder.runs() if wanted(self.folder.run(name)) is not None and not self._works(name)
        ]
        if idle:
            known = {run.id: run for run in self.control.runs()}
            for name in idle:
                self._see_to(name, known)

    def _works(self, name: str) -> bool:
        """Whether a process works on the run, whichever start of it that is."""
        return run_status.alive(run_status.read(self.folder.run(name)))

    def _see_to(self, name: str, known: dict[int, FlowerRun]) -> None:
        out, care, now = self.folder.run(name), self._cares.setdefault(name, _Care()), time.monotonic()
        number, said = wanted(out), run_status.read(self.folder.run(name))
        if number is None:
            return
        current = known.get(number)  # None: the database is new
        if current is not None and not current.over and not self._is_dead(said, number):
            return  # about to begin
        ended: dict[str, Any] = (said.get("ended") or {}) if said.get("flower_run") == number else {}
        if ended and ended["code"] == "":
            unwant(out)
            _say(f"run {name}: finished")
            return
        if current is not None and current.status == "finished:stopped" and not ended:
            self._stop_caring(out, name, "it was stopped")  # by a person, with another tool than ours
            return
        if full(out):  # nothing would come of a start; `main` says so
            return
        if number not in care.judged:
            care.judged.add(number)
            if not self._judge(out, name, care, ended, now):
                return
        if now >= care.due:
            self._again(out, name, current)

    def _is_dead(self, said: dict[str, Any], number: int) -> bool:
        """Whether a run that Flower takes for one that is on has lost its process; Flower finds that out later."""
        return said.get("flower_run") == number and said.get("pid") is not None and not run_status.alive(said)

    def _judge(self, out: Path, name: str, care: _Care, ended: dict[str, Any], now: float) -> bool:
        """Whether to start a run again that ended, and when."""
        why = f"{ended['code']}: {ended['message']}" if ended else "its process is gone"
        if ended.get("final"):
            self._stop_caring(out, name, why)
            return False
        grown = _journal(out)
        if grown != care.journal:
            care.journal, care.tries, care.pause_s = grown, 0, FIRST_PAUSE_S
        elif ended.get("code") != QuorumError.code:
            care.tries += 1
        if care.tries >= TRIES:
            self._stop_caring(out, name, f"{TRIES} starts got nowhere; {why}")
            return False
        care.due = now + care.pause_s
        _say(f"run {name}: {why}; it goes on in {care.pause_s:.0f} s")
        care.pause_s = min(2 * care.pause_s, LONGEST_PAUSE_S)
        return True

    def _stop_caring(self, out: Path, name: str, why: str) -> None:
        unwant(out)
        _say(f"run {name}: {why}; mend it, then `wardround server run {name} --resume`")

    def _again(self, out: Path, name: str, current: FlowerRun | None) -> None:
        if current is not None and not current.over:
            self.control.stop(current.id)
        if wanted(out) is not None:  # nobody stopped it meanwhile
            number = self.control.start(name, resume=True)
            want(out, number)
            _say(f"run {name}: started again")


def _journal(out: Path) -> tuple[int, float]:
    """What changes when a run has got anywhere."""
    files = [file.stat() for file in (out / "journal").glob("*.record") if file.name != "losses.record"]
    return len(files), max((file.st_mtime for file in files), default=0.0)


def _say(line: str) -> None:
    with suppress(OSError):  # the log is on the same disk
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", flush=True)


def main(arguments: list[str]) -> int:
    """Entry of the process; ends by a signal."""
    from .control import Control

    try:
        folder = CoordinatorFolder.open(Path(arguments[0]))
    except WardroundError as error:
        print(error, file=sys.stderr)
        return 2
    told = ""
    with Control(folder) as control:
        keeper = Keeper(folder, control)
        while True:
            try:
                keeper.look()
                line = full(folder.path)
            except WardroundError as error:
                line = str(error)
            except OSError as error:
                line = full(folder.path) or f"{folder.path}: {(error.strerror or str(error)).lower()}"
            if line and line != told:
                _say(line)
            told = line
            time.sleep(_LOOK_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
