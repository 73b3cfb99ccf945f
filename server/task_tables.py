"""The tasks of a run's evaluation as rows of the report, and as lines of a terminal.

Run by the coordinator. Enters: evaluation.json's "tasks" and "all_tasks" (common/task_sums.py). Leaves: text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..common.event_sums import BINS
from ..common.findings import p_value, percent, points
from ..common.task_sums import compared
from .evaluate import LABELS, interval


def task(told: Mapping[str, Any]) -> dict[str, Any]:
    """One task as the page tells it: findings, rows of models, rows of subgroups."""
    if "models" not in told:  # of too few patients
        return {**told, "rows": [], "axes": {}}
    pairs = {pair["against"]: pair for pair in told["paired"]}
    rows: list[dict[str, Any]] = []
    for name, figures in told["models"].items():
        pair, event = pairs.get(name), figures.get("event")
        rows.append(
            {
                "label": LABELS.get(name, name),
                "main": name == told["final"],
                "accuracy": _with_bounds(figures["accuracy"]),
                "balanced": _with_bounds(figures["balanced_accuracy"]) if "balanced_accuracy" in figures else ("", ""),
                "auroc": _area(event["auroc"]) if event else None,
                "brier": f"{event['brier']['value']:.3f}" if event else "",
                "final_minus": _difference(pair) if pair else ("", ""),
            }
        )
    tables: Mapping[str, Any] = told["subgroups"]["axes"]
    return {
        **told,
        "rows": rows,
        "axes": {axis: [_subgroup(row) for row in table["strata"]] for axis, table in tables.items()},
        "hidden": {axis: table["hidden_patients"] for axis, table in tables.items()},
        "before": LABELS.get(told["reference"], told["reference"]),
        "balanced": "balanced_accuracy" in told["models"][told["final"]],
        "ranked": rows[0]["auroc"] is not None,
        "bins": BINS,
    }


def lines(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Every task's name and what was found, then all tasks together."""
    for told in evaluation.get("tasks", ()):
        yield f"{told['name']}: {told['n']:,} questions of {told['patients']:,} patients"
        for finding in told["findings"]:
            yield f"  {finding}"
    if "tasks_unreadable" in evaluation:
        yield f"the tasks have no result: {evaluation['tasks_unreadable']}"
    if together := all_tasks(evaluation):
        yield together


def all_tasks(evaluation: Mapping[str, Any]) -> str:
    """All tasks together in sentences; empty where there is one task only, or none."""
    told = evaluation.get("all_tasks")
    if told is None:
        return ""
    found = " ".join(compared(pair, told["n"]) for pair in told["paired"])
    return f"All tasks together, {told['n']:,} questions of {told['patients']:,} patients: {found}"


def _subgroup(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **row,
        "accuracy": _with_bounds(row["accuracy"]),
        "gap": _difference(row["gap"]) if row["gap"] else ("", ""),
        "change": _difference(row["change"]),
    }


def _area(figure: Mapping[str, Any]) -> tuple[str, str]:
    low, high = figure["ci95"]
    return f"{figure['value']:.3f}", f"{low:.3f} to {high:.3f}"


def _with_bounds(figure: Mapping[str, Any]) -> tuple[str, str]:
    return percent(figure["value"]), interval(figure["ci95"])


def _difference(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """The difference in points; its interval and p, the corrected one where there is one."""
    low, high = (points(bound) for bound in comparison["ci95"])
    p = p_value(comparison.get("p_holm", comparison["p"]))
    return points(comparison["difference"]), f"{low} to {high}, {p}"
