"""Figures of one model on one set of questions: how often right, how well ranked, how honest its probabilities are.

Role: wherever questions were scored (common/scored.py). Pure, numpy only. Enters: arrays of answers and probabilities.
Leaves: numbers, and the bins of a reliability diagram. How sure they are is in common/intervals.py.

Every weighted form takes weights of questions, one row a resample, so that one pass gives a whole bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def accuracy(correct: Bools) -> float:
    """Share of right answers; NaN of none."""
    return float(correct.mean()) if len(correct) else float("nan")


def balanced_accuracy(correct: Bools, classes: Ints) -> float:
    """Mean over the classes of the share of right answers in each.

    With the truth's label as class this is the usual balanced accuracy (scikit-learn's), for any number of labels.

    >>> balanced_accuracy(np.array([True, True, True, False]), np.array([0, 0, 0, 1]))
    0.5
    """
    return float(np.mean([correct[classes == value].mean() for value in np.unique(classes)]))


def majority_classes(answer: Ints, majority: Ints, event: Ints) -> Ints:
    """int64 (Q,): the two classes over which balanced accuracy is taken here.

    Outcomes: whether it happened (1) or not (0). Features, whose options differ from question to question and stand in
    random order: whether the truth is another than the most frequent option (1) or that one (0), so that always
    choosing the most frequent has 0.5.
    """
    outcome = event >= 0
    return (((answer == event) & outcome) | ((answer != majority) & ~outcome)).astype(np.int64)


def _tied(scores: Floats) -> tuple[Ints, Ints]:
    """Order of rising scores, and where each run of equal scores begins in it."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    return order, np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def ranking(happened: Bools, scores: Floats, weights: Floats | None = None) -> tuple[Floats, Floats]:
    """Areas under the ROC curve and under the precision-recall curve.

    The first is the probability that an event scores above a non-event, a tie counting half; a model that knows nothing
    has 0.5. The second is the sum of precision × step of recall, without interpolation ("average precision"); a model
    that knows nothing has the share of events.

    Args:
        happened: bool (Q,).
        scores: float64 (Q,), higher means likelier. Rising ones save time.
        weights: float64 (B, Q), how often each question counts in each resample; None: once.

    Returns:
        Two of float64 (B,), (1,) without weights; NaN where only events or only non-events count.

    >>> [area.round(3).tolist() for area in ranking(np.array([0, 1, 0, 1]) == 1, np.array([0.1, 0.4, 0.4, 0.8]))]
    [[0.875], [0.833]]
    """
    counts = np.ones((1, len(scores))) if weights is None else weights
    order, starts = _tied(scores)
    if not np.array_equal(order, np.arange(len(order))):
        counts, happened = counts[:, order], happened[order]
    ends = np.append(starts[1:], len(scores))
    holds = np.add.reduceat(happened.astype(np.int64), starts) > 0  # only scores that an event has add anything
    # Weight of events, and of all, below each score: what follows is differences of these.
    events, both = (np.zeros((len(counts), len(scores) + 1)) for _ in range(2))
    np.cumsum(counts * happened, axis=1, out=events[:, 1:])
    np.cumsum(counts, axis=1, out=both[:, 1:])
    below, upto = events[:, starts[holds]], events[:, ends[holds]]
    others_below, others_upto = both[:, starts[holds]] - below, both[:, ends[holds]] - upto
    own, total = upto - below, events[:, -1:]
    others = both[:, -1:] - total
    found = total - below
    called = found + others - others_below
    precision = np.divide(found, called, out=np.zeros_like(found), where=called > 0)
    with np.errstate(invalid="ignore"):
        auroc = (own * (others_below + others_upto)).sum(axis=1) / (2 * total * others)[:, 0]
        return auroc, (own * precision).sum(axis=1) / np.where(others > 0, total, np.nan)[:, 0]


def brier(probabilities: Floats, answer: Ints) -> Floats:
    """Brier (1950) score of every question: squared distance between probabilities and truth, over all options; 0 to 2.

    Args:
        probabilities: float64 (Q, W).
        answer: int64 (Q,).

    >>> brier(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([0, 0])).tolist()
    [0.5, 0.0]
    """
    return np.asarray(((probabilities - np.eye(probabilities.shape[1])[answer]) ** 2).sum(axis=1), dtype=np.float64)


def event_brier(probability: Floats, happened: Bools) -> Floats:
    """The same of the event alone: (probability - happened)², 0 to 1; half of `brier` where there are two options."""
    return np.asarray((probability - happened) ** 2, dtype=np.float64)


