"""common/secagg/masking.py: masks cancel in the sum, in place, whatever the number of threads."""

import secrets
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wardround.common.errors import ConfigError, VerificationError
from wardround.common.fixedpoint import BLOCK_VALUES, FixedPoint, rounding_key
from wardround.common.secagg.masking import apply, quantise_and_mask
from wardround.common.secagg.prg import KeyStream

FIXED = FixedPoint(range_=0.5, max_sites=64, max_weight=1000)
ROUNDING = rounding_key(1, "site-01", 2)
SELF, PAIR_PLUS, PAIR_MINUS = (bytes([i]) * 32 for i in (1, 2, 3))
SIZES = [0, 1, 3, 5, BLOCK_VALUES - 1, BLOCK_VALUES + 1, 8 * BLOCK_VALUES + 7, 20 * BLOCK_VALUES + 3]


def stream(key: bytes, size: int, offset: int = 0) -> bytes:
    reader, found = KeyStream(key, offset), bytearray()
    while len(found) < size:
        piece = np.empty(min(size - len(found), 1 << 16), np.uint8)
        reader.fill(piece)
        found += piece.tobytes()
    return bytes(found)


def update(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.6, 0.6, size).astype(np.float32)


def keys_of(n: int) -> tuple[list[bytes], dict[tuple[int, int], bytes]]:
    """Self keys, and pair keys by (lower, higher)."""
    pairs = {(v, w): secrets.token_bytes(32) for v in range(n) for w in range(v + 1, n)}
    return [secrets.token_bytes(32) for _ in range(n)], pairs


def masks_of(site: int, own: list[bytes], pairs: dict[tuple[int, int], bytes]) -> tuple[list[bytes], list[bytes]]:
    plus = [own[site], *(key for (low, _), key in pairs.items() if low == site)]
    return plus, [key for (_, high), key in pairs.items() if high == site]


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_ring_then_tail_get_one_stream_whatever_the_threads(d: int, threads: int):
    k = 5
    rng = np.random.default_rng(d)
    ring, tail = rng.integers(0, 2**32, d, np.uint32), rng.integers(0, 2**63, k, np.uint64)
    plus, minus, both = (stream(key, 4 * d + 8 * k) for key in (SELF, PAIR_MINUS, PAIR_PLUS))
    expected_ring = ring + np.frombuffer(plus[: 4 * d], "<u4") + np.frombuffer(both[: 4 * d], "<u4")
    expected_ring -= np.frombuffer(minus[: 4 * d], "<u4")
    expected_tail = tail + np.frombuffer(plus[4 * d :], "<u8") + np.frombuffer(both[4 * d :], "<u8")
    expected_tail -= np.frombuffer(minus[4 * d :], "<u8")
    apply(ring, tail, [SELF, PAIR_PLUS], [PAIR_MINUS], threads)
    assert np.array_equal(ring, expected_ring) and np.array_equal(tail, expected_tail)


def test_a_tail_longer_than_a_block_is_masked_to_its_end():
    tail = np.zeros(3 * BLOCK_VALUES + 1, np.uint64)
    apply(np.zeros(3, np.uint32), tail, [SELF], [])
    assert tail.tobytes() == stream(SELF, 8 * tail.size, 12)  # as on a little-endian machine


def test_a_tail_may_lie_unaligned_behind_the_ring_in_one_buffer():
    whole = np.zeros(3 + 2 * 4, np.uint32)
    apply(whole[:3], whole[3:].view(np.uint64), [SELF], [])
    assert whole.tobytes() == stream(SELF, whole.nbytes)


