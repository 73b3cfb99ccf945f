"""A disk of a few megabytes for a test, in memory: to be filled.

It is mounted in a mount namespace of its own, which this thread and what it starts are in: nobody else sees it, and it
is gone with the last process there, also when the test is killed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

if sys.platform != "linux":
    raise RuntimeError("mount namespaces are Linux's")

_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 1 << 18
_OWN = "/proc/thread-self/ns/mnt"
_LIBC = ctypes.CDLL(None, use_errno=True)


class NotPermittedError(Exception):
    """Nothing can be mounted here; the message says why."""


@dataclass(frozen=True)
class Disk:
    """What is mounted at `path`."""

    path: Path

    @property
    def _filler(self) -> Path:
        return self.path / "filler"

    def fill(self) -> None:
        """Takes all that is free; again, where something was given back meanwhile."""
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)) == 4096:
                pass

    def make_room(self) -> None:
        """Gives back what `fill` took."""
        self._filler.unlink()


@contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[Disk]:
    """A new disk at `path`, while the block runs.

    Raises:
        NotPermittedError: this machine, or who runs this, may not mount.
    """
    path.mkdir()
    here, before = Path.cwd(), os.open(_OWN, os.O_RDONLY)
    try:
        _call("a mount namespace", _LIBC.unshare(_CLONE_NEWNS))
        try:
            _call("private mounts", _LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
            options = f"size={size_bytes},mode=0700".encode()
            _call("a tmpfs", _LIBC.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, options))
            yield Disk(path)
        finally:
            _call("the way back", _LIBC.setns(before, _CLONE_NEWNS))
            os.chdir(here)
    finally:
        os.close(before)


def _call(what: str, result: int) -> None:
    if result != 0:
        raise NotPermittedError(f"{what}: {os.strerror(ctypes.get_errno()).lower()}")
