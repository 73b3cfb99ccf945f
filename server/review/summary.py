"""The figures of a review as lines of text for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .ratings import REASONS
from .results import KINDS


def describe(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines that say what `results.statistics` found."""
    a, b = found["models"]
    yield f"{found['title']}: {b} against {a}, {found['items']} items, {found['data']} records"
    far = ", ".join(f"{one['rater']} {one['rated']} of {one['of']}" for one in found["raters"])
    yield f"rated: {far or 'nobody is invited yet'}"
    for plural in KINDS.values():
        if found[plural] is not None:
            yield from _kind(plural, found[plural], a, b)
    if found["people"] is None:
        yield "no person has rated yet"


def _kind(plural: str, said: Mapping[str, Any], a: str, b: str) -> Iterator[str]:
    overall = said["preference"]
    yield ""
    yield plural.upper() + ("" if plural == "people" else " (programs; not part of the above)")
    yield f"{b} preferred {overall['b']}, {a} preferred {overall['a']}, about equal {overall['equal']}"
    yield (
        f"score of {b} (a tie is half): {_percent(overall['score'])}, 95 % interval {_range(overall['ci95_items'])} "
        f"over items, {_range(overall['ci95_raters_items'])} over raters and items"
    )
    yield f"among decided: {_of(overall['decided'])} for {b} (Wilson)"
    sign = overall["sign_test"]
    yield f"items for {b} {sign['items_for_b']}, for {a} {sign['items_for_a']}; sign test p = {sign['p']:.3g}"
    if (ability := said["bradley_terry"]) is not None:
        error = f"standard error {ability['standard_error']:.2f}"
        yield f"Bradley-Terry log-odds of {b}: {ability['log_odds']:+.2f} ({error})"
        for rater, one in ability["by_rater"].items():
            shown = "infinite" if one is None else f"{one['log_odds']:+.2f} ({one['standard_error']:.2f})"
            yield f"  {rater}: {shown}"
    if (agreed := said["agreement"]) is not None:
        yield (
            f"Krippendorff's alpha: {agreed['ordinal']:.2f} (five steps, ordinal), {agreed['nominal']:.2f} (better, "
            f"equal, worse), {agreed['raters']} raters, {agreed['shared_items']} shared items"
        )
    if (own := said["self_consistency"]) is not None:
        same = _of(own["same_preference"])
        yield f"self-consistency, pairs seen twice: the same preference in {same}; {own['reversed']} reversed"
    yield f"first answer preferred, of decided: {_of(said['position'])}; one half is no bias"
    bad_a, bad_b = said["unacceptable"]
    yield f"unacceptable: {b} {_of(bad_b)}, {a} {_of(bad_a)}"
    yield f"reasons for {b} and for {a}: " + ", ".join(
        f"{REASONS[reason].lower()} {for_b}/{for_a}" for reason, (for_a, for_b) in said["reasons"].items()
    )
    yield from _sections(said["by_section"], a, b)
    for sentence in said["not_possible"].values():
        yield f"not possible: {sentence}"


def _sections(sections: Mapping[str, Mapping[str, Any]], a: str, b: str) -> Iterator[str]:
    table: list[Sequence[str]] = [
        ("section", "ratings", "items", f"for {b}", f"for {a}", "equal", "score", "95 % over items")
    ]
    for section, one in sections.items():
        counts = (str(one[key]) for key in ("n", "items", "b", "a", "equal"))
        table.append((section, *counts, _percent(one["score"]), _range(one["ci95_items"])))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(row))
        yield "  ".join(cells).rstrip()


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _range(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f} %"


def _of(share: Mapping[str, Any]) -> str:
    if share["share"] is None:
        return "– (none)"
    return f"{_percent(share['share'])} ({_range(share['ci95'])}) of {share['of']}"
