"""What a hospital releases about all of its patients at once in a private run: counts and test results with noise.

Run by the site, in runs with differential privacy. Enters: its counts, its test results. Leaves, as payloads of secure
sums (client/payload.py): whole numbers, each with Gaussian noise from the site's own randomness; rounding comes after
the noise and costs no privacy. Private: the exact numbers. How much noise is common/noisy.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..common.counts import Layout
from ..common.noisy import OFFSET, RESULTS_SENSITIVITY, count_scales
from ..common.statistics import Tally

if TYPE_CHECKING:
    from .randomness import SecureRandom

Ints = NDArray[np.int64]


def one_row_each(patients: Sequence[NDArray[np.integer]], random: SecureRandom) -> Ints:
    """One row of every patient, by chance: whoever was admitted ten times counts once."""
    share = random.uniform(len(patients))
    return np.array([rows[int(one * len(rows))] for rows, one in zip(patients, share, strict=True)], np.int64)


def noised_counts(vector: Ints, layout: Layout, multiplier: float, random: SecureRandom) -> NDArray[np.uint32]:
    """A site's counts with noise, modulo 2^32.

    Args:
        vector: of `layout`, of one row a patient.
        layout: of dictionary and config.
        multiplier: noise over sensitivity.
        random: the site's own.
    """
    one, two = count_scales(layout, multiplier)
    first = layout.first_table
    noise = np.concatenate([random.gaussian(first, one).numpy(), random.gaussian(len(vector) - first, two).numpy()])
    return np.rint(vector + noise).astype(np.int64).astype(np.uint32)


def noised_results(tally: Tally, multiplier: float, random: SecureRandom) -> Ints:
    """Patterns of right and wrong answers over all questions, with noise, each plus `OFFSET`; nothing else of a tally.

    Args:
        tally: of at most one question a test patient.
        multiplier: noise over sensitivity.
        random: the site's own.
    """
    patterns = tally.patterns.sum(0)
    noise = random.gaussian(len(patterns), multiplier * RESULTS_SENSITIVITY).numpy()
    return np.rint(patterns + noise).astype(np.int64) + OFFSET
