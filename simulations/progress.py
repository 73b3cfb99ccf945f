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


class TerminalProgress(AbstractContextManager["TerminalProgress"]):
    """A bar over the sites of the phase under way; finished rounds scroll by above it."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not sys.stderr.isatty())
        self._task = self._bars.add_task("starting", total=None)
        self._logged = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def _line(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def warming_up(self, done: int, total: int, loss: float) -> None:
        self._bars.update(self._task, description=f"public warm-up, loss {loss:.2f}", completed=done, total=total)
        if self._bars.disable and (time.monotonic() - self._logged > _LOG_EVERY_S or done == total):
            self._logged = time.monotonic()
            self._line(f"public warm-up: {done}/{total}, loss {loss:.2f}")

    def begin(self, phase: str, round_index: int, sites: Sequence[str]) -> None:
        what = f"round {round_index} · {phase}" if round_index else phase
        self._bars.reset(self._task, description=what, total=len(sites) or None)
        if self._bars.disable:
            self._line(f"{what}: {len(sites) or 'all'} sites")

    def answered(self, phase: str, site: str, code: str) -> None:
        self._bars.advance(self._task)
        if code:
            self._line(f"{site}: left out of {phase} ({code}); its own state/site.log says why")

    def round_done(self, record: Mapping[str, Any], rounds: int) -> None:
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
        self._line(" · ".join(parts))

    def note(self, text: str) -> None:
        self._line(text)
