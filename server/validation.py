"""The validation gate: is a round better than the best so far, does it hurt, is it time to stop?

Run by the coordinator. Enters: how many validation questions all sites of a sum asked and answered right. Leaves: a
decision. Test patients are never looked at here. Only sums are known, so where other sites finished than before, the
comparison is between other patients as well; `rollback_tolerance` must be wide enough for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Score = tuple[int, int]  # questions, right answers
NOTHING: Score = (0, 0)


def accuracy(score: Score) -> float | None:
    """Share of right answers; None without a question.

    >>> accuracy((40, 30))
    0.75
    """
    questions, correct = score
    return correct / questions if questions else None


@dataclass(frozen=True)
class Best:
    """The best round so far: 0 is the warmed-up adapter. `since`: rounds since accuracy last rose."""

    round_index: int
    score: Score
    since: int = 0


Verdict = Literal["best", "continued", "rolled-back"]


def judge(best: Best, round_index: int, score: Score, tolerance: float, *, gate: bool = True) -> tuple[Verdict, Best]:
    """What becomes of a round, and the best after it.

    As good as the best counts as best: of two rounds that answer equally many questions the one trained longer is.
    Only a rise resets `since`, so a run that only ties ends by `federation.patience`. Where nothing is known of a round
    (too few sites finished the sum), training goes on from it, and the best stays.

    Args:
        best: before this round.
        round_index: of this round, from 1.
        score: of this round.
        tolerance: how far below the best a round may fall (as a share) without being rolled back.
        gate: off, every round counts as best.
    """
    if not gate:
        return "best", Best(round_index, score)
    before, now = accuracy(best.score), accuracy(score)
    after = Best(best.round_index, best.score, best.since + 1)
    if before is None or now is None:
        return "continued", after
    if now > before:
        return "best", Best(round_index, score)
    if now == before:
        return "best", Best(round_index, score, best.since + 1)
    # The slack keeps 0.50 − 0.48 from counting as more than 0.02.
    return ("rolled-back" if before - now > tolerance + 1e-9 else "continued"), after
