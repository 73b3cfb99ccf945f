"""Read, validate and split one hospital's registry against the data dictionary.

Run at one hospital (and, for simulated sites, on one machine). A CSV or Parquet table enters, with the dictionary and
the hospital's own mapping of names, units and codes; arrays in the dictionary's terms come out. Everything here is
private: nothing of it leaves the hospital, and no message names a patient's value, only column and row.

Rows are counted from 1, without the header; for text files the message adds the line where it differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..common.config import MappingConfig
from ..common.dictionary import SENTINEL_RELATIVE_TOLERANCE, Dictionary, Feature, level_code
from ..common.errors import ConfigError, RegistryError
from . import tables
from .tables import MISSING_WORDS
from .units import conversion

SPLIT_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
_SPLIT_PERSON = b"wardround.split"  # BLAKE2b personalisation: this use of the key and no other
_NO_MAPPING = MappingConfig()


@dataclass(frozen=True, eq=False)
class Registry:
    """A registry in the dictionary's terms.

    Attributes:
        dictionary: what the columns mean.
        patients: (rows,) object array of str, the patient id of each row.
        values: column name → (rows,) array, for features and outcomes only. Numbers: float64 in the dictionary's unit,
            rounded to its decimals, NaN missing. Categories: int16 index into `feature.codes`, -1 missing.
        sites: (rows,) object array of str, or None.
    """

    dictionary: Dictionary
    patients: np.ndarray
    values: Mapping[str, np.ndarray]
    sites: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.patients)

    @cached_property
    def n_patients(self) -> int:
        """Different patients; fewer than rows where patients have several encounters."""
        return len(set(self.patients.tolist()))

    @property
    def n_bytes(self) -> int:
        """Memory it takes, about: a patient's id is a string object."""
        return sum(column.nbytes for column in self.values.values()) + 64 * len(self)

    def take(self, rows: np.ndarray) -> Registry:
        """The same registry with these rows only, in this order."""
        return Registry(
            self.dictionary,
            self.patients[rows],
            {name: column[rows] for name, column in self.values.items()},
            None if self.sites is None else self.sites[rows],
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 hex of dictionary, patient ids, sites and values, in their canonical form and order."""
        sha = hashlib.sha256(self.dictionary.digest().encode())
        for column in (self.patients, self.sites if self.sites is not None else np.empty(0, object)):
            # Lengths first, so that no two lists of strings share their bytes.
            words = [str(word).encode() for word in column.tolist()]
            sha.update(np.array([len(words), *map(len, words)], "<i8").tobytes())
            sha.update(b"".join(words))
        for feature in self.dictionary.used:
            column = self.values[feature.name]
            sha.update(feature.name.encode() + b"\0")
            sha.update(np.ascontiguousarray(column, "<f8" if feature.kind == "number" else "<i2").tobytes())
        return sha.hexdigest()


def read_registry(table: Path, dictionary: Dictionary, mapping: MappingConfig = _NO_MAPPING) -> Registry:
    """A CSV, TSV or Parquet table as a registry.

    Sentinels and values outside the plausible range become missing. A level code that the dictionary does not know is
    refused: it may be a mistake of meaning, which no default may hide. Excluded columns need not be there.

    Args:
        table: the file; its kind is told by its suffix.
        dictionary: the consortium's dictionary.
        mapping: this hospital's own names, units and codes.

    Raises:
        RegistryError: missing or damaged table, missing or duplicate column, empty patient id, text in a number
            column, a level the dictionary does not know, nothing usable; one line naming table, column and row.
        ConfigError: the mapping does not fit the dictionary.
    """
    check_mapping(mapping, dictionary)
    columns = local_columns(table, tables.columns_of(table), dictionary, mapping)
    numbers = [columns[f.name] for f in dictionary.used if f.kind == "number" and columns[f.name]]
    data = tables.read(table, sorted(set(columns.values()) - {""}), numbers)
    return to_registry(str(table), data, dictionary, mapping)


def to_registry(source: str, data: pa.Table, dictionary: Dictionary, mapping: MappingConfig = _NO_MAPPING) -> Registry:
    """A table in memory as a registry; as `read_registry`, which see.

    Args:
        source: what messages call the table.
        data: at least the columns that the dictionary and the mapping name.
        dictionary: the consortium's dictionary.
        mapping: this hospital's own names, units and codes.
    """
    columns = local_columns(source, data.column_names, dictionary, mapping)
    if data.num_rows == 0:
        raise RegistryError(f"{source}: the table has no rows")
    patients = words_of(source, data, columns[dictionary.id_column], "patient id")
    site_column = dictionary.site_column
    sites = None if site_column is None else words_of(source, data, columns[site_column], "site")
    values: dict[str, np.ndarray] = {}
    for feature in dictionary.used:
        local = columns[feature.name]
        if not local:
            number = feature.kind == "number"
            values[feature.name] = np.full(data.num_rows, np.nan if number else -1, float if number else np.int16)
        elif feature.kind == "number":
            raw = tables.numbers(source, data, local, missing_words(feature))
            values[feature.name] = clean_numbers(raw, feature, mapping.units.get(feature.name)).values
        else:
            read = read_levels(data.column(local), feature, mapping.levels.get(feature.name))
            if read.unknown_rows.size:
                raise RegistryError(unknown_level_message(source, local, feature, read.unknown_rows))
            values[feature.name] = read.values
    registry = Registry(dictionary, patients, values, sites)
    if not any(usable(registry.values[feature.name]) for feature in dictionary.with_role("feature")):
        raise RegistryError(
            f"{source}: no usable feature: every feature of dictionary '{dictionary.name}' is missing in every row"
        )
    return registry


def missing_words(feature: Feature) -> frozenset[str]:
    """Text that a number column may hold in place of a number: sentinels such as "not done"."""
    return frozenset(mark for mark in feature.sentinels if isinstance(mark, str))


def usable(column: np.ndarray) -> bool:
    """Whether a column of `Registry.values` has at least one value."""
    return bool(np.any(column >= 0) if column.dtype.kind == "i" else np.any(~np.isnan(column)))


def check_mapping(mapping: MappingConfig, dictionary: Dictionary) -> None:
    """Raises ConfigError when the mapping names what the dictionary does not have, or one column or code twice."""
    for section in ("columns", "units", "levels"):
        for name in getattr(mapping, section):
            if name not in dictionary:
                raise ConfigError(f"mapping.{section}: dictionary '{dictionary.name}' has no entry '{name}'")
    owner: dict[str, str] = {}
    for feature in dictionary.features:
        local = mapping.columns.get(feature.name, feature.name)
        if feature.role != "excluded" and local and owner.setdefault(local, feature.name) != feature.name:
            raise ConfigError(
                f"mapping.columns: '{owner[local]}' and '{feature.name}' would both be read from this table's column "
                f"'{local}'; name the column of each, or map the one that is not collected to \"\""
            )
    for name, unit in mapping.units.items():
        conversion(dictionary.feature(name), unit)
    for name, codes in mapping.levels.items():
        feature = dictionary.feature(name)
        read_as: dict[str, str] = {}
        for code in codes:
            if read_as.setdefault(level_code(code), code) != code:
                raise ConfigError(
                    f"mapping.levels: feature '{name}': codes '{read_as[level_code(code)]}' and '{code}' are one code: "
                    f"cells are read as '{level_code(code)}'"
                )
        for target in codes.values():
            if target and target not in feature.levels:
                known = ", ".join(f"'{code}'" for code in feature.levels)
                raise ConfigError(f"mapping.levels: feature '{name}' has no level '{target}'; expected one of {known}")


def local_columns(
    table: Path | str, present: list[str], dictionary: Dictionary, mapping: MappingConfig
) -> dict[str, str]:
    """Dictionary name → column of this table, for id, site, features and outcomes; "" where it is not collected.

    Raises:
        RegistryError: a duplicate column, or missing columns (with the nearest name).
    """
    twice = next((name for name in present if present.count(name) > 1), None)
    if twice is not None:
        id_column = mapping.columns.get(dictionary.id_column, dictionary.id_column)
        kind = "patient id column" if twice == id_column else "column"
        raise RegistryError(f"{table}: {kind} '{twice}' occurs {present.count(twice)} times; keep one")
    result: dict[str, str] = {}
    missing: list[str] = []
    for feature in dictionary.features:
        if feature.role == "excluded":
            continue
        local = mapping.columns.get(feature.name, feature.name)
        if not local and not feature.used:
            raise ConfigError(f"mapping.columns: '{feature.name}' has role '{feature.role}' and must have a column")
        if local and local not in present:
            missing.append(local)
        result[feature.name] = local
    if missing:
        near = get_close_matches(missing[0], present, 1, 0.6)
        hint = f"; nearest is '{near[0]}'" if near else ""
        more = f" (and {len(missing) - 1} more: {', '.join(missing[1:6])})" if len(missing) > 1 else ""
        raise RegistryError(
            f"{table}: no column '{missing[0]}'{more}{hint}; add it, or name this table's column in site.toml "
            f"under [mapping] columns"
        )
    return result


def words_of(table: str, data: pa.Table, column: str, what: str) -> np.ndarray:
    """A column of names (patient, site) as (rows,) object array of str; none may be empty or hold a line break.

    Raises:
        RegistryError: an empty cell, or one with a line break, with its row.
    """
    codes, words = tables.codes_of(data.column(column))
    empty = np.array([word in MISSING_WORDS for word in words] + [True])
    blank = np.flatnonzero(empty[codes])  # code -1 is a null: it picks the appended True
    if blank.size:
        raise RegistryError(
            f"{table}: column '{column}': the {what} is empty in {tables.rows_text(blank)}; every row needs one"
        )
    broken = np.flatnonzero(np.array(["\n" in word or "\r" in word for word in words])[codes])
    if broken.size:  # two unclosed quotation marks read as one cell, and the rows between them would be lost
        raise RegistryError(
            f"{table}: column '{column}': the {what} in {tables.rows_text(broken)} holds a line break; look for an "
            f"unclosed quotation mark"
        )
    return np.array(words, dtype=object)[codes]


@dataclass(frozen=True, eq=False)
class CleanNumbers:
    """A number column after cleaning, and which rows were dropped for which reason (masks of shape (rows,))."""

    values: np.ndarray
    sentinel: np.ndarray
    out_of_range: np.ndarray


def clean_numbers(raw: np.ndarray, feature: Feature, unit: str | float | None = None) -> CleanNumbers:
    """Local numbers in the dictionary's unit, rounded; sentinels and implausible values become NaN.

    A sentinel counts in the local column's terms (999 = not done) and in the dictionary's (a fill-in of 3.5 g/dL).

    Args:
        raw: float64 (rows,), as in the table, NaN missing.
        feature: the dictionary's entry.
        unit: the hospital's unit or factor; None: the dictionary's.
    """
    converted = raw
    if unit is not None:
        factor, offset = conversion(feature, unit)
        converted = raw * factor + offset
    sentinel = np.zeros(len(raw), dtype=bool)
    for mark in feature.sentinels:
        if not isinstance(mark, str):
            slack = abs(mark) * SENTINEL_RELATIVE_TOLERANCE
            sentinel |= np.abs(raw - mark) <= slack
            if unit is not None:
                sentinel |= np.abs(converted - mark) <= slack
    rounded = np.round(converted, feature.decimals) + 0.0  # + 0.0: no negative zero
    low, high = feature.bounds
    out_of_range = ~sentinel & ~np.isnan(rounded) & ~((rounded >= low) & (rounded <= high))
    return CleanNumbers(np.where(sentinel | out_of_range, np.nan, rounded), sentinel, out_of_range)


@dataclass(frozen=True, eq=False)
class ReadLevels:
    """A category column as level indices, with what could not be placed."""

    values: np.ndarray  # int16, -1 missing
    sentinel: np.ndarray  # bool mask of cells that hold a sentinel
    unknown_rows: np.ndarray  # row indices whose code the dictionary does not know
    n_unknown_codes: int


def read_levels(column: pa.ChunkedArray, feature: Feature, codes: Mapping[str, str] | None = None) -> ReadLevels:
    """Codes of a category column → indices into `feature.codes`.

    Args:
        column: as in the table.
        feature: the dictionary's entry.
        codes: local code → dictionary level ("" = missing). Where given, it is the whole list: a local code that
            happens to equal a dictionary code may mean something else.
    """
    index, words = tables.codes_of(column)
    position = {code: i for i, code in enumerate(feature.codes)}
    marks = {mark if isinstance(mark, str) else tables.number_word(mark) for mark in feature.sentinels}
    place = np.full(len(words) + 1, -1, np.int16)  # the last entry is what code -1, a null, picks
    is_mark, is_unknown = np.zeros(len(words) + 1, bool), np.zeros(len(words) + 1, bool)
    if codes is not None:
        codes = {level_code(code): target for code, target in codes.items()}
    for i, word in enumerate(words):
        if codes is not None:
            word = codes.get(word, word if word in MISSING_WORDS or word in marks else "\0")
        if word in marks:
            is_mark[i] = True
        elif word in position:
            place[i] = position[word]
        elif word not in MISSING_WORDS:
            is_unknown[i] = True
    return ReadLevels(place[index], is_mark[index], np.flatnonzero(is_unknown[index]), int(is_unknown.sum()))


def unknown_level_message(table: str, column: str, feature: Feature, rows: np.ndarray) -> str:
    """What a data manager needs to find codes that the dictionary does not know; no value is shown."""
    known = ", ".join(f"'{code}'" for code in feature.codes[:8]) + (", …" if len(feature.codes) > 8 else "")
    return (
        f"{table}: column '{column}': {tables.rows_text(rows)}: a level that is not in the dictionary "
        f"(known: {known}); correct the cells, or map the code in site.toml under [mapping] levels"
    )


def write_registry(registry: Registry, path: Path) -> None:
    """Writes the registry as Parquet in the dictionary's own codes; atomic. Reading it back gives the same digest."""
    columns: dict[str, Any] = {registry.dictionary.id_column: pa.array(registry.patients.tolist(), pa.string())}
    if registry.dictionary.site_column is not None and registry.sites is not None:
        columns[registry.dictionary.site_column] = pa.array(registry.sites.tolist(), pa.string())
    for feature in registry.dictionary.used:
        column = registry.values[feature.name]
        if feature.kind == "number":
            apart = _apart_from_sentinels(column, feature)
            columns[feature.name] = pa.array(apart, pa.float64(), from_pandas=True)  # NaN → null
        else:
            indices = pa.array(column, pa.int16(), mask=column < 0)
            columns[feature.name] = pa.DictionaryArray.from_arrays(indices, pa.array(feature.codes, pa.string()))
    part = path.with_name(path.name + ".part")
    pq.write_table(pa.table(columns), part)
    part.replace(path)


def _apart_from_sentinels(column: np.ndarray, feature: Feature) -> np.ndarray:
    """Measured values that rounding made equal to a sentinel, moved by less than rounding takes back.

    A pH stored as 7.3994 was measured, 7.4 was filled in; both round to 7.40, and reading 7.40 again would drop it.
    """
    marks = [mark for mark in feature.sentinels if not isinstance(mark, str)]
    clash = np.zeros(len(column), dtype=bool)
    for mark in marks:
        clash |= np.abs(column - mark) <= abs(mark) * SENTINEL_RELATIVE_TOLERANCE
    return np.where(clash, column + 0.45 * 10.0**-feature.decimals, column)


def split_rows(registry: Registry, key: bytes) -> dict[str, np.ndarray]:
    """Rows for training, validation and test, divided by patient with a keyed hash.

    A patient's split depends on the key and the id alone, so it survives new rows, a new order and a restart, and
    nobody without the key can tell who is in which part.

    Args:
        registry: any registry.
        key: 16 to 64 secret bytes of this site.

    Returns:
        {"train", "validation", "test"} → ascending row indices (int64); about 70, 10 and 20 % of patients.

    Formal Guarantees: every row is in exactly one part, and all rows of a patient are in the same part.
    """
    if not 16 <= len(key) <= 64:
        raise ConfigError(f"split key: expected 16 to 64 bytes, got {len(key)}")
    place = {patient: _position(patient, key) for patient in set(registry.patients.tolist())}
    position = np.array([place[patient] for patient in registry.patients.tolist()], dtype=np.float64)
    result: dict[str, np.ndarray] = {}
    start = 0.0
    for name, share in SPLIT_SHARES.items():
        end = start + share if name != "test" else np.inf  # the last part takes rounding error with it
        result[name] = np.flatnonzero((position >= start) & (position < end))
        start = end
    return result


def _position(patient: str, key: bytes) -> float:
    """A patient's place in [0, 1], uniform under the key."""
    digest = hashlib.blake2b(patient.encode(), digest_size=8, key=key, person=_SPLIT_PERSON).digest()
    return int.from_bytes(digest, "big") / 2**64


def describe_mapping(mapping: MappingConfig, dictionary: Dictionary) -> Iterable[tuple[str, str, str]]:
    """(dictionary entry, this hospital's, what is done) for every line of the mapping, for `check` to show."""
    for name, local in mapping.columns.items():
        yield name, local or "(not collected)", "column renamed" if local else "always missing"
    for name, unit in mapping.units.items():
        factor, offset = conversion(dictionary.feature(name), unit)
        shift = f" {'+' if offset > 0 else '-'} {abs(offset):.6g}" if offset else ""
        target = dictionary.feature(name).unit or "dictionary unit"
        yield name, unit if isinstance(unit, str) else "local unit", f"value × {factor:.6g}{shift} → {target}"
    for name, codes in mapping.levels.items():
        feature = dictionary.feature(name)
        for code, target in codes.items():
            yield name, f"code '{code}'", f"'{target}' ({feature.levels[target]})" if target else "missing"
