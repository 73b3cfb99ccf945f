"""The page of an evaluation says what evaluation.json says, loads nothing, and survives hostile names."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from wardround.server.evaluate import percent
from wardround.server.evaluation_card import evaluation_card
from wardround.server.evaluation_plots import difference_scale, difference_strip, reliability_diagram
from wardround.server.evaluation_report import write_evaluation_report
from wardround.server.review.ratings import Unblinded
from wardround.server.review.results import summary

from tests.server.evaluation_case import alone, case
from tests.server.test_report import HOSTILE, Page

REVIEW = {
    "version": 1,
    "title": "Antibiotics",
    "data": "synthetic",
    "models": ["base", "final"],
    "items": 20,
    "raters": [{"rater": "rater-1", "kind": "person", "rated": 20, "of": 22}],
    "people": {
        "preference": {
            "a": 5,
            "b": 12,
            "equal": 3,
            "score": 0.675,
            "ci95_items": [0.5, 0.83],
            "ci95_raters_items": None,
        },
        "bradley_terry": {"log_odds": 0.73, "standard_error": 0.3},
        "agreement": None,
        "self_consistency": {"same_preference": {"share": None}},
        "by_section": {"Infection": {"n": 9, "a": 2, "b": 6, "equal": 1, "score": 0.72, "ci95_items": None}},
        "not_possible": {"agreement": "Krippendorff's alpha: one rater"},
    },
    "judges": None,
}


def written(folder: Path, evaluation: dict[str, Any], **more: Any) -> tuple[str, Page]:
    text = write_evaluation_report(folder / "report.html", evaluation, **more).read_text(encoding="utf-8")
    return text, Page(text)


def test_every_task_model_and_finding_is_on_the_page(tmp_path: Path) -> None:
    evaluation = case()
    _, page = written(tmp_path, evaluation)
    shown = page.text()
    for task in evaluation["tasks"]:
        assert task["name"] in shown and evaluation["provenance"]["tasks"][task["name"]]["title"] in shown
        assert all(finding in shown for finding in task["findings"])
        assert task["power"]["sentence"] in shown
        for model, told in task["models"].items():
            assert model in shown and percent(told["accuracy"]["value"]) in shown
            if told["event"] is not None:
                assert f"{told['event']['auroc']['value']:.3f}" in shown
        assert percent(task["majority"]["accuracy"]["value"]) in shown and percent(task["chance"]) in shown
        for axis in task["subgroups"]["axes"].values():
            assert all(stratum["stratum"] in shown for stratum in axis["strata"])


def test_what_got_worse_is_said_first_and_marked_in_its_table(tmp_path: Path) -> None:
    text, page = written(tmp_path, case())
    assert "age '80+' got worse" in page.text()
    assert "Worse than gradient boosting in 2 of 2: Masked values of ICU patients (−16.5)" in page.text()
    assert text.index("What speaks against it") < text.index("All tasks")
    assert page.text().count("got worse") >= 2 and 'class="got-worse"' in text


def test_groups_that_are_hidden_are_named_with_the_reason(tmp_path: Path) -> None:
    _, page = written(tmp_path, case())
    assert "subgroups by site: " in page.text() and "tiny" in page.text() and "fewer than 10 patients" in page.text()


def test_local_central_and_table_models_stand_beside_the_evaluated_one(tmp_path: Path) -> None:
    _, page = written(tmp_path, case())
    for words in ("trained on one site's patients only", "trained on all patients in one place", "as a table"):
        assert words in page.text()
    assert "final against every other model" in page.text()


def test_the_page_loads_nothing_and_is_the_same_twice(tmp_path: Path) -> None:
    text, page = written(tmp_path, case())
    assert text == written(tmp_path, copy.deepcopy(case()))[0]
    assert page.named("script") == [] and page.named("img") == [] and page.named("link") == []
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text


def test_a_model_alone_without_probabilities_or_groups_has_a_page(tmp_path: Path) -> None:
    _, page = written(tmp_path, alone())
    shown = page.text()
    assert "no probabilities are known" in shown and "fewer than two sites" in shown
    assert "no reference to be worse than" in shown and "got worse" not in shown
    assert "minus final" not in shown and "None" not in shown and "nan" not in shown


def _hostile(value: Any) -> Any:
    """The same evaluation with every name of a user's replaced."""
    names = {"final", "base", "80+", "sodium", "albumin", "Laboratory", "age", "icu-mortality", "tiny"}
    if isinstance(value, dict):
        named = names if "reference" not in value else ()  # a task's own fields are no names
        return {key + HOSTILE if key in named else key: _hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) and value in names else value


