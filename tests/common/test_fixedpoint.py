"""common/fixedpoint.py: integers that add up without overflow, right on average, and back."""

import doctest
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wardround.common.errors import ConfigError, VerificationError
from wardround.common.fixedpoint import (
    BLOCK_VALUES,
    TAIL_LIMIT,
    FixedPoint,
    check_counts,
    check_tail,
    rounding_key,
)
from wardround.common.secagg.prg import KeyStream

KEY = rounding_key(3, "site-01", 1)


def quantised(fixed: FixedPoint, values: list[float] | np.ndarray, weight: float, key: bytes = KEY) -> np.ndarray:
    ring, _ = fixed.quantise(np.array(values, np.float32), weight, key)
    return ring.view(np.int32)


@given(
    st.floats(1e-9, 1e9),
    st.integers(3, 1024),
    st.floats(1, 1e6),
    st.lists(st.floats(-1e10, 1e10, width=32), min_size=1, max_size=30),
    st.data(),
)
def test_every_value_is_the_specifications_formula(
    range_: float, max_sites: int, most: float, values: list[float], data: st.DataObject
):
    """§S10, one value at a time, in Python's own float64."""
    weight = data.draw(st.floats(1, most))
    fixed = FixedPoint(range_, max_sites, most)
    drawn = np.empty(len(values), "<u4")
    KeyStream(KEY).fill(drawn)
    found, clipped = fixed.quantise(np.array(values, np.float32), weight, KEY)
    limit = (2**31 - 1) // max_sites
    scale = (limit - 1) / range_
    for x, r, integer in zip(values, drawn.tolist(), found.tolist(), strict=True):
        y = min(max(x, -range_), range_) * (weight / most) * scale + r / 2**32
        assert integer == int(y // 1) % 2**32
    assert clipped == sum(abs(x) > range_ for x in values)


@pytest.mark.parametrize("max_sites", [3, 7, 64, 1024])
@pytest.mark.parametrize("range_", [1e-3, 0.1, 1.0, 1 / 3, 12345.678])
def test_the_extremes_of_every_site_add_up_without_overflow(max_sites: int, range_: float):
    fixed = FixedPoint(range_, max_sites, 10)
    for sign in (1, -1):
        values = quantised(fixed, np.full(20_000, sign * 3e38, np.float32), 10)
        assert np.abs(values.astype(np.int64)).max() <= fixed.limit
    assert max_sites * fixed.limit < 2**31


def test_infinitely_unlucky_rounding_still_stays_inside_the_limit(monkeypatch: pytest.MonkeyPatch):
    """r at both of its ends, where float64 cannot hold limit - 1 + r and rounds up to the limit."""
    fixed = FixedPoint(1 / 3, 3, 10)
    for r in (0, 2**32 - 1):
        monkeypatch.setattr(KeyStream, "fill", lambda self, out, r=r: out.fill(r))
        values = quantised(fixed, [1, -1, 0], 10).tolist()
        assert all(abs(value) <= fixed.limit for value in values)
        assert values[2] == 0


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.1, 0.5, 0.77, -0.3, -1e-6])
def test_rounding_is_right_on_average(share: float):
    """The mean of 2^18 roundings of one value lies within 6 standard errors of it; floor and nearest do not."""
    fixed, count = FixedPoint(1.0, 64, 1), 2**18
    step = 1 / fixed.scale
    value = np.float32((1000 + share) * step if share else 0.0)
    exact = float(value) * fixed.scale
    found = quantised(fixed, np.full(count, value), 1).astype(np.float64)
    part = exact - np.floor(exact)
    error = (part * (1 - part) / count) ** 0.5
    assert abs(found.mean() - exact) <= 6 * error + 1e-9
    assert set(np.unique(found - np.floor(exact))) <= {0.0, 1.0}
    if error > 1e-4:
        assert abs(np.floor(exact) - exact) > 6 * error and abs(np.rint(exact) - exact) > 6 * error


def test_rounding_of_neighbours_is_independent():
    fixed = FixedPoint(1.0, 64, 1)
    value = np.float32(1000.5 / fixed.scale)
    up = quantised(fixed, np.full(2**18, value), 1) - np.floor(float(value) * fixed.scale)
    for lag in (1, 2, 4, 16):
        assert abs(np.corrcoef(up[:-lag], up[lag:])[0, 1]) < 6 / up.size**0.5


def test_a_retry_rounds_the_same_way_and_another_round_or_site_does_not():
    fixed = FixedPoint(1.0, 64, 1)
    values = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
    first = quantised(fixed, values, 1)
    assert np.array_equal(first, quantised(fixed, values, 1, rounding_key(3, "site-01", 1)))
    others = [rounding_key(3, "site-01", 2), rounding_key(3, "site-02", 1), rounding_key(4, "site-01", 1)]
    assert len({KEY, *others}) == 4 and all(len(key) == 32 for key in others)
    assert not any(np.array_equal(first, quantised(fixed, values, 1, key)) for key in others)


