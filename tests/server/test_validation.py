"""The validation gate: which round is kept, which is undone."""

import pytest
from wardround.server.validation import Best, accuracy, judge


def score(correct: int, questions: int = 100) -> dict[str, tuple[int, int]]:
    return {"a": (questions, correct)}


@pytest.mark.parametrize(
    ("correct", "verdict", "best_round", "since"),
    [
        (61, "best", 3, 0),
        (60, "best", 3, 2),  # a tie keeps the later round, but is no progress
        (59, "kept", 1, 2),
        (58, "kept", 1, 2),  # exactly the tolerance below
        (57, "rolled-back", 1, 2),
    ],
)
def test_a_round_is_judged_by_its_distance_to_the_best(correct: int, verdict: str, best_round: int, since: int):
    got, best = judge(Best(1, score(60), since=1), 3, score(correct), tolerance=0.02)
    assert (got, best.round_index, best.since) == (verdict, best_round, since)


def test_a_site_that_is_missing_neither_lifts_nor_drops_the_accuracy():
    best = Best(0, {"easy": (100, 90), "hard": (100, 10)})
    assert judge(best, 1, {"hard": (100, 10)}, 0.02)[0] == "best"
    assert judge(best, 1, {"easy": (100, 80)}, 0.02)[0] == "rolled-back"


def test_without_validation_every_round_is_kept():
    verdict, best = judge(Best(0, {}), 1, {}, 0.02, gate=False)
    assert (verdict, best.round_index, best.since) == ("best", 1, 0)
    assert accuracy({}) is None


@pytest.mark.parametrize("scores", [{}, {"c": (100, 99)}, {"a": (0, 0)}])
def test_a_round_that_nothing_is_known_of_never_becomes_the_best(scores: dict[str, tuple[int, int]]):
    verdict, best = judge(Best(3, {"a": (100, 90), "b": (100, 90)}, since=1), 4, scores, 0.02)
    assert (verdict, best.round_index, best.since) == ("kept", 3, 2)
