"""The lines of a hospital's ledger: how one is written, and how anybody finds a line that is not what was written.

Used by the site that writes it (client/ledger.py) and by whoever was given a copy (server/receipts.py); pure functions
on bytes, docs/protocol.md §5. Enters: entries, the site's identity, a ledger's bytes. Leaves: lines. Private: nothing;
a ledger holds no patient's value.

    {"n":3,"previous":"<SHA-256 of line 2>", … keys in order … ,"signature":"<Ed25519>"}

`previous` is over the whole line before, its signature and line end included, and the signature is over everything
before it. So one valid signature on the last line vouches for every line: a changed, removed, inserted or moved line
breaks the chain, and a chain written anew needs the site's key. The other signatures say which line it was.

Formal Guarantees:
    `read` returns only what the holder of one of the given keys signed as the last entry of this very history.

Not protected: a ledger cut at its end is a whole ledger of an earlier time. Only what is known elsewhere shows that: a
receipt of the coordinator (common/receipt.py), or the site's `ledger.head`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Never, cast

from .errors import VerificationError
from .identity import Identity, verify
from .secagg.keys import SIGNATURE_BYTES

USE_LEDGER = "ledger"
START = "0" * 64
EGRESS, REFUSAL, SPEND = KINDS = ("egress", "refusal", "spend")
_NUMBERS = ("bytes", "n", "round", "total")
_WORDS = ("code", "kind", "phase", "previous", "purpose", "registry", "run", "sha256", "time")
_RECEIPT = {"n": int, "number": int, "signature": str}
_BEFORE, _AFTER = b',"signature":"', b'"}'
_HEX = 2 * SIGNATURE_BYTES
_TAIL = len(_BEFORE) + _HEX + len(_AFTER)
_WHOLE = re.compile(re.escape(_BEFORE) + b"[0-9a-f]{%d}" % _HEX + re.escape(_AFTER))
_N = re.compile(rb'\{"n":([1-9][0-9]{0,17}),"previous":"')


def make_line(entry: Mapping[str, Any], identity: Identity) -> bytes:
    """An entry as its line, signed, with the line end.

    Args:
        entry: with "n" and "previous"; no "signature".
        identity: the site's.
    """
    body = _body(entry)
    return body[:-1] + _BEFORE + identity.sign(USE_LEDGER, body).hex().encode() + _AFTER + b"\n"


def _body(entry: Mapping[str, Any]) -> bytes:
    rest = {key: value for key, value in entry.items() if key not in ("n", "previous")}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return b'{"n":%d,"previous":"%s",' % (entry["n"], entry["previous"].encode()) + text[1:].encode()


def line_digest(line: bytes) -> str:
    """SHA-256 hex of a line, with its line end: what the next line's `previous` is."""
    return hashlib.sha256(line).hexdigest()


def _parse(line: bytes) -> dict[str, Any] | None:
    """A line, without its line end, as an entry with its signature; None when it is none. No signature check."""
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    entry = cast("dict[str, Any]", found)
    return entry if _is_entry(entry) else None


def _as_written(line: bytes, entry: Mapping[str, Any]) -> bool:
    """Whether a line is what `make_line` writes for the entry, byte for byte."""
    body = _body({key: value for key, value in entry.items() if key != "signature"})
    return body[:-1] == line[:-_TAIL] and _WHOLE.fullmatch(line[-_TAIL:]) is not None


def _is_entry(entry: dict[str, Any]) -> bool:
    if not all(type(entry.get(key)) is int for key in _NUMBERS):
        return False
    if not all(type(entry.get(key)) is str for key in (*_WORDS, "signature")):
        return False
    extra = set(entry) - {*_NUMBERS, *_WORDS, "signature"}
    receipt = entry.get("receipt", {"n": 1, "number": 1, "signature": ""})
    spent = {"event", "orders"} if entry["kind"] == SPEND else set[str]()
    return (
        entry["kind"] in KINDS
        and spent <= extra <= {"receipt", "dropped_torn_bytes"} | spent
        and all(isinstance(entry[key], dict) for key in spent)
        and type(entry.get("dropped_torn_bytes", 0)) is int
        and isinstance(receipt, dict)
        and {key: type(value) for key, value in cast("dict[str, Any]", receipt).items()} == _RECEIPT
    )


