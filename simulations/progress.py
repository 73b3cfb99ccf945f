"""What `wardround simulate run` shows while it works: one bar on a terminal, plain lines in a log.

Implements server/tracking.py's Progress. Shows phases, sites' names, rewards and accuracies; never a patient value.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LOG_EVERY_S = 10.0
_IN_ROUNDS = ("train", "validate")


class TerminalProgress(AbstractContextManager["TerminalProgress"]):
    """A bar over the sites of the phase under way; finished rounds scroll by above it."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._console = Console(stderr=True, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not sys.stderr.isatty())
        self._task = self._bars.add_task("starting", total=None)
        self._logged = 0.0
        self._what = ""
        self._done: list[Mapping[str, Any]] = []

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def _step(self, text: str, last: bool) -> None:
        """A line for what is between phases, where there is no bar: now and then, and the last."""
        if self._bars.disable and (time.monotonic() - self._logged > _LOG_EVERY_S or last):
            self._logged = time.monotonic()
            self._line(text)

    def warming_up(self, done: int, total: int, loss: float) -> None:
        self._bars.update(self._task, description=f"public warm-up, loss {loss:.2f}", completed=done, total=total)
        self._step(f"public warm-up: {done}/{total}, loss {loss:.2f}", done == total)

    def begin(self, phase: str, round_index: int, sites: Sequence[str]) -> None:
        work, _, exchange = phase.partition(": ")
        training = round_index and work in _IN_ROUNDS
        self._what = f"round {round_index} of {self._rounds} · {phase}" if training else phase
        self._bars.reset(self._task, description=" · ".join([self._what, *self._so_far()]), total=len(sites) or None)
        if self._bars.disable and not exchange:  # of a secure sum: over in a moment
            self._line(f"{self._what}: {len(sites)} {'site' if len(sites) == 1 else 'sites'}")

    def at_site(self, site: str, what: str, done: int, total: int) -> None:
        where = f"{self._what} · {site} {what} {done} of {total}"
        self._bars.update(self._task, description=" · ".join([where, *self._so_far()]))
        self._step(where, False)

    def answered(self, phase: str, site: str, code: str) -> None:
        self._bars.advance(self._task)
        if code:
            self._line(f"{site}: left out of {phase} ({code}); its own state/site.log says why")

    def round_done(self, record: Mapping[str, Any], rounds: int) -> None:
        self._done.append(record)
        parts = [f"round {record['round']} of {rounds}", f"{record['site_count']} sites"]
        for key, label, form in (
            ("questions", "questions", "d"),
            ("reward_mean", "reward", ".3f"),
            ("validation_accuracy", "validation accuracy", ".3f"),
            ("seconds", "seconds", ".0f"),
        ):
            if record.get(key) is not None:
                parts.append(f"{label} {record[key]:{form}}")
        if record.get("rolled_back"):
            parts.append("rolled back")
        left = self._left()
        self._line(" · ".join([*parts, f"{left} left in rounds"] if left else parts))

    def note(self, text: str) -> None:
        self._line(text)

    def _so_far(self) -> list[str]:
        """Reward and accuracy of the last round, and what the rounds that are left will take."""
        if not self._done:
            return []
        last, left = self._done[-1], self._left()
        known = (("reward", last.get("reward_mean")), ("accuracy", last.get("validation_accuracy")))
        parts = [f"{label} {value:.3f}" for label, value in known if value is not None]
        return [*parts, f"{left} left in rounds"] if left else parts

    def _left(self) -> str:
        """Time of the rounds that are not done, at the mean of those that are."""
        rounds = self._rounds - len(self._done)
        seconds = rounds * sum(record["seconds"] for record in self._done) / max(1, len(self._done))
        if rounds < 1 or not self._done:
            return ""
        return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"
