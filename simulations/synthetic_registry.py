"""A synthetic registry with known dependencies: no patient, any size, the same rows for the same seed.

For tests, benchmarks and `registry = "synthetic"`. One hidden severity drives laboratory values, vital signs and death,
so a model can learn something; a few columns are there to be found out: temperature in two units and a copied rare
yes/no answer (shortcuts), a lab drawn after the outcome is known, a value filled in at random.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..common.dictionary import Dictionary, Feature

YES_NO = {"0": "No", "1": "Yes"}
HOSPITALS = ("North", "East", "South", "West")


def make(n_patients: int, seed: int, n_features: int = 19) -> tuple[pd.DataFrame, Dictionary]:
    """One row a patient.

    Args:
        n_patients: rows.
        seed: the same seed gives the same table.
        n_features: columns of role feature, at least 19; those beyond are markers of growing noise.

    Returns:
        The table in dictionary codes (with missing cells), and its dictionary.

    Raises:
        ValueError: fewer than 19 features or no patient.
    """
    if n_features < len(_BASE) or n_patients < 1:
        raise ValueError(f"expected at least {len(_BASE)} features and 1 patient, got {n_features} and {n_patients}")
    rng = np.random.default_rng([seed, 0x5EED])
    n = n_patients
    age = np.clip(rng.normal(64, 15, n), 18, 100)
    sex = rng.random(n) < 0.55
    severity = 0.02 * (age - 64) + rng.normal(size=n)
    diabetes = rng.random(n) < _logistic(-1.3 + 0.02 * (age - 64))
    dialysis = rng.random(n) < 0.05
    infection = rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])
    weight = np.clip(rng.normal(70 + 12 * sex, 12), 30, 200)
    temperature = np.clip(rng.normal(37.2 + 0.35 * severity + 0.3 * (infection > 0), 0.7), 32, 42)
    creatinine = np.exp(rng.normal(np.log(1.0) + 0.25 * severity + 1.4 * dialysis, 0.3))
    lactate = np.exp(rng.normal(np.log(1.6) + 0.4 * severity, 0.35))
    pressure = np.clip(rng.normal(82 - 9 * severity, 11), 30, 150)
    potassium = np.where(dialysis, rng.normal(5.4, 0.5, n), rng.normal(4.1, 0.4, n))  # two modes
    coma_scale = np.clip(np.rint(15 - rng.gamma(1.0, np.exp(0.6 * severity))), 3, 15)
    died = rng.random(n) < _logistic(-1.6 + 1.1 * severity)
    columns: dict[str, np.ndarray] = {
        "age": np.rint(age),
        "sex": np.where(sex, "M", "F"),
        "weight": np.round(weight, 1),
        "diabetes": diabetes.astype(int).astype(str),
        "dialysis": dialysis.astype(int).astype(str),
        "dialysis_access": dialysis.astype(int).astype(str),
        "infection": infection.astype(str),
        "antibiotic": np.where(rng.random(n) < 0.85, infection, rng.integers(0, 4, n)).astype(str),
        "heart_rate": np.rint(np.clip(rng.normal(88 + 9 * severity, 14), 30, 200)),
        "mean_pressure": np.rint(pressure),
        "systolic_pressure": np.rint(np.clip(1.35 * pressure + rng.normal(8, 9, n), 50, 250)),
        "temperature_c": np.round(temperature, 1),
        "temperature_f": np.round(np.round(temperature, 1) * 1.8 + 32, 1),
        "creatinine": np.round(np.clip(creatinine, 0.2, 20), 2),
        "urea": np.rint(np.clip(18 * creatinine * np.exp(rng.normal(0, 0.3, n)), 2, 250)),
        "lactate": np.round(np.clip(lactate, 0.3, 25), 1),
        "potassium": np.round(np.clip(potassium, 2, 8), 1),
        "coma_scale": coma_scale,
        "late_lactate": np.round(
            np.clip(lactate * np.where(died, 2.5, 0.7) * np.exp(rng.normal(0, 0.2, n)), 0.3, 25), 1
        ),
    }
    features = [*_BASE]
    for k in range(n_features - len(_BASE)):
        name = f"marker_{k + 1:02d}"
        columns[name] = np.round(np.clip(rng.normal(50 + 8 * severity / (1 + k / 4), 10), 0, 100), 1)
        features.append(_number(name, f"Marker {k + 1}", "Markers", 0, 100, 1, "U/L"))
    for name in columns:
        if name not in ("age", "sex"):
            column = columns[name].astype(object)
            column[rng.random(n) < 0.08] = None
            columns[name] = column
    table = pd.DataFrame(
        {
            "patient": [f"P{i:07d}" for i in range(n)],
            "hospital": rng.choice(np.array(HOSPITALS), n, p=[0.4, 0.3, 0.2, 0.1]),
            **{
                name: pd.to_numeric(pd.Series(column)) if _is_number(features, name) else column
                for name, column in columns.items()
            },
            "died": died.astype(int).astype(str),
        }
    )
    dictionary = Dictionary(
        name="synthetic",
        title="Synthetic intensive-care registry",
        public=True,
        source="simulations/synthetic_registry.py",
        licence="Apache-2.0",
        features=(
            Feature(name="patient", label="Patient", role="id"),
            Feature(name="hospital", label="Hospital", role="site"),
            *features,
            Feature(
                name="died",
                label="Death in hospital",
                role="outcome",
                section="Outcome",
                levels=YES_NO,
                known_at=7,
                question="Did the patient die in hospital?",
            ),
        ),
    )
    return table, dictionary


def _logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _is_number(features: list[Feature], name: str) -> bool:
    return any(feature.name == name and feature.kind == "number" for feature in features)


def _number(
    name: str, label: str, section: str, low: float, high: float, decimals: int, unit: str | None, **more: object
) -> Feature:
    entry = {"low": low, "high": high, "decimals": decimals, "unit": unit, **more}
    return Feature.model_validate({"name": name, "label": label, "section": section, "kind": "number", **entry})


def _levels(name: str, label: str, section: str, levels: dict[str, str]) -> Feature:
    return Feature(name=name, label=label, section=section, levels=levels)


_BASE: tuple[Feature, ...] = (
    _number("age", "Age", "Patient", 18, 100, 0, "years"),
    _levels("sex", "Sex", "Patient", {"F": "Female", "M": "Male"}),
    _number("weight", "Weight", "Patient", 30, 200, 1, "kg"),
    _levels("diabetes", "Diabetes", "History", YES_NO),
    _levels("dialysis", "Chronic dialysis", "History", YES_NO),
    _levels("dialysis_access", "Dialysis access", "History", YES_NO),  # an exact copy at 5 % prevalence
    _levels("infection", "Infection", "Admission", {"0": "None", "1": "Lung", "2": "Urinary tract", "3": "Abdomen"}),
    _levels(
        "antibiotic",
        "Antibiotic",
        "Admission",
        {"0": "None", "1": "Ceftriaxone", "2": "Ciprofloxacin", "3": "Piperacillin"},
    ),
    _number("heart_rate", "Heart rate", "Vital signs", 30, 200, 0, "/min"),
    _number("mean_pressure", "Mean arterial pressure", "Vital signs", 30, 150, 0, "mmHg"),
    _number("systolic_pressure", "Systolic pressure", "Vital signs", 50, 250, 0, "mmHg"),
    _number("temperature_c", "Temperature", "Vital signs", 32, 42, 1, "°C"),
    _number("temperature_f", "Temperature (Fahrenheit)", "Vital signs", 89.6, 107.6, 1, "°F"),
    _number("creatinine", "Creatinine", "Laboratory", 0.2, 20, 2, "mg/dL", scale="log"),
    _number("urea", "Urea nitrogen", "Laboratory", 2, 250, 0, "mg/dL", scale="log"),
    _number("lactate", "Lactate", "Laboratory", 0.3, 25, 1, "mmol/L", scale="log"),
    _number("potassium", "Potassium", "Laboratory", 2, 8, 1, "mmol/L"),
    _number("coma_scale", "Glasgow Coma Scale", "Vital signs", 3, 15, 0, None),
    _number("late_lactate", "Lactate on day 7", "Laboratory", 0.3, 25, 1, "mmol/L", scale="log", known_at=7),
)
