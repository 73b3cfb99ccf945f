"""One model's figures on one task, each with a 95 % interval by patient.

Role: wherever questions were scored; a step of common/summary.py. Pure. Enters: scored questions. Leaves: figures, bins
of reliability diagrams, and the resamples of what is compared between models. Private: bins and events of fewer than
`min_cell` patients are merged or not reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import metrics
from .intervals import PatientBootstrap, bounds, distance_interval, share_bounds
from .scored import MAJORITY, Answered, Scored

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

RANK_DRAWS = 2000  # resamples of areas under curves, which are sorted anew for each: enough for two digits of a bound
_BINS = 10


@dataclass(frozen=True, eq=False)
class Events:
    """The questions of outcomes, where enough patients had the event and enough did not.

    Attributes:
        rows: int64, which questions.
        happened: bool (len(rows),).
    """

    rows: Ints
    happened: Bools


def events_of(scored: Scored, min_cell: int) -> Events | None:
    """The outcome questions; None where fewer than `min_cell` patients had the event, or did not."""
    rows = np.flatnonzero(scored.event >= 0)
    happened = scored.answer[rows] == scored.event[rows]
    patients = scored.patients[rows]
    fewest = min(len(np.unique(patients[happened])), len(np.unique(patients[~happened])))
    return Events(rows, happened) if fewest >= max(1, min_cell) else None


def says_probabilities(answers: Answered, n_options: Ints) -> bool:
    """Whether any of a model's rows of probabilities is not uniform, which stands for unknown."""
    even = 1.0 / n_options.astype(np.float64)
    return bool(np.any(np.abs(answers.probabilities.max(axis=1) - even) > 1e-6))


def share(values: Floats, patients: int) -> dict[str, Any]:
    """{"value", "ci95"} of a share, from its resamples (1 + B,)."""
    return {"value": float(values[0]), "ci95": share_bounds(values, patients)}


def figure(values: Floats) -> dict[str, Any]:
    """{"value", "ci95"} of any figure, from its resamples (1 + B,)."""
    return {"value": float(values[0]), "ci95": bounds(values)}


@dataclass(frozen=True, eq=False)
class ModelFigures:
    """What is told of a model, and resamples for comparing it with others.

    Attributes:
        told: JSON-safe; "accuracy" and "balanced_accuracy" {"value", "ci95"}, "n", "correct"; "fallback_rate" and
            "mean_length", None where no text was generated; "brier", "ece" and "reliability", None where no
            probabilities are known; "event", None where there are none or too few of them.
        brier: float64 (1 + B,), resamples; None as above.
        auroc: float64 (1 + fewer,), resamples; None as above.
    """

    told: dict[str, Any]
    brier: Floats | None
    auroc: Floats | None


def majority_figures(scored: Scored, bootstrap: PatientBootstrap) -> dict[str, Any]:
    """{"accuracy", "balanced_accuracy", "n", "correct"} of always choosing the most frequent option."""
    return _accuracies(scored, scored.correct(MAJORITY), bootstrap)


def model_figures(
    scored: Scored, model: str, events: Events | None, bootstrap: PatientBootstrap, min_cell: int
) -> ModelFigures:
    """All figures of one model.

    Args:
        scored: the questions.
        model: one of its models.
        events: from `events_of`.
        bootstrap: of the patients of `scored`.
        min_cell: fewest patients a bin holds.
    """
    answers, correct = scored.models[model], scored.correct(model)
    told = _accuracies(scored, correct, bootstrap)
    generated = bool(answers.length.any())
    columns = np.stack([~answers.boxed, answers.length], axis=1)
    written = bootstrap.ratios(columns, np.ones((len(scored), 1))) if generated else None
    told["fallback_rate"] = None if written is None else share(written[:, 0], bootstrap.n_patients)
    told["mean_length"] = None if written is None else figure(written[:, 1])
    if not says_probabilities(answers, scored.n_options):
        return ModelFigures({**told, "brier": None, "ece": None, "reliability": None, "event": None}, None, None)
    every = np.arange(len(scored))
    scores = metrics.brier(answers.probabilities, scored.answer)
    said = metrics.confidence(answers.probabilities, answers.chosen)
    brier, calibration = _calibrated(scored, every, scores, said, correct, bootstrap, min_cell)
    event, auroc = (None, None) if events is None else _event(scored, answers, events, bootstrap, min_cell)
    return ModelFigures({**told, **calibration, "event": event}, brier, auroc)


