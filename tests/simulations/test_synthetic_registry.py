"""The synthetic registry (simulations/synthetic_registry.py)."""

import numpy as np
import pytest
from wardround.client.registry import read_registry
from wardround.common.config import QuestionsConfig
from wardround.common.counts import count
from wardround.common.schema import Schema, derive_schema
from wardround.simulations.synthetic_registry import make


@pytest.fixture(scope="module")
def schema(tmp_path_factory) -> Schema:
    table, dictionary = make(3000, seed=3)
    path = tmp_path_factory.mktemp("synthetic") / "table.parquet"
    table.to_parquet(path)
    registry = read_registry(path, dictionary)
    return derive_schema(count(registry.values, dictionary), dictionary, QuestionsConfig())


def test_the_same_seed_gives_the_same_table_and_another_seed_another():
    one, dictionary = make(200, seed=1)
    same, _ = make(200, seed=1)
    other, _ = make(200, seed=2)
    assert one.equals(same) and not one.equals(other)
    assert dictionary.public


@pytest.mark.parametrize("n_features", [19, 50])
def test_the_table_has_exactly_the_columns_of_its_dictionary(n_features: int):
    table, dictionary = make(50, seed=1, n_features=n_features)
    assert list(table.columns) == [feature.name for feature in dictionary.features]
    assert len(dictionary.with_role("feature")) == n_features
    assert table["patient"].is_unique


def test_too_few_features_or_no_patient_is_an_error():
    for n_patients, n_features in ((10, 5), (0, 19)):
        with pytest.raises(ValueError, match="expected at least"):
            make(n_patients, seed=0, n_features=n_features)


def test_csv_and_parquet_give_the_same_registry(tmp_path):
    table, dictionary = make(300, seed=1)
    table.to_parquet(tmp_path / "table.parquet")
    table.to_csv(tmp_path / "table.csv", index=False)
    digests = {read_registry(tmp_path / name, dictionary).digest for name in ("table.parquet", "table.csv")}
    assert len(digests) == 1


def test_the_planted_shortcuts_are_found_and_honest_dependencies_are_not(schema: Schema):
    assert "dialysis_access" in schema.shortcuts["dialysis"] and "dialysis" in schema.shortcuts["dialysis_access"]
    assert "temperature_f" in schema.shortcuts["temperature_c"]
    assert schema.shortcuts["lactate"] == ()
    assert 0.01 < schema.mi["died"]["lactate"] < 0.3
    assert schema.mi["weight"]["diabetes"] < 0.02


def test_every_column_can_be_asked(schema: Schema):
    assert not schema.unusable
    frequencies = np.array(schema.target("died").frequencies)
    assert 0.1 < frequencies[1] < 0.35
