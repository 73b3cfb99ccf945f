"""What an evaluation found, in sentences: better or worse, for whom, how honest, what it could not have seen.

Role: a step of common/summary.py. Pure. Enters: a task's figures. Leaves: text of names and figures, so it is as
private as they are.

A difference is called one only where its interval excludes 0 and its p-value, corrected where a family of questions was
asked, is below 0.05; everything else "cannot be told apart", which is not the same as equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .model_figures import mean_of
from .position import FLAG_LEVEL
from .scored import MAJORITY
from .subgroups import shown_direction

_MANY_FORCED = 0.05  # share of answers that were not the model's own box above which it is said
_OFF = 0.05  # mean probability minus share right above which it is said
_MOST_NAMED = 8


def percent(value: float) -> str:
    """A share as percent with one decimal.

    >>> percent(0.4345)
    '43.5 %'
    """
    return f"{100 * value:.1f} %"


def points(difference: float) -> str:
    """A difference of two shares in percentage points, signed; a rounded zero has no sign.

    >>> points(-0.031), points(-0.0001)
    ('−3.1', '0.0')
    """
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text in ("−0.0", "+0.0") else text


def p_value(p: float) -> str:
    """A p-value as it is read aloud.

    >>> p_value(0.00004), p_value(0.218)
    ('p < 0.001', 'p = 0.22')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def figures(comparison: Mapping[str, Any]) -> str:
    """Interval and p-value of a difference, the corrected one where there is one."""
    low, high = (points(bound) for bound in comparison["ci95"])
    corrected = "corrected " if "p_holm" in comparison else ""
    return f"95 % interval {low} to {high}, {corrected}{p_value(comparison.get('p_holm', comparison['p']))}"


def auroc(figure: Mapping[str, Any]) -> str:
    """An area under the ROC curve, and what it says beside guessing.

    >>> auroc({"value": 0.71, "ci95": [0.6, 0.81]})
    'AUROC 0.710 (95 % interval 0.600 to 0.810), better than guessing'
    """
    low, high = figure["ci95"]
    word = "better than guessing" if low > 0.5 else "which cannot be told from guessing"
    if high < 0.5:
        word = "worse than guessing"
    return f"AUROC {figure['value']:.3f} (95 % interval {low:.3f} to {high:.3f}), {word}"


def power_sentence(power: Mapping[str, Any]) -> str:
    """What so many questions could not have shown.

    Args:
        power: "n", "patients" and "detectable".
    """
    return (
        f"With n = {power['n']:,} questions about {power['patients']:,} patients, a true difference under "
        f"{100 * power['detectable']:.1f} points cannot be seen reliably: it is missed more than one time in five."
    )


def find(summary: Mapping[str, Any]) -> list[str]:
    """The findings of a task, the most important first.

    Args:
        summary: the figures of `common.summary.summarise_task`, "power" included.
    """
    return [
        *_overall(summary),
        *_ranking(summary),
        *_worse(summary),
        *_better(summary),
        *_gaps(summary),
        *_targets(summary),
        *_baselines(summary),
        *_sites(summary),
        *_calibration(summary),
        *_position(summary),
        *_forced(summary),
        summary["power"]["sentence"],
        *_hidden(summary),
    ]


def _pair(summary: Mapping[str, Any], model: str, against: str) -> Mapping[str, Any]:
    return next(pair for pair in summary["paired"] if (pair["model"], pair["against"]) == (model, against))


def _overall(summary: Mapping[str, Any]) -> Iterator[str]:
    final, reference = summary["final"], summary["reference"]
    if final == reference:
        accuracy = summary["models"][final]["accuracy"]
        low, high = accuracy["ci95"]
        yield (
            f"{final} has {percent(accuracy['value'])} of {summary['n']:,} questions right "
            f"(95 % interval {100 * low:.1f} to {percent(high)})."
        )
        return
    pair = _pair(summary, final, reference)
    way, size = shown_direction(dict(pair)), f"{100 * abs(pair['difference']):.1f} points"
    if way:
        word = "better" if way > 0 else "worse"
        yield f"{final} is {word} than {reference} by {size} ({figures(pair)}, n = {summary['n']:,})."
    else:
        yield (
            f"{final} and {reference} cannot be told apart: {points(pair['difference'])} points ({figures(pair)}, "
            f"n = {summary['n']:,})."
        )
    brier = pair["brier"]
    if brier is not None:
        low, high = brier["ci95"]
        if low > 0 or high < 0:
            word = "further from" if low > 0 else "closer to"
            yield (
                f"The probabilities of {final} are {word} the truth than those of {reference} (Brier score "
                f"{brier['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})."
            ).replace("-", "−")


