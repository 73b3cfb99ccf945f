"""What raters' preferences say together: who wins, how sure that is, and how far raters agree with each other.

Runs at the coordinator, on the export of a review. Enters: one preference a rater and pair of answers. Leaves: tables.
Private: raters are numbers here; names stay in the review's own database.

- **Agreement**: Krippendorff's α (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"), from the
  coincidence matrix, for nominal, ordinal, interval and ratio data, with missing ratings.
- **Abilities**: the Bradley-Terry model (Bradley and Terry 1952), by Newton's method on the log-likelihood, with
  standard errors; a tie is half a win for either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...common.errors import WardroundError

Level = Literal["nominal", "ordinal", "interval", "ratio"]
_STEPS, _CLOSE = 100, 1e-10


class AgreementError(WardroundError):
    """Too few ratings, or none that can be compared."""

    code = "agreement"


def krippendorff_alpha(ratings: NDArray[np.float64], level: Level = "nominal") -> float:
    """Krippendorff's α: 1 is perfect agreement, 0 what chance would give, below 0 systematic disagreement.

    Args:
        ratings: shape (raters, items); NaN where a rater gave none. Values of `ratio` data are not negative.
        level: of measurement, which decides how far two values are apart.

    Raises:
        AgreementError: fewer than two raters rated any one item.
    """
    values = np.unique(ratings[~np.isnan(ratings)])
    coincidences = np.zeros((len(values), len(values)))
    for column in ratings.T:
        given = column[~np.isnan(column)]
        if len(given) > 1:
            counts = (given[:, None] == values).sum(axis=0).astype(float)
            pairs = np.outer(counts, counts) - np.diag(counts)
            coincidences += pairs / (len(given) - 1)
    totals = coincidences.sum(axis=1)
    n = float(totals.sum())
    if n < 2:
        raise AgreementError("expected an item that two raters have rated, got none")
    distance = _squared_distance(values, totals, level)
    observed = float((coincidences * distance).sum())
    expected = float((np.outer(totals, totals) * distance).sum()) / (n - 1)
    # Where everybody always gave one and the same value there is no disagreement, and none was to be expected.
    return 1.0 if expected == 0 else 1.0 - observed / expected


def _squared_distance(values: NDArray[np.float64], totals: NDArray[np.float64], level: Level) -> NDArray[np.float64]:
    """How far values are apart, squared, shape (values, values)."""
    if level == "nominal":
        return np.ones((len(values), len(values))) - np.eye(len(values))
    if level == "ordinal":
        # Of the ranks between two values, each end counts for half.
        before = np.cumsum(totals) - totals / 2
        return (before[:, None] - before) ** 2
    difference, total = values[:, None] - values, values[:, None] + values
    if level == "interval":
        return difference**2
    return np.divide(difference, total, out=np.zeros_like(difference), where=total != 0) ** 2


@dataclass(frozen=True)
class Abilities:
    """What the Bradley-Terry model says of the compared.

    Attributes:
        log_ability: float64 (n,), their mean 0: A beats B with probability 1 / (1 + exp(b - a)).
        covariance: float64 (n, n), of `log_ability`.
    """

    log_ability: NDArray[np.float64]
    covariance: NDArray[np.float64]

    def difference(self, one: int, other: int) -> tuple[float, float]:
        """How much abler one is than another, and its standard error, in logits."""
        contrast = np.zeros(len(self.log_ability))
        contrast[one] += 1.0
        contrast[other] -= 1.0
        return float(contrast @ self.log_ability), float(np.sqrt(contrast @ self.covariance @ contrast))


def bradley_terry(wins: NDArray[np.float64]) -> Abilities:
    """Abilities of which the wins are the likeliest outcome.

    Args:
        wins: shape (n, n): how often the row beat the column; a tie is 0.5 for each. The diagonal is not looked at.

    Raises:
        AgreementError: the compared fall into two groups of which one never beat the other (or they never met), so that
            no finite abilities exist (Ford 1957).
    """
    n = len(wins)
    wins = wins * (1.0 - np.eye(n))
    if not _connected(wins):
        raise AgreementError(
            "expected that each of the compared beats each other at least by way of others; there is a group that "
            "never won, or never met, against the rest: ask more pairs"
        )
    met = wins + wins.T
    ability, information = np.zeros(n), np.zeros((n, n))
    for _ in range(_STEPS):
        chance = 1.0 / (1.0 + np.exp(ability - ability[:, None]))  # of the row against the column
        gradient = (wins - met * chance).sum(axis=1)
        weight = met * chance * (1.0 - chance)
        information = np.diag(weight.sum(axis=1)) - weight
        step = np.linalg.pinv(information) @ gradient
        ability = ability + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < _CLOSE:
            break
    ability -= ability.mean()
    return Abilities(ability, np.asarray(np.linalg.pinv(information), dtype=np.float64))


def _connected(wins: NDArray[np.float64]) -> bool:
    """Whether everybody beats everybody by way of others."""
    reach = (wins > 0) | np.eye(len(wins), dtype=bool)
    for _ in range(len(wins)):
        reach = reach @ reach
    return bool(reach.all())
