"""What a run shows while it runs: progress callbacks, rounds.jsonl, TensorBoard files.

Run by the coordinator. Enters: phases, sites' names and codes, rounds' records. Leaves: files in the run folder and
lines on a terminal. Holds no patient value. Both files are written from the journal's
records, so a resumed run repeats none.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .journal import write_rounds

# rounds.jsonl key → TensorBoard tag
_SCALARS = {
    "reward_mean": "train/reward_mean",
    "boxed_rate": "train/boxed_rate",
    "completion_tokens_mean": "train/completion_tokens_mean",
    "validation_accuracy": "validation/accuracy",
    "site_count": "federation/site_count",
    "seconds": "federation/seconds",
    "bytes_up": "federation/bytes_up",
    "bytes_down": "federation/bytes_down",
}


class Progress(Protocol):
    """What the coordinator tells whoever watches. Calls come in order, from one thread."""

    def warming_up(self, done: int, total: int, loss: float) -> None:
        """Public warm-up: `done` of `total` steps."""

    def begin(self, phase: str, round_index: int, sites: Sequence[str]) -> None:
        """A phase starts with these sites; `round_index` is 0 before training rounds, the last one's after them."""

    def answered(self, phase: str, site: str, code: str) -> None:
        """A site finished a phase; `code` is "" or the word its failure came with."""

    def at_site(self, site: str, what: str, done: int, total: int) -> None:
        """`done` of `total` steps or questions (`what`: "step", "question") at a site of this very process.

        Never of one elsewhere: hospitals do not send it.
        """

    def round_done(self, record: Mapping[str, Any], rounds: int) -> None:
        """A round is complete: its line of rounds.jsonl. Called for earlier rounds too when a run is resumed."""

    def note(self, text: str) -> None:
        """One line that a person should see."""


class SilentProgress:
    """Shows nothing."""

    def warming_up(self, done: int, total: int, loss: float) -> None: ...
    def begin(self, phase: str, round_index: int, sites: Sequence[str]) -> None: ...
    def answered(self, phase: str, site: str, code: str) -> None: ...
    def at_site(self, site: str, what: str, done: int, total: int) -> None: ...
    def round_done(self, record: Mapping[str, Any], rounds: int) -> None: ...
    def note(self, text: str) -> None: ...


class Tracker:
    """rounds.jsonl and tensorboard/ of a run folder, rewritten from the given records when it is made."""

    def __init__(self, out: Path, records: Sequence[Mapping[str, Any]], baseline: float | None) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._out = out
        self._records: list[dict[str, Any]] = []
        folder = out / "tensorboard"
        if folder.is_dir():
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        self._writer = EventFileWriter(str(folder))
        if baseline is not None:
            self._scalars(0, {"validation_accuracy": baseline})
        for record in records:
            self._records.append(dict(record))
            self._scalars(record["round"], record)
        self._flush()

    def add(self, record: Mapping[str, Any]) -> None:
        """One more round."""
        self._records.append(dict(record))
        self._scalars(record["round"], record)
        self._flush()

    def close(self) -> None:
        """Ends the TensorBoard file."""
        self._writer.close()

    def _flush(self) -> None:
        write_rounds(self._out, self._records)
        self._writer.flush()

    def _scalars(self, step: int, record: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        values = [
            Summary.Value(tag=tag, simple_value=float(record[key]))
            for key, tag in _SCALARS.items()
            if record.get(key) is not None
        ]
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
