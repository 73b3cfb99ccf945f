"""Numbers of an update as integers that add up without overflow, and back (docs/secure-sums.md §S10).

A site turns its clipped, weighted update into unsigned 32-bit values, in the memory that the update was in; the
coordinator turns the sum of all sites' values into the weighted mean. Enters: a float32 vector, its weight; the sum.
Leaves: integers modulo 2^32, how many values were clipped; the mean. Private: a site's vector before it is masked. The
rounding hides nothing: the coordinator knows the run's seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, VerificationError
from .secagg.prg import BLOCK_BYTES, KEY_BYTES, KeyStream
from .seeds import derive

MIN_SITES, MAX_SITES = 3, 1024
TAIL_LIMIT = 2**40  # the largest tail value of one site: 1024 of them stay below 2^51
BLOCK_VALUES = BLOCK_BYTES // 4

Float32Array = NDArray[np.float32]
RingArray = NDArray[np.uint32]
TailArray = NDArray[np.uint64]


@dataclass(frozen=True)
class FixedPoint:
    """How numbers become integers in one run.

    Formal Guarantees: a quantised value lies in ±`limit`, so that sums of at most `max_sites` of them lie strictly
    inside ±2^31 (limit × max_sites ≤ 2^31 − 1). Exactly `limit`, one more than scale × R, is reached only where float64
    rounds |x| = R up. The sum over n sites, over `scale`, differs from the exact sum of the clipped and weighted values
    by less than n / scale, to within float64's own rounding (2^-20 of that); its expected difference is zero to within
    the 2^-32 steps of the random numbers.

    Attributes:
        range_: R; values outside ±R are clipped. Positive.
        max_sites: most sites that a sum may have, 3 to 1024.
        max_weight: W, the largest weight of a site, at least 1.
    """

    range_: float
    max_sites: int
    max_weight: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.range_) and self.range_ > 0):
            raise ConfigError(f"clipping range: expected a positive number, got {self.range_}")
        if not MIN_SITES <= self.max_sites <= MAX_SITES:
            raise ConfigError(f"max_sites: expected {MIN_SITES} to {MAX_SITES}, got {self.max_sites}")
        if not (math.isfinite(self.max_weight) and self.max_weight >= 1):
            raise ConfigError(f"max_weight: expected at least 1, got {self.max_weight}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"clipping range: {self.range_} leaves no scale that float64 can hold")

    @property
    def limit(self) -> int:
        """What no quantised value exceeds in size: (2^31 − 1) div max_sites."""
        return (2**31 - 1) // self.max_sites

    @property
    def scale(self) -> float:
        """Integer steps for one unit of the update: (limit − 1) / R."""
        return (self.limit - 1) / self.range_

    def check_sites(self, sites: int) -> None:
        """Refuses a round that could overflow, before it starts.

        Raises:
            ConfigError: more sites than the scale was made for.
        """
        if not 1 <= sites <= self.max_sites:
            raise ConfigError(f"sites in a sum: expected 1 to {self.max_sites}, got {sites}; raise max_sites")

    def check_weight(self, weight: float) -> None:
        """Refuses a weight that would overflow.

        Raises:
            ConfigError: not from 1 to W.
        """
        if not 1 <= weight <= self.max_weight:  # NaN too
            raise ConfigError(f"weight of a site: expected 1 to {self.max_weight}; raise max_weight")

    def quantise(self, vector: Float32Array, weight: float, rounding_key: bytes) -> tuple[RingArray, int]:
        """Quantises in place: the vector's memory holds the result.

        Args:
            vector: float32, 1-D, contiguous, writable. After a refusal it is as it was.
            weight: w, 1 to W.
            rounding_key: of this site and round, see `rounding_key`.

        Returns:
            The same memory as uint32, modulo 2^32, and how many values lay outside ±R.

        Raises:
            VerificationError: NaN or infinity.
            ConfigError: the weight is out of range.
            ValueError: not such a vector, or no key.
        """
        ring = as_ring(vector)
        quantiser = Quantiser(self, weight, rounding_key)
        check_finite(vector)
        return ring, sum(quantiser.apply(vector[block]) for block in blocks(vector.size))

    def mean(
        self, ring: RingArray, total_weight: float, out: NDArray[np.floating[Any]] | None = None
    ) -> NDArray[np.floating[Any]]:
        """The weighted mean of the sites' updates: W · Σ / (scale · Σw), Σ as a signed 32-bit integer.

        Args:
            ring: the sum, uint32, 1-D, contiguous.
            total_weight: Σw of the sites in it, positive.
            out: float32 or float64 of the same length; may be the sum's own memory (`ring.view(np.float32)`), so that
                the coordinator needs no second vector. New float64 when None.

        Returns:
            `out`.

        Raises:
            VerificationError: the total weight is not positive.
            ValueError: another dtype or length.
        """
        if not (math.isfinite(total_weight) and total_weight > 0):
            raise VerificationError("sum of weights: expected a positive number")
        result = np.empty(ring.size, np.float64) if out is None else out
        if ring.dtype != np.uint32 or ring.ndim != 1 or result.shape != ring.shape:
            raise ValueError(f"expected uint32 and an output alike, got {ring.dtype} {ring.shape}, {result.shape}")
        signed = ring.view(np.int32)
        scratch = np.empty(min(BLOCK_VALUES, ring.size), np.float64)
        for block in blocks(ring.size):
            values = scratch[: block.stop - block.start]
            np.copyto(values, signed[block])  # exact; whole numbers multiply in int32 otherwise, and overflow
            values *= self.max_weight
            values /= self.scale * total_weight
            result[block] = values
        return result


class Quantiser:
    """Quantises one site's vector block after block, from any value on: a thread's part of the work."""

    def __init__(self, fixed_point: FixedPoint, weight: float, rounding_key: bytes, first: int = 0) -> None:
        """Begins at value number `first` of the vector.

        Raises:
            ConfigError: the weight is out of range.
            ValueError: no key.
        """
        fixed_point.check_weight(weight)
        self._range = fixed_point.range_
        self._share = weight / fixed_point.max_weight
        self._scale = fixed_point.scale
        self._rounding = KeyStream(rounding_key, 4 * first)
        self._drawn = np.empty(BLOCK_VALUES, np.dtype("<u4"))
        self._values = np.empty(BLOCK_VALUES, np.float64)
        self._scratch = np.empty(BLOCK_VALUES, np.float64)

    def apply(self, block: Float32Array) -> int:
        """Overwrites the next, finite, values with their integers modulo 2^32; returns how many were clipped."""
        drawn, values, scratch = (array[: block.size] for array in (self._drawn, self._values, self._scratch))
        np.copyto(values, block)
        np.abs(values, out=scratch)
        clipped = int(np.count_nonzero(scratch > self._range))
        if clipped:
            np.clip(values, -self._range, self._range, out=values)
        # In §S10's order, so that every implementation rounds alike: ⌊x · (w / W) · scale + r⌋.
        values *= self._share
        values *= self._scale
        self._rounding.fill(drawn)
        np.multiply(drawn, 2.0**-32, out=scratch)
        values += scratch
        np.floor(values, out=values)
        # Every value is an integer within ±limit < 2^31: the cast to a signed integer is exact, and its two's
        # complement is the value modulo 2^32.
        np.copyto(block.view(np.int32), values, casting="unsafe")
        return clipped


def rounding_key(seed: int, site: str, round_index: int) -> bytes:
    """The key of a site's rounding in one round: a retry rounds the same way. Not a secret."""
    return derive(seed, "rounding", site, round_index, size_bytes=KEY_BYTES)


