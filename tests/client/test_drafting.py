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
    assert drafted.set_aside == ("died_30d", "los_days")
    for name in ("los_days", "ward_code", "surname", "admitted", "story"):
        assert entry[name].role == "excluded" and entry[name].reason, name
    assert drafted.n_todo >= 8


def test_the_text_of_a_draft_loads_and_reads_its_table(tmp_path):
    table().to_csv(tmp_path / "t.csv", index=False)
    drafted = draft(tmp_path / "t.csv")
    text = dump_dictionary(drafted.dictionary, drafted.notes)
    dictionary = parse_dictionary(tomllib.loads(text), "draft")
    assert dictionary == drafted.dictionary and "# TODO" in text and not dictionary.public
    assert dictionary.drafted_from == "table" and "# - drafted_from: remove it when the consortium has agreed" in text
    registry = read_registry(tmp_path / "t.csv", dictionary)
    assert np.isnan(registry.values["lactate"]).sum() == 4
    assert not np.isnan(registry.values["age"]).any()


def test_ranges_are_rounded_outward_past_the_extremes_of_the_table(tmp_path):
    values = np.linspace(41.37, 187.91, N)
    pd.DataFrame({"pid": range(N), "x": values}).to_csv(tmp_path / "t.csv", index=False)
    entry = draft(tmp_path / "t.csv").dictionary.feature("x")
    assert (entry.low, entry.high) == (40, 190)


@pytest.mark.parametrize(
    ("values", "decimals"),
    [
        (np.arange(1, 91) / 10_000, 4),  # troponin in µg/L: two decimals would leave one value
        (np.random.default_rng(0).uniform(0.0001, 0.009, 90), 5),
        (np.arange(1, 91) * 1e-6, 6),
        (np.arange(1, 91) * 1e-7, 6),
        (np.random.default_rng(0).normal(7.4, 0.05, 90), 3),
        (np.random.default_rng(0).normal(140, 5, 90), 2),
        (np.random.default_rng(0).uniform(0.5, 4, 90).round(1).astype(np.float32), 1),
    ],
)
def test_small_numbers_keep_their_significant_digits(tmp_path, values: np.ndarray, decimals: int):
    pd.DataFrame({"pid": [f"p{i}" for i in range(90)], "x": values}).to_parquet(tmp_path / "t.parquet")
    entry = draft(tmp_path / "t.parquet").dictionary.feature("x")
    assert entry.decimals == decimals
    low, high = entry.bounds
    assert low <= values.min() and high >= values.max()


