"""Membership inference: can a reader of the trained model tell whose questions it was trained on?

Run on one machine. Enters: patients of an open registry, members and others by a fair coin; a model before and after
training. Leaves: for each attack how well it tells them apart. The attacker has both models, knows every patient's
question and its right answer, and asks whether that patient was trained on: more than a real one would know.

Attacks, made for reinforcement learning with verifiable rewards (there is no text whose likelihood was trained, only
whether the answer is right):

    reward      how often the trained model is right on the patient's question
    advantage   how much more often than the model before training: the rise that training was after
    drift       how far the probabilities of the options moved, whichever way (Kullback-Leibler; with `advantage` the
                two signals of arXiv 2511.14045)
    likelihood  log-likelihood of the right answer, calibrated by the model before training (arXiv 2111.08440)

No shadow models are trained (LiRA): the model before training is the only reference.

Canary patients are patients whose right answer was replaced by one drawn from the options: nothing about other patients
helps to answer, so being right means having remembered. Ordinary patients are as the registry has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...common.question import Question
from .bound import auc, clopper_pearson

ATTACKS = {
    "reward": "right answers",
    "advantage": "rise in right answers",
    "drift": "change of the answers",
    "likelihood": "likelihood of the right answer",
}
FALSE_ALARMS = (0.01, 0.001)

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Group:
    """Patients of one kind with one question each; `member` says which are trained on."""

    questions: Sequence[Question]
    member: NDArray[np.bool_]

    @property
    def trained(self) -> list[Question]:
        return [question for question, member in zip(self.questions, self.member, strict=True) if member]


class Members:
    """A hospital whose patients have one question each."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions

    @property
    def n_patients(self) -> int:
        return len(self.questions)

    def draw(self, patient_indices: np.ndarray, rng: np.random.Generator) -> list[Question]:
        return [self.questions[index] for index in patient_indices]


def groups(
    questions: Sequence[Question], members: Mapping[str, int], others: int, rng: np.random.Generator
) -> dict[str, Group]:
    """Canary and ordinary patients: so many members of each kind, and so many others of each; who is which by lot.

    Raises:
        ValueError: there are too few patients.
    """
    needed = sum(members.values()) + others * len(members)
    if needed > len(questions):
        raise ValueError(f"patients trained on and others: expected at most {len(questions)} in all, got {needed}")
    order, start = rng.permutation(len(questions)), 0
    result: dict[str, Group] = {}
    for kind, trained in members.items():
        chosen = [questions[index] for index in order[start : start + trained + others]]
        start += trained + others
        if kind == "canary":
            chosen = [replace(question, answer=int(rng.integers(len(question.options)))) for question in chosen]
        result[kind] = Group(chosen, np.arange(trained + others) < trained)
    return result


def scores(questions: Sequence[Question], before: Float64, after: Float64) -> dict[str, Float64]:
    """Each attack's score of every patient.

    Args:
        questions: the patients'.
        before: log-probabilities of the options before training, (n, most options), -inf past a question's own.
        after: the same after it.
    """
    truth = np.array([question.answer for question in questions])[:, None]
    first, last = (np.take_along_axis(each, truth, axis=1)[:, 0] for each in (before, after))
    own = np.isfinite(before)
    moved = np.subtract(after, before, out=np.zeros_like(after), where=own)
    drift = (np.exp(after) * moved).sum(1)
    return {
        "reward": np.exp(last),
        "advantage": np.exp(last) - np.exp(first),
        "drift": drift,
        "likelihood": last - first,
    }


def told_apart(values: Float64, member: NDArray[np.bool_]) -> dict[str, Any]:
    """How well a score tells members from others.

    Returns:
        "auc" and "auc_ci95"; "members", "others"; "tpr": for each false alarm rate the share of members found, its
        95 % interval, and the interval of the false alarm rate that the threshold really has. A rate below one over
        the number of others cannot be set: there the threshold is the highest of the others.
    """
    members, others = values[member], values[~member]
    value, interval = auc(members, others)
    found: list[dict[str, Any]] = []
    for rate in FALSE_ALARMS:
        allowed = int(rate * len(others))
        threshold = np.sort(others)[::-1][allowed]  # `allowed` of the others lie above it, fewer where there are ties
        hits, alarms = int((members > threshold).sum()), int((others > threshold).sum())
        found.append(
            {
                "false_alarms": rate,
                "share": hits / len(members),
                "ci95": clopper_pearson(hits, len(members)),
                "alarms": alarms,
                "alarm_ci95": clopper_pearson(alarms, len(others)),
            }
        )
    return {
        "auc": value,
        "auc_ci95": interval,
        "members": len(members),
        "others": len(others),
        "tpr": found,
    }


def roc(values: Float64, member: NDArray[np.bool_], points: int = 60) -> list[list[float]]:
    """Points (false alarms, members found) of the curve, evenly in false alarms; for a plot."""
    members, others = np.sort(values[member]), np.sort(values[~member])
    thresholds = np.quantile(others, np.linspace(1, 0, points), method="higher")
    rates = 1 - np.searchsorted(others, thresholds, side="right") / len(others)
    hits = 1 - np.searchsorted(members, thresholds, side="right") / len(members)
    return [
        [0.0, 0.0],
        *([round(x, 4), round(y, 4)] for x, y in zip(rates.tolist(), hits.tolist(), strict=True)),
        [1.0, 1.0],
    ]
