"""Key streams: AES-256 in counter mode from an all-zero counter block (docs/secure-sums.md §S7, NIST SP 800-38A).

Sites mask with them and the coordinator unmasks; stochastic rounding draws from one. Enters: 32-byte keys. Leaves: the
stream, or a vector with streams added or subtracted. Private: keys and streams. A key is used for one stream only.

Nothing here has the vector's size. A stream can begin anywhere, so several threads work on parts of one vector; a part
is walked in blocks that stay in a core's cache while all streams are applied to them. AES and the additions release
Python's lock. The stream's bytes are little-endian numbers on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

KEY_BYTES = 32
BLOCK_BYTES = 1 << 19  # measured from 64 KiB to 1 MiB: smaller ones wait for Python's lock, larger ones leave the cache
_AES_BYTES = 16
_ZEROS = memoryview(bytes(BLOCK_BYTES))


class KeyStream:
    """The stream of one key, read in order from any byte on."""

    def __init__(self, key: bytes, offset_bytes: int = 0) -> None:
        """Begins at byte `offset_bytes` of the stream.

        Raises:
            ValueError: the key is not 32 bytes, or the offset is negative.
        """
        check_key(key)
        if offset_bytes < 0:
            raise ValueError(f"offset_bytes: expected at least 0, got {offset_bytes}")
        block, skipped = divmod(offset_bytes, _AES_BYTES)
        self._encryptor = Cipher(AES256(key), CTR(block.to_bytes(_AES_BYTES, "big"))).encryptor()
        self._encryptor.update(_ZEROS[:skipped])

    def fill(self, out: NDArray[Any]) -> None:
        """Overwrites a contiguous array of at most `BLOCK_BYTES` with the stream's next bytes.

        Raises:
            ValueError: `out` is larger than a block.
        """
        if out.nbytes > BLOCK_BYTES:
            raise ValueError(f"out: expected at most {BLOCK_BYTES} bytes, got {out.nbytes}")
        if out.nbytes:
            self._encryptor.update_into(_ZEROS[: out.nbytes], out.view(np.uint8).data)


class Mask:
    """Several streams that are added to, or subtracted from, one vector block after block."""

    def __init__(self, plus: Sequence[bytes], minus: Sequence[bytes], offset_bytes: int = 0) -> None:
        """All streams begin at byte `offset_bytes`: where the first block lies in the vector.

        Raises:
            ValueError: a key is not 32 bytes, or the offset is negative.
        """
        self._streams = [(KeyStream(key, offset_bytes), np.add) for key in plus]
        self._streams += [(KeyStream(key, offset_bytes), np.subtract) for key in minus]
        self._buffer = np.empty(BLOCK_BYTES, np.uint8)

    def apply(self, block: NDArray[Any]) -> None:
        """Masks the vector's next block in place: uint32 or uint64, at most `BLOCK_BYTES`; sums wrap around."""
        buffer = self._buffer[: block.nbytes]
        drawn = buffer.view(block.dtype.newbyteorder("<"))
        for stream, combine in self._streams:
            stream.fill(buffer)
            combine(block, drawn, out=block)


def check_key(key: bytes) -> None:
    """Refuses what is no key.

    Raises:
        ValueError: not 32 bytes.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"key: expected {KEY_BYTES} bytes, got {len(key)}")
