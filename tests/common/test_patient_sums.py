"""Sums over patients give statsmodels' cluster-robust intervals, and nothing is lost when sites are added."""

import numpy as np
import pytest
import statsmodels.api as sm
from wardround.common.errors import ProtocolError
from wardround.common.intervals import PatientBootstrap
from wardround.common.patient_sums import ClusterSums, PatientSums, sums_size
from wardround.common.scored import Scored, concat

from .scored_case import simulated

ACCURACY = {"base": 0.4, "final": 0.5}


@pytest.fixture(scope="module")
def scored() -> Scored:
    """Patients of one to four questions."""
    whole = simulated(150, ACCURACY, seed=1, per_patient=4)
    return whole.take(np.flatnonzero(np.random.default_rng(2).random(len(whole)) < 0.6))


def oracle(values: np.ndarray, patients: np.ndarray) -> tuple[float, float, list[float], float]:
    """Mean, standard error, interval and p of an intercept, with errors clustered by patient."""
    fit = sm.OLS(values.astype(float), np.ones(len(values))).fit()
    robust = fit.get_robustcov_results("cluster", groups=patients, use_correction=True, use_t=True)
    return float(robust.params[0]), float(robust.bse[0]), robust.conf_int()[0].tolist(), float(robust.pvalues[0])


def test_an_accuracy_from_sums_is_statsmodels_with_clustered_errors(scored: Scored) -> None:
    sums = PatientSums.of(scored)
    for model in ("base", "final", "majority"):
        got = sums.accuracy(model)
        mean, error, interval, _ = oracle(scored.correct(model), scored.patients)
        assert got.value == pytest.approx(mean) and got.standard_error == pytest.approx(error)
        assert got.ci95() == pytest.approx(interval)
        assert (got.patients, got.n) == (scored.n_patients, len(scored))


def test_a_paired_difference_from_sums_is_statsmodels_with_clustered_errors(scored: Scored) -> None:
    got = PatientSums.of(scored).difference("final", "base")
    values = scored.correct("final").astype(float) - scored.correct("base")
    mean, error, interval, p = oracle(values, scored.patients)
    assert got.value == pytest.approx(mean) and got.standard_error == pytest.approx(error)
    assert got.ci95(-1.0) == pytest.approx(interval) and got.p_value() == pytest.approx(p)


def test_the_sandwich_is_that_of_a_gee_with_independent_questions(scored: Scored) -> None:
    fit = sm.GEE(scored.correct("final").astype(float), np.ones(len(scored)), groups=scored.patients).fit()
    assert fit is not None
    g = scored.n_patients
    expected = float(fit.bse[0]) * np.sqrt(g / (g - 1))
    assert PatientSums.of(scored).accuracy("final").standard_error == pytest.approx(expected)


def test_the_sandwich_and_the_bootstrap_by_patient_agree(scored: Scored) -> None:
    difference = (scored.correct("final").astype(int) - scored.correct("base"))[:, None]
    values = PatientBootstrap(scored.patients, 8000, 3).ratios(difference, np.ones_like(difference))[:, 0]
    got = PatientSums.of(scored).difference("final", "base")
    assert got.value == pytest.approx(values[0])
    assert got.standard_error == pytest.approx(values[1:].std(), rel=0.05)
    assert got.ci95(-1.0) == pytest.approx(np.quantile(values[1:], [0.025, 0.975]).tolist(), abs=0.01)


def test_sums_of_sites_are_the_sums_of_all_their_patients() -> None:
    sites = [simulated(n, ACCURACY, seed=n, per_patient=3) for n in (11, 40, 25)]
    one = PatientSums.of(concat(sites))
    vectors = [PatientSums.of(site).to_vector() for site in sites]
    added = PatientSums.from_vector(sum(vectors[1:], start=vectors[0]), ["base", "final"])
    assert np.array_equal(added.to_vector(), one.to_vector()) and len(vectors[0]) == sums_size(["base", "final"])
    parts = [PatientSums.of(site) for site in sites]
    assert np.array_equal((parts[0] + parts[1] + parts[2]).to_vector(), one.to_vector())
    pairs = [part.difference("final", "base") for part in parts]
    assert pairs[0] + pairs[1] + pairs[2] == one.difference("final", "base")
    assert added.difference("final", "base") == one.difference("final", "base")
    assert np.all(one.to_vector() >= 0)


def test_sums_of_other_models_are_not_added() -> None:
    one, other = PatientSums.of(simulated(5, {"base": 0.4}, 1)), PatientSums.of(simulated(5, ACCURACY, 1))
    with pytest.raises(ProtocolError, match="same models"):
        _ = one + other


@pytest.mark.parametrize(
    ("entry", "value"),
    [(0, 10**6), (1, 2), (2, 10**6), (5, 1), (6, 0), (8, -1), (8, 2**60)],
)
def test_sums_that_contradict_each_other_are_refused(scored: Scored, entry: int, value: int) -> None:
    vector = PatientSums.of(scored).to_vector()
    vector[entry] = value
    with pytest.raises(ProtocolError):
        PatientSums.from_vector(vector, ["base", "final"])


def test_sums_of_another_length_or_type_are_refused(scored: Scored) -> None:
    vector = PatientSums.of(scored).to_vector()
    for wrong in (vector[:-1], vector.astype(float)):
        with pytest.raises(ProtocolError, match="expected 15 int64"):
            PatientSums.from_vector(wrong, ["base", "final"])


def test_one_patient_or_none_says_nothing() -> None:
    one = ClusterSums(1, 1, 2, 1, 2, 4)
    assert one.ci95() == [0.0, 1.0] and one.p_value() == 1.0 and one.design_effect(1.0) == 1.0
    assert np.isnan(ClusterSums(0, 0, 0, 0, 0, 0).value)
    same = ClusterSums(5, 5, 5, 5, 5, 5)  # everybody the same: no scatter
    assert same.standard_error == 0.0 and same.p_value() == 0.0


def test_questions_that_are_alike_count_for_less() -> None:
    # Every patient has 4 questions, all right or all wrong: a quarter as many as they seem.
    right = np.repeat(np.arange(100) % 2, 4)
    sums = ClusterSums(100, int(right.sum()), 400, 50 * 16, 50 * 16, 100 * 16)
    assert sums.design_effect(float(right.sum())) == pytest.approx(4 * 100 / 99)
