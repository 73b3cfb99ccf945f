"""Dividing a registry into sites (simulations/partition.py)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wardround.client.registry import Registry
from wardround.common.dictionary import Dictionary, Feature
from wardround.common.errors import ConfigError
from wardround.simulations.partition import partition, site_names

DICTIONARY = Dictionary(
    name="test",
    title="Test",
    features=(
        Feature(name="id", label="Id", role="id"),
        Feature(name="hospital", label="Hospital", role="site"),
        Feature(name="age", label="Age", kind="number", section="S", low=0, high=100),
        Feature(name="colour", label="Colour", section="S", levels={"r": "Red", "g": "Green", "b": "Blue"}),
    ),
)


def registry(n_patients: int, rows_each: int = 2, seed: int = 0) -> Registry:
    rng = np.random.default_rng(seed)
    patients = np.repeat(np.array([f"p{i}" for i in range(n_patients)], dtype=object), rows_each)
    n = len(patients)
    order = rng.permutation(n)
    age = np.where(rng.random(n) < 0.1, np.nan, np.rint(rng.uniform(0, 100, n)))
    colour = rng.choice([-1, 0, 1, 2], n, p=[0.1, 0.5, 0.3, 0.1]).astype(np.int16)
    sites = rng.choice(np.array(["North", "South", "East"], dtype=object), n, p=[0.6, 0.3, 0.1])
    return Registry(DICTIONARY, patients[order], {"age": age, "colour": colour}, sites)


@given(st.integers(1, 6), st.integers(40, 80), st.sampled_from(["even", "dirichlet"]), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_row_is_at_one_site_and_no_patient_at_two(sites: int, n_patients: int, how, seed: int):
    data = registry(n_patients, seed=seed)
    parts = partition(data, sites, how, feature="age", alpha=5, rng=np.random.default_rng(seed))
    assert len(parts) == sites and all(len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(data)))
    homes = [set(data.patients[part]) for part in parts]
    assert sum(map(len, homes)) == len(set.union(*homes))


def test_even_sites_differ_by_at_most_one_patient_and_are_shuffled():
    data = registry(103)
    parts = partition(data, 4, "even", rng=np.random.default_rng(0))
    sizes = [len(set(data.patients[part])) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    again = partition(data, 4, "even", rng=np.random.default_rng(0))
    other = partition(data, 4, "even", rng=np.random.default_rng(1))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize("feature", ["age", "colour", "hospital"])
def test_a_smaller_alpha_skews_sites_more(feature: str):
    data = registry(3000, rows_each=1)
    column = np.nan_to_num(data.values["age"]) >= 80 if feature == "age" else data.values.get(feature, data.sites)

    def spread(alpha: float) -> float:
        parts = partition(data, 4, "dirichlet", feature=feature, alpha=alpha, rng=np.random.default_rng(1))
        top = np.unique(column)[-1]
        return float(np.std([np.mean(column[part] == top) for part in parts]))

    assert spread(0.2) > 3 * spread(1000)


def test_a_column_gives_one_site_a_value_largest_first():
    data = registry(400, rows_each=1)
    assert data.sites is not None
    parts = partition(data, 3, "column", feature="hospital", rng=np.random.default_rng(0))
    assert [set(data.sites[part]) for part in parts] == [{"North"}, {"South"}, {"East"}]
    two = partition(data, 2, "column", feature="colour", rng=np.random.default_rng(0))
    assert [set(data.values["colour"][part].tolist()) for part in two] == [{0}, {1}]


@pytest.mark.parametrize(
    ("sites", "how", "options", "expected"),
    [
        (50, "even", {}, "at least one patient for each of 50 sites, got 40"),
        (4, "column", {"feature": "hospital"}, "'hospital' has 3 values, expected 4 or more"),
        (2, "column", {"feature": "age"}, "got the number 'age'"),
        (2, "column", {"feature": "height"}, "no feature or outcome 'height'"),
        (2, "dirichlet", {"feature": "id"}, "no feature or outcome 'id'"),
        (2, "dirichlet", {}, "needs partition_feature"),
        (40, "dirichlet", {"feature": "colour", "alpha": 0.01}, "without patients"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(sites: int, how, options: dict, expected: str):
    with pytest.raises(ConfigError, match=expected):
        partition(registry(40), sites, how, rng=np.random.default_rng(0), **options)


def test_site_names_are_numbered_from_one():
    assert site_names(2) == ["site-01", "site-02"]