def _ranking(summary: Mapping[str, Any]) -> Iterator[str]:
    """Whether patients with the event are told from those without, which accuracy on rare events does not say."""
    final, reference = summary["final"], summary["reference"]
    event = summary["models"][final]["event"]
    if event is None:
        return
    said = f"{final} ranks patients by the event with {auroc(event['auroc'])}"
    change = None if final == reference else _pair(summary, final, reference)["auroc"]
    if change is None:
        yield f"{said}."
        return
    low, high = change["ci95"]
    way = f"{reference} {change['difference']:+.3f} ({low:+.3f} to {high:+.3f})".replace("-", "−")
    yield f"{said}; against {way}."


def _worse(summary: Mapping[str, Any]) -> Iterator[str]:
    """Every subgroup that got worse, by name."""
    found: Sequence[Mapping[str, Any]] = summary["subgroups"]["worse"]
    final, reference = summary["final"], summary["reference"]
    for row in sorted(found, key=lambda row: row["difference"]):
        yield (
            f"Worse in a subgroup: with {row['axis']} '{row['stratum']}', {final} is "
            f"{100 * abs(row['difference']):.1f} points below {reference} ({figures(row)}, n = {row['n']:,})."
        )
    tested = sum(len(axis["strata"]) for axis in summary["subgroups"]["axes"].values())
    if tested and not found and final != reference:
        yield f"In none of {tested} subgroups is {final} shown worse than {reference}; small ones may hide a loss."


def _better(summary: Mapping[str, Any]) -> Iterator[str]:
    found: list[Mapping[str, Any]] = sorted(summary["subgroups"]["better"], key=lambda row: -row["difference"])
    if found:
        named = [f"{row['axis']} '{row['stratum']}' ({points(row['difference'])})" for row in found]
        yield f"Better after correction in {len(found)} of the subgroups: {_listed(named)}; in points."


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _gaps(summary: Mapping[str, Any]) -> Iterator[str]:
    """Who the final model serves worst, where that is shown."""
    final = summary["final"]
    low = [
        (axis, row["stratum"], row["models"][final]["gap"])
        for axis, table in summary["subgroups"]["axes"].items()
        for row in table["strata"]
        if row["models"][final]["gap"] is not None and shown_direction(row["models"][final]["gap"]) < 0
    ]
    for axis, stratum, gap in sorted(low, key=lambda item: item[2]["difference"])[:_MOST_NAMED]:
        yield (
            f"{final} is right less often with {axis} '{stratum}' than elsewhere: {points(gap['difference'])} points "
            f"({figures(gap)})."
        )


def _targets(summary: Mapping[str, Any]) -> Iterator[str]:
    for key, noun in (("by_section", "section"), ("by_target", "target")):
        rows = [row for row in summary[key]["rows"] if row["difference"] is not None]
        if len(rows) < 2:
            continue
        for way, word in ((-1, "worse"), (1, "better")):
            named = [row for row in rows if shown_direction(row["difference"]) == way]
            named.sort(key=lambda row: -abs(row["difference"]["difference"]))
            if named:
                told = _listed([f"{row['name']} ({points(row['difference']['difference'])})" for row in named])
                yield (
                    f"By {noun}, {summary['final']} is {word} than {summary['reference']} "
                    f"in {len(named)} of {len(rows)} after correction: {told}; in points."
                )


def _baselines(summary: Mapping[str, Any]) -> Iterator[str]:
    final = summary["final"]
    (low, high), chance = summary["models"][final]["accuracy"]["ci95"], summary["chance"]
    place = "above" if low > chance else "below" if high < chance else "not told apart from"
    yield f"{final} is {place} chance ({percent(chance)})."
    for pair in summary["paired"]:
        if pair["model"] != final or pair["against"] == summary["reference"]:
            continue
        other = "always choosing the most frequent option" if pair["against"] == MAJORITY else pair["against"]
        way = shown_direction(dict(pair))
        told = f"{points(pair['difference'])} points, {figures(pair)}"
        if way:
            yield f"{final} is {'better' if way > 0 else 'worse'} than {other} ({told})."
        else:
            yield f"{final} and {other} cannot be told apart ({told})."


