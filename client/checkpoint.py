"""Local training that a kill interrupts goes on from its last saved step: one file in the run's folder.

Run by the site, by client/grpo.py within client/site.py's `train`. Enters: the state of a round under way. Leaves:
nothing; the file (mode 0600, folder 0700) is removed once the round's update is stored. Private: it says of patients
what an unfinished update says.

Without differential privacy the streams of draws and samples are saved as well, so that the result is that of a round
nobody interrupted, bit for bit on a CPU. With it they are the site's secret and are never written down: the remaining
steps draw patients and noise from a fresh secret, which has the same distribution, since every step's are independent
of all others'. No step whose result is in the saved adapter is drawn again, and nothing of the round has left before
its update is stored: docs/privacy.md §P9.

A step costs seconds, saving one a fraction of that; saving takes at most a twentieth of the time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import VerificationError
from ..common.files import read_record, write_record

EVERY_S = 10.0  # at the earliest: a round that is shorter is not worth a file
SHARE = 20  # saving takes at most one part in so many of the time
Float32 = NDArray[np.float32]
_VECTORS = ("values", "first", "second", "sampler")


@dataclass(frozen=True, eq=False)
class Progress:
    """A round after some of its steps.

    Attributes:
        steps: done.
        values: float32, what is trained.
        first, second: float32, likewise long: the optimizer's moments.
        draws: state of the generator of draws; None in a private run.
        sampler: uint8, state of the generator of samples; empty in a private run.
        counts: `RoundCounts` so far; empty in a private run.
    """

    steps: int
    values: Float32
    first: Float32
    second: Float32
    draws: dict[str, Any] | None
    sampler: NDArray[np.uint8]
    counts: Mapping[str, Any]


@dataclass(eq=False)
class Checkpoint:
    """Where a round's progress is kept.

    Attributes:
        path: the file.
        key: of everything the round depends on; progress of another key is none.
        private: whether the round is one with differential privacy; progress of the other sort is none.
    """

    path: Path
    key: str
    private: bool
    _last: float = field(default_factory=time.monotonic)
    _pause_s: float = field(default_factory=lambda: EVERY_S)

    def load(self) -> Progress | None:
        """What was saved of this round; None: nothing, another round's, or a damaged file, which is removed."""
        try:
            record = read_record(self.path)
            values, vectors = record.values, record.vectors
            if (values["key"], values["private"]) == (self.key, self.private):
                return Progress(values["steps"], *(vectors[name] for name in _VECTORS[:3]), draws=values["draws"],
                                sampler=vectors["sampler"], counts=values["counts"])  # fmt: skip
        except FileNotFoundError:
            return None
        except (VerificationError, KeyError):
            pass
        self.remove()
        return None

    @property
    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last >= self._pause_s

    def save(self, progress: Progress) -> None:
        """Keeps it, atomically. A full disk ends no training: then a kill costs more of it."""
        began = time.monotonic()
        values = {"key": self.key, "private": self.private, "steps": progress.steps, "draws": progress.draws}
        with suppress(OSError):
            write_record(
                self.path,
                {**values, "counts": dict(progress.counts)},
                {name: getattr(progress, name) for name in _VECTORS},
            )
        self._last = time.monotonic()
        self._pause_s = max(EVERY_S, SHARE * (self._last - began))

    def remove(self) -> None:
        """The update is stored, or this is not this round's."""
        self.path.unlink(missing_ok=True)
