"""Intervals and p-values equal brute force and statsmodels; with several questions a patient they still hold."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, fisher_exact
from statsmodels.stats.multitest import multipletests
from wardround.common.intervals import (
    PatientBootstrap,
    benjamini_hochberg,
    bounds,
    detectable_difference,
    difference_bounds,
    distance_interval,
    holm,
    independent_difference,
    share_bounds,
    sign_flip_p,
)
from wardround.common.metrics import ranking
from wardround.common.statistics import mcnemar_exact, wilson


def clustered(n_patients: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Patients of 1 to 6 questions, right or wrong with a probability of their own."""
    rng = np.random.default_rng(seed)
    patients = np.repeat(rng.permutation(n_patients) * 3, rng.integers(1, 7, n_patients))
    ability = dict(zip(np.arange(0, 3 * n_patients, 3), rng.beta(1, 1, n_patients), strict=True))
    return patients, rng.random(len(patients)) < np.array([ability[p] for p in patients])


def test_a_bootstrap_by_patient_is_the_one_by_hand() -> None:
    patients, correct = clustered(60, seed=1)
    bootstrap = PatientBootstrap(patients, 20_000, seed=2)
    values = bootstrap.ratios(correct[:, None], np.ones((len(correct), 1)))[:, 0]
    rng, own = np.random.default_rng(3), [correct[patients == p] for p in np.unique(patients)]
    by_hand = []
    for _ in range(4000):
        drawn = np.concatenate([own[i] for i in rng.integers(60, size=60)])
        by_hand.append(drawn.mean())
    assert values[0] == correct.mean() and len(values) == 20_001
    assert np.allclose(bounds(values), np.quantile(by_hand, [0.025, 0.975]), atol=0.006)
    assert np.std(values[1:]) == pytest.approx(np.std(by_hand), rel=0.05)
    by_question = math.sqrt(correct.mean() * (1 - correct.mean()) / len(correct))
    assert np.std(values[1:]) > 1.2 * by_question


def test_weights_of_questions_are_those_of_the_sums() -> None:
    patients, correct = clustered(30, seed=4)
    bootstrap = PatientBootstrap(patients, 1000, seed=5)
    rows = np.flatnonzero(np.arange(len(correct)) % 3 == 0)
    weights = np.concatenate(list(bootstrap.question_weights(rows, 700)))
    assert weights.shape == (701, len(rows)) and np.all(weights[0] == 1)
    mask = np.zeros((len(correct), 1))
    mask[rows, 0] = correct[rows]
    assert np.allclose(weights @ correct[rows], bootstrap.sums(mask)[:701, 0])
    # A curve's area over all resamples, and one of them by hand.
    scores = np.random.default_rng(6).random(len(rows))
    areas, _ = ranking(correct[rows], scores, weights)
    again = np.repeat(np.arange(len(rows)), weights[5].astype(int))
    assert areas[5] == pytest.approx(ranking(correct[rows][again], scores[again])[0][0])


def test_the_same_seed_gives_the_same_draws_and_every_draw_has_as_many_patients() -> None:
    patients, _ = clustered(50, seed=7)
    ones = np.unique(patients, return_index=True)[1]
    column = np.zeros((len(patients), 1))
    column[ones, 0] = 1
    first, second, third = (PatientBootstrap(patients, 600, seed).sums(column) for seed in (1, 1, 2))
    assert np.all(first == 50) and np.array_equal(first, second) and np.all(third == 50)


def test_a_bootstrap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        PatientBootstrap(np.zeros(0, np.int64), 10, 0)


def test_a_ratio_with_nothing_below_in_a_resample_leaves_that_resample_out() -> None:
    bootstrap = PatientBootstrap(np.arange(8), 500, seed=1)
    mask = (np.arange(8) < 2)[:, None]
    values = bootstrap.ratios(mask, mask)[:, 0]
    assert np.isnan(values).any() and bounds(values) == [1.0, 1.0]


def test_bounds_without_scatter_have_a_width_all_the_same() -> None:
    assert share_bounds(np.ones(100), 30) == wilson(30, 30)
    assert share_bounds(np.zeros(100), 30) == wilson(0, 30)
    low, high = difference_bounds(np.zeros(100), 30)
    assert low == -high and high == pytest.approx(binomtest(0, 30).proportion_ci(0.95).high)


