"""Import a REDCap data dictionary (the 18-column CSV of the Online Designer, or its API export).

Run at one hospital: most registries live in REDCap, whose dictionary already says labels, choices and validation. What
it does not know (plausible ranges without validation, when a value is known, which field is an outcome) is filled in
from the exported table and marked TODO. Identifiers, notes, dates and free text become excluded; what looks like an
outcome, or like what follows from one, is set aside (client/outcomes.py).
"""

from __future__ import annotations

import csv
import html
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

from ..common.dictionary import MAX_LEVELS, Feature, level_code
from ..common.errors import RegistryError
from .drafting import REVIEW, SET_ASIDE, Column, Draft, finish, number_entry, pretty, read_columns

_HEADERS = {  # ours → (Online Designer's heading, API's name)
    "name": ("variable / field name", "field_name"),
    "form": ("form name", "form_name"),
    "section": ("section header", "section_header"),
    "type": ("field type", "field_type"),
    "label": ("field label", "field_label"),
    "choices": ("choices, calculations, or slider labels", "select_choices_or_calculations"),
    "note": ("field note", "field_note"),
    "validation": ("text validation type or show slider number", "text_validation_type_or_show_slider_number"),
    "min": ("text validation min", "text_validation_min"),
    "max": ("text validation max", "text_validation_max"),
    "identifier": ("identifier?", "identifier"),
    "branching": ("branching logic (show field only if...)", "branching_logic"),
}
_NUMBER_VALIDATIONS = re.compile(r"integer|number.*")
_DATE_VALIDATIONS = re.compile(r"date.*|time.*")
_IDENTIFYING_VALIDATIONS = {"email", "phone", "phone_australia", "zipcode", "postalcode_australia", "ssn", "vmrn",
                            "mrn_10d", "mrn_generic", "postalcode_canada", "postalcode_uk"}  # fmt: skip
_YES_NO = {"1": "yes", "0": "no"}
# What REDCap's editor writes into labels. Only real tags, or "<200 or >400 mg" would lose its middle.
_TAG = re.compile(
    r"</?(?:a|b|big|blockquote|br|center|code|div|em|font|h[1-6]|hr|i|img|li|ol|p|pre|s|small|span|strong|sub|sup|table"
    r"|tbody|td|th|thead|tr|u|ul)(?:\s+[\w-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s>\"']+))*\s*/?>|<!--.*?-->",
    re.IGNORECASE | re.DOTALL,
)
_HEAD = (
    "Imported from a REDCap data dictionary. Read every line, correct it, and remove the TODO comments:",
    "- set role = \"outcome\", question and known_at for what is asked but never shown",
    SET_ASIDE,
    "- known_at: days since admission when a value is known; hide or exclude whatever restates an outcome",
    "- add units, and plausible ranges where REDCap had no validation",
    REVIEW,
)  # fmt: skip


@dataclass(frozen=True)
class Field:
    """One line of the REDCap dictionary, texts stripped of markup."""

    name: str
    form: str
    section: str
    type: str
    label: str
    choices: str
    note: str
    validation: str
    min: str
    max: str
    identifier: bool
    branching: str
    row: int


