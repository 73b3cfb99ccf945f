"""report.html of a run: one self-contained page, no script, nothing loaded, readable on a phone and on paper.

Run by the coordinator when a run ends, and by `wardround server report RUN_FOLDER` again. Enters: the files of the run
folder. Leaves: report.html. Private: sample questions hold a patient's record, so they are shown only for open or
synthetic registries; otherwise the report says that they stay at the sites.

Deterministic: the page holds no time of day, so the same run folder gives the same bytes. Every value is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..common.config import RunConfig, load_run, to_toml
from ..common.errors import RunFolderError
from ..common.files import write_atomic
from ..common.statistics import wilson
from . import evaluate, plots, task_tables
from .privacy_report import ALONE, against
from .provenance import not_protected, protected

REFERENCE = "reference.json"
_TEMPLATES = Path(__file__).parent / "templates"
_NO_SAMPLES = (
    "Sample questions are not part of this report: the registry is not an open one, so questions and reasoning stay in "
    "each site's own report."
)


def rewrite(run_folder: Path) -> Path:
    """Writes report.html of a finished run from the files in its folder and returns its path.

    Raises:
        RunFolderError: a file that a finished run has is missing or not readable; names it.
    """
    evaluation, run = _json(run_folder, "evaluation.json"), _json(run_folder, "run.json")
    lines = _text(run_folder, "rounds.jsonl").splitlines()
    return write_report(
        run_folder / "report.html",
        evaluation=evaluation,
        rounds=[_parsed(line, run_folder / "rounds.jsonl") for line in lines if line.strip()],
        config=load_run(run_folder / "config.resolved.toml"),
        provenance=_json(run_folder / "model", "provenance.json"),
        run=run,
        schema=_json(run_folder, "schema.json"),
        privacy=_json(run_folder, "privacy.json"),
        reference=_json(run_folder, REFERENCE) if (run_folder / REFERENCE).exists() else None,
    )


def refer(run_folder: Path, reference: Path) -> Path:
    """Has the report of a finished private run say what privacy cost, beside a run without it; returns its path.

    Args:
        run_folder: of the private run.
        reference: folder of the other.

    Raises:
        RunFolderError: one of them is not finished, or not as described.
    """
    check_reference(reference)
    paired, config = _json(reference, "evaluation.json")["paired"], load_run(reference / "config.resolved.toml")
    content = {"name": config.name, "paired": paired}
    write_atomic(run_folder / REFERENCE, json.dumps(content, indent=1, ensure_ascii=False).encode(), mode=0o644)
    return rewrite(run_folder)


def check_reference(reference: Path) -> None:
    """Refuses what cannot stand beside a private run, before anything is run.

    Raises:
        RunFolderError: not a finished run's folder, or its privacy was on.
    """
    if "final-base" not in _json(reference, "evaluation.json").get("paired", {}):
        raise RunFolderError(f"{reference / 'evaluation.json'}: holds no comparison; expected a finished run's")
    if load_run(reference / "config.resolved.toml").privacy.enabled:
        raise RunFolderError(f"{reference}: a run with differential privacy; expected one without as the reference")


def write_report(
    out: Path,
    *,
    evaluation: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    config: RunConfig,
    provenance: Mapping[str, Any],
    run: Mapping[str, Any],
    schema: Mapping[str, Any],
    privacy: Mapping[str, Any],
    reference: Mapping[str, Any] | None = None,
) -> Path:
    """Writes the page, whole or not at all.

    Args:
        out: report.html.
        evaluation: content of evaluation.json.
        rounds: the objects of rounds.jsonl, in order.
        config: the run's.
        provenance: content of model/provenance.json.
        run: content of run.json: sites, training patients in all, losses, warm-up, validation of round 0, samples.
        schema: content of schema.json.
        privacy: content of privacy.json.
        reference: content of reference.json, for a private run beside one without privacy.
    """
    if run["warmup"]["source"] == "none":
        evaluation = evaluate.without_warmup(evaluation)
    labels: Mapping[str, str] = run["dictionary"].get("labels", {})
    page = environment().get_template("report.html.j2")
    text = page.render(
        name=config.name,
        registry=run["dictionary"]["title"] or run["dictionary"]["name"],
        evaluation=evaluation,
        noised=bool(evaluation.get("noise")),
        headline=unbroken(headline(evaluation)),
        verdict=unbroken(evaluate.verdict(evaluation)),
        baselines=unbroken(evaluate.baselines(evaluation)),
        key_figures=_key_figures(evaluation, rounds, run, provenance),
        reasoning=config.questions.reasoning_tokens > 0,
        result=_result_rows(evaluation),
        result_axis=plots.axis(_result_scale(evaluation)),
        rounds=[_round_row(record, config.federation.keep) for record in rounds],
        keep=config.federation.keep,
        losses=run["losses"],
        learning=_learning_curve(rounds, run, provenance["kept_round"]),
        reward=_reward_curve(rounds),
        distribution=_reward_distribution(rounds, config),
        models=[name for name in evaluate.MODELS if name in evaluation],
        sections=_groups(evaluation, evaluation["by_section"], {}),
        features=_groups(evaluation, evaluation["by_feature"], labels),
        small=evaluation["small_features"],
        tasks=[task_tables.task(told) for told in evaluation.get("tasks", ())],
        all_tasks=unbroken(task_tables.all_tasks(evaluation)),
        warmup=run["warmup"],
        samples=_samples(run["samples"], labels) if provenance["public"] else [],
        no_samples="" if provenance["public"] else _NO_SAMPLES,
        protected=protected(provenance),
        not_protected=not_protected(provenance),
        privacy=privacy,
        cost=_cost(privacy, evaluation, reference),
        sites=run["sites"],
        schema=_schema_summary(schema, labels),
        provenance=_provenance_rows(provenance),
        config=to_toml(config),
        p=provenance,
    )
    write_atomic(out, text.encode(), mode=0o644)
    return out


def _cost(privacy: Mapping[str, Any], evaluation: Mapping[str, Any], reference: Mapping[str, Any] | None) -> list[str]:
    """What privacy cost, in sentences; none where it was off, or a run of an earlier version did not say."""
    if not privacy["enabled"] or "cost" not in privacy:
        return []
    accuracy = against(reference, evaluation) if reference else ALONE
    return [unbroken(sentence) for sentence in (*privacy["cost"]["sentences"], accuracy)]


def headline(evaluation: Mapping[str, Any]) -> str:
    """The result in one sentence."""
    final = evaluation["final"]
    others = [
        f"{evaluate.percent(evaluation[name]['accuracy'])} {words}"
        for name, words in (("warmup", "after the public warm-up"), ("base", "before any training"))
        if name in evaluation
    ]
    return (
        f"The final model answers {evaluate.percent(final['accuracy'])} of {final['n']:,} held-out questions right "
        f"(95 % interval {evaluate.interval(final['ci95'])}); it was {' and '.join(others)}."
    )


def unbroken(sentence: str) -> str:
    """The sentence with its figures kept on one line: "48.8 %", "p = 0.01", "n = 320"."""
    for text in (" %", " = ", " < ", " points"):
        sentence = sentence.replace(text, text.replace(" ", "\N{NO-BREAK SPACE}"))
    return sentence


def size(n_bytes: float) -> str:
    """Bytes as a person reads them.

    >>> size(512), size(55_300_000)
    ('512 B', '55.3 MB')
    """
    for unit, digits in (("B", 0), ("kB", 0), ("MB", 1)):
        if n_bytes < 1000:
            return f"{n_bytes:.{digits}f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


def duration(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> duration(8.2), duration(754), duration(9000)
    ('8.2 s', '12 min 34 s', '2 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _key_figures(
    evaluation: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    run: Mapping[str, Any],
    provenance: Mapping[str, Any],
) -> list[tuple[str, str]]:
    took_part = [site for site in run["sites"].values() if site["rounds"]]
    return [
        (str(len(took_part)), "simulated sites" if provenance["simulated"] else "sites"),
        (f"{run['training_patients']:,}", "training patients"),
        (str(len(rounds)), "round" if len(rounds) == 1 else "rounds"),
        (f"{provenance['questions_trained']:,}", "questions trained"),
        (f"{evaluation['n']:,}", "questions scored"),
        (size(sum(record["bytes_up"] for record in rounds)), "sent by sites"),
        (duration(sum(record["seconds"] for record in rounds)), "in rounds"),
    ]


def _result_scale(evaluation: Mapping[str, Any]) -> plots.Scale:
    bounds = [evaluation["chance"]]
    for name in evaluate.rows_of(evaluation):
        if name != "chance":
            bounds += evaluation[name]["ci95"]
    return plots.share_scale(bounds)


def _result_rows(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the main table; every number is already text."""
    scale, rows = _result_scale(evaluation), []
    for name in evaluate.rows_of(evaluation):
        row: dict[str, Any] = {"name": name, "label": evaluate.LABELS[name], "key": plots.marker_key(name)}
        row |= {"interval": "", "boxed": "", "length": ""}
        if name == "chance":
            row["accuracy"] = evaluate.percent(evaluation["chance"])
            row["strip"] = plots.interval_strip([], scale, evaluation["chance"])
        else:
            item = evaluation[name]
            mark = (name, item["accuracy"], *item["ci95"])
            row |= {"accuracy": evaluate.percent(item["accuracy"]), "interval": evaluate.interval(item["ci95"])}
            row["strip"] = plots.interval_strip([mark], scale, evaluation["chance"])
            if item.get("box_rate") is not None:
                row |= {"boxed": evaluate.percent(item["box_rate"]), "length": f"{item['mean_length']:.1f}"}
        for earlier in ("base", "warmup"):
            comparison = evaluation["paired"].get(f"{name}-{earlier}")
            row[f"minus_{earlier}"] = evaluate.compared(comparison) if comparison else ("", "")
        rows.append(row)
    return rows


