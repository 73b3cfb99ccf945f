"""audit.html: what was tried against a claim, what it would have seen, and what it saw; one page that loads nothing.

Enters: the content of audit.json. Leaves: the page, in the dress of a run's report.html (server/report.py). Figures
speak of open registries only. Deterministic: the same audit.json gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...common.files import write_atomic
from ...server import plots
from . import membership
from .cli import strongest

_HEIGHT = 260
_SERIES = ("warmup", "final", "majority", "base")  # classes of report.css, for the first, second, … curve
SEEN = {
    "alone": "one patient's update in the clear",
    "crowd": "one of eight patients in an update in the clear",
    "masked": "one patient's update as it leaves in a secure sum",
    "private": "one patient's update in the clear, with the noise of",
}


def write(path: Path, result: Mapping[str, Any], config: str) -> None:
    """Writes the page, whole or not at all."""
    templates = [Path(__file__).parent, Path(plots.__file__).parent / "templates"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    one_run, members = result.get("one_run", []), result.get("membership", [])
    text = environment.get_template("audit.html.j2").render(
        r=result,
        config=config,
        one_run=[{**run, "words": looks(run)} for run in one_run],
        bounds=_bounds(one_run) if one_run else None,
        bound_key=[(name, plots.marker_key(series)) for name, series in _LOOKS.values()],
        members=_membership_rows(members),
        member_axis=_axis(_AUC),
        curves=_curves(members) if members else None,
        curve_key=[(_claim(run), series) for run, series in zip(members, _SERIES * 9, strict=False)],
        found=_found(members),
        inversion=_inversion_rows(result.get("inversion", [])),
        share_axis=plots.axis(_SHARE),
        attacks=membership.ATTACKS,
    )
    write_atomic(path, text.encode(), mode=0o644)


_LOOKS = {"everybody": ("one look at everybody", "final"), "plan": ("the run's own plan", "base")}
_AUC, _SHARE = plots.Scale(0.4, 1.0), plots.Scale(0.0, 1.0)


def looks(run: Mapping[str, Any]) -> str:
    """What a one-run bound looked at, in words."""
    event = run["event"]
    if run["looks"] == "everybody":
        return "everybody, one step"
    return f"{100 * event['sample_rate']:g} % a step, {event['steps']} steps"


def _claim(run: Mapping[str, Any]) -> str:
    return "without privacy" if run["claimed"] is None else f"ε = {run['claimed']:.2f}"


def _bounds(runs: Sequence[Mapping[str, Any]]) -> Markup:
    """Refuted ε over claimed ε. A point above the diagonal would contradict its claim."""
    most = 1.1 * max(max(run["claimed"], run["bound_epsilon"]) for run in runs)
    scale = plots.Scale(0, most)

    def y(value: float) -> float:
        return _HEIGHT * (1 - scale.percent(value) / 100)

    words = "; ".join(f"claimed {run['claimed']:.2f}, refuted below {run['bound_epsilon']:.2f}" for run in runs)
    parts = [_begin(f"Lower bound over claimed epsilon: {words}")]
    for tick in scale.ticks():
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="-8" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
        parts.append(f'<text x="{scale.percent(tick):.2f}%" y="{_HEIGHT + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<line class="chance" x1="0" x2="100%" y1="{_HEIGHT}" y2="0"/>')
    for run in runs:
        tip = f"claimed ε = {run['claimed']:.2f}, refuted below {run['bound_epsilon']:.2f}"
        shape = '<rect x="-4.5" y="-4.5" width="9" height="9"/>' if run["looks"] == "plan" else '<circle r="5"/>'
        parts.append(
            f'<svg x="{scale.percent(run["claimed"]):.2f}%" y="{y(run["bound_epsilon"]):.1f}" overflow="visible" '
            f'class="mark {_LOOKS[run["looks"]][1]}"><title>{tip}</title>{shape}</svg>'
        )
    return Markup("".join(parts) + "</svg>")


def _curves(runs: Sequence[Mapping[str, Any]]) -> Markup:
    """Canary patients found over false alarms, by the attack that tells most apart without looking at ε."""
    parts = [_begin("Share of members found over the share of others accused; numbers are in the tables")]
    for tick in _SHARE.ticks():
        level = _HEIGHT * (1 - tick)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{level:.1f}" y2="{level:.1f}"/>')
        parts.append(f'<text x="-8" y="{level + 4:.1f}" text-anchor="end">{100 * tick:g}</text>')
        parts.append(f'<text x="{100 * tick:.2f}%" y="{_HEIGHT + 18}" text-anchor="middle">{100 * tick:g}</text>')
    parts.append(f'<line class="chance" x1="0" x2="100%" y1="{_HEIGHT}" y2="0"/>')
    for run, series in zip(runs, _SERIES * 9, strict=False):
        points = strongest(run["groups"]["canary"])[1]["roc"]
        for (x1, y1), (x2, y2) in pairwise(points):
            parts.append(
                f'<line class="path {series}" x1="{100 * x1:.2f}%" x2="{100 * x2:.2f}%" '
                f'y1="{_HEIGHT * (1 - y1):.1f}" y2="{_HEIGHT * (1 - y2):.1f}"/>'
            )
    return Markup("".join(parts) + "</svg>")


def _axis(scale: plots.Scale) -> Markup:
    """Ticks over a column of interval strips, as numbers and not as percentages."""
    texts = [
        f'<text x="{scale.percent(tick):.2f}%" y="12" text-anchor="middle">{tick:g}</text>' for tick in scale.ticks()
    ]
    return Markup(f'<svg class="axis" width="100%" height="16" aria-hidden="true">{"".join(texts)}</svg>')


def _begin(summary: str) -> str:
    label = escape(summary, quote=True)
    return f'<svg class="plot" width="100%" height="{_HEIGHT + 24}" role="img" aria-label="{label}">'


def _membership_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for run, series in zip(runs, _SERIES * 9, strict=False):
        for kind, group in run["groups"].items():
            for attack, words in membership.ATTACKS.items():
                found = group[attack]
                rows.append(
                    {
                        "claim": _claim(run),
                        "kind": kind,
                        "attack": words,
                        "first": attack == next(iter(membership.ATTACKS)),
                        "auc": f"{found['auc']:.3f}",
                        "interval": f"{found['auc_ci95'][0]:.3f} to {found['auc_ci95'][1]:.3f}",
                        "strip": plots.interval_strip([(series, found["auc"], *found["auc_ci95"])], _AUC, 0.5),
                        "permitted": "" if run["permitted_auc"] is None else f"{run['permitted_auc']:.3f}",
                        "n": f"{found['members']} / {found['others']}",
                    }
                )
    return rows


def _found(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Members found at few false alarms, by the strongest attack."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        for kind, group in run["groups"].items():
            attack, found = strongest(group)
            for one in found["tpr"]:
                epsilon, rate = run["claimed"], one["false_alarms"]
                rows.append(
                    {
                        "claim": _claim(run),
                        "kind": kind,
                        "attack": membership.ATTACKS[attack],
                        "rate": f"{100 * rate:g} %",
                        "share": f"{100 * one['share']:.1f} %",
                        "interval": f"{100 * one['ci95'][0]:.1f} to {100 * one['ci95'][1]:.1f}",
                        "alarms": f"{one['alarms']} of {found['others']}",
                        "alarm_interval": f"{100 * one['alarm_ci95'][0]:.2f} to {100 * one['alarm_ci95'][1]:.2f} %",
                        "permitted": "" if epsilon is None else f"{100 * min(1.0, math.exp(epsilon) * rate):.2g} %",
                    }
                )
    return rows


def _inversion_rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for run in runs:
        words = SEEN[run["seen"]] + ("" if run["epsilon"] is None else f" ε = {run['epsilon']:g}")
        series = {"alone": "warmup", "crowd": "warmup", "masked": "majority", "private": "final"}[run["seen"]]
        for what, part in (("values of the record", run["values"]), ("the right answer", run["answers"])):
            share = part["right"] / part["n"]
            rows.append(
                {
                    "words": words,
                    "first": part is run["values"],
                    "what": what,
                    "right": f"{part['right']} of {part['n']}",
                    "share": f"{100 * share:.0f} %",
                    "interval": f"{100 * part['ci95'][0]:.0f} to {100 * part['ci95'][1]:.0f}",
                    "chance": f"{100 * part['chance']:.0f} %",
                    "strip": plots.interval_strip([(series, share, *part["ci95"])], _SHARE, part["chance"]),
                }
            )
    return rows