def _sites(summary: Mapping[str, Any]) -> Iterator[str]:
    left = summary["leave_one_site_out"]
    if left is not None and left["measure"] == "difference":
        row = next(row for row in left["without"] if row["left_out"] == left["largest"])
        carried = _side(left["all"]["ci95"]) != _side(row["ci95"])
        alone = ": one site decides whether a difference is seen" if carried else ""
        yield (
            f"Without site '{row['left_out']}', which moves the result most, the difference is {points(row['value'])} "
            f"points in place of {points(left['all']['value'])}{alone}."
        )
    for axis, folds in summary["cross_validation"].items():
        if folds["measure"] == "difference" and folds["p"] is not None and folds["p"] < 0.05:
            yield (
                f"One difference does not stand for all: by {axis} it lies between {points(folds['low'])} and "
                f"{points(folds['high'])} points (test of one for all: {p_value(folds['p'])}, not corrected)."
            )


def _side(bounds: Sequence[float]) -> int:
    return int(bounds[0] > 0) - int(bounds[1] < 0)


def _calibration(summary: Mapping[str, Any]) -> Iterator[str]:
    final = summary["final"]
    told = summary["models"][final]
    if told["reliability"] is None:
        yield f"Of {final} no probabilities are known: nothing is said of its calibration."
        return
    said, was = mean_of(told["reliability"], "predicted"), told["accuracy"]["value"]
    low, high = told["accuracy"]["ci95"]
    if abs(said - was) >= _OFF and not low <= said <= high:
        word = "too sure" if said > was else "not sure enough"
        yield f"{final} is {word}: it gives its answers {percent(said)} on average, and {percent(was)} are right."


def _position(summary: Mapping[str, Any]) -> Iterator[str]:
    for model, row in summary["position"]["models"].items():
        if not row["flagged"]:
            continue
        told = [
            f"of {choices['n_options']} letters it chose {_letter(choices['chosen'])}"
            for choices in row["by_options"]
            if choices["p_holm"] is not None and choices["p_holm"] < FLAG_LEVEL and not choices["fixed_order"]
        ]
        effects: list[dict[str, Any]] = row["permuted"]["by_options"] if row["permuted"] else []
        for effect in effects:
            if effect["p_holm"] is not None and effect["p_holm"] < FLAG_LEVEL:
                more = 100 * (max(effect["letter_effect"]) - min(effect["letter_effect"]))
                told.append(
                    f"of {effect['n_options']} letters, the one that helps most makes it right {more:.0f} points more "
                    "often than the one that helps least when the truth stands there"
                )
        yield f"Position bias: {model} likes a letter whatever stands there; {'; '.join(told)}."


def _letter(shares: Sequence[float]) -> str:
    most = max(range(len(shares)), key=lambda letter: abs(shares[letter] - 1 / len(shares)))
    return f"{'ABCDEFGHIJ'[most]} in {percent(shares[most])}, where an equal share is {percent(1 / len(shares))}"


def _forced(summary: Mapping[str, Any]) -> Iterator[str]:
    for model, told in summary["models"].items():
        rate = told["fallback_rate"]
        if rate is not None and rate["value"] > _MANY_FORCED:
            yield f"{model} gave no answer of its own to {percent(rate['value'])} of the questions; one was forced."


def _hidden(summary: Mapping[str, Any]) -> Iterator[str]:
    places = {"targets": summary["by_target"]["hidden"], "sections": summary["by_section"]["hidden"]}
    places |= {f"subgroups by {axis}": table["hidden"] for axis, table in summary["subgroups"]["axes"].items()}
    for place, hidden in places.items():
        if hidden is not None and hidden["labels"]:
            yield (
                f"Not reported for fewer than {summary['min_cell']} patients, or to hide such a group: "
                f"{len(hidden['labels'])} {place} ({hidden['n']:,} questions)."
            )
