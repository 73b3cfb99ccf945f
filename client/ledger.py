"""The hospital's own record of everything that left it: signed, hash-chained JSON lines, on disk before the bytes go.

Run by the site. Enters: what is about to leave (never its content), what was refused, what is spent of the privacy
budget. Leaves: nothing. Private: the file stays on the site; it holds no patient value, only times, phases, sizes,
digests and budget events. common/ledger.py is what a line is and how a changed one is found.

    state/ledger.jsonl   the lines, mode 0600
    ledger.head          beside site.toml: number and SHA-256 of the newest budget event's line

`append` and `spend` return only after fsync: a machine that dies afterwards has recorded more than it sent, never less.
A last line that was cut by a crash was never followed by an egress; it is dropped and the next entry says so. `total`
is the sum of all bytes that left up to and with the line, whatever the run.

The ledger is checked as a whole by every process that writes it, and again whenever something else wrote it: a site
whose ledger is not what was written sends nothing. That its end was cut off, or an old copy put back, shows where a
receipt of the coordinator names a reply that is not in it (`confirm`), and where `ledger.head` names a budget event
that is not. Neither shows in a first message of a new run of a site whose whole folder was put back.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from ..common import ledger as lines
from ..common.errors import LedgerBehindError, RefusedError, VerificationError
from ..common.files import sync_folder, write_atomic
from ..common.identity import Identity
from ..common.ledger import EGRESS, KINDS, SPEND, START
from ..common.receipt import Receipt

_KEPT = 64  # ledgers whose state a process remembers: more sites than one has, but for a large simulation


class LedgerError(OSError):
    """The ledger cannot be written: nothing may leave, not even a code."""


class Keys(Protocol):
    """Whose ledger it is; client/identity.py's `SiteKeys`."""

    def identity(self) -> Identity:
        """The key that signs."""
        ...

    def ids(self) -> list[bytes]:
        """Public keys that signed, in the order in which they were in use."""
        ...


@dataclass(frozen=True)
class Spend:
    """One budget event of the ledger.

    Attributes:
        run: the run's id.
        round_index: of the instruction.
        event: what was spent (common/privacy.py).
        orders: of the budgets' filters, where this event was the first that they counted (client/policy.py).
        number: of its line.
    """

    run: str
    round_index: int
    event: dict[str, Any]
    orders: dict[str, float]
    number: int


@dataclass(eq=False)
class _State:
    """What a checked ledger says, kept up to date by the process that writes it.

    Attributes:
        file: inode, size and time of change, as it was read; anything else is read again.
        head: what `ledger.head` held then.
        torn: bytes after the last line end.
        count, total, digest: of the last entry.
        left: by run, every reply's SHA-256, round, phase and size → its newest entry's number.
        replies: by run, how many there were.
        egress: by run, round and phase, the number of the newest entry of what left.
        bytes_of: by run, what left.
        registries: by run and round, the registry's digest of the newest entry that has one.
        spent: every budget event.
        spender: number and digest of the newest budget event's line.
    """

    file: tuple[int, int, int]
    head: bytes
    torn: int = 0
    count: int = 0
    total: int = 0
    digest: str = START
    left: dict[str, dict[tuple[str, int, str, int], int]] = field(default_factory=dict)
    replies: dict[str, int] = field(default_factory=dict)
    egress: dict[tuple[str, int, str], int] = field(default_factory=dict)
    bytes_of: dict[str, int] = field(default_factory=dict)
    registries: dict[tuple[str, int], str] = field(default_factory=dict)
    spent: list[Spend] = field(default_factory=list)
    spender: tuple[int, str] = (0, "")

    def note(self, entry: Mapping[str, Any], digest: str) -> None:
        """Takes the next entry in."""
        self.count, self.total, self.digest = entry["n"], entry["total"], digest
        run, index = entry["run"], entry["round"]
        if entry["kind"] == SPEND:
            self.spent.append(Spend(run, index, dict(entry["event"]), dict(entry["orders"]), self.count))
            self.spender = self.count, digest
            return
        if entry["code"] == LedgerBehindError.code:
            return  # no reply that a receipt is for: a ledger that is behind does not catch up by saying so
        about = (entry["sha256"], index, entry["phase"], entry["bytes"])  # failures of two phases may be the same bytes
        self.left.setdefault(run, {})[about] = self.count
        self.replies[run] = self.replies.get(run, 0) + 1
        if entry["kind"] == EGRESS:
            self.bytes_of[run] = self.bytes_of.get(run, 0) + entry["bytes"]
            self.egress[run, index, entry["phase"]] = self.count
        if entry["registry"]:
            self.registries[run, index] = entry["registry"]


