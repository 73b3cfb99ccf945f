"""Noised counts: what one patient changes, how the noise is split, and what a schema makes of it (common/noisy.py)."""

import numpy as np
import pytest
from wardround.client import policy
from wardround.client.private_release import noised_counts
from wardround.client.randomness import SecureRandom
from wardround.common.config import PolicyConfig, PrivacyConfig, QuestionsConfig
from wardround.common.counts import EXACT, Counts, Layout, Resolution, count
from wardround.common.errors import ProtocolError, RefusedError
from wardround.common.noisy import count_scales, read_counts, resolution
from wardround.common.schema import derive_schema

from .test_schema import DICTIONARY, category, dictionary, number, values

SETTINGS = QuestionsConfig()
PRIVACY = PrivacyConfig(
    enabled=True,
    epsilon=8.0,
    delta=1e-5,
    max_grad_norm=1.0,
    declared_patients=1000,
    schema_noise_multiplier=1.5,
)
LAYOUT = Layout(DICTIONARY, resolution(PRIVACY))


def ring_of(counts: Counts, seed: int = 0, sites: int = 1) -> np.ndarray:
    """The sum of so many sites' noised vectors, of which one has all patients; noise from a seed."""
    first, scales = counts.layout.first_table, count_scales(counts.layout, PRIVACY.schema_noise_multiplier)
    noise = np.random.default_rng(seed).standard_normal((sites, len(counts.vector)))
    noise[:, :first] *= scales[0]
    noise[:, first:] *= scales[1]
    return (counts.vector + np.rint(noise).sum(0)).astype(np.int64).astype(np.uint32)


def noised(counts: Counts, seed: int = 0, sites: int = 1) -> Counts:
    return read_counts(ring_of(counts, seed, sites), counts.dictionary, PRIVACY, sites)


def test_only_private_runs_count_in_fewer_bins_and_the_config_says_in_how_many():
    assert resolution(PrivacyConfig(enabled=False)) == EXACT == Resolution(192, 24)
    assert resolution(PRIVACY) == Resolution(24, 3)
    assert resolution(PRIVACY.model_copy(update={"schema_bins": 12, "schema_pair_bins": 4})) == Resolution(12, 4)
    exact, fewer = count(values(300), DICTIONARY), count(values(300), DICTIONARY, resolution(PRIVACY))
    assert np.array_equal(exact.vector, count(values(300), DICTIONARY, EXACT).vector)
    assert len(fewer.vector) == LAYOUT.size < len(exact.vector) / 4
    for name in ("a", "lab"):
        bins = fewer.layout.bins[fewer.layout.number[name]]
        assert bins.fine <= 24 and bins.coarse <= 3
        assert fewer.one_way(name).sum() == exact.one_way(name).sum()
    with pytest.raises(ProtocolError, match="different dictionaries or bins"):
        exact + fewer


def test_one_patient_changes_the_counts_by_what_the_noise_is_scaled_to_and_never_by_more():
    """Add or remove one: √(1 + d) on rows and bins, √P on tables, both attained by a patient with all values known."""
    columns, pairs = len(LAYOUT.features), len(LAYOUT.pairs)
    data = {name: column[:60] for name, column in values(60, seed=4).items()}
    whole = count(data, DICTIONARY, resolution(PRIVACY)).vector
    changes: list[tuple[int, int]] = []
    for patient in range(60):
        without = {name: np.delete(column, patient) for name, column in data.items()}
        squares = (whole - count(without, DICTIONARY, resolution(PRIVACY)).vector) ** 2
        changes.append((int(squares[: LAYOUT.first_table].sum()), int(squares[LAYOUT.first_table :].sum())))
    assert max(changes) == (1 + columns, pairs)
    assert all(bins <= 1 + columns and cells <= pairs for bins, cells in changes)
    for multiplier in (0.5, 1.5, 4.0):
        one, two = count_scales(LAYOUT, multiplier)
        worst = max(np.sqrt(bins / one**2 + cells / two**2) for bins, cells in changes)
        assert worst == pytest.approx(1 / multiplier)


def test_without_outcomes_the_sensitivities_are_those_of_all_columns_and_all_pairs():
    columns = [number(f"n{i}", 0, 10, 0) for i in range(9)]
    layout = Layout(dictionary(*columns), resolution(PRIVACY))
    assert len(layout.pairs) == 9 * 8 / 2
    one, two = count_scales(layout, 2.0)
    assert (1 + 9) / one**2 + (9 * 8 / 2) / two**2 == pytest.approx(1 / 4)