@pytest.mark.parametrize(("truth", "least"), [(0.0, 0.92), (0.1, 0.78)])
def test_intervals_of_a_calibration_error_hold_the_truth_about_as_often_as_is_said(truth: float, least: float) -> None:
    """Ten bins of 30 questions; what is said is off by `truth` in all of them."""
    rng, hits, chance = np.random.default_rng(10), 0, []
    bins = np.repeat(np.eye(10), 30, axis=0)
    for run in range(150):
        wrong = truth + 0.6 - (rng.random(300) < 0.6)
        sums = PatientBootstrap(np.arange(300), 300, run).sums(bins * wrong[:, None])
        value, (low, high), by_chance = distance_interval(sums / 300)
        hits += low <= truth <= high
        chance.append(by_chance)
        assert value == pytest.approx(np.abs((bins * wrong[:, None]).sum(axis=0)).sum() / 300)
    assert hits / 150 >= least
    # The mean of |normal| with the standard deviation of a bin's mean.
    assert np.mean(chance) == pytest.approx(math.sqrt(0.24 / 30 * 2 / math.pi), rel=0.1)


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
@settings(deadline=None, max_examples=60)
def test_the_sign_flip_test_counts_all_ways_to_give_signs(differences: list[int]) -> None:
    reached = abs(sum(differences))
    ways = [
        abs(sum(sign * d for sign, d in zip(signs, differences, strict=True))) >= reached
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    assert sign_flip_p(differences) == pytest.approx(sum(ways) / len(ways), abs=1e-12)


@given(st.integers(0, 300), st.integers(0, 300))
@settings(deadline=None, max_examples=40)
def test_with_one_question_a_patient_the_sign_flip_test_is_mcnemars(b: int, c: int) -> None:
    assert sign_flip_p([1] * b + [-1] * c + [0] * 5) == pytest.approx(mcnemar_exact(b, c), rel=1e-9, abs=1e-15)


def test_the_sign_flip_test_of_very_many_is_close_to_the_exact_one() -> None:
    few = sign_flip_p([1] * 10_100 + [-1] * 9_800)
    assert few == pytest.approx(mcnemar_exact(10_100, 9_800), rel=1e-6)
    many = sign_flip_p([1] * 10_200 + [-1] * 9_900)
    assert many == pytest.approx(mcnemar_exact(10_200, 9_900), rel=1e-3)


def test_the_sign_flip_test_finds_a_false_difference_one_time_in_twenty() -> None:
    rng = np.random.default_rng(8)
    found = 0
    for _ in range(400):
        ability = rng.normal(size=(40, 1))  # what a patient's questions have in common, in the difference of models
        found += sign_flip_p((rng.normal(size=(40, 5)) + ability).round().astype(int).sum(axis=1)) < 0.05
    assert 5 <= found <= 34  # 20 expected; a test by question finds 100 and more here


@pytest.mark.parametrize("seed", range(5))
def test_corrections_are_statsmodels(seed: int) -> None:
    p_values = (np.random.default_rng(seed).random(1 + 4 * seed) ** 3).round(2).tolist()  # with ties
    for corrected, method in ((holm, "holm"), (benjamini_hochberg, "fdr_bh")):
        expected = np.asarray(multipletests(p_values, method=method)[1])
        assert corrected(p_values) == pytest.approx(expected.tolist(), abs=1e-12)


def test_no_p_values_are_none_corrected() -> None:
    assert holm([]) == benjamini_hochberg([]) == []


@pytest.mark.parametrize(("n", "discordance"), [(300, 0.2), (1000, 0.1), (60, 0.3)])
def test_four_evaluations_in_five_find_the_detectable_difference(n: int, discordance: float) -> None:
    delta = detectable_difference(n, discordance)
    shares = [(discordance + delta) / 2, (discordance - delta) / 2, 1 - discordance]
    counts = np.random.default_rng(9).multinomial(n, shares, size=4000)
    b, c = counts[:, 0], counts[:, 1]
    z = (b - c) / np.sqrt(np.maximum(1, b + c))
    assert np.mean(np.abs(z) > 1.96) == pytest.approx(0.8, abs=0.03)


def test_fewer_or_more_alike_questions_see_less() -> None:
    assert detectable_difference(300, 0.2) == pytest.approx(detectable_difference(600, 0.2, design_effect=2.0))
    assert detectable_difference(100, 0.2) > detectable_difference(300, 0.2) > detectable_difference(300, 0.1)
    assert 0.02 < detectable_difference(300, 0.0) < 0.05  # no answer differed: one-sided differing ones would be seen
    assert detectable_difference(2, 0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(40))
def test_two_shares_are_compared_by_fishers_test_as_scipy_does_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    of, other = int(rng.integers(1, 60)), int(rng.integers(1, 900))
    right, rest = int(rng.integers(0, of + 1)), int(rng.integers(0, other + 1))
    expected = float(fisher_exact([[right, of - right], [rest, other - rest]]).pvalue)
    assert independent_difference(right, of, rest, other)["p"] == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_the_interval_of_two_shares_is_newcombes_tenth() -> None:
    """Newcombe (1998), Statistics in Medicine 17, 873, table II: 56/70 - 48/80 and 10/10 - 0/10."""
    assert independent_difference(56, 70, 48, 80)["ci95"] == pytest.approx([0.0524, 0.3339], abs=5e-5)
    assert independent_difference(10, 10, 0, 10)["ci95"] == pytest.approx([0.6075, 1.0], abs=5e-5)


def test_a_small_group_that_is_all_right_is_seldom_said_to_differ() -> None:
    """Where a normal test from the scatter inside the group, which is none, would say so always."""
    rng = np.random.default_rng(1)
    said = 0
    for _ in range(2000):
        found = independent_difference(int(rng.binomial(12, 0.9)), 12, int(rng.binomial(1000, 0.9)), 1000)
        said += found["p"] < 0.05
        assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]
    assert said < 0.05 * 2000
    certain = independent_difference(10, 10, 600, 1000)
    assert certain["p"] == pytest.approx(0.00774, abs=5e-6) and certain["ci95"][0] > 0