def test_hostile_names_are_text(tmp_path: Path) -> None:
    evaluation = _hostile(case(review=REVIEW, federated={"note": HOSTILE, "sites": [1, 2]}))
    rows = [
        {
            "change": change,
            "label": HOSTILE,
            "question": HOSTILE,
            "answer": HOSTILE,
            **{
                name: {"chosen": HOSTILE, "right": name == "final", "text": HOSTILE, "parts": [(HOSTILE, ("any",))]}
                | {"flags": [("leaked_letters", HOSTILE)]}
                for name in ("base", "final")
            },
        }
        for change in ("gained", "lost")
    ]
    text, page = written(tmp_path, evaluation, contrasts={HOSTILE: rows})
    assert page.named("script") == [] and page.named("img") == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "right after, wrong before" in page.text() and "wrong after, right before" in page.text()
    assert "{{ 7*7 }}" in page.text() and "<script" not in text


def test_reasoning_review_and_federated_sums_are_shown_where_they_are(tmp_path: Path) -> None:
    sums = {"icu-mortality": {"final": {"value": 0.61, "ci95": [0.55, 0.67]}}, "sites": ["a", "b"], "noised": False}
    _, page = written(tmp_path, case(review=REVIEW, federated=sums))
    shown = page.text()
    assert "invented a value" in shown and "15.0 %" in shown and "30" in shown
    assert "final 12, base 5, about equal 3" in shown and "67.5 %" in shown and "+0.73" in shown
    assert "Krippendorff's alpha: one rater" in shown and "Programs" not in shown
    assert "icu-mortality · final" in shown and "0.61 (0.55 to 0.67)" in shown and "a, b" in shown
    by_registry = {"smart": {"base": {"invented_value": 3, "any": 3, "n": 12}}, "odd": 3, "none": {"base": {"n": 0}}}
    assert "base, smart 12 3 25.0 %" in written(tmp_path, case(reasoning=by_registry))[1].text()
    bare = written(tmp_path, case(provenance={}, reasoning={}))[1].text()
    assert "Audit of the reasoning" not in bare and "Blinded review" not in bare and "From sums" not in bare


def test_statistics_of_a_real_review_are_taken_as_they_are(tmp_path: Path) -> None:
    ratings = [
        Unblinded(
            rater, item, item, f"i{item}", "Infection", "", (item + rater) % 4 - 1, (), (False, False), "", 0, None, ""
        )
        for rater in (1, 2)
        for item in range(12)
    ]
    people = summary(ratings, draws=50)
    found = {**REVIEW, "people": people, "judges": people}
    shown = written(tmp_path, case(review=json.loads(json.dumps(found))))[1].text()
    assert "Krippendorff's α" in shown and "Programs as judges" in shown and "Infection" in shown
    assert "raters" in evaluation_card(case(review=found))


def test_a_forest_row_ends_in_an_arrow_where_its_interval_goes_on() -> None:
    scale = difference_scale([-0.9, 0.2])
    assert (scale.low, scale.high) == (-0.5, 0.2)
    assert "arrow" in difference_strip(-0.3, [-0.9, 0.2], scale, 0)
    assert "arrow" not in difference_strip(0.1, [-0.1, 0.2], scale, 0)


@pytest.mark.parametrize("points", [[(0.5, 0.5)], [(0.0, 0.0), (1.0, 1.0)], [(0.99, 0.2), (1.0, 0.3)]])
def test_a_reliability_diagram_takes_any_bins(points: list[tuple[float, float]]) -> None:
    bins = [{"predicted": given, "observed": seen, "n": 10, "low": given, "high": given} for given, seen in points]
    svg = reliability_diagram([("final", bins)], "said")
    assert svg.count("<circle") == len(points) and "nan" not in svg
