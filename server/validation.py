"""The validation gate: is a round better than the best so far, does it hurt, is it time to stop?

Run by the coordinator. Enters: per site, how many validation questions were asked and answered right. Leaves: a
decision. Sites that did not answer both times are left out of a comparison, so that a hospital that is down neither
lifts nor drops the accuracy. Test patients are never looked at here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Scores = Mapping[str, tuple[int, int]]  # site → (questions, correct)


def accuracy(scores: Scores, sites: set[str] | None = None) -> float | None:
    """Pooled accuracy over all sites, or over those named; None without a question.

    >>> accuracy({"a": (10, 5), "b": (30, 25)})
    0.75
    """
    kept = [score for site, score in scores.items() if sites is None or site in sites]
    questions = sum(asked for asked, _ in kept)
    return sum(correct for _, correct in kept) / questions if questions else None


@dataclass(frozen=True)
class Best:
    """The best round so far: 0 is the warmed-up adapter. `since`: rounds since accuracy last rose."""

    round_index: int
    scores: Scores
    since: int = 0


Verdict = Literal["best", "kept", "rolled-back"]


def judge(best: Best, round_index: int, scores: Scores, tolerance: float, *, gate: bool = True) -> tuple[Verdict, Best]:
    """What becomes of a round, and the best after it.

    As good as the best counts as best: of two rounds that answer equally many questions the one trained longer is kept.
    Only a rise resets `since`, so a run that only ties ends by `federation.patience`. Where no site answered both times
    nothing is known of the round: training goes on from it, and the best stays.

    Args:
        best: before this round.
        round_index: of this round, from 1.
        scores: of this round.
        tolerance: how far below the best a round may fall (as a share) without being rolled back.
        gate: off, every round counts as best.
    """
    if not gate:
        return "best", Best(round_index, scores)
    common = set(best.scores) & set(scores)
    before, now = accuracy(best.scores, common), accuracy(scores, common)
    after = Best(best.round_index, best.scores, best.since + 1)
    if before is None or now is None:
        return "kept", after
    if now > before:
        return "best", Best(round_index, scores)
    if now == before:
        return "best", Best(round_index, scores, best.since + 1)
    # The slack keeps 0.50 − 0.48 from counting as more than 0.02.
    return ("rolled-back" if before - now > tolerance + 1e-9 else "kept"), after