@pytest.mark.parametrize("d", SIZES)
def test_quantising_and_masking_at_once_is_quantising_then_masking(d: int):
    vector, tail = update(d), np.array([7, 0, 9], np.uint64)
    expected, clipped = FIXED.quantise(vector.copy(), 300, ROUNDING)
    expected_tail = np.array([7, clipped, 9], np.uint64)
    apply(expected, expected_tail, [SELF, PAIR_PLUS], [PAIR_MINUS], threads=1)
    ring, counted = quantise_and_mask(
        vector, tail, FIXED, 300, ROUNDING, [SELF, PAIR_PLUS], [PAIR_MINUS], clipped_slot=1
    )
    assert counted == clipped and (d < 100 or clipped > 0)
    assert np.array_equal(ring, expected) and np.array_equal(tail, expected_tail)
    assert np.shares_memory(ring, vector) or d == 0


def test_nothing_of_the_vectors_size_is_allocated():
    vector = np.zeros(8_000_000, np.float32)
    tail = np.zeros(4, np.uint64)
    tracemalloc.start()
    try:
        ring, _ = quantise_and_mask(vector, tail, FIXED, 300, ROUNDING, [SELF, PAIR_PLUS], [PAIR_MINUS])
        apply(ring, tail, [PAIR_MINUS], [SELF, PAIR_PLUS])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < vector.nbytes / 4


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 64),
    d=st.integers(0, 40),
    range_=st.floats(1e-6, 1e3),
    heights=st.lists(st.floats(-3, 3), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
)
def test_quantise_mask_sum_unmask_and_mean_stay_within_the_stated_bound(
    n: int, d: int, range_: float, heights: list[float], seed: int
):
    """Issue 4, shows 7: any inputs (clipped at ±R), any n up to 64; edges of the range are among them."""
    fixed, rng = FixedPoint(range_, 64, 1000), np.random.default_rng(seed)
    own, pairs = keys_of(n)
    total, total_tail = np.zeros(d, np.uint32), np.zeros(3, np.uint64)
    exact, weights, clipped = np.zeros(d), rng.integers(1, 1001, n), 0
    for site in range(n):
        vector = (range_ * rng.choice([*heights, -1.0, 0.0, 1.0], d)).astype(np.float32)
        weight = int(weights[site])
        exact += np.clip(vector.astype(np.float64), -range_, range_) * (weight / 1000)
        clipped += int((np.abs(vector.astype(np.float64)) > range_).sum())
        tail = np.array([weight, 0, 2**40], np.uint64)
        plus, minus = masks_of(site, own, pairs)
        ring, _ = quantise_and_mask(
            vector, tail, fixed, weight, rounding_key(seed, f"{site}", 1), plus, minus, clipped_slot=1
        )
        total += ring
        total_tail += tail
    apply(total, total_tail, [], own)  # pair masks have cancelled; the self masks go
    assert total_tail.tolist() == [weights.sum(), clipped, n * 2**40]
    found = fixed.mean(total, fixed.max_weight)  # a weight of W: Σ / scale itself
    assert np.all(np.abs(found - exact) <= n / fixed.scale * (1 + 2.0**-20))
    mean = fixed.mean(total, int(total_tail[0]))
    assert np.all(
        np.abs(mean - exact * 1000 / weights.sum()) <= 1000 / weights.sum() * n / fixed.scale * (1 + 2.0**-20)
    )


@settings(max_examples=25, deadline=None)
@given(n=st.integers(3, 12), d=st.integers(0, 20), k=st.integers(0, 5), data=st.data())
def test_masks_cancel_in_the_sum_of_those_who_stayed_when_the_dropped_ones_are_removed(
    n: int, d: int, k: int, data: st.DataObject
):
    own, pairs = keys_of(n)
    dropped = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1))
    rng = np.random.default_rng(n)
    ring, tail = np.zeros(d, np.uint32), np.zeros(k, np.uint64)
    expected_ring, expected_tail = ring.copy(), tail.copy()
    for site in sorted(set(range(n)) - dropped):
        values, counts = rng.integers(0, 2**32, d, np.uint32), rng.integers(0, 2**63, k, np.uint64)
        expected_ring += values
        expected_tail += counts
        apply(values, counts, *masks_of(site, own, pairs))
        ring += values
        tail += counts
    stayed = [site for site in range(n) if site not in dropped]
    plus = [key for (low, high), key in pairs.items() if high in stayed and low in dropped]
    minus = [key for (low, high), key in pairs.items() if low in stayed and high in dropped]
    apply(ring, tail, plus, [*minus, *(own[site] for site in stayed)])
    assert np.array_equal(ring, expected_ring) and np.array_equal(tail, expected_tail)


