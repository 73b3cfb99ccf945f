"""client/exam.py: a task's questions in two orders, and what statistics get of them."""

import numpy as np
import pytest
from wardround.client.exam import Exam, answered_by_probabilities, make_exam, reorder
from wardround.client.registry import split_rows
from wardround.common.config import RunConfig
from wardround.common.counts import count
from wardround.common.question import LETTERS, load_prompt
from wardround.common.record import record_of
from wardround.common.schema import derive_schema
from wardround.common.tasks import load_task
from wardround.simulations import registries

N = 120


def exam_of(name: str, prompt: str = "en_usual", order: str = "shuffled") -> Exam:
    entries = {"name": "t", "privacy": {"enabled": False}, "questions": {"option_order": order}}
    config = RunConfig.model_validate(entries)
    task = load_task(name)
    registry = registries.load(task.registry)
    splits = split_rows(registry, b"k" * 32)
    train = registry.take(splits["train"])
    schema = derive_schema(count(train.values, registry.dictionary), registry.dictionary, config.questions)
    rng = np.random.default_rng(3)
    return make_exam(task, registry, splits, schema, load_prompt(prompt), config, N, rng)


@pytest.fixture(scope="module")
def mortality() -> Exam:
    return exam_of("stroke-mortality")


@pytest.fixture(scope="module")
def kidney() -> Exam:
    return exam_of("support-kidney", "en")


def test_one_question_a_test_patient_and_only_what_the_task_allows(mortality: Exam, kidney: Exam) -> None:
    for exam in (mortality, kidney):
        patients = exam.registry.patients[exam.rows]
        assert len(set(patients)) == len(patients) <= N
        assert not set(patients) & set(exam.registry.patients[exam.train_rows])
        assert {question.target for question in exam.questions} <= set(exam.task.targets)
        allowed = exam.task.shown(exam.registry.dictionary)
        assert {name for i, name in enumerate(exam.builder.features) if exam.shown[:, i].any()} <= allowed
    days = {
        exam_feature.known_at
        for exam_feature in kidney.registry.dictionary.used
        if exam_feature.name in {name for i, name in enumerate(kidney.builder.features) if kidney.shown[:, i].any()}
    }
    assert max(days) < 3


def test_the_other_order_moves_every_letter_and_changes_nothing_else(mortality: Exam, kidney: Exam) -> None:
    for exam in (mortality, kidney):
        template, dictionary = exam.builder.template, exam.registry.dictionary
        for question, other, order in zip(exam.questions, exam.reordered, exam.orders, strict=True):
            assert other.options[other.answer] == question.options[question.answer]
            assert other.options[other.majority] == question.options[question.majority]
            assert all(place != option for place, option in enumerate(order))
            before, after = (record_of(item, template, dictionary) for item in (question, other))
            assert before.values == after.values
            for letter, option in zip(LETTERS, other.options, strict=False):
                line = template.option.format(letter=letter, value=option, unit=_unit(exam, question.target))
                assert line in other.text
            back = [order.index(place) for place in range(len(order))]
            assert reorder(other, back, template, dictionary) == question


def test_statistics_are_told_that_options_are_sorted(kidney: Exam) -> None:
    for exam, ordered in ((kidney, False), (exam_of("support-kidney", order="sorted"), True)):
        most = max(len(question.options) for question in exam.questions)
        guesses = np.full((len(exam.questions), most), 0.0)
        for row, question in enumerate(exam.questions):
            guesses[row, : len(question.options)] = 1 / len(question.options)
        assert exam.scored({"m": answered_by_probabilities(guesses)}, {}).ordered is ordered


def _unit(exam: Exam, name: str) -> str:
    unit = exam.registry.dictionary.feature(name).unit
    return f" {unit}" if unit else ""


def test_answers_to_the_other_order_come_back_as_the_same_options(mortality: Exam) -> None:
    """A model that knows the truth in both orders, and one that always says A."""

    def knowing(questions) -> np.ndarray:
        return np.eye(2)[[question.answer for question in questions]]

    always_a = np.tile([0.9, 0.1], (len(mortality.questions), 1))
    models = {
        "knows": answered_by_probabilities(knowing(mortality.questions)),
        "says A": answered_by_probabilities(always_a),
    }
    permuted = {
        "knows": answered_by_probabilities(knowing(mortality.reordered)),
        "says A": answered_by_probabilities(always_a),
    }
    scored = mortality.scored(models, permuted)
    assert np.array_equal(scored.permuted["knows"].chosen, scored.answer)
    assert np.array_equal(scored.permuted["says A"].chosen, 1 - scored.models["says A"].chosen)
    assert scored.permuted["says A"].probabilities[0] == pytest.approx([0.1, 0.9])
    assert np.array_equal(scored.shown_at[:, 0], scored.answer)
    assert np.array_equal(scored.shown_at[:, 1], 1 - scored.answer)


def test_events_and_strata_are_those_of_the_patients(mortality: Exam) -> None:
    models = {"m": answered_by_probabilities(np.full((len(mortality.questions), 2), 0.5))}
    scored = mortality.scored(models, {})
    values, rows = mortality.registry.values, mortality.rows
    happened = [question.options[event] for question, event in zip(mortality.questions, scored.event, strict=True)]
    assert set(happened) == {"yes"}
    died = values["death_1y"][rows] == 1
    assert np.array_equal(scored.answer == scored.event, died)
    assert scored.strata["sex"] == tuple(
        list(mortality.registry.dictionary.feature("sex").levels.values())[code] for code in values["sex"][rows]
    )
    assert (scored.shown_at[:, 1] == -1).all()


def test_the_digest_tells_other_questions_apart(mortality: Exam, kidney: Exam) -> None:
    assert mortality.digest() == exam_of("stroke-mortality").digest() != kidney.digest()
