"""What the coordinator must find again after a kill: one atomic file a phase under OUT/journal/.

Run by the coordinator. Enters: what a phase ended with. Leaves: nothing. Holds no patient value: adapters, counts that
were sent anyway, names of sites.

    journal/run.record             run id, config, digests; made first, so that a folder belongs to one run
    journal/warmup.record          round-0 adapter, manifest, warm-up report
    journal/schema.record          the question schema
    journal/baseline.record        validation of round 0
    journal/round-00001-apply.record     who is in the sum, statistics, the new vector, the optimizer's state
    journal/round-00001-validate.record  validation, the decision, the line of rounds.jsonl
    journal/evaluate.record        the sum of the sites' test counts; sample questions of open registries
    journal/evaluate-samples.record      those, while that sum is under way
    journal/finalize.record        the final adapter's digest, who has it
    journal/losses.record          who did not finish which phase, and the code
    journal/*-attempt.record, *-sum.record, *-signed.record   a secure sum under way (server/aggregation.py)

A phase whose file is there is complete and is not repeated; one whose file is missing is done again from the start, a
secure sum from where its survivors were fixed. Sites answer a repeated instruction from their own disk, and sums are of
integers, so that gives the same result.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..common.config import RunConfig
from ..common.errors import RunFolderError, VerificationError
from ..common.files import Record, check_writable, read_record, sweep, sync_folder, write_atomic, write_record
from ..common.question import load_prompt

# What a run folder may hold before the run begins: its config and dictionary as they were submitted.
INPUTS = ("run.toml", "dictionary.toml")
_BEFORE = frozenset({"journal", "progress.json", "wanted.json", *INPUTS})
_RUN, _LOSSES = "run", "losses"
_REPEATABLE = ("warmup", "finalize", _LOSSES)  # phases that are no sum, and from which none was made


def round_phase(index: int, step: str) -> str:
    """The journal's name of a round's step.

    >>> round_phase(1, "apply")
    'round-00001-apply'
    """
    return f"round-{index:05d}-{step}"


@dataclass(frozen=True, eq=False)
class Journal:
    """An open journal; only one process has it open at a time. `resumed`: the run was there before it was opened."""

    folder: Path
    run_id: str
    resumed: bool
    _lock: int

    def has(self, phase: str) -> bool:
        """Whether a phase is complete."""
        return self._path(phase).exists()

    def write(self, phase: str, values: Mapping[str, Any], vectors: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Completes a phase, in one atomic write."""
        write_record(self._path(phase), values, vectors)

    def read(self, phase: str) -> Record:
        """What a complete phase ended with.

        Raises:
            RunFolderError: missing or damaged.
        """
        try:
            return read_record(self._path(phase))
        except FileNotFoundError:
            raise RunFolderError(f"{self._path(phase)}: missing; the run cannot continue without it") from None
        except VerificationError as error:
            raise RunFolderError(f"{error}; {self._remedy(phase)}") from None

    def losses(self) -> list[dict[str, Any]]:
        """Sites that did not finish a phase, as it came up: "phase", "round", "site", "code"."""
        return list(self.read(_LOSSES).values["losses"]) if self.has(_LOSSES) else []

    def add_losses(self, phase: str, round_index: int, failures: Mapping[str, str]) -> None:
        """Notes who did not finish a phase; the same once, however often it is repeated."""
        known = self.losses()
        found = [{"phase": phase, "round": round_index, "site": site, "code": failures[site]} for site in failures]
        if new := [loss for loss in found if loss not in known]:
            self.write(_LOSSES, {"losses": known + new})

    def drop(self, phase: str) -> None:
        """Removes a file that no later step reads (an adapter of an old round)."""
        self._path(phase).unlink(missing_ok=True)

    def close(self) -> None:
        """Lets another process open the journal."""
        os.close(self._lock)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remedy(self, phase: str) -> str:
        """What helps against a damaged file. Sites that signed a sum add it up no second time (secure-sums.md §S8)."""
        if phase in _REPEATABLE:
            return "delete it to repeat that phase"
        return "sites add nothing up twice: put a copy of the file back, or start a new run"

    def _path(self, phase: str) -> Path:
        return self.folder / f"{phase}.record"


