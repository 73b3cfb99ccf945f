"""One picture of the federated experiment: what was learnt by how many questions, and what test patients say of it.

Run on one machine, by federated.py. Enters: its result and the rounds of its runs. Leaves: an SVG with nothing to load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 960, 380
_TOP, _BOTTOM = 40, 320
_LEFT, _MIDDLE = (60, 440), (640, 930)  # the two panels, in x
_COLOURS = {"federated": "#0b6e99", "skewed": "#7a4fa3", "centralised": "#c2571a", "local": "#4f7f2f"}
_GREY = "#555"

# (questions asked so far, validation accuracy) after each round, from round 0 where it is known.
Curve = Sequence[tuple[int, float]]


def draw(result: Mapping[str, Any], curves: Mapping[str, Sequence[Curve]]) -> str:
    """The SVG.

    Args:
        result: of federated.py's `summarise`, with "split".
        curves: arm → one curve a seed.
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    if curves:
        parts += _curves(curves)
    parts += _intervals(result)
    return "\n".join([*parts, "</svg>\n"])


def _curves(curves: Mapping[str, Sequence[Curve]]) -> list[str]:
    """Left: validation accuracy by questions, a line a seed."""
    points = [point for several in curves.values() for curve in several for point in curve]
    most = max(questions for questions, _ in points)
    low, high = _range([accuracy for _, accuracy in points])
    x0, x1 = _LEFT

    def x(questions: int) -> float:
        return x0 + (x1 - x0) * questions / most

    parts = [_text(x0, 22, "Validation patients, by questions asked (a line a seed)", bold=True)]
    for tick in _ticks(low, high):
        y = _scaled(tick, low, high, _BOTTOM, _TOP)
        parts += [_line(x0, y, x1, y, "#e4e4e4"), _text(x0 - 6, y + 4, f"{100 * tick:.0f} %", anchor="end")]
    for share in (0, 0.5, 1):
        parts.append(_text(x(round(most * share)), _BOTTOM + 20, f"{round(most * share):,}", anchor="middle"))
    for place, (arm, several) in enumerate(curves.items()):
        colour = _COLOURS.get(arm, _GREY)
        for curve in several:
            path = " ".join(f"{x(n):.1f},{_scaled(a, low, high, _BOTTOM, _TOP):.1f}" for n, a in curve)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [_line(x0 + 110 * place, 362, x0 + 110 * place + 18, 362, colour, 3)]
        parts.append(_text(x0 + 110 * place + 24, 366, arm))
    return parts


def _intervals(result: Mapping[str, Any]) -> list[str]:
    """Right: accuracy on the exam with 95 % intervals, the best at the top."""
    arms = sorted(result["arms"].items(), key=lambda item: -item[1]["mean"])
    low, high = _range([result["chance"], *(bound for _, entry in arms for bound in entry["ci95"])])
    x0, x1 = _MIDDLE
    parts = [_text(x0 - 110, 22, f"{result['n']:,} questions of {result['split']} patients, 95 %", bold=True)]
    for tick in _ticks(low, high):
        x = _scaled(tick, low, high, x0, x1)
        parts += [_line(x, _TOP, x, _BOTTOM, "#e4e4e4"), _text(x, _BOTTOM + 20, f"{100 * tick:.0f} %", anchor="middle")]
    chance = _scaled(result["chance"], low, high, x0, x1)
    parts += [_line(chance, _TOP, chance, _BOTTOM, _GREY, dash=True), _text(chance + 4, _BOTTOM - 4, "chance")]
    for row, (name, entry) in enumerate(arms):
        y = _TOP + (row + 0.5) * (_BOTTOM - _TOP) / len(arms)
        first, last = (_scaled(bound, low, high, x0, x1) for bound in entry["ci95"])
        colour, at = _COLOURS.get(name, _GREY), _scaled(entry["mean"], low, high, x0, x1)
        parts += [_text(x0 - 10, y + 4, name, anchor="end"), _line(first, y, last, y, colour, 3)]
        parts.append(f'<circle cx="{at:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        # Beside the mark, on the side that has room.
        side = (at - 12, "end") if at > (x0 + x1) / 2 else (at + 12, "start")
        parts.append(_text(side[0], y - 8, f"{100 * entry['mean']:.1f}", anchor=side[1]))
    return parts


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The values' range, opened to whole twentieths."""
    low, high = int(20 * min(values)) / 20, -int(-20 * max(values) // 1) / 20
    return (low, high) if high > low else (low, low + 0.05)


def _ticks(low: float, high: float) -> list[float]:
    step = 0.05 if high - low <= 0.3 else 0.1
    first = round(low / step + 0.49)
    return [tick * step for tick in range(first, int(high / step + 1e-9) + 1)]


def _scaled(value: float, low: float, high: float, first: float, last: float) -> float:
    return first + (last - first) * (value - low) / (high - low)


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, width: int = 1, dash: bool = False) -> str:
    more = ' stroke-dasharray="4 3"' if dash else ""
    ends = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{more}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