def event_probability(probabilities: Floats, event: Ints) -> Floats:
    """float64 (Q,): the probability of the option that means that it happened."""
    return probabilities[np.arange(len(event)), event]


def confidence(probabilities: Floats, chosen: Ints) -> Floats:
    """float64 (Q,): the probability of the chosen option; of the most probable one where none was chosen."""
    rows = np.arange(len(chosen))
    return np.where(chosen >= 0, probabilities[rows, chosen], probabilities.max(axis=1))


def equal_mass_bins(values: Floats, bins: int) -> Ints:
    """int64 (Q,): the bin of every value, 0 up, each holding about as many questions; equal values share a bin.

    >>> equal_mass_bins(np.array([0.1, 0.9, 0.5, 0.5]), 2).tolist()
    [0, 1, 1, 1]
    """
    n = len(values)
    order, starts = _tied(values)
    ends = np.append(starts[1:], n)
    of_run = np.minimum(bins - 1, (starts + ends) * bins // (2 * n))  # by the middle of the run of equal values
    result = np.empty(n, np.int64)
    result[order] = np.repeat(of_run, ends - starts)
    return np.unique(result, return_inverse=True)[1].astype(np.int64)


@dataclass(frozen=True)
class ReliabilityBin:
    """Questions of about the same probability: what the model said on average, and how often it was so."""

    n: int
    low: float
    high: float
    predicted: float
    observed: float


def reliability(predicted: Floats, observed: Bools, bins: Ints) -> list[ReliabilityBin]:
    """The points of a reliability diagram.

    Args:
        predicted: float64 (Q,), the probability that the model gave.
        observed: bool (Q,), whether it was so.
        bins: int64 (Q,), as from `equal_mass_bins`.
    """
    result: list[ReliabilityBin] = []
    for value in range(int(bins.max()) + 1 if len(bins) else 0):
        own = bins == value
        p, o = predicted[own], observed[own]
        result.append(ReliabilityBin(len(p), float(p.min()), float(p.max()), float(p.mean()), float(o.mean())))
    return result


def calibration_error(points: Sequence[ReliabilityBin]) -> float:
    """Expected calibration error: the mean distance between what was said and what was so, by bin (Naeini et al. 2015).

    Never below 0, so above the truth where questions are few: a perfectly calibrated model has one, too.
    """
    return sum(p.n * abs(p.predicted - p.observed) for p in points) / sum(p.n for p in points)


def contextual_calibration(probabilities: Floats, prior: Floats) -> Floats:
    """Probabilities without a model's liking for a letter: divided by `prior`, and again with the sum 1.

    Zhao et al. (2021), "Calibrate Before Use", with their diagonal W = 1 / prior and b = 0.

    Args:
        probabilities: float64 (Q, W), 0 past a question's own options.
        prior: float64 (Q, W) or (W,), what the model gives each letter whatever is asked: the mean of its probabilities
            on prompts without content, or `letter_prior`. Letters with a prior of 0 keep their probability as it is.

    >>> contextual_calibration(np.array([[0.6, 0.4]]), np.array([0.75, 0.25])).round(3).tolist()
    [[0.333, 0.667]]
    """
    divided = probabilities / np.where(prior > 0, prior, 1.0)
    total = divided.sum(axis=1, keepdims=True)
    return np.divide(divided, total, out=probabilities.astype(np.float64), where=total > 0)


def letter_prior(probabilities: Floats, n_options: Ints, patients: Ints) -> Floats:
    """What the model gives each letter on average over the questions of *other* patients with as many options.

    Fair only where the truth's letter was drawn at random: then all letters are equally often true. Nothing of a
    question or its patient is in its own prior.

    Args:
        probabilities: float64 (Q, W).
        n_options: int64 (Q,).
        patients: int64 (Q,).

    Returns:
        float64 (Q, W), rows with the sum 1; uniform over the question's options where no other patient was asked one.
    """
    width = probabilities.shape[1]
    result = np.zeros_like(probabilities)
    for options in (int(count) for count in np.unique(n_options)):
        rows = np.flatnonzero(n_options == options)
        own = np.unique(patients[rows], return_inverse=True)[1]
        sums = np.zeros((int(own.max()) + 1, width))
        np.add.at(sums, own, probabilities[rows])
        counts = np.bincount(own).astype(np.float64)
        others, left = probabilities[rows].sum(axis=0) - sums, len(rows) - counts
        uniform = np.array([1.0 / options if option < options else 0.0 for option in range(width)])
        priors = np.where(left[:, None] > 0, others / np.maximum(left, 1.0)[:, None], uniform)
        result[rows] = priors[own]
    return result
