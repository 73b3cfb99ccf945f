"""The report's plots as inline SVG, drawn by hand: no script, no external file, the same bytes for the same numbers.

Run by the coordinator. Enters: accuracies, rewards, counts. Leaves: markup for report.html; every text is escaped.
Horizontal positions are percentages and vertical ones pixels, so a plot fills its column at any width while its type
keeps its size; colours are CSS classes, so dark mode and print recolour them. Series differ in shape as well as colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from markupsafe import Markup

_LANE = 13  # pixels a series takes in an interval strip
_HEIGHT = 190  # pixels of a line plot, without its axis
_MAX_MARKERS = 60  # more rounds than this are drawn as a line only
_MAX_BARS = 12  # more rounds than this are thinned out evenly in the reward plot


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear scale from values to 0..100 %."""

    low: float
    high: float

    def percent(self, value: float) -> float:
        """Where `value` lies, clipped to the scale."""
        return 100 * min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self, most: int = 6) -> list[float]:
        """Round values on the scale, `most` or fewer.

        >>> Scale(0.2, 0.6).ticks()
        [0.2, 0.3, 0.4, 0.5, 0.6]
        """
        raw = (self.high - self.low) / most
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def share_scale(values: Sequence[float]) -> Scale:
    """A scale of shares around `values`, its ends on multiples of 5 %.

    >>> share_scale([0.31, 0.52])
    Scale(low=0.3, high=0.55)
    """
    low, high = min(values), max(values)
    first, last = math.floor(low * 20 + 1e-9), math.ceil(high * 20 - 1e-9)
    if last - first < 2:
        first, last = max(0, first - 1), min(20, last + 1)
    return Scale(first / 20, last / 20)


def _marker(series: str, x: float, y: float) -> str:
    """A point: square for base, diamond for warmed up, circle for final, bar for the rest."""
    at = f'<svg x="{x:.2f}%" y="{y:g}" overflow="visible" class="mark {escape(series)}">'
    shapes = {
        "base": '<rect x="-4" y="-4" width="8" height="8"/>',
        "warmup": '<path d="M0-5.5 5.5 0 0 5.5-5.5 0z"/>',
        "final": '<circle r="5"/>',
    }
    return at + shapes.get(series, '<rect x="-1.5" y="-5" width="3" height="10"/>') + "</svg>"


def marker_key(series: str) -> Markup:
    """The marker of a series, for a legend or the first cell of its row."""
    return Markup(f'<svg class="key" width="14" height="14" aria-hidden="true">{_marker(series, 50, 7)}</svg>')


def interval_strip(
    marks: Sequence[tuple[str, float, float, float]], scale: Scale, chance: float | None = None
) -> Markup:
    """Points with whiskers, one lane a series: (series, value, low, high). The numbers stand beside it in the table."""
    height = max(1, len(marks)) * _LANE + 8
    parts = [f'<svg class="strip" width="100%" height="{height}" aria-hidden="true">']
    parts += [_vertical(scale.percent(tick), height, "grid") for tick in scale.ticks()]
    if chance is not None:
        parts.append(_vertical(scale.percent(chance), height, "chance"))
    for lane, (series, value, low, high) in enumerate(marks):
        y = 4 + _LANE * (lane + 0.5)
        x1, x2 = scale.percent(low), scale.percent(high)
        parts.append(f'<line class="whisker {escape(series)}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y:g}" y2="{y:g}"/>')
        parts.append(_marker(series, scale.percent(value), y))
    return Markup("".join(parts) + "</svg>")


def axis(scale: Scale) -> Markup:
    """The ticks of a column of interval strips, for its heading."""
    ticks = scale.ticks()
    texts = [_text(scale.percent(tick), 12, f"{100 * tick:.0f}", _anchor(scale.percent(tick))) for tick in ticks]
    return Markup(f'<svg class="axis" width="100%" height="16" aria-hidden="true">{"".join(texts)}</svg>')


@dataclass(frozen=True, slots=True)
class RoundPoint:
    """One round of a line plot; `state` is "", "final" or "rolled-back"."""

    round_index: int
    value: float
    low: float | None = None
    high: float | None = None
    state: str = ""