def signer_of(line: bytes, ids: Sequence[bytes]) -> bytes | None:
    """Which of these keys signed a line (without its line end); None: none of them."""
    if not _WHOLE.fullmatch(line[-_TAIL:]):
        return None
    body, signature = line[:-_TAIL] + b"}", bytes.fromhex(line[-_TAIL + len(_BEFORE) : -len(_AFTER)].decode())
    for public in reversed(ids):  # the key in use first
        try:
            verify(public, USE_LEDGER, body, signature, "line")
        except VerificationError:
            continue
        return public
    return None


@dataclass(frozen=True)
class Checked:
    """A ledger that holds what was written.

    Attributes:
        entries: oldest first, each with its signature.
        digests: of their lines.
        torn: what comes after the last line end: a line that a crash cut off.
        signer: the key of the last line; empty where there is none.
    """

    entries: list[dict[str, Any]]
    digests: list[str]
    torn: bytes
    signer: bytes


def read(data: bytes, source: str, ids: Sequence[bytes], *, every_signature: bool = False) -> Checked:
    """Checks a ledger: a few µs a line.

    Args:
        data: the file.
        source: what to call it in an error.
        ids: public keys of the site, in the order in which they were in use.
        every_signature: check that of every line, 0.1 ms each, and that it is written as lines are. The last line's
            signature vouches for all before it, so a site that goes on writing needs no more.

    Raises:
        VerificationError: names the first line that is not what was written.
    """
    lines = data.split(b"\n")
    torn = lines.pop()
    digests: list[str] = []
    previous = START
    for number, line in enumerate(lines, start=1):
        if not line.startswith(b'{"n":%d,"previous":"%s",' % (number, previous.encode())):
            _blame(lines, number, source, ids)
        previous = hashlib.sha256(line + b"\n").hexdigest()
        digests.append(previous)
    signer = b""
    if lines:
        signer = signer_of(lines[-1], ids) or _unsigned(len(lines), source)
    entries: list[dict[str, Any]] = []
    total, newest = 0, 0
    for number, line in enumerate(lines, start=1):
        entry = _parse(line)
        if entry is None or (every_signature and not _as_written(line, entry)):
            raise VerificationError(f"{source}: line {number} is not a ledger entry")
        if every_signature:
            by = signer_of(line, ids[newest:])
            if by is None:
                _unsigned(number, source)
            newest = ids.index(by)  # a key that was retired signs no more
        total += entry["bytes"] if entry["kind"] == EGRESS else 0
        if entry["total"] != total:
            raise VerificationError(f"{source}: line {number}: expected total {total}, got {entry['total']}")
        entries.append(entry)
    return Checked(entries, digests, torn, signer)


def _unsigned(number: int, source: str) -> Never:
    raise VerificationError(
        f"{source}: line {number} was changed, or this site did not write it: its signature is wrong"
    )


def _blame(lines: Sequence[bytes], number: int, source: str, ids: Sequence[bytes]) -> Never:
    """Says which line broke the chain where line `number` does not follow the line before it."""
    for suspect in range(max(1, number - 1), number + 1):  # the line before changed, and so did its digest; or this one
        if signer_of(lines[suspect - 1], ids) is None:
            _unsigned(suspect, source)
    found = _N.match(lines[number - 1])
    says = int(found[1]) if found else number
    if says > number:
        what = f"entry {number} was removed" if says == number + 1 else f"entries {number} to {says - 1} were removed"
        raise VerificationError(f"{source}: line {number} is entry {says}: {what}, or lines were moved")
    if says < number:
        raise VerificationError(f"{source}: line {number} is entry {says}: it was inserted or moved there")
    raise VerificationError(f"{source}: line {number} does not follow the line before it: one of the two was put there")


def whole_line_in(torn: bytes, ids: Sequence[bytes]) -> int:
    """How many of the bytes after the last line end are a whole signed line; 0: a crash cut it off.

    A crash may lose the end of a line that was not acknowledged yet; it never adds to one.
    """
    found = _WHOLE.search(torn)
    return found.end() if found is not None and signer_of(torn[: found.end()], ids) is not None else 0
