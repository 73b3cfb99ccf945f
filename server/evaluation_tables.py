"""One task's part of an evaluation's report: its figures as rows of text and plots, ready for the template.

Role: where an evaluation's files are read. Pure. Enters: a task of evaluation.json (common/evaluation_file.py). Leaves:
values that evaluation.html.j2 puts into tables; the template escapes every one. Nothing is computed anew: what is shown
as better or worse is what common/subgroups.py calls so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..common.findings import p_value, percent, points
from ..common.scored import MAJORITY
from ..common.subgroups import shown_direction
from . import plots
from .evaluate import interval
from .evaluation_plots import difference_axis, difference_scale, difference_strip, reliability_diagram
from .report import unbroken

MOST_TARGETS = 40  # more targets than this are not drawn; evaluation.json has them
LETTERS = "ABCDEFGHIJ"
_NAMES = {MAJORITY: "majority option", "chance": "chance"}
_TABULAR = ("logistic regression", "gradient boosting")


def label(model: str) -> str:
    """A model as the report calls it."""
    return _NAMES.get(model, model)


def role(model: str, task: Mapping[str, Any]) -> str:
    """The CSS class of a model: what it is in this task, never its name."""
    if model == task["final"]:
        return "final"
    return "base" if model == task["reference"] else "majority" if model == MAJORITY else "other"


def what_it_is(model: str, task: Mapping[str, Any]) -> str:
    """A model's part in the comparison, in words; "" where its name says all."""
    trained = [name for name in task["models"] if name.startswith(("local", "central"))]
    if model == task["final"]:
        return "evaluated; trained by all sites together" if trained else "evaluated"
    if model == task["reference"]:
        return "reference"
    if model.startswith("local"):
        return "trained on one site's patients only"
    if model.startswith("central"):
        return "trained on all patients in one place"
    return "on the same masked inputs, as a table" if model in _TABULAR else ""


def number(figure: Mapping[str, Any] | None, digits: int = 3) -> tuple[str, str]:
    """A figure that is no share, and its interval; empty where it cannot be had.

    >>> number({"value": 0.7123, "ci95": [0.65, 0.77]})
    ('0.712', '0.650 to 0.770')
    """
    if figure is None:
        return "", ""
    low, high = figure["ci95"]
    return f"{figure['value']:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"


def calibration(figure: Mapping[str, Any] | None) -> tuple[str, str]:
    """A calibration error with its interval, and what chance alone would give."""
    value, bounds = number(figure)
    return value, "" if figure is None else f"{bounds}\nby chance {figure['by_chance']:.3f}"


def share(figure: Mapping[str, Any] | None) -> tuple[str, str]:
    """A share and its interval in percent; empty where it cannot be had."""
    return ("", "") if figure is None else (percent(figure["value"]), interval(figure["ci95"]).removesuffix(" %"))


def difference(item: Mapping[str, Any] | None) -> tuple[str, str]:
    """A difference in points with its p (corrected where it is), and its interval; empty where there is none."""
    if item is None:
        return "", ""
    low, high = (points(bound) for bound in item["ci95"])
    return f"{points(item['difference'])}, {p_value(item.get('p_holm', item['p']))}", f"{low} to {high}"


def pair_of(task: Mapping[str, Any], model: str, against: str) -> Mapping[str, Any] | None:
    """The paired comparison of two models; None where it was not made."""
    return next((pair for pair in task["paired"] if (pair["model"], pair["against"]) == (model, against)), None)


def view(task: Mapping[str, Any], title: str) -> dict[str, Any]:
    """Everything that the template shows of one task."""
    by_target = task["by_target"]["rows"]
    same = task["final"] == task["reference"]
    return {
        "name": task["name"],
        "title": title,
        "n": task["n"],
        "patients": task["patients"],
        "reference": task["reference"],
        "final": task["final"],
        "same": same,
        "min_cell": task["min_cell"],
        "bootstrap": task["bootstrap"],
        "findings": [unbroken(finding) for finding in task["findings"]],
        "models": _models(task),
        "events": _events(task),
        "against": _against(task),
        "sections": None if same else _forest(task["by_section"]["rows"]),
        "targets": None if same or len(by_target) > MOST_TARGETS else _forest(by_target),
        "many_targets": len(by_target) if len(by_target) > MOST_TARGETS else 0,
        "diagrams": list(_diagrams(task)),
        "axes": _axes(task),
        "sites": _sites(task),
        "folds": _folds(task),
        "position": _position(task),
        "position_rule": task["position"]["rule"],
        "power": unbroken(task["power"]["sentence"]),
        "hidden": list(_hidden(task)),
    }


