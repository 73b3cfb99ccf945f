"""The hospital's own record of everything that left it: hash-chained JSON lines, on disk before the bytes go.

Run by the site. Enters: what is about to leave (never its content) or what was refused. Leaves: nothing. Private: the
file stays on the site; it holds no patient value, only times, phases, sizes and digests.

Each line is one JSON object whose `previous` is the SHA-256 of the line before it (64 zeros at the start), so a
changed, removed, inserted or reordered line is found. `total` is the sum of all bytes that left up to and with the
line, whatever the run: the site's upload limit is over all of them. `Ledger.append` returns only after fsync: a
machine that dies afterwards has recorded more than it sent, never less. A last line that was cut by a crash was never
followed by an egress; it is dropped and the next entry says so.

Not protected: whoever holds the site's disk can rewrite the whole chain, change its last line or cut its tail. Lines
are not signed and not countersigned by the coordinator.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from ..common.errors import VerificationError
from ..common.files import sync_folder

START = "0" * 64
KINDS = ("egress", "refusal")


@dataclass(frozen=True)
class Ledger:
    """The ledger in one file; made with the first entry, mode 0600."""

    path: Path

    def append(
        self,
        kind: str,
        *,
        run_id: str,
        round_index: int,
        phase: str,
        purpose: str,
        size_bytes: int,
        sha256: str,
        code: str = "",
    ) -> dict[str, Any]:
        """Adds one entry and fsyncs it; call it before the bytes leave.

        Args:
            kind: "egress" or "refusal".
            run_id: of the instruction, or "invalid".
            round_index: 0 before the first training round.
            phase: the instruction's name.
            purpose: what the bytes are for, in words.
            size_bytes: all bytes of the reply.
            sha256: hex, of the reply's head, which holds the SHA-256 of every vector.
            code: of a refusal or failure.

        Returns:
            The entry as written.

        Raises:
            OSError: the disk is full or not writable; then nothing may leave.
            VerificationError: the last complete line is not a ledger entry.
        """
        if kind not in KINDS:
            raise ValueError(f"ledger kind: expected one of {KINDS}, got '{kind}'")
        with self._locked() as file:
            last, torn = _last_line(file, self.path)
            before = last["total"] if last else 0
            entry: dict[str, Any] = {
                "bytes": size_bytes,
                "code": code,
                "kind": kind,
                "n": int(last["n"]) + 1 if last else 1,
                "phase": phase,
                "previous": last["digest"] if last else START,
                "purpose": purpose,
                "round": round_index,
                "run": run_id,
                "sha256": sha256,
                "time": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
                "total": before + (size_bytes if kind == "egress" else 0),
            }
            if torn:
                entry["dropped_torn_bytes"] = torn
                file.truncate(file.seek(-torn, os.SEEK_END))
            file.seek(0, os.SEEK_END)
            file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        if last is None:
            sync_folder(self.path.parent)  # a new file's name is in its folder, not in itself
        return entry

    def sent_bytes(self) -> int:
        """Bytes that left so far, for all runs.

        Raises:
            VerificationError: the last complete line is not a ledger entry.
        """
        if not self.path.exists():
            return 0
        with self._locked() as file:
            last, _ = _last_line(file, self.path)
        return int(last["total"]) if last else 0

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every entry, oldest first, each checked against the one before it.

        Raises:
            VerificationError: names the first line that is not what was written.
        """
        previous, total = START, 0
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    raise VerificationError(
                        f"{self.path}: line {number} is cut off, as by a crash before anything left; the next entry "
                        f"will drop it"
                    )
                entry = _parse(line)
                if entry is None or _line(entry) != line:
                    raise VerificationError(f"{self.path}: line {number} is not a ledger entry")
                if entry["previous"] != previous or entry["n"] != number:
                    raise VerificationError(f"{self.path}: line {number} does not follow the line before it")
                total += entry["bytes"] if entry["kind"] == "egress" else 0
                if entry["total"] != total:
                    raise VerificationError(f"{self.path}: line {number}: expected total {total}")
                previous = hashlib.sha256(line).hexdigest()
                yield entry

    def verify(self) -> int:
        """Checks the whole chain.

        Returns:
            The number of entries.

        Raises:
            VerificationError: names the first line that is not what was written.
        """
        return sum(1 for _ in self.entries())

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file open for reading and appending, held against other processes of this site."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(handle, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line as an entry, None when it is none."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    numbers, words = ("bytes", "n", "round", "total"), ("code", "kind", "phase", "previous", "purpose", "run", "sha256")
    if not isinstance(entry, dict) or not all(type(entry.get(key)) is int for key in numbers):
        return None
    return entry if all(type(entry.get(key)) is str for key in (*words, "time")) else None


def _last_line(file: IO[bytes], path: Path) -> tuple[dict[str, Any] | None, int]:
    """Number, total and digest of the last complete entry, and how many bytes of a torn line come after it."""
    block = b""
    start = file.seek(0, os.SEEK_END)
    # Backwards in blocks until two line ends are in sight: a ledger of years is not read for one line.
    while start > 0 and block.count(b"\n") < 2:
        step = min(4096, start)
        start -= step
        file.seek(start)
        block = file.read(step) + block
    complete, _, torn = block.rpartition(b"\n")
    if not complete:
        return None, len(torn)
    line = complete.rpartition(b"\n")[2] + b"\n"
    entry = _parse(line)
    if entry is None:
        raise VerificationError(f"{path}: its last line is not a ledger entry; the site stops until it is looked into")
    return {"n": entry["n"], "total": entry["total"], "digest": hashlib.sha256(line).hexdigest()}, len(torn)
