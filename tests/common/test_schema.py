"""Counts over dictionary bins and the schema derived from their sum (common/counts.py, common/schema.py)."""

import doctest
from importlib import import_module

import numpy as np
import pytest
from sklearn.metrics import mutual_info_score
from wardround.common.config import QuestionsConfig
from wardround.common.counts import COARSE_BINS, FINE_BINS, Bins, Counts, count, grid
from wardround.common.dictionary import Dictionary, Feature
from wardround.common.errors import ProtocolError, RegistryError, VerificationError
from wardround.common.schema import Schema, dense, derive_schema, mutual_information, share_given_away

SETTINGS = QuestionsConfig()
YES_NO = {"0": "No", "1": "Yes"}


def number(name: str, low: float, high: float, decimals: int, **more: object) -> Feature:
    fields = {"name": name, "label": name, "section": "S", "low": low, "high": high, "decimals": decimals, **more}
    return Feature.model_validate({"kind": "number", **fields})


def category(name: str, levels: dict[str, str] = YES_NO, **more: object) -> Feature:
    return Feature.model_validate({"name": name, "label": name, "section": "S", "levels": levels, **more})


def dictionary(*features: Feature) -> Dictionary:
    return Dictionary(name="test", title="Test", features=(Feature(name="id", label="Id", role="id"), *features))


DICTIONARY = dictionary(
    number("a", 0, 100, 1),
    number("lab", 0.1, 50, 2, scale="log"),
    category("rare"),
    category("rare_copy"),
    category("colour", {"r": "Red", "g": "Green", "b": "Blue"}, hide=("a",)),
    category("died", role="outcome", known_at=3, question="Did the patient die?"),
    category("septic", role="outcome", known_at=3, question="Sepsis?"),
)


def values(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = np.round(np.clip(rng.normal(50, 12, n), 0, 100), 1)
    lab = np.round(np.clip(np.exp(rng.normal(0.5, 0.6, n) + (a - 50) / 40), 0.1, 50), 2)
    rare = (rng.random(n) < 0.05).astype(np.int16)
    died = (rng.random(n) < 1 / (1 + np.exp((55 - a) / 5))).astype(np.int16)
    result = {
        "a": np.where(rng.random(n) < 0.1, np.nan, a),
        "lab": np.where(rng.random(n) < 0.2, np.nan, lab),
        "rare": rare,
        "rare_copy": np.where(rng.random(n) < 0.1, -1, rare).astype(np.int16),
        "colour": rng.choice(3, n, p=[0.6, 0.3, 0.1]).astype(np.int16),
        "died": died,
        "septic": np.where(rng.random(n) < 0.3, -1, died).astype(np.int16),
    }
    return result


@pytest.mark.parametrize(
    "feature",
    [
        number("x", 0, 100, 0),
        number("x", 0, 1000, 1),
        number("x", -20, 33.3, 1),
        number("x", 3, 15, 0),
        number("x", 0.01, 900, 2, scale="log"),
        number("x", 1, 250, 0, scale="log"),
    ],
    ids=lambda feature: f"{feature.low:g}..{feature.high:g} {feature.scale}",
)
def test_every_grid_value_falls_in_one_bin_and_no_bin_is_empty(feature: Feature):
    bins, points = Bins.of(feature), grid(feature)
    codes = bins.codes(feature, points.value(np.arange(points.first, points.last + 1)))
    assert bins.fine <= FINE_BINS and bins.coarse <= COARSE_BINS
    assert np.all(np.diff(codes.astype(int)) >= 0)
    assert set(codes.tolist()) == set(range(bins.fine))
    outside = points.value(np.array([points.first - 1, points.last + 1]))
    assert bins.codes(feature, np.append(outside, np.nan)).tolist() == [bins.fine] * 3


def test_counts_are_those_of_numpy_on_complete_pairs():
    data = values(5000)
    counts = count(data, DICTIONARY)
    assert counts.rows == 5000
    assert counts.one_way("colour").tolist() == np.bincount(data["colour"], minlength=3).tolist()
    assert counts.one_way("a").sum() == np.count_nonzero(~np.isnan(data["a"]))
    known = (data["rare_copy"] >= 0) & (data["septic"] >= 0)
    expected = np.zeros((2, 2), dtype=int)
    np.add.at(expected, (data["rare_copy"][known], data["septic"][known]), 1)
    assert counts.table("rare_copy", "septic").tolist() == expected.tolist()
    assert counts.table("septic", "rare_copy").tolist() == expected.T.tolist()


def test_chunks_do_not_change_the_counts(monkeypatch):
    data = values(3001)
    whole = count(data, DICTIONARY).to_vector()
    monkeypatch.setattr("wardround.common.counts.CHUNK_ROWS", 100)
    assert np.array_equal(count(data, DICTIONARY).to_vector(), whole)


def test_schema_from_the_sum_of_five_sites_equals_schema_from_pooled_counts():
    data = values(4000)
    site = np.random.default_rng(1).choice(5, 4000, p=[0.5, 0.3, 0.15, 0.04, 0.01])
    parts = [count({name: column[site == s] for name, column in data.items()}, DICTIONARY) for s in range(5)]
    summed = Counts.from_vector(np.sum([part.to_vector() for part in parts], axis=0), DICTIONARY)
    assert np.array_equal((parts[0] + parts[1] + parts[2] + parts[3] + parts[4]).vector, summed.vector)
    pooled = count(data, DICTIONARY)
    assert np.array_equal(summed.vector, pooled.vector)
    one, other = (derive_schema(counts, DICTIONARY, SETTINGS) for counts in (summed, pooled))
    assert one == other and one.digest() == other.digest()


def test_the_layout_does_not_depend_on_the_data():
    sizes = {len(count(values(n, seed), DICTIONARY).to_vector()) for n, seed in ((0, 0), (1, 1), (500, 2))}
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "vector",
    [np.zeros(3, np.int64), np.zeros(count(values(0), DICTIONARY).vector.shape, np.float64), None],
    ids=["length", "dtype", "negative"],
)
def test_a_vector_that_cannot_be_counts_is_refused(vector: np.ndarray | None):
    if vector is None:
        vector = count(values(10), DICTIONARY).to_vector()
        vector[5] = -1
    with pytest.raises(ProtocolError, match="schema counts: expected"):
        Counts.from_vector(vector, DICTIONARY)