def _round_row(record: Mapping[str, Any], keep: str) -> dict[str, Any]:
    if record["rolled_back"]:
        decision = "rolled back"
    else:  # without a validation of it a round is continued from, whether it is then kept or not
        kept = record["kept_round"] == record["round"] and record["validation_accuracy"] is not None
        decision = "best so far" if kept and keep == "best" else "continued"
    return {
        "round": record["round"],
        "sites": record["site_count"],
        "questions": record["questions"],
        "reward": "" if record["reward_mean"] is None else evaluate.percent(record["reward_mean"]),
        "validation": "" if record["validation_accuracy"] is None else evaluate.percent(record["validation_accuracy"]),
        "decision": decision,
        "up": size(record["bytes_up"]),
        "seconds": duration(record["seconds"]),
    }


def _learning_curve(rounds: Sequence[Mapping[str, Any]], run: Mapping[str, Any], final: int) -> Markup | None:
    """Validation accuracy from round 0 on; None without a validation gate."""
    points: list[plots.RoundPoint] = []
    start = run["baseline"]
    states = [(0, start["accuracy"], start["questions"], False)]
    for record in rounds:
        validated = record["validation_accuracy"], record["validation_questions"]
        states.append((record["round"], *validated, record["rolled_back"]))
    for index, share, n, rolled_back in states:
        if share is not None and n > 0:
            low, high = wilson(round(share * n), n)
            state = "final" if index == final else "rolled-back" if rolled_back else ""
            points.append(plots.RoundPoint(index, share, low, high, state))
    if not points:
        return None
    path = ", ".join(f"round {point.round_index} {evaluate.percent(point.value)}" for point in points)
    return plots.line_plot(points, "final", f"Validation accuracy by round: {path}. Final model: round {final}.")


