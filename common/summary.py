"""The figures of one task: what evaluation.json holds of it.

Role: where questions were scored and all rows lie in one place. Pure. Enters: scored questions (common/scored.py).
Leaves: JSON-safe figures, documented field by field in common/evaluation_file.py, and findings in plain words. Private:
groups of fewer than `min_cell` patients are left out (common/subgroups.py says how), and nothing is noised: what may be
published of a closed registry is its custodian's decision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import RegistryError
from .findings import find, power_sentence
from .intervals import PatientBootstrap, benjamini_hochberg, bounds, detectable_difference
from .model_figures import RANK_DRAWS, ModelFigures, events_of, majority_figures, model_figures
from .position import FLAG_RULE, position_bias
from .scored import MAJORITY, Scored
from .statistics import mcnemar_exact
from .subgroups import correct_family, cross_validation, leave_one_out, paired_difference, reported, subgroups

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def summarise_task(
    scored: Scored,
    *,
    name: str,
    reference: str,
    final: str,
    n_bootstrap: int = 10_000,
    seed: int = 0,
    min_cell: int = 10,
) -> dict[str, Any]:
    """All figures of one task.

    Args:
        scored: its questions and every model's answers.
        name: the task's.
        reference: the model that others are compared with, usually the base model.
        final: the model that the evaluation is about; may be `reference` where there is one model only.
        n_bootstrap: resamples of patients; areas under curves use at most 2,000 of them.
        seed: of the resamples.
        min_cell: fewest patients of a group that is reported.

    Returns:
        One entry of "tasks" of evaluation.json: `common.evaluation_file.Task`.

    Raises:
        ValueError: `reference` or `final` is not among the models.
        RegistryError: fewer than `min_cell` patients.
    """
    for role, model in (("reference", reference), ("final", final)):
        if model not in scored.models:
            raise ValueError(f"{role}: expected one of {', '.join(scored.models)}, got '{model}'")
    patients = scored.n_patients
    if patients < max(1, min_cell):
        raise RegistryError(
            f"task '{name}': expected at least {min_cell} patients, got {patients}: nothing is reported"
        )
    bootstrap = PatientBootstrap(scored.patients, n_bootstrap, seed)
    events = events_of(scored, min_cell)
    models = {model: model_figures(scored, model, events, bootstrap, min_cell) for model in scored.models}
    summary: dict[str, Any] = {
        "name": name,
        "n": len(scored),
        "patients": patients,
        "reference": reference,
        "final": final,
        "min_cell": min_cell,
        "bootstrap": {"draws": bootstrap.draws, "rank_draws": min(RANK_DRAWS, bootstrap.draws), "seed": seed},
        "chance": float((1 / scored.n_options).mean()),
        "majority": majority_figures(scored, bootstrap),
        "models": {model: figures.told for model, figures in models.items()},
        "paired": _pairs(scored, models, reference, final, bootstrap),
        "by_target": _by(scored, scored.targets, reference, final, bootstrap, min_cell),
        "by_section": _by(scored, scored.sections, reference, final, bootstrap, min_cell),
        "subgroups": subgroups(scored, reference, final, bootstrap, min_cell),
        "leave_one_site_out": leave_one_out(scored, reference, final, bootstrap, min_cell),
        "cross_validation": cross_validation(scored, reference, final, bootstrap, min_cell),
        "position": {
            "rule": FLAG_RULE,
            "models": {model: position_bias(scored, model, bootstrap, min_cell) for model in scored.models},
        },
    }
    summary["power"] = _power(summary)
    summary["findings"] = find(summary)
    return summary


def _pairs(
    scored: Scored, models: dict[str, ModelFigures], reference: str, final: str, bootstrap: PatientBootstrap
) -> list[dict[str, Any]]:
    """Every model against the reference, then final against every other model and the majority option."""
    pairs = [(model, reference) for model in models if model != reference]
    pairs += [(final, model) for model in models if model not in (final, reference)]
    pairs.append((final, MAJORITY))
    right = {model: scored.correct(model) for model in (*models, MAJORITY)}
    columns = np.stack([right[a].astype(np.int64) - right[b] for a, b in pairs], axis=1)
    values = bootstrap.ratios(columns, np.ones((len(scored), 1)))
    result: list[dict[str, Any]] = []
    for column, (model, against) in enumerate(pairs):
        pair = _pair(right[model], right[against], values[:, column], bootstrap)
        own, other = models[model], models.get(against)
        pair["brier"] = None if other is None else _change(own.brier, other.brier)
        pair["auroc"] = None if other is None else _change(own.auroc, other.auroc)
        result.append({"model": model, "against": against, **pair})
    return result


def _pair(first: Bools, second: Bools, values: Floats, bootstrap: PatientBootstrap) -> dict[str, Any]:
    n, only_first, only_second = len(first), int((first & ~second).sum()), int((second & ~first).sum())
    discordance, difference = (only_first + only_second) / n, (only_first - only_second) / n
    alone = (discordance - difference**2) / n
    effect = max(1.0, float(values[1:].var()) / alone) if alone > 0 else 1.0
    return {
        **paired_difference(first, second, values, np.arange(n), bootstrap),
        "only_model": only_first,
        "only_against": only_second,
        "mcnemar_p": mcnemar_exact(only_first, only_second),
        "discordance": discordance,
        "design_effect": effect,
        "detectable": detectable_difference(n, discordance, effect),
    }


def _change(own: Floats | None, other: Floats | None) -> dict[str, Any] | None:
    if own is None or other is None:
        return None
    values = own - other
    return {"difference": float(values[0]), "ci95": bounds(values)}


def _by(
    scored: Scored,
    labels: Sequence[str],
    reference: str,
    final: str,
    bootstrap: PatientBootstrap,
    min_cell: int,
) -> dict[str, Any]:
    """Accuracies and the paired difference final − reference by target or section; corrected over all rows."""
    kept, hidden = reported(labels, scored.patients, min_cell)
    right = {model: scored.correct(model) for model in (*scored.models, MAJORITY)}
    rows: list[dict[str, Any]] = []
    for label, own in kept.items():
        rows.append(
            {
                "name": label,
                "section": scored.sections[int(own[0])],
                "n": len(own),
                "patients": len(np.unique(scored.patients[own])),
                "chance": float((1 / scored.n_options[own]).mean()),
                "accuracy": {model: float(correct[own].mean()) for model, correct in right.items()},
                "difference": None,
            }
        )
    if final != reference and kept:
        compared = [
            paired_difference(right[final], right[reference], values, own, bootstrap)
            for own, values in zip(
                kept.values(), _differences(right[final], right[reference], kept, bootstrap), strict=True
            )
        ]
        correct_family(compared)
        for row, item, p in zip(rows, compared, benjamini_hochberg([item["p"] for item in compared]), strict=True):
            row["difference"] = {**item, "p_bh": p}
    return {"rows": rows, "hidden": hidden}


def _differences(
    first: Bools, second: Bools, kept: dict[str, NDArray[np.int64]], bootstrap: PatientBootstrap
) -> Iterator[Floats]:
    """Resamples (1 + B,) of the difference in every group."""
    mask = np.zeros((len(first), len(kept)), np.int64)
    for column, own in enumerate(kept.values()):
        mask[own, column] = 1
    yield from bootstrap.ratios(mask * (first.astype(np.int64) - second)[:, None], mask).T


def _power(summary: dict[str, Any]) -> dict[str, Any]:
    """What difference this many questions would show, for final against the reference (or the majority option)."""
    final, reference = summary["final"], summary["reference"]
    against = reference if final != reference else MAJORITY
    pair = next(pair for pair in summary["paired"] if (pair["model"], pair["against"]) == (final, against))
    told = {key: pair[key] for key in ("discordance", "design_effect", "detectable")}
    told = {"n": summary["n"], "patients": summary["patients"], "model": final, "against": against, **told}
    return {**told, "sentence": power_sentence(told)}