def test_what_looks_like_an_outcome_or_follows_from_one_is_set_aside_whatever_its_kind(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "pid": range(80),
            "age": rng.integers(20, 90, 80),
            "hospital_expire_flag": np.arange(80) % 2,
            "went_to": np.array(["home", "hospice", "deceased"])[np.arange(80) % 3],
            "discharge_weight": rng.normal(70, 9, 80).round(1),
            "days_to_death": rng.integers(0, 400, 80),
            "outcome": np.arange(80) % 4,
            "event_time": rng.integers(0, 400, 80),
            "studied": np.arange(80) % 2,
            "prothrombin": rng.normal(12, 1, 80).round(1),
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    drafted = draft(tmp_path / "t.csv")
    roles = {feature.name: feature.role for feature in drafted.dictionary.features}
    assert [roles[name] for name in ("hospital_expire_flag", "went_to", "outcome")] == ["outcome"] * 3
    assert [roles[name] for name in ("discharge_weight", "days_to_death", "event_time")] == ["excluded"] * 3
    assert [roles[name] for name in ("age", "studied", "prothrombin")] == ["feature"] * 3
    for outcome in drafted.dictionary.with_role("outcome"):
        shown = {feature.name for feature in drafted.dictionary.context_of(outcome)}
        assert shown == {"age", "studied", "prothrombin"} and outcome.question.startswith("TODO")
    assert set(drafted.set_aside) == {name for name in roles if roles[name] in ("outcome", "excluded")}


def test_a_decimal_comma_names_every_column_that_has_one_and_drafts_nothing(tmp_path):
    crea = [str(1 + i / 10).replace(".", ",") for i in range(30)]
    frame = pd.DataFrame({"pid": range(30), "age": np.arange(30) + 40, "crea": crea, "sex": ["m", "f"] * 15})
    frame.loc[3, "crea"] = ""
    frame.loc[4, "crea"] = "< 0,5"  # one limit of detection among them hides nothing
    frame["lact"], frame["cost"] = crea[::-1], ["1.204,5", "2.000"] * 15
    frame.to_csv(tmp_path / "t.csv", index=False, sep=";")
    with pytest.raises(RegistryError) as caught:
        draft(tmp_path / "t.csv")
    assert str(caught.value) == (
        f"{tmp_path / 't.csv'}: column 'crea' holds numbers with a decimal comma (rows 1, 2, 3 and 25 more); so do "
        "'lact', 'cost': write decimals with a point (3.5) and nothing between thousands; if they are codes and no "
        "numbers, write those without a comma"
    )
    frame[["crea", "lact", "cost"]] = frame[["crea", "lact", "cost"]].replace({r"\.": "", ",": "."}, regex=True)
    frame.to_csv(tmp_path / "t.csv", index=False, sep=";")
    assert draft(tmp_path / "t.csv").dictionary.feature("lact").kind == "number"


def test_words_with_commas_are_no_numbers(tmp_path):
    frame = pd.DataFrame({"pid": range(30), "ward": ["3,5 north", "low, then high"] * 15, "age": np.arange(30) + 40})
    frame.to_csv(tmp_path / "t.csv", index=False)
    assert len(draft(tmp_path / "t.csv").dictionary.feature("ward").levels) == 2


def test_numbers_of_patients_stays_and_samples_are_excluded(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "pid": [f"p{i}" for i in range(80)],
            "encounter_id": rng.permutation(10**6)[:80] + 3_000_000,
            "stayNr": np.arange(80) + 880_000,
            "row": rng.permutation(80),
            "crp": rng.integers(0, 90, 80),
            "children_no": rng.integers(0, 9, 80),
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    drafted = draft(tmp_path / "t.csv")
    roles = {feature.name: feature.role for feature in drafted.dictionary.features}
    assert [roles[name] for name in ("encounter_id", "stayNr", "row")] == ["excluded"] * 3
    assert [roles[name] for name in ("crp", "children_no")] == ["feature"] * 2
    assert drafted.notes["encounter_id"] == ("TODO: or is it a measurement?",)
    frame.assign(sample=0).iloc[:10].to_csv(tmp_path / "t.csv", index=False)  # so few rows say nothing
    assert draft(tmp_path / "t.csv").dictionary.feature("encounter_id").role == "feature"


def test_a_sample_number_that_is_not_named_so_is_excluded_in_a_long_table(tmp_path):
    sample = np.random.default_rng(0).permutation(10**6)[:N]
    pd.DataFrame({"pid": range(N), "sample": sample, "x": np.arange(N) % 9}).to_csv(tmp_path / "t.csv", index=False)
    assert draft(tmp_path / "t.csv").dictionary.feature("sample").role == "excluded"


def test_a_column_without_a_name_is_refused(tmp_path):
    table().to_csv(tmp_path / "t.csv")
    with pytest.raises(RegistryError, match=r"t\.csv: column 1 has no name; give it one, or leave it out \(pandas"):
        draft(tmp_path / "t.csv")


def test_labels_that_are_made_unique_stay_so(tmp_path):
    frame = pd.DataFrame({"pid": range(40), "a_b": np.arange(40) % 7, "a b": np.arange(40) % 6, "A b a b": 1.5})
    frame["A b a b"] += np.arange(40) % 9
    frame["A-B"] = frame["a_b"]
    frame.to_csv(tmp_path / "t.csv", index=False)
    labels = [feature.label for feature in draft(tmp_path / "t.csv").dictionary.used]
    assert len(labels) == len(set(labels)) == 4


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
    with pytest.raises(RegistryError, match=r"no usable feature: no column can .* \('same': one value in every row\)"):
        draft(tmp_path / "t.csv")


def test_a_table_of_one_row_says_that_it_has_one(tmp_path):
    pd.DataFrame({"pid": ["a"], "age": [40], "sex": ["m"]}).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(RegistryError, match="no usable feature: the table has one row, so no column has two different"):
        draft(tmp_path / "t.csv")


@pytest.mark.parametrize(("name", "label"), [("heart_rateMax", "Heart rate max"), ("BMI", "Bmi"), ("x", "X")])
def test_column_names_become_words(name: str, label: str):
    assert pretty(name) == label
