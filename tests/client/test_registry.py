"""Reading a registry: the values, and for every broken table the line that a data manager needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wardround.client.policy import check_targets
from wardround.client.registry import (
    Registry,
    check_mapping,
    clean_numbers,
    describe_mapping,
    read_registry,
    split_rows,
    to_registry,
    write_registry,
)
from wardround.common.config import MappingConfig, load_site, packaged
from wardround.common.dictionary import Dictionary, Feature, load_dictionary, parse_dictionary
from wardround.common.errors import ConfigError, RegistryError, UserError
from wardround.simulations import registries

HEADER = "pid,ward,age,sex,crea,dead"
ROWS = ["a1,east,64.6,1,1.2,0", "a1,east,64.6,1,999,0", "b2,west,,2,0.89990,1", "c3,west,31,NA,88,1"]


def dictionary() -> Dictionary:
    return parse_dictionary(
        {
            "name": "small",
            "title": "small",
            "features": [
                {"name": "pid", "label": "Patient", "role": "id"},
                {"name": "ward", "label": "Ward", "role": "site"},
                {"name": "age", "label": "Age", "section": "Who", "kind": "number", "low": 18, "high": 110},
                {"name": "sex", "label": "Sex", "section": "Who", "levels": {"1": "male", "2": "female"}},
                {"name": "crea", "label": "Creatinine", "section": "Labs", "kind": "number", "unit": "mg/dL",
                 "low": 0.2, "high": 26, "decimals": 1, "scale": "log", "sentinels": [999, "not done"], "known_at": 1},
                {"name": "dead", "label": "Death", "section": "Outcome", "role": "outcome",
                 "levels": {"0": "no", "1": "yes"}, "known_at": 2, "question": "Dead?"},
                {"name": "los", "label": "Stay", "role": "excluded", "reason": "restates death"},
            ],
        },
        "small",
    )  # fmt: skip


def csv(folder: Path, *rows: str, header: str = HEADER, name: str = "t.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(("\n".join([header, *rows]) + "\n").encode(encoding))
    return path


def test_values_are_rounded_and_cleaned(tmp_path):
    registry = read_registry(csv(tmp_path, *ROWS), dictionary())
    assert len(registry) == 4 and registry.n_patients == 3
    assert registry.patients.tolist() == ["a1", "a1", "b2", "c3"]
    assert registry.sites.tolist() == ["east", "east", "west", "west"]
    np.testing.assert_array_equal(registry.values["age"], [65, 65, np.nan, 31])
    np.testing.assert_array_equal(registry.values["crea"], [1.2, np.nan, 0.9, np.nan])  # sentinel, artefact, too high
    np.testing.assert_array_equal(registry.values["sex"], [0, 0, 1, -1])
    assert registry.values["sex"].dtype == np.int16 and registry.values["age"].dtype == np.float64
    assert set(registry.values) == {"age", "sex", "crea", "dead"}


def test_csv_tsv_semicolons_bom_and_parquet_read_the_same(tmp_path):
    first = csv(tmp_path, *ROWS)
    digest = read_registry(first, dictionary()).digest
    other = tmp_path / "t.tsv"
    other.write_text(first.read_text().replace(",", "\t"))
    semicolons = tmp_path / "s.csv"
    semicolons.write_text(
        "\ufeff" + first.read_text().replace(",", ";").replace("\n", "\r\n"), encoding="utf-8", newline=""
    )
    frame = pd.read_csv(first)  # sex becomes 1.0, 2.0, NaN: the codes are still "1" and "2"
    frame.to_parquet(tmp_path / "t.parquet")
    for path in (other, semicolons, tmp_path / "t.parquet"):
        assert read_registry(path, dictionary()).digest == digest, path


def test_booleans_and_dictionaries_of_parquet_are_codes(tmp_path):
    described = parse_dictionary(
        {"name": "b", "title": "b", "features": [
            {"name": "pid", "label": "P", "role": "id"},
            {"name": "flag", "label": "Flag", "section": "S", "levels": {"False": "no", "True": "yes"}},
            {"name": "word", "label": "Word", "section": "S", "levels": {"None": "none", "Mild": "mild"}},
        ]}, "b")  # fmt: skip
    words = pa.chunked_array(
        [pa.array(["None", "Mild"]).dictionary_encode(), pa.array([None]).cast(pa.string()).dictionary_encode()]
    )
    pq.write_table(pa.table({"pid": [1, 2, 3], "flag": [True, None, False], "word": words}), tmp_path / "t.parquet")
    registry = read_registry(tmp_path / "t.parquet", described)
    assert registry.values["flag"].tolist() == [1, -1, 0]
    assert registry.values["word"].tolist() == [0, 1, -1]  # "None" is a level here, not a missing value
    assert registry.patients.tolist() == ["1", "2", "3"]


def test_quoted_cells_may_hold_delimiters_and_line_breaks(tmp_path):
    path = csv(tmp_path, '"a,1",east,40,1,1.0,0,"x"', 'b,west,50,2,1.0,1,"two\nlines"', header=HEADER + ",remark")
    assert read_registry(path, dictionary()).patients.tolist() == ["a,1", "b"]


def test_a_quotation_mark_inside_a_plain_cell_is_text(tmp_path):
    path = csv(tmp_path, 'a 5",east,40,1,1.0,0', "b,west,50,2,1.0,1")
    assert read_registry(path, dictionary()).patients.tolist() == ['a 5"', "b"]


def test_a_sentinel_word_in_a_number_column_is_missing(tmp_path):
    registry = read_registry(csv(tmp_path, "a,e,40,1,not done,0", "b,e,41,2,1.5,1"), dictionary())
    np.testing.assert_array_equal(registry.values["crea"], [np.nan, 1.5])


@pytest.mark.parametrize(
    ("rows", "header", "line"),
    [
        (["a,e,40,1,1,0", "b,e,41,1,1"], HEADER, "row 2 (line 3) has 5 cells, expected 6 as in the header; look for "
         "a missing or extra comma"),
        (["a,e,40,1,1,0", "b,e,forty,1,1,1"], HEADER, "column 'age': row 2: expected a number, got text"),
        (["a,e,40,1,1,0", 'b,e,"41,5",1,1,1'], HEADER, "row 2: expected a number, got one with a decimal "
         "comma; write decimals with a point (3.5)"),
        (["a,e,40,1,1,0", "b,e,41,male,1,1"], HEADER, "column 'sex': row 2: a level that is not in the dictionary "
         "(known: '1', '2'); correct the cells, or map the code in site.toml"),
        (["a,e,40,1,1,0", ",e,41,1,1,1"], HEADER, "column 'pid': the patient id is empty in row 2; every row"),
        (["a,e,40,1,1,0", "b,,41,1,1,1"], HEADER, "column 'ward': the site is empty in row 2"),
        (["a,e,40,1,1,0"], "pid,ward,years,sex,crea,dead", "no column 'age'; add it, or name this table's column"),
        (["a,e,40,1,1,0"], "pid,ward,Age,sex,crea,dead", "no column 'age'; nearest is 'Age'"),
        (["a,a,e,40,1,1,0"], "pid,pid,ward,age,sex,crea,dead", "patient id column 'pid' occurs 2 times; keep one"),
        (["a,e,40,40,1,1,0"], "pid,ward,age,age,sex,crea,dead", "column 'age' occurs 2 times; keep one"),
        ([], HEADER, "the table has no rows"),
        (["a,e,,,,0", "b,e,,,,1"], HEADER, "no usable feature: every feature of dictionary 'small' is missing"),
        (['"a,e,40,1,1,0', "b,e,41,2,1,1", 'c",e,42,1,1,0'], HEADER, "column 'pid': the patient id in row 1 holds a "
         "line break; look for an unclosed quotation mark"),
        (["a,e,inf,1,1,0"], HEADER, "column 'age': row 1: expected a number, got infinity"),
    ],
)  # fmt: skip
def test_a_broken_table_is_one_line_that_says_where(tmp_path, rows: list[str], header: str, line: str):
    path = csv(tmp_path, *rows, header=header)
    with pytest.raises(RegistryError) as caught:
        read_registry(path, dictionary())
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and line in text
    assert "\n" not in text
    for value in ("forty", "41,5", "male"):  # what a patient's cell held is never repeated
        assert value not in text.removeprefix(str(path))


def test_a_table_in_another_encoding_names_its_row(tmp_path):
    path = csv(tmp_path, "a,e,40,1,1,0", "José,e,41,1,1,1", encoding="latin-1")
    with pytest.raises(RegistryError, match=r"row 2 \(line 3\) is not UTF-8 text; save the table as 'CSV UTF-8'"):
        read_registry(path, dictionary())


def test_a_bad_byte_after_many_megabytes_names_its_row(tmp_path):
    path = tmp_path / "long.csv"
    line = b"a,e,40,1,1.0,0\n"
    path.write_bytes(HEADER.encode() + b"\n" + line * 150_000 + b"\xff" + line)
    with pytest.raises(RegistryError, match=r"row 150001 \(line 150002\)"):
        read_registry(path, dictionary())


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("t.parquet", b"PAR1 this is no parquet PAR1", "not a Parquet file, or damaged"),
        ("t.xlsx", b"PK", "expected a .csv, .tsv or .parquet file, got '.xlsx'"),
        ("t.csv", b"", "the file is empty"),
        ("t.csv", b"\n\n", "the first line has no column names"),
        ("t.csv", HEADER.encode() + b'\na,e,40,1,"1.0,0\n', "row 1: a quotation mark is not closed"),
        ("t.csv", b'pid,"ward,age\na,e,40\n', "the header: a quotation mark is not closed"),
        ("t.csv", b'pid,"ward,age\n' + b"a,e,40\n" * 30_000, "the header: a quotation mark is not closed"),
        ("t.csv", b'pid,"ward,age\na,"e,40\n', "the name of column 2 holds a line break; look for an unclosed"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, name: str, content: bytes, line: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RegistryError) as caught:
        read_registry(tmp_path / name, dictionary())
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_missing_tables_and_folders_are_named(tmp_path):
    with pytest.raises(RegistryError, match="no such table"):
        read_registry(tmp_path / "none.csv", dictionary())
    with pytest.raises(RegistryError, match="expected a table file, got a folder"):
        read_registry(tmp_path, dictionary())


def test_a_parquet_cut_short_is_refused(tmp_path):
    pd.read_csv(csv(tmp_path, *ROWS)).to_parquet(tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[:40] + b"\0" * (len(whole) - 80) + whole[-40:])
    with pytest.raises(RegistryError, match="damaged"):
        read_registry(tmp_path / "t.parquet", dictionary())


@pytest.mark.parametrize("cells", [[[1.0], [2.0]], [{"x": 1.0}, {"x": 2.0}]], ids=["list", "struct"])
def test_lists_and_structs_of_parquet_are_refused_where_they_would_be_read(tmp_path, cells: list):
    columns = {"pid": ["a", "b"], "ward": ["e", "e"], "age": [40, 50], "sex": [1, 2], "dead": [0, 1]}
    pq.write_table(pa.table({**columns, "crea": pa.array(cells)}), tmp_path / "t.parquet")
    with pytest.raises(RegistryError, match=r"column 'crea': expected a number or a word in each cell, got type "):
        read_registry(tmp_path / "t.parquet", dictionary())
    pq.write_table(pa.table({**columns, "crea": [1.0, 2.0], "other": pa.array(cells)}), tmp_path / "t.parquet")
    assert len(read_registry(tmp_path / "t.parquet", dictionary())) == 2  # a column that is not asked for may be one


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"age": "pid"}, "'pid' and 'age' would both be read from this table's column 'pid'"),
        ({"pid": "nr", "crea": "nr"}, "'pid' and 'crea' would both be read from this table's column 'nr'"),
        ({"crea": "age"}, "'age' and 'crea' would both be read from this table's column 'age'"),
    ],
)
def test_two_entries_are_never_read_from_one_column(tmp_path, columns: dict[str, str], line: str):
    with pytest.raises(ConfigError, match=line):
        read_registry(csv(tmp_path, *ROWS), dictionary(), MappingConfig(columns=columns))


def test_columns_may_be_exchanged_and_one_that_is_excluded_read_as_another(tmp_path):
    path = csv(tmp_path, *[row + ",50" for row in ROWS], header=HEADER + ",los")
    registry = read_registry(path, dictionary(), MappingConfig(columns={"age": "los", "crea": ""}))
    assert registry.values["age"].tolist() == [50.0] * 4


def test_local_codes_are_found_however_they_are_written(tmp_path):
    path = csv(tmp_path, "a,e,40,10.0,1,0", "b,e,41,20,1,1")
    codes = {"sex": {"10": "1", "20.0": "2"}}
    assert read_registry(path, dictionary(), MappingConfig(levels=codes)).values["sex"].tolist() == [0, 1]
    with pytest.raises(ConfigError, match=r"codes '10' and '10\.0' are one code: cells are read as '10'"):
        read_registry(path, dictionary(), MappingConfig(levels={"sex": {"10": "1", "10.0": "2"}}))


def test_the_example_of_a_site_fits_the_dictionary_that_it_names():
    site = load_site(packaged("", "site.example.toml"))
    described = load_dictionary(site.dictionary)
    check_mapping(site.mapping, described)
    check_targets(site.policy, described)
    shown = [line for line in describe_mapping(site.mapping, described) if line[0] in ("crea1", "temp1", "sex")]
    assert ("crea1", "µmol/L", "value × 0.011312 → mg/dL") in shown
    assert ("temp1", "°F", "value × 0.555556 - 17.7778 → °C") in shown
    assert ("sex", "code 'F'", "'Female' (female)") in shown and ("sex", "code '9'", "missing") in shown


def test_a_table_in_the_examples_terms_reads_as_the_registry_itself(tmp_path):
    try:
        table = registries.build("support_icu").iloc[:400]
    except UserError as error:
        pytest.skip(str(error))
    site = load_site(packaged("", "site.example.toml"))
    expected = to_registry("here", pa.Table.from_pandas(table, preserve_index=False), load_dictionary(site.dictionary))
    local = table.assign(
        crea1=table["crea1"] * 88.402,
        temp1=table["temp1"] * 1.8 + 32,
        sex=table["sex"].map({"Male": "M", "Female": "F"}),
    ).rename(columns={"pid": "pseudonym", "crea1": "creatinine_umol_l"})
    local.drop(columns="adlp").to_csv(tmp_path / "t.csv", index=False)
    read = read_registry(tmp_path / "t.csv", expected.dictionary, site.mapping)
    assert (read.values["adlp"] == -1).all()
    for name, column in expected.values.items():
        if name == "adlp":
            continue
        tolerance = 10.0 ** -expected.dictionary.feature(name).decimals if name in ("crea1", "temp1") else 0
        np.testing.assert_allclose(read.values[name], column, rtol=0, atol=tolerance * 1.001, err_msg=name)


def test_a_mapping_renames_converts_and_recodes(tmp_path):
    path = csv(tmp_path, "a,e,64,M,106.1,0", "b,e,31,F,999,1", header="nr,ward,years,gender,kreatinin,dead")
    mapping = MappingConfig(
        columns={"pid": "nr", "age": "years", "sex": "gender", "crea": "kreatinin"},
        units={"crea": "µmol/L"},
        levels={"sex": {"M": "1", "F": "2"}},
    )
    registry = read_registry(path, dictionary(), mapping)
    np.testing.assert_array_equal(registry.values["crea"], [1.2, np.nan])  # the local code 999 is a sentinel too
    assert registry.values["sex"].tolist() == [0, 1]
    lines = list(describe_mapping(mapping, dictionary()))
    assert ("age", "years", "column renamed") in lines
    assert ("sex", "code 'M'", "'1' (male)") in lines
    assert any(name == "crea" and "value × 0.01131" in done and "mg/dL" in done for name, _, done in lines)


def test_mapped_levels_are_the_whole_list(tmp_path):
    # Locally 1 = female, 2 = male, 0 = male too: an unmapped "1" must not pass as the dictionary's "1".
    mapping = MappingConfig(levels={"sex": {"2": "1", "9": ""}})
    path = csv(tmp_path, "a,e,64,2,1,0", "b,e,31,9,1,1", "c,e,31,1,1,1")
    with pytest.raises(RegistryError, match="row 3: a level that is not in the dictionary"):
        read_registry(path, dictionary(), mapping)


def test_a_column_that_is_not_collected_is_missing(tmp_path):
    path = csv(tmp_path, "a,e,1,1.0,0", header="pid,ward,sex,crea,dead")
    registry = read_registry(path, dictionary(), MappingConfig(columns={"age": ""}))
    assert np.isnan(registry.values["age"]).all()


@pytest.mark.parametrize(
    ("mapping", "line"),
    [
        ({"columns": {"nobody": "x"}}, "mapping.columns: dictionary 'small' has no entry 'nobody'"),
        ({"units": {"crea": "furlong"}}, "no conversion from 'furlong' to 'mg/dL' is known; give a factor instead"),
        ({"units": {"age": "months"}}, "has no unit in the dictionary"),
        ({"units": {"crea": -1.0}}, "expected a factor above 0, got -1"),
        ({"levels": {"sex": {"M": "male"}}}, "feature 'sex' has no level 'male'; expected one of '1', '2'"),
        ({"columns": {"pid": ""}}, "'pid' has role 'id' and must have a column"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(tmp_path, mapping: dict, line: str):
    with pytest.raises(ConfigError) as caught:
        read_registry(csv(tmp_path, *ROWS), dictionary(), MappingConfig(**mapping))
    assert line in str(caught.value)


@given(st.lists(st.floats(-50, 150) | st.just(float("nan")), min_size=1, max_size=50), st.integers(0, 3))
def test_cleaned_numbers_are_in_range_on_the_grid_and_cleaning_again_changes_nothing(values, decimals):
    feature = Feature(
        name="x", label="X", section="S", kind="number", low=0, high=100, decimals=decimals, sentinels=(7,)
    )
    clean = clean_numbers(np.array(values), feature)
    kept = clean.values[~np.isnan(clean.values)]
    assert ((kept >= 0) & (kept <= 100)).all()
    np.testing.assert_array_equal(kept, np.round(kept, decimals))
    assert not (clean.sentinel & clean.out_of_range).any()
    assert not np.signbit(kept).any()


def _random_registry(rng: np.random.Generator, rows: int) -> Registry:
    values = {
        "age": np.round(rng.uniform(18, 110, rows)),
        "sex": rng.integers(-1, 2, rows).astype(np.int16),
        "crea": np.round(rng.uniform(0.2, 26, rows), 1),
        "dead": rng.integers(0, 2, rows).astype(np.int16),
    }
    values["crea"][rng.random(rows) < 0.2] = np.nan
    patients = np.array([f"p{i}" for i in rng.integers(0, rows, rows)], dtype=object)
    return Registry(dictionary(), patients, values, np.array(["east"] * rows, dtype=object))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_no_patient_is_in_two_splits_and_every_row_is_in_one(seed: int, rows: int):
    registry = _random_registry(np.random.default_rng(seed), rows)
    splits = split_rows(registry, seed.to_bytes(16, "big"))
    together = np.concatenate(list(splits.values()))
    assert sorted(together.tolist()) == list(range(rows))
    owners = [set(registry.patients[rows_].tolist()) for rows_ in splits.values()]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]


def test_the_split_depends_on_key_and_id_alone():
    registry = _random_registry(np.random.default_rng(1), 2000)
    splits = split_rows(registry, b"k" * 32)
    shares = [len({*registry.patients[rows].tolist()}) / registry.n_patients for rows in splits.values()]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.04)
    shuffled = np.random.default_rng(2).permutation(2000)
    again = split_rows(registry.take(shuffled), b"k" * 32)
    for name in splits:
        assert set(registry.patients[splits[name]]) == set(registry.patients[shuffled][again[name]])
    assert set(split_rows(registry, b"j" * 32)["test"]) != set(splits["test"])
    with pytest.raises(ConfigError, match="expected 16 to 64 bytes, got 4"):
        split_rows(registry, b"tiny")


def test_a_registry_written_reads_back_with_the_same_digest(tmp_path):
    registry = _random_registry(np.random.default_rng(3), 300)
    registry.values["crea"][:3] = [0.2, 26.0, np.nan]
    write_registry(registry, tmp_path / "r.parquet")
    assert read_registry(tmp_path / "r.parquet", dictionary()).digest == registry.digest
    assert [path.name for path in tmp_path.iterdir()] == ["r.parquet"]


def test_a_measured_value_that_rounds_onto_a_sentinel_survives_writing(tmp_path):
    feature = {"name": "ph", "label": "pH", "section": "S", "kind": "number", "low": 6.5, "high": 7.8, "decimals": 2,
               "sentinels": [7.4]}  # fmt: skip
    data = {"name": "g", "title": "g", "features": [{"name": "pid", "label": "P", "role": "id"}, feature]}
    described = parse_dictionary(data, "g")
    pd.DataFrame({"pid": [1, 2, 3], "ph": [7.4, 7.399414, 7.2]}).to_parquet(tmp_path / "raw.parquet")
    registry = read_registry(tmp_path / "raw.parquet", described)
    np.testing.assert_array_equal(registry.values["ph"], [np.nan, 7.4, 7.2])  # filled in, measured, measured
    write_registry(registry, tmp_path / "r.parquet")
    assert read_registry(tmp_path / "r.parquet", described).digest == registry.digest


def test_the_digest_sees_every_value_id_and_site():
    registry = _random_registry(np.random.default_rng(4), 20)
    digests = {registry.digest, registry.take(np.arange(19)).digest, registry.take(np.arange(20)[::-1]).digest}
    changed = {name: column.copy() for name, column in registry.values.items()}
    changed["age"][0] += 1
    digests.add(Registry(registry.dictionary, registry.patients, changed, registry.sites).digest)
    digests.add(Registry(registry.dictionary, registry.patients, registry.values, None).digest)
    assert len(digests) == 5
    assert registry.take(np.arange(20)).digest == registry.digest