def read_redcap(path: Path) -> list[Field]:
    """The lines of a REDCap data dictionary.

    Raises:
        RegistryError: no such file, not UTF-8, not REDCap's columns, a ragged row, an unclosed quotation mark, a
            variable twice, or no field in it.
    """
    rows = _rows(path)
    if not rows:
        raise RegistryError(f"{path}: the file is empty")
    heading = [cell.strip().lower() for cell in rows[0]]
    place: dict[str, int] = {}
    for ours, names in _HEADERS.items():
        found = [heading.index(name) for name in names if name in heading]
        if not found:
            raise RegistryError(f"{path}: not a REDCap data dictionary: no column '{names[0]}' in its header")
        place[ours] = found[0]
    fields: list[Field] = []
    section = form = ""
    for number, cells in enumerate(rows[1:], start=1):
        if not any(cells):
            continue
        if len(cells) != len(heading):
            raise RegistryError(
                f"{path}: row {number} has {len(cells)} cells, expected {len(heading)} as in the header"
            )
        cell = {ours: _text(cells[index]) for ours, index in place.items()}
        if not cell["name"]:
            raise RegistryError(f"{path}: row {number} has no variable name")
        twice = next((field.row for field in fields if field.name == cell["name"]), None)
        if twice is not None:
            raise RegistryError(f"{path}: row {number}: variable '{cell['name']}' was described in row {twice} already")
        if cell["form"] != form:
            form, section = cell["form"], ""  # a section header holds until the next one, within its form
        section = cell["section"] or section
        fields.append(
            Field(
                name=cell["name"],
                form=form,
                section=section or pretty(form),
                type=cell["type"].lower(),
                label=cell["label"] or pretty(cell["name"]),
                choices=cells[place["choices"]],
                note=cell["note"],
                validation=cell["validation"].lower(),
                min=cell["min"],
                max=cell["max"],
                identifier=cell["identifier"].lower() in ("y", "yes", "1"),
                branching=cell["branching"],
                row=number,
            )
        )
    if not fields:
        raise RegistryError(f"{path}: no field in it")
    return fields


