"""Subgroups of an evaluation: who is served worse, who got worse, and whether one site or group carries the result.

Role: wherever questions were scored. Pure. Enters: scored questions with the stratum of each on every axis (site, age,
sex, comorbidity, severity, period). Leaves: a table per axis. Private: a stratum of few patients says much about each
of them. Those of fewer than `min_cell` patients are not reported, and where what is left out of an axis is smaller than
that together, the next smallest stratum is left out as well, so that no small one follows from the total minus the
rows; patients whose value is not known are no stratum, and a few of them hide nobody else. That is a courtesy, not a
guarantee: axes can still be played against each other.

Intervals are of the bootstrap by patient. p-values of changes are of the exact sign-flip test by patient. Gaps are of
different patients: Newcombe's interval and Fisher's test where each has one question, else bootstrap and normal. Holm's
correction runs over all strata of all axes, one family for each model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .distributions import chi_square_tail
from .intervals import (
    PatientBootstrap,
    bounds,
    difference_bounds,
    holm,
    independent_difference,
    share_bounds,
    sign_flip_p,
)
from .scored import Scored, groups

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL = 0.05


def reported(labels: Sequence[str], patients: Ints, min_cell: int) -> tuple[dict[str, Ints], dict[str, Any] | None]:
    """The rows of every label that may be reported, sorted by label, and what is left out.

    Args:
        labels: one a question; "" is unknown and never reported.
        patients: int64 (Q,).
        min_cell: fewest patients.

    Returns:
        label → rows; and None or {"labels", "n", "patients"} of all that is left out, unknown ones included.
    """
    rows = dict(sorted(groups(labels).items()))
    size = {label: len(np.unique(patients[own])) for label, own in rows.items()}
    unknown = np.array([row for row, label in enumerate(labels) if not label], dtype=np.int64)
    left_out = [label for label in rows if size[label] < min_cell]
    while True:
        hidden = np.concatenate([unknown, *(rows[label] for label in left_out)])
        n = len(np.unique(patients[hidden]))
        shown = [label for label in rows if label not in left_out]
        # A few of whom a value is not known are no stratum, and alone hide nobody.
        if not left_out or n >= min_cell or not shown:
            break
        left_out.append(min(shown, key=lambda label: size[label]))
    kept = {label: rows[label] for label in shown}
    return kept, {"labels": sorted(left_out), "n": len(hidden), "patients": n} if len(hidden) else None


def subgroups(scored: Scored, reference: str, final: str, bootstrap: PatientBootstrap, min_cell: int) -> dict[str, Any]:
    """Every model's accuracy in every stratum, its gap to everybody else, and its change against the reference there.

    Args:
        scored: the questions.
        reference, final: two of its models; may be one and the same.
        bootstrap: of its patients.
        min_cell: fewest patients of a stratum that is reported.

    Returns:
        "axes": axis → {"strata": a list of {"stratum", "n", "patients", "models": model → {"accuracy", "gap" (stratum
        minus everybody else), "change" (the model minus the reference inside the stratum; None for the reference)}},
        "hidden"}; "worse" and "better": strata in which `final` is so against `reference`, which is where the interval
        excludes 0 and the corrected p is below 0.05.
    """
    axes: dict[str, Any] = {}
    for axis, labels in scored.strata.items():
        kept, hidden = reported(labels, scored.patients, min_cell)
        axes[axis] = {"strata": _strata(scored, reference, bootstrap, kept), "hidden": hidden}
    for model in scored.models:
        entries = [stratum["models"][model] for axis in axes.values() for stratum in axis["strata"]]
        for kind in ("gap", "change"):
            correct_family([entry[kind] for entry in entries if entry[kind] is not None])
    found: dict[str, list[dict[str, Any]]] = {"worse": [], "better": []}
    for axis, table in axes.items():
        for stratum in table["strata"]:
            change: dict[str, Any] | None = stratum["models"][final]["change"]
            if change is None:
                continue
            if way := shown_direction(change):
                named: dict[str, Any] = {"axis": axis, "stratum": stratum["stratum"], "n": stratum["n"], **change}
                found["better" if way > 0 else "worse"].append(named)
    return {"axes": axes, **found}


def shown_direction(comparison: dict[str, Any]) -> int:
    """1 better, -1 worse, 0 not shown: the interval excludes 0 and p, corrected where it was, is below 0.05."""
    low, high = comparison["ci95"]
    if comparison.get("p_holm", comparison["p"]) >= LEVEL:
        return 0
    return int(low > 0) - int(high < 0)


def correct_family(comparisons: Sequence[dict[str, Any]]) -> None:
    """Writes "p_holm" into comparisons that were asked as one family."""
    for comparison, p in zip(comparisons, holm([item["p"] for item in comparisons]), strict=True):
        comparison["p_holm"] = p


def paired_difference(
    first: NDArray[np.bool_], second: NDArray[np.bool_], values: Floats, rows: Ints, bootstrap: PatientBootstrap
) -> dict[str, Any]:
    """{"difference", "ci95", "p"} of two models' accuracies on some questions.

    Args:
        first, second: bool (Q,), right answers.
        values: float64 (1 + B,), the difference of accuracies in the sample and in every resample.
        rows: the questions meant.
        bootstrap: of all Q.
    """
    own = np.zeros((bootstrap.n_patients,), np.int64)
    np.add.at(own, bootstrap.patients[rows], first[rows].astype(np.int64) - second[rows])
    patients = len(np.unique(bootstrap.patients[rows]))
    return {"difference": float(values[0]), "ci95": difference_bounds(values, patients), "p": sign_flip_p(own)}


def _strata(scored: Scored, reference: str, bootstrap: PatientBootstrap, kept: dict[str, Ints]) -> list[dict[str, Any]]:
    if not kept:
        return []
    mask = np.zeros((len(scored), len(kept)), np.bool_)
    for column, rows in enumerate(kept.values()):
        mask[rows, column] = True
    size, n = len(kept), bootstrap.sums(np.concatenate([mask, np.ones((len(scored), 1))], axis=1))
    inside, outside = n[:, :size], n[:, size:] - n[:, :size]
    right = {model: scored.correct(model) for model in scored.models}
    sums = {
        model: bootstrap.sums(np.concatenate([mask & own[:, None], own[:, None]], axis=1))
        for model, own in right.items()
    }
    result: list[dict[str, Any]] = []
    for column, (stratum, rows) in enumerate(kept.items()):
        patients = len(np.unique(scored.patients[rows]))
        models: dict[str, Any] = {}
        for model in scored.models:
            share = _ratio(sums[model][:, column], inside[:, column])
            rest = _ratio(sums[model][:, size] - sums[model][:, column], outside[:, column])
            changed = _ratio(sums[model][:, column] - sums[reference][:, column], inside[:, column])
            models[model] = {
                "accuracy": {"value": float(share[0]), "ci95": share_bounds(share, patients)},
                "gap": _gap(share - rest, right[model], mask[:, column], bootstrap) if outside[0, column] else None,
                "change": None
                if model == reference
                else paired_difference(right[model], right[reference], changed, rows, bootstrap),
            }
        result.append({"stratum": stratum, "n": len(rows), "patients": patients, "models": models})
    return result


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def _gap(
    values: Floats, right: NDArray[np.bool_], inside: NDArray[np.bool_], bootstrap: PatientBootstrap
) -> dict[str, Any]:
    """A stratum minus everybody else: exact where each patient has one question, else of the bootstrap and normal."""
    if bootstrap.n_patients == len(right):
        others = ~inside
        return independent_difference(
            int(right[inside].sum()), int(inside.sum()), int(right[others].sum()), int(others.sum())
        )
    error = float(np.nanstd(values[1:])) if len(values) > 1 else 0.0
    p = math.erfc(abs(float(values[0])) / error / math.sqrt(2)) if error > 0 else 1.0
    return {"difference": float(values[0]), "ci95": bounds(values), "p": p}


def _measure(scored: Scored, reference: str, final: str) -> Ints:
    """int64 (Q,): what is averaged: final minus reference, or final alone where both are one model."""
    right = scored.correct(final).astype(np.int64)
    return right if final == reference else right - scored.correct(reference)


def leave_one_out(
    scored: Scored, reference: str, final: str, bootstrap: PatientBootstrap, min_cell: int, axis: str = "site"
) -> dict[str, Any] | None:
    """The difference final − reference without each site, and which site moves it most.

    Returns:
        None where fewer than two sites may be reported; else {"measure": "difference" or, where both are one model,
        "accuracy"; "all": {"value", "ci95"}; "without": a list of {"left_out", "n", "patients" (both of the site),
        "value", "ci95", "influence" (without it minus all)}; "largest": the site with the largest influence}.
    """
    kept, _ = reported(scored.strata.get(axis, ()), scored.patients, min_cell)
    if len(kept) < 2:
        return None
    measure = _measure(scored, reference, final)
    left = np.ones((len(scored), len(kept) + 1), np.int64)  # the last column leaves nobody out
    for column, rows in enumerate(kept.values()):
        left[rows, column] = 0
    values = bootstrap.ratios(left * measure[:, None], left)
    without: list[dict[str, Any]] = [
        {
            "left_out": site,
            "n": len(rows),
            "patients": len(np.unique(scored.patients[rows])),
            "value": float(values[0, column]),
            "ci95": bounds(values[:, column]),
            "influence": float(values[0, column] - values[0, -1]),
        }
        for column, (site, rows) in enumerate(kept.items())
    ]
    return {
        "measure": "accuracy" if final == reference else "difference",
        "all": {"value": float(values[0, -1]), "ci95": bounds(values[:, -1])},
        "without": without,
        "largest": max(without, key=lambda row: abs(row["influence"]))["left_out"],
    }


def cross_validation(
    scored: Scored, reference: str, final: str, bootstrap: PatientBootstrap, min_cell: int
) -> dict[str, Any]:
    """How well each subgroup's difference is foretold by everybody else's: the strata of an axis as held-out folds.

    No model is trained again. What is validated is the statement "final is d points better than reference": for every
    stratum, d is estimated from all *other* questions and compared with what is found in the stratum. Where the root
    mean square of these errors is about what sampling alone would give, one figure stands for all subgroups of the
    axis; where it is much larger, it does not.

    Returns:
        axis → {"measure", "folds": a list of {"stratum", "n", "held_out", "rest", "error" (held out minus rest)}, "low"
        and "high" (the least and the most of "held_out"), "rmse" (errors weighted by n), "rmse_by_chance" (the same of
        the errors' standard errors), "p" (Cochran's Q: all strata have one difference)}; only axes of two or more
        strata that may be reported.
    """
    measure = _measure(scored, reference, final)
    result: dict[str, Any] = {}
    for axis, labels in scored.strata.items():
        kept, _ = reported(labels, scored.patients, min_cell)
        if len(kept) < 2:
            continue
        mask = np.zeros((len(scored), len(kept)), np.int64)
        for column, rows in enumerate(kept.values()):
            mask[rows, column] = 1
        inside = bootstrap.ratios(mask * measure[:, None], mask)
        outside = bootstrap.ratios((1 - mask) * measure[:, None], 1 - mask)
        error, n = inside - outside, mask.sum(axis=0).astype(np.float64)
        result[axis] = {
            "measure": "accuracy" if final == reference else "difference",
            "folds": [
                {
                    "stratum": stratum,
                    "n": len(rows),
                    "held_out": float(inside[0, column]),
                    "rest": float(outside[0, column]),
                    "error": float(error[0, column]),
                }
                for column, (stratum, rows) in enumerate(kept.items())
            ],
            "low": float(inside[0].min()),
            "high": float(inside[0].max()),
            "rmse": math.sqrt(float(n @ error[0] ** 2) / float(n.sum())),
            "rmse_by_chance": math.sqrt(float(n @ np.nanvar(error[1:], axis=0)) / float(n.sum())),
            "p": _cochran(inside[0], np.nanvar(inside[1:], axis=0)),
        }
    return result


def _cochran(values: Floats, variances: Floats) -> float | None:
    """p of all values being one, given their variances; None where one has none."""
    if np.any(variances <= 0):
        return None
    weights = 1 / variances
    middle = float(weights @ values) / float(weights.sum())
    return chi_square_tail(float(weights @ (values - middle) ** 2), len(values) - 1)
