"""Plots of an evaluation's report as inline SVG: rows of a forest plot, and the reliability diagram.

Role: where an evaluation's files are read. Enters: differences with intervals, bins. Leaves: markup for
evaluation.html; no text of a person's, and every class is of this module. Drawn as server/plots.py draws: horizontal
positions in percent, vertical ones in pixels, the same bytes for the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from .plots import Scale

_ROW = 20  # pixels of a row of a forest plot
_TICKS = 4  # of a forest plot, whose column may be narrow
_SIDE = 250  # pixels of a reliability diagram, without its axis
_WIDEST = 0.5  # a forest plot ends at differences of 50 points; an interval that goes on has an arrow there
_WAYS = {-1: "worse", 0: "level", 1: "better"}
_SHAPES = {
    -1: '<path d="M-5-4.5 5-4.5 0 5z"/>',  # down
    0: '<rect x="-3.5" y="-3.5" width="7" height="7"/>',
    1: '<path d="M-5 4.5 5 4.5 0-5z"/>',  # up
}


def difference_scale(bounds: Sequence[float]) -> Scale:
    """A scale around differences and 0, its ends on multiples of 5 points, 50 at most.

    >>> difference_scale([-0.02, 0.11])
    Scale(low=-0.05, high=0.15)
    """
    low, high = min([0.0, *bounds]), max([0.0, *bounds])
    first, last = math.floor(low * 20 + 1e-9), math.ceil(high * 20 - 1e-9)
    first, last = min(first, -1), max(last, 1)
    return Scale(max(-_WIDEST, first / 20), min(_WIDEST, last / 20))


def difference_strip(difference: float, bounds: Sequence[float], scale: Scale, way: int) -> Markup:
    """One row of a forest plot: the point with its interval and the line of no difference.

    Args:
        difference, bounds: of shares; the bounds are [low, high] of its interval.
        scale: of all rows of the plot.
        way: 1 shown better, -1 shown worse, 0 neither; sets shape and colour.
    """
    (low, high), y, name = bounds, _ROW / 2, _WAYS[way]
    parts = [f'<svg class="strip" width="100%" height="{_ROW}" aria-hidden="true">']
    parts += [_upright(scale.percent(tick), "zero" if tick == 0 else "grid") for tick in scale.ticks(_TICKS)]
    x1, x2 = scale.percent(low), scale.percent(high)
    parts.append(f'<line class="whisker {name}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y:g}" y2="{y:g}"/>')
    for beyond, x, path in ((low < scale.low, 0, "M6-4 0 0 6 4"), (high > scale.high, 100, "M-6-4 0 0-6 4")):
        if beyond:
            parts.append(f'<svg x="{x}%" y="{y:g}" overflow="visible" class="arrow {name}"><path d="{path}"/></svg>')
    x = scale.percent(difference)
    parts.append(f'<svg x="{x:.2f}%" y="{y:g}" overflow="visible" class="mark {name}">{_SHAPES[way]}</svg>')
    return Markup("".join(parts) + "</svg>")


def difference_axis(scale: Scale) -> Markup:
    """The ticks of a column of forest rows, in points, for its heading."""
    texts = []
    for tick in scale.ticks(_TICKS):
        x = scale.percent(tick)
        anchor = "start" if x < 2 else "end" if x > 98 else "middle"
        sign = "+" if tick > 0 else "\N{MINUS SIGN}" if tick < 0 else ""
        texts.append(f'<text x="{x:.2f}%" y="12" text-anchor="{anchor}">{sign}{abs(100 * tick):g}</text>')
    return Markup(f'<svg class="axis" width="100%" height="16" aria-hidden="true">{"".join(texts)}</svg>')


def way_key(way: int) -> Markup:
    """The marker of better, worse or neither, for a legend."""
    mark = f'<svg x="50%" y="7" overflow="visible" class="mark {_WAYS[way]}">{_SHAPES[way]}</svg>'
    return Markup(f'<svg class="key" width="14" height="14" aria-hidden="true">{mark}</svg>')


def reliability_diagram(series: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], summary: str) -> Markup:
    """What was observed at each probability that was given, beside the line of perfect calibration.

    Args:
        series: (role, bins) of one model or two; the role is "base" (squares, dashed) or "final" (circles). Bins as
            evaluation.json has them: "predicted", "observed", "n".
        summary: what a screen reader says instead of the picture.
    """
    values = [point[key] for _, points in series for point in points for key in ("predicted", "observed")]
    low, high = math.floor(min(values) * 10 + 1e-9) / 10, math.ceil(max(values) * 10 - 1e-9) / 10
    scale = Scale(low, high) if high - low > 0.15 else Scale(max(0.0, low - 0.1), min(1.0, low + 0.2))

    def y(value: float) -> float:
        return _SIDE * (1 - scale.percent(value) / 100)

    label = escape(summary, quote=True)
    parts = [f'<svg class="plot" width="100%" height="{_SIDE + 24}" role="img" aria-label="{label}">']
    for tick in scale.ticks(5):
        x = scale.percent(tick)
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<line class="grid" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{_SIDE}"/>')
        parts.append(f'<text x="-8" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:g}</text>')
        parts.append(f'<text x="{x:.2f}%" y="{_SIDE + 18}" text-anchor="middle">{100 * tick:g}</text>')
    parts.append(f'<line class="perfect" x1="0" x2="100%" y1="{_SIDE}" y2="0"/>')
    for role, points in series:
        for before, after in pairwise(points):
            x1, x2 = scale.percent(before["predicted"]), scale.percent(after["predicted"])
            y1, y2 = y(before["observed"]), y(after["observed"])
            parts.append(f'<line class="path thin {role}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}"/>')
        for point in points:
            given, seen = f"{100 * point['predicted']:.1f} %", f"{100 * point['observed']:.1f} %"
            tip = f"<title>given {given}, so in {seen} of {point['n']} questions</title>"
            shape = '<rect x="-4" y="-4" width="8" height="8"/>' if role == "base" else '<circle r="4.5"/>'
            at = f'x="{scale.percent(point["predicted"]):.2f}%" y="{y(point["observed"]):.1f}"'
            parts.append(f'<svg {at} overflow="visible" class="mark {role}">{tip}{shape}</svg>')
    return Markup("".join(parts) + "</svg>")


def _upright(x: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{_ROW}"/>'