def _rows(path: Path) -> list[list[str]]:
    """All rows of a CSV file, heading first."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RegistryError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise RegistryError(f"{path}: expected a file, got a folder") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RegistryError(f"{path}: line {line} is not UTF-8 text; save it as 'CSV UTF-8'") from None
    rows: list[list[str]] = []
    try:
        rows += csv.reader(
            io.StringIO(text, newline=""), strict=True
        )  # lines end in \n or \r alone: labels hold others
    except csv.Error:
        where = f"row {len(rows)}" if rows else "the header"
        raise RegistryError(f"{path}: {where}: a quotation mark is not closed, or stands inside a cell") from None
    return rows


def _text(cell: str) -> str:
    """A cell without HTML and line breaks."""
    return re.sub(r"\s+", " ", html.unescape(_TAG.sub(" ", cell))).strip()


def choices_of(field: Field, path: Path) -> dict[str, str]:
    """`1, Male | 2, Female` → code → label, in order.

    Raises:
        RegistryError: a choice without a comma, or a code twice.
    """
    result: dict[str, str] = {}
    for choice in field.choices.split("|"):
        if not choice.strip():
            continue
        code, comma, label = choice.partition(",")
        code = level_code(code)
        if not comma or not code:
            raise RegistryError(
                f"{path}: row {field.row}, field '{field.name}': expected choices as 'code, label | code, label'"
            )
        if code in result:
            raise RegistryError(f"{path}: row {field.row}, field '{field.name}': code '{code}' occurs twice")
        result[code] = _text(label) or code
    seen = list(result.values())
    return {code: label if seen.count(label) == 1 else f"{label} ({code})" for code, label in result.items()}


def import_redcap(path: Path, table: Path) -> Draft:
    """A REDCap dictionary as ours, with ranges from the exported table where REDCap has none.

    Args:
        path: the REDCap data dictionary.
        table: the records, exported raw (codes, not labels).

    Raises:
        RegistryError: either file cannot be read, the table has no record id, a field contradicts itself, or nothing
            in it can be a feature.
    """
    fields = read_redcap(path)
    _, columns = read_columns(table)
    if fields[0].name not in columns:
        raise RegistryError(
            f"{table}: no column '{fields[0].name}', the record id by the first field of {path.name}; export the "
            f"records with it"
        )
    features = [Feature(name=fields[0].name, label="Patient", role="id")]  # REDCap's first field is the record id
    notes: dict[str, tuple[str, ...]] = {"": _HEAD}
    for field in fields[1:]:
        for entry, lines in _entries(field, path, columns):
            if any(feature.name == entry.name for feature in features):  # choices a and A have one column's name
                raise RegistryError(
                    f"{path}: row {field.row}, field '{field.name}': column '{entry.name}' would be described twice; "
                    f"change one of the codes in REDCap"
                )
            features.append(entry)
            if entry.used and entry.name not in columns:
                lines = [*lines, f"TODO: {table.name} has no column '{entry.name}'"]
            if field.branching and entry.used:
                lines = [*lines, f"asked in REDCap only if {field.branching}"]
            notes[entry.name] = tuple(lines)
    described = {feature.name for feature in features}
    for column in columns.values():
        if column.name not in described:  # redcap_event_name, …_complete and the like
            reason = "TODO: in the table, not in the REDCap dictionary"
            features.append(Feature(name=column.name, label=pretty(column.name), role="excluded", reason=reason))
    return finish(path, features, notes, "redcap")


def _entries(field: Field, path: Path, columns: dict[str, Column]) -> list[tuple[Feature, list[str]]]:
    """The entries that one REDCap field becomes: none for a heading, several for checkboxes."""
    name, label = field.name, field.label

    def excluded(reason: str) -> list[tuple[Feature, list[str]]]:
        return [(Feature(name=name, label=label, role="excluded", reason=reason), [])]

    def category(column: str, title: str, levels: dict[str, str]) -> tuple[Feature, list[str]]:
        if len(levels) < 2:
            return Feature(name=column, label=title, role="excluded", reason="one level"), []
        if len(levels) > MAX_LEVELS:
            reason = f"TODO: {len(levels)} levels, group them into at most {MAX_LEVELS}"
            return Feature(name=column, label=title, role="excluded", reason=reason), []
        return Feature(name=column, label=title, section=field.section, description=field.note, levels=levels), []

    if field.type == "descriptive":
        return []
    if field.identifier:
        return excluded("marked as an identifier in REDCap")
    if field.type in ("notes", "file", "signature", "sql"):
        return excluded({"notes": "free text", "sql": "a query"}.get(field.type, "a file"))
    if field.type == "yesno":
        return [category(name, label, _YES_NO)]
    if field.type == "truefalse":
        return [category(name, label, {"1": "true", "0": "false"})]
    if field.type in ("radio", "dropdown"):
        return [category(name, label, choices_of(field, path))]
    if field.type == "checkbox":
        # REDCap exports a column a choice: name___code, lower case, anything but letters and digits as "_"
        return [
            category(f"{name}___{re.sub(r'[^a-z0-9]', '_', code.lower())}", f"{label}: {choice}", _YES_NO)
            for code, choice in choices_of(field, path).items()
        ]
    if field.type in ("calc", "slider") or (field.type == "text" and _NUMBER_VALIDATIONS.fullmatch(field.validation)):
        return [_number(field, path, columns.get(name))]
    if field.type == "text":
        if field.validation in _IDENTIFYING_VALIDATIONS:
            return excluded(f"a direct identifier ({field.validation})")
        if _DATE_VALIDATIONS.fullmatch(field.validation):
            return excluded("a date or time: share a number of days instead")
        return excluded("free text")
    raise RegistryError(f"{path}: row {field.row}, field '{name}': unknown field type '{field.type}'")


def _number(field: Field, path: Path, column: Column | None) -> tuple[Feature, list[str]]:
    known: dict[str, float | str] = {"section": field.section, "description": field.note}
    low, high = _bound(field.min), _bound(field.max)
    if field.type == "slider":
        low, high = 0.0 if low is None else low, 100.0 if high is None else high
    if low is not None and high is not None and low >= high:
        raise RegistryError(
            f"{path}: row {field.row}, field '{field.name}': expected validation min < max, got {low:g} and {high:g}"
        )
    known |= {key: value for key, value in (("low", low), ("high", high)) if value is not None}
    if column is None or column.numbers is None or column.numbers.size == 0:
        if low is None or high is None:
            reason = "TODO: a number without validation in REDCap and without values in the table: give low and high"
            return Feature(name=field.name, label=field.label, role="excluded", reason=reason), []
        column = Column(field.name, 0, (), None)
    return number_entry(column, field.label, known)


def _bound(text: str) -> float | None:
    """A validation bound, None where there is none or it is a smart variable such as [today]."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
