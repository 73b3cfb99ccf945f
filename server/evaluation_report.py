"""report.html of an evaluation: one self-contained page with what was found, the tables and the plots.

Role: where an evaluation ran, at the end of `wardround evaluate`, and wherever evaluation.json lies. Enters: content of
evaluation.json, and where the registry is open, questions side by side (common/contrast.py). Leaves: the page. Private:
as private as the figures; the questions that may be shown with them are patients' records, so whoever calls this gives
them for open and synthetic registries only.

Deterministic: the page holds no time of day. Every value is escaped: names of models, features and strata are a user's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.files import write_atomic
from ..common.findings import auroc, p_value, percent, points
from ..common.scored import MAJORITY
from ..common.subgroups import shown_direction
from . import evaluate, plots
from .evaluation_plots import difference_axis, difference_scale, difference_strip, way_key
from .evaluation_tables import LETTERS, MOST_TARGETS, difference, label, number, pair_of, role, share, view
from .report import environment, unbroken

_MOST_OTHERS = 3  # models beside reference and final in the table of all tasks; the rest stand in each task's own
_MOST_SHOWN = 10  # questions gained, and questions lost, that are shown of a task
_FLAGS = {
    "contradicts_record": "contradicts the record",
    "invented_value": "invented a value",
    "answer_does_not_follow": "answer does not follow",
    "leaked_letters": "talks of option letters",
    "no_reasoning": "no reasoning",
    "any": "any of them",
}
_PEOPLE = {"people": "Experts", "judges": "Programs as judges (never mixed with people)"}


def write_evaluation_report(
    out: Path,
    evaluation: Mapping[str, Any],
    *,
    contrasts: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Path:
    """Writes the page, whole or not at all, and returns its path.

    Args:
        out: report.html.
        evaluation: content of evaluation.json, as `common.evaluation_file.evaluation` or `read_evaluation` gives it.
        contrasts: what was asked (a registry or task) → `common.contrast.rows` of questions gained and lost; open
            registries only.
    """
    tasks = evaluation["tasks"]
    page = environment().get_template("evaluation.html.j2")
    text = page.render(
        title=title(evaluation),
        headline=unbroken(headline(tasks)),
        key_figures=_key_figures(tasks),
        found=[(_title(evaluation, task), unbroken(task["findings"][0])) for task in tasks if task["findings"]],
        warnings=[
            unbroken(sentence)
            for sentence in (*_losses(evaluation), *_behind(evaluation), *worse_at_sites(evaluation["federated"]))
        ],
        overview=_overview(evaluation),
        tasks=[view(task, _title(evaluation, task)) for task in tasks],
        most_targets=MOST_TARGETS,
        letters=LETTERS,
        reasoning=_reasoning(evaluation["reasoning"]),
        contrasts={name: _chosen(rows) for name, rows in (contrasts or {}).items() if rows},
        pair_names=(tasks[0]["reference"], tasks[0]["final"]) if tasks else ("base", "final"),
        flag_names=_FLAGS,
        review=review(evaluation["review"]),
        federated=_federated(evaluation["federated"]),
        provenance=facts(evaluation["provenance"]),
        schema=evaluation["evaluation_schema"],
        version=evaluation["wardround"],
        ways=[(way_key(way), words) for way, words in ((1, "better"), (-1, "worse"), (0, "not told apart"))],
    )
    write_atomic(out, text.encode(), mode=0o644)
    return out


def title(evaluation: Mapping[str, Any]) -> str:
    """What the page and the card are called."""
    given = evaluation["provenance"].get("title")
    if isinstance(given, str) and given:
        return given
    finals = list(dict.fromkeys(task["final"] for task in evaluation["tasks"]))
    references = [r for r in dict.fromkeys(task["reference"] for task in evaluation["tasks"]) if r not in finals]
    return ", ".join(finals) + (f" against {', '.join(references)}" if references else "") or "Evaluation"


def task_facts(evaluation: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What provenance says of a task; empty where it says nothing."""
    told = evaluation["provenance"].get("tasks")
    own = told.get(name) if isinstance(told, Mapping) else None
    return own if isinstance(own, Mapping) else {}


