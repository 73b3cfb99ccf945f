"""What an attack's success proves: lower bounds on ε, and how well members can be told from others.

Used by the audit. Enters: scores and the truth about who was in. Leaves: bounds with their confidence. Pure functions.

The one-run bound is Theorem 5.2 of Steinke, Nasr and Jagielski (2023, "Privacy Auditing with One (1) Training Run",
arXiv 2305.08846): m canaries are each put in by a fair coin, the auditor guesses about r of them, and a mechanism that
is (ε, δ)-differentially private lets v or more guesses be right with probability at most

    f(v) + 2 m δ · max over i = 1 … v of (f(v − i) − f(v)) / i,      f(v) = P[Binomial(r, e^ε / (e^ε + 1)) ≥ v].

The largest ε for which that is below 1 − confidence is refuted. r must not depend on what was observed: a few are fixed
in advance and the chance of error is divided among them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GUESS_SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)  # r over m
CONFIDENCE = 0.95
_LARGEST = 60.0  # ε up to which is searched: beyond, e^ε is past float64's grasp of 1 − 1/e^ε

Float64 = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class OneRun:
    """A lower bound on ε from one run.

    Attributes:
        epsilon: every smaller ε is refuted, at `CONFIDENCE`; 0 when nothing is.
        canaries: m.
        guesses: r of the number of guesses that gave the bound.
        right: v, how many of them were right.
        most: what the bound would have been, had every guess been right: a larger ε cannot be refuted with m canaries.
    """

    epsilon: float
    canaries: int
    guesses: int
    right: int
    most: float


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The largest probability of `right` or more right guesses under (ε, δ)-differential privacy.

    >>> round(p_value(1000, 100, 100, math.log(99), 0.0), 4)  # 0.99 ** 100
    0.366
    """
    from scipy.stats import binom

    if not 0 <= right <= guesses <= canaries:
        raise ValueError(f"expected 0 ≤ right ≤ guesses ≤ canaries, got {right}, {guesses}, {canaries}")
    q = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, q))
    if right == 0 or delta == 0:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, q))  # f(v − i) − f(v), i = 1 … v
    return min(1.0, tail + 2 * canaries * delta * float((below / np.arange(1, right + 1)).max()))


def lower_bound(canaries: int, guesses: int, right: int, delta: float, error: float) -> float:
    """The largest ε that is refuted with a chance of error of at most `error`; 0 when none is.

    >>> round(lower_bound(1000, 100, 100, 0.0, 0.05), 3)  # all of 100 right: ln(0.05^0.01 / (1 − 0.05^0.01))
    3.493
    """
    low, high = 0.0, _LARGEST
    if p_value(canaries, guesses, right, low, delta) >= error:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if p_value(canaries, guesses, right, middle, delta) < error:
            low = middle
        else:
            high = middle
    return low


def one_run(scores: Float64, included: Bools, delta: float, shares: Sequence[float] = GUESS_SHARES) -> OneRun:
    """The bound from scores: the highest are guessed to be in, as many of the lowest to be out, the rest left open.

    Args:
        scores: (m,), higher for canaries that seem to be in.
        included: (m,), what the coins said.
        delta: at which ε is asked for.
        shares: of the canaries that are guessed about; fixed in advance.
    """
    order, m = np.argsort(scores, kind="stable"), len(scores)
    error = (1 - CONFIDENCE) / len(shares)
    best: OneRun | None = None
    for half in (max(1, round(share * m / 2)) for share in shares):
        half = min(half, m // 2)
        right = int(included[order[m - half :]].sum() + (~included[order[:half]]).sum())
        found = lower_bound(m, 2 * half, right, delta, error)
        if best is None or found > best.epsilon:
            best = OneRun(found, m, 2 * half, right, 0.0)
    assert best is not None
    most = max(lower_bound(m, r, r, delta, error) for r in (2 * min(m // 2, max(1, round(s * m / 2))) for s in shares))
    return OneRun(best.epsilon, m, best.guesses, best.right, most)


def auc(members: Float64, others: Float64) -> tuple[float, list[float]]:
    """The chance that a member scores higher than another (ties count half), with its 95 % interval (DeLong 1988)."""
    both = np.concatenate([members, others])
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    rank = (below + (counts - 1) / 2)[inverse]  # how many of all are lower, ties half
    n, m = len(members), len(others)
    # How many others each member beats, and by how many members each other is beaten, as shares.
    wins = (rank[:n] - _own_rank(members)) / m
    losses = 1 - (rank[n:] - _own_rank(others)) / n
    value = float(wins.mean())
    spread = 1.96 * math.sqrt(float(wins.var(ddof=1)) / n + float(losses.var(ddof=1)) / m)
    return value, [max(0.0, value - spread), min(1.0, value + spread)]


def _own_rank(values: Float64) -> Float64:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - counts + (counts - 1) / 2)[inverse]


def permitted_auc(epsilon: float, delta: float) -> float:
    """The largest AUC that an (ε, δ)-differentially private mechanism allows any attack.

    The area under min(δ + e^ε x, 1 − e^−ε (1 − δ − x)), the most that a test finds at a false alarm rate of x.

    >>> permitted_auc(0.0, 0.0), round(permitted_auc(1.0, 1e-5), 4)
    (0.5, 0.7311)
    """
    corner = (1 - delta) / (1 + math.exp(epsilon))  # where the two lines meet
    return corner * (delta + 1 - corner) / 2 + (1 - delta - corner) * (2 - corner) / 2 + delta


def clopper_pearson(hits: int, n: int) -> list[float]:
    """The exact 95 % interval of a share."""
    from scipy.stats import beta

    low = 0.0 if hits == 0 else float(beta.ppf(0.025, hits, n - hits + 1))
    high = 1.0 if hits == n else float(beta.ppf(0.975, hits + 1, n - hits))
    return [low, high]
