"""Whether the coordinator's disk has room. Used by its processes, all of which wait where it has none.

Run by the coordinator. Nothing enters, nothing leaves. On a full disk a write may fail anywhere and at any time, so
nothing here reserves or repairs: what cannot be written is not acknowledged, whoever asked asks again, and `status`
says what is wrong, for no log can be written.
"""

from __future__ import annotations

import shutil
from pathlib import Path

LEAST_BYTES = 16 << 20  # with less free a disk counts as full: a journal file is an adapter or two, and SQLite's log


def full(path: Path) -> str:
    """What is wrong with the disk of a folder, in one line; "": it has room, or nobody can say."""
    try:
        free = shutil.disk_usage(path).free
    except OSError:
        return ""
    if free >= LEAST_BYTES:
        return ""
    least = f"less than {LEAST_BYTES >> 20} MB free"
    return f"{path}: the disk is full ({least}): make room, then everything goes on by itself"