def _title(evaluation: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    return str(task_facts(evaluation, task["name"]).get("title") or task["name"])


def headline(tasks: Sequence[Mapping[str, Any]]) -> str:
    """The result of all tasks in one or two sentences."""
    if len(tasks) == 1 and tasks[0]["findings"]:
        return tasks[0]["findings"][0]
    ways = [shown_direction(dict(pair)) for task in tasks if (pair := _main_pair(task)) is not None]
    if not ways:
        return f"{len(tasks)} tasks were asked of one model; there is nothing to compare it with but baselines."
    better, worse = ways.count(1), ways.count(-1)
    final, reference = tasks[0]["final"], tasks[0]["reference"]
    return (
        f"Of {len(ways)} tasks, {final} is shown better than {reference} in {better} and worse in {worse}; in "
        f"{ways.count(0)} they cannot be told apart. Nothing is corrected for how many tasks were asked."
    )


def _main_pair(task: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The final model against the reference; None where both are one."""
    return pair_of(task, task["final"], task["reference"])


def _key_figures(tasks: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    models = {model for task in tasks for model in task["models"]}
    changed = [(sum(len(task["subgroups"][way]) for task in tasks), way) for way in ("worse", "better")]
    compared = any(_main_pair(task) is not None for task in tasks)
    return [
        (str(len(tasks)), "task" if len(tasks) == 1 else "tasks"),
        (f"{sum(task['n'] for task in tasks):,}", "questions"),
        (str(len(models)), "model" if len(models) == 1 else "models"),
        *((f"{n:,}", f"subgroups that got {way}") for n, way in changed if compared),
    ]


def _losses(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Where the final model is shown worse than the reference, ranks no better than guessing, or likes a letter."""
    for task in evaluation["tasks"]:
        yield from _losses_of(task, _title(evaluation, task))


def _behind(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """Which other models are shown better than the final one, in which tasks; where the usual answer does as well."""
    asked: dict[str, int] = {}
    better: dict[str, list[str]] = {}
    usual: list[str] = []
    for task in evaluation["tasks"]:
        for pair in task["paired"]:
            if (pair["model"], pair["against"]) == (task["final"], MAJORITY) and shown_direction(dict(pair)) == 0:
                usual.append(_title(evaluation, task))
            if pair["model"] != task["final"] or pair["against"] == task["reference"]:
                continue
            other = label(pair["against"])
            asked[other] = asked.get(other, 0) + 1
            if shown_direction(dict(pair)) < 0:
                better.setdefault(other, []).append(f"{_title(evaluation, task)} ({points(pair['difference'])})")
    if usual:
        yield (
            f"Always choosing the most frequent option cannot be told apart from it in {len(usual)} of "
            f"{len(evaluation['tasks'])}: {', '.join(usual)}."
        )
    for other, tasks in better.items():
        yield f"Worse than {other} in {len(tasks)} of {asked[other]}: {', '.join(tasks)}; in points."


def _losses_of(task: Mapping[str, Any], name: str) -> Iterator[str]:
    final, pair = task["final"], _main_pair(task)
    if pair is not None and shown_direction(dict(pair)) < 0:
        yield f"{name}: worse as a whole, {_in_words(pair)}."
    event = task["models"][final]["event"]
    if event is not None and event["auroc"]["ci95"][0] <= 0.5:
        found = auroc(event["auroc"])
        yield f"{name}: {final} is not shown to tell patients with the event from those without: {found}."
    for row in task["subgroups"]["worse"]:
        yield f"{name}: {row['axis']} '{row['stratum']}' got worse, {_in_words(row)}, n = {row['n']:,}."
    for key, noun in (("by_section", "section"), ("by_target", "target")):
        for row in task[key]["rows"] if len(task[key]["rows"]) > 1 else ():
            if row["difference"] is not None and shown_direction(row["difference"]) < 0:
                yield f"{name}: {noun} '{row['name']}' got worse, {_in_words(row['difference'])}, n = {row['n']:,}."
    if task["position"]["models"][final]["flagged"]:
        yield f"{name}: {final} likes a letter whatever stands there (position bias)."


def _in_words(item: Mapping[str, Any]) -> str:
    value, bounds = difference(item)
    size, p = value.split(", ")
    return f"{size} points ({bounds}, {'corrected ' if 'p_holm' in item else ''}{p})"


def _overview(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The table of all tasks: accuracy of each model, the difference, and the area under the ROC curve."""
    tasks = evaluation["tasks"]
    union = list(dict.fromkeys(model for task in tasks for model in task["models"]))
    main = list(dict.fromkeys([task["reference"] for task in tasks] + [task["final"] for task in tasks]))
    others = [model for model in union if model not in main]
    others.sort(key=lambda model: model.startswith("local"))  # the sites' own models are the first to be left out
    others, left_out = [MAJORITY, *others[:_MOST_OTHERS]], others[_MOST_OTHERS:]
    pairs = [pair for task in tasks if (pair := _main_pair(task)) is not None]
    scale = difference_scale([bound for pair in pairs for bound in (pair["difference"], *pair["ci95"])])
    rows: list[dict[str, Any]] = []
    for task in tasks:
        pair, told = _main_pair(task), {**task["models"], MAJORITY: task["majority"]}
        event = task["models"][task["final"]]["event"]
        before = task["models"][task["reference"]]["event"] if pair is not None else None
        strip, (value, bounds) = "", difference(pair)
        if pair is not None:
            strip = difference_strip(pair["difference"], pair["ci95"], scale, shown_direction(dict(pair)))
        rows.append(
            {
                "name": task["name"],
                "title": _title(evaluation, task),
                "n": task["n"],
                "patients": task["patients"],
                "chance": percent(task["chance"]),
                "main": [share(told[model]["accuracy"]) if model in told else ("–", "") for model in main],
                "others": [share(told[model]["accuracy"]) if model in told else ("–", "") for model in others],
                "difference": (value.split(", ")[0], bounds),
                "strip": strip,
                "auroc": number(None if event is None else event["auroc"], 2),
                "before": number(None if before is None else before["auroc"], 2)[0],
            }
        )
    return {
        "main": [(label(model), plots.marker_key(_role(model, tasks))) for model in main],
        "others": [(label(model), plots.marker_key(_role(model, tasks))) for model in others],
        "rows": rows,
        "axis": difference_axis(scale) if pairs else "",
        "compared": bool(pairs),
        "areas": any(row["auroc"][0] for row in rows),
        "left_out": left_out,
    }


def _role(model: str, tasks: Sequence[Mapping[str, Any]]) -> str:
    roles = {role(model, task) for task in tasks}
    return next((name for name in ("final", "base", "majority") if name in roles), "other")


def _reasoning(audit: Mapping[str, Any]) -> dict[str, Any] | None:
    """Flags of each model's reasoning, as counts and shares; by registry where the audit is told so."""
    counted: list[tuple[str, Mapping[str, Any]]] = []
    for name, told in audit.items():
        own = {name: told} if isinstance(told, Mapping) and "n" in told else told
        for model, counts in own.items() if isinstance(own, Mapping) else ():
            if isinstance(counts, Mapping) and counts.get("n"):
                counted.append((model if own is not told else f"{model}, {name}", counts))
    if not counted:
        return None
    kinds = list(dict.fromkeys(kind for _, counts in counted for kind in counts if kind != "n"))
    rows = [(name, counts["n"], [_counted(counts, kind) for kind in kinds]) for name, counts in counted]
    return {"kinds": [_FLAGS.get(kind, kind) for kind in kinds], "rows": rows}


def _counted(counts: Mapping[str, Any], kind: str) -> tuple[str, str]:
    return (f"{counts[kind]:,}", percent(counts[kind] / counts["n"])) if kind in counts else ("–", "")


def _chosen(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first questions gained and lost, and how many there are."""
    sides = {change: [row for row in rows if row["change"] == change] for change in ("gained", "lost")}
    return {change: {"n": len(found), "rows": found[:_MOST_SHOWN]} for change, found in sides.items()}


def review(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """What raters preferred, people and programs apart; None where there was no review.

    Args:
        found: `common.evaluation_file.Review`, as JSON; empty: none.
    """
    if not found:
        return None
    a, b = found["models"]
    return {
        "title": found["title"],
        "a": a,
        "b": b,
        "said": f"{found['items']:,} pairs of answers of {a} and {b}, {found['data']} records.",
        "kinds": [(words, _preferences(found[kind], a, b)) for kind, words in _PEOPLE.items() if found[kind]],
        "nobody": "" if found["people"] else "No person has rated yet.",
        "raters": [
            (f"{one['rater']}{', a program' if one['kind'] == 'judge' else ''}", f"{one['rated']} of {one['of']} rated")
            for one in found["raters"]
        ],
    }


def _preferences(said: Mapping[str, Any], a: str, b: str) -> dict[str, Any]:
    overall = said["preference"]
    sign, (bad_a, bad_b) = overall["sign_test"], said["unacceptable"]
    rows = [
        ("preferred", f"{b} {overall['b']}, {a} {overall['a']}, about equal {overall['equal']}"),
        (f"score of {b} (a tie is half)", _percent(overall["score"])),
        ("95 % interval over items", _range(overall["ci95_items"])),
        ("95 % interval over raters and items", _range(overall["ci95_raters_items"])),
        ("among decided", f"{_of(overall['decided'])} for {b}"),
        (
            "sign test over items",
            f"{sign['items_for_b']} for {b}, {sign['items_for_a']} for {a}, {p_value(sign['p'])}",
        ),
        ("unacceptable answers", f"{b} {_of(bad_b)}; {a} {_of(bad_a)}"),
    ]
    if (ability := said["bradley_terry"]) is not None:
        rows.append(
            (
                f"Bradley–Terry, log-odds of {b}",
                f"{ability['log_odds']:+.2f} (standard error {ability['standard_error']:.2f})".replace("-", "−"),
            )
        )
    if (agreed := said["agreement"]) is not None:
        rows.append(
            (
                "Krippendorff's α",
                f"{agreed['ordinal']:.2f} (five steps), {agreed['nominal']:.2f} (better, equal, worse); "
                f"{agreed['raters']} raters, {agreed['shared_items']} shared items".replace("-", "−"),
            )
        )
    if (own := said["self_consistency"]) is not None:
        rows.append(("same preference when seen twice", _of(own["same_preference"])))
    rows.append(("first answer preferred (half: no bias)", _of(said["position"])))
    sections = [
        (name, one["n"], one["b"], one["a"], one["equal"], _percent(one["score"]), _range(one["ci95_items"]))
        for name, one in said["by_section"].items()
    ]
    return {"rows": rows, "sections": sections, "impossible": list(said["not_possible"].values())}


def _percent(part: float | None) -> str:
    return "–" if part is None else percent(part)


def _range(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else evaluate.interval(bounds)


def _of(counted: Mapping[str, Any]) -> str:
    """A share of ratings with its interval.

    >>> _of({"of": 6, "count": 4, "share": 4 / 6, "ci95": [0.3, 0.9032]})
    '66.7 % (30.0 to 90.3 %) of 6'
    """
    if counted["share"] is None:
        return "– (of none)"
    return f"{percent(counted['share'])} ({_range(counted['ci95'])}) of {counted['of']}"


def worse_at_sites(found: Mapping[str, Any]) -> Iterator[str]:
    """What the sites' own test patients show worse than before the rounds, in sentences."""
    for sentence in found.get("worse", ()):
        yield f"The sites' own test patients: {sentence}"


def _federated(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the sites' own test patients gave; None where MODEL is of no run.

    Args:
        found: `common.evaluation_file.Federated`, as JSON; empty: none.
    """
    if not found:
        return None
    models, chance = found["models"], found["chance"]
    scale = plots.share_scale([chance, *(bound for one in models.values() for bound in one["ci95"])])
    earlier = [name for name in ("base", "warmup") if name in models]
    rows = [
        {
            "key": plots.marker_key(name),
            "label": evaluate.LABELS.get(name, name),
            "main": name == "final",
            "accuracy": share(one),
            "strip": plots.interval_strip([(name, one["value"], *one["ci95"])], scale, chance),
            "minus": [difference(pair_of(found, name, against)) for against in earlier],
        }
        for name, one in models.items()
    ]
    return {
        **found,
        "chance": percent(chance),
        "axis": plots.axis(scale),
        "earlier": [evaluate.LABELS[name] for name in earlier],
        "rows": rows,
        "findings": [unbroken(finding) for finding in found["findings"]],
        "tasks": [{**told, "findings": [unbroken(text) for text in told["findings"]]} for told in found["tasks"]],
    }


def facts(value: Mapping[str, Any], path: str = "") -> list[tuple[str, str]]:
    """Nested data as (name, text), in its order.

    >>> facts({"models": {"final": {"digest": "ab12"}}, "seed": 0})
    [('models · final · digest', 'ab12'), ('seed', '0')]
    """
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{path} · {key}" if path else str(key).replace("_", " ")
        if isinstance(item, Mapping) and not {"value", "ci95"} <= item.keys():
            rows += facts(item, name)
        elif isinstance(item, list) and any(isinstance(part, Mapping | list) for part in item):
            rows += facts({str(index + 1): part for index, part in enumerate(item)}, name)
        else:
            rows.append((name, _fact(item)))
    return rows


def _fact(item: Any) -> str:
    if isinstance(item, Mapping):
        low, high = item["ci95"]
        return f"{item['value']:.4g} ({low:.4g} to {high:.4g})"
    if isinstance(item, list):
        return ", ".join(_fact(part) for part in item)
    if isinstance(item, bool):
        return "yes" if item else "no"
    return "–" if item is None else f"{item:.4g}" if isinstance(item, float) else str(item)