def test_no_other_split_between_bins_and_tables_leaves_a_histogram_and_a_table_less_error():
    bins = LAYOUT.first_table / len(LAYOUT.features)
    cells = (LAYOUT.size - LAYOUT.first_table) / len(LAYOUT.pairs)
    one, two = count_scales(LAYOUT, 1.5)
    least = bins * one**2 + cells * two**2
    for share in np.linspace(0.02, 0.98, 97):  # of the budget, for bins
        other_one = 1.5 * np.sqrt((1 + len(LAYOUT.features)) / share)
        other_two = 1.5 * np.sqrt(len(LAYOUT.pairs) / (1 - share))
        assert bins * other_one**2 + cells * other_two**2 >= least * (1 - 1e-9)


def test_a_sites_noise_has_the_scales_that_the_sum_is_read_with():
    counts = count(values(300), DICTIONARY, resolution(PRIVACY))
    ring = noised_counts(counts.to_vector(), counts.layout, 1.5, SecureRandom())
    noise = ring.view(np.int32) - counts.vector
    one, two = count_scales(LAYOUT, 1.5)
    first = LAYOUT.first_table
    for part, scale in ((noise[:first], one), (noise[first:], two)):
        assert 0.7 * scale < np.sqrt(np.mean(part.astype(float) ** 2)) < 1.3 * scale
    read = read_counts(ring, DICTIONARY, PRIVACY, 4)
    assert (read.bin_noise, read.cell_noise) == pytest.approx((2 * one, 2 * two))


def test_a_sum_of_another_length_is_refused():
    with pytest.raises(ProtocolError, match=f"schema counts: expected {LAYOUT.size} integers, got"):
        read_counts(np.zeros(LAYOUT.size + 1, np.uint32), DICTIONARY, PRIVACY, 3)


LEVELS = dictionary(
    number("a", 0, 100, 0),
    category("kind", {"1": "Common", "2": "Rare", "3": "Absent", "4": "Also common"}),
    category("sex"),
)


def of_levels(n: int) -> Counts:
    rng = np.random.default_rng(0)
    columns = {"a": rng.integers(20, 80, n).astype(float), "sex": rng.integers(0, 2, n).astype(np.int16)}
    kinds = np.concatenate([np.zeros(n // 2), np.ones(2), np.full(n - n // 2 - 2, 3)]).astype(np.int16)
    return count({**columns, "kind": kinds}, LEVELS, resolution(PRIVACY))


def test_levels_are_judged_by_their_noised_counts_and_what_is_lost_in_noise_is_not_shown():
    shown = []
    for seed in range(200):
        target = derive_schema(noised(of_levels(2000), seed), LEVELS, SETTINGS).target("kind")
        assert target.frequencies[0] > 0.4 and target.frequencies[3] > 0.4
        shown.append([target.frequencies[level] > 0 for level in (1, 2)])
    assert np.mean(shown) < 0.06  # two standard deviations, one side: 2.3 %


def test_a_hospitals_fewest_patients_of_a_level_holds_for_the_noised_schema():
    schema = derive_schema(noised(of_levels(2000)), LEVELS, SETTINGS)
    policy.check_schema(PolicyConfig(min_level_patients=700), schema)
    with pytest.raises(RefusedError, match="allows 1200 or more, the schema shows a level of"):
        policy.check_schema(PolicyConfig(min_level_patients=1200), schema)


def test_a_column_of_which_nothing_can_be_told_from_noise_is_not_asked_and_the_reason_says_so():
    schema = derive_schema(noised(of_levels(2000)), LEVELS, SETTINGS)
    rare = dictionary(number("a", 0, 100, 0), category("rare"))
    sick = (np.arange(2000) < 3).astype(np.int16)
    counts = count({"a": np.arange(2000.0) % 100, "rare": sick}, rare, resolution(PRIVACY))
    schema = derive_schema(noised(counts, seed=1), rare, SETTINGS)
    assert schema.names == ("a",)
    assert "can be told from the noise on the counts" in schema.unusable["rare"]


def test_a_noised_schema_of_many_patients_hides_what_the_exact_one_hides_and_hardly_more():
    exact = count(values(40_000), DICTIONARY)
    coarse = count(values(40_000), DICTIONARY, resolution(PRIVACY))
    true = derive_schema(exact, DICTIONARY, SETTINGS)
    made = derive_schema(noised(coarse, sites=4), DICTIONARY, SETTINGS)
    assert made.names == true.names
    assert made.shortcuts == true.shortcuts and made.hidden == true.hidden
    assert made.shortcuts["rare"] == ("rare_copy",)


def test_raw_mutual_information_of_a_noised_schema_is_corrected_as_well():
    settings = SETTINGS.model_copy(update={"mi_normalisation": "none"})
    coarse = count(values(2000), DICTIONARY, resolution(PRIVACY))
    means = np.mean(
        [
            list(derive_schema(noised(coarse, seed), DICTIONARY, settings).mi["colour"].values())[:2]
            for seed in range(30)
        ]
    )
    assert means < 0.01  # colour is independent of all