def _reward_curve(rounds: Sequence[Mapping[str, Any]]) -> Markup | None:
    points = [
        plots.RoundPoint(record["round"], record["reward_mean"])
        for record in rounds
        if record["reward_mean"] is not None
    ]
    if not points:
        return None
    path = ", ".join(f"round {point.round_index} {evaluate.percent(point.value)}" for point in points)
    return plots.line_plot(points, "reward", f"Mean reward by round: {path}.")


def _reward_distribution(rounds: Sequence[Mapping[str, Any]], config: RunConfig) -> dict[str, Any] | None:
    """The bars, their legend, and how many questions could teach nothing."""
    histograms = {record["round"]: record["reward_histogram"] for record in rounds if sum(record["reward_histogram"])}
    if not histograms:
        return None
    classes, exact = max(len(counts) for counts in histograms.values()), config.grpo.expectation == "exact"
    if exact:
        edges = [f"{100 * step / classes:.0f}" for step in range(classes + 1)]
        labels = [f"{low} to {high} %" for low, high in pairwise(edges)]
    else:
        labels = [f"{step} of {classes - 1}" for step in range(classes)]
    total = sum(sum(counts) for counts in histograms.values())
    silent = sum(counts[0] + counts[-1] for counts in histograms.values())
    said = "probability of the true option" if exact else "completions of the group that were right"
    summary = f"Distribution of the {said} by round: {', '.join(f'round {index}' for index in histograms)}."
    return {
        "bars": plots.reward_bars(histograms, labels, summary),
        "legend": [(label, plots.ramp(step, classes)) for step, label in enumerate(labels)],
        "exact": exact,
        "silent": evaluate.percent(silent / total),
    }


