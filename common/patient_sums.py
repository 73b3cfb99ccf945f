"""Sums over patients from which accuracies and differences follow, with intervals: all that need leave a hospital.

Role: a hospital adds up its own patients (`PatientSums.of`), anybody adds hospitals. Enters: right and wrong answers.
Leaves: for M models (2 + M) + (1 + M)² whole numbers of 0 or more, so that a secure sum can carry them; no question, no
patient. Private: sums of few patients say much about them; a site's policy says from how many on they may leave.

With n_g questions of patient g and c_gi right answers of model i, the sums are Σ n_g, Σ c_gi and all Σ of products of
two. An accuracy is a ratio R = Σ c / Σ n, and its cluster-robust ("sandwich") variance Σ (c_g − R n_g)² / (Σ n)² is of
the same sums (Liang and Zeger 1986; Cochran 1977, §6.4, the ratio estimator), as is that of a difference of two
models. G / (G − 1) corrects for few patients, as statsmodels and Stata do, and quantiles are of t with G − 1 degrees of
freedom. All patients of all sites count as independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .distributions import t_quantile, t_two_sided
from .errors import ProtocolError
from .scored import MAJORITY, Scored
from .statistics import MAX_COUNT, mcnemar_exact, wilson

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ClusterSums:
    """Sufficient statistics of a ratio Σx / Σn over G patients, and of its variance. Adding adds patients.

    Attributes:
        patients: G.
        x, n: Σ x_g and Σ n_g.
        xx, xn, nn: Σ x_g², Σ x_g n_g and Σ n_g².
    """

    patients: int
    x: int
    n: int
    xx: int
    xn: int
    nn: int

    def __add__(self, other: ClusterSums) -> ClusterSums:
        return ClusterSums(
            self.patients + other.patients,
            self.x + other.x,
            self.n + other.n,
            self.xx + other.xx,
            self.xn + other.xn,
            self.nn + other.nn,
        )

    @property
    def value(self) -> float:
        """Σx / Σn; NaN of no questions."""
        return self.x / self.n if self.n else math.nan

    @property
    def standard_error(self) -> float:
        """Cluster-robust; infinite for fewer than two patients."""
        if self.patients < 2:
            return math.inf
        spread = self.xx - 2 * self.value * self.xn + self.value**2 * self.nn
        return math.sqrt(max(0.0, spread) * self.patients / (self.patients - 1)) / self.n

    def ci95(self, least: float = 0.0, most: float = 1.0) -> list[float]:
        """95 % interval by t, cut off at the least and most possible; from one to the other for a single patient.

        What has no scatter is not certain: of a share of 0 or 1 it is Wilson's of the patients, of a difference
        (`least` below 0) that is one for each of them the exact limit of what so few could have missed.
        """
        if self.patients < 2:
            return [least, most]
        if least < 0 and self.standard_error == 0:
            missed = 1.0 - 0.025 ** (1.0 / self.patients)
            return [max(least, self.value - missed), min(most, self.value + missed)]
        if least >= 0 and self.x in (0, self.n):
            return wilson(self.patients if self.x else 0, self.patients)
        half = t_quantile(0.975, self.patients - 1) * self.standard_error
        return [max(least, self.value - half), min(most, self.value + half)]

    def p_value(self) -> float:
        """Two-sided p of a ratio of 0, by t; for differences."""
        if self.patients < 2 or self.x == 0:
            return 1.0
        return t_two_sided(self.value / self.standard_error, self.patients - 1) if self.standard_error else 0.0

    def design_effect(self, second_moment: float) -> float:
        """The variance over that of as many independent questions whose x² add up to `second_moment`; at least 1."""
        alone = second_moment / self.n - self.value**2
        return max(1.0, self.standard_error**2 * self.n / alone) if alone > 0 and self.patients > 1 else 1.0


@dataclass(frozen=True, eq=False)
class PatientSums:
    """Sums over patients of questions and right answers, and of their products.

    Attributes:
        models: names; the majority option is one more, after them.
        patients: G.
        first: int64 (2 + M,): questions, right answers of each model, right answers of the majority option.
        second: int64 (2 + M, 2 + M), symmetric: sums over patients of the products of two of them.
    """

    models: tuple[str, ...]
    patients: int
    first: Ints
    second: Ints

    @classmethod
    def of(cls, scored: Scored) -> Self:
        """The sums of these questions."""
        right = np.stack([scored.correct(name) for name in (*scored.models, MAJORITY)], axis=1)
        return cls.of_answers(tuple(scored.models), scored.patients, right)

    @classmethod
    def of_answers(cls, models: Sequence[str], patients: NDArray[np.generic], right: NDArray[np.bool_]) -> Self:
        """The sums of questions about `patients` (Q,); `right`: bool (Q, M + 1), the majority option last."""
        people, codes = np.unique(patients, return_inverse=True)
        own = np.zeros((len(people), 1 + right.shape[1]), np.int64)
        np.add.at(own, codes, np.concatenate([np.ones((len(right), 1), np.int64), right.astype(np.int64)], axis=1))
        return cls(tuple(models), len(people), own.sum(axis=0), own.T @ own)

    def __add__(self, other: PatientSums) -> PatientSums:
        """Sums over both sets of patients, who must be different people.

        Raises:
            ProtocolError: of other models.
        """
        if self.models != other.models:
            raise ProtocolError("expected sums of the same models, got two different ones")
        return PatientSums(
            self.models, self.patients + other.patients, self.first + other.first, self.second + other.second
        )

    def without(self, part: PatientSums) -> PatientSums:
        """The sums over everybody else; `part` is of some of these patients, with all of their questions."""
        first, second = self.first - part.first, self.second - part.second
        return PatientSums(self.models, self.patients - part.patients, first, second)

    def to_vector(self) -> Ints:
        """All sums as one int64 vector of `sums_size` entries of 0 or more: adding vectors adds sums."""
        upper = self.second[np.triu_indices(len(self.first))]
        return np.concatenate([np.array([self.patients]), self.first, upper]).astype(np.int64)

    @classmethod
    def from_vector(cls, vector: Ints, models: Sequence[str]) -> Self:
        """The sums whose entries are `vector`.

        Raises:
            ProtocolError: wrong length or type, an entry out of range, or entries that contradict each other.
        """
        size, width = sums_size(models), len(models) + 2
        if vector.shape != (size,) or vector.dtype != np.int64:
            raise ProtocolError(f"expected {size} int64 sums, got {vector.shape} {vector.dtype}")
        if np.any(vector < 0) or np.any(vector > MAX_COUNT):
            raise ProtocolError("expected sums of 0 or more, got one out of range")
        first, second = vector[1 : 1 + width].copy(), np.zeros((width, width), np.int64)
        second[np.triu_indices(width)] = vector[1 + width :]
        second = np.maximum(second, second.T)
        patients, diagonal = int(vector[0]), np.diag(second)
        # Nobody has more right answers than questions, and every patient has at least one question.
        fits = patients <= first[0] and np.all(first <= first[0]) and np.all(second <= second[0, 0])
        if not fits or np.any(diagonal < first) or np.any(second[0] < diagonal):
            raise ProtocolError("expected sums over one set of patients, got sums that contradict each other")
        return cls(tuple(models), patients, first, second)

    def accuracy(self, model: str) -> ClusterSums:
        """Of the share of questions that `model` (or "majority") had right."""
        i, s = self._column(model), self.second
        return ClusterSums(self.patients, *map(int, (self.first[i], self.first[0], s[i, i], s[0, i], s[0, 0])))

    def difference(self, later: str, earlier: str) -> ClusterSums:
        """Of the accuracy of `later` minus that of `earlier`, on the same questions; its interval is from -1 to 1."""
        i, j, s = self._column(later), self._column(earlier), self.second
        squares, products = s[i, i] - 2 * s[i, j] + s[j, j], s[0, i] - s[0, j]
        x = self.first[i] - self.first[j]
        return ClusterSums(self.patients, *map(int, (x, self.first[0], squares, products, s[0, 0])))

    def only(self, later: str, earlier: str) -> tuple[int, int] | None:
        """How many questions `later` alone and `earlier` alone had right: what differs in their 2 × 2 table.

        None where a patient has several questions, of which sums over patients do not tell it.
        """
        if not self.patients == self.first[0] == self.second[0, 0]:
            return None
        both = int(self.second[self._column(later), self._column(earlier)])
        return int(self.first[self._column(later)]) - both, int(self.first[self._column(earlier)]) - both

    def compare(self, later: str, earlier: str) -> dict[str, Any]:
        """{"difference", "ci95", "p", "only_model", "only_against"} of two models.

        The interval is cluster-robust. p is McNemar's exact one where each patient has one question; else that of the
        t statistic, and the last two are None.
        """
        found, only = self.difference(later, earlier), self.only(later, earlier)
        one, other = only or (None, None)
        return {
            "difference": found.value,
            "ci95": found.ci95(-1.0, 1.0),
            "p": found.p_value() if only is None else mcnemar_exact(*only),
            "only_model": one,
            "only_against": other,
        }

    def _column(self, model: str) -> int:
        return len(self.models) + 1 if model == MAJORITY else self.models.index(model) + 1


def sums_size(models: Sequence[str]) -> int:
    """Length of the vector of sums of these models.

    >>> sums_size(["base", "final"])
    15
    """
    width = len(models) + 2
    return 1 + width + width * (width + 1) // 2
