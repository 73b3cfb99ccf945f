"""Statistics of reviews against figures computed by hand."""

import math
from pathlib import Path

import pytest
from wardround.common.statistics import wilson
from wardround.server.review import raters, results
from wardround.server.review.ratings import Rating, Unblinded, rate
from wardround.server.review.summary import describe

from .study_case import MODELS, study


def said(rater: int, item: int, value: int, **changes: object) -> Unblinded:
    values = {
        "place": item, "item_id": str(item), "section": "Laboratory", "target": "t", "reasons": (),
        "unacceptable": (False, False), "comment": "", "first_model": 0, "repeats": None, "rated_at": "",
    }  # fmt: skip
    return Unblinded(rater=rater, item=item, value=value, **(values | changes))  # pyright: ignore[reportArgumentType]


# Rows are raters, columns items; above 0: the second model is better.
TABLE = ((2, 1, 0, -1), (1, -1, 0, 2))
RATINGS = [said(rater, item, value) for rater, row in enumerate(TABLE, 1) for item, value in enumerate(row)]


def test_preferences_are_those_counted_by_hand() -> None:
    found = results.summary(RATINGS)["preference"]
    assert (found["n"], found["items"], found["a"], found["b"], found["equal"], found["strong"]) == (8, 4, 2, 4, 2, 2)
    assert found["score"] == 5 / 8
    assert found["decided"] == {"of": 6, "count": 4, "share": 4 / 6, "ci95": wilson(4, 6)}
    assert wilson(4, 6) == pytest.approx([0.3000, 0.9032], abs=5e-5)
    # Items' means are 3, 0, 0 and 1 halves: two items for the second model, none for the first; 2 · (1/2)².
    assert found["sign_test"] == {"items_for_a": 0, "items_for_b": 2, "p": 0.5}


def test_the_bootstrap_over_items_is_that_of_all_resamples() -> None:
    """One item of four scores 1, three 1/2: a resample scores 1/2 + k/8, k binomial (4, 1/4); P(k ≤ 2) = 0.949."""
    assert results.preference(RATINGS)["ci95_items"] == [0.5, 0.875]


def test_the_bootstrap_over_raters_too_knows_that_raters_differ() -> None:
    """One rater always prefers the second, one the first: items say 1/2 whatever is drawn, raters say anything."""
    split = [said(rater, item, 1 if rater == 1 else -1) for rater in (1, 2) for item in range(5)]
    found = results.preference(split)
    assert found["ci95_items"] == [0.5, 0.5] and found["ci95_raters_items"] == [0.0, 1.0]
    alone = results.preference(split[:5])
    assert alone["ci95_items"] == [1.0, 1.0] and alone["ci95_raters_items"] is None
    assert results.preference(split[:1])["ci95_items"] is None


def test_bradley_terry_is_the_log_odds_of_all_and_of_each_rater() -> None:
    found = results.summary(RATINGS)["bradley_terry"]
    assert found["log_odds"] == pytest.approx(math.log(5 / 3))
    assert found["standard_error"] == pytest.approx(math.sqrt(1 / 5 + 1 / 3))
    assert found["ci95_items"] == pytest.approx([0.0, math.log(7)])
    for rater in ("rater-1", "rater-2"):
        assert found["by_rater"][rater]["log_odds"] == pytest.approx(math.log(2.5 / 1.5))


def test_a_model_that_never_wins_has_no_log_odds_and_a_sentence_says_so() -> None:
    found = results.summary([said(1, item, 1) for item in range(3)])
    assert found["bradley_terry"] is None and "infinite" in found["not_possible"]["bradley_terry"]
    mixed = results.summary([said(1, 0, 1), said(1, 1, 1), said(2, 0, -1)])
    assert mixed["bradley_terry"]["by_rater"] == {"rater-1": None, "rater-2": None}


def test_agreement_is_that_computed_by_hand() -> None:
    """Signs agree on two of four items. Coincidences off the diagonal 4 of 8; by chance 40 of 56: 1 − 0.5 / 0.714."""
    found = results.summary(RATINGS)["agreement"]
    assert found["raters"] == 2 and found["shared_items"] == 4
    assert found["nominal"] == pytest.approx(0.3)


def test_with_one_rater_agreement_is_said_to_be_impossible_and_the_rest_is_given() -> None:
    found = results.summary(RATINGS[:4])
    assert found["agreement"] is None and "two raters or more" in found["not_possible"]["agreement"]
    assert found["preference"]["score"] == 2.5 / 4
    apart = results.summary([RATINGS[0], RATINGS[5]])
    assert "no item has been rated by two raters" in apart["not_possible"]["agreement"]


