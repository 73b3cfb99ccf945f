"""The data-quality table and the net for direct identifiers; no patient's value is ever in a message."""

from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from wardround.client import identifiers, outcomes, tables
from wardround.client.identifiers import by_content, by_name
from wardround.client.quality import Quality, assess
from wardround.common.config import MappingConfig
from wardround.common.dictionary import Dictionary, load_dictionary, parse_dictionary
from wardround.simulations import registries

N = 60
IDENTIFIES = (
    "column '{}' looks like {}, which identifies a patient: remove it from the table, or, if it is none, say so in the "
    "dictionary (not_identifying = true)"
)


def dictionary() -> Dictionary:
    return parse_dictionary(
        {
            "name": "small",
            "title": "small",
            "features": [
                {"name": "pid", "label": "Patient", "role": "id"},
                {"name": "age", "label": "Age", "section": "Who", "kind": "number", "unit": "years", "low": 18,
                 "high": 110, "sentinels": [999]},
                {"name": "sex", "label": "Sex", "section": "Who", "levels": {"1": "male", "2": "female"}},
                {"name": "crea", "label": "Creatinine", "section": "Labs", "kind": "number", "unit": "mg/dL",
                 "low": 0.2, "high": 26, "decimals": 1, "scale": "log"},
                {"name": "dead", "label": "Death", "section": "Outcome", "role": "outcome",
                 "levels": {"0": "no", "1": "yes"}, "known_at": 2, "question": "Dead?"},
                {"name": "los", "label": "Stay", "role": "excluded", "reason": "restates death"},
            ],
        },
        "small",
    )  # fmt: skip


def clean() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "pid": [f"p{i}" for i in range(N)],
            "age": rng.integers(20, 90, N),
            "sex": rng.integers(1, 3, N),
            "crea": rng.uniform(0.5, 4, N).round(1),
            "dead": np.arange(N) % 2,
            "los": rng.integers(1, 30, N),
        }
    )


def checked(folder: Path, frame: pd.DataFrame, mapping: MappingConfig | None = None) -> Quality:
    frame.to_csv(folder / "t.csv", index=False)
    return assess(folder / "t.csv", dictionary(), mapping or MappingConfig())


def errors(quality: Quality) -> list[str]:
    return [finding.text for finding in quality.errors]


def test_a_clean_table_has_no_findings(tmp_path):
    quality = checked(tmp_path, clean())
    assert quality.findings == () and quality.not_described == ()
    assert (quality.rows, quality.patients) == (N, N)
    assert quality.to_dict()["clean"] is True


def test_missing_sentinels_and_out_of_range_are_counted_apart(tmp_path):
    frame = clean().astype({"age": object})
    frame.loc[0:5, "age"] = ""
    frame.loc[6:8, "age"] = 999
    frame.loc[9, "age"] = 180
    quality = checked(tmp_path, frame)
    age = next(column for column in quality.columns if column.name == "age")
    assert (age.missing, age.sentinel, age.out_of_range) == (6 / N, 3 / N, 1)
    assert errors(quality) == []
    (note,) = [finding.text for finding in quality.findings]
    assert "1 of 51 values outside 18 to 110 years (row 10); they are read as missing" in note


def test_levels_that_the_dictionary_does_not_know_are_counted_without_being_shown(tmp_path):
    frame = clean().astype({"sex": object})
    frame.loc[3, "sex"], frame.loc[7, "sex"] = "secretword", "otherword"
    quality = checked(tmp_path, frame)
    assert next(column for column in quality.columns if column.name == "sex").unknown_levels == 2
    (text,) = errors(quality)
    assert "column 'sex': rows 4, 8: a level that is not in the dictionary" in text
    assert "secret" not in str(quality.to_dict())


def test_a_wrong_unit_is_an_error_that_names_the_likely_unit(tmp_path):
    frame = clean()
    frame["crea"] = (frame["crea"] * 88.42).round()
    (text,) = errors(checked(tmp_path, frame))
    assert "60 of 60 values outside 0.2 to 26 mg/dL" in text and "as µmol/L nearly all would fit" in text
    assert errors(checked(tmp_path, frame, MappingConfig(units={"crea": "µmol/L"}))) == []


