"""Unit conversions between a hospital's own units and the consortium's dictionary.

Run at one hospital when `[mapping] units` in site.toml names a local unit. Nothing leaves. Concentrations depend on
the substance (1 mg/dL of creatinine is 88.42 µmol/L, of bilirubin 17.10), which is told from the entry's name and
label, never from its description, which may mention others; where none or several are meant, the person gives the
factor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

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
    ("g/l", "mg/dl"): (100.0, 0.0),
    ("g/dl", "mg/dl"): (1000.0, 0.0),
    ("l/24h", "ml/24h"): (1000.0, 0.0),
    ("l/l", "%"): (100.0, 0.0),
    ("fraction", "%"): (100.0, 0.0),
    ("mg/l", "mg/dl"): (0.1, 0.0),
    ("ug/l", "mg/dl"): (0.0001, 0.0),
    ("umol/l", "mmol/l"): (0.001, 0.0),
    ("nmol/l", "umol/l"): (0.001, 0.0),
    ("10^3/ul", "10^9/l"): (1.0, 0.0),
    ("/ul", "10^9/l"): (0.001, 0.0),
    ("/ul", "10^3/ul"): (0.001, 0.0),
    ("months", "years"): (1 / 12, 0.0),
    ("days", "years"): (1 / 365.25, 0.0),
    ("hours", "days"): (1 / 24, 0.0),
}


@dataclass(frozen=True)
class _Substance:
    """What a concentration is of, found by words of an entry's name and label."""

    pattern: str
    molar_mass: float  # g/mol
    charge: int | None = None  # mEq in a mmol, where laboratories report mEq


_SUBSTANCES = (
    _Substance(r"[ck]rea(t(inine?)?)?", 113.12),
    _Substance(r"bili(rubin)?", 584.66),
    _Substance(r"gluc(ose)?|blood sugar", 180.156),
    _Substance(r"urea nitrogen|bun", 28.014),  # the nitrogen alone is counted
    _Substance(r"urea(?!.*\burea nitrogen)(?! nitrogen)", 60.056),
    _Substance(r"triglycerides?|trig", 885.7),
    _Substance(r"chol(esterol)?|hdl|ldl", 386.65),
    _Substance(r"uric acid|urate", 168.11),
    _Substance(r"lactate|lact", 90.08),
    _Substance(r"calcium", 40.078, 2),
    _Substance(r"magnesium", 24.305, 2),
    _Substance(r"phosphate|phosphorus", 30.974),  # reported as phosphorus
    _Substance(r"homocyst(eine)?", 135.18),
    _Substance(r"sodium", 22.990, 1),
    _Substance(r"potassium", 39.098, 1),
    _Substance(r"chloride", 35.453, 1),
    _Substance(r"bicarb(onate)?|hco ?3", 61.017, 1),
    _Substance(r"ha?emoglobin|hb|hgb", 16_114.0),  # of the monomer, as Dutch and Danish laboratories report it
)

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
    substances = _substances(feature)
    if len(substances) == 1:
        factor = _by_substance(source, target, substances[0])
        if factor is not None:
            return factor, 0.0
    why = f"; its name and label name {len(substances)} substances" if len(substances) > 1 else ""
    raise ConfigError(f"{where}: no conversion from '{local}' to '{feature.unit}' is known{why}; give a factor instead")


def _substances(feature: Feature) -> list[_Substance]:
    """The substances that an entry's name and label name: `crea1`, "Urea nitrogen"."""
    # Words apart, digits at their end off: "bili1" is about bilirubin, "bilirubinuria" is not.
    text = re.sub(r"[^a-z0-9]+", " ", f"{feature.name} | {feature.label}".lower())
    return [found for found in _SUBSTANCES if re.search(rf"\b(?:{found.pattern})\d*\b", text)]


def _by_substance(source: str, target: str, substance: _Substance) -> float | None:
    """The factor by way of mmol/L: source → mmol/L → target."""
    to_mmol_l: list[float] = []
    for unit in (source, target):
        for known, factor in (
            ("mmol/l", 1.0),
            ("mg/dl", 10 / substance.molar_mass),
            ("meq/l", 1 / substance.charge if substance.charge else None),
        ):
            direct = _direct(unit, known)
            if direct is not None and factor is not None:
                to_mmol_l.append(direct[0] * factor)
                break
        else:
            return None
    return to_mmol_l[0] / to_mmol_l[1]


_LOCAL_UNITS = (
    "µmol/L", "mmol/L", "mg/dL", "g/L", "g/dL", "°F", "°C", "kPa", "mmHg", "lb", "kg", "cm", "m", "L/24h", "fraction",
    "10^9/L", "/µL", "months",
)  # fmt: skip
_WANTED_SHARE = 0.95


def plausible_unit(feature: Feature, raw: np.ndarray) -> str | None:
    """The local unit under which nearly all values would lie in the plausible range, or None.

    Args:
        feature: a number of the dictionary.
        raw: float64 (rows,), values as in the table, NaN missing.
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
        if factor != 1.0 and fits >= _WANTED_SHARE and (best is None or fits > best[0]):
            best = (fits, unit)
    return best[1] if best else None