_states: dict[Path, _State] = {}


@dataclass(frozen=True)
class Ledger:
    """The ledger in one file; made with the first entry.

    Attributes:
        path: the file.
        keys: the site's.
        head: of the newest budget event, outside the state folder.
    """

    path: Path
    keys: Keys
    head: Path

    def check(self) -> int:
        """Looks whether the ledger is what was written; at once where this process knows that nothing else wrote it.

        Returns:
            The number of entries.

        Raises:
            VerificationError: names the first line that is not what was written, or what is missing at the end.
            ConfigError: there is a ledger and no identity.
        """
        if not self.path.exists():
            self._check_head([], self._read_head())
            return 0
        with self._locked() as handle:
            return self._state(handle).count

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
        registry: str = "",
        receipt: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Adds one entry and fsyncs it; call it before the bytes leave.

        Args:
            kind: "egress" or "refusal".
            run_id: of the instruction, or "invalid".
            round_index: 0 before the first training round.
            phase: the instruction's route.
            purpose: what the bytes are for, in words.
            size_bytes: all bytes of the reply.
            sha256: hex, of the reply's head, which holds the SHA-256 of every vector.
            code: of a refusal or failure.
            registry: digest of the registry that was read for this reply; "": none was, and the entry holds that of
                the round's work.
            receipt: what `confirm` gave.

        Returns:
            The entry as written.

        Raises:
            LedgerError: the disk is full or not writable; then nothing may leave.
            VerificationError: the ledger is not what was written.
            ConfigError: no identity, or it cannot be opened.
        """
        if kind == SPEND or kind not in KINDS:
            raise ValueError(f"ledger kind: expected one of {KINDS[:2]}, got '{kind}'")
        with self._locked() as handle:
            state = self._state(handle)
            entry: dict[str, Any] = {
                "bytes": size_bytes,
                "code": code,
                "kind": kind,
                "phase": phase,
                "purpose": purpose,
                "registry": registry or (state.registries.get((run_id, round_index), "") if kind == EGRESS else ""),
                "round": round_index,
                "run": run_id,
                "sha256": sha256,
                "total": state.total + (size_bytes if kind == EGRESS else 0),
            }
            if receipt is not None:
                entry["receipt"] = dict(receipt)
            return self._write(handle, state, entry)

    def spend(
        self,
        event: Mapping[str, Any],
        run_id: str,
        round_index: int,
        purpose: str,
        afford: Callable[[Sequence[Spend]], Mapping[str, float]] = lambda history: {},
    ) -> int:
        """Records that a part of the privacy budget is spent, before the computation that spends it.

        A repeated instruction spends once: an event of the same kind, run and round is neither asked for nor recorded
        again.

        Args:
            event: "kind", and numbers that say how much (common/privacy.py).
            run_id: of the instruction.
            round_index: likewise.
            purpose: what it is spent for, in words.
            afford: given all that was spent before, raises RefusedError where the budget does not hold; what it returns
                is recorded with the event. No other process of this site spends meanwhile.

        Returns:
            The number of its line, of this or of an earlier time.

        Raises:
            RefusedError: an event of this kind, run and round was recorded with other numbers; or by `afford`.
            LedgerError, VerificationError, ConfigError: as `append`; then nothing may be computed.
        """
        wanted = _event(event)
        with self._locked() as handle:
            state = self._state(handle)
            known = [one for one in state.spent if (one.run, one.round_index) == (run_id, round_index)]
            before = next((one for one in known if one.event["kind"] == wanted["kind"]), None)
            if before is None:
                entry: dict[str, Any] = {
                    "bytes": 0,
                    "code": "",
                    "event": wanted,
                    "kind": SPEND,
                    "orders": dict(afford(tuple(state.spent))),
                    "phase": "",
                    "purpose": purpose,
                    "registry": "",
                    "round": round_index,
                    "run": run_id,
                    "sha256": "",
                    "total": state.total,
                }
                self._write(handle, state, entry)
            elif before.event != wanted:
                spent, asked = (json.dumps(one, sort_keys=True) for one in (before.event, wanted))
                raise RefusedError(
                    f"round {round_index}: '{wanted['kind']}' was spent as {spent}, the instruction asks for {asked}"
                )
            self._write_head(state)
            return state.count if before is None else before.number

    def history(self) -> tuple[Spend, ...]:
        """Every budget event ever, oldest first.

        Raises:
            VerificationError, ConfigError: as `check`.
        """
        if not self.path.exists():
            self.check()
            return ()
        with self._locked() as handle:
            return tuple(self._state(handle).spent)

    def spent(self, run_id: str | None = None) -> list[dict[str, Any]]:
        """The events of `history`, of all runs or of one."""
        return [dict(one.event) for one in self.history() if run_id in (None, one.run)]

    def sent_bytes(self, run_id: str | None = None) -> int:
        """Bytes that left so far, for all runs or for one.

        Raises:
            VerificationError, ConfigError: as `check`.
        """
        if not self.path.exists():
            self.check()
            return 0
        with self._locked() as handle:
            state = self._state(handle)
        return state.total if run_id is None else state.bytes_of.get(run_id, 0)

    def has_left(self, run_id: str, round_index: int, phase: str, since: int = 0) -> bool:
        """Whether a reply to such an instruction, failures apart, left after line `since`.

        Raises:
            VerificationError, ConfigError: as `check`.
        """
        if not self.path.exists():
            self.check()
            return False
        with self._locked() as handle:
            return self._state(handle).egress.get((run_id, round_index, phase), 0) > since

    def confirm(self, receipt: Receipt) -> dict[str, Any]:
        """Looks a receipt, whose signature was checked, up in this ledger.

        Returns:
            What the next entry holds of it: the number of the entry that it confirms, its own, its signature.

        Raises:
            LedgerBehindError: the coordinator received a reply that is not here: the ledger's end was cut off, or an
                old copy was put back.
            VerificationError, ConfigError: as `check`.
        """
        run, number, replies = receipt.run, 0, 0
        if self.path.exists():
            with self._locked() as handle:
                state = self._state(handle)
            about = (receipt.sha256, receipt.round_index, receipt.phase, receipt.size_bytes)
            number, replies = state.left.get(run, {}).get(about, 0), state.replies.get(run, 0)
        if not number or replies < receipt.number:  # fewer: one of several equal replies is missing
            raise LedgerBehindError(
                f"{self.path}: the coordinator received {receipt.number} replies of this run, the last in round "
                f"{receipt.round_index} ({receipt.phase}, {receipt.size_bytes} bytes); this ledger does not show them "
                "all: its end was cut off, or an old copy was put back. Put the newest copy of the site's folder back"
            )
        return {"n": number, "number": receipt.number, "signature": receipt.signature.hex()}

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every entry, oldest first, after a check of all of them, every signature included.

        Raises:
            VerificationError: names the first line that is not what was written, or what is missing at the end.
            ConfigError: there is a ledger and no identity.
        """
        yield from self.verified().entries

    def verified(self) -> lines.Checked:
        """The whole ledger, every signature checked; changes nothing. Raises as `entries`."""
        if not self.path.exists():
            self._check_head([], self._read_head())
            return lines.Checked([], [], b"", b"")
        data, ids = self.path.read_bytes(), self._ids()
        checked = lines.read(data, str(self.path), ids, every_signature=True)
        if checked.torn:
            number = len(checked.entries) + 1
            if 0 < lines.whole_line_in(checked.torn, ids) < len(checked.torn):
                raise VerificationError(f"{self.path}: line {number} was changed at its end")
            raise VerificationError(
                f"{self.path}: line {number} is cut off, as by a crash before anything left; the next entry will drop "
                "it"
            )
        self._check_head(checked.digests, self._read_head())
        return checked

    def verify(self) -> int:
        """Checks everything; the number of entries. Raises as `entries`."""
        return len(self.verified().entries)

    # ---- inside the lock

    @contextmanager
    def _locked(self) -> Iterator[int]:
        """The file open for reading and appending, held against other processes of this site."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)

    def _state(self, handle: int) -> _State:
        """What the ledger says, after a check where something else than this process wrote it."""
        file, head = _file(handle), self._read_head()
        known = _states.get(self.path)
        if known is not None and (known.file, known.head) == (file, head):
            return known
        data = _read(handle, file[1])
        state = _State(file, head)
        if data:
            ids = self._ids()
            checked = lines.read(data, str(self.path), ids)
            whole = lines.whole_line_in(checked.torn, ids)
            if whole:  # a crash lost the line end and nothing else, or somebody changed it
                if whole < len(checked.torn):
                    raise VerificationError(
                        f"{self.path}: line {len(checked.entries) + 1} was changed at its end; the site stops until it "
                        "is looked into"
                    )
                try:
                    _append(handle, b"\n")
                except OSError as error:
                    raise LedgerError(error.errno, f"ledger: {error.strerror}", str(self.path)) from error
                checked = lines.read(data + b"\n", str(self.path), ids)
                state.file = _file(handle)
            for entry, digest in zip(checked.entries, checked.digests, strict=True):
                state.note(entry, digest)
            state.torn = len(checked.torn)
            self._check_head(checked.digests, head)
        else:
            self._check_head([], head)
        if len(_states) >= _KEPT:
            _states.clear()
        _states[self.path] = state
        return state

    def _write(self, handle: int, state: _State, content: Mapping[str, Any]) -> dict[str, Any]:
        """Appends an entry and fsyncs it; all of it or, as far as the disk lets, nothing."""
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
        entry: dict[str, Any] = {**content, "n": state.count + 1, "previous": state.digest, "time": now}
        if state.torn:
            entry["dropped_torn_bytes"] = state.torn
        line = lines.make_line(entry, self.keys.identity())
        start = os.fstat(handle).st_size - state.torn
        _states.pop(self.path, None)  # until it is on disk, nobody knows what is
        try:
            if not state.count:
                sync_folder(self.path.parent)  # a new file's name is in its folder, not in itself
            if state.torn:
                os.ftruncate(handle, start)
            _append(handle, line)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(handle, start)
            raise LedgerError(error.errno, f"ledger: {error.strerror}", str(self.path)) from error
        state.torn, state.file = 0, _file(handle)
        state.note(entry, lines.line_digest(line))
        _states[self.path] = state
        return entry

    def _ids(self) -> list[bytes]:
        ids = self.keys.ids()
        if not ids:
            raise VerificationError(
                f"{self.path}: this site's identity is missing, so nobody can tell whose lines they are"
            )
        return ids

    # ---- the newest budget event, outside the state folder

    def _read_head(self) -> bytes:
        try:
            return self.head.read_bytes()
        except FileNotFoundError:
            return b""

    def _write_head(self, state: _State) -> None:
        number, digest = state.spender
        content = json.dumps({"n": number, "sha256": digest}, sort_keys=True).encode() + b"\n"
        if content == state.head:
            return
        try:
            write_atomic(self.head, content)
        except OSError as error:
            raise LedgerError(error.errno, f"ledger: {error.strerror}", str(self.head)) from error
        state.head = content

    def _check_head(self, digests: list[str], content: bytes) -> None:
        """Refuses a ledger without the budget event that `ledger.head` names."""
        if not content:
            return
        try:
            found = json.loads(content)
            number, digest = int(found["n"]), str(found["sha256"])
        except (ValueError, KeyError, TypeError):
            raise VerificationError(f"{self.head}: damaged: it says which entry spent budget last") from None
        if not 1 <= number <= len(digests) or digests[number - 1] != digest:
            raise VerificationError(
                f"{self.path}: entry {number}, which spent privacy budget, is missing of {len(digests)}: the ledger's "
                "end was cut off, or an old copy was put back. Put the newest copy back; without it this hospital no "
                f"longer knows what it has spent, and only you can decide that it goes on: then remove {self.head}"
            )


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    """A budget event as it is written: a kind, and finite numbers or words."""
    kind = event.get("kind")
    if not isinstance(kind, str) or not kind:
        raise ValueError("budget event: expected its kind, a word")
    for key, value in event.items():
        if type(value) not in (str, int, float) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"budget event: {key}: expected a word or a finite number, got {type(value).__name__}")
    # As it comes back from the file, so that a repetition is seen to be one.
    return dict(json.loads(json.dumps(dict(event), sort_keys=True)))


def _file(handle: int) -> tuple[int, int, int]:
    about = os.fstat(handle)
    return about.st_ino, about.st_size, about.st_ctime_ns


def _read(handle: int, size: int) -> bytes:
    parts: list[bytes] = []
    os.lseek(handle, 0, os.SEEK_SET)
    while size > 0 and (part := os.read(handle, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _append(handle: int, data: bytes) -> None:
    """All of the data at the file's end, on disk."""
    while data:
        data = data[os.write(handle, data) :]
    os.fsync(handle)
