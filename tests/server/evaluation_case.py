"""An evaluation as a suite writes it, from simulated answers: what is true of every model is known."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from wardround.common.evaluation_file import evaluation
from wardround.common.scored import Answered, Scored
from wardround.common.summary import summarise_task

from tests.common.scored_case import simulated

FEATURES = {
    "logistic regression": 0.5,
    "gradient boosting": 0.56,
    "base": 0.36,
    "final": 0.46,
    "local site-1": 0.39,
    "local site-2": 0.4,
    "central": 0.47,
}
OUTCOME = {"logistic regression": 0.72, "gradient boosting": 0.74, "base": 0.6, "final": 0.61}
REASONING = {
    "base": {"contradicts_record": 12, "invented_value": 30, "leaked_letters": 0, "any": 39, "n": 200},
    "final": {"contradicts_record": 5, "invented_value": 14, "leaked_letters": 1, "any": 19, "n": 200},
}
PROVENANCE = {
    "models": {"final": {"folder": "runs/demo/model", "digest": "ab12"}, "base": {"folder": "base"}},
    "settings": {"questions": 300, "reasoning_tokens": 64, "seed": 0},
    "tasks": {
        "icu-denoising": {"title": "Masked values of ICU patients", "questions_digest": "5f1c", "kind": "denoising"},
        "icu-mortality": {"title": "Death in hospital", "questions_digest": "77aa", "kind": "outcome"},
    },
    "commit": None,
    "versions": {"wardround": "0.1"},
}


def features(n_patients: int = 500) -> Scored:
    """Masked features: better overall, worse in the oldest, "base" likes letter A; one site too small to be shown."""
    shift = {("final", "80+"): -0.3}
    made = simulated(n_patients, FEATURES, 5, shift=shift, letters={"base": 0.3}, permute=True)
    small = np.flatnonzero(made.patients < 4)
    sites = ["tiny" if row in small else site for row, site in enumerate(made.strata["site"])]
    return replace(made, strata={**made.strata, "site": tuple(sites)})


def outcome(n_patients: int = 300) -> Scored:
    """A yes or no outcome, in which the table models are better."""
    made = simulated(n_patients, OUTCOME, 6, per_patient=1, outcome=True)
    plain = made.models["logistic regression"]
    silent = Answered(plain.probabilities, plain.chosen, np.ones(n_patients, np.bool_), np.zeros(n_patients, np.int64))
    return replace(made, models={**made.models, "logistic regression": silent})


@cache
def _tasks(draws: int) -> tuple[dict[str, Any], ...]:
    made = {"icu-denoising": features(), "icu-mortality": outcome()}
    return tuple(
        summarise_task(scored, name=name, reference="base", final="final", n_bootstrap=draws)
        for name, scored in made.items()
    )


def case(draws: int = 300, **parts: Any) -> dict[str, Any]:
    """The content of an evaluation.json of two tasks."""
    return evaluation(_tasks(draws), **({"provenance": PROVENANCE, "reasoning": REASONING} | parts))


def alone() -> dict[str, Any]:
    """One model, without probabilities, text, subgroups or sites: whatever may be None is so."""
    made = simulated(40, {"final": 0.4}, 3)
    answers = made.models["final"]
    q = len(made)
    plain = Answered(np.full((q, 4), 0.25), answers.chosen, np.ones(q, np.bool_), np.zeros(q, np.int64))
    bare = replace(made, models={"final": plain}, strata={}, permuted={})
    return evaluation([summarise_task(bare, name="bare", reference="final", final="final", n_bootstrap=100)])
