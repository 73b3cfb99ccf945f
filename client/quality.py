"""The data-quality table behind `wardround client check`.

Run at one hospital. The hospital's own table, the consortium's dictionary and the mapping enter; counts per column and
findings come out, for the data manager's eyes. Messages name columns and rows, never a patient's value.

An error is what would make training wrong or unlawful: a direct identifier, a running number described as a
measurement, a feature that looks like an outcome, a level that the dictionary does not know, numbers with a decimal
comma, a column that is missing, constant, or mostly outside its plausible range, a text that a draft left to do.
Everything else is a note.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..common.config import MappingConfig
from ..common.dictionary import Dictionary, Feature
from ..common.errors import RegistryError
from . import identifiers, outcomes, tables
from .registry import (
    check_mapping,
    clean_numbers,
    local_columns,
    missing_words,
    read_levels,
    unknown_level_message,
    words_of,
)
from .tables import MISSING_WORDS
from .units import plausible_unit

# More than this share outside the plausible range is a wrong unit or a wrong column, not a few odd measurements.
OUT_OF_RANGE_ERROR_SHARE = 0.05
# Whole numbers that never occur twice among so many rows (or patients) are numbers of stays or samples. Measurements
# repeat: of 200 values spread over 5,000, as wide as any laboratory's, two are equal in 98 of 100 tables.
SERIAL_ROWS = 200
FEWEST_ROWS = 20  # nothing is said of how often values repeat in shorter tables
_SERIAL_WORDS = {"id", "nr", "no", "num", "number", "key", "index"}  # `encounter_id`, `stayNr`: at the end of a name


@dataclass(frozen=True)
class Finding:
    """One line for the data manager."""

    level: Literal["error", "note"]
    column: str
    text: str


@dataclass(frozen=True)
class ColumnQuality:
    """One dictionary entry as this table fills it; shares are of all rows."""

    name: str
    label: str
    role: str
    kind: str
    missing: float  # empty cells
    sentinel: float  # cells that hold a sentinel
    out_of_range: int  # cells outside low … high
    unknown_levels: int  # different codes that the dictionary does not know
    distinct: int  # different values left after cleaning


@dataclass(frozen=True)
class Quality:
    """The whole result of a check."""

    rows: int
    patients: int
    columns: tuple[ColumnQuality, ...]
    findings: tuple[Finding, ...]
    not_described: tuple[str, ...]  # columns of the table that the dictionary does not mention

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "error")

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        return {"clean": not self.errors, **asdict(self)}


def assess(table: Path, dictionary: Dictionary, mapping: MappingConfig) -> Quality:
    """Everything `check` says about a table.

    Raises:
        RegistryError: the table cannot be read at all (missing, damaged, ragged, not UTF-8, duplicate columns, empty).
        ConfigError: the mapping does not fit the dictionary.
    """
    check_mapping(mapping, dictionary)
    present = tables.columns_of(table)
    twice = sorted({name for name in present if present.count(name) > 1})
    if twice:
        local_columns(table, present, dictionary, mapping)  # raises, with the right words
    local = {f.name: mapping.columns.get(f.name, f.name) for f in dictionary.features}
    numbers = [
        name for f in dictionary.used if f.kind == "number" for name in [local[f.name]] if name and name in present
    ]
    data = tables.read(table, present, numbers)
    if data.num_rows == 0:
        raise RegistryError(f"{table}: the table has no rows")
    findings = [*_unfinished(dictionary), *_identifiers(data, dictionary, local), *_outcomes(dictionary)]
    columns: list[ColumnQuality] = []
    try:
        used = local_columns(table, present, dictionary, mapping)
    except RegistryError as error:
        findings.append(Finding("error", "", _without(table, error)))
        used = {}
    patient_of_row: np.ndarray | None = None
    for feature in (*dictionary.with_role("id"), *dictionary.with_role("site")) if used else ():
        is_id, column = feature.role == "id", used[feature.name]
        try:
            words = words_of(str(table), data, column, "patient id" if is_id else "site")
        except RegistryError as error:
            findings.append(Finding("error", column, _without(table, error)))
            continue
        if is_id:
            patient_of_row = np.unique(words.astype(str), return_inverse=True)[1]
    patients = 0 if patient_of_row is None else int(patient_of_row.max()) + 1
    for feature in dictionary.used:
        column = used.get(feature.name)
        if column is None:
            continue
        try:
            quality, found = _column(str(table), data, feature, column, mapping, patient_of_row)
        except RegistryError as error:
            findings.append(Finding("error", column, _without(table, error)))
            continue
        columns.append(quality)
        findings += found
    if patients and patients < data.num_rows:
        text = f"{data.num_rows} rows of {patients} patients: rows of a patient stay together in training or in test"
        findings.append(Finding("note", used[dictionary.id_column], text))
    asked = [quality for quality in columns if quality.role == "feature"]
    if asked and len(asked) == len(dictionary.with_role("feature")) and all(quality.distinct < 2 for quality in asked):
        lesser = (" has one value ", " has no value ")
        findings = [finding for finding in findings if not any(words in finding.text for words in lesser)]
        text = f"no usable feature: none of the {len(asked)} features of '{dictionary.name}' has two different values"
        text += ": the table has one row" if data.num_rows == 1 else ""
        findings.append(Finding("error", "", text))
    described = set(local.values())
    return Quality(
        rows=data.num_rows,
        patients=patients,
        columns=tuple(columns),
        findings=tuple(findings),
        not_described=tuple(
            name or f"(column {number}, without a name)"
            for number, name in enumerate(present, start=1)
            if name not in described
        ),
    )


def _without(table: Path, error: RegistryError) -> str:
    return str(error).removeprefix(f"{table}: ")


def _unfinished(dictionary: Dictionary) -> list[Finding]:
    """What a draft left to a person and nobody did: it would be shown to the model as it stands."""
    shown = [("", "the dictionary: its title", dictionary.title)]
    for feature in dictionary.used:
        for key in ("label", "description", "section", "question"):
            shown.append((feature.name, f"'{feature.name}': its {key}", getattr(feature, key) or ""))
    return [Finding("error", name, f"{what} still says TODO") for name, what, text in shown if "TODO" in text]


def _outcomes(dictionary: Dictionary) -> list[Finding]:
    """Features that may be known only after the outcome: shown in a record they would give it away."""
    found: list[Finding] = []
    for feature in dictionary.with_role("feature"):
        seen = outcomes.in_feature(feature)
        if seen is not None:
            text = (
                f"'{feature.name}' looks like {seen[0]} by its {seen[1]}, and may be known only after the outcome: "
                'give it role = "outcome" (asked, never shown) or "excluded", or, if it is known at known_at and '
                "restates no outcome, say so in the dictionary (not_outcome = true)"
            )
            found.append(Finding("error", feature.name, text))
    return found


def _identifiers(data: pa.Table, dictionary: Dictionary, local: dict[str, str]) -> list[Finding]:
    """Direct identifiers among all columns of the table, described or not, excluded or not."""
    described = {column: dictionary.feature(name) for name, column in local.items()}
    found: list[Finding] = []
    for column in data.column_names:
        feature = described.get(column)
        kind = identifier_in(data, column, feature)
        if kind == "a date":
            text = f"column '{column}' holds dates: share intervals in days, not dates"
            found.append(Finding("note", column, text))
        elif kind is not None and feature is not None and feature.used and feature.kind == "number":
            text = f"column '{column}' is named like {kind} and described as a number: make sure that it is measured"
            found.append(Finding("note", column, text))
        elif kind is not None:
            text = (
                f"column '{column}' looks like {kind}, which identifies a patient: remove it from the table, or, if it "
                "is none, say so in the dictionary (not_identifying = true)"
            )
            found.append(Finding("error", column, text))
    return found


def identifier_in(data: pa.Table, column: str, feature: Feature | None) -> str | None:
    """What identifier a column looks like, by name and by content; "a date" for plain dates; or None.

    A category that the dictionary lists level by level holds codes and a described number holds numbers: of the one
    nothing can identify, of the other its name can hint at it. What a person has judged (`not_identifying`) is none.
    """
    if feature is not None and feature.not_identifying:
        return None
    coded = feature is not None and feature.used and feature.kind == "category"
    number = feature is not None and feature.used and feature.kind == "number"
    is_id = feature is not None and feature.role == "id"
    named = None if coded or is_id else identifiers.by_name(column)
    if named is not None:
        return named
    if coded or number:
        return None
    cells = data.column(column)
    if pa.types.is_floating(cells.type) or pa.types.is_boolean(cells.type):
        return None
    if pa.types.is_temporal(cells.type):
        days = [value for value in cells.drop_null().to_pylist() if hasattr(value, "year")]
        return identifiers.of_dates(days) if days else None
    codes, words = tables.codes_of(cells)
    filled = [word for word in words if word not in MISSING_WORDS]
    rows = int(np.count_nonzero(codes >= 0))
    kind = identifiers.by_content(filled, rows)
    # A patient id is one to a patient by nature; only a number with a meaning outside the hospital is refused there.
    return kind if not is_id or kind in ("a national or hospital number", "an e-mail address", "a name") else None


def _column(
    table: str,
    data: pa.Table,
    feature: Feature,
    column: str,
    mapping: MappingConfig,
    patient_of_row: np.ndarray | None,
) -> tuple[ColumnQuality, list[Finding]]:
    found: list[Finding] = []
    rows = data.num_rows
    if not column:
        empty = ColumnQuality(feature.name, feature.label, feature.role, feature.kind, 1.0, 0.0, 0, 0, 0)
        return empty, [Finding("note", feature.name, f"'{feature.name}' is not collected here ([mapping] columns)")]
    out_of_range = unknown = 0
    if feature.kind == "number":
        unit = mapping.units.get(feature.name)
        raw = tables.numbers(table, data, column, missing_words(feature))
        clean = clean_numbers(raw, feature, unit)
        words = tables.rows_with(data.column(column), missing_words(feature))
        values, sentinel = clean.values[~np.isnan(clean.values)], int(clean.sentinel.sum()) + words
        missing = int(np.isnan(raw).sum()) - words
        out_of_range = int(clean.out_of_range.sum())
        if out_of_range:
            found.append(_range_finding(raw, feature, column, clean.out_of_range, rows - missing - sentinel, unit))
        if not feature.not_identifying and is_serial(column, raw, patient_of_row):
            text = (
                f"column '{column}' holds whole numbers that do not repeat, like those of stays: give it "
                'role = "excluded", or, if it is a measurement, say so in the dictionary (not_identifying = true)'
            )
            found.append(Finding("error", column, text))
    else:
        read = read_levels(data.column(column), feature, mapping.levels.get(feature.name))
        found += _comma_levels(data.column(column), feature, column)
        values, sentinel = read.values[read.values >= 0], int(read.sentinel.sum())
        unknown = read.n_unknown_codes
        missing = rows - len(values) - sentinel - read.unknown_rows.size
        if unknown:
            text = unknown_level_message("", column, feature, read.unknown_rows).removeprefix(": ")
            found.append(Finding("error", column, text))
    distinct = len(np.unique(values))
    if distinct == 0 and not unknown and not out_of_range:
        found.append(Finding("error", column, f"column '{column}' has no value in any row; map it to \"\" in site.toml "
                             "if it is not collected here"))  # fmt: skip
    elif distinct == 1 and not unknown:
        found.append(Finding("error", column, f"column '{column}' has one value in every row: a feature with one level "
                             "can neither be asked nor tell anything; give it role = \"excluded\""))  # fmt: skip
    quality = ColumnQuality(
        feature.name, feature.label, feature.role, feature.kind,
        missing / rows, sentinel / rows, out_of_range, unknown, distinct,
    )  # fmt: skip
    return quality, found


def _comma_levels(cells: pa.ChunkedArray, feature: Feature, column: str) -> list[Finding]:
    """An error for numbers with a decimal comma that a draft took for words; codes to which a person gave a label
    ("1,2" = "both") are none."""
    codes, words = tables.codes_of(cells)
    commas = [word for word in tables.decimal_commas(words) if feature.levels.get(word, word) == word]
    if not commas:
        return []
    rows = np.flatnonzero(np.isin(codes, [i for i, word in enumerate(words) if word in set(commas)]))
    text = (
        f"column '{column}' is described as a category and holds numbers with a decimal comma "
        f"({tables.rows_text(rows)}): {tables.COMMA_ADVICE}, and describe it as a number; or, if they are codes, say "
        "what each means (levels)"
    )
    return [Finding("error", column, text)]


def is_serial(column: str, raw: np.ndarray, patient_of_row: np.ndarray | None) -> bool:
    """Whether a column numbers patients, stays or samples instead of measuring; never said of short tables.

    Args:
        column: its name.
        raw: float64 (rows,), as in the table, NaN missing.
        patient_of_row: (rows,) a number for each patient; None: unknown.
    """
    known = ~np.isnan(raw)
    values, n = raw[known], int(known.sum())
    if n <= FEWEST_ROWS or np.any(values != np.round(values)):
        return False
    distinct = len(np.unique(values))
    if not _SERIAL_WORDS.isdisjoint(identifiers.words_of(column)[-1:]):
        return distinct > 0.5 * n
    if patient_of_row is None or distinct == n:
        return distinct == n >= SERIAL_ROWS
    patients = patient_of_row[known]
    pairs = len(np.unique(np.column_stack([patients, values]), axis=0))
    return SERIAL_ROWS <= distinct == pairs == len(np.unique(patients))


def _range_finding(
    raw: np.ndarray, feature: Feature, column: str, outside: np.ndarray, known: int, unit: str | float | None
) -> Finding:
    """A note for a few implausible cells; an error, with the unit it may be in, for many."""
    low, high = feature.bounds
    count, share = int(outside.sum()), outside.sum() / max(known, 1)
    text = (
        f"column '{column}': {count} of {known} values outside {low:g} to {high:g} {feature.unit or ''}".rstrip()
        + f" ({tables.rows_text(np.flatnonzero(outside))})"
    )
    if share <= OUT_OF_RANGE_ERROR_SHARE:
        return Finding("note", column, text + "; they are read as missing")
    guess = None if unit is not None else plausible_unit(feature, raw)
    hint = f"; as {guess} nearly all would fit: name the unit in site.toml under [mapping] units" if guess else ""
    return Finding("error", column, text + (hint or "; is it the right column, and in the right unit?"))
