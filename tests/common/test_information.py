"""Mutual information from noised tables (common/information.py): unbiased where it is said to be, by simulation."""

import doctest
from itertools import pairwise

import numpy as np
import pytest
from wardround.common import information
from wardround.common.information import _added, _groups, information_nats, mutual_information, noised_information

DRAWS = 400


def joint(copied: float, bins: int) -> np.ndarray:
    """Probabilities of two columns with equal bins: Y is a copy of X in this share of the rows, else independent."""
    return copied * np.eye(bins) / bins + (1 - copied) * np.full((bins, bins), 1 / bins**2)


def margins(probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return probabilities.sum(1), probabilities.sum(0)


def drawn(probabilities: np.ndarray, rows: int, noise: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    exact = rng.multinomial(rows, probabilities.ravel()).reshape(probabilities.shape)
    return np.rint(exact + noise * rng.standard_normal(exact.shape)).astype(np.int64)


@pytest.mark.parametrize(
    ("copied", "bins", "rows", "noise"),
    [(0.2, 3, 4000, 90.0), (0.2, 4, 4000, 50.0), (0.2, 3, 50_000, 1000.0)],
)
def test_the_mean_over_noise_is_the_true_information_within_0_004_nats_and_uncorrected_it_is_not(
    copied: float, bins: int, rows: int, noise: float
):
    probabilities = joint(copied, bins)
    true = mutual_information(np.rint(1e9 * probabilities).astype(np.int64))
    tables = [drawn(probabilities, rows, noise, seed) for seed in range(DRAWS)]
    found = [noised_information(table, noise, margins(probabilities), (True, True))[0] for table in tables]
    uncorrected = [information_nats(np.maximum(table, 0)) for table in tables]  # Miller-Madow alone
    assert true > 0.03
    assert np.mean(found) == pytest.approx(true, abs=0.004)
    assert np.mean(uncorrected) - true > 0.006


def test_an_almost_exact_copy_comes_out_as_less_than_it_is_but_far_above_half():
    """As the docstring says: cells far below their noise, which no expansion reaches."""
    probabilities = joint(0.95, 4)
    true = mutual_information(np.rint(1e9 * probabilities).astype(np.int64))
    found = [
        noised_information(drawn(probabilities, 4000, 80.0, seed), 80.0, margins(probabilities), (True, True))[0]
        for seed in range(100)
    ]
    assert 0.75 * true < np.mean(found) < 0.95 * true


@pytest.mark.parametrize("bins", [2, 3, 5])
def test_the_correction_is_what_sampling_and_noise_add_for_independent_columns(bins: int):
    probabilities = np.outer(*[np.linspace(1, 2, bins) / np.linspace(1, 2, bins).sum()] * 2)
    for noise in (0.0, 20.0, 60.0):
        raw = [mutual_information(np.maximum(drawn(probabilities, 8000, noise, seed), 0)) for seed in range(2000)]
        added = _added(np.full((bins, bins), noise**2), 8000 * probabilities)
        assert np.mean(raw) == pytest.approx(added, rel=0.12)
        assert noise or added == pytest.approx((bins - 1) ** 2 / 16_000)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([0.5, 0.5], [0.5, 0.5]),
        ([0.9, 0.1], [0.7, 0.3]),
        ([0.3, 0.4, 0.3], [0.2, 0.5, 0.3]),
        ([0.02, 0.6, 0.38], [0.95, 0.05]),
        ([0.4, 0.2, 0.1, 0.1, 0.08, 0.06, 0.04, 0.02], [0.3, 0.3, 0.2, 0.1, 0.05, 0.05]),
        ([0.99, 0.01], [0.98, 0.02]),
    ],
)
@pytest.mark.parametrize("ordered", [True, False])
def test_independent_pairs_under_the_noise_of_the_demo_stay_far_below_the_threshold(x, y, ordered: bool):
    """4,000 patients, noise 150 on every cell."""
    both = np.array(x), np.array(y)
    shares = [
        noised_information(drawn(np.outer(*both), 4000, 150.0, seed), 150.0, both, (ordered, ordered))[1]
        for seed in range(DRAWS)
    ]
    assert np.mean(shares) < 0.08
    assert np.mean(np.array(shares) > 0.5) <= 0.005


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_an_exact_copy_is_recognised_where_its_cells_are_above_their_noise(levels: int):
    copy = np.diag(np.full(levels, 1 / levels))
    shares = [
        noised_information(drawn(copy, 20_000, 150.0, seed), 150.0, margins(copy), (True, True))[1]
        for seed in range(100)
    ]
    assert min(shares) > 0.5 and max(shares) <= 1


@pytest.mark.parametrize("probabilities", [np.diag([0.99, 0.01]), np.outer([0.5, 0.5], [0.97, 0.03])])
def test_a_pair_with_cells_that_expect_less_than_half_of_their_noise_says_nothing(probabilities: np.ndarray):
    for seed in range(50):
        table = drawn(probabilities, 4000, 150.0, seed)
        assert noised_information(table, 150.0, margins(probabilities), (True, True)) == (0.0, 0.0)


def test_a_table_that_noise_left_without_rows_says_nothing():
    nothing = np.full((3, 3), -7)
    assert noised_information(nothing, 5.0, (np.full(3, 1 / 3), np.full(3, 1 / 3)), (True, True)) == (0.0, 0.0)


def test_bins_of_numbers_are_merged_with_neighbours_and_levels_with_the_smallest():
    shares = np.array([0.3, 0.01, 0.32, 0.01, 0.36])
    numbers, levels = (
        _groups(4000, 50.0, (shares, np.array([0.5, 0.5])), (ordered, ordered))[0][0] for ordered in (True, False)
    )
    for group in numbers:
        assert all(second - first == 1 for first, second in pairwise(np.flatnonzero(group)))
    assert any(group.tolist() == [0, 1, 0, 1, 0] for group in levels)
    assert numbers.sum(0).tolist() == levels.sum(0).tolist() == [1] * 5


def test_without_need_nothing_is_merged():
    even = np.full(4, 0.25)
    groups, enough = _groups(100_000, 50.0, (even, even), (True, True))
    assert enough and all(np.array_equal(group, np.eye(4)) for group in groups)


def test_examples():
    assert doctest.testmod(information).failed == 0
