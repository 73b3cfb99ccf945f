"""Sums with noise: how much a site adds to which number, and how the coordinator reads the sum.

Used by both roles in private runs (docs/privacy.md), so that noise and reading cannot differ. Pure; the noise itself is
made by client/private_release.py. Enters: layouts and public noise multipliers; noised sums. Leaves: standard
deviations; counts that can be used. What is done to a noised sum costs no privacy.

Sensitivities: add or take away one patient, of whom one encounter and one test question is counted.

    counts        one row, at most one bin of each of d columns, at most one cell of each of P tables. With noise s₁ on
                  rows and bins and s₂ on tables the multiplier is 1 / √((1 + d) / s₁² + P / s₂²).
    test results  a patient is in one pattern of right and wrong answers, and may keep another one out of the questions
                  that are asked: √2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .counts import Layout
from .statistics import CHANCE_UNIT, Tally

Ints = NDArray[np.int64]

EVERYTHING = "all"  # the one target of noised test results
RESULTS_SENSITIVITY = math.sqrt(2)
OFFSET = 2**30  # added to every noised number of a tail, which holds none below 0; far above any noise
SEEN_FROM = 2.0  # standard deviations of its noise from which a count is taken to be more than noise


def count_scales(layout: Layout, multiplier: float) -> tuple[float, float]:
    """Standard deviations (s₁, s₂) of a site's noise on rows and bins, and on tables.

    Of all that have the multiplier, those of least total variance: by Lagrange, n₁ s₁² + n₂ s₂² under
    1 / multiplier² = a / s₁² + b / s₂² is least where s₁⁴ ∝ a / n₁ and s₂⁴ ∝ b / n₂.
    """
    bins, tables = layout.first_table, layout.size - layout.first_table
    a, b = 1 + len(layout.features), len(layout.pairs)
    if not tables:
        return multiplier * math.sqrt(a), 0.0
    both = math.sqrt(a * bins) + math.sqrt(b * tables)
    return multiplier * math.sqrt(math.sqrt(a / bins) * both), multiplier * math.sqrt(math.sqrt(b / tables) * both)


def read_counts(ring: NDArray[np.uint32], layout: Layout, multiplier: float, sites: int) -> Ints:
    """Counts from the noised sum of some sites: below zero, or lost in the noise, is zero.

    Args:
        ring: the sum, modulo 2^32; noise may have made it negative.
        layout: of the dictionary.
        multiplier: of every site's noise.
        sites: how many are in the sum.
    """
    values = ring.view(np.int32).astype(np.int64)
    one, two = (SEEN_FROM * scale * math.sqrt(sites) for scale in count_scales(layout, multiplier))
    first = layout.first_table
    rows = max(int(values[0]), 1)
    values[:first][values[:first] < one] = 0
    values[first:][values[first:] < two] = 0
    values[0] = rows
    return values


def read_results(tail: Ints, chance: float, models: Sequence[str], sites: int) -> Tally:
    """Test results from their noised sum, as the tally of one target, `EVERYTHING`.

    Args:
        tail: the sum of patterns, int64 (2^(models + 1),), each site's with `OFFSET`.
        chance: of guessing right, from the schema; it is not counted.
        models: as at the sites.
        sites: how many are in the sum.
    """
    patterns = np.maximum(tail - sites * OFFSET, 0)
    if not patterns.sum():
        patterns[0] = 1  # all noise: nothing was right
    expected = round(float(patterns.sum()) * CHANCE_UNIT * chance)
    nothing = np.zeros(len(models), np.int64)
    vector = np.concatenate([patterns, [expected], nothing, nothing]).astype(np.int64)
    return Tally.from_vector(vector, [EVERYTHING], models)
