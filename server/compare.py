"""Two evaluations beside each other: `wardround evaluate --compare A B`.

Role: wherever two evaluation.json lie. Pure. Enters: their contents, of one schema version (`read_evaluation` refuses
others). Leaves: the accuracies of every model that both know in every task that both asked, and an unpaired difference.

evaluation.json holds figures and no answers, so that two of them cannot be paired even where both asked the very same
questions. The interval of B − A is put together from those of A and B (Newcombe 1998, method 10; Zou and Donner 2008,
"MOVER"; where both are symmetric it is the normal interval of two independent shares), as if they had nothing in
common. On the same questions or patients it is too wide: models are right on the same easy questions. Score both models
in one evaluation (`--beside NAME=MODEL`) to pair them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..common.findings import points
from .evaluation_report import task_facts

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def compare(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """What two evaluations have in common, and how it differs.

    Args:
        a, b: contents of two evaluation.json.

    Returns:
        "tasks": of both, in the order of A: {"name", "title", "n" and "patients" ([of A, of B]), "same_questions"
        (True, False, or None where one does not say), "note", "rows": {"model", "measure" ("accuracy" or "auroc"),
        "a", "b" ({"value", "ci95"}), "difference", "ci95", "shown" (1, −1 or 0)}, "only_a", "only_b": models of one
        only}; "only_a", "only_b": tasks of one only. A row is a model of this name in both, which need not be one and
        the same model.
    """
    mine, other = ({task["name"]: task for task in content["tasks"]} for content in (a, b))
    tasks: list[dict[str, Any]] = []
    for name, first in mine.items():
        if name not in other:
            continue
        second, same = other[name], same_questions(a, b, name)
        tasks.append(
            {
                "name": name,
                "title": str(task_facts(a, name).get("title") or name),
                "n": [first["n"], second["n"]],
                "patients": [first["patients"], second["patients"]],
                "same_questions": same,
                "note": _note(same),
                "rows": _rows(first, second),
                "only_a": [model for model in first["models"] if model not in second["models"]],
                "only_b": [model for model in second["models"] if model not in first["models"]],
            }
        )
    return {
        "tasks": tasks,
        "only_a": [name for name in mine if name not in other],
        "only_b": [name for name in other if name not in mine],
    }


def same_questions(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> bool | None:
    """Whether both asked the same questions in a task; None where one of both does not say what it asked."""
    digests = [task_facts(content, name).get("questions_digest") for content in (a, b)]
    return None if None in digests else digests[0] == digests[1]


def _note(same: bool | None) -> str:
    if same:
        return (
            "The same questions in both. Summaries cannot be paired, so the interval is one for independent "
            "evaluations and too wide: a difference that it does not show may be there."
        )
    if same is None:
        return "One of both does not say which questions it asked: taken as independent."
    return "Other questions in each: taken as independent; too wide where patients are the same."


def _rows(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for model, told in first["models"].items():
        if model not in second["models"]:
            continue
        beside = second["models"][model]
        rows.append(_row(model, "accuracy", told["accuracy"], beside["accuracy"]))
        if told["event"] is not None and beside["event"] is not None:
            rows.append(_row(model, "auroc", told["event"]["auroc"], beside["event"]["auroc"]))
    return rows


def _row(model: str, measure: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    low, high = unpaired_interval(a, b)
    return {
        "model": model,
        "measure": measure,
        "a": {"value": a["value"], "ci95": list(a["ci95"])},
        "b": {"value": b["value"], "ci95": list(b["ci95"])},
        "difference": b["value"] - a["value"],
        "ci95": [low, high],
        "shown": int(low > 0) - int(high < 0),
    }


def unpaired_interval(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float]:
    """The 95 % interval of B − A from two independent figures' own.

    >>> a, b = {"value": 0.5, "ci95": [0.47, 0.53]}, {"value": 0.6, "ci95": [0.56, 0.64]}
    >>> [round(bound, 3) for bound in unpaired_interval(a, b)]
    [0.05, 0.15]
    """
    difference = b["value"] - a["value"]
    down = math.hypot(b["value"] - b["ci95"][0], a["ci95"][1] - a["value"])
    up = math.hypot(b["ci95"][1] - b["value"], a["value"] - a["ci95"][0])
    return difference - down, difference + up


def table(found: Mapping[str, Any], names: Sequence[str] = ("A", "B")) -> Table:
    """The comparison for a terminal of 80 columns; accuracies in percent, differences in points.

    Args:
        found: from `compare`.
        names: what to call the two.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("task and model", overflow="fold")
    for heading in (*names, f"{names[1]} − {names[0]}"):
        grid.add_column(Text(heading), justify="right", no_wrap=True)
    for task in found["tasks"]:
        grid.add_row(Text(task["title"], style="bold"), *(f"n = {n:,}" for n in task["n"]), "")
        for row in task["rows"]:
            area = row["measure"] == "auroc"
            cells = [_cell(row[side], area) for side in ("a", "b")]
            low, high = (_signed(bound, area) for bound in row["ci95"])
            mark = {1: " ▲", -1: " ▼", 0: ""}[row["shown"]]
            change = f"{_signed(row['difference'], area)}{mark}\n{low} to {high}"
            grid.add_row(Text(f"  {row['model']}{', AUROC' if area else ''}"), *cells, change)
    return grid


def _cell(figure: Mapping[str, Any], area: bool) -> str:
    low, high = figure["ci95"]
    if area:
        return f"{figure['value']:.3f}\n{low:.3f} to {high:.3f}"
    return f"{100 * figure['value']:.1f}\n{100 * low:.1f} to {100 * high:.1f}"


def _signed(value: float, area: bool) -> str:
    if not area:
        return points(value)
    text = f"{value:+.3f}".replace("-", "−")
    return "0.000" if text[1:] == "0.000" else text


def tables(found: Mapping[str, Any], first: str, second: str) -> list[Table | Text]:
    """Everything for a terminal: which is A and which is B, the table, and what must be known to read it.

    Args:
        found: from `compare`.
        first, second: where A and B came from, in words.
    """
    from rich.text import Text

    shown: list[Table | Text] = [Text(f"A: {first}\nB: {second}")]
    if found["tasks"]:
        shown.append(table(found))
    return [*shown, *(Text(sentence) for sentence in notes(found))]


def notes(found: Mapping[str, Any], names: Sequence[str] = ("A", "B")) -> list[str]:
    """What must be known to read the table, a sentence each."""
    sentences: list[str] = []
    told: dict[str, list[str]] = {}
    for task in found["tasks"]:
        told.setdefault(task["note"], []).append(task["name"])
    for note, tasks in told.items():
        sentences.append(f"{', '.join(tasks)}: {note}" if len(told) > 1 else note)
    if not found["tasks"]:
        sentences.append("No task was asked in both.")
    for side, name in zip(("only_a", "only_b"), names, strict=True):
        if found[side]:
            sentences.append(f"Only in {name}: {', '.join(found[side])}.")
        models = list(dict.fromkeys(model for task in found["tasks"] for model in task[side]))
        if models:
            sentences.append(f"Models only in {name}: {', '.join(models)}.")
    if found["tasks"]:
        sentences.append(
            "▲ and ▼: the unpaired 95 % interval leaves 0 out; not corrected for how many are compared. Models are "
            "matched by name."
        )
    return sentences
