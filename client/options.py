"""The options of a question: the truth and its distractors, drawn from the published schema.

Runs at a hospital, on the true values of its patients, which are private; the distractors come from the schema that all
sites share, so the options show nothing of this hospital's own distribution.

Numbers (after Kim et al. 2025, arXiv 2505.02722): a mixture component is drawn in proportion to weight × density at the
truth; the options are an even ladder, its steps at most `spacing_sigma` of that component's sds; the truth's rank on it
is uniform. For features with scale = "log" both live on the logarithm, so the ladder is geometric. Values keep the
dictionary's decimals and plausible range.

Two things would let the options alone give the truth away, and decide how a ladder is built:

- Rungs that are rounded around a truth that is not. A table's value stands for everything that is rounded to it, so a
  point in that cell is drawn, the ladder is built from the point, and every rung is rounded the same way; the truth's
  own is rounded back to the truth.
- A ladder that is made to fit the range by what the truth leaves room for: one that ends exactly at the range's end
  says which rungs it cannot have been fitted to. So the step is drawn between a third of the widest and the widest that
  fits, and the rank among those that leave room for a third. Whichever rung is the truth, it might have drawn this
  ladder.

We depart from Kim et al. in the steps: theirs are all 2 sds, and leave the plausible range. Close to an end of the
range fewer ranks have room: a truth at the very end (GCS 3) is the lowest option of any honest question.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..common.config import OptionOrder
from ..common.counts import Grid, grid
from ..common.dictionary import Feature
from ..common.schema import FeatureSchema

NARROWEST = 1 / 3  # the narrowest step, as a share of the widest: two thirds of an sd at the default of 2
_CELL_PARTS = 1 << 20  # points in a cell: binary fractions, to which whole steps are added without rounding


@dataclass(frozen=True)
class Options:
    """Options of m questions about one target.

    Attributes:
        values: int64 (m, n), in letter order: grid index (numbers, `counts.Grid`) or level index (categories).
        answer: int64 (m,), the truth's position; uniform where the order is shuffled.
        majority: int64 (m,), position of the option with the largest frequency or density under the schema.
    """

    values: np.ndarray
    answer: np.ndarray
    majority: np.ndarray


def draw_options(
    truth: np.ndarray,
    feature: Feature,
    schema: FeatureSchema,
    n_options: int,
    spacing_sigma: float,
    rng: np.random.Generator,
    *,
    order: OptionOrder = "shuffled",
) -> Options:
    """Options for the true values `truth` of one target.

    Args:
        truth: (m,) no missing: values in the feature's unit (numbers) or level indices (categories).
        feature: the target; schema: its options generator.
        n_options: how many, fewer where the feature has fewer values or levels (then the same number for all m).
        spacing_sigma: the widest ladder step in sds of the drawn component.
        rng: consumed the same way for the same arguments.
        order: "shuffled": every order of letters equally likely; "sorted": levels as the dictionary has them, numbers
            rising. The options themselves are the same.

    Formal Guarantees: the truth is among the options exactly once, all options differ, and those of numbers lie in the
    plausible range on the dictionary's decimals. No option of a number can be ruled out by the others: each, were it
    the truth, would draw these very options with positive probability.
    """
    if feature.kind == "number":
        ladder, rank = _ladder(truth, feature, schema, n_options, spacing_sigma, rng)
        points = grid(feature).value(ladder)
        weight = schema.mixture.log_density(np.log(points) if feature.scale == "log" else points)
    else:
        ladder, rank = _levels(truth, schema, n_options, rng)
        weight = np.array(schema.frequencies)[ladder]
    if order == "sorted":
        place = np.argsort(ladder, axis=1)
    else:
        place = rng.permuted(np.tile(np.arange(ladder.shape[1]), (len(ladder), 1)), axis=1)
    return Options(
        values=np.take_along_axis(ladder, place, axis=1),
        answer=np.argmax(place == rank[:, None], axis=1),
        majority=np.argmax(np.take_along_axis(weight, place, axis=1), axis=1),
    )


def _levels(
    truth: np.ndarray, schema: FeatureSchema, n_options: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The truth first, then other levels by frequency without replacement (largest log frequency + Gumbel noise)."""
    frequencies = np.array(schema.frequencies)
    n = min(n_options, int(np.count_nonzero(frequencies)))
    with np.errstate(divide="ignore"):
        keys = np.log(frequencies) + rng.gumbel(size=(len(truth), len(frequencies)))
    keys[np.arange(len(truth)), truth] = np.inf
    return np.argsort(-keys, axis=1, kind="stable")[:, :n], np.zeros(len(truth), dtype=np.int64)


