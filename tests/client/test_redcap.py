"""REDCap's 18-column data dictionary becomes ours."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from wardround.client.redcap import choices_of, import_redcap, read_redcap
from wardround.client.registry import read_registry
from wardround.common.dictionary import dump_dictionary, parse_dictionary
from wardround.common.errors import RegistryError

HEADER = [
    "Variable / Field Name", "Form Name", "Section Header", "Field Type", "Field Label",
    "Choices, Calculations, OR Slider Labels", "Field Note", "Text Validation Type OR Show Slider Number",
    "Text Validation Min", "Text Validation Max", "Identifier?", "Branching Logic (Show field only if...)",
    "Required Field?", "Custom Alignment", "Question Number (surveys only)", "Matrix Group Name", "Matrix Ranking?",
    "Field Annotation",
]  # fmt: skip
API = [
    "field_name", "form_name", "section_header", "field_type", "field_label", "select_choices_or_calculations",
    "field_note", "text_validation_type_or_show_slider_number", "text_validation_min", "text_validation_max",
    "identifier", "branching_logic", "required_field", "custom_alignment", "question_number", "matrix_group_name",
    "matrix_ranking", "field_annotation",
]  # fmt: skip


def field(
    name, kind, label="", choices="", valid="", low="", high="", ident="", header="", form="base", note="", logic=""
):
    return [name, form, header, kind, label or name, choices, note, valid, low, high, ident, logic, *[""] * 6]


FIELDS = [
    field("record_id", "text", "Record"),
    field("full_name", "text", "Name", ident="y"),
    field("mail", "text", "Mail", valid="email"),
    field("dob", "text", "Born", valid="date_ymd"),
    field("age", "text", "<b>Age</b> at\nadmission", valid="integer", low="18", high="110", header="Demographics"),
    field("sex", "radio", "Sex", "1, Male | 2, Female, or not stated | -1, Unknown"),
    field("creat", "text", "Creatinine", valid="number_1dp", header="Laboratory", form="labs", note="mg/dL"),
    field("pain", "slider", "Pain", "none | some | worst", form="labs"),
    field("bmi", "calc", "Body mass index", "[weight]/[height]^2", form="labs"),
    field("comorb", "checkbox", "Comorbidity", "1, Diabetes | 2, COPD | X-3, Other", form="history"),
    field("dead", "yesno", "Died", form="history", logic="[age] > 17"),
    field("consent", "truefalse", "Consent", form="history"),
    field("story", "notes", "Story", form="history"),
    field("remark", "text", "Remark", form="history"),
    field("scan", "file", "Scan", form="history"),
    field("intro", "descriptive", "Read this", form="history"),
    field("ward", "dropdown", "Ward", "1, ICU", form="history"),
    field("nowhere", "text", "No range", valid="number", form="history"),
]


def write(folder: Path, fields: list[list[str]], header: list[str] = HEADER) -> Path:
    path = folder / "dd.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([header, *fields])
    return path


def records(folder: Path) -> Path:
    path = folder / "records.csv"
    names = "record_id,age,sex,creat,pain,bmi,comorb___1,comorb___2,comorb___x_3,dead,consent,base_complete"
    rng = np.random.default_rng(0)
    rows = [
        f"{i},{rng.integers(20, 90)},{[1, 2, -1][i % 3]},{rng.uniform(0.4, 9):.1f},{rng.integers(0, 101)},"
        f"{rng.uniform(16, 45):.1f},{i % 2},{i % 3 == 0:d},0,{i % 5 == 0:d},{i % 4 > 0:d},2"
        for i in range(60)
    ]
    path.write_text("\n".join([names, *rows]) + "\n")
    return path


@pytest.mark.parametrize("header", [HEADER, API], ids=["designer", "api"])
def test_every_field_type_becomes_the_right_entry(tmp_path, header: list[str]):
    drafted = import_redcap(write(tmp_path, FIELDS, header), records(tmp_path))
    entry = {feature.name: feature for feature in drafted.dictionary.features}
    assert drafted.dictionary.id_column == "record_id"
    for name in ("full_name", "mail", "dob", "story", "remark", "scan", "ward", "nowhere", "base_complete"):
        assert entry[name].role == "excluded" and entry[name].reason, name
    assert "intro" not in entry
    age = entry["age"]
    assert (age.label, age.kind, age.low, age.high, age.section) == (
        "Age at admission",
        "number",
        18,
        110,
        "Demographics",
    )
    assert dict(entry["sex"].levels) == {"1": "Male", "2": "Female, or not stated", "-1": "Unknown"}
    assert entry["sex"].section == "Demographics"  # a section header holds until the next
    creat = entry["creat"]
    assert (creat.section, creat.decimals, creat.description) == ("Laboratory", 1, "mg/dL")
    assert creat.low <= 0.5 and creat.high >= 8.5 and any("extremes" in line for line in drafted.notes["creat"])
    assert (entry["pain"].low, entry["pain"].high, entry["pain"].section) == (0, 100, "Laboratory")
    assert entry["bmi"].kind == "number"
    assert entry["comorb___1"].label == "Comorbidity: Diabetes" and entry["comorb___1"].section == "History"
    assert dict(entry["comorb___x_3"].levels) == {"1": "yes", "0": "no"}
    assert dict(entry["dead"].levels) == {"1": "yes", "0": "no"}
    assert dict(entry["consent"].levels) == {"1": "true", "0": "false"}
    assert drafted.notes["dead"][-1] == "asked in REDCap only if [age] > 17"


def test_an_imported_dictionary_loads_and_reads_the_export(tmp_path):
    import tomllib

    drafted = import_redcap(write(tmp_path, FIELDS), records(tmp_path))
    text = dump_dictionary(drafted.dictionary, drafted.notes)
    dictionary = parse_dictionary(tomllib.loads(text), "imported")
    assert dictionary.drafted_from == "redcap" and "# - drafted_from: remove it" in text
    registry = read_registry(tmp_path / "records.csv", dictionary)
    assert len(registry) == 60
    assert set(registry.values["sex"].tolist()) == {0, 1, 2}


def test_the_same_label_twice_is_told_apart(tmp_path):
    fields = [FIELDS[0], field("a", "yesno", "Fever"), field("b", "yesno", "Fever")]
    (tmp_path / "records.csv").write_text("record_id,a,b\n1,0,1\n2,1,0\n")
    features = import_redcap(write(tmp_path, fields), tmp_path / "records.csv").dictionary.features
    assert [feature.label for feature in features[1:]] == ["Fever", "Fever (b)"]


@pytest.mark.parametrize(
    ("fields", "header", "line"),
    [
        (FIELDS, ["name", *HEADER[1:]], "not a REDCap data dictionary: no column 'variable / field name'"),
        ([], HEADER, "no field in it"),
        ([FIELDS[0], FIELDS[4][:-2]], HEADER, "row 2 has 16 cells, expected 18 as in the header"),
        (
            [FIELDS[0], field("x", "radio", choices="1 Male | 2 Female")],
            HEADER,
            "row 2, field 'x': expected choices as",
        ),
        ([FIELDS[0], field("x", "radio", choices="1, a | 1, b")], HEADER, "row 2, field 'x': code '1' occurs twice"),
        ([FIELDS[0], field("x", "hologram")], HEADER, "row 2, field 'x': unknown field type 'hologram'"),
        ([FIELDS[0], field("", "text")], HEADER, "row 2 has no variable name"),
        ([FIELDS[0], FIELDS[1]], HEADER, "no usable feature"),
        ([FIELDS[0], FIELDS[5], FIELDS[5]], HEADER, "row 3: variable 'sex' was described in row 2 already"),
        (
            [FIELDS[0], field("c", "checkbox", choices="a, One | A, Two")],
            HEADER,
            "row 2, field 'c': column 'c___a' would be described twice; change one of the codes",
        ),
        (
            [field("study", "text"), FIELDS[5]],
            HEADER,
            "records.csv: no column 'study', the record id by the first field",
        ),
        (
            [FIELDS[0], field("age", "text", valid="integer", low="90", high="5")],
            HEADER,
            "row 2, field 'age': expected validation min < max, got 90 and 5",
        ),
        ([FIELDS[0], field("x", "radio", choices="1, a | 1.0, b")], HEADER, "row 2, field 'x': code '1' occurs twice"),
    ],
)
def test_a_broken_redcap_dictionary_is_one_line(tmp_path, fields, header, line: str):
    with pytest.raises(RegistryError) as caught:
        import_redcap(write(tmp_path, fields, header), records(tmp_path))
    assert line in str(caught.value) and "\n" not in str(caught.value)


def test_a_redcap_file_that_is_missing_or_not_utf8_is_one_line(tmp_path):
    with pytest.raises(RegistryError, match="no such file"):
        read_redcap(tmp_path / "none.csv")
    (tmp_path / "dd.csv").write_bytes(b"Variable / Field Name\nJos\xe9\n")
    with pytest.raises(RegistryError, match="line 2 is not UTF-8"):
        read_redcap(tmp_path / "dd.csv")


@pytest.mark.parametrize("length", [20, 200_000], ids=["short", "long"])
def test_an_unclosed_quotation_mark_names_its_row(tmp_path, length: int):
    path = write(tmp_path, FIELDS[:3])
    path.write_text(path.read_text("utf-8-sig") + 'late,base,,text,"Late' + "x" * length + "\n")
    with pytest.raises(RegistryError, match="row 4: a quotation mark is not closed"):
        read_redcap(path)


@pytest.mark.parametrize("character", ["\u2028", "\x0b", "\x0c", "\x85", "\n"])
def test_a_label_may_hold_any_line_break(tmp_path, character: str):
    fields = read_redcap(write(tmp_path, [FIELDS[0], field("a", "yesno", f"Fever{character}today"), FIELDS[10]]))
    assert [read.name for read in fields] == ["record_id", "a", "dead"] and fields[1].label == "Fever today"


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("Dose <200 or >400 mg", "Dose <200 or >400 mg"),
        ('<div class="rich-text-field-label"><p>Age &gt; 18</p></div>', "Age > 18"),
        ("a<b and c>d", "a<b and c>d"),
        ("<span style='color:red'>Weight</span><br/>(kg)", "Weight (kg)"),
        ("PaO<sub>2</sub>", "PaO 2"),
    ],
)
def test_only_real_tags_are_taken_out_of_labels(tmp_path, label: str, shown: str):
    assert read_redcap(write(tmp_path, [field("x", "yesno", label)]))[0].label == shown


def imported(folder: Path, *fields: list[str]):
    drafted = import_redcap(write(folder, [FIELDS[0], FIELDS[5], *fields]), records(folder))
    return {feature.name: feature for feature in drafted.dictionary.features}, drafted.notes


def test_fields_that_look_like_outcomes_are_set_aside_by_name_label_levels_or_form(tmp_path):
    levels = "1, Home | 2, Nursing home | 3, Died"
    drafted = import_redcap(
        write(
            tmp_path,
            [
                FIELDS[0],
                FIELDS[5],
                field("died", "yesno", "Did the patient die?"),
                field("x1", "yesno", "Readmitted within 30 days"),
                field("went_to", "radio", "Discharge status", levels),
                field("creat", "text", "Length of stay", valid="number"),
                field("consent", "truefalse", "Consent", form="follow_up"),
                field("pain", "slider", "Pain", header="Complications"),
            ],
        ),
        records(tmp_path),
    )
    entry = {feature.name: feature for feature in drafted.dictionary.features}
    assert [entry[name].role for name in ("died", "x1", "went_to")] == ["outcome"] * 3
    assert [entry[name].role for name in ("creat", "consent", "pain")] == ["excluded"] * 3
    assert drafted.set_aside == ("died", "x1", "went_to", "creat", "consent", "pain")
    assert (
        drafted.set_aside_line.count("\n") == 0 and "died, x1, went_to, creat, consent, pain" in drafted.set_aside_line
    )
    assert [feature.name for feature in drafted.dictionary.context_of(entry["died"])] == ["sex"]
    assert all("TODO: looks like " in drafted.notes[name][0] for name in drafted.set_aside)
    assert dict(entry["consent"].levels) == {
        "1": "true",
        "0": "false",
    }  # what REDCap said stays, should it be a feature


def test_numbers_with_a_decimal_comma_are_not_imported_as_empty(tmp_path):
    (tmp_path / "records.csv").write_text("record_id;age;sex\n1;40;1\n2;50,5;2\n")
    with pytest.raises(RegistryError, match=r"column 'age' holds numbers with a decimal comma \(row 2\)"):
        import_redcap(write(tmp_path, [FIELDS[0], FIELDS[4], FIELDS[5]]), tmp_path / "records.csv")


def test_a_bound_that_contradicts_the_table_stays_and_waits_for_a_person(tmp_path):
    entry, notes = imported(tmp_path, field("age", "text", valid="number", low="nan", high="5"))
    assert (entry["age"].low, entry["age"].high) == (4, 5)
    assert "TODO: every value of this table lies beyond high = 5: is it in this unit?" in notes["age"]
    entry, _ = imported(tmp_path, field("age", "text", valid="number", low="500"))
    assert (entry["age"].low, entry["age"].high) == (500, 501)


def test_a_range_narrower_than_the_decimals_of_the_table_gets_more_of_them(tmp_path):
    entry, _ = imported(tmp_path, field("age", "text", valid="number", low="0.2", high="0.9"))
    assert entry["age"].decimals == 1


def test_codes_are_written_as_cells_are_read_and_too_many_wait_for_a_person(tmp_path):
    many = " | ".join(f"{i}, Level {i}" for i in range(255))
    entry, _ = imported(tmp_path, field("a", "radio", choices="1.0, One | 2.0, Two"), field("b", "radio", choices=many))
    assert dict(entry["a"].levels) == {"1": "One", "2": "Two"}
    assert entry["b"].role == "excluded" and entry["b"].reason == "TODO: 255 levels, group them into at most 254"


def test_choices_with_equal_labels_keep_their_codes(tmp_path):
    path = write(tmp_path, [field("x", "radio", choices="1, Other | 2, Other | 3, None")])
    assert choices_of(read_redcap(path)[0], path) == {"1": "Other (1)", "2": "Other (2)", "3": "None"}
