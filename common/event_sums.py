"""How probabilities of an event rank and fit, from counts that may be added over hospitals: AUROC and Brier score.

Role: a hospital counts its own patients (`EventSums.of`), anybody adds hospitals. Enters: every patient's probability
of the event, and whether it happened. Leaves: whole numbers, so that a secure sum can carry them; no probability.
Private: a bin of one patient says within which bounds the probability of somebody lay.

Bins are equal in log odds: a model that gives every rare event between 2 and 10 % is still resolved. Within a bin all
patients are tied, which counts half, so that the AUROC is that of probabilities rounded to their bin; how far that is
from the exact one is tested (tests/common/test_event_sums.py). Its variance is DeLong, DeLong and Clarke-Pearson's
(1988), which is exact for tied scores and follows from the counts; the interval is taken on the logit scale, so that it
stays inside 0 to 1. One question a patient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .errors import ProtocolError
from .statistics import MAX_COUNT, Z95

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

EDGES: Floats = 1 / (1 + np.exp(-np.arange(-7.5, 7.6, 0.25)))  # 0.06 % to 99.94 %
BINS = len(EDGES) + 1
SCORE_UNIT = 2**20  # Brier scores travel as whole numbers of 1 / this
EVENT_SIZE = 2 * BINS + 2


@dataclass(frozen=True, eq=False)
class EventSums:
    """Sufficient statistics of one model's probabilities of an event.

    Attributes:
        bins: int64 (2, BINS): patients without and with the event, by the bin of the probability.
        score: Σ of squared errors, in 1 / `SCORE_UNIT`.
        score_squared: Σ of their squares, in the same unit.
    """

    bins: Ints
    score: int
    score_squared: int

    @classmethod
    def of(cls, probability: Floats, happened: NDArray[np.bool_]) -> Self:
        """The sums of these patients, one question each: `probability` float64 (P,), 0 to 1; `happened` bool (P,)."""
        bins = np.zeros((2, BINS), np.int64)
        np.add.at(bins, (happened.astype(np.int64), np.searchsorted(EDGES, probability, side="right")), 1)
        squared = (probability - happened) ** 2
        return cls(bins, round(float(squared.sum()) * SCORE_UNIT), round(float((squared**2).sum()) * SCORE_UNIT))

    def to_vector(self) -> Ints:
        """int64 (`EVENT_SIZE`,) of 0 or more: adding vectors adds patients."""
        return np.concatenate([self.bins.ravel(), np.array([self.score, self.score_squared], np.int64)])

    @classmethod
    def from_vector(cls, vector: Ints) -> Self:
        """The sums whose entries are `vector`.

        Raises:
            ProtocolError: wrong length or type, an entry out of range, or scores that so few patients cannot have.
        """
        fits = vector.shape == (EVENT_SIZE,) and vector.dtype == np.int64
        if not fits or np.any(vector < 0) or np.any(vector > MAX_COUNT):
            raise ProtocolError(f"expected {EVENT_SIZE} whole numbers of 0 or more for the probabilities of an event")
        bins, (score, squared) = vector[: 2 * BINS].reshape(2, BINS).copy(), map(int, vector[2 * BINS :])
        most = (int(bins.sum()) + 1) * SCORE_UNIT  # each site's sum is rounded
        if score > most or squared > most:
            raise ProtocolError("expected sums over one set of patients, got Brier scores above 1")
        return cls(bins, score, squared)

    @property
    def n(self) -> int:
        """Patients."""
        return int(self.bins.sum())

    @property
    def events(self) -> int:
        """Patients with the event."""
        return int(self.bins[1].sum())

    def auroc(self) -> tuple[float, list[float]]:
        """Area under the ROC curve of the binned probabilities, and its 95 % interval (DeLong, logit scale).

        Raises:
            ValueError: nobody had the event, or everybody.
        """
        without, having = (row.astype(np.float64) for row in self.bins)
        n, m = without.sum(), having.sum()
        if not (n and m):
            raise ValueError("expected patients with and without the event")
        # Share of the others that a patient of each bin is ranked against rightly; a tie is half.
        of_having = (np.cumsum(without) - without / 2) / n
        of_without = (m - np.cumsum(having) + having / 2) / m
        area = float(having @ of_having) / m
        variance = _spread(having, of_having, area) / m + _spread(without, of_without, area) / n
        return float(area), _logit_interval(float(area), math.sqrt(variance))

    def brier(self) -> tuple[float, list[float]]:
        """Mean squared distance of probability and event, and its 95 % interval (normal)."""
        mean, squared = self.score / SCORE_UNIT / self.n, self.score_squared / SCORE_UNIT / self.n
        half = Z95 * math.sqrt(max(0.0, squared - mean**2) / max(1, self.n - 1))
        return mean, [max(0.0, mean - half), min(1.0, mean + half)]


def _spread(weights: Floats, values: Floats, mean: float) -> float:
    """Sample variance of values that occur `weights` times; 0 of one."""
    total = float(weights.sum())
    return float(weights @ (values - mean) ** 2) / (total - 1) if total > 1 else 0.0


def _logit_interval(value: float, error: float) -> list[float]:
    """Everything where there is no scatter to go by: patients that are ranked perfectly show none."""
    if not 0 < value < 1 or not error:
        return [0.0, 1.0]
    middle, half = math.log(value / (1 - value)), Z95 * error / (value * (1 - value))
    return [1 / (1 + math.exp(half - middle)), 1 / (1 + math.exp(-half - middle))]
