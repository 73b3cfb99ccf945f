"""The page of an evaluation says what evaluation.json says, loads nothing, and survives hostile names."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from wardround.server.evaluate import percent
from wardround.server.evaluation_plots import difference_scale, difference_strip, reliability_diagram
from wardround.server.evaluation_report import write_evaluation_report
from wardround.server.review.ratings import Unblinded
from wardround.server.review.results import KINDS, summary

from tests.server.evaluation_case import alone, case
from tests.server.test_report import HOSTILE, Page

SUMS = {
    "run": "icu-4",
    "simulated": True,
    "masked": True,
    "sites": 4,
    "n": 304,
    "noise": 0.0,
    "chance": 0.305,
    "models": {
        "base": {"value": 0.293, "ci95": [0.24, 0.345]},
        "warmup": {"value": 0.592, "ci95": [0.536, 0.648]},
        "final": {"value": 0.521, "ci95": [0.46, 0.58]},
        "majority": {"value": 0.5625, "ci95": [0.507, 0.618]},
    },
    "paired": [
        {
            "model": "final",
            "against": "warmup",
            "difference": -0.071,
            "ci95": [-0.11, -0.03],
            "p": 0.004,
            "only_model": 9,
            "only_against": 30,
            "detectable": 0.041,
        }
    ],
    "findings": ["The rounds lowered accuracy below the warmed-up model's by 7.1 points.", "It is above chance."],
    "worse": ["The rounds lowered accuracy below the warmed-up model's by 7.1 points."],
    "tasks": [
        {
            "name": "support-mortality",
            "title": "Death in hospital (ICU)",
            "n": 290,
            "patients": 290,
            "findings": ["final cannot be told apart from warmup.", "age 80+: worse than warmup by 9.0 points."],
            "models": {},
        }
    ],
}


def stats(people: int = 2, judges: int = 0) -> dict[str, Any]:
    """What `wardround server review stats --json` prints of a review with so many raters of each kind."""
    kinds = ["person"] * people + ["judge"] * judges
    found: dict[str, Any] = {
        "version": 1,
        "title": "Antibiotics",
        "data": "synthetic",
        "models": ["base", "final"],
        "items": 12,
        "planted_twice": 0.1,
        "raters": [
            {"rater": f"rater-{number}", "kind": kind, "rated": 12, "of": 13} for number, kind in enumerate(kinds, 1)
        ],
    }
    for kind, plural in KINDS.items():
        ratings = [
            Unblinded(
                number, item, item, f"i{item}", "Infection", "", (item + number) % 4 - 1, (), (False, item == 3), "",
                0, None, "",
            )
            for number, own in enumerate(kinds, 1)
            for item in range(12)
            if own == kind
        ]  # fmt: skip
        found[plural] = summary(ratings, draws=50) if ratings else None
    return json.loads(json.dumps(found))


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
    sums = {**SUMS, "run": HOSTILE, "findings": [HOSTILE], "worse": [HOSTILE]}
    sums["tasks"] = [{**SUMS["tasks"][0], "title": HOSTILE, "findings": [HOSTILE]}]
    evaluation = _hostile(case(review={**stats(), "title": HOSTILE}, federated=sums))
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


def test_the_audit_of_reasoning_is_shown_where_it_is(tmp_path: Path) -> None:
    shown = written(tmp_path, case())[1].text()
    assert "invented a value" in shown and "15.0 %" in shown
    by_registry = {"smart": {"base": {"invented_value": 3, "any": 3, "n": 12}}, "odd": 3, "none": {"base": {"n": 0}}}
    assert "base, smart 12 3 25.0 %" in written(tmp_path, case(reasoning=by_registry))[1].text()
    bare = written(tmp_path, case(provenance={}, reasoning={}))[1].text()
    assert "Audit of the reasoning" not in bare and "Blinded review" not in bare and "own test patients" not in bare


def test_a_review_is_shown_with_what_its_statistics_say(tmp_path: Path) -> None:
    found = stats()
    shown = written(tmp_path, case(review=found))[1].text()
    assert (
        "Blinded review: Antibiotics" in shown and "12 pairs of answers of base and final, synthetic records" in shown
    )
    preference = found["people"]["preference"]
    assert f"final {preference['b']}, base {preference['a']}, about equal {preference['equal']}" in shown
    assert percent(preference["score"]) in shown and "sign test over items" in shown
    assert "final 8.3 % (2.3 to 25.8 %) of 24; base 0.0 % (0.0 to 13.8 %) of 24" in shown  # Wilson, of unacceptable
    assert "Krippendorff's α" in shown and "Infection" in shown and "rater-2" in shown
    assert "no planted pair has been rated twice yet" in shown  # why self-consistency is not there
    assert "Programs as judges" not in shown and "No person has rated yet" not in shown


def test_programs_as_judges_have_figures_of_their_own(tmp_path: Path) -> None:
    both = written(tmp_path, case(review=stats(judges=1)))[1].text()
    experts, programs = both.split("Programs as judges (never mixed with people)")
    assert "of 24; base" in experts and "2 raters, 12 shared items" in experts
    assert "of 12; base" in programs and "needs two raters" in programs and "rater-3, a program" in programs
    alone = written(tmp_path, case(review=stats(people=0, judges=1)))[1].text()
    assert "No person has rated yet" in alone and "Experts" not in alone and "Programs as judges" in alone
    nobody = written(tmp_path, case(review=stats(people=0)))[1].text()
    assert "No person has rated yet" in nobody and "among decided" not in nobody


def test_a_review_changes_nothing_else_on_the_page(tmp_path: Path) -> None:
    reviewed, plain = (written(tmp_path, case(**more))[0] for more in ({"review": stats(judges=1)}, {}))
    rest = re.sub(r'<section aria-labelledby="review">.*?</section>', "", reviewed, flags=re.DOTALL)
    assert rest != reviewed and rest.split() == plain.split()


def test_what_the_sites_own_patients_gave_is_shown_apart_and_a_loss_is_said_first(tmp_path: Path) -> None:
    text, page = written(tmp_path, case(federated=SUMS))
    shown = page.text()
    told = shown[shown.index("The sites' own test patients, from sums") :]
    assert "4 simulated sites" in told and "304 questions" in told and "added up under masks" in told
    for row in ("base 29.3 % 24.0 to 34.5", "warmed up 59.2 %", "majority option 56.2 %", "−7.1, p = 0.004"):
        assert row in told
    assert "p is exact McNemar" in told and "Death in hospital (ICU)" in told and "age 80+: worse than warmup" in told
    warning = "The sites' own test patients: The rounds lowered accuracy"
    assert warning in shown.replace("\N{NO-BREAK SPACE}", " ") and text.index("lowered") < text.index("All tasks")
    assert "own test patients" not in written(tmp_path, case())[1].text()


def test_sums_with_noise_or_without_masks_or_warm_up_are_told_as_such(tmp_path: Path) -> None:
    models = {name: told for name, told in SUMS["models"].items() if name != "warmup"}
    changed = {**SUMS, "noise": 4.0, "masked": False, "simulated": False, "models": models, "paired": [], "tasks": []}
    shown = written(tmp_path, case(federated=changed))[1].text()
    told = shown[shown.index("The sites' own test patients, from sums") :]
    assert "carry noise" in told and "exact McNemar" not in told and "masks" not in told and "simulated" not in told
    assert "warmed up" not in told.split("model accuracy")[1]


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
