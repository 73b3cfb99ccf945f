"""What a question says is usual of its target among all patients: as a laboratory prints its reference range.

Runs at a hospital. Enters: the published schema, which all sites share; nothing of the hospital's own patients.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..common.counts import grid
from ..common.dictionary import Feature
from ..common.question import PromptTemplate
from ..common.schema import FeatureSchema

_TAIL = 1 / 6  # of the mass is below what is written as low, and as much above high


def usual_words(
    feature: Feature, schema: FeatureSchema, template: PromptTemplate, value_of: Callable[[int], str], unit: str
) -> str:
    """The phrase, in the template's words; empty where the template has none.

    Args:
        feature: the target.
        schema: its distribution among all patients.
        template: of the run.
        value_of: how a value is written: level index, or grid index of a number.
        unit: with a space before it, or empty.
    """
    if not template.says_usual:
        return ""
    if feature.kind == "category":
        return template.usual_shares([(value_of(level), share) for level, share in enumerate(schema.frequencies)])
    points = grid(feature)
    indices = np.arange(points.first, points.last + 1)
    values = points.value(indices)
    scaled = np.log(values) if feature.scale == "log" else values
    density = np.exp(schema.mixture.log_density(scaled))
    mass = np.cumsum(density * np.gradient(scaled) if len(scaled) > 1 else density)
    low, high = (indices[np.searchsorted(mass, share * mass[-1])] for share in (_TAIL, 1 - _TAIL))
    middle = indices[np.argmax(density)]
    return template.usual_number.format(
        middle=value_of(int(middle)), low=value_of(int(low)), high=value_of(int(high)), unit=unit
    )
