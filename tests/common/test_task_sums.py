"""Sums of hospitals tell of a task what all answers in one place tell, and hide what is of few patients."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from wardround.common.config import packaged
from wardround.common.dictionary import load_dictionary
from wardround.common.errors import ConfigError, ProtocolError
from wardround.common.patient_sums import PatientSums
from wardround.common.scored import MAJORITY, Scored, concat
from wardround.common.summary import summarise_task
from wardround.common.task_sums import (
    TaskSums,
    cells_of,
    read,
    run_tasks,
    shown_cells,
    task_size,
    tasks_digest,
    tasks_size,
    told,
)

from .scored_case import AGES, simulated

MODELS = ("base", "warmup", "final")
DICTIONARY = load_dictionary(packaged("registries", "support_icu.toml"))
TASK, DENOISING = run_tasks(["support-mortality", "support-denoising"], DICTIONARY)
AGE = dict(zip(AGES, TASK.strata["age"].labels(DICTIONARY), strict=True))


def hospital(seed: int, n: int = 300, **more: Any) -> Scored:
    """Outcomes of one hospital's patients; nobody's sex is known."""
    accuracy = more.pop("accuracy", {"base": 0.5, "warmup": 0.6, "final": 0.65})
    scored = simulated(n, accuracy, seed, per_patient=1, outcome=True, **more)
    return replace(scored, strata={"age": tuple(AGE[label] for label in scored.strata["age"])})


def summed(scored: list[Scored]) -> TaskSums:
    vectors = [TaskSums.of(one, TASK, DICTIONARY, MODELS).to_vector() for one in scored]
    return TaskSums.from_vector(np.sum(vectors, axis=0), TASK, DICTIONARY, MODELS)


def report(sums: TaskSums, **more: Any) -> dict[str, Any]:
    return told([sums], None, "warmup", "final", **more)["tasks"][0]


def test_hospitals_together_tell_what_one_place_tells():
    hospitals = [hospital(1), hospital(2, n=80), hospital(3, n=150)]
    got = report(summed(hospitals))
    one = summarise_task(concat(hospitals), name="t", reference="warmup", final="final", n_bootstrap=4000)
    assert (got["n"], got["patients"]) == (one["n"], one["patients"])
    assert got["chance"] == pytest.approx(one["chance"])
    for model in MODELS:
        figure, expected = got["models"][model]["accuracy"], one["models"][model]["accuracy"]
        assert figure["value"] == pytest.approx(expected["value"])
        assert figure["ci95"] == pytest.approx(expected["ci95"], abs=0.006)
        area, wanted = got["models"][model]["event"]["auroc"], one["models"][model]["event"]["auroc"]
        assert area["value"] == pytest.approx(wanted["value"], abs=0.005)
        assert area["ci95"] == pytest.approx(wanted["ci95"], abs=0.012)
        brier = got["models"][model]["event"]["brier"]
        assert brier["value"] == pytest.approx(one["models"][model]["event"]["brier"]["value"], abs=1e-5)
    assert got["models"][MAJORITY]["accuracy"]["value"] == pytest.approx(one["majority"]["accuracy"]["value"])
    pairs = {(pair["model"], pair["against"]): pair for pair in one["paired"]}
    for pair in got["paired"]:
        expected = pairs[pair["model"], pair["against"]]
        assert pair["difference"] == pytest.approx(expected["difference"])
        assert pair["ci95"] == pytest.approx(expected["ci95"], abs=0.006)
        assert pair["p"] == pytest.approx(expected["mcnemar_p"])
        assert (pair["only_model"], pair["only_against"]) == (expected["only_model"], expected["only_against"])
        assert pair["detectable"] == pytest.approx(expected["detectable"], rel=0.03)
    strata = {row["stratum"]: row for row in one["subgroups"]["axes"]["age"]["strata"]}
    assert [row["stratum"] for row in got["subgroups"]["axes"]["age"]["strata"]] == list(AGE.values())
    for row in got["subgroups"]["axes"]["age"]["strata"]:
        expected = strata[row["stratum"]]
        assert row["patients"] == expected["patients"]
        for kind in ("gap", "change"):
            assert row[kind]["difference"] == pytest.approx(expected["models"]["final"][kind]["difference"])
            assert row[kind]["ci95"] == pytest.approx(expected["models"]["final"][kind]["ci95"], abs=0.02)


def test_a_subgroup_that_got_worse_is_named_although_the_whole_got_better():
    accuracy = {"base": 0.5, "warmup": 0.6, "final": 0.68}
    worse = {("final", AGES[-1]): -0.3}
    got = report(summed([hospital(seed, n=700, accuracy=accuracy, shift=worse) for seed in range(4)]))
    assert [row["stratum"] for row in got["subgroups"]["worse"]] == [AGE[AGES[-1]]]
    assert any(line.startswith(f"age {AGE[AGES[-1]]}: worse than warmup") for line in got["findings"])


def test_models_that_do_not_differ_are_seldom_said_to():
    same = {"base": 0.5, "warmup": 0.6, "final": 0.6}
    said = [report(summed([hospital(seed, n=200, accuracy=same)])) for seed in range(100)]
    assert sum("cannot be told apart from warmup" in one["findings"][0] for one in said) >= 90
    assert sum(bool(one["subgroups"]["worse"] or one["subgroups"]["better"]) for one in said) <= 8


def test_axes_of_which_no_value_is_known_have_no_rows():
    sex = report(summed([hospital(1)]))["subgroups"]["axes"]["sex"]
    assert sex == {"strata": [], "hidden_patients": 300}


def test_groups_of_few_patients_and_what_would_give_them_away_are_left_out():
    assert shown_cells({"a": 40, "b": 12, "c": 3}, 55, 10) == ["a"]
    assert shown_cells({"a": 40, "b": 12, "c": 11}, 63, 10) == ["a", "b", "c"]
    assert shown_cells({"a": 40}, 45, 10) == []
    few = summed([hospital(1, n=9)])
    assert "models" not in report(few) and "too few" in report(few)["findings"][0]


def test_a_hospital_without_questions_adds_zeros():
    alone = TaskSums.of(hospital(1), TASK, DICTIONARY, MODELS).to_vector()
    nothing = TaskSums.of(None, TASK, DICTIONARY, MODELS).to_vector()
    assert not nothing.any() and len(nothing) == len(alone) == task_size(TASK, DICTIONARY, MODELS)


def test_every_patient_is_in_everybody_and_in_one_stratum_of_an_axis():
    sums = summed([hospital(1), hospital(2)])
    assert list(sums.cells) == cells_of(TASK, DICTIONARY)
    ages = [cell.patients for (axis, _), cell in sums.cells.items() if axis == "age"]
    assert sum(ages) == sums.cells["", ""].patients == sums.questions == 600


def test_answers_in_words_have_no_probabilities_to_count():
    scored = hospital(1)
    half = {
        name: replace(own, probabilities=np.full_like(own.probabilities, 0.5)) for name, own in scored.models.items()
    }
    got = report(summed([replace(scored, models=half)]))
    assert got["models"]["final"]["event"] is None
    assert got["models"]["final"]["accuracy"] == report(summed([scored]))["models"]["final"]["accuracy"]


def test_all_tasks_together_count_a_patient_of_two_tasks_once():
    one, two = hospital(1, n=120), hospital(2, n=120)
    right = np.concatenate([np.stack([s.correct(m) for m in (*MODELS, MAJORITY)], axis=1) for s in (one, two)])
    pooled = PatientSums.of_answers(MODELS, np.concatenate([one.patients, two.patients]), right)
    parts = [TaskSums.of(one, TASK, DICTIONARY, MODELS), TaskSums.of(two, TASK, DICTIONARY, MODELS)]
    vector = np.concatenate([*(part.to_vector() for part in parts), pooled.to_vector()])
    tasks = [TASK, TASK]
    assert len(vector) == tasks_size(tasks, DICTIONARY, MODELS)
    found, together = read(vector, tasks, DICTIONARY, MODELS)
    assert together is not None
    summary = told(found, together, "warmup", "final")
    assert (summary["all_tasks"]["n"], summary["all_tasks"]["patients"]) == (240, 120)
    pair = summary["all_tasks"]["paired"][0]
    assert pair["only_model"] is None and 0 <= pair["p"] <= 1
    vector[-1 - len(pooled.to_vector())] += 1
    with pytest.raises(ProtocolError):
        read(vector[:-1], tasks, DICTIONARY, MODELS)


@pytest.mark.parametrize("place", range(0, 40, 3))
def test_sums_that_contradict_each_other_are_refused(place: int):
    vector = TaskSums.of(hospital(1), TASK, DICTIONARY, MODELS).to_vector()
    vector[place] += 10_000_000
    with pytest.raises(ProtocolError):
        TaskSums.from_vector(vector, TASK, DICTIONARY, MODELS)


def test_more_patients_with_probabilities_than_patients_are_refused():
    vector = TaskSums.of(hospital(1), TASK, DICTIONARY, MODELS).to_vector()
    vector[-5] += 1
    with pytest.raises(ProtocolError, match="contradict"):
        TaskSums.from_vector(vector, TASK, DICTIONARY, MODELS)


def test_a_changed_task_has_another_digest():
    changed = TASK.model_copy(update={"known_before": 3})
    assert tasks_digest([TASK]) != tasks_digest([changed]) != tasks_digest([DENOISING])


@pytest.mark.parametrize(
    "name, said",
    [("no-such", "no such task"), ("support-antibiotics", "free text"), ("smart-mace", "made for registry 'smart'")],
)
def test_a_task_that_the_run_cannot_ask_is_refused(name: str, said: str):
    with pytest.raises(ConfigError, match=said):
        run_tasks([name], DICTIONARY)
