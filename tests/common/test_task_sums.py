"""Sums of hospitals tell of a task what all answers in one place tell, and hide what is of few patients."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from wardround.common.config import packaged
from wardround.common.dictionary import load_dictionary
from wardround.common.errors import ConfigError, ProtocolError
from wardround.common.event_sums import EventSums
from wardround.common.patient_sums import PatientSums, sums_size
from wardround.common.scored import MAJORITY, Scored, concat
from wardround.common.summary import summarise_task
from wardround.common.task_sums import (
    TaskSums,
    cells_of,
    run_tasks,
    shown_cells,
    task_size,
    tasks_size,
    told,
)
from wardround.common.tasks import load_task

from .scored_case import AGES, simulated

MODELS = ("base", "warmup", "final")
DICTIONARY = load_dictionary(packaged("registries", "support_icu.toml"))
TASK = load_task("support-mortality")
AGE = dict(zip(AGES, TASK.strata["age"].labels(DICTIONARY), strict=True))


def hospital(seed: int, n: int = 300, **more: Any) -> Scored:
    """Outcomes of one hospital's patients; nobody's sex is known."""
    accuracy = more.pop("accuracy", {"base": 0.5, "warmup": 0.6, "final": 0.65})
    scored = simulated(n, accuracy, seed, per_patient=1, outcome=True, **more)
    return replace(scored, strata={"age": tuple(AGE[label] for label in scored.strata["age"])})


def summed(scored: list[Scored]) -> TaskSums:
    vectors = [TaskSums.of(one, TASK, DICTIONARY, MODELS).to_vector() for one in scored]
    return TaskSums.from_vector(np.sum(vectors, axis=0), TASK, DICTIONARY, MODELS)


def report(sums: TaskSums) -> dict[str, Any]:
    most = sums.questions
    return told(sums.to_vector(), [TASK], DICTIONARY, MODELS, "warmup", "final", most)["tasks"][0]


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
        balanced = got["models"][model]["balanced_accuracy"]
        assert balanced["value"] == pytest.approx(one["models"][model]["balanced_accuracy"]["value"])
        assert balanced["ci95"] == pytest.approx(one["models"][model]["balanced_accuracy"]["ci95"], abs=0.012)
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
    assert any(line.startswith(f"age {AGE[AGES[-1]]}: worse than the warmed-up model") for line in got["findings"])


def test_models_that_do_not_differ_are_seldom_said_to():
    same = {"base": 0.5, "warmup": 0.6, "final": 0.6}
    said = [report(summed([hospital(seed, n=200, accuracy=same)])) for seed in range(100)]
    assert sum("cannot be told apart from the warmed-up model" in one["findings"][0] for one in said) >= 90
    assert sum(bool(one["subgroups"]["worse"] or one["subgroups"]["better"]) for one in said) <= 8


def test_axes_of_which_no_value_is_known_have_no_rows():
    sex = report(summed([hospital(1)]))["subgroups"]["axes"]["sex"]
    assert sex == {"strata": [], "hidden_patients": 300}


def test_groups_of_few_patients_and_what_would_give_them_away_are_left_out():
    assert shown_cells({"a": 40, "b": 12, "c": 3}, 55, 10) == ["a"]
    assert shown_cells({"a": 40, "b": 12, "c": 11}, 63, 10) == ["a", "b", "c"]
    assert shown_cells({"a": 40, "b": 4, "c": 3}, 60, 10) == ["a"]  # with 13 of unknown value, 20 are left out
    few = summed([hospital(1, n=9)])
    assert "models" not in report(few) and "too few" in report(few)["findings"][0]


def test_a_few_patients_whose_value_is_not_known_hide_nobody():
    assert shown_cells({"male": 503, "female": 494}, 1000, 10) == ["male", "female"]


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
    summary = told(vector, tasks, DICTIONARY, MODELS, "warmup", "final", 120)
    assert (summary["all_tasks"]["n"], summary["all_tasks"]["patients"]) == (240, 120)
    pair = summary["all_tasks"]["paired"][0]
    assert pair["only_model"] is None and 0 <= pair["p"] <= 1


def two_tasks() -> np.ndarray:
    """What a hospital sends of two tasks."""
    one = hospital(1, n=120)
    right = np.stack([one.correct(m) for m in (*MODELS, MAJORITY)], axis=1)
    pooled = PatientSums.of_answers(MODELS, np.tile(one.patients, 2), np.concatenate([right, right]))
    part = TaskSums.of(one, TASK, DICTIONARY, MODELS).to_vector()
    return np.concatenate([part, part, pooled.to_vector()])


def test_more_questions_over_all_tasks_than_in_them_are_no_result_and_cost_no_other():
    vector = two_tasks()
    size = sums_size(MODELS)
    for place in (1, size - 10):  # questions, and the sum of their squares
        assert vector[-size:][place] > 0
    vector[len(vector) - size + 1] += 1
    vector[len(vector) - size + 1 + len(MODELS) + 2] += 3
    found = told(vector, [TASK, TASK], DICTIONARY, MODELS, "warmup", "final", 120)
    assert found["tasks"] == [] and found["all_tasks"] is None
    assert "another number of questions" in found["tasks_unreadable"]


def test_more_questions_than_were_asked_for_are_no_result():
    found = told(two_tasks(), [TASK, TASK], DICTIONARY, MODELS, "warmup", "final", 119)
    assert found["tasks"] == [] and "more questions" in found["tasks_unreadable"]


def test_the_order_of_axes_in_a_config_changes_no_place_in_the_sums():
    other = TASK.model_copy(update={"strata": dict(reversed(TASK.strata.items()))})
    assert list(other.strata) != list(TASK.strata)
    assert cells_of(other, DICTIONARY) == cells_of(TASK, DICTIONARY)


@pytest.mark.parametrize("axis", ["age", "sex"])
def test_a_stratum_of_more_than_everybody_is_refused(axis: str):
    """What would else be a group of fewer than nobody."""
    sums = TaskSums.of(hospital(1), TASK, DICTIONARY, MODELS)
    label = next(label for of, label in sums.cells if of == axis)
    many = PatientSums.of(hospital(2, n=400))
    wrong = replace(sums, cells={**sums.cells, (axis, label): many})
    with pytest.raises(ProtocolError, match="contradict"):
        TaskSums.from_vector(wrong.to_vector(), TASK, DICTIONARY, MODELS)


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


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            {"right": 90, "own": 60, "own_right": 10}, id="a stratum whose others have more right than questions"
        ),
        pytest.param(
            {"right": 90, "own": 60, "own_right": 60, "both": 10}, id="models that differ more often than asked"
        ),
    ],
)
def test_tables_with_a_negative_number_are_refused(change: dict[str, int]):
    """What a lying hospital can make of a sum, and what no patients are."""

    def sums(n: int, right: int, both: int | None = None) -> PatientSums:
        first = np.array([n, right, right, right, right], np.int64)
        second = np.full((5, 5), right if both is None else both, np.int64)
        second[0], second[:, 0] = first, first
        second[np.arange(1, 5), np.arange(1, 5)] = right
        return PatientSums(MODELS, n, first, second)

    honest = TaskSums.of(hospital(1), TASK, DICTIONARY, MODELS)
    none = PatientSums.from_vector(np.zeros(sums_size(MODELS), np.int64), MODELS)
    cells = dict.fromkeys(honest.cells, none)
    cells["", ""] = sums(100, change["right"], change.get("both"))
    cells[next(cell for cell in cells if cell[0] == "sex")] = sums(change["own"], change["own_right"])
    wrong = replace(
        honest,
        cells=cells,
        chance=100 * 1260,
        events={m: EventSums.of(np.array([]), np.array([], bool)) for m in MODELS},
    )
    found = told(wrong.to_vector(), [TASK], DICTIONARY, MODELS, "warmup", "final", 100)
    assert found["tasks"] == [] and "contradict" in found["tasks_unreadable"]


def test_nothing_is_told_over_all_tasks_where_one_is_of_too_few():
    """It would follow by subtraction."""
    many, few = hospital(1, n=120), hospital(2, n=5)
    right = np.concatenate([np.stack([s.correct(m) for m in (*MODELS, MAJORITY)], axis=1) for s in (many, few)])
    pooled = PatientSums.of_answers(MODELS, np.concatenate([many.patients, few.patients]), right)
    parts = [TaskSums.of(one, TASK, DICTIONARY, MODELS).to_vector() for one in (many, few)]
    found = told(np.concatenate([*parts, pooled.to_vector()]), [TASK, TASK], DICTIONARY, MODELS, "warmup", "final", 120)
    assert "models" in found["tasks"][0] and "models" not in found["tasks"][1]
    assert found["all_tasks"] is None


def test_a_task_that_would_tell_hospitals_apart_is_refused():
    task = TASK.model_copy(update={"strata": {"site": TASK.strata["sex"]}})
    with pytest.raises(ConfigError, match="does not tell hospitals apart"):
        run_tasks([task.model_dump()], DICTIONARY)


def test_a_task_of_another_registry_is_refused():
    with pytest.raises(ConfigError, match="made for registry 'smart'"):
        run_tasks([load_task("smart-mace").model_dump()], DICTIONARY)
