"""The options of a question: the truth and its distractors, drawn from the published schema.

Runs at a hospital, on the true values of its patients, which are private; the distractors come from the schema that all
sites share, so the options show nothing of this hospital's own distribution.

Numbers (after Kim et al. 2025, arXiv 2505.02722): a mixture component is drawn in proportion to weight × density at the
truth; the options are an even ladder with steps of `spacing_sigma` of its sds; the truth's rank on it is uniform. For
features with scale = "log" both live on the logarithm, so the ladder is geometric. Values keep the dictionary's
decimals and plausible range.

A ladder that would leave the plausible range must not say where the truth is, as cutting it or bending one side of it
would: the whole ladder gets narrower, down to a quarter, and keeps the rank; only if that is not enough, the rank
moves to the nearest one that fits. So the rank is uniform except close to an end of the range: a truth at the very end
(GCS 3) is the lowest option in any honest question. On a linear scale steps are whole decimals, or rounding would make
the gaps uneven around the truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..common.counts import grid
from ..common.dictionary import Feature
from ..common.schema import FeatureSchema

SHRINK = 0.25  # the narrowest ladder, as a share of the drawn spacing: half an sd at the default of 2


@dataclass(frozen=True)
class Options:
    """Options of m questions about one target.

    Attributes:
        values: int64 (m, n), in letter order: grid index (numbers, `counts.Grid`) or level index (categories).
        answer: int64 (m,), the truth's position, uniform.
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
) -> Options:
    """Options for the true values `truth` of one target.

    Args:
        truth: (m,) no missing: values in the feature's unit (numbers) or level indices (categories).
        feature: the target; schema: its options generator.
        n_options: how many, fewer where the feature has fewer values or levels (then the same number for all m).
        spacing_sigma: ladder step in sds of the drawn component.
        rng: consumed the same way for the same arguments.
    """
    if feature.kind == "number":
        ladder, rank = _ladder(truth, feature, schema, n_options, spacing_sigma, rng)
        points = grid(feature).value(ladder)
        weight = schema.mixture.log_density(np.log(points) if feature.scale == "log" else points)
    else:
        ladder, rank = _levels(truth, schema, n_options, rng)
        weight = np.array(schema.frequencies)[ladder]
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
    n = min(n_options, points.size)
    index = np.clip(points.index(truth), points.first, points.last)
    values = points.value(index)
    logarithmic = feature.scale == "log"
    joint = schema.mixture.log_joint(np.log(values) if logarithmic else values)
    component = np.argmax(joint + rng.gumbel(size=joint.shape), axis=1)
    rank = rng.integers(n, size=len(truth))
    step = spacing_sigma * np.array(schema.sds)[component]
    if logarithmic:
        below, above = np.log(index / points.first), np.log(points.last / index)
        narrowest = SHRINK * step
    else:  # in grid units, whole
        below, above = index - points.first, points.last - index
        step = np.maximum(1.0, np.rint(step * 10.0**feature.decimals))
        narrowest = np.maximum(1.0, np.ceil(SHRINK * step))

    # Ranks that leave room for the narrowest ladder; where none does, ranks that leave room for any ladder.
    room_below, room_above = index - points.first, points.last - index
    lowest = np.maximum(n - 1 - np.floor(above / narrowest + 1e-9), n - 1 - room_above)
    highest = np.minimum(np.floor(below / narrowest + 1e-9), room_below)
    none = lowest > highest
    lowest = np.where(none, n - 1 - room_above, lowest)
    highest = np.where(none, room_below, highest)
    rank = np.clip(rank, lowest, highest).astype(np.int64)
    with np.errstate(divide="ignore", invalid="ignore"):
        fits = np.fmin(below / rank, above / (n - 1 - rank))  # 0 / 0 is NaN: that side needs no room
    step = np.minimum(step, fits) if logarithmic else np.maximum(1.0, np.floor(np.minimum(step, fits) + 1e-9))

    rungs = np.arange(n)[None, :] - rank[:, None]
    exact = index[:, None] * np.exp(rungs * step[:, None]) if logarithmic else index[:, None] + rungs * step[:, None]
    ladder = np.rint(exact).astype(np.int64)
    # Rounding a geometric ladder may repeat a value: from the truth outwards every rung is at least one decimal
    # further, and leaves one decimal for each rung still to come.
    for j in range(1, n):
        rows = np.flatnonzero(rank + j < n)
        at = rank[rows] + j
        limit = points.last - (n - 1 - at)
        ladder[rows, at] = np.minimum(np.maximum(ladder[rows, at], ladder[rows, at - 1] + 1), limit)
        rows = np.flatnonzero(rank - j >= 0)
        at = rank[rows] - j
        limit = points.first + at
        ladder[rows, at] = np.maximum(np.minimum(ladder[rows, at], ladder[rows, at + 1] - 1), limit)
    return ladder, rank
