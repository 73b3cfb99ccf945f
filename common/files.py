"""Files that survive a kill: written whole or not at all. Used by the coordinator's journal and a site's state folder.

A *record* is one file of named scalars and vectors with a checksum over all of it: what must be found again after a
restart, bit for bit, or be known to be damaged. Raw little-endian bytes behind a JSON header; no pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .errors import RunFolderError, VerificationError

_MAGIC = b"WREC1\n"
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 32
_DTYPES = frozenset({"<f4", "<f8", "<i8", "<u4", "|u1"})


def private_folder(path: Path) -> Path:
    """Makes a folder (and its parents) that only its owner may enter, mode 0700, and returns it."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot be made or written, before hours of work; leaves nothing behind.

    Raises:
        RunFolderError: it lies below a file, or where nothing may be written.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise RunFolderError(f"{folder}: expected a folder, got a file at {there}")
    try:
        # Really making something: permission bits say nothing about root, read-only disks and quotas.
        tempfile.TemporaryDirectory(prefix=".wardround-", dir=there).cleanup()
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written: {there}: {error.strerror}; choose another folder") from None


def sweep(folder: Path) -> None:
    """Removes temporary files that a killed `write_atomic` left; only while nobody else writes in the folder."""
    for left in folder.glob(".*.tmp"):
        left.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Makes renames and new names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, *parts: bytes | memoryview, mode: int = 0o600) -> None:
    """Writes the parts, one after another, to a temporary neighbour, fsyncs it, and renames it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def overwrite(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Writes a file in place and fsyncs it: a kill may leave half of it, so something else must say that it counts."""
    new = not path.exists()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if new:
        sync_folder(path.parent)


@dataclass(frozen=True)
class Record:
    """What a record file holds: JSON values and read-only 1-D vectors."""

    values: Mapping[str, Any]
    vectors: Mapping[str, NDArray[Any]]


def write_record(path: Path, values: Mapping[str, Any], vectors: Mapping[str, NDArray[Any]] | None = None) -> None:
    """Writes a record atomically.

    Args:
        path: the file.
        values: JSON values by name.
        vectors: 1-D float32, float64, int64, uint32 or uint8 by name.
    """
    raw: dict[str, memoryview] = {}
    described: dict[str, tuple[str, int]] = {}
    for name, vector in sorted((vectors or {}).items()):  # the order in which the header lists them
        dtype = vector.dtype.newbyteorder("<").str
        if dtype not in _DTYPES or vector.ndim != 1:
            raise ValueError(f"record vector '{name}': expected 1-D of {sorted(_DTYPES)}, got {vector.ndim}-D {dtype}")
        raw[name] = memoryview(cast("Any", np.ascontiguousarray(vector, dtype).view(np.uint8)))
        described[name] = (dtype, int(vector.size))
    header = json.dumps({"values": values, "vectors": described}, sort_keys=True, allow_nan=False).encode()
    parts = [_MAGIC, _LENGTH.pack(len(header)), header, *raw.values()]
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    write_atomic(path, *parts, state.digest())


def record_digest(path: Path) -> bytes:
    """The checksum at a record's end, unverified: two records with the same one hold the same, or one is damaged."""
    with path.open("rb") as file:
        file.seek(-_DIGEST_BYTES, os.SEEK_END)
        return file.read()


def read_record(path: Path) -> Record:
    """Reads a record.

    Raises:
        VerificationError: damaged: cut, extended or changed.
        FileNotFoundError: no such file.
    """
    data = memoryview(path.read_bytes())  # vectors are views of it: it is in memory once
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if bytes(body[: len(_MAGIC)]) != _MAGIC or hashlib.sha256(body).digest() != bytes(digest):
        raise VerificationError(f"{path}: damaged: its checksum is not that of its content")
    start = len(_MAGIC) + _LENGTH.size
    vectors: dict[str, NDArray[Any]] = {}
    try:
        (size,) = _LENGTH.unpack(body[len(_MAGIC) : start])
        header = cast("dict[str, Any]", json.loads(bytes(body[start : start + size])))
        offset, values = start + size, dict(header["values"])
        for name, (dtype, count) in header["vectors"].items():
            if dtype not in _DTYPES or count < 0:
                raise ValueError(dtype)
            vectors[name] = np.frombuffer(body, dtype=dtype, count=count, offset=offset)
            offset += vectors[name].nbytes
    except (struct.error, AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        raise VerificationError(f"{path}: damaged: its content is not that of a record") from None
    return Record(values, vectors)
