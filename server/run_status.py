"""How far a run has come, as a file that others read: COORDINATOR/runs/NAME/progress.json.

Written by the ServerApp (server/app.py), read by `wardround server status` and by server/keeper.py. Enters: what the
rounds tell whoever watches. Leaves: the file, mode 0600. Holds no patient value: sites' names, phases, codes, seconds,
and what a run costs a patient by its plan (ε), which is computed from the config alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..common import plan
from ..common.config import RunConfig
from ..common.errors import WardroundError
from ..common.files import write_atomic
from ..common.privacy import epsilon_prv

FILE = "progress.json"
_STEP_EVERY_S = 2.0  # warm-up steps are many


class RunStatus:
    """A `Progress` (server/tracking.py) that keeps progress.json.

    Args:
        out: the run's folder.
        config: the run's.
        flower_run: Flower's number of it.
    """

    def __init__(self, out: Path, config: RunConfig, flower_run: int) -> None:
        self._path, self._config, self._written = out / FILE, config, 0.0
        self._costs: dict[tuple[int, bool], float | None] = {}
        before = read(out)
        self._said: dict[str, Any] = {
            "run": config.name,
            "pid": os.getpid(),
            "pid_started": started(os.getpid()),
            "flower_run": flower_run,
            "began": before.get("began", time.time()),
            "phase": "starting",
            "round": 0,
            "rounds": config.federation.rounds,
            "phase_began": time.time(),
            "asked": [],
            "answered": {},
            "sites": before.get("sites", {}),
            "rounds_done": 0,
            "rounds_lost": 0,  # whose sum could not be had: the model stayed as it was
            "seconds_of_rounds": [],
            "validation": [],
            "epsilon_planned": config.privacy.epsilon if config.privacy.enabled else None,
            "delta": config.privacy.delta if config.privacy.enabled else None,
            "note": "",
            "ended": None,
        }
        for site in self._said["sites"].values():
            site["rounds"], site["lost"], site["epsilon"] = 0, 0, None
        self._write()

    def warming_up(self, done: int, total: int, loss: float) -> None:
        """As `Progress`."""
        if time.time() - self._written >= _STEP_EVERY_S or done == total:
            self._said |= {"phase": "public warm-up", "note": f"step {done} of {total}, loss {loss:.3f}"}
            self._write()

    def begin(self, phase: str, round_index: int, sites: Sequence[str]) -> None:
        """As `Progress`."""
        self._said |= {"phase": phase, "round": round_index, "phase_began": time.time(), "note": ""}
        self._said |= {"asked": sorted(sites), "answered": {}}
        if phase == "finalize":
            self._count_test()
        self._write()

    def answered(self, phase: str, site: str, code: str) -> None:
        """As `Progress`."""
        self._said["answered"][site] = code
        if not site.startswith("node "):  # a stranger; it is in "answered"
            one = self._site(site)
            one |= {"phase": phase, "code": code} | ({} if code else {"answered": time.time()})
        self._write()

    def at_site(self, site: str, what: str, done: int, total: int) -> None:
        """As `Progress`."""

    def round_done(self, record: Mapping[str, Any], rounds: int) -> None:
        """As `Progress`."""
        self._said["rounds_done"] = record["round"]
        self._said["seconds_of_rounds"].append(record["seconds"])
        self._said["validation"].append(record["validation_accuracy"])
        for name in record["sites"]:
            self._site(name)["rounds"] += 1
        if not record["sites"]:
            self._said["rounds_lost"] += 1
            for site in self._said["sites"].values():
                site["lost"] += 1  # whether it had trained before the sum was lost, nobody says: it may have
        for site in self._said["sites"].values():
            if site["rounds"] + site["lost"]:
                site["epsilon"] = self._spent(site["rounds"] + site["lost"])
        self._write()

    def note(self, text: str) -> None:
        """As `Progress`."""
        self._said["note"] = text
        self._write()

    def end(self, error: BaseException | None) -> None:
        """The run is over, or stopped.

        Args:
            error: None: it has come to its end. Of ours, code and message are kept; of others, only the kind.
        """
        self._said["ended"] = _end(error)
        if error is None:
            self._said["phase"] = "finished"
            self._count_test()
        self._write()  # a full disk may be why it ended; then that its process is gone has to say enough

    def _count_test(self) -> None:
        """The test is over, and has cost everybody who was in it; of those who were not, this says too much."""
        for site in self._said["sites"].values():
            site["epsilon"] = self._spent(site["rounds"] + site["lost"], tested=True)

    def _site(self, name: str) -> dict[str, Any]:
        empty = {"rounds": 0, "lost": 0, "epsilon": None, "phase": "", "code": "", "answered": None}
        return self._said["sites"].setdefault(name, empty)

    def _spent(self, rounds: int, *, tested: bool = False) -> float | None:
        """ε of a patient of a site after so many rounds, by the plan; None: the run promises nothing."""
        privacy = self._config.privacy
        if not privacy.enabled or privacy.delta is None:
            return None
        if (rounds, tested) not in self._costs:
            events = [plan.schema_event(self._config), *[plan.round_event(self._config)] * rounds]
            events += [plan.metrics_event(self._config)] * tested
            try:
                self._costs[rounds, tested] = round(epsilon_prv(events, privacy.delta).epsilon, 4)
            except ImportError:  # a coordinator without the accountants; hospitals count for themselves in any case
                self._costs[rounds, tested] = None
        return self._costs[rounds, tested]

    def _write(self) -> None:
        self._written = time.time()
        with suppress(OSError):  # on a full disk the journal decides whether the run can go on, not what is said of it
            write_atomic(self._path, json.dumps(self._said, indent=1, allow_nan=False).encode() + b"\n")


def refuse(out: Path, flower_run: int, error: WardroundError) -> None:
    """Notes that a process could not even begin to work on a run; not of one that is finished, or worked on."""
    before = read(out)
    if not alive(before) and (before.get("ended") or {}).get("code") != "":
        said = before | {"flower_run": flower_run, "pid": None, "ended": _end(error)}
        write_atomic(out / FILE, json.dumps(said, indent=1, allow_nan=False).encode() + b"\n")


def _end(error: BaseException | None) -> dict[str, Any]:
    known = error if isinstance(error, WardroundError) else None
    message = "" if error is None else str(known)[:2000] if known else type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message += f": {error.strerror.lower()}"
    return {
        "at": time.time(),
        "code": "" if error is None else known.code if known else "failure",
        "message": message,
        "final": error is None or (known is not None and known.exit_code == 2),
    }


def read(out: Path) -> dict[str, Any]:
    """What was last written of a run; empty: nothing, or it cannot be read."""
    try:
        found = json.loads((out / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def alive(said: Mapping[str, Any]) -> bool:
    """Whether the process that wrote this is still there, and it no other one with its number."""
    pid = said.get("pid")
    return isinstance(pid, int) and said.get("pid_started") is not None and started(pid) == said["pid_started"]


def started(pid: int) -> int | None:
    """When a process began, in ticks since this machine was started; None: there is none of this number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # field 22 of proc(5); a zombie is over
