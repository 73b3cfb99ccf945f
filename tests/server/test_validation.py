"""The validation gate: which round is the best, which is continued from, which is undone."""

import pytest
from wardround.server.validation import NOTHING, Best, accuracy, judge


def score(correct: int, questions: int = 100) -> tuple[int, int]:
    return questions, correct


@pytest.mark.parametrize(
    ("correct", "verdict", "best_round", "since"),
    [
        (61, "best", 3, 0),
        (60, "best", 3, 2),  # a tie keeps the later round, but is no progress
        (59, "continued", 1, 2),
        (58, "continued", 1, 2),  # exactly the tolerance below
        (57, "rolled-back", 1, 2),
    ],
)
def test_a_round_is_judged_by_its_distance_to_the_best(correct: int, verdict: str, best_round: int, since: int):
    got, best = judge(Best(1, score(60), since=1), 3, score(correct), tolerance=0.02)
    assert (got, best.round_index, best.since) == (verdict, best_round, since)


def test_sums_over_other_numbers_of_sites_are_compared_by_their_accuracy():
    best = Best(0, score(120, questions=200))
    assert judge(best, 1, score(61, questions=100), 0.02)[0] == "best"
    assert judge(best, 1, score(57, questions=100), 0.02)[0] == "rolled-back"


def test_without_validation_every_round_counts_as_best():
    verdict, best = judge(Best(0, NOTHING), 1, NOTHING, 0.02, gate=False)
    assert (verdict, best.round_index, best.since) == ("best", 1, 0)
    assert accuracy(NOTHING) is None


def test_a_round_that_nothing_is_known_of_never_becomes_the_best():
    verdict, best = judge(Best(3, score(180, questions=200), since=1), 4, NOTHING, 0.02)
    assert (verdict, best.round_index, best.since) == ("continued", 3, 2)
