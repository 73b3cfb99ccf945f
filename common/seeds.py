"""Named random streams: every draw of a run is a function of (run seed, purpose, site, round), on any machine.

Used by sites and simulations. Python's `hash()` differs between processes, and adding numbers to a seed makes streams
collide, so a stream is the BLAKE2b digest of its length-prefixed labels. Not for keys, masks or privacy noise: those
are never derived from a run's seed, which the coordinator knows.
"""

from __future__ import annotations

import hashlib
import hmac

import numpy as np

_DOMAIN = b"wardround 1 stream"


def derive(seed: int, *labels: str | int, size_bytes: int = 8) -> bytes:
    """`size_bytes` (1 to 64) bytes for the stream that `labels` name; `"1"` and `1` are different labels.

    >>> derive(0, "train", "site-01", 1) == derive(0, "train", "site-01", 1)
    True
    >>> derive(0, "train", "site-01", 1) == derive(0, "train", "site-0", 11)
    False
    """
    state = hashlib.blake2b(_DOMAIN, digest_size=size_bytes)
    for label in (seed, *labels):
        text = (f"i{label}" if isinstance(label, int) else f"s{label}").encode()
        state.update(len(text).to_bytes(4, "little") + text)
    return state.digest()


def derive_seed(seed: int, *labels: str | int) -> int:
    """A seed below 2^32 (what torch, numpy and transformers all accept) for the stream that `labels` name."""
    return int.from_bytes(derive(seed, *labels, size_bytes=4), "little")


def derive_rng(seed: int, *labels: str | int) -> np.random.Generator:
    """A numpy generator for the stream that `labels` name."""
    return np.random.default_rng(int.from_bytes(derive(seed, *labels, size_bytes=16), "little"))


def secret_rng(key: bytes, *about: str) -> np.random.Generator:
    """A stream of a site's secret, HMAC-SHA256(key, about): a patient's own, whatever other patients there are.

    >>> secret_rng(b"k", "test", "7").integers(100) == secret_rng(b"k", "test", "7").integers(100)
    True
    """
    digest = hmac.new(key, "\x00".join(about).encode(), hashlib.sha256).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
