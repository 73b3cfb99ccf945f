"""Unit conversions between a hospital's own units and the consortium's dictionary.

Run at one hospital when `[mapping] units` in site.toml names a local unit. Nothing leaves. Concentrations depend on
the substance (1 mg/dL of creatinine is 88.42 µmol/L, of bilirubin 17.10), which is told from the entry's name and
label; where that fails, the person gives the factor.
"""

from __future__ import annotations

import re

import numpy as np

from ..common.dictionary import Feature
from ..common.errors import ConfigError

# (from, to): (factor, offset); value_to = value_from × factor + offset. Reverse pairs are derived.
_ANY: dict[tuple[str, str], tuple[float, float]] = {
    ("degf", "degc"): (5 / 9, -160 / 9),
    ("kpa", "mmhg"): (7.500617, 0.0),
    ("lb", "kg"): (0.45359237, 0.0),
    ("g", "kg"): (0.001, 0.0),
    ("cm", "m"): (0.01, 0.0),
    ("mm", "cm"): (0.1, 0.0),
    ("mm", "m"): (0.001, 0.0),
    ("in", "cm"): (2.54, 0.0),
    ("in", "m"): (0.0254, 0.0),
    ("g/l", "g/dl"): (0.1, 0.0),
    ("l/24h", "ml/24h"): (1000.0, 0.0),
    ("l/l", "%"): (100.0, 0.0),
    ("fraction", "%"): (100.0, 0.0),
    ("mg/l", "mg/dl"): (0.1, 0.0),
    ("ug/l", "mg/dl"): (0.0001, 0.0),
    ("umol/l", "mmol/l"): (0.001, 0.0),
    ("nmol/l", "umol/l"): (0.001, 0.0),
    ("meq/l", "mmol/l"): (1.0, 0.0),  # sodium, potassium, chloride, bicarbonate: one charge
    ("10^3/ul", "10^9/l"): (1.0, 0.0),
    ("/ul", "10^9/l"): (0.001, 0.0),
    ("/ul", "10^3/ul"): (0.001, 0.0),
    ("months", "years"): (1 / 12, 0.0),
    ("days", "years"): (1 / 365.25, 0.0),
    ("hours", "days"): (1 / 24, 0.0),
}
# mmol/L for 1 mg/dL: 10 / molar mass (g/mol). Urea is counted as urea nitrogen (28.01) where the entry says so.
_SUBSTANCES: tuple[tuple[str, float], ...] = (
    (r"creat", 10 / 113.12),
    (r"bili", 10 / 584.66),
    (r"gluc|glut|sugar", 10 / 180.156),
    (r"urea nitrogen|\bbun\b", 10 / 28.014),
    (r"\burea\b", 10 / 60.056),
    (r"triglycer|\btrig\b", 10 / 885.7),
    (r"chol|\bhdl\b|\bldl\b", 10 / 386.65),
    (r"uric|urate", 10 / 168.11),
    (r"lactate", 10 / 90.08),
    (r"calcium", 10 / 40.078),
    (r"magnes", 10 / 24.305),
    (r"phosph", 10 / 30.974),
    (r"homocyst", 10 / 135.18),
)
_HAEMOGLOBIN_MMOL_L_PER_G_DL = 0.6206  # monomer, as Dutch and Danish laboratories report it

_SAME = {
    "°c": "degc", "c": "degc", "celsius": "degc", "°f": "degf", "f": "degf", "fahrenheit": "degf",
    "lbs": "lb", "inch": "in", "inches": "in", "x10^9/l": "10^9/l", "10*9/l": "10^9/l", "10e9/l": "10^9/l",
    "10*3/ul": "10^3/ul", "k/ul": "10^3/ul", "ml/day": "ml/24h", "l/day": "l/24h", "year": "years", "month": "months",
    "day": "days", "hour": "hours", "h": "hours", "umol": "umol/l", "percent": "%",
}  # fmt: skip