def _models(task: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the table of all models; columns that nobody has are named in "without"."""
    told: Mapping[str, Any] = {**task["models"], MAJORITY: task["majority"]}
    bounds = [bound for one in told.values() for bound in one["accuracy"]["ci95"]]
    scale, rows = plots.share_scale([*bounds, task["chance"]]), []
    for model, one in told.items():
        series = role(model, task)
        mark = (series, one["accuracy"]["value"], *one["accuracy"]["ci95"])
        rows.append(
            {
                "label": label(model),
                "note": what_it_is(model, task),
                "key": plots.marker_key(series),
                "main": model == task["final"],
                "accuracy": share(one["accuracy"]),
                "strip": plots.interval_strip([mark], scale, task["chance"]),
                "balanced": share(one["balanced_accuracy"]),
                "difference": difference(pair_of(task, model, task["reference"])),
                "brier": number(one.get("brier")),
                "ece": calibration(one.get("ece")),
                "forced": share(one.get("fallback_rate")),
                "length": number(one.get("mean_length"), 1),
            }
        )
    shown = [key for key in ("difference", "brier", "ece", "forced", "length") if any(row[key][0] for row in rows)]
    return {"rows": rows, "axis": plots.axis(scale), "chance": percent(task["chance"]), "shown": shown}


def _events(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of an outcome's probabilities; empty where no event is reported."""
    rows: list[dict[str, Any]] = []
    for model, one in task["models"].items():
        if (event := one["event"]) is None:
            continue
        change = (pair_of(task, model, task["reference"]) or {}).get("auroc")
        figures = {key: number(event[key]) for key in ("auroc", "auprc", "brier")}
        rows.append(
            {
                "label": label(model),
                "key": plots.marker_key(role(model, task)),
                "main": model == task["final"],
                "n": event["n"],
                "events": event["events"],
                **figures,
                "ece": calibration(event["ece"]),
                "change": signed(change),
            }
        )
    return rows


def signed(item: Mapping[str, Any] | None) -> tuple[str, str]:
    """A difference that is of no shares, with a sign, and its interval.

    >>> signed({"difference": -0.0512, "ci95": [-0.1, 0.01]})
    ('−0.051', '−0.100 to +0.010')
    """
    if item is None:
        return "", ""
    value, low, high = (f"{x:+.3f}".replace("-", "−") for x in (item["difference"], *item["ci95"]))
    return value, f"{low} to {high}"


def _rows_of_forest(items: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """Forest rows of (what else is shown, a difference), all on one scale, with the axis."""
    scale = difference_scale([bound for _, item in items for bound in (item["difference"], *item["ci95"])])
    rows = [
        {
            **more,
            "way": (way := shown_direction(dict(item))),
            "strip": difference_strip(item["difference"], item["ci95"], scale, way),
            "difference": difference(item),
        }
        for more, item in items
    ]
    return {"rows": rows, "axis": difference_axis(scale)}


def _against(task: Mapping[str, Any]) -> dict[str, Any]:
    """The final model minus every other one."""
    items = [
        (
            {"label": label(pair["against"]), "note": what_it_is(pair["against"], task)},
            pair,
        )
        for pair in task["paired"]
        if pair["model"] == task["final"]
    ]
    return _rows_of_forest(items)


def _forest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The difference in each target or section; None where there are not two."""
    items = [
        ({key: row[key] for key in ("name", "section", "n", "patients", "chance", "accuracy")}, row["difference"])
        for row in rows
        if row["difference"] is not None
    ]
    return _rows_of_forest(items) if len(items) > 1 else None


def _diagrams(task: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Reliability diagrams: of the chosen option, and of an outcome's event."""
    both = [("base", task["reference"]), ("final", task["final"])]
    if task["reference"] == task["final"]:
        both = both[1:]
    for kind in ("chosen", "event"):
        series = []
        for name, model in both:
            one = task["models"][model]
            bins = one["reliability"] if kind == "chosen" else (one["event"] or {}).get("reliability")
            if bins:
                series.append((name, model, bins))
        if not series:
            continue
        of = "the chosen option" if kind == "chosen" else "the event"
        said = "; ".join(
            f"{model}: "
            + ", ".join(f"given {percent(p['predicted'])}, observed {percent(p['observed'])}" for p in bins)
            for _, model, bins in series
        )
        yield {
            "kind": kind,
            "svg": reliability_diagram([(name, bins) for name, _, bins in series], f"Reliability of {of}. {said}."),
            "legend": [(plots.marker_key(name), model) for name, model, _ in series],
        }


def _points_in_words(bins: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"given {percent(point['predicted'])}, observed {percent(point['observed'])}" for point in bins)


def _axes(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Subgroups: the final model's accuracy, its gap to everybody else, and its change against the reference.

    All axes are on one scale, so that they can be compared.
    """
    final, reference = task["final"], task["reference"]
    tables = {axis: table["strata"] for axis, table in task["subgroups"]["axes"].items() if table["strata"]}
    changes = [stratum["models"][final]["change"] for strata in tables.values() for stratum in strata]
    scale = difference_scale([x for item in changes if item is not None for x in (item["difference"], *item["ci95"])])
    axes: list[dict[str, Any]] = []
    for axis, strata in tables.items():
        rows: list[dict[str, Any]] = []
        for stratum in strata:
            own = stratum["models"][final]
            change, way, strip = own["change"], 0, ""
            if change is not None:
                way = shown_direction(change)
                strip = difference_strip(change["difference"], change["ci95"], scale, way)
            rows.append(
                {
                    "stratum": stratum["stratum"],
                    "n": stratum["n"],
                    "patients": stratum["patients"],
                    "accuracy": share(own["accuracy"]),
                    "before": "" if final == reference else percent(stratum["models"][reference]["accuracy"]["value"]),
                    "gap": difference(own["gap"]),
                    "served_worse": own["gap"] is not None and shown_direction(own["gap"]) < 0,
                    "change": difference(change),
                    "way": way,
                    "strip": strip,
                }
            )
        axes.append({"axis": axis, "rows": rows, "heading": "" if final == reference else difference_axis(scale)})
    return axes


def _sites(task: Mapping[str, Any]) -> dict[str, Any] | None:
    """The measure without each site."""
    left = task["leave_one_site_out"]
    if left is None:
        return None
    told = points if left["measure"] == "difference" else percent

    def text(row: Mapping[str, Any]) -> tuple[str, str]:
        low, high = (told(bound) for bound in row["ci95"])
        return told(row["value"]), f"{low} to {high}"

    rows = [
        {
            "site": row["left_out"],
            "n": row["n"],
            "patients": row["patients"],
            "value": text(row),
            "influence": points(row["influence"]),
            "largest": row["left_out"] == left["largest"],
        }
        for row in left["without"]
    ]
    return {"measure": left["measure"], "all": text(left["all"]), "rows": rows}


def _folds(task: Mapping[str, Any]) -> list[dict[str, str]]:
    """Cross-validation over strata, one row an axis."""
    rows: list[dict[str, str]] = []
    for axis, found in task["cross_validation"].items():
        told = points if found["measure"] == "difference" else percent
        rows.append(
            {
                "axis": axis,
                "range": f"{told(found['low'])} to {told(found['high'])}",
                "rmse": f"{100 * found['rmse']:.1f}",
                "by_chance": f"{100 * found['rmse_by_chance']:.1f}",
                "p": "" if found["p"] is None else p_value(found["p"]),
            }
        )
    return rows


def _position(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Choices by letter and what another order of the options changed, one row a model and number of options."""
    rows: list[dict[str, Any]] = []
    for model, told in task["position"]["models"].items():
        moved = told["permuted"]
        effects = {} if moved is None else {item["n_options"]: item["letter_effect"] for item in moved["by_options"]}
        for first, choices in enumerate(told["by_options"]):
            effect = effects.get(choices["n_options"])
            rows.append(
                {
                    "label": label(model) if first == 0 else "",
                    "flagged": told["flagged"] if first == 0 else False,
                    "n_options": choices["n_options"],
                    "n": choices["n"],
                    "chosen": _by_letter(choices["chosen"]),
                    "truth": _by_letter(choices["truth"]),
                    "p": "" if choices["p_holm"] is None else p_value(choices["p_holm"]),
                    "fixed": choices["fixed_order"],
                    "effect": _by_letter_signed(effect),
                    "same": share(moved["same"]) if moved is not None and first == 0 else ("", ""),
                    "change": difference(moved["accuracy_change"]) if moved is not None and first == 0 else ("", ""),
                }
            )
    return rows


def _by_letter(shares: Sequence[float]) -> str:
    return " ".join(f"{letter} {100 * part:.0f}" for letter, part in zip(LETTERS, shares, strict=False))


def _by_letter_signed(effect: Sequence[float] | None) -> str:
    return " ".join(f"{letter} {points(value)}" for letter, value in zip(LETTERS, effect or (), strict=False))


def _hidden(task: Mapping[str, Any]) -> Iterator[str]:
    """What is not reported on its own, and why, in sentences."""
    groups = {"targets": task["by_target"]["hidden"], "sections": task["by_section"]["hidden"]}
    groups |= {f"subgroups by {axis}": table["hidden"] for axis, table in task["subgroups"]["axes"].items()}
    for noun, hidden in groups.items():
        if hidden is None:
            continue
        asked = f"{hidden['n']:,} questions about {hidden['patients']:,} patients"
        if hidden["labels"]:
            named = ", ".join(hidden["labels"])
            yield (
                f"{noun}: {named} ({asked}, those of unknown group included): fewer than {task['min_cell']} patients, "
                "or left out so that such a group does not follow from the rest."
            )
        else:
            yield f"{noun}: {asked} whose group is not known are in no row."
    if any(model["reliability"] is None for model in task["models"].values()):
        silent = ", ".join(label(name) for name, model in task["models"].items() if model["reliability"] is None)
        yield f"calibration of {silent}: no probabilities are known."
    if task["leave_one_site_out"] is None:
        yield "leave one site out: fewer than two sites can be reported."
