"""The pooled result of the held-out evaluation: evaluation.json, the table on the terminal, the result in words.

Run by the coordinator. Enters: the sum of the sites' tallies (common/statistics.py): counts, no question. Leaves:
evaluation.json and the report. Test patients are scored once, at the end of a run; settings are chosen on validation
patients. Private: what counts say about few patients; nothing here adds noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import ProtocolError
from ..common.files import write_atomic
from ..common.findings import p_value, percent, points
from ..common.statistics import Tally, summarise

if TYPE_CHECKING:
    from rich.table import Table

MODELS = ("base", "warmup", "final")  # the order of a run's tally
LABELS = {"base": "base", "warmup": "warmed up", "final": "final", "majority": "majority option", "chance": "chance"}


def evaluate(tally: Tally, sites: int, sections: Mapping[str, str], n_bootstrap: int, seed: int) -> dict[str, Any]:
    """The content of evaluation.json from the sum of the sites' tallies; `sections` maps each target to its section."""
    return {**summarise(tally, sections, n_bootstrap, seed), "sites": sites}


def write_evaluation(path: Path, evaluation: Mapping[str, Any]) -> None:
    """Writes evaluation.json, whole or not at all."""
    text = json.dumps(evaluation, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode(), mode=0o644)


def read_samples(text: str, site: str, most: int) -> list[dict[str, Any]]:
    """A site's sample questions, as the report shows them.

    Args:
        text: JSON from the site's reply.
        site: who sent it.
        most: how many a site may send; 0 where the registry is not open.

    Raises:
        ProtocolError: not what a site sends.
    """
    try:
        samples = json.loads(text)
        if not isinstance(samples, list) or len(samples) > most:
            raise ValueError
        return [_sample(item, site) for item in samples]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ProtocolError(f"samples of {site}: expected at most {most} questions with their answers") from None


def _sample(item: Mapping[str, Any], site: str) -> dict[str, Any]:
    """One sample with its known keys only, every value a text."""
    answers = {
        model: {key: _text(item["models"][model][key]) for key in ("chosen", "text")} for model in ("base", "final")
    }
    about = {key: _text(item[key]) for key in ("target", "section", "text", "answer")}
    return {"site": site, **about, "options": [_text(option) for option in item["options"]], "models": answers}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def interval(bounds: Sequence[float]) -> str:
    """Bounds of a share in percent.

    >>> interval([0.381, 0.456])
    '38.1 to 45.6 %'
    """
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def compared(comparison: Mapping[str, Any]) -> tuple[str, str]:
    """A paired difference with its p-value, and its interval; in points."""
    low, high = (points(bound) for bound in comparison["ci95"])
    return f"{points(comparison['difference'])}, {p_value(comparison['mcnemar_p'])}", f"{low} to {high}"


def table(evaluation: Mapping[str, Any]) -> Table:
    """Base, warmed up, final, majority and chance with 95 % intervals, as a table for a terminal of 80 columns.

    Differences are paired, in points.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    models = [name for name in MODELS if name in evaluation]
    generated = any(evaluation[name]["box_rate"] is not None for name in models)
    earlier_models = [name for name in ("base", "warmup") if name in evaluation]
    grid = Table(title=f"Held-out test patients: {evaluation['n']:,} questions", box=SIMPLE_HEAD, pad_edge=False)
    grid.title_justify = "left"
    grid.add_column("model", no_wrap=True)
    differences = [f"− {LABELS[earlier]}" for earlier in earlier_models]
    for heading in ("accuracy, %", *differences, *(("boxed", "tokens") if generated else ())):
        grid.add_column(heading, justify="right", no_wrap=True)
    for name in rows_of(evaluation):
        if name == "chance":
            grid.add_row(LABELS[name], f"{100 * evaluation['chance']:.1f}")
            continue
        row = evaluation[name]
        cells = [f"{100 * row['accuracy']:.1f}\n{interval(row['ci95']).removesuffix(' %')}"]
        for earlier in earlier_models:
            pair = f"{name}-{earlier}"
            cells.append("\n".join(compared(evaluation["paired"][pair])) if pair in evaluation["paired"] else "")
        if generated and name in models:
            boxed = "" if row["box_rate"] is None else percent(row["box_rate"])
            cells += [boxed, f"{row['mean_length']:.1f}"]
        grid.add_row(LABELS[name], *cells)
    return grid


def without_warmup(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The evaluation of a run whose warm-up was off: what is called warmed up there is the base model again."""
    paired = {pair: item for pair, item in evaluation["paired"].items() if "warmup" not in pair}
    left = {**{name: item for name, item in evaluation.items() if name != "warmup"}, "paired": paired}
    if "tasks" not in left:
        return left
    together = left["all_tasks"]
    return {
        **left,
        "tasks": [_without_warmup(told) for told in left["tasks"]],
        "all_tasks": None if together is None else _without_warmup(together),
    }