def blocks(size: int, first: int = 0) -> Iterator[slice]:
    """Cuts values `first` to `size` - 1 of a vector into blocks of `BLOCK_VALUES`.

    >>> [block.stop for block in blocks(300_000)]
    [131072, 262144, 300000]
    """
    for start in range(first, size, BLOCK_VALUES):
        yield slice(start, min(start + BLOCK_VALUES, size))


def as_ring(vector: Float32Array) -> RingArray:
    """The vector's memory as uint32.

    Raises:
        ValueError: not float32, 1-D, contiguous and writable.
    """
    if vector.dtype != np.float32 or vector.ndim != 1 or not (vector.flags.c_contiguous and vector.flags.writeable):
        raise ValueError(f"vector: expected writable contiguous 1-D float32, got {vector.ndim}-D {vector.dtype}")
    return vector.view(np.uint32)


def check_finite(vector: Float32Array) -> None:
    """Looks at every value, block by block; changes nothing.

    Raises:
        VerificationError: NaN or infinity.
    """
    if not all(np.isfinite(vector[block]).all() for block in blocks(vector.size)):
        raise VerificationError("update: holds NaN or infinity")


def check_counts(ring: RingArray, max_sites: int) -> None:
    """Refuses counts whose sum over `max_sites` sites could wrap around (§S11).

    Raises:
        VerificationError: a count above (2^32 − 1) div max_sites.
    """
    most = (2**32 - 1) // max_sites
    if ring.size and int(ring.max()) > most:
        raise VerificationError(f"counts: expected at most {most} each, with at most {max_sites} sites")


def check_tail(tail: TailArray) -> None:
    """Refuses tail values whose sum could be mistaken.

    Raises:
        VerificationError: a value above 2^40.
    """
    if tail.size and int(tail.max()) > TAIL_LIMIT:
        raise VerificationError("tail: expected values of at most 2^40")
