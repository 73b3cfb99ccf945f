"""Sums with noise: how much a site adds to which number, and how the coordinator reads the sum.

Used by both roles in private runs (docs/privacy.md), so that noise and reading cannot differ. Pure; the noise itself is
made by client/private_release.py. Enters: layouts and public noise multipliers; noised sums. Leaves: standard
deviations; counts that know their noise. What is done to a noised sum costs no privacy.

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

from .config import PrivacyConfig
from .counts import EXACT, Counts, Layout, Resolution
from .dictionary import Dictionary
from .errors import ProtocolError
from .statistics import CHANCE_UNIT, Tally

Ints = NDArray[np.int64]

EVERYTHING = "all"  # the one target of noised test results
RESULTS_SENSITIVITY = math.sqrt(2)
OFFSET = 2**30  # added to every noised number of a tail, which holds none below 0; far above any noise


def resolution(privacy: PrivacyConfig) -> Resolution:
    """How fine a run's counts are: a property of its config, which all sites sign (secure-sums.md §S4)."""
    return Resolution(privacy.schema_bins, privacy.schema_pair_bins) if privacy.enabled else EXACT


def count_scales(layout: Layout, multiplier: float) -> tuple[float, float]:
    """Standard deviations (s₁, s₂) of a site's noise on rows and bins, and on tables.

    Of all that have the multiplier, those that leave one histogram and one table least squared error together, on
    average: one is worth as much as the other. By Lagrange, k₁ s₁² + k₂ s₂² under 1 / multiplier² = a / s₁² + b / s₂²
    is least where s₁⁴ ∝ a / k₁ and s₂⁴ ∝ b / k₂; k₁ is bins a column, k₂ cells a table. (Least error of all counts
    together would give all nearly equal noise, because nearly all are cells: then a fifth of the demo's targets are
    lost for 7 % less noise on tables.)
    """
    a, b = 1 + len(layout.features), len(layout.pairs)
    if not b:
        return multiplier * math.sqrt(a), 0.0
    bins, cells = layout.first_table / len(layout.features), (layout.size - layout.first_table) / b
    both = math.sqrt(a * bins) + math.sqrt(b * cells)
    return multiplier * math.sqrt(math.sqrt(a / bins) * both), multiplier * math.sqrt(math.sqrt(b / cells) * both)


def read_counts(ring: NDArray[np.uint32], dictionary: Dictionary, privacy: PrivacyConfig, sites: int) -> Counts:
    """Counts from the noised sum of some sites, and how much noise is on them.

    Args:
        ring: the sum, modulo 2^32; noise may have made it negative.
        dictionary: the run's.
        privacy: the run's; on.
        sites: how many are in the sum, each with noise of its own.

    Raises:
        ProtocolError: not the length that dictionary and config give.
    """
    fine = resolution(privacy)
    layout = Layout(dictionary, fine)
    if ring.shape != (layout.size,):
        raise ProtocolError(f"schema counts: expected {layout.size} integers, got {ring.shape}")
    one, two = (scale * math.sqrt(sites) for scale in count_scales(layout, privacy.schema_noise_multiplier))
    return Counts(dictionary, ring.view(np.int32).astype(np.int64), fine, one, two)


def results_noise(multiplier: float, sites: int) -> float:
    """Standard deviation of the noise on each number of a sum of test results: of every site, and of its rounding."""
    return math.sqrt(sites * ((multiplier * RESULTS_SENSITIVITY) ** 2 + 1 / 12))


def read_results(tail: Ints, chance: float, models: Sequence[str], sites: int, multiplier: float) -> Tally:
    """Test results from their noised sum, as the tally of one target, `EVERYTHING`, which knows its noise.

    Args:
        tail: the sum of patterns, int64 (2^(models + 1),), each site's with `OFFSET`.
        chance: of guessing right, from the schema; it is not counted.
        models: as at the sites.
        sites: how many are in the sum.
        multiplier: the run's `privacy.metrics_noise_multiplier`.
    """
    patterns = (tail - sites * OFFSET).reshape(1, -1)
    expected = round(max(1.0, float(patterns.sum())) * CHANCE_UNIT * chance)
    nothing = np.zeros((1, len(models)), np.int64)
    noise = results_noise(multiplier, sites)
    return Tally((EVERYTHING,), tuple(models), patterns, np.array([expected]), nothing, nothing, noise)
