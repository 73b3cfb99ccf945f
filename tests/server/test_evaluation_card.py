"""The card has every item of TRIPOD-LLM, says what the evaluation says, and leaves the rest to the authors."""

import copy
import re

from wardround.server.evaluate import percent
from wardround.server.evaluation_card import evaluation_card

from tests.server.evaluation_case import alone, case

ITEMS = list(
    map(
        "".join,
        re.findall(
            r"(\d+)([a-z]?)",
            "1 2 3a 3b 4 5a 5b 5c 5d 5e 6a 6b 6c 6d 6e 7a 7b 7c 7d 7e 8a 8b 8c 9a 9b 10 11 12 13 14a 14b 14c 14d 14e "
            "14f 15 16a 16b 16c 16d 17 18 19a 19b 19c 19d 19e 19f 19g",
        ),
    )
)


def test_every_item_is_there_once_and_in_order() -> None:
    for evaluation in (case(), alone()):
        assert re.findall(r"^### (\S+) ", evaluation_card(evaluation), re.MULTILINE) == ITEMS


def test_results_and_provenance_are_filled_in_and_the_same_twice() -> None:
    evaluation = case()
    card = evaluation_card(evaluation)
    assert card == evaluation_card(copy.deepcopy(evaluation))
    for task in evaluation["tasks"]:
        assert evaluation["provenance"]["tasks"][task["name"]]["title"] in card
        assert task["power"]["sentence"] in card
        for model, told in task["models"].items():
            assert model in card and percent(told["accuracy"]["value"]) in card
    assert "worse with age '80+'" in card and "ab12" in card and "reasoning_tokens: 64" in card


def test_what_nobody_told_is_left_to_the_authors_and_not_made_up() -> None:
    card = evaluation_card(alone())
    parts = dict(re.findall(r"^### (\S+) .*\n\n((?:.*\n(?!#))*)", card, re.MULTILINE))
    for item in ("3a", "5a", "5c", "6a", "6b", "12", "13", "14a", "14b", "14c", "14d", "14e", "15", "19g"):
        assert parts[item].startswith("**For the authors:**"), item
    whole = [item for item in ITEMS if parts[item].startswith("**For the authors:**")]
    assert f"{len(whole)} are left to the authors ({', '.join(whole)})" in card
    assert "None" not in card


def test_names_of_a_user_cannot_break_the_card() -> None:
    evaluation = copy.deepcopy(case())
    hostile = "a | b\n# <script>alert(1)</script> [x](y) `z`"
    evaluation["provenance"]["tasks"]["icu-mortality"]["title"] = hostile
    evaluation["provenance"]["models"] = {hostile: {"digest": hostile}}
    card = evaluation_card(evaluation)
    assert re.findall(r"^### (\S+) ", card, re.MULTILINE) == ITEMS
    assert "<script" not in card.replace("\\<", "") and "\n# \\" not in card and "[x](" not in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {6}


def test_a_review_is_told_with_its_figures() -> None:
    review = {"models": ["base", "final"], "people": {"preference": {"a": 5, "b": 12}, "agreement": None}}
    assert "preference · b: 12" in evaluation_card(case(review=review))