def line_plot(points: Sequence[RoundPoint], series: str, summary: str) -> Markup:
    """A share over rounds, with whiskers where given; rolled-back rounds are crossed out, the final one is ringed.

    Args:
        points: in order of rounds; at least one.
        series: CSS class of line and markers.
        summary: what a screen reader says instead of the picture.
    """
    bounds = [bound for point in points for bound in (point.low, point.value, point.high) if bound is not None]
    scale = share_scale(bounds)
    first, last = points[0].round_index, points[-1].round_index
    span = Scale(first - 0.35, last + 0.35) if last > first else Scale(first - 1, first + 1)

    def y(value: float) -> float:
        return _HEIGHT * (1 - scale.percent(value) / 100)

    label = escape(summary, quote=True)
    parts = [f'<svg class="plot" width="100%" height="{_HEIGHT + 24}" role="img" aria-label="{label}">']
    for tick in scale.ticks(5):
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="-8" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:g}</text>')
    for index in _round_ticks(first, last):
        parts.append(_text(span.percent(index), _HEIGHT + 18, str(index), "middle"))
    # A round that was rolled back is no step of the model's path: the line goes on from the round before it.
    path = [point for point in points if point.state != "rolled-back"]
    for before, after in pairwise(path):
        x1, x2 = span.percent(before.round_index), span.percent(after.round_index)
        y1, y2 = y(before.value), y(after.value)
        parts.append(f'<line class="path {escape(series)}" x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}"/>')
    if len(points) <= _MAX_MARKERS:
        parts += [_round_marker(point, series, span.percent(point.round_index), y) for point in points]
    return Markup("".join(parts) + "</svg>")


def _round_marker(point: RoundPoint, series: str, x: float, y: Callable[[float], float]) -> str:
    whisker = ""
    if point.low is not None and point.high is not None:
        y1, y2 = y(point.low), y(point.high)
        whisker = f'<line class="whisker {escape(series)}" x1="{x:.2f}%" x2="{x:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}"/>'
    shapes = {
        "rolled-back": '<path class="cross" d="M-5-5 5 5M5-5-5 5"/>',
        "final": '<circle class="ring" r="8.5"/><circle r="4.5"/>',
    }
    shape = shapes.get(point.state, '<circle r="4.5"/>')
    tip = f"round {point.round_index}: {100 * point.value:.1f} %"
    place = f'<svg x="{x:.2f}%" y="{y(point.value):.1f}" overflow="visible" class="mark {escape(series)}">'
    return f"{whisker}{place}<title>{tip}</title>{shape}</svg>"


def reward_bars(histograms: Mapping[int, Sequence[int]], labels: Sequence[str], summary: str) -> Markup:
    """One bar a round, divided by how many of the question's group were right: none (left) to all (right).

    Args:
        histograms: round → counts, one a class; rounds without a question are left out.
        labels: of the classes.
        summary: what a screen reader says instead of the picture.
    """
    rounds = [index for index, counts in histograms.items() if sum(counts) > 0]
    if len(rounds) > _MAX_BARS:
        rounds = [rounds[round(i * (len(rounds) - 1) / (_MAX_BARS - 1))] for i in range(_MAX_BARS)]
    row, bar = 26, 18
    height = row * len(rounds)
    label = escape(summary, quote=True)
    parts = [f'<svg class="plot" width="100%" height="{height}" role="img" aria-label="{label}">']
    for line, index in enumerate(rounds):
        counts = histograms[index]
        total, left, top = sum(counts), 0.0, line * row
        parts.append(f'<text x="-8" y="{top + 13}" text-anchor="end">{index}</text>')
        for step, count in enumerate(counts):
            width = 100 * count / total
            tip = f"round {index}, {escape(labels[step])}: {count} of {total} questions"
            opacity = ramp(step, len(counts))
            parts.append(
                f'<rect class="ramp" x="{left:.2f}%" y="{top}" width="{width:.2f}%" height="{bar}" '
                f'fill-opacity="{opacity}"><title>{tip}</title></rect>'
            )
            left += width
    return Markup("".join(parts) + "</svg>")


def ramp(step: int, steps: int) -> str:
    """Opacity of class `step` of `steps`, from faint to full."""
    return f"{0.1 + 0.9 * step / max(1, steps - 1):.2f}"


def _round_ticks(first: int, last: int) -> list[int]:
    step = max(1, math.ceil((last - first) / 12))
    return list(range(first, last + 1, step))


def _vertical(x: float, height: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x:.2f}%" x2="{x:.2f}%" y1="0" y2="{height:g}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.2f}%" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _anchor(x: float) -> str:
    return "start" if x < 2 else "end" if x > 98 else "middle"
