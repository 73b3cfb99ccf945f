"""The data dictionary: what is accepted, what is refused and in which words, and that text and digest are stable."""

from __future__ import annotations

import copy
import tomllib
from typing import Any

import pytest
from wardround.common.config import packaged
from wardround.common.dictionary import (
    Dictionary,
    dump_dictionary,
    load_dictionary,
    parse_dictionary,
)
from wardround.common.errors import DictionaryError

BASE: dict[str, Any] = {
    "name": "small",
    "title": "A small registry",
    "features": [
        {"name": "pid", "label": "Patient", "role": "id"},
        {"name": "age", "label": "Age", "section": "Who", "kind": "number", "unit": "years", "low": 0, "high": 120},
        {"name": "sex", "label": "Sex", "section": "Who", "levels": {"2": "female", "1": "male"}},
        {"name": "lactate", "label": "Lactate", "section": "Labs", "kind": "number", "low": 0.2, "high": 30,
         "decimals": 1, "scale": "log", "known_at": 1, "sentinels": [999, "not done"]},
        {"name": "dead", "label": "Death", "section": "Outcome", "role": "outcome", "levels": {"0": "no", "1": "yes"},
         "known_at": 1, "question": "Did the patient die?", "hide": ["sex"]},
        {"name": "los", "label": "Stay", "role": "excluded", "reason": "restates death"},
    ],
}  # fmt: skip


def changed(feature: int, **fields: Any) -> dict[str, Any]:
    """BASE with fields of one entry set, or removed where None."""
    data = copy.deepcopy(BASE)
    for key, value in fields.items():
        data["features"][feature][key] = value
        if value is None:
            del data["features"][feature][key]
    return data


def base() -> Dictionary:
    return parse_dictionary(BASE, "small.toml")


def test_a_dictionary_written_as_toml_reads_back_equal():
    dictionary = base()
    text = dump_dictionary(dictionary, {"": ["head"], "age": ["a note"]})
    again = parse_dictionary(tomllib.loads(text), "again")
    assert again == dictionary
    assert again.digest() == dictionary.digest()
    assert list(again.feature("sex").levels) == ["2", "1"]  # the order is kept: it numbers the levels


@pytest.mark.parametrize("text", ['quote " and \\ backslash', "tab\tand\x7fdel", "µmol/L – 한국어 🫀"])
def test_awkward_text_survives_toml(text: str):
    dictionary = parse_dictionary(changed(1, description=text), "x")
    assert parse_dictionary(tomllib.loads(dump_dictionary(dictionary)), "y") == dictionary


def test_the_digest_tells_the_order_of_levels_apart():
    other = parse_dictionary(changed(2, levels={"1": "male", "2": "female"}), "x")
    assert other.feature("sex").levels == base().feature("sex").levels  # equal as mappings
    assert other.digest() != base().digest()


def test_an_outcome_is_asked_only_with_what_is_known_before_it_and_not_hidden():
    dictionary = base()
    assert [f.name for f in dictionary.context_of(dictionary.feature("dead"))] == ["age"]
    assert [f.name for f in dictionary.context_of(dictionary.feature("age"))] == ["sex", "lactate"]