def check_folder(out: Path, config: RunConfig, resume: bool) -> bool:
    """Whether OUT holds this run, to be continued; writes nothing, so that it can be called before anything is made.

    Raises:
        RunFolderError: OUT holds something else, a run without --resume, or a run whose config or prompt differs; or
            it cannot be written.
        ConfigError: no such prompt template.
    """
    prompt_digest = load_prompt(config.model.prompt).digest()
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out}: expected a folder, got a file")
    path = out / "journal" / f"{_RUN}.record"
    if not path.exists():
        # A kill before the first write leaves the folders and the lock: that is still nobody's run.
        left = [item.name for item in out.iterdir() if item.name not in _BEFORE] if out.exists() else []
        if left:
            raise RunFolderError(f"{out}: holds '{sorted(left)[0]}' and no run of wardround; choose a new folder")
        check_writable(out)
        return False
    try:
        values = read_record(path).values
    except VerificationError as error:
        raise RunFolderError(f"{error}; choose a new folder") from None
    if not resume:
        raise RunFolderError(
            f"{out}: holds run '{values['name']}'; --resume continues it, or choose another folder for a new run"
        )
    if values["config_digest"] != config.digest():
        raise RunFolderError(f"{out}: --resume: {_difference(json.loads(values['config']), config)}")
    if values["prompt_digest"] != prompt_digest:
        raise RunFolderError(
            f"{out}: --resume: prompt '{config.model.prompt}' was edited since the run began; a run keeps its prompt"
        )
    check_writable(out)
    return True


def open_journal(out: Path, config: RunConfig, resume: bool) -> Journal:
    """The journal of OUT, made for a new run or opened for a resumed one.

    Raises:
        RunFolderError: as `check_folder`, or another process has the run open.
        ConfigError: as `check_folder`.
    """
    check_folder(out, config, resume)  # before anything is made
    folder = out / "journal"
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RunFolderError(f"{out}: another process is working on this run") from None
    try:
        resumed = check_folder(out, config, resume)  # again: until now another process may have made its run here
        for place in (folder, out):
            sweep(place)
        path = folder / f"{_RUN}.record"
        if not resumed:
            about = {
                "run_id": secrets.token_hex(16),
                "name": config.name,
                "config": config.to_json(),
                "config_digest": config.digest(),
                "prompt_digest": load_prompt(config.model.prompt).digest(),
            }
            write_record(path, about)
            sync_folder(out)
        return Journal(folder, str(read_record(path).values["run_id"]), resumed, lock)
    except BaseException:
        os.close(lock)
        raise


def check_disk(out: Path, needed_bytes: int) -> None:
    """Refuses to start a run that would fill the disk.

    Raises:
        RunFolderError: says what is needed and what is free.
    """
    there = out.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise RunFolderError(
            f"{out}: not enough disk: the run needs about {needed_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )


def write_rounds(out: Path, records: list[dict[str, Any]]) -> None:
    """rounds.jsonl, whole, from the journal's records: a resumed run has no line twice."""
    lines = [json.dumps(record, sort_keys=True) + "\n" for record in records]
    write_atomic(out / "rounds.jsonl", "".join(lines).encode(), mode=0o644)


def _difference(before: Mapping[str, Any], config: RunConfig, path: str = "") -> str:
    """The first key whose value differs, with both values."""
    now = json.loads(config.to_json())
    pairs = [(before, now, path)]
    while pairs:
        old, new, where = pairs.pop(0)
        for key in sorted({*old, *new}):
            name = f"{where}.{key}" if where else key
            if (key in old) != (key in new) and where != "speed":
                which = "whose" if key in new else "this one's"
                return (
                    f"another version of wardround began the run, {which} config has no '{name}': continue it with "
                    "that version, or choose another folder for a new run"
                )
            if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
                pairs.append((old[key], new[key], name))
            elif old.get(key) != new.get(key) and not name.startswith("speed."):
                return (
                    f"'{name}' was {old.get(key)!r} when the run began, now {new.get(key)!r}; a run keeps its config: "
                    "choose another folder for a new run, or set the old value with --set"
                )
    return "the run began with another version of the config; a run keeps its config"