def normal_unit(unit: str) -> str:
    """A unit in one spelling: lower case, no spaces, micro as u.

    >>> normal_unit("µmol / L"), normal_unit("°F")
    ('umol/l', 'degf')
    """
    text = re.sub(r"\s+", "", unit).replace("µ", "u").replace("μ", "u").lower()
    return _SAME.get(text, text)


def _direct(source: str, target: str) -> tuple[float, float] | None:
    if source == target:
        return 1.0, 0.0
    if (source, target) in _ANY:
        return _ANY[source, target]
    if (target, source) in _ANY:
        factor, offset = _ANY[target, source]
        return 1 / factor, -offset / factor
    return None


def conversion(feature: Feature, local: str | float) -> tuple[float, float]:
    """(factor, offset) that turns a local value into the dictionary's unit: value × factor + offset.

    Args:
        feature: the dictionary's entry; its unit is the target, its name and label tell the substance.
        local: the hospital's unit, or a plain factor.

    Raises:
        ConfigError: no unit in the dictionary, or the pair is not known for this substance.

    >>> crea = Feature(name="crea", label="Creatinine", section="Labs", kind="number", unit="mg/dL", low=0.1, high=25)
    >>> round(88.42 * conversion(crea, "µmol/L")[0], 3)
    1.0
    """
    where = f"mapping.units: feature '{feature.name}'"
    if feature.kind != "number":
        raise ConfigError(f"{where} is a category; units belong to numbers")
    if not isinstance(local, str):
        if local <= 0:
            raise ConfigError(f"{where}: expected a factor above 0, got {local:g}")
        return float(local), 0.0
    if feature.unit is None:
        raise ConfigError(f"{where} has no unit in the dictionary, so '{local}' cannot be converted; give a factor")
    source, target = normal_unit(local), normal_unit(feature.unit)
    found = _direct(source, target)
    if found is not None:
        return found
    text = f"{feature.name} {feature.label} {feature.description}".lower()
    if re.search(r"h(a)?emoglobin|\bhb\b", text) and {source, target} == {"g/dl", "mmol/l"}:
        per = _HAEMOGLOBIN_MMOL_L_PER_G_DL
        return (per, 0.0) if target == "mmol/l" else (1 / per, 0.0)
    for pattern, mmol_per_mg_dl in _SUBSTANCES:
        if not re.search(pattern, text):
            continue
        # By way of mg/dL and mmol/L: local → one of the two → across → target.
        for side, other, across in (("mg/dl", "mmol/l", mmol_per_mg_dl), ("mmol/l", "mg/dl", 1 / mmol_per_mg_dl)):
            first, last = _direct(source, side), _direct(other, target)
            if first is not None and last is not None:
                return first[0] * across * last[0], 0.0
        break
    raise ConfigError(f"{where}: no conversion from '{local}' to '{feature.unit}' is known; give a factor instead")


_LOCAL_UNITS = (
    "µmol/L", "mmol/L", "mg/dL", "g/L", "g/dL", "°F", "°C", "kPa", "mmHg", "lb", "kg", "cm", "m", "L/24h", "fraction",
    "10^9/L", "/µL", "months",
)  # fmt: skip


def plausible_unit(feature: Feature, raw: np.ndarray, wanted: float = 0.95) -> str | None:
    """The local unit under which at least `wanted` of the values would lie in the plausible range, or None.

    Args:
        feature: a number of the dictionary.
        raw: float64 (rows,), values as in the table, NaN missing.
        wanted: share of the values that must fit.
    """
    low, high = feature.bounds
    known = raw[~np.isnan(raw)]
    best: tuple[float, str] | None = None
    for unit in _LOCAL_UNITS:
        try:
            factor, offset = conversion(feature, unit)
        except ConfigError:
            continue  # this pair has no conversion: not a candidate
        converted = known * factor + offset
        fits = float(np.mean((converted >= low) & (converted <= high))) if known.size else 0.0
        if factor != 1.0 and fits >= wanted and (best is None or fits > best[0]):
            best = (fits, unit)
    return best[1] if best else None