def _groups(
    evaluation: Mapping[str, Any], groups: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]
) -> dict[str, Any]:
    """Rows of the tables by section and by feature, all on one scale, and its axis."""
    models = [name for name in evaluate.MODELS if name in evaluation]
    bounds = [bound for group in groups.values() for model in models for bound in group[model]["ci95"]]
    scale = plots.share_scale([*bounds, evaluation["chance"]])
    rows: list[dict[str, Any]] = []
    for name, group in groups.items():
        marks = [(model, group[model]["accuracy"], *group[model]["ci95"]) for model in models]
        rows.append(
            {
                "label": labels.get(name, name),
                "section": group.get("section", ""),
                "n": group["n"],
                "strip": plots.interval_strip(marks, scale, group["chance"]),
                "values": [(group[model]["accuracy"], group[model]["ci95"]) for model in models],
                "majority": group["majority"]["accuracy"],
                "chance": group["chance"],
            }
        )
    return {
        "rows": sorted(rows, key=lambda row: (row["section"], row["label"].casefold())),
        "axis": plots.axis(scale),
    }


def _samples(samples: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for sample in samples:
        answers = [
            {
                "label": evaluate.LABELS.get(name, name),
                "key": plots.marker_key(name),
                "right": said["chosen"] == sample["answer"],
                **said,
            }
            for name, said in sample["models"].items()
        ]
        shown.append({**sample, "label": labels.get(sample["target"], sample["target"]), "answers": answers})
    return shown


def _schema_summary(schema: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    names = {target["name"] for target in schema["targets"]}
    hidden = {
        labels.get(target, target): [labels.get(feature, feature) for feature in features]
        for target, features in schema["shortcuts"].items()
        if features and target in names
    }
    return {"targets": len(names), "unusable": len(schema["unusable"]), "rows": schema["rows"], "hidden": hidden}


def _provenance_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Provenance as (name, text)."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            text = ", ".join(f"{key.replace('_', ' ')} {item}" for key, item in value.items())
        elif isinstance(value, bool):
            text = "yes" if value else "no"
        else:
            text = "–" if value is None else str(value)
        rows.append((name.replace("_", " "), text))
    return rows


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise RunFolderError(f"{folder / name}: missing or unreadable; expected the folder of a finished run") from None


def _json(folder: Path, name: str) -> dict[str, Any]:
    return _parsed(_text(folder, name), folder / name)


def _parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        raise RunFolderError(f"{path}: not valid JSON") from None
    if not isinstance(value, dict):
        raise RunFolderError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@cache
def environment() -> jinja2.Environment:
    """The pages' templates: every value is escaped, and a name that is not given is a mistake."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": evaluate.percent,
        "interval": evaluate.interval,
        "duration": duration,
        "key": plots.marker_key,
    }
    return made
