"""A drafted dictionary loads, reads its own table, and says what waits for a person."""

from __future__ import annotations

import tomllib

import numpy as np
import pandas as pd
import pytest
from wardround.client.drafting import draft, pretty
from wardround.client.registry import read_registry
from wardround.common.dictionary import dump_dictionary, parse_dictionary
from wardround.common.errors import RegistryError
from wardround.simulations.synthetic_registry import make

N = 400


def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    lactate = rng.lognormal(0.5, 0.8, N).round(1).clip(0.3)
    lactate[:4] = 999
    albumin = rng.normal(3.0, 0.6, N).round(2)
    albumin[: N // 3] = 3.5
    return pd.DataFrame(
        {
            "PatientID": [f"x{i}" for i in range(N)],
            "hospital": np.array(["east", "west"])[np.arange(N) % 2],
            "age": rng.integers(19, 94, N),
            "heartRate": rng.normal(90, 15, N).round(),
            "lactate": lactate,
            "albumin": albumin.astype(np.float32),
            "smoker": np.array(["yes", "no"])[rng.integers(0, 2, N)],
            "nyha": rng.integers(1, 5, N),
            "died_30d": rng.integers(0, 2, N),
            "los_days": rng.integers(1, 60, N),
            "ward_code": "icu",
            "surname": "x",
            "admitted": pd.date_range("2020-01-01", periods=N).strftime("%Y-%m-%d"),
            "story": [f"came with cough number {i} and fever" for i in range(N)],
        }
    )


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_draft_guesses_roles_kinds_and_ranges(tmp_path, suffix: str):
    path = tmp_path / f"t.{suffix}"
    table().to_csv(path, index=False) if suffix == "csv" else table().to_parquet(path)
    drafted = draft(path)
    entry = {feature.name: feature for feature in drafted.dictionary.features}
    assert drafted.dictionary.id_column == "PatientID" and drafted.dictionary.site_column == "hospital"
    assert (entry["age"].kind, entry["age"].low, entry["age"].high, entry["age"].decimals) == ("number", 15, 95, 0)
    assert entry["heartRate"].label == "Heart rate"
    assert (entry["lactate"].sentinels, entry["lactate"].scale, entry["lactate"].decimals) == ((999.0,), "log", 1)
    assert entry["albumin"].decimals == 2  # float32 artefacts do not count
    assert any("stands in" in line for line in drafted.notes["albumin"])
    assert dict(entry["smoker"].levels) == {"no": "no", "yes": "yes"}
    assert dict(entry["nyha"].levels) == {str(i): str(i) for i in range(1, 5)}
    assert entry["died_30d"].role == "outcome" and dict(entry["died_30d"].levels) == {"0": "no", "1": "yes"}
    for name in ("los_days", "ward_code", "surname", "admitted", "story"):
        assert entry[name].role == "excluded" and entry[name].reason, name
    assert drafted.n_todo >= 8


def test_the_text_of_a_draft_loads_and_reads_its_table(tmp_path):
    table().to_csv(tmp_path / "t.csv", index=False)
    drafted = draft(tmp_path / "t.csv")
    text = dump_dictionary(drafted.dictionary, drafted.notes)
    dictionary = parse_dictionary(tomllib.loads(text), "draft")
    assert dictionary == drafted.dictionary and "# TODO" in text and not dictionary.public
    registry = read_registry(tmp_path / "t.csv", dictionary)
    assert np.isnan(registry.values["lactate"]).sum() == 4
    assert not np.isnan(registry.values["age"]).any()


def test_ranges_are_rounded_outward_past_the_extremes_of_the_table(tmp_path):
    values = np.linspace(41.37, 187.91, N)
    pd.DataFrame({"pid": range(N), "x": values}).to_csv(tmp_path / "t.csv", index=False)
    entry = draft(tmp_path / "t.csv").dictionary.feature("x")
    assert (entry.low, entry.high) == (40, 190)


def test_a_draft_of_the_synthetic_registry_loads(tmp_path):
    frame, _ = make(500, seed=1)
    frame.to_parquet(tmp_path / "t.parquet")
    drafted = draft(tmp_path / "t.parquet")
    assert read_registry(tmp_path / "t.parquet", drafted.dictionary).n_patients == 500


def test_a_table_without_a_patient_id_asks_for_one(tmp_path):
    pd.DataFrame({"x": [1, 2, 3, 4, 5, 6], "y": list("ababab")}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(RegistryError, match="no column looks like a patient id; name it with --id COLUMN"):
        draft(tmp_path / "t.csv")
    assert draft(tmp_path / "t.csv", "x").dictionary.id_column == "x"
    with pytest.raises(RegistryError, match="no column 'z'"):
        draft(tmp_path / "t.csv", "z")


def test_a_table_with_nothing_to_ask_is_refused(tmp_path):
    pd.DataFrame({"pid": range(5), "same": 1}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(RegistryError, match="no usable feature"):
        draft(tmp_path / "t.csv")


@pytest.mark.parametrize(("name", "label"), [("heart_rateMax", "Heart rate max"), ("BMI", "Bmi"), ("x", "X")])
def test_column_names_become_words(name: str, label: str):
    assert pretty(name) == label
