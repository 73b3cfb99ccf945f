"""One task's questions about held-out patients, in two orders of options, with the groups that patients belong to.

Run at a hospital on its own test patients, or on one machine over open registries. Enters: a registry, its split, a
schema and a task (common/tasks.py). Leaves: nothing; questions hold records. common/scored.py holds what statistics
need of them, without their texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..common.config import RunConfig
from ..common.dictionary import Dictionary
from ..common.errors import RegistryError
from ..common.metrics import contextual_calibration, letter_prior
from ..common.question import LETTERS, PromptTemplate, Question
from ..common.schema import Schema
from ..common.scored import Answered, Scored
from ..common.tasks import Task
from .questions import QuestionBuilder
from .registry import Registry


@dataclass(frozen=True, eq=False)
class Exam:
    """What every model is asked in one scored task.

    Attributes:
        task: whose.
        builder: made the questions.
        questions: one a test patient.
        reordered: the same with their options in another order.
        orders: (Q,) tuples; place i of the reordered options holds option `orders[q][i]`.
        rows: int64 (Q,), of the registry.
        shown: bool (Q, features), which of `builder.features` each record shows.
        train_rows: rows of training patients, for tabular models.
    """

    task: Task
    builder: QuestionBuilder
    questions: list[Question]
    reordered: list[Question]
    orders: list[tuple[int, ...]]
    rows: np.ndarray
    shown: np.ndarray
    train_rows: np.ndarray

    @property
    def registry(self) -> Registry:
        return self.builder.registry

    def digest(self) -> str:
        """SHA-256 hex of the questions with their answers: evaluations with equal ones asked the same."""
        content = hashlib.sha256(b"wardround exam 1\0")
        for question in self.questions:
            for part in (question.text, str(question.answer)):
                content.update(hashlib.sha256(part.encode()).digest())
        return content.hexdigest()

    def scored(self, models: Mapping[str, Answered], permuted: Mapping[str, Answered]) -> Scored:
        """What statistics need: the questions' facts and every model's answers, the permuted ones mapped back."""
        task, registry, rows = self.task, self.registry, self.rows
        values = {name: column[rows] for name, column in registry.values.items()}
        strata = {axis: division.strata(values, registry.dictionary) for axis, division in task.strata.items()}
        if registry.sites is not None:
            strata["site"] = tuple(str(site) for site in registry.sites[rows])
        answer = np.array([question.answer for question in self.questions], np.int64)
        moved = np.array([order.index(truth) for order, truth in zip(self.orders, answer, strict=True)], np.int64)
        asked_twice = moved if permuted else np.full(len(rows), -1, np.int64)
        return Scored(
            patients=np.unique(registry.patients[rows].astype(str), return_inverse=True)[1].astype(np.int64),
            targets=tuple(question.target for question in self.questions),
            sections=tuple(question.section for question in self.questions),
            n_options=np.array([len(question.options) for question in self.questions], np.int64),
            answer=answer,
            majority=np.array([question.majority for question in self.questions], np.int64),
            event=np.array([_event(task, question) for question in self.questions], np.int64),
            strata=strata,
            models=models,
            permuted={name: self._mapped_back(answers) for name, answers in permuted.items()},
            shown_at=np.column_stack([answer, asked_twice]),
            ordered=self.builder.settings.option_order == "sorted",
        )

    def _mapped_back(self, answers: Answered) -> Answered:
        """Answers to the reordered questions, as options of the original ones."""
        probabilities = np.zeros_like(answers.probabilities)
        chosen = answers.chosen.copy()
        for row, order in enumerate(self.orders):
            probabilities[row, list(order)] = answers.probabilities[row, : len(order)]
            if chosen[row] >= 0:
                chosen[row] = order[chosen[row]]
        return replace(answers, probabilities=probabilities, chosen=chosen)


def make_exam(
    task: Task,
    registry: Registry,
    splits: Mapping[str, np.ndarray],
    schema: Schema,
    template: PromptTemplate,
    config: RunConfig,
    n_questions: int,
    rng: np.random.Generator,
) -> Exam:
    """The questions of a scored task.

    Args:
        task: not an open one; already checked against the dictionary.
        registry: with its test patients.
        splits: "train" and "test" row indices.
        schema: of the registry's dictionary.
        template: the prompt.
        config: its `questions` are used, with the task's kind of target and context.
        n_questions: at most so many, one a test patient.
        rng: decides order of patients, targets, shown features, options.

    Raises:
        RegistryError: no test patient can be asked.
        ConfigError: the schema has none of the task's targets.
    """
    settings = config.questions.model_copy(update={"outcome_share": 1.0 if task.kind == "outcome" else 0.0})
    builder = QuestionBuilder(registry, schema, template, settings, context=task.shown(registry.dictionary))
    rows = _one_row_a_patient(registry, splits["test"], rng)
    targets = list(task.targets) or None
    questions, kept, shown = builder.build_with_records(rows, rng, targets=targets)
    questions, kept, shown = questions[:n_questions], kept[:n_questions], shown[:n_questions]
    if not questions:
        raise RegistryError(f"task '{task.name}': none of {len(rows)} test patients has a value that can be asked")
    orders = [_other_order(len(question.options), rng) for question in questions]
    dictionary = registry.dictionary
    reordered = [
        reorder(question, order, template, dictionary) for question, order in zip(questions, orders, strict=True)
    ]
    return Exam(task, builder, questions, reordered, orders, kept, shown, splits["train"])


def reorder(question: Question, order: Sequence[int], template: PromptTemplate, dictionary: Dictionary) -> Question:
    """The question with option `order[i]` at letter i; record and wording stay as they are."""
    feature = dictionary.feature(question.target)
    unit = f" {feature.unit}" if feature.unit else ""

    def block(options: Sequence[str]) -> str:
        lines = [
            template.option.format(letter=letter, value=value, unit=unit)
            for letter, value in zip(LETTERS, options, strict=False)
        ]
        return template.option_separator.join(lines)

    options = tuple(question.options[place] for place in order)
    before, found, after = question.text.rpartition(block(question.options))
    if not found:
        raise ValueError(f"question about '{question.target}': its options are not written as the template writes them")
    return replace(
        question,
        text=before + block(options) + after,
        options=options,
        answer=order.index(question.answer),
        majority=order.index(question.majority),
    )


def answered(outcomes: Any, n_options: Sequence[int]) -> Answered:
    """A language model's `common.lm.answers.Outcomes` as statistics take it.

    Probabilities are those of the letters for answer-only questions, and uniform, which statistics read as unknown, for
    texts.
    """
    widest = max(n_options, default=2)
    own = np.arange(widest) < np.array(n_options)[:, None]
    if outcomes.log_probs is None:
        probabilities = own / own.sum(axis=1, keepdims=True)
    else:
        weights = np.where(own, np.exp(outcomes.log_probs.astype(np.float64)), 0.0)
        probabilities = weights / weights.sum(axis=1, keepdims=True)
    chosen = outcomes.chosen.astype(np.int64)
    return Answered(probabilities, chosen, outcomes.boxed.astype(np.bool_), outcomes.length.astype(np.int64))


def calibrated(answers: Answered, exam: Exam) -> Answered:
    """The answers without the model's liking for letters (contextual calibration, Zhao et al. 2021).

    The prior of a letter is what the model gives it on average over other patients' questions of the task: fair, for
    options are shuffled. No true answer is looked at.

    Args:
        answers: of the exam's questions; probabilities float64 (Q, W), of letters.
        exam: in its first order.
    """
    n_options = np.array([len(question.options) for question in exam.questions], np.int64)
    patients = np.unique(exam.registry.patients[exam.rows].astype(str), return_inverse=True)[1].astype(np.int64)
    prior = letter_prior(answers.probabilities, n_options, patients)
    probabilities = contextual_calibration(answers.probabilities, prior)
    return replace(answers, probabilities=probabilities, chosen=probabilities.argmax(axis=1).astype(np.int64))


def answered_by_probabilities(probabilities: np.ndarray) -> Answered:
    """A tabular model's answers: the likeliest option."""
    n = len(probabilities)
    return Answered(
        probabilities, probabilities.argmax(axis=1).astype(np.int64), np.ones(n, np.bool_), np.zeros(n, np.int64)
    )


def _one_row_a_patient(registry: Registry, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shuffled = rng.permutation(rows)
    _, first = np.unique(registry.patients[shuffled].astype(str), return_index=True)
    return shuffled[np.sort(first)]


def _other_order(n: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Not the order that options have; every option's letter changes where that can be (a rotation)."""
    turn = int(rng.integers(1, n))
    return tuple((place + turn) % n for place in range(n))


def _event(task: Task, question: Question) -> int:
    return question.options.index(task.event) if task.event in question.options else -1
