"""Two evaluations: what both asked is compared with unpaired intervals, and what only one has is named."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from wardround.common.errors import ConfigError
from wardround.common.evaluation_file import read_evaluation, write_evaluation
from wardround.server.compare import compare, notes, same_questions, table, tables, unpaired_interval

from tests.server.evaluation_case import case


def other(**changes: Any) -> dict[str, Any]:
    """The same evaluation with one task renamed, and one model renamed in the other."""
    made = copy.deepcopy(case())
    made["tasks"][1]["name"] = "icu-sepsis"
    models = made["tasks"][0]["models"]
    made["tasks"][0]["models"] = {("new" if name == "central" else name): told for name, told in models.items()}
    return {**made, **changes}


def test_models_of_both_are_compared_in_tasks_of_both_and_the_rest_is_named() -> None:
    a, b = case(), other()
    b["tasks"][0]["models"]["final"]["accuracy"] = {"value": 0.6, "ci95": [0.57, 0.63]}
    found = compare(a, b)
    assert [task["name"] for task in found["tasks"]] == ["icu-denoising"]
    assert (found["only_a"], found["only_b"]) == (["icu-mortality"], ["icu-sepsis"])
    task = found["tasks"][0]
    assert (task["only_a"], task["only_b"]) == (["central"], ["new"])
    rows = {row["model"]: row for row in task["rows"]}
    accuracy = a["tasks"][0]["models"]["final"]["accuracy"]
    assert rows["final"]["difference"] == pytest.approx(0.6 - accuracy["value"]) and rows["final"]["shown"] == 1
    assert rows["base"]["difference"] == 0 and rows["base"]["shown"] == 0
    assert rows["base"]["ci95"][0] < 0 < rows["base"]["ci95"][1]
    json.dumps(found, allow_nan=False)


def test_the_interval_of_two_symmetric_ones_is_the_normal_one() -> None:
    a, b = {"value": 0.4, "ci95": [0.34, 0.46]}, {"value": 0.5, "ci95": [0.42, 0.58]}
    assert unpaired_interval(a, b) == pytest.approx((0.0, 0.2))


def test_areas_of_outcomes_are_compared_too() -> None:
    rows = compare(case(), case())["tasks"][1]["rows"]
    assert {row["measure"] for row in rows} == {"accuracy", "auroc"}


@pytest.mark.parametrize(("digest", "same"), [("5f1c", True), ("0000", False), (None, None)])
def test_it_says_whether_the_questions_were_the_same(digest: str | None, same: bool | None) -> None:
    b = copy.deepcopy(case())
    b["provenance"]["tasks"]["icu-denoising"]["questions_digest"] = digest
    assert same_questions(case(), b, "icu-denoising") is same
    words = {True: "cannot be paired", False: "Other questions", None: "does not say"}[same]
    assert any(words in sentence for sentence in notes(compare(case(), b)))


def test_evaluations_that_say_nothing_of_their_questions_are_compared() -> None:
    assert compare(case(provenance={}), case(provenance={"tasks": "odd"}))["tasks"][0]["same_questions"] is None


def test_the_table_fits_a_terminal_and_takes_names_as_text() -> None:
    b = other()
    b["tasks"][0]["models"]["[red]x[/]"] = b["tasks"][0]["models"]["final"]
    a = copy.deepcopy(case())
    a["tasks"][0]["models"]["[red]x[/]"] = a["tasks"][0]["models"]["final"]
    out = io.StringIO()
    Console(file=out, width=80).print(table(compare(a, b), ("[old]", "new")))
    text = out.getvalue()
    assert "[red]x[/]" in text and "[old]" in text and "Masked values of ICU patients" in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_the_terminal_is_told_which_is_which_and_how_to_read_it() -> None:
    out = io.StringIO()
    for part in tables(compare(case(), other()), "old/[x].json", "new.json"):
        Console(file=out, width=80).print(part)
    text = out.getvalue()
    assert "A: old/[x].json" in text and "B: new.json" in text and "Only in A: icu-mortality." in text


def test_nothing_in_common_is_said() -> None:
    b = copy.deepcopy(case())
    for task in b["tasks"]:
        task["name"] += "-other"
    assert "No task was asked in both." in notes(compare(case(), b))


def test_a_file_of_another_schema_is_refused_before_it_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_evaluation(path, {**case(), "evaluation_schema": 2})
    with pytest.raises(ConfigError, match="schema"):
        read_evaluation(path)
