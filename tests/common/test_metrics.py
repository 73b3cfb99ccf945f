"""Figures equal scikit-learn's on fixed and drawn data; what has no oracle there is checked by hand."""

import numpy as np
import pytest
from sklearn import metrics as oracle
from wardround.common import metrics


def drawn(seed: int, n: int = 400, width: int = 4, decimals: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities with many ties, and truths that they say something of."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(width), n).round(decimals)
    p /= p.sum(axis=1, keepdims=True)
    return p, np.array([rng.choice(width, p=row) for row in p])


@pytest.mark.parametrize("seed", range(5))
def test_ranking_is_scikit_learns_with_ties(seed: int) -> None:
    p, answer = drawn(seed, width=2, decimals=1)
    happened, score = answer == 1, p[:, 1]
    assert len(np.unique(score)) < 20
    area, precision = metrics.ranking(happened, score)
    assert area[0] == pytest.approx(oracle.roc_auc_score(happened, score), abs=1e-12)
    assert precision[0] == pytest.approx(oracle.average_precision_score(happened, score), abs=1e-12)


@pytest.mark.parametrize("rising", [False, True])
def test_weighted_ranking_is_scikit_learns_with_those_weights(rising: bool) -> None:
    p, answer = drawn(7, width=2, decimals=1)
    order = np.argsort(p[:, 1]) if rising else np.arange(len(p))
    happened, score = (answer == 1)[order], p[order, 1]
    weights = np.random.default_rng(8).integers(0, 4, size=(6, len(score))).astype(float)
    for row, area, precision in zip(weights, *metrics.ranking(happened, score, weights), strict=True):
        assert area == pytest.approx(oracle.roc_auc_score(happened, score, sample_weight=row), abs=1e-12)
        expected = oracle.average_precision_score(happened, score, sample_weight=row)
        assert precision == pytest.approx(expected, abs=1e-12)


def test_ranking_of_one_class_is_not_a_number() -> None:
    for happened in (np.array([True, True]), np.array([False, False])):
        assert all(np.isnan(area).all() for area in metrics.ranking(happened, np.array([0.2, 0.4])))


@pytest.mark.parametrize("width", [2, 4])
def test_brier_is_scikit_learns(width: int) -> None:
    p, answer = drawn(3, width=width)
    got = metrics.brier(p, answer).mean()
    expected = oracle.brier_score_loss(answer, p, scale_by_half=False, labels=list(range(width)))  # pyright: ignore
    assert got == pytest.approx(expected, abs=1e-12)
    if width == 2:
        of_event = metrics.event_brier(p[:, 1], answer == 1).mean()
        assert of_event == pytest.approx(oracle.brier_score_loss(answer == 1, p[:, 1]), abs=1e-12)
        assert of_event == pytest.approx(got / 2)


def test_balanced_accuracy_is_scikit_learns() -> None:
    p, answer = drawn(4)
    chosen = p.argmax(axis=1)
    got = metrics.balanced_accuracy(chosen == answer, answer)
    assert got == pytest.approx(oracle.balanced_accuracy_score(answer, chosen), abs=1e-12)
    assert metrics.accuracy(chosen == answer) == pytest.approx(oracle.accuracy_score(answer, chosen))
    assert np.isnan(metrics.accuracy(np.zeros(0, bool)))


def test_always_choosing_the_most_frequent_option_has_a_balanced_accuracy_of_a_half() -> None:
    rng = np.random.default_rng(5)
    answer, majority = rng.integers(4, size=200), rng.integers(4, size=200)
    classes = metrics.majority_classes(answer, majority, np.full(200, -1))
    assert metrics.balanced_accuracy(majority == answer, classes) == 0.5
    event = np.full(200, 1)
    assert np.array_equal(metrics.majority_classes(answer, majority, event), answer == 1)


def test_bins_hold_equally_many_and_equal_values_stay_together() -> None:
    values = np.random.default_rng(6).random(1000)
    bins = metrics.equal_mass_bins(values, 10)
    assert np.array_equal(np.bincount(bins), np.full(10, 100))
    assert all(values[bins == b].max() <= values[bins == b + 1].min() for b in range(9))
    tied = values.round(1)
    bins = metrics.equal_mass_bins(tied, 10)
    assert all(len(np.unique(bins[tied == value])) == 1 for value in np.unique(tied))
    assert np.array_equal(np.unique(bins), np.arange(bins.max() + 1))
    assert metrics.equal_mass_bins(np.full(7, 0.25), 10).tolist() == [0] * 7


def test_reliability_and_calibration_error_are_those_of_the_bins() -> None:
    p, answer = drawn(9)
    said, right = metrics.confidence(p, p.argmax(axis=1)), p.argmax(axis=1) == answer
    bins = metrics.equal_mass_bins(said, 5)
    points = metrics.reliability(said, right, bins)
    expected = [abs(said[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in range(5)]
    assert metrics.calibration_error(points) == pytest.approx(sum(expected), abs=1e-12)
    assert sum(point.n for point in points) == len(said)
    assert all(point.low <= point.predicted <= point.high for point in points)


def test_reliability_of_equally_many_is_scikit_learns_curve() -> None:
    from sklearn.calibration import calibration_curve

    p, answer = drawn(10, n=1000, width=2, decimals=8)
    points = metrics.reliability(p[:, 1], answer == 1, metrics.equal_mass_bins(p[:, 1], 10))
    observed, predicted = calibration_curve(answer == 1, p[:, 1], n_bins=10, strategy="quantile")
    assert [point.predicted for point in points] == pytest.approx(predicted.tolist(), abs=2e-3)
    assert [point.observed for point in points] == pytest.approx(observed.tolist(), abs=2e-2)


def test_confidence_is_of_the_chosen_option_or_of_the_likeliest_where_none_was() -> None:
    p = np.array([[0.7, 0.3], [0.7, 0.3]])
    assert metrics.confidence(p, np.array([1, -1])).tolist() == [0.3, 0.7]


def test_contextual_calibration_takes_a_liking_for_a_letter_away() -> None:
    """Honest probabilities times a liking for A, given 2 or 4 options: what comes back is what was honest."""
    rng = np.random.default_rng(11)
    n = 4000
    n_options = rng.choice([2, 4], n)
    honest = np.zeros((n, 4))
    for options in (2, 4):
        rows = n_options == options
        honest[rows, :options] = rng.dirichlet(np.ones(options), rows.sum())
    answer = np.array([rng.choice(4, p=row) for row in honest])
    liked = honest * np.array([3.0, 1.0, 1.0, 1.0])
    liked /= liked.sum(axis=1, keepdims=True)
    prior = metrics.letter_prior(liked, n_options, np.arange(n))
    better = metrics.contextual_calibration(liked, prior)
    assert np.allclose(better.sum(axis=1), 1) and np.all(better[n_options == 2, 2:] == 0)
    assert metrics.brier(better, answer).mean() < metrics.brier(liked, answer).mean() - 0.02
    assert (better.argmax(axis=1) == answer).mean() > (liked.argmax(axis=1) == answer).mean() + 0.02
    # A prior of prompts without content, here the liking itself, undoes it exactly.
    assert np.allclose(metrics.contextual_calibration(liked, np.array([3.0, 1.0, 1.0, 1.0]) / 6), honest)


def test_a_questions_own_patient_is_not_in_its_prior() -> None:
    p = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    prior = metrics.letter_prior(p, np.array([2, 2, 2]), np.array([5, 5, 9]))
    assert np.allclose(prior, [[0.3, 0.7], [0.3, 0.7], [0.85, 0.15]])
    alone = metrics.letter_prior(p[:1], np.array([2]), np.array([5]))
    assert alone.tolist() == [[0.5, 0.5]]
    certain = metrics.contextual_calibration(np.array([[1.0, 0.0]]), np.array([0.0, 1.0]))
    assert certain.tolist() == [[1.0, 0.0]]