def _accuracies(scored: Scored, correct: Bools, bootstrap: PatientBootstrap) -> dict[str, Any]:
    classes = metrics.majority_classes(scored.answer, scored.majority, scored.event)[:, None] == np.arange(2)
    below = np.concatenate([np.ones((len(scored), 1), np.bool_), classes[:, np.any(classes, axis=0)]], axis=1)
    values = bootstrap.ratios(below & correct[:, None], below)
    return {
        "n": len(scored),
        "correct": int(correct.sum()),
        "accuracy": share(values[:, 0], bootstrap.n_patients),
        "balanced_accuracy": share(values[:, 1:].mean(axis=1), bootstrap.n_patients),
    }


def _calibrated(
    scored: Scored,
    rows: Ints,
    scores: Floats,
    said: Floats,
    was_so: Bools,
    bootstrap: PatientBootstrap,
    min_cell: int,
) -> tuple[Floats, dict[str, Any]]:
    """Brier score, calibration error and reliability bins of some questions; resamples of the first besides.

    The bins are those of the sample in every resample.
    """
    bins = _patient_bins(said, scored.patients[rows], min_cell)
    points = metrics.reliability(said, was_so, bins)
    own = np.zeros((len(scored), 2 + len(points)))
    own[rows, 0], own[rows, 1] = 1.0, scores
    own[rows, 2 + bins] = said - was_so
    sums = bootstrap.sums(own)
    below = np.where(sums[:, :1] > 0, sums[:, :1], np.nan)
    brier = (sums[:, 1:2] / below)[:, 0]
    error, interval, by_chance = distance_interval(sums[:, 2:] / below)
    ece = {"value": error, "ci95": interval, "by_chance": by_chance}
    return brier, {"brier": figure(brier), "ece": ece, "reliability": [asdict(point) for point in points]}


def _patient_bins(said: Floats, patients: Ints, min_cell: int) -> Ints:
    """Equal-mass bins, ten at most, neighbours merged until each holds `min_cell` patients."""
    most = len(np.unique(patients)) // max(1, min_cell)
    bins = metrics.equal_mass_bins(said, max(1, min(_BINS, most)))
    merged, current, held = np.zeros_like(bins), 0, np.zeros(len(bins), np.bool_)
    for value in range(int(bins.max()) + 1):
        merged[bins == value] = current
        held |= bins == value
        if len(np.unique(patients[held])) >= min_cell:
            current, held = current + 1, np.zeros(len(bins), np.bool_)
    if held.any() and current:  # what is left over is too few: it goes to the bin before
        merged[held] = current - 1
    return merged


def _event(
    scored: Scored, answers: Answered, events: Events, bootstrap: PatientBootstrap, min_cell: int
) -> tuple[dict[str, Any], Floats]:
    rows, happened = events.rows, events.happened
    said = metrics.event_probability(answers.probabilities[rows], scored.event[rows])
    rising = np.argsort(said, kind="stable")
    blocks = [
        metrics.ranking(happened[rising], said[rising], weights)
        for weights in bootstrap.question_weights(rows[rising], RANK_DRAWS)
    ]
    auroc, precision = (np.concatenate(area) for area in zip(*blocks, strict=True))
    scores = metrics.event_brier(said, happened)
    _, calibration = _calibrated(scored, rows, scores, said, happened, bootstrap, min_cell)
    told = {
        "n": len(rows),
        "events": int(happened.sum()),
        "auroc": figure(auroc),
        "auprc": figure(precision),
    }
    return {**told, **calibration}, auroc


def mean_of(points: Sequence[dict[str, Any]], key: str) -> float:
    """The mean of a reliability diagram's bins, weighted by n: of all questions in them."""
    return sum(point["n"] * point[key] for point in points) / sum(point["n"] for point in points)
