"""The validation gate: is a round kept as the final model so far, does it hurt, is it time to stop?

Run by the coordinator. Enters: how many validation questions all sites of a sum asked and answered right. Leaves: a
decision. Test patients are never looked at here. Only sums are known, so where other sites finished than before, the
comparison is between other patients as well; `rollback_tolerance` must be wide enough for that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..common.config import FederationConfig

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
class Kept:
    """What would be the final model if the run ended now: 0 is the warmed-up adapter.

    `highest`: the score of the highest accuracy so far, which rounds are measured against. `since`: rounds since it
    last rose.
    """

    round_index: int
    highest: Score
    since: int = 0


Verdict = Literal["kept", "continued", "rolled-back"]


def judge(kept: Kept, round_index: int, score: Score, federation: FederationConfig) -> tuple[Verdict, Kept]:
    """What becomes of a round, and what is kept after it.

    With `keep = "best"` a round is kept that is as good as the best: of two rounds that answer equally many questions
    the one trained longer is. With `keep = "last"` every round is kept that need not be undone. Either way a fall is
    measured from the highest accuracy, not from the round before, or many small falls would add up to a large one that
    nothing stops. Only a rise resets `since`, so a run that only ties ends by `federation.patience`. Where nothing is
    known of a round (too few sites finished the sum), training goes on from it, and what was kept stays. Without
    validation every round is kept.

    Args:
        kept: before this round.
        round_index: of this round, from 1.
        score: of this round.
        federation: `rollback_tolerance` (how far below the highest accuracy a round may fall, as a share, without being
            rolled back), `keep`, and whether there is validation at all.
    """
    if not federation.validates:
        return "kept", Kept(round_index, score)
    before, now = accuracy(kept.highest), accuracy(score)
    if now is None:
        return "continued", Kept(kept.round_index, kept.highest, kept.since + 1)
    if before is None or now > before:
        return "kept", Kept(round_index, score)
    highest, since = kept.highest, kept.since + 1
    # The slack keeps 0.50 − 0.48 from counting as more than 0.02.
    if before - now > federation.rollback_tolerance + 1e-9:
        return "rolled-back", Kept(kept.round_index, highest, since)
    if now == before or federation.keep == "last":
        return "kept", Kept(round_index, highest, since)
    return "continued", Kept(kept.round_index, highest, since)
