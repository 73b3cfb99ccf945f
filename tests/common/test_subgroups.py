"""Subgroup tables say what the answers say, hide small groups, and hold their intervals."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from wardround.common.intervals import PatientBootstrap, holm
from wardround.common.scored import Scored
from wardround.common.subgroups import cross_validation, leave_one_out, reported, subgroups

from .scored_case import AGES, SITES, simulated

DRAWS = 2000


@pytest.fixture(scope="module")
def scored() -> Scored:
    return simulated(300, {"base": 0.4, "final": 0.5}, seed=1)


def of(scored: Scored, draws: int = DRAWS, min_cell: int = 10, reference: str = "base") -> dict:
    return subgroups(scored, reference, "final", PatientBootstrap(scored.patients, draws, 2), min_cell)


def test_a_stratum_says_what_its_answers_say(scored: Scored) -> None:
    table = of(scored)["axes"]["age"]
    assert [row["stratum"] for row in table["strata"]] == sorted(AGES) and table["hidden"] is None
    for row in table["strata"]:
        own = np.array([age == row["stratum"] for age in scored.strata["age"]])
        right, base = scored.correct("final"), scored.correct("base")
        got = row["models"]["final"]
        assert row["n"] == own.sum() and row["patients"] == len(np.unique(scored.patients[own]))
        assert got["accuracy"]["value"] == pytest.approx(right[own].mean())
        assert got["gap"]["difference"] == pytest.approx(right[own].mean() - right[~own].mean())
        assert got["change"]["difference"] == pytest.approx(right[own].mean() - base[own].mean())
        for figure in (got["accuracy"], got["gap"], got["change"]):
            value = figure.get("value", figure.get("difference"))
            assert figure["ci95"][0] < value < figure["ci95"][1]
        assert row["models"]["base"]["change"] is None


def test_changes_of_patients_with_one_question_are_tested_by_mcnemar_and_corrected_over_all_axes() -> None:
    scored = simulated(400, {"base": 0.4, "final": 0.5}, seed=3, per_patient=1)
    strata = [row for axis in of(scored)["axes"].items() for row in ((axis[0], s) for s in axis[1]["strata"])]
    expected = []
    for axis, row in strata:
        own = np.array([label == row["stratum"] for label in scored.strata[axis]])
        a, b = scored.correct("final")[own], scored.correct("base")[own]
        expected.append(binomtest((a & ~b).sum(), (a ^ b).sum()).pvalue)
    got = [row["models"]["final"]["change"] for _, row in strata]
    assert [change["p"] for change in got] == pytest.approx(expected)
    assert [change["p_holm"] for change in got] == pytest.approx(holm(expected)) and len(expected) == 8


def test_intervals_of_a_gap_cover_the_truth_about_95_times_in_100() -> None:
    hits = []
    for seed in range(100):
        scored = simulated(240, {"base": 0.5, "final": 0.5}, seed, shift={("final", "80+"): -0.1})
        row = next(row for row in of(scored, 300)["axes"]["age"]["strata"] if row["stratum"] == "80+")
        low, high = row["models"]["final"]["gap"]["ci95"]
        hits.append(low < -0.1 < high)
    assert 0.89 <= np.mean(hits) <= 0.99


def test_small_strata_are_hidden_and_cannot_be_had_by_subtraction() -> None:
    labels = ["a"] * 50 + ["b"] * 30 + ["c"] * 12 + ["d"] * 4
    kept, hidden = reported(labels, np.arange(96), 10)
    # Leaving out d alone would leave it as the total minus a, b and c.
    assert list(kept) == ["a", "b"] and hidden == {"labels": ["c", "d"], "n": 16, "patients": 16}
    kept, hidden = reported([*labels, *[""] * 8], np.arange(104), 10)
    assert list(kept) == ["a", "b", "c"] and hidden == {"labels": ["d"], "n": 12, "patients": 12}
    # It is patients that count, not their questions.
    kept, hidden = reported(
        labels, np.concatenate([np.arange(50), np.repeat(np.arange(3), 10) + 50, np.arange(16)]), 10
    )
    assert "b" not in kept
    kept, hidden = reported(["a"] * 5, np.arange(5), 10)
    assert kept == {} and hidden == {"labels": ["a"], "n": 5, "patients": 5}
    assert reported([], np.zeros(0, np.int64), 10) == ({}, None)


def test_a_stratum_of_everybody_has_no_gap_and_an_unknown_axis_no_row(scored: Scored) -> None:
    changed = replace(scored, strata={"sex": ("f",) * len(scored), "severity": ("",) * len(scored)})
    axes = of(changed, 50)["axes"]
    assert axes["sex"]["strata"][0]["models"]["final"]["gap"] is None
    assert axes["severity"] == {"strata": [], "hidden": {"labels": [], "n": 600, "patients": 300}}


def test_one_model_as_reference_and_final_has_no_change(scored: Scored) -> None:
    table = of(scored, 50, reference="final")
    assert table["worse"] == table["better"] == []
    assert table["axes"]["age"]["strata"][0]["models"]["final"]["change"] is None


def test_leaving_a_site_out_gives_the_estimate_of_the_others_and_names_the_most_influential() -> None:
    scored = simulated(400, {"base": 0.4, "final": 0.4}, seed=4, shift={("final", "80+"): 0.5})
    scored = replace(
        scored,
        strata={
            "site": tuple(
                "z" if age == "80+" else site
                for age, site in zip(scored.strata["age"], scored.strata["site"], strict=True)
            )
        },
    )
    bootstrap = PatientBootstrap(scored.patients, DRAWS, 2)
    got = leave_one_out(scored, "base", "final", bootstrap, 10)
    assert got is not None and got["largest"] == "z" and got["measure"] == "difference"
    difference = scored.correct("final").astype(int) - scored.correct("base")
    for row in got["without"]:
        others = np.array([site != row["left_out"] for site in scored.strata["site"]])
        assert row["value"] == pytest.approx(difference[others].mean())
        assert row["influence"] == pytest.approx(difference[others].mean() - difference.mean())
        assert row["ci95"][0] < row["value"] < row["ci95"][1]
    assert [row["left_out"] for row in got["without"]] == sorted([*SITES, "z"])


def test_one_site_cannot_be_left_out(scored: Scored) -> None:
    bootstrap = PatientBootstrap(scored.patients, 20, 2)
    assert leave_one_out(replace(scored, strata={}), "base", "final", bootstrap, 10) is None
    assert leave_one_out(replace(scored, strata={"site": ("a",) * 600}), "base", "final", bootstrap, 10) is None


def test_cross_validation_tells_one_difference_for_all_from_one_that_is_not() -> None:
    alike, apart = [], []
    for seed in range(25):
        for shift, found in (({}, alike), ({("final", "80+"): -0.3}, apart)):
            scored = simulated(300, {"base": 0.4, "final": 0.5}, seed, shift=shift)
            axis = cross_validation(scored, "base", "final", PatientBootstrap(scored.patients, 300, 2), 10)["age"]
            found.append((axis["p"] < 0.05, axis["rmse"] / axis["rmse_by_chance"]))
    assert sum(p for p, _ in alike) <= 4 and np.median([ratio for _, ratio in alike]) < 1.2
    assert sum(p for p, _ in apart) >= 22 and np.median([ratio for _, ratio in apart]) > 2


def test_a_fold_is_compared_with_everybody_else(scored: Scored) -> None:
    bootstrap = PatientBootstrap(scored.patients, 100, 2)
    axis = cross_validation(scored, "base", "final", bootstrap, 10)["site"]
    difference = scored.correct("final").astype(int) - scored.correct("base")
    for fold in axis["folds"]:
        own = np.array([site == fold["stratum"] for site in scored.strata["site"]])
        assert fold["held_out"] == pytest.approx(difference[own].mean())
        assert fold["rest"] == pytest.approx(difference[~own].mean())
        assert fold["error"] == pytest.approx(fold["held_out"] - fold["rest"])
    assert axis["low"] == min(fold["held_out"] for fold in axis["folds"])
    single = cross_validation(scored, "final", "final", bootstrap, 10)["site"]
    assert single["measure"] == "accuracy" and 0.3 < single["low"] < single["high"] < 0.7
