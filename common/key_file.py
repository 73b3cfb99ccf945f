"""Files that hold a secret: a site's or the coordinator's identity key, and the passphrase that opens it.

Used by both roles. Enters: paths, and the environment variable WARDROUND_PASSPHRASE. Leaves: nothing. A file that
others may read is refused, whatever is in it; one that is there is never overwritten. No error holds what a file holds.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from .errors import ConfigError
from .files import sync_folder
from .identity import Identity

PASSPHRASE = "WARDROUND_PASSPHRASE"
_MAX_BYTES = 4096


def passphrase(file: Path | None, environment: Mapping[str, str], setting: str) -> bytes:
    """The passphrase: of the environment where it is set, else the first line of a file.

    Args:
        file: a file of mode 0600, or None.
        environment: `os.environ`.
        setting: how a person names that file: a key of site.toml or an option.

    Raises:
        ConfigError: there is none, it is empty, the file cannot be read or others can read it.
    """
    value = environment.get(PASSPHRASE)
    if value is not None:
        source, found = PASSPHRASE, value.encode("utf-8", "surrogateescape")
    elif file is not None:
        if not os.path.lexists(file):
            raise ConfigError(
                f"{file}: no such file: passphrase file: write the passphrase into it, one line of 12 characters or "
                "more, mode 0600"
            )
        source, found = str(file), read_secret(file, "passphrase file")
        found = found.removesuffix(b"\n").removesuffix(b"\r")
        if b"\n" in found:
            raise ConfigError(f"{source}: expected one line, the passphrase")
    else:
        raise ConfigError(f"no passphrase: set {PASSPHRASE}, or name a file of mode 0600 with {setting}")
    if not found:
        raise ConfigError(f"{source}: expected a passphrase, it is empty")
    return found


def read_secret(path: Path, what: str) -> bytes:
    """A small file that only its owner can read.

    Raises:
        ConfigError: missing, not a file, unreadable, readable by others, too large.
    """
    try:
        # Not waiting for a writer, should it be a pipe; what was opened is what is checked and read.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file: {what}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {what}: cannot be read: {(error.strerror or '').lower()}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: {what}: expected a file")
        if status.st_uid not in (os.geteuid(), 0):
            raise ConfigError(f"{path}: {what}: belongs to another user: call `chown` on it")
        if status.st_mode & 0o077:
            mode = stat.S_IMODE(status.st_mode)
            raise ConfigError(f"{path}: {what}: others may use it (mode {mode:04o}): call `chmod 600 {path}`")
        data = os.read(handle, _MAX_BYTES + 1)
    finally:
        os.close(handle)
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: {what}: expected at most {_MAX_BYTES} bytes")
    return data


def read_key(path: Path, secret: bytes) -> Identity:
    """The identity in a file.

    Raises:
        ConfigError: as `read_secret`; wrong passphrase; damaged.
    """
    return Identity.unlock(read_secret(path, "identity key"), secret, str(path))


def write_key(path: Path, identity: Identity, secret: bytes) -> None:
    """Writes an identity, encrypted, mode 0600.

    Raises:
        FileExistsError: there is one already; it stays.
        ConfigError: the passphrase is too short.
    """
    write_once(path, identity.lock(secret), 0o600)


def write_once(path: Path, data: bytes, mode: int) -> None:
    """Writes a whole file durably where none is.

    Raises:
        FileExistsError: there is one already; it stays as it is.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, fails where something is
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