def _ladder(
    truth: np.ndarray,
    feature: Feature,
    schema: FeatureSchema,
    n_options: int,
    spacing_sigma: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Grid indices (m, n), increasing, and the truth's rank (m,) on them."""
    points = grid(feature)
    m, n = len(truth), min(n_options, points.size)
    index = np.clip(points.index(truth), points.first, points.last)
    values = points.value(index)
    joint = schema.mixture.log_joint(np.log(values) if feature.scale == "log" else values)
    component = np.argmax(joint + rng.gumbel(size=joint.shape), axis=1)
    in_cell = rng.integers(1, _CELL_PARTS, size=m) / _CELL_PARTS
    order, width = rng.random((m, n)), rng.random(m)
    ranks = np.arange(n)
    ladder, rank = np.empty((m, n), np.int64), np.empty(m, np.int64)
    for c in np.unique(component).tolist():
        mine = np.flatnonzero(component == c)
        scale = _Scale.of(feature, points, spacing_sigma * schema.sds[c], n)
        cell = index[mine] - points.first
        start, end = scale.place(cell), scale.place(cell + 1)
        below = (start + in_cell[mine] * (end - start))[:, None]
        with np.errstate(divide="ignore"):  # the lowest rung needs no room below, the highest none above
            room = np.minimum(below / ranks, (scale.length - below) / (n - 1 - ranks))
        widest = np.minimum(room, scale.widest)
        # Some rank always has room: the range is at least n of the narrowest steps. 1e-9: but for rounding.
        possible = widest >= scale.narrowest * (1 - 1e-9)
        rank[mine] = np.argmax(np.where(possible, order[mine], -1.0), axis=1)
        widest = widest[np.arange(len(mine)), rank[mine]]
        step = scale.narrowest + width[mine] * (widest - scale.narrowest)
        rungs = scale.cell(below + (ranks - rank[mine, None]) * step[:, None])
        ladder[mine] = np.clip(points.first + rungs, points.first, points.last)
    ladder[np.arange(m), rank] = index  # as rounding gives it; said again, lest a last bit decide
    return ladder, rank


@dataclass(frozen=True)
class _Scale:
    """The line on which a ladder is even, from the low end of the plausible range (0) to its high end (`length`).

    Distances are in decimals (scale = "linear") or in nats. Where a step in nats would be less than one decimal, below
    `bend`, the logarithm goes on as its tangent: so no two rungs round to one value.
    """

    low: float  # the low end, half a decimal below the first grid value, in decimals
    bend: float  # in decimals; 0: linear throughout
    narrowest: float
    widest: float
    length: float

    @classmethod
    def of(cls, feature: Feature, points: Grid, step: float, n: int) -> _Scale:
        """The scale for ladders of n rungs, their steps at most `step`: in the unit, or in nats for scale = "log"."""
        low = points.first - 0.5
        if feature.scale == "linear" or points.size < 2 * n:  # no geometric ladder has room on so few values
            most = points.size / (n - 1)
            widest = max(1.0, min(step * 10.0**feature.decimals if feature.scale == "linear" else most, most))
            narrowest = min(max(1.0, NARROWEST * widest), points.size / n)
            return cls(low, 0.0, narrowest, widest, float(points.size))
        high = points.last + 0.5
        widest = min(step, float(np.log(high / low)) / (n - 1))
        narrowest = NARROWEST * widest
        while True:
            bend = max(low, 1.001 / narrowest)
            length = float(_nats(np.array(high), bend) - _nats(np.array(low), bend))
            if n * narrowest <= length:  # in the end it is: all tangent, the range is size × narrowest / 1.001 long
                return cls(low, bend, narrowest, widest, length)
            narrowest *= 0.9

    def place(self, cells: np.ndarray) -> np.ndarray:
        """Where on the line the low end of a cell lies; cell 0 is that of the first grid value."""
        if not self.bend:
            return cells.astype(np.float64)
        return _nats(cells + self.low, self.bend) - _nats(np.array(self.low), self.bend)

    def cell(self, place: np.ndarray) -> np.ndarray:
        """The cell, int64, that a place on the line lies in."""
        if self.bend:
            nats = place + _nats(np.array(self.low), self.bend)
            place = np.where(nats < 0, nats + 1, np.exp(np.maximum(nats, 0))) * self.bend - self.low
        return np.floor(place).astype(np.int64)


def _nats(decimals: np.ndarray, bend: float) -> np.ndarray:
    """log(decimals / bend), below the bend its tangent."""
    return np.where(decimals < bend, decimals / bend - 1, np.log(np.maximum(decimals, bend) / bend))