def test_self_consistency_compares_a_pair_with_its_repetition_and_only_there() -> None:
    again = [
        said(1, 0, 2, place=10, repeats=0),  # the same
        said(1, 1, 2, place=11, repeats=1),  # the same model, another step
        said(1, 3, 1, place=12, repeats=3),  # reversed
        said(2, 2, 1, place=10, repeats=2),  # from equal to better
        said(2, 3, 1, place=11, repeats=30),  # its first showing is not rated yet
    ]
    found = results.summary([*RATINGS, *again])
    own = found["self_consistency"]
    assert own["same_preference"]["count"] == 2 and own["same_preference"]["of"] == 4
    assert own["same_step"] == 1 and own["reversed"] == 1
    assert own["by_rater"]["rater-1"]["share"] == pytest.approx(2 / 3) and own["by_rater"]["rater-2"]["share"] == 0.0
    assert found["preference"] == results.summary(RATINGS)["preference"]  # repetitions count nowhere else
    assert "no planted pair" in results.summary(RATINGS)["not_possible"]["self_consistency"]


def test_position_sections_reasons_and_unacceptable_answers_are_counted() -> None:
    ratings = [
        said(1, 0, 1, first_model=1, reasons=("safety",), section="A"),  # first answer
        said(1, 1, -1, first_model=0, reasons=("safety", "clarity"), section="A"),  # first answer
        said(1, 2, 1, first_model=0, section="B", unacceptable=(True, False)),  # second answer
        said(1, 3, 0, first_model=0, section="B", reasons=("clarity",), unacceptable=(True, True)),
    ]
    found = results.summary(ratings)
    assert (found["position"]["count"], found["position"]["of"]) == (2, 3)
    assert {name: one["n"] for name, one in found["by_section"].items()} == {"A": 2, "B": 2}
    assert found["by_section"]["B"]["score"] == 0.75
    assert found["reasons"]["safety"] == [1, 1] and found["reasons"]["clarity"] == [1, 0]
    assert [one["count"] for one in found["unacceptable"]] == [2, 1]


def test_models_are_put_back_whichever_came_first(tmp_path: Path) -> None:
    """A rater who always prefers the second model, wherever it stands, with the first model unacceptable."""
    with study(tmp_path, 12, share=0.25) as database:
        raters.invite(database, "Kim")
        for row in database.all("SELECT place, first_model FROM slots WHERE rater = 1"):
            second_first = row["first_model"] == 1
            rate(
                database,
                1,
                row["place"],
                Rating(-2 if second_first else 2, ("safety",), (not second_first, second_first)),
            )
        found = results.statistics(database)
        assert found["models"] == list(MODELS) and found["judges"] is None
        assert found["raters"] == [{"rater": "rater-1", "kind": "person", "rated": 15, "of": 15}]
        people = found["people"]
        assert people["preference"]["score"] == 1.0 and people["preference"]["n"] == 12
        assert people["self_consistency"]["same_preference"]["share"] == 1.0
        assert (people["position"]["count"], people["position"]["of"]) == (6, 12)
        assert [one["count"] for one in people["unacceptable"]] == [12, 0]
        table = results.rows(database)
        assert {row["preferred"] for row in table} == {MODELS[1]} and {row["strength"] for row in table} == {2}
        assert {row["shown_first"] for row in table} == set(MODELS) and {row["rater"] for row in table} == {"rater-1"}
        assert {row["rater"] for row in results.rows(database, names=True)} == {"Kim"}


def test_a_judge_never_counts_with_people(tmp_path: Path) -> None:
    with study(tmp_path, 4, share=0.0) as database:
        raters.invite(database, "Kim")
        raters.invite(database, "model", "judge")
        rate(database, 1, 0, Rating(1))
        before = results.statistics(database)
        for place in range(4):
            rate(database, 2, place, Rating(-2))
        after = results.statistics(database)
        assert after["people"] == before["people"] and before["judges"] is None
        assert after["judges"]["preference"]["n"] == 4
        assert after["people"]["agreement"] is None  # a person and a judge are not two raters
        lines = list(describe(after))
        assert any(line.startswith("JUDGES (programs") for line in lines)


def test_nobody_has_rated_yet_is_said(tmp_path: Path) -> None:
    with study(tmp_path, 4) as database:
        assert list(describe(results.statistics(database)))[1:] == [
            "rated: nobody is invited yet",
            "no person has rated yet",
        ]