def test_one_mask_left_in_leaves_nothing_to_see():
    ring = np.zeros(1 << 16, np.uint32)
    apply(ring, np.zeros(0, np.uint64), [SELF], [])
    bits = np.unpackbits(ring.view(np.uint8))
    assert abs(bits.mean() - 0.5) < 6 * 0.5 / bits.size**0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 12345, -1])
def test_nan_and_infinity_are_refused_and_nothing_is_changed(bad: float, place: int):
    vector, tail = update(3 * BLOCK_VALUES + 5), np.array([5, 0], np.uint64)
    vector[place] = bad
    before = vector.tobytes(), tail.tobytes()
    with pytest.raises(VerificationError, match="NaN or infinity"):
        quantise_and_mask(vector, tail, FIXED, 300, ROUNDING, [SELF], [], clipped_slot=1)
    assert (vector.tobytes(), tail.tobytes()) == before


def masking(**changes: Any) -> Callable[[np.ndarray, np.ndarray], object]:
    """The call with one argument changed."""
    usual: dict[str, Any] = {
        "fixed_point": FIXED,
        "weight": 300,
        "rounding_key": ROUNDING,
        "plus": [SELF],
        "minus": [PAIR_MINUS],
    }
    return lambda vector, tail: quantise_and_mask(vector, tail, **{**usual, **changes})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (masking(weight=0.5), ConfigError, "weight"),
        (masking(weight=1000.5), ConfigError, "weight"),
        (masking(weight=float("nan")), ConfigError, "weight"),
        (masking(plus=[]), ValueError, "self key"),
        (masking(plus=[SELF, SELF]), ValueError, "no key twice"),
        (masking(minus=[SELF]), ValueError, "no key twice"),
        (masking(plus=[SELF[:-1]]), ValueError, "32 bytes, got 31"),
        (masking(rounding_key=b""), ValueError, "32 bytes, got 0"),
        (masking(rounding_key=SELF), ValueError, "one stream only"),
        (masking(clipped_slot=0), ValueError, "expected 0 in slot 0"),
        (masking(threads=0), ValueError, "threads"),
    ],
)
def test_what_would_mask_wrongly_is_refused_and_nothing_is_changed(
    call: Callable[[np.ndarray, np.ndarray], object], error: type[Exception], message: str
):
    vector, tail = update(50), np.array([5, 0], np.uint64)
    before = vector.tobytes(), tail.tobytes()
    with pytest.raises(error, match=message):
        call(vector, tail)
    assert (vector.tobytes(), tail.tobytes()) == before


def test_a_tail_value_above_the_limit_is_refused():
    with pytest.raises(VerificationError, match="tail"):
        masking()(update(5), np.array([2**40 + 1], np.uint64))


@pytest.mark.parametrize(
    ("ring", "tail"),
    [
        (np.zeros(4, np.float32), np.zeros(1, np.uint64)),
        (np.zeros(4, ">u4"), np.zeros(1, np.uint64)),
        (np.zeros((2, 2), np.uint32), np.zeros(1, np.uint64)),
        (np.zeros(8, np.uint32)[::2], np.zeros(1, np.uint64)),
        (np.zeros(4, np.uint32), np.zeros(1, np.int64)),
        (np.frombuffer(bytes(16), np.uint32), np.zeros(1, np.uint64)),
    ],
)
def test_vectors_of_other_kinds_are_refused(ring: np.ndarray, tail: np.ndarray):
    with pytest.raises(ValueError, match="expected writable contiguous"):
        apply(ring, tail, [SELF], [])
