"""A task's figures are those of its answers; planted truths are found: better, worse in a subgroup, liking a letter."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as oracle
from wardround.common.errors import RegistryError
from wardround.common.evaluation_file import evaluation
from wardround.common.patient_sums import PatientSums
from wardround.common.scored import Answered, Scored
from wardround.common.statistics import mcnemar_exact
from wardround.common.summary import summarise_task

from .scored_case import simulated

THREE = {"base": 0.4, "final": 0.5, "gradient boosting": 0.6}
DRAWS = 1000


def summarised(scored: Scored, n_bootstrap: int = DRAWS, reference: str = "base", **more: int) -> dict:
    return summarise_task(
        scored, name="task", reference=reference, final="final", n_bootstrap=n_bootstrap, seed=3, **more
    )


@pytest.fixture(scope="module")
def features() -> Scored:
    return simulated(300, THREE, seed=1, permute=True)


@pytest.fixture(scope="module")
def outcomes() -> Scored:
    return simulated(300, THREE, seed=2, outcome=True)


def test_a_summary_says_what_the_answers_say(features: Scored) -> None:
    summary = summarised(features)
    assert (summary["n"], summary["patients"], summary["chance"]) == (600, 300, 0.25)
    assert summary["majority"]["accuracy"]["value"] == pytest.approx(features.correct("majority").mean())
    for model, answers in features.models.items():
        told = summary["models"][model]
        assert told["accuracy"]["value"] == pytest.approx(features.correct(model).mean())
        assert told["correct"] == features.correct(model).sum() and told["event"] is None
        assert told["fallback_rate"]["value"] == pytest.approx((~answers.boxed).mean())
        assert told["mean_length"]["value"] == pytest.approx(answers.length.mean())
        expected = oracle.brier_score_loss(features.answer, answers.probabilities, scale_by_half=False)  # pyright: ignore
        assert told["brier"]["value"] == pytest.approx(expected)
        apart = [features.correct(model)[(features.answer == features.majority) == own].mean() for own in (0, 1)]
        assert told["balanced_accuracy"]["value"] == pytest.approx(np.mean(apart))
        assert sum(point["n"] for point in told["reliability"]) == 600 and len(told["reliability"]) == 10
        for key in ("accuracy", "balanced_accuracy", "brier", "fallback_rate", "mean_length"):
            assert told[key]["ci95"][0] < told[key]["value"] < told[key]["ci95"][1]


def test_outcomes_have_areas_and_scores_of_the_event(outcomes: Scored) -> None:
    summary = summarised(outcomes)
    happened = outcomes.answer == outcomes.event
    for model, answers in outcomes.models.items():
        told, p = summary["models"][model]["event"], answers.probabilities[np.arange(600), outcomes.event]
        assert told["auroc"]["value"] == pytest.approx(oracle.roc_auc_score(happened, p))
        assert told["auprc"]["value"] == pytest.approx(oracle.average_precision_score(happened, p))
        assert told["brier"]["value"] == pytest.approx(oracle.brier_score_loss(happened, p))
        assert (told["n"], told["events"]) == (600, happened.sum())
        assert told["auroc"]["ci95"][0] < told["auroc"]["value"] < told["auroc"]["ci95"][1]
        chosen = np.where(answers.chosen == outcomes.event, 1, 0)
        expected = oracle.balanced_accuracy_score(happened, chosen)
        assert summary["models"][model]["balanced_accuracy"]["value"] == pytest.approx(expected)
    pair = next(pair for pair in summary["paired"] if pair["model"] == "final")
    areas = [summary["models"][model]["event"]["auroc"]["value"] for model in ("final", "base")]
    assert pair["auroc"]["difference"] == pytest.approx(areas[0] - areas[1])


def test_pairs_are_every_model_against_the_reference_and_final_against_everything(features: Scored) -> None:
    summary = summarised(features, n_bootstrap=4000)
    names = [(pair["model"], pair["against"]) for pair in summary["paired"]]
    assert names == [
        ("final", "base"),
        ("gradient boosting", "base"),
        ("final", "gradient boosting"),
        ("final", "majority"),
    ]
    for pair in summary["paired"]:
        a, b = features.correct(pair["model"]), features.correct(pair["against"])
        sandwich = PatientSums.of(features).difference(pair["model"], pair["against"])
        assert pair["difference"] == pytest.approx(a.mean() - b.mean())
        assert pair["ci95"] == pytest.approx(sandwich.ci95(-1.0), abs=0.006)
        assert pair["mcnemar_p"] == mcnemar_exact(int((a & ~b).sum()), int((b & ~a).sum()))
        assert pair["p"] == pytest.approx(sandwich.p_value(), abs=0.02)
        assert pair["design_effect"] >= 1
    brier = [summary["models"][model]["brier"]["value"] for model in ("final", "base")]
    assert summary["paired"][0]["brier"]["difference"] == pytest.approx(brier[0] - brier[1])
    assert summary["paired"][3]["brier"] is None


def test_targets_and_sections_have_their_differences_with_both_corrections(features: Scored) -> None:
    summary = summarised(features)
    for key, labels in (("by_target", features.targets), ("by_section", features.sections)):
        rows = summary[key]["rows"]
        assert [row["name"] for row in rows] == sorted(set(labels))
        for row in rows:
            own = np.array([label == row["name"] for label in labels])
            expected = features.correct("final")[own].mean() - features.correct("base")[own].mean()
            assert row["difference"]["difference"] == pytest.approx(expected)
            assert row["difference"]["p"] <= row["difference"]["p_bh"] <= row["difference"]["p_holm"] <= 1
            assert set(row["accuracy"]) == {*THREE, "majority"}


def test_a_summary_is_json_of_its_schema_and_the_same_for_the_same_seed(outcomes: Scored, features: Scored) -> None:
    for scored in (outcomes, features):
        summary = summarised(scored, 200)
        text = json.dumps(summary, allow_nan=False)
        assert text == json.dumps(summarised(scored, 200), allow_nan=False)
        assert evaluation([summary])["tasks"][0] == json.loads(text)


def test_a_model_without_probabilities_or_text_has_nulls_there(outcomes: Scored) -> None:
    q = len(outcomes)
    plain = Answered(np.full((q, 2), 0.5), outcomes.answer, np.ones(q, np.bool_), np.zeros(q, np.int64))
    summary = summarised(replace(outcomes, models={"base": outcomes.models["base"], "final": plain}), 200)
    told = summary["models"]["final"]
    assert all(told[key] is None for key in ("brier", "ece", "reliability", "event", "fallback_rate", "mean_length"))
    assert told["accuracy"]["value"] == 1.0 and told["accuracy"]["ci95"][0] < 1.0
    assert summary["paired"][0]["brier"] is None and summary["paired"][0]["auroc"] is None
    assert any("no probabilities are known" in finding for finding in summary["findings"])
    evaluation([summary])


def test_one_model_alone_is_told_with_the_majority_beside_it(features: Scored) -> None:
    alone = replace(features, models={"final": features.models["final"]}, permuted={}, strata={})
    summary = summarised(alone, 200, reference="final")
    assert [(pair["model"], pair["against"]) for pair in summary["paired"]] == [("final", "majority")]
    assert summary["power"]["against"] == "majority" and summary["by_target"]["rows"][0]["difference"] is None
    assert summary["leave_one_site_out"] is None and summary["cross_validation"] == {}
    assert "questions right" in summary["findings"][0]
    evaluation([summary])


def test_too_few_patients_are_not_reported_and_an_unknown_model_is_a_mistake(features: Scored) -> None:
    with pytest.raises(RegistryError, match="task 'task': expected at least 10 patients, got 9"):
        summarised(simulated(9, THREE, 1))
    with pytest.raises(ValueError, match="reference: expected one of base"):
        summarised(features, reference="other")


def test_whether_patients_with_the_event_are_told_apart_is_said(outcomes: Scored) -> None:
    """A model that always says the frequent answer is right often, and ranks nobody."""
    summary = summarise_task(outcomes, name="death", reference="base", final="final", n_bootstrap=400)
    area = summary["models"]["final"]["event"]["auroc"]
    [said] = [line for line in summary["findings"] if "AUROC" in line]
    assert f"AUROC {area['value']:.3f}" in said
    assert ("better than guessing" in said) == (area["ci95"][0] > 0.5)
    rng = np.random.default_rng(3)
    p = rng.uniform(0.6, 1.0, len(outcomes))
    rows, event = np.arange(len(outcomes)), outcomes.event
    blind = np.zeros((len(outcomes), 2))
    blind[rows, event], blind[rows, 1 - event] = 1 - p, p
    answers = replace(outcomes.models["final"], probabilities=blind, chosen=1 - event)
    summary = summarise_task(
        replace(outcomes, models={**outcomes.models, "final": answers}),
        name="death", reference="base", final="final", n_bootstrap=400,
    )  # fmt: skip
    [said] = [line for line in summary["findings"] if "AUROC" in line]
    assert "which cannot be told from guessing" in said


def test_small_groups_events_and_bins_are_left_out_and_said_so() -> None:
    scored = simulated(60, THREE, seed=5, per_patient=1, outcome=True)
    rare = np.where(np.arange(60) < 6, scored.answer, 1 - scored.answer)  # six events
    labels = tuple("odd" if row < 4 else "usual" if row < 30 else "frequent" for row in range(60))
    summary = summarised(replace(scored, event=rare, targets=labels), 200)
    assert all(told["event"] is None for told in summary["models"].values())
    assert all(len(told["reliability"]) <= 6 for told in summary["models"].values())
    assert all(point["n"] >= 10 for point in summary["models"]["final"]["reliability"])
    assert [row["name"] for row in summary["by_target"]["rows"]] == ["frequent"]
    assert summary["by_target"]["hidden"] == {"labels": ["odd", "usual"], "n": 30, "patients": 30}
    assert any("Not reported for fewer than 10 patients" in finding for finding in summary["findings"])


def test_power_says_what_so_many_questions_cannot_show() -> None:
    summary = summarised(simulated(300, {"base": 0.5, "final": 0.5}, seed=6, per_patient=1), 400)
    low, high = summary["paired"][0]["ci95"]
    # 2.8 standard errors, of which the interval is 3.92 wide.
    assert summary["power"]["detectable"] == pytest.approx((high - low) / 3.92 * 2.8, rel=0.1)
    assert (
        f"n = 300 questions about 300 patients, a true difference under {100 * summary['power']['detectable']:.1f}"
        in (summary["power"]["sentence"])
    )


# What is planted, and what is reported.

BETTER_BUT = {("final", "80+"): -0.22}  # a fifth of +0.10 elsewhere turned into -0.12


def planted(seed: int, n: int = 1500) -> dict:
    scored = simulated(n, {"base": 0.45, "final": 0.555}, seed, shift=BETTER_BUT)
    return summarised(scored, 400)


@pytest.mark.parametrize("seed", range(4))
def test_a_model_better_by_five_points_and_worse_in_one_subgroup_is_reported_as_both(seed: int) -> None:
    summary = planted(seed)
    pair = summary["paired"][0]
    assert pair["difference"] == pytest.approx(0.05, abs=0.025) and pair["ci95"][0] > 0
    assert summary["findings"][0].startswith("final is better than base by ")
    assert [(row["axis"], row["stratum"]) for row in summary["subgroups"]["worse"]] == [("age", "80+")]
    worse = [finding for finding in summary["findings"] if finding.startswith("Worse in a subgroup")]
    assert len(worse) == 1 and "age '80+'" in worse[0]
    assert any(finding.startswith("One difference does not stand for all: by age") for finding in summary["findings"])


def test_a_model_that_is_no_better_is_reported_as_neither_in_nine_of_ten_evaluations() -> None:
    wrong = 0
    for seed in range(60):
        summary = summarised(simulated(200, {"base": 0.45, "final": 0.45}, 100 + seed), 300)
        claimed = not summary["findings"][0].startswith("final and base cannot be told apart")
        wrong += claimed or bool(summary["subgroups"]["worse"])
    assert wrong <= 6


@pytest.mark.parametrize("seed", range(3))
def test_a_model_with_position_bias_is_reported_and_an_unbiased_one_is_not(seed: int) -> None:
    scored = simulated(400, {"base": 0.4, "final": 0.5}, seed, letters={"base": 0.2}, permute=True)
    summary = summarised(scored, 200)
    flagged = {model: row["flagged"] for model, row in summary["position"]["models"].items()}
    assert flagged == {"base": True, "final": False}
    (finding,) = [finding for finding in summary["findings"] if finding.startswith("Position bias")]
    assert finding.startswith("Position bias: base likes a letter") and "chose A in" in finding


def test_a_model_surer_than_right_is_reported_as_too_sure() -> None:
    scored = simulated(300, {"base": 0.4, "final": 0.4}, seed=8)
    sure = np.where(np.arange(4) == scored.models["final"].chosen[:, None], 0.94, 0.02)
    models = {**scored.models, "final": replace(scored.models["final"], probabilities=sure)}
    summary = summarised(replace(scored, models=models), 200)
    assert any(finding.startswith("final is too sure: it gives its answers 94.0 %") for finding in summary["findings"])
    assert summary["models"]["final"]["ece"]["value"] == pytest.approx(0.94 - scored.correct("final").mean())
    low, high = summary["models"]["final"]["ece"]["ci95"]
    assert low < 0.94 - 0.4 < high