def test_clipped_values_are_counted_and_the_edge_is_not_clipped():
    fixed = FixedPoint(0.5, 3, 1)
    values = np.array([0.5, -0.5, np.nextafter(np.float32(0.5), np.float32(1)), -3, 0.1], np.float32)
    ring, clipped = fixed.quantise(values, 1, KEY)
    assert clipped == 2
    assert abs(int(ring.view(np.int32)[3])) in (fixed.limit - 2, fixed.limit - 1, fixed.limit)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, BLOCK_VALUES, -1])
def test_nan_and_infinity_are_refused_and_the_vector_is_as_it_was(bad: float, place: int):
    values = np.random.default_rng(0).uniform(-1, 1, 2 * BLOCK_VALUES + 3).astype(np.float32)
    values[place] = bad
    before = values.tobytes()
    with pytest.raises(VerificationError, match="NaN or infinity"):
        FixedPoint(1.0, 3, 1).quantise(values, 1, KEY)
    assert values.tobytes() == before


def test_the_largest_finite_values_are_clipped_and_not_refused():
    largest = float(np.finfo(np.float32).max)
    ring, clipped = FixedPoint(1.0, 3, 1).quantise(np.full(1000, largest, np.float32), 1, KEY)
    assert clipped == 1000 and (ring.view(np.int32) > 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_mean_can_take_the_sums_own_memory(dtype: type):
    fixed = FixedPoint(1.0, 5, 100)
    rng = np.random.default_rng(0)
    updates, weights = rng.uniform(-1, 1, (5, BLOCK_VALUES + 9)).astype(np.float32), [1, 100, 50, 7, 33]
    total = np.zeros(BLOCK_VALUES + 9, np.uint32)
    for i in range(5):
        total += fixed.quantise(updates[i].copy(), weights[i], rounding_key(0, f"{i}", 1))[0]
    expected = np.average(updates.astype(np.float64), axis=0, weights=weights)
    fresh = fixed.mean(total, sum(weights))
    assert fresh.dtype == np.float64
    assert np.abs(fresh - expected).max() <= 100 / sum(weights) * 5 / fixed.scale
    out = total.view(np.float32) if dtype is np.float32 else np.empty(total.size)
    assert fixed.mean(total, sum(weights), out) is out
    assert np.array_equal(out, fresh.astype(dtype))


@pytest.mark.parametrize("total", [0, -1, float("nan"), float("inf")])
def test_a_sum_of_weights_that_is_not_positive_is_refused(total: float):
    with pytest.raises(VerificationError, match="weights"):
        FixedPoint(1.0, 3, 1).mean(np.zeros(3, np.uint32), total)


@pytest.mark.parametrize(
    ("range_", "max_sites", "max_weight", "word"),
    [
        (0, 3, 1, "range"),
        (-1, 3, 1, "range"),
        (float("nan"), 3, 1, "range"),
        (float("inf"), 3, 1, "range"),
        (1e-300, 3, 1, "scale"),
        (1, 2, 1, "max_sites"),
        (1, 1025, 1, "max_sites"),
        (1, 3, 0.9, "max_weight"),
        (1, 3, float("inf"), "max_weight"),
        (1, 3, float("nan"), "max_weight"),
    ],
)
def test_settings_that_could_overflow_are_refused_before_a_round(
    range_: float, max_sites: int, max_weight: float, word: str
):
    with pytest.raises(ConfigError, match=word):
        FixedPoint(range_, max_sites, max_weight)


def test_a_round_with_more_sites_than_the_scale_allows_is_refused():
    fixed = FixedPoint(1.0, 5, 1)
    fixed.check_sites(5)
    for sites in (6, 0):
        with pytest.raises(ConfigError, match="expected 1 to 5"):
            fixed.check_sites(sites)


def test_vectors_of_other_kinds_are_refused():
    fixed = FixedPoint(1.0, 5, 1)
    for vector in (np.zeros(3), np.zeros((2, 2), np.float32), np.zeros(4, np.float32)[::2]):
        with pytest.raises(ValueError, match="float32"):
            fixed.quantise(vector, 1, KEY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alike"):
        fixed.mean(np.zeros(3, np.int32), 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alike"):
        fixed.mean(np.zeros(3, np.uint32), 1, np.zeros(2))


def test_counts_and_tail_values_have_a_largest_size():
    most = (2**32 - 1) // 5
    check_counts(np.array([0, most], np.uint32), 5)
    check_counts(np.zeros(0, np.uint32), 5)
    check_tail(np.array([0, TAIL_LIMIT], np.uint64))
    check_tail(np.zeros(0, np.uint64))
    with pytest.raises(VerificationError, match="counts"):
        check_counts(np.array([0, most + 1], np.uint32), 5)
    with pytest.raises(VerificationError, match="tail"):
        check_tail(np.array([TAIL_LIMIT + 1], np.uint64))


def test_no_refusal_shows_a_value():
    with pytest.raises(ConfigError) as caught:
        FixedPoint(1.0, 5, 1000).check_weight(77_777)
    assert "77" not in str(caught.value).replace("1000", "")
    with pytest.raises(VerificationError) as refused:
        check_counts(np.array([4_000_000_123], np.uint32), 5)
    assert "4000000123" not in str(refused.value)


def test_the_examples_in_the_documentation_hold():
    assert doctest.testmod(import_module("wardround.common.fixedpoint")).failed == 0