def test_constant_and_empty_features_are_errors(tmp_path):
    frame = clean()
    frame["sex"], frame["crea"] = 1, None
    texts = errors(checked(tmp_path, frame))
    assert any("column 'sex' has one value in every row: a feature with one level" in text for text in texts)
    assert any("column 'crea' has no value in any row" in text for text in texts)


def test_a_table_without_any_usable_feature_is_one_error(tmp_path):
    frame = clean()
    frame["sex"], frame["crea"], frame["age"] = 1, 1.0, 50
    assert errors(checked(tmp_path, frame)) == [
        "no usable feature: none of the 3 features of 'small' has two different values"
    ]
    assert errors(checked(tmp_path, clean()[:1]))[0].endswith("has two different values: the table has one row")


def test_text_in_a_number_and_a_missing_column_are_both_reported(tmp_path):
    frame = clean().astype({"age": object}).drop(columns="crea")
    frame.loc[2, "age"] = "old"
    texts = errors(checked(tmp_path, frame))
    assert any(text.startswith("no column 'crea'") for text in texts)
    frame["crea"] = 1.5
    assert "column 'age': row 3: expected a number, got text" in errors(checked(tmp_path, frame))[0]


def test_columns_that_the_dictionary_does_not_mention_are_listed(tmp_path):
    quality = checked(tmp_path, clean().assign(extra=np.arange(N) % 7, other=1.5))
    assert quality.not_described == ("extra", "other")
    assert errors(quality) == []


def test_several_rows_of_a_patient_are_a_note(tmp_path):
    frame = clean()
    frame["pid"] = [f"p{i // 2}" for i in range(N)]
    quality = checked(tmp_path, frame)
    assert quality.patients == N // 2 and errors(quality) == []
    assert "60 rows of 30 patients" in quality.findings[0].text


PEOPLE = [
    f"{first} {last}" for first in ("Anna", "José", "Mei", "Olu") for last in ("Smith", "O'Brien", "Lindqvist")
] * 5
LAST = [
    f"{start}{end}"
    for start in ("Sm", "Wr", "Lar", "Jens", "Kov", "Nov")
    for end in ["ith", "ing", "sen", "ova", "ak", "an", "er", "el", "ick", "om"]
]
TEXTS = [f"Patient {i} was seen after a fall and is now stable" for i in range(N)]


