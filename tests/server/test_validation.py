"""The validation gate: which round is kept, which is continued from, which is undone."""

import pytest
from wardround.common.config import FederationConfig
from wardround.server.validation import NOTHING, Kept, accuracy, judge

BEST = FederationConfig(rollback_tolerance=0.02)
LAST = FederationConfig(rollback_tolerance=0.02, keep="last")


def score(correct: int, questions: int = 100) -> tuple[int, int]:
    return questions, correct


@pytest.mark.parametrize(
    ("correct", "federation", "verdict", "kept_round", "since"),
    [
        (61, BEST, "kept", 3, 0),
        (60, BEST, "kept", 3, 2),  # a tie keeps the later round, but is no progress
        (59, BEST, "continued", 1, 2),
        (58, BEST, "continued", 1, 2),  # exactly the tolerance below
        (57, BEST, "rolled-back", 1, 2),
        (61, LAST, "kept", 3, 0),
        (60, LAST, "kept", 3, 2),
        (59, LAST, "kept", 3, 2),
        (58, LAST, "kept", 3, 2),
        (57, LAST, "rolled-back", 1, 2),
    ],
)
def test_a_round_is_judged_by_its_distance_to_the_highest(
    correct: int, federation: FederationConfig, verdict: str, kept_round: int, since: int
):
    got, kept = judge(Kept(1, score(60), since=1), 3, score(correct), federation)
    assert (got, kept.round_index, kept.since) == (verdict, kept_round, since)
    assert kept.highest == score(max(correct, 60))


def test_many_small_falls_are_measured_from_the_highest_round():
    kept, verdicts, rounds = Kept(0, score(50)), list[str](), list[int]()
    for index, correct in enumerate((60, 59, 58, 57, 58), start=1):
        verdict, kept = judge(kept, index, score(correct), LAST)
        verdicts.append(verdict)
        rounds.append(kept.round_index)
    assert verdicts == ["kept", "kept", "kept", "rolled-back", "kept"]
    assert rounds == [1, 2, 3, 3, 5]  # what is undone is the round that fell, not those since the highest
    assert kept == Kept(5, score(60), since=4)


def test_sums_over_other_numbers_of_sites_are_compared_by_their_accuracy():
    kept = Kept(0, score(120, questions=200))
    assert judge(kept, 1, score(61, questions=100), BEST)[0] == "kept"
    assert judge(kept, 1, score(57, questions=100), BEST)[0] == "rolled-back"


@pytest.mark.parametrize("keep", ["best", "last"])
def test_without_validation_every_round_is_kept(keep: str):
    federation = FederationConfig.model_validate({"validation_questions_per_site": 0, "keep": keep})
    verdict, kept = judge(Kept(0, NOTHING), 1, NOTHING, federation)
    assert (verdict, kept.round_index, kept.since) == ("kept", 1, 0)
    assert accuracy(NOTHING) is None


@pytest.mark.parametrize("federation", [BEST, LAST])
def test_a_round_is_kept_where_nothing_is_known_of_those_before(federation: FederationConfig):
    verdict, kept = judge(Kept(0, NOTHING, since=1), 2, score(40), federation)
    assert (verdict, kept) == ("kept", Kept(2, score(40)))


@pytest.mark.parametrize("federation", [BEST, LAST])
def test_a_round_that_nothing_is_known_of_is_continued_from_but_not_kept(federation: FederationConfig):
    verdict, kept = judge(Kept(3, score(180, questions=200), since=1), 4, NOTHING, federation)
    assert (verdict, kept.round_index, kept.since) == ("continued", 3, 2)