def _without_warmup(told: Mapping[str, Any]) -> dict[str, Any]:
    if "models" not in told:  # of too few patients
        return dict(told)
    models = {name: figures for name, figures in told["models"].items() if name != "warmup"}
    return {**told, "models": models, "paired": [pair for pair in told["paired"] if pair["against"] != "warmup"]}


def rows_of(evaluation: Mapping[str, Any]) -> list[str]:
    """The rows of a result table, in order: models, majority option, chance."""
    return [name for name in (*MODELS, "majority", "chance") if name in evaluation]


def shown(comparison: Mapping[str, Any]) -> int:
    """Whether a paired difference is shown: 1 better, −1 worse, 0 neither.

    Only where both say so that stand beside it: the bootstrap interval leaves 0 out, and McNemar's p < 0.05. With few
    differing answers the interval alone is too quick: 4 against 0 is p = 0.12.
    """
    low, high = comparison["ci95"]
    if comparison["mcnemar_p"] >= 0.05:
        return 0
    return int(low > 0) - int(high < 0)


def verdict(evaluation: Mapping[str, Any]) -> str:
    """What the rounds added, or that nothing measurable was added; one sentence and its figures."""
    before = "warmup" if "warmup" in evaluation else "base"
    name, n = {"warmup": "warmed-up", "base": "base"}[before], evaluation["n"]
    comparison = evaluation["paired"][f"final-{before}"]
    low, high = comparison["ci95"]
    noised = bool(evaluation.get("noise"))
    asked = f"n {'≈' if noised else '='} {n:,}"
    figures = f"95 % interval {points(low)} to {points(high)}, {p_value(comparison['mcnemar_p'])}, {asked}"
    size = f"{100 * abs(comparison['difference']):.1f} points"
    if shown(comparison) > 0:
        return f"The rounds raised accuracy over the {name} model by {size} ({figures})."
    if shown(comparison) < 0:
        return f"The rounds lowered accuracy below the {name} model's by {size} ({figures}): keep the {name} model."
    if comparison["only_later"] == comparison["only_earlier"] == 0 and not noised:
        return f"The rounds changed no result: final and {name} model were right on the same {n:,} questions."
    return (
        f"Final and {name} model cannot be told apart: these rounds added nothing that {asked} can show "
        f"({points(comparison['difference'])} points, {figures}). An evaluation of this size misses a true difference "
        f"under {100 * comparison['detectable']:.1f} points more than one time in five."
    )


def baselines(evaluation: Mapping[str, Any]) -> str:
    """How the final model stands against chance and against always choosing the most frequent option; one sentence."""
    (low, high), chance = evaluation["final"]["ci95"], evaluation["chance"]
    if low > chance:
        against_chance = f"The final model is above chance ({percent(chance)})"
    elif high < chance:
        against_chance = f"The final model is below chance ({percent(chance)})"
    else:
        against_chance = f"The final model cannot be told from chance ({percent(chance)})"
    comparison = evaluation["paired"]["final-majority"]
    low, high = (points(bound) for bound in comparison["ci95"])
    figures = f"{points(comparison['difference'])} points, {low} to {high}, {p_value(comparison['mcnemar_p'])}"
    if shown(comparison) > 0:
        return f"{against_chance} and is better than always choosing the most frequent option ({figures})."
    if shown(comparison) < 0:
        return f"{against_chance} and is worse than always choosing the most frequent option ({figures})."
    return f"{against_chance}; it cannot be told from always choosing the most frequent option ({figures})."
