"""Progress on stderr for anything over a few seconds: a bar where a person looks, plain lines in a log file.

Shared by every command; rich is imported only when a bar is drawn.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

_LOG_EVERY_S = 10.0


@contextmanager
def progress_bar(title: str, total: int, *, quiet: bool = False) -> Generator[Callable[[int, str], None]]:
    """Yields `advance(done, note)`: `done` of `total` steps, with a short note beside the bar.

    On a terminal: one live bar. Elsewhere (CI, a redirected log): the first call's line, then one at most every 10
    seconds, and the last. `quiet`: nothing.
    """
    if quiet:
        yield lambda done, note: None
        return
    if not sys.stderr.isatty():
        last = -math.inf  # a clock may begin at 0

        def line(done: int, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _LOG_EVERY_S or done == total:
                last = now
                print(f"{title}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=total, note="")
        yield lambda done, note: bars.update(task, completed=done, note=note)