def test_roles_are_found():
    dictionary = base()
    assert dictionary.id_column == "pid"
    assert dictionary.site_column is None
    assert [f.name for f in dictionary.used] == ["age", "sex", "lactate", "dead"]
    assert "age" in dictionary and "los" in dictionary and "nothing" not in dictionary
    with pytest.raises(DictionaryError, match="'small' has no entry 'nothing'"):
        dictionary.feature("nothing")


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (changed(1, low=None), "feature 'age': a number needs low and high, its plausible range"),
        (changed(1, low=130), "feature 'age': expected low < high, got 130 and 120"),
        (changed(1, scale="log"), "feature 'age': scale = 'log' needs low > 0, got 0"),
        (changed(1, colour="red"), "feature 'age': unknown key 'colour'"),
        (changed(1, label=None), "feature 'age': missing key 'label'"),
        (changed(1, section=None), "feature 'age': a column of role 'feature' needs section"),
        (changed(1, name="sex"), "feature 'sex' is described twice"),
        (changed(1, role="id"), "expected one feature with role = 'id' (the patient), got columns 'pid' and 'age'"),
        (changed(1, label="Sex"), "features 'age' and 'sex' have the same label 'Sex'"),
        (changed(2, levels={"1": "male"}), "feature 'sex': a category needs at least 2 levels, got 1"),
        (changed(2, levels={"1": "x", "2": "x"}), "feature 'sex': two levels have the same label"),
        (changed(4, question=None), "feature 'dead': an outcome needs question"),
        (changed(4, known_at=0), "outcome 'dead' has known_at = 0, but no feature is known before"),
        (changed(4, hide=["nobody"]), "feature 'dead' hides 'nobody', which the dictionary does not have"),
        (changed(1, low=0.2, high=0.9), "feature 'age': expected at least two values between low = 0.2 and high = 0.9"),
        (changed(1, sentinels=["99"]), "feature 'age': sentinel '99' of a number is text: write 99, without quotes"),
        (changed(3, sentinels=["not done "]), "sentinel 'not done ' is never found: cells are read as 'not done'"),
        (changed(2, levels={str(i): f"level {i}" for i in range(255)}), "'sex': expected at most 254 levels, got 255"),
        (
            changed(2, levels={"1.0": "male", "2.0": "female"}),
            "'sex': level code '1.0' is never found: cells are read as '1', write that",
        ),
        (changed(5, reason=None), "feature 'los': an excluded column needs reason"),
        (changed(0, role="excluded", reason="x"), "expected one feature with role = 'id' (the patient), got none"),
    ],
)
def test_a_contradiction_is_one_line_that_names_the_entry(data: dict[str, Any], line: str):
    with pytest.raises(DictionaryError) as caught:
        parse_dictionary(data, "small.toml")
    text = str(caught.value)
    assert text.startswith("small.toml: ") and line in text
    assert "\n" not in text and len(text) < 300


def test_the_largest_category_and_the_shortest_grid_are_accepted():
    parse_dictionary(changed(2, levels={str(i): f"level {i}" for i in range(254)}), "x")
    narrow = parse_dictionary(changed(1, low=0.2, high=2.1, sentinels=[99, "unknown"]), "x")
    assert narrow.feature("age").grid_ends == (1, 2)


def test_a_geometric_grid_begins_above_zero():
    feature = parse_dictionary(changed(3, low=1e-7, decimals=1), "x").feature("lactate")
    assert feature.grid_ends[0] == 1


def test_no_usable_feature_is_refused():
    data = copy.deepcopy(BASE)
    data["features"] = [data["features"][0], data["features"][5]]
    with pytest.raises(DictionaryError, match="no usable feature"):
        parse_dictionary(data, "small.toml")


def test_missing_files_and_bad_toml_are_dictionary_errors(tmp_path):
    with pytest.raises(DictionaryError, match="no such file"):
        load_dictionary(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(DictionaryError, match="not valid TOML"):
        load_dictionary(tmp_path / "bad.toml")


@pytest.mark.parametrize("name", ["support_icu", "smart", "copenhagen_stroke"])
def test_shipped_dictionaries_load_by_name_even_beside_a_folder_of_that_name(name: str, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    dictionary = load_dictionary(name)
    assert dictionary == load_dictionary(packaged("registries", f"{name}.toml"))
    assert dictionary.public and dictionary.source and dictionary.licence
    assert len(dictionary.with_role("outcome")) >= 1


def test_what_restates_sepsis_is_never_shown_when_sepsis_is_asked():
    dictionary = load_dictionary("support_icu")
    shown = {feature.name for feature in dictionary.context_of(dictionary.feature("sepsis_any"))}
    assert not shown & {"cat1", "cat2", "seps", "dzgroup"}
    assert {"age", "temp1", "wblc1"} <= shown and "temp" not in shown  # day 1, not day 3


def test_hospital_death_is_asked_from_day_1_alone():
    dictionary = load_dictionary("support_icu")
    shown = dictionary.context_of(dictionary.feature("hospdead"))
    assert max(feature.known_at for feature in shown) < 3
    excluded = {feature.name for feature in dictionary.with_role("excluded")}
    assert {"charges", "totcst", "slos", "surv2m", "aps", "sps", "time", "event", "dnrday"} <= excluded