@pytest.mark.parametrize(
    ("column", "cells", "kind"),
    [
        ("surname", ["x"] * N, "a name"),
        ("PatientName", ["x"] * N, "a name"),
        ("date_of_birth", ["x"] * N, "a date of birth"),
        ("DOB", ["x"] * N, "a date of birth"),
        ("phone_home", ["x"] * N, "a phone number"),
        ("Postcode", ["x"] * N, "a postcode"),
        ("zip", list(range(10_000, 10_000 + N)), "a postcode"),
        ("email", ["x"] * N, "an e-mail address"),
        ("nhs_number", ["x"] * N, "a national or hospital number"),
        ("MRN", ["x"] * N, "a national or hospital number"),
        ("clinical_notes", ["x"] * N, "free text"),
        ("NAME_LAST", ["x"] * N, "a name"),
        ("birth_dt", ["x"] * N, "a date of birth"),
        ("Telefon", ["x"] * N, "a phone number"),
        ("Adresse", ["x"] * N, "an address"),
        ("mobile_no", ["x"] * N, "a phone number"),
        ("CPR", ["x"] * N, "a national or hospital number"),
        ("환자명", ["x"] * N, "a name"),
        ("환자 성명", ["x"] * N, "a name"),
        ("이름", ["x"] * N, "a name"),
        ("생년월일", ["x"] * N, "a date of birth"),
        ("주민등록번호", ["x"] * N, "a national or hospital number"),
        ("전화번호", ["x"] * N, "a phone number"),
        ("주소", ["x"] * N, "an address"),
        ("d1", [f"{1930 + i}0{1 + i % 9}1{i % 9}" for i in range(N)], "a date of birth"),
        ("d2", [f"12-{['JAN', 'FEB', 'MAR', 'APR'][i % 4]}-{1930 + i}" for i in range(N)], "a date of birth"),
        ("d3", [f"12/03/{30 + i}" for i in range(N)], "a date of birth"),
        ("n1", [f"{last.upper()}, JOHN{' A' * (i % 2)} {'XYZ'[i % 3] * 2}" for i, last in enumerate(LAST)], "a name"),
        ("v1", ["a", "anna@example.org"] * (N // 2), "an e-mail address"),
        ("v2", [f"19{30 + i % 60}-0{1 + i % 9}-1{i % 9}" for i in range(N)], "a date of birth"),
        ("v3", [f"+49 30 {100_000 + 7 * i}" for i in range(N)], "a phone number"),
        ("v4", [f"{i:03d}-{10 + i}-{1000 + i}" for i in range(N)], "a national or hospital number"),
        ("v5", [f"SW{1 + i % 9}A {i % 10}A{'ABDEFGHJLN'[i // 6 % 10]}" for i in range(N)], "a postcode"),
        ("v6", [f"{PEOPLE[i]} {chr(65 + i % 26)}{chr(97 + i // 26)}" for i in range(N)], "a name"),
        ("v7", TEXTS, "free text"),
    ],
)
def test_direct_identifiers_are_refused_by_naming_the_column(tmp_path, column: str, cells: list, kind: str):
    texts = errors(checked(tmp_path, clean().assign(**{column: cells})))
    assert texts == [IDENTIFIES.format(column, kind)]


def test_an_identifier_is_refused_even_where_the_dictionary_excludes_it(tmp_path):
    frame = clean()
    frame["los"] = TEXTS
    assert "column 'los' looks like free text" in errors(checked(tmp_path, frame))[0]


def test_national_numbers_are_refused_as_patient_ids(tmp_path):
    frame = clean()
    frame["pid"] = [f"{100_000 + i}-{1000 + i}" for i in range(N)]  # the form of a Danish CPR number
    assert "column 'pid' looks like a national or hospital number" in errors(checked(tmp_path, frame))[0]


def test_numbers_with_check_digits_are_recognised():
    def nhs(i: int) -> str:
        digits = f"{943_476_000 + i}"
        check = (11 - sum(int(d) * w for d, w in zip(digits, range(10, 1, -1), strict=True)) % 11) % 11
        return f"{digits}{check}" if check < 10 else ""

    numbers = [number for i in range(40) if (number := nhs(i))]
    assert by_content(numbers, len(numbers)) == "a national or hospital number"
    assert by_content([str(9_434_760_000 + 7 * i) for i in range(40)], 40) is None  # one in eleven is valid by chance


def test_dates_in_birth_years_of_parquet_are_dates_of_birth_and_others_a_note(tmp_path):
    frame = clean()
    frame["born"] = pd.to_datetime([f"{1930 + i}-03-01" for i in range(N)])
    frame["admitted"] = pd.to_datetime([f"2021-03-{1 + i % 28:02d}" for i in range(N)])
    frame.to_parquet(tmp_path / "t.parquet")
    quality = assess(tmp_path / "t.parquet", dictionary(), MappingConfig())
    assert errors(quality) == [IDENTIFIES.format("born", "a date of birth")]
    assert any("column 'admitted' holds dates" in finding.text for finding in quality.findings)


@pytest.mark.parametrize(
    "name",
    [
        "cpr_performed",
        "nhs_trust",
        "street_drugs",
        "prior_stroke_note",
        "mail_survey_sent",
        "mobile_at_discharge",
        "주소증",
        "약물이름",
        "heart_rate",
        "drug_name_code",
        "hospital",
        "emailed_reminders",
        "birth_weight",
        "notest",
        "phosphate",
        "zipper",
    ],
)
def test_clinical_names_are_no_identifiers(name: str):
    assert by_name(name) is None


def described(*entries: dict) -> Dictionary:
    data = dictionary().model_dump()
    data["features"] = [*data["features"], *entries]
    return parse_dictionary(data, "x")


def minutes(name: str, **more: object) -> dict:
    return {"name": name, "label": name, "section": "S", "kind": "number", "low": 0, "high": 1e6, **more}


def test_a_described_number_is_noted_for_its_name_not_refused(tmp_path):
    clean().assign(cpr=np.arange(N) % 30).to_csv(tmp_path / "t.csv", index=False)
    quality = assess(tmp_path / "t.csv", described(minutes("cpr")), MappingConfig())
    assert quality.errors == ()
    assert [finding.text for finding in quality.findings] == [
        "column 'cpr' is named like a national or hospital number and described as a number: make sure that it is "
        "measured"
    ]


def test_what_a_person_has_judged_not_identifying_is_no_identifier(tmp_path):
    frame = clean().assign(comments=["short text of four words"] * N, cpr=np.arange(N) % 30)
    frame.to_csv(tmp_path / "t.csv", index=False)
    left_out = {"name": "comments", "label": "c", "role": "excluded", "reason": "not asked", "not_identifying": True}
    judged = described(minutes("cpr", not_identifying=True), left_out)
    assert assess(tmp_path / "t.csv", judged, MappingConfig()).findings == ()


def test_z_scores_and_negative_numbers_are_no_phone_numbers():
    rng = np.random.default_rng(0)
    assert by_content([f"{value:.10f}" for value in rng.normal(size=50)], 50) is None
    assert by_content([str(-value) for value in rng.integers(10**8, 10**9, 50)], 50) is None
    assert by_content([f"+49{value}" for value in rng.integers(10**9, 10**10, 50)], 50) == "a phone number"


def test_blood_pressures_wards_and_recent_dates_are_nothing_that_identifies():
    assert by_content([f"{110 + i}/{60 + i}" for i in range(50)], 50) is None
    assert by_content([f"WARD {word}" for word in ["NORTH", "EAST", "SOUTH", "WEST", "MAIN"]], 5) is None
    assert by_content([f"{1 + i % 28}/03/2{i % 3}" for i in range(50)], 50) == "a date"


LONG = 400


def long_table(**columns: object) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = {
        "pid": [f"p{i // 2}" for i in range(LONG)],
        "age": rng.integers(20, 90, LONG),
        "sex": np.arange(LONG) % 2 + 1,
        "crea": rng.uniform(0.5, 4, LONG).round(1),
        "dead": np.arange(LONG) // 2 % 2,
    }
    return pd.DataFrame({**frame, **columns})


@pytest.mark.parametrize(
    ("cells", "serial"),
    [
        (np.random.default_rng(1).permutation(10**6)[:LONG], True),  # one for each row
        (np.repeat(np.random.default_rng(1).permutation(10**6)[: LONG // 2], 2), True),  # one for each patient
        (np.r_[np.random.default_rng(1).permutation(10**6)[: LONG - 3], [np.nan] * 3], True),
        (np.random.default_rng(1).integers(0, 5000, LONG), False),
        (np.random.default_rng(1).uniform(0, 100, LONG).round(3), False),
    ],
    ids=["rows", "patients", "missing", "measured", "decimals"],
)
def test_numbers_of_stays_are_not_measurements(tmp_path, cells: np.ndarray, serial: bool):
    long_table(stay=cells).to_csv(tmp_path / "t.csv", index=False)
    stay = minutes("stay", decimals=3)
    quality = assess(tmp_path / "t.csv", described(stay), MappingConfig())
    expected = "column 'stay' holds whole numbers that do not repeat, like those of stays: give it role"
    assert [text.startswith(expected) for text in errors(quality)] == [True] * serial
    judged = assess(tmp_path / "t.csv", described({**stay, "not_identifying": True}), MappingConfig())
    assert judged.errors == ()
    long_table(stay=cells)[:150].to_csv(tmp_path / "t.csv", index=False)
    assert assess(tmp_path / "t.csv", described(stay), MappingConfig()).errors == ()  # too few rows to tell


def test_a_number_of_stays_that_is_named_so_is_found_in_a_short_table_too(tmp_path):
    cells = np.random.default_rng(1).permutation(10**6)[:LONG]
    for rows, found in ((30, 1), (15, 0)):
        long_table(stayNr=cells)[:rows].to_csv(tmp_path / "t.csv", index=False)
        assert len(assess(tmp_path / "t.csv", described(minutes("stayNr")), MappingConfig()).errors) == found
    long_table(children_no=np.arange(LONG) % 9).to_csv(tmp_path / "t.csv", index=False)
    assert assess(tmp_path / "t.csv", described(minutes("children_no")), MappingConfig()).errors == ()


def test_texts_that_a_draft_left_to_do_are_errors(tmp_path):
    clean().to_csv(tmp_path / "t.csv", index=False)
    data = dictionary().model_dump()
    data["title"] = "TODO: what small is"
    data["features"][1]["label"] = "TODO age"
    data["features"][4]["question"] = "TODO: Dead?"
    data["features"][5]["reason"] = "TODO: nobody knows yet"  # an excluded column is not shown
    assert errors(assess(tmp_path / "t.csv", parse_dictionary(data, "x"), MappingConfig())) == [
        "the dictionary: its title still says TODO",
        "'age': its label still says TODO",
        "'dead': its question still says TODO",
    ]


def test_a_feature_that_looks_like_an_outcome_is_an_error_until_a_person_has_judged(tmp_path):
    frame = clean().assign(x=np.arange(N) % 2, hosp_los=np.arange(N) % 9)
    frame.to_csv(tmp_path / "t.csv", index=False)
    for name, more, by in (
        ("x", {"label": "Died in hospital", "levels": {"0": "no", "1": "yes"}}, "a death by its label"),
        ("x", {"label": "X", "levels": {"0": "alive", "1": "dead"}}, "a death by its levels"),
        ("x", {"label": "X", "section": "Follow-up", "levels": {"0": "n", "1": "y"}}, "a follow-up by its section"),
        ("hosp_los", {"kind": "number", "low": 0, "high": 99}, "a length of stay by its name"),
    ):
        entry = {"name": name, "label": name, "section": "S", **more}
        assert errors(assess(tmp_path / "t.csv", described(entry), MappingConfig())) == [
            f"'{name}' looks like {by}, and may be known only after the outcome: give it role = \"outcome\" (asked, "
            'never shown) or "excluded", or, if it is known at known_at and restates no outcome, say so in the '
            "dictionary (not_outcome = true)"
        ]
        judged = described({**entry, "not_outcome": True})
        assert assess(tmp_path / "t.csv", judged, MappingConfig()).errors == ()
        assert judged.digest() == described(entry).digest()  # no question differs by it
        excluded = described({"name": name, "label": entry["label"], "role": "excluded", "reason": "later"})
        assert assess(tmp_path / "t.csv", excluded, MappingConfig()).errors == ()


@pytest.mark.parametrize("name", registries.NAMES)
def test_no_feature_of_a_shipped_dictionary_looks_like_an_outcome(name: str):
    shipped = load_dictionary(name)
    assert [feature.name for feature in shipped.with_role("feature") if outcomes.in_feature(feature)] == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("DIED", "a death"),
        ("deathInHospital", "a death"),
        ("mortality_90d", "a death"),
        ("Todesfall", "a death"),
        ("overleden", "a death"),
        ("Décédé", "a death"),
        ("사망일", "a death"),
        ("OS_months", "a survival"),
        ("surv2m", "a survival"),
        ("Überleben", "a survival"),
        ("vital_status", "a survival"),
        ("Readmission <30 d", "an outcome"),
        ("dischargeStatus", "a discharge"),
        ("Entlassungsart", "a discharge"),
        ("LOS", "a length of stay"),
        ("iculos", "a length of stay"),
        ("Length of hospital stay", "a length of stay"),
        ("days_in_icu", "a length of stay"),
        ("totalCosts", "a cost"),
        ("futime", "a follow-up"),
        ("status", "a follow-up"),
    ],
)
def test_outcomes_are_known_by_their_names(name: str, kind: str):
    assert outcomes.by_name(name) == kind


@pytest.mark.parametrize(
    "name",
    [
        "studied", "deadspace", "dead_space_fraction", "smoking_status", "time_of_day", "prothrombin_time",
        "lost_weight", "costal_pain", "day_of_admission", "closed", "glucose", "mortar", "postop_day", "stay_at_home",
        "fu_mg", "Alter",
    ],
)  # fmt: skip
def test_clinical_names_are_no_outcomes(name: str):
    assert outcomes.by_name(name) is None


def test_decimal_commas_that_were_drafted_as_words_are_an_error_and_labelled_codes_are_not(tmp_path):
    commas = [f"{i % 5},{i % 3}" for i in range(N)]
    clean().assign(lact=commas).to_csv(tmp_path / "t.csv", index=False)
    entry = {"name": "lact", "label": "Lactate", "section": "S"}
    quality = assess(tmp_path / "t.csv", described({**entry, "levels": {c: c for c in commas}}), MappingConfig())
    assert errors(quality) == [
        "column 'lact' is described as a category and holds numbers with a decimal comma (rows 1, 2, 3 and 57 more): "
        "write decimals with a point (3.5) and nothing between thousands, and describe it as a number; or, if they are "
        "codes, say what each means (levels)"
    ]
    labelled = described({**entry, "levels": {c: f"both {c}" for c in commas}})
    assert assess(tmp_path / "t.csv", labelled, MappingConfig()).errors == ()
    number = described({**entry, "kind": "number", "low": 0, "high": 9, "decimals": 1})
    assert errors(assess(tmp_path / "t.csv", number, MappingConfig())) == [
        "column 'lact': rows 1, 2, 3 and 57 more: expected a number, got one with a decimal comma; write decimals with "
        "a point (3.5) and nothing between thousands"
    ]


def test_words_that_are_sentinels_of_a_number_are_counted_as_sentinels(tmp_path):
    data = dictionary().model_dump()
    data["features"][1]["sentinels"] = [999, "not done"]
    frame = clean().astype({"age": object})
    frame.loc[0:3, "age"], frame.loc[4:5, "age"], frame.loc[6:8, "age"] = "not done", 999, ""
    frame.to_csv(tmp_path / "t.csv", index=False)
    quality = assess(tmp_path / "t.csv", parse_dictionary(data, "x"), MappingConfig())
    assert (quality.columns[0].sentinel, quality.columns[0].missing) == (6 / N, 3 / N)


def test_a_column_without_a_name_is_listed_as_such(tmp_path):
    clean().to_csv(tmp_path / "t.csv")  # pandas writes its row index, without a name
    quality = assess(tmp_path / "t.csv", dictionary(), MappingConfig())
    assert quality.not_described == ("(column 1, without a name)",) and quality.errors == ()


def test_examples_in_docstrings_hold():
    assert doctest.testmod(identifiers).failed == 0
    assert doctest.testmod(outcomes).failed == 0
    assert doctest.testmod(tables).failed == 0


def test_a_coded_category_may_have_any_name(tmp_path):
    data = dictionary().model_dump()
    phone = {"name": "phone", "label": "Has a phone", "section": "Who", "levels": {"0": "no", "1": "yes"}}
    data["features"] = [*data["features"], phone]
    frame = clean().assign(phone=np.arange(N) % 2)
    frame.to_csv(tmp_path / "t.csv", index=False)
    quality = assess(tmp_path / "t.csv", parse_dictionary(data, "x"), MappingConfig())
    assert quality.errors == ()


def test_no_value_of_a_patient_is_in_the_result(tmp_path):
    frame = clean().astype(object)
    frame.loc[1, "age"], frame.loc[2, "crea"] = 173.25, 4321.5
    frame["v7"] = TEXTS
    text = str(checked(tmp_path, frame).to_dict())
    assert "173.25" not in text and "4321" not in text and "fall" not in text
