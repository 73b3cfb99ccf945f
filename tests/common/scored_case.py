"""Simulated questions and models for tests of the statistics: what is true of them is known."""

from collections.abc import Mapping

import numpy as np
from wardround.common.scored import Answered, Scored

AGES = ("18-49", "50-64", "65-79", "80+")
SITES = ("north", "south", "east", "west")


def simulated(
    n_patients: int,
    accuracy: Mapping[str, float],
    seed: int,
    *,
    per_patient: int = 2,
    shift: Mapping[tuple[str, str], float] | None = None,
    outcome: bool = False,
    letters: Mapping[str, float] | None = None,
    permute: bool = False,
) -> Scored:
    """Questions of `n_patients` patients and models that are right with a known probability.

    Args:
        n_patients: each of `per_patient` questions, whose difficulties have a part in common.
        accuracy: model → probability of a right answer.
        seed: of everything.
        per_patient: questions a patient.
        shift: (model, age stratum) → change of that probability in the stratum.
        outcome: yes or no questions with an event, in place of features with 4 options.
        letters: model → share of its answers that are letter A whatever is asked.
        permute: the questions are asked again with their options in another order.
    """
    rng = np.random.default_rng(seed)
    q, width = n_patients * per_patient, 2 if outcome else 4
    patients = np.repeat(np.arange(n_patients), per_patient)
    age = rng.choice(AGES, n_patients)[patients]
    answer = rng.integers(width, size=q)
    # Luck of a question is shared between models, so that they are paired, and partly between a patient's questions.
    luck = (rng.normal(size=n_patients)[patients] * 0.5 + rng.normal(size=q)) / np.sqrt(1.25)
    uniform = np.argsort(np.argsort(luck)) / q
    order = np.argsort(rng.random((q, width)), axis=1)  # original option at each permuted letter
    at = np.argsort(order, axis=1)  # permuted letter of each original option
    models, permuted = {}, {}
    for model, share in accuracy.items():
        own = share + sum(np.where(age == s, d, 0.0) for (m, s), d in (shift or {}).items() if m == model)
        mixed = np.where(rng.random(q) < 0.7, uniform, rng.random(q))
        right = mixed < own
        always_a = rng.random(q) < (letters or {}).get(model, 0.0)
        wrong = (answer + rng.integers(1, width, size=q)) % width
        content = np.where(right, answer, wrong)
        models[model] = answered(np.where(always_a, 0, content), width, rng)
        if permute:
            permuted[model] = answered(np.where(always_a, order[:, 0], content), width, rng)
    names = np.array(["death"] if outcome else ["albumin", "sodium", "sex"])
    targets = tuple(str(name) for name in rng.choice(names, q))
    return Scored(
        patients,
        targets,
        tuple("Outcome" if outcome else "Patient" if target == "sex" else "Laboratory" for target in targets),
        np.full(q, width),
        answer,
        rng.integers(width, size=q),
        # Where the event stands is drawn for every question.
        np.where(rng.random(q) < 0.3, answer, 1 - answer) if outcome else np.full(q, -1),
        {"age": tuple(age.tolist()), "site": tuple(rng.choice(SITES, n_patients)[patients].tolist())},
        models,
        permuted,
        np.stack([answer, at[np.arange(q), answer] if permute else np.full(q, -1)], axis=1),
    )


def answered(chosen: np.ndarray, width: int, rng: np.random.Generator) -> Answered:
    """Answers with probabilities in which the chosen option is the most probable."""
    q = len(chosen)
    p = rng.dirichlet(np.ones(width), q)
    top = p.argmax(axis=1)
    rows = np.arange(q)
    highest, other = p[rows, top].copy(), p[rows, chosen].copy()
    p[rows, top], p[rows, chosen] = other, highest
    return Answered(p, chosen.astype(np.int64), rng.random(q) < 0.9, rng.integers(1, 50, q))