@pytest.mark.parametrize(("x", "y"), [("a", "lab"), ("a", "died"), ("rare", "rare_copy"), ("colour", "a")])
def test_mutual_information_equals_sklearn_on_complete_pairs(x: str, y: str):
    data = values(3000)
    counts = count(data, DICTIONARY)

    def coarse(name: str) -> np.ndarray:
        feature = DICTIONARY.feature(name)
        bins = Bins.of(feature)
        codes = bins.codes(feature, data[name]).astype(int)
        return np.where(codes == bins.fine, -1, codes // bins.merge)

    both = (coarse(x) >= 0) & (coarse(y) >= 0)
    expected = mutual_info_score(coarse(x)[both], coarse(y)[both])
    assert mutual_information(counts.table(x, y)) == pytest.approx(expected, abs=1e-12)


def test_an_exact_copy_of_a_rare_binary_feature_is_filtered():
    counts = count(values(3000), DICTIONARY)
    schema = derive_schema(counts, DICTIONARY, SETTINGS)
    assert schema.mi["rare"]["rare_copy"] == 1.0
    assert "rare_copy" in schema.hidden["rare"] and "rare" in schema.hidden["rare_copy"]
    raw = derive_schema(counts, DICTIONARY, SETTINGS.model_copy(update={"mi_normalisation": "none"}))
    assert 0.15 < raw.mi["rare"]["rare_copy"] < 0.25  # nats: below H(X), so the raw filter lets the copy pass
    assert "rare_copy" not in raw.hidden["rare"]


@pytest.mark.parametrize("prevalence", [0.001, 0.05, 0.5])
def test_the_share_of_an_exact_copy_is_one_at_any_prevalence(prevalence: float):
    positive = round(10_000 * prevalence)
    assert share_given_away(np.diag([10_000 - positive, positive])) == 1.0


def test_independent_features_share_almost_nothing_even_in_small_registries():
    rng = np.random.default_rng(0)
    table = np.zeros((12, 12), dtype=np.int64)
    np.add.at(table, (rng.integers(12, size=200), rng.integers(12, size=200)), 1)
    assert share_given_away(table) < 0.06 < mutual_information(table) / np.log(12)
    assert share_given_away(np.zeros((3, 3), np.int64)) == 0.0
    assert share_given_away(np.array([[4, 0], [5, 0]])) == 0.0  # nothing to give away


@pytest.mark.parametrize("n", [80, 120, 200, 400])
def test_independent_numbers_in_24_bins_share_almost_nothing_and_copies_everything(n: int):
    rng = np.random.default_rng(n)
    for _ in range(20):
        x, y = (np.clip(np.rint(rng.normal(12, 4, n)), 0, 23).astype(int) for _ in "xy")
        tables = np.zeros((2, 24, 24), dtype=np.int64)
        np.add.at(tables[0], (x, y), 1)
        np.add.at(tables[1], (x, x), 1)
        assert share_given_away(dense(tables[0], True, True)) < 0.15
        assert share_given_away(dense(tables[1], True, True)) == 1.0
        np.testing.assert_array_equal(dense(tables[0], True, False).sum(0), tables[0].sum(0)[tables[0].sum(0) > 0])
    assert n > 200 or share_given_away(tables[0]) > 0.15  # as it is without merging


def test_a_small_registry_of_independent_numbers_has_no_shortcut_and_one_with_a_copy_has_it():
    described = dictionary(number("a", 0, 23, 0), number("b", 0, 23, 0), number("c", 0, 23, 0))
    rng = np.random.default_rng(0)
    a, b = (rng.integers(0, 24, 80).astype(float) for _ in "ab")
    schema = derive_schema(count({"a": a, "b": b, "c": a}, described), described, SETTINGS)
    assert schema.shortcuts == {"a": ("c",), "b": (), "c": ("a",)}
    assert schema.mi["a"]["c"] == 1.0 and schema.mi["a"]["b"] < 0.15


@pytest.mark.parametrize("threshold", [0.02, 0.3, 0.7])
def test_hidden_are_exactly_the_features_above_the_threshold_and_the_dictionarys_own(threshold: float):
    settings = SETTINGS.model_copy(update={"mi_threshold": threshold})
    schema = derive_schema(count(values(3000), DICTIONARY), DICTIONARY, settings)
    for target, scores in schema.mi.items():
        above = {name for name, score in scores.items() if score > threshold}
        assert set(schema.shortcuts[target]) == above
        assert set(schema.hidden[target]) == above | set(DICTIONARY.feature(target).hide)
    assert "died" not in schema.mi["septic"]  # outcomes are never context
    assert "a" in schema.hidden["colour"]


def test_a_schema_survives_json_and_recovers_the_level_frequencies():
    data = values(3000)
    schema = derive_schema(count(data, DICTIONARY), DICTIONARY, SETTINGS)
    assert Schema.from_json(schema.to_json()) == schema
    assert Schema.from_json(schema.to_json()).digest() == schema.digest()
    assert schema.target("colour").frequencies == tuple(np.bincount(data["colour"]) / 3000)
    mixture = schema.target("lab").mixture  # on the logarithm
    assert abs(mixture.weights @ mixture.means - np.nanmean(np.log(data["lab"]))) < 0.02
    with pytest.raises(KeyError):
        schema.target("id")
    with pytest.raises(VerificationError):
        schema.verify(dictionary(number("a", 0, 100, 1)))


def test_features_that_cannot_be_asked_are_listed_with_the_reason():
    data = values(500)
    data["rare"][:] = 1
    data["colour"][:] = -1
    data["lab"][:] = 2.5
    schema = derive_schema(count(data, DICTIONARY), DICTIONARY, SETTINGS)
    assert set(schema.unusable) == {"rare", "colour", "lab"}
    assert "'Yes'" in schema.unusable["rare"]
    assert set(schema.names) == {"a", "rare_copy", "died", "septic"}


def test_features_about_which_nothing_says_enough_are_not_asked_but_outcomes_are():
    counts = count(values(4000), DICTIONARY)
    everything = derive_schema(counts, DICTIONARY, SETTINGS)
    # `colour` and `rare` depend on nothing (the copy of `rare` is hidden from it), `a` and `lab` on each other.
    some = derive_schema(counts, DICTIONARY, SETTINGS.model_copy(update={"min_information_nats": 0.05}))
    assert set(everything.names) - set(some.names) == {"rare", "rare_copy", "colour"}
    assert {"a", "lab", "died", "septic"} == set(some.names)
    assert "says 0.05 nats" in some.unusable["colour"]
    assert set(some.mi) == set(some.names) and some.mi["a"] == everything.mi["a"]
    with pytest.raises(RegistryError, match="no usable feature"):
        derive_schema(counts, DICTIONARY, SETTINGS.model_copy(update={"min_information_nats": 9.0}))


def test_a_registry_with_nothing_to_ask_is_refused_in_one_line():
    data = {
        name: np.full_like(column, -1 if column.dtype.kind == "i" else np.nan) for name, column in values(9).items()
    }
    data["died"][:4] = 1
    data["died"][4:] = 0
    with pytest.raises(RegistryError, match=r"no usable feature: .*no value is known at any site"):
        derive_schema(count(data, DICTIONARY), DICTIONARY, SETTINGS)


def test_counts_of_different_dictionaries_do_not_mix():
    other = dictionary(number("a", 0, 100, 1))
    counts = count({"a": np.array([1.0, 2.0])}, other)
    with pytest.raises(ProtocolError):
        counts + count(values(5), DICTIONARY)
    with pytest.raises(VerificationError):
        derive_schema(counts, DICTIONARY, SETTINGS)


@pytest.mark.parametrize("module", ["schema", "question", "counts", "mixture"])
def test_examples_in_docstrings_hold(module: str):
    assert doctest.testmod(import_module(f"wardround.common.{module}")).failed == 0
