"""Units of hospitals become the dictionary's, or are refused: a wrong factor would be silent."""

import doctest

import numpy as np
import pytest
from wardround.client import units
from wardround.client.units import conversion, plausible_unit
from wardround.common.dictionary import Feature
from wardround.common.errors import ConfigError


def number(label: str, unit: str | None, name: str = "x", description: str = "", **more: object) -> Feature:
    entry = {"kind": "number", "section": "S", "low": 0.001, "high": 1e6, "decimals": 6, **more}
    return Feature.model_validate({"name": name, "label": label, "unit": unit, "description": description, **entry})


@pytest.mark.parametrize(
    ("label", "unit", "local", "value", "expected"),
    [
        ("Creatinine", "mg/dL", "µmol/L", 88.4, 1.0),
        ("Creatinine", "µmol/L", "mg/dL", 1.0, 88.4),
        ("Bilirubin", "mg/dL", "umol/l", 17.1, 1.0),
        ("Glucose", "mmol/L", "mg/dL", 90.0, 5.0),
        ("Blood urea nitrogen", "mg/dL", "mmol/L", 10.0, 28.01),
        ("Urea", "mmol/L", "mg/dL", 60.06, 10.0),
        ("Total cholesterol", "mmol/L", "mg/dL", 193.3, 5.0),
        ("Triglycerides", "mmol/L", "mg/dL", 88.57, 1.0),
        ("Temperature", "°C", "°F", 98.6, 37.0),
        ("PaCO2", "mmHg", "kPa", 5.333, 40.0),
        ("Albumin", "g/dL", "g/L", 35.0, 3.5),
        ("Haemoglobin", "g/dL", "mmol/L", 6.206, 10.0),
        ("Weight", "kg", "lb", 220.5, 100.0),
        ("Height", "m", "cm", 175.0, 1.75),
        ("Haemoglobin", "g/dL", "g/L", 100.0, 10.0),
        ("Sodium", "mmol/L", "mEq/L", 140.0, 140.0),
        ("Potassium", "mEq/L", "mmol/L", 4.2, 4.2),
        ("Chloride", "mmol/L", "mEq/L", 101.0, 101.0),
        ("Bicarbonate (HCO3)", "mmol/L", "mEq/L", 24.0, 24.0),
        ("Magnesium", "mmol/L", "mEq/L", 1.8, 0.9),
        ("Magnesium", "mg/dL", "mEq/L", 1.8, 2.187),
        ("Calcium, albumin-corrected", "mEq/L", "mg/dL", 10.0, 4.99),
        ("Urea nitrogen", "mg/dL", "mmol/L", 5.0, 14.0),
        ("LDL cholesterol", "mg/dL", "mmol/L", 3.0, 116.0),
        ("White blood cells", "10^9/L", "10^3/µL", 9.0, 9.0),
    ],
)
def test_units_convert_as_laboratories_do(label: str, unit: str, local: str, value: float, expected: float):
    factor, offset = conversion(number(label, unit), local)
    assert value * factor + offset == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("feature", "local", "line"),
    [
        (number("Albumin", "mmol/L"), "mEq/L", "no conversion from 'mEq/L' to 'mmol/L' is known; give a factor"),
        (number("Phosphate", "mmol/L"), "mEq/L", "no conversion from 'mEq/L'"),
        (number("Sodium bicarbonate", "mmol/L"), "mEq/L", "its name and label name 2 substances; give a factor"),
        (number("Bilirubin to creatinine", "mg/dL"), "µmol/L", "name 2 substances"),
        (number("Urea", "mg/dL", name="bun"), "mmol/L", "name 2 substances"),
        (number("Ratio", "mg/dL", description="bilirubin over creatinine"), "µmol/L", "no conversion from 'µmol/L'"),
        (number("Lactate dehydrogenase", "U/L"), "mmol/L", "no conversion"),
        (number("Creatine kinase", "mg/dL"), "µmol/L", "no conversion"),
        (number("Score", None), "mg/dL", "has no unit in the dictionary"),
        (number("Score", "mg/dL"), -1.0, "expected a factor above 0, got -1"),
        (
            Feature(name="x", label="X", section="S", levels={"0": "a", "1": "b"}),
            "mg/dL",
            "is a category; units belong to numbers",
        ),
    ],
    ids=lambda value: value.label if isinstance(value, Feature) else None,
)
def test_a_conversion_that_is_not_sure_is_refused(feature: Feature, local: str | float, line: str):
    with pytest.raises(ConfigError, match=line):
        conversion(feature, local)


def test_the_description_may_mention_another_substance():
    bilirubin = number("Bilirubin", "mg/dL", name="bili1", description="Measured with creatinine on day 1")
    assert conversion(bilirubin, "µmol/L")[0] == pytest.approx(1 / 17.10, rel=1e-3)


def test_urea_named_urea_and_labelled_urea_nitrogen_is_the_nitrogen():
    assert conversion(number("Urea nitrogen", "mg/dL", name="urea"), "mmol/L")[0] == pytest.approx(2.8014)


def test_the_likely_unit_of_a_wrong_column_is_the_one_under_which_nearly_all_fits():
    creatinine = number("Creatinine", "mg/dL", low=0.2, high=26, decimals=1)
    values = np.random.default_rng(0).uniform(0.5, 4, 50) * 88.42
    assert plausible_unit(creatinine, values) == "µmol/L"
    assert plausible_unit(creatinine, values * 1e6) is None
    assert plausible_unit(creatinine, np.full(5, np.nan)) is None


def test_examples_in_docstrings_hold():
    assert doctest.testmod(units).failed == 0
