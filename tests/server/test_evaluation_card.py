"""The card has every item of TRIPOD-LLM, says what the evaluation says, and leaves the rest to the authors."""

import copy
import re

from wardround.server.evaluate import percent
from wardround.server.evaluation_card import evaluation_card

from tests.server.evaluation_case import alone, case
from tests.server.test_evaluation_report import SUMS, stats

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


def test_a_review_is_told_with_its_figures_and_programs_apart() -> None:
    found = stats(judges=1)
    card = evaluation_card(case(review=found))
    told = card[card.index("### 7d") : card.index("### 7e")]
    experts, programs = told.split("Programs as judges")
    for part, kind in ((experts, "people"), (programs, "judges")):
        preference = found[kind]["preference"]
        assert f"final {preference['b']}, base {preference['a']}, about equal {preference['equal']}" in part
    assert "No such assessment" in evaluation_card(case())
    assert "No person has rated yet" in evaluation_card(case(review=stats(people=0, judges=1)))


def test_what_the_sites_own_patients_gave_stands_beside_the_performance_and_a_loss_with_the_fairness() -> None:
    card = evaluation_card(case(federated=SUMS))
    performance = card[card.index("### 17") : card.index("### 18")]
    assert "304 questions, one a patient, at 4 simulated sites of run icu-4" in performance
    assert "warmed up 59.2 % (53.6 to 64.8 %)" in performance and "chance 30.5 %" in performance
    assert "Death in hospital (ICU): age 80+: worse than warmup" in performance
    assert "own test patients: The rounds lowered accuracy" in card[card.index("### 19a") : card.index("### 19b")]
    assert "own test patients" not in evaluation_card(case())
    assert re.findall(r"^### (\S+) ", card, re.MULTILINE) == ITEMS
