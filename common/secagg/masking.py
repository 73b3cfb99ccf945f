"""Masks added to a vector, or removed from a sum, in place and by several threads (docs/secure-sums.md §S7, §S9).

A site calls `quantise_and_mask` for an update, or `apply` for counts, with its self key and pair keys; the coordinator
calls `apply` with the signs turned to remove masks from the sum. Enters: the vector, keys. Leaves: the same memory,
masked. Private: the vector before, the keys. A vector is a ring of d uint32 and a tail of k uint64; every stream covers
first the ring and then the tail, which so begins at its byte 4d.

Formal Guarantees: after a refusal (`VerificationError`, `ConfigError`, `ValueError`) ring and tail are as they were.
After any other exception, running out of memory or an interrupt, they hold a mixture and must be dropped. One value is
masked by every key, with the same bytes of the streams, however many threads work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from ..fixedpoint import (
    BLOCK_VALUES,
    FixedPoint,
    Float32Array,
    Quantiser,
    RingArray,
    TailArray,
    as_ring,
    blocks,
    check_finite,
    check_tail,
)
from .prg import BLOCK_BYTES, Mask, check_key

THREADS = 2
_PARTS_A_THREAD = 4  # a thread that is held up leaves its parts to the others
_LEAST_PART = 2 * BLOCK_VALUES  # opening a stream costs as much as some 60 kB of it

Part = tuple[int, int]
Result = TypeVar("Result")


def apply(
    ring: RingArray, tail: TailArray, plus: Sequence[bytes], minus: Sequence[bytes], threads: int = THREADS
) -> None:
    """Adds the streams of `plus` and subtracts those of `minus`, in place, modulo 2^32 and 2^64.

    Args:
        ring: d values, 1-D, contiguous, writable.
        tail: k values, the same; it need not be aligned, so it may lie behind the ring in one buffer.
        plus: keys, 32 bytes each.
        minus: keys, 32 bytes each.
        threads: at most so many work.

    Raises:
        ValueError: another dtype or shape, a key that is none, or one that is there twice (its streams would cancel).
    """
    _check(ring, tail, plus, minus, threads)

    def work(part: Part) -> None:
        mask = Mask(plus, minus, 4 * part[0])
        for block in blocks(part[1], part[0]):
            mask.apply(ring[block])

    _in_parts(work, ring.size, threads)
    _apply_tail(ring.size, tail, plus, minus)


def quantise_and_mask(
    vector: Float32Array,
    tail: TailArray,
    fixed_point: FixedPoint,
    weight: float,
    rounding_key: bytes,
    plus: Sequence[bytes],
    minus: Sequence[bytes],
    *,
    clipped_slot: int | None = None,
    threads: int = THREADS,
) -> tuple[RingArray, int]:
    """Turns a site's update into its masked vector, in the update's own memory, one pass, block by block (§S7, §S10).

    The unmasked integers exist for one block at a time. All values are looked at for NaN and infinity before the first
    is changed.

    Args:
        vector: d float32, 1-D, contiguous, writable: overwritten.
        tail: k uint64 of at most 2^40 each: masked in place.
        fixed_point: range, number of sites, largest weight.
        weight: of this site, 1 to W.
        rounding_key: see `fixedpoint.rounding_key`.
        plus: the self key, and pair keys with members of higher id.
        minus: pair keys with members of lower id.
        clipped_slot: the tail value, 0 until now, that takes the number of clipped values; None for none.
        threads: at most so many work.

    Returns:
        The vector's memory as uint32, masked, and the number of clipped values, which is private.

    Raises:
        VerificationError: NaN or infinity, or a tail value above 2^40.
        ConfigError: the weight is out of range.
        ValueError: as `apply`; no key to add (a vector never leaves without its self mask); or the slot is not 0.
    """
    ring = as_ring(vector)
    _check(ring, tail, plus, minus, threads)
    if not plus:
        raise ValueError("plus: expected at least the self key")
    if clipped_slot is not None and tail[clipped_slot] != 0:
        raise ValueError(f"tail: expected 0 in slot {clipped_slot}")
    check_tail(tail)
    fixed_point.check_weight(weight)
    check_key(rounding_key)
    if rounding_key in plus or rounding_key in minus:
        raise ValueError("rounding_key: a key is used for one stream only")

    def look(part: Part) -> None:
        check_finite(vector[part[0] : part[1]])

    def work(part: Part) -> int:
        quantiser = Quantiser(fixed_point, weight, rounding_key, part[0])
        mask = Mask(plus, minus, 4 * part[0])
        clipped = 0
        for block in blocks(part[1], part[0]):
            clipped += quantiser.apply(vector[block])
            mask.apply(ring[block])
        return clipped

    _in_parts(look, ring.size, threads)
    clipped = sum(_in_parts(work, ring.size, threads))
    if clipped_slot is not None:
        tail[clipped_slot] = clipped
    _apply_tail(ring.size, tail, plus, minus)
    return ring, clipped


def _apply_tail(ring_values: int, tail: TailArray, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    if not tail.size:
        return
    mask = Mask(plus, minus, 4 * ring_values)
    values = BLOCK_BYTES // 8
    for start in range(0, tail.size, values):
        mask.apply(tail[start : start + values])


def _in_parts(work: Callable[[Part], Result], size: int, threads: int) -> list[Result]:
    """Results of `work` on parts (first value, last value + 1) that cover the vector; all end before it returns."""
    length = max(-(-size // (_PARTS_A_THREAD * threads * BLOCK_VALUES)) * BLOCK_VALUES, _LEAST_PART)
    parts = [(start, min(start + length, size)) for start in range(0, size, length)]
    if threads == 1 or len(parts) <= 1:
        return [work(part) for part in parts]
    with ThreadPoolExecutor(threads, "mask") as pool:
        return list(pool.map(work, parts))


def _check(ring: RingArray, tail: TailArray, plus: Sequence[bytes], minus: Sequence[bytes], threads: int) -> None:
    for name, array, dtype in (("ring", ring, np.uint32), ("tail", tail, np.uint64)):
        if array.dtype != dtype or array.ndim != 1 or not (array.flags.c_contiguous and array.flags.writeable):
            raise ValueError(
                f"{name}: expected writable contiguous 1-D {np.dtype(dtype)}, got {array.ndim}-D {array.dtype}"
            )
    keys = [*plus, *minus]
    for key in keys:
        check_key(key)
    if len(set(keys)) != len(keys):
        raise ValueError("keys: expected no key twice")
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
