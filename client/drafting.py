"""Draft a data dictionary for a new table: `wardround client dictionary TABLE`.

Run at one hospital by whoever knows the table. Guesses roles, kinds, levels and ranges from the data; everything that
only a person can know is marked `TODO`: clinical labels, units, plausible ranges, when a value is known, what restates
an outcome. The draft holds codes and rounded extremes of this table, so it is for the hospital's eyes until a
person has replaced them, and says so: `drafted_from`, which private runs refuse (common/dictionary.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..common.dictionary import Dictionary, Feature
from ..common.errors import RegistryError
from . import outcomes, tables
from .quality import FEWEST_ROWS, identifier_in, is_serial
from .tables import MISSING_WORDS

_NAMED = 10  # columns named in one line
MAX_LEVELS = 50  # more different words than this are no category
_NUMBER_LEVELS = 5  # whole numbers with at most this many values are codes, not measurements
_ID_NAMES = (
    "patient_id",
    "patientid",
    "pid",
    "record_id",
    "subject_id",
    "subjectid",
    "study_id",
    "id",
    "patient",
    "mrn",
)
_SITE_NAMES = ("site", "hospital", "hospital_id", "centre", "center", "country", "redcap_data_access_group")
_TIME = re.compile(r"(?:^|_)time(?:_|$|\d)")  # of what? too often of an event for a draft, too seldom for `check`
_NINES = {9.0, 99.0, 999.0, 9999.0, 99999.0, -1.0, -9.0, -99.0, -999.0, -9999.0, 88.0, 888.0}
_SPIKE_SHARE, _SPIKE_TIMES = 0.08, 4.0  # one value this frequent, and this many times the next
SET_ASIDE = (
    "- what looks like an outcome, or like what follows from one, was set aside: it is never shown until you say so"
)
REVIEW = "- drafted_from: remove it when the consortium has agreed on the whole file; private runs refuse it until then"
_HEAD = (
    "A draft made from the table itself. Read every line, correct it, and remove the TODO comments (check refuses a",
    "title, label, section, description or question that still says TODO):",
    "- label, unit, section: as a clinician would write them; description where the label is not enough",
    "- low, high: what is plausible in any patient, not what this table happens to hold",
    REVIEW,
    "- known_at: days since admission when the value is known; an outcome is asked with what is known before it",
    "- role: outcome (asked, never shown), feature, excluded; whatever restates an outcome is excluded or in its hide",
    SET_ASIDE,
)


@dataclass(frozen=True)
class Draft:
    """A dictionary and the comment lines that go above its entries ("" is the head of the file)."""

    dictionary: Dictionary
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    set_aside: tuple[str, ...] = ()  # entries that look like outcomes or what follows from them

    @property
    def set_aside_line(self) -> str:
        """Says which entries were set aside; empty where none was."""
        if not self.set_aside:
            return ""
        return (
            "set aside, never shown to the model, for they look like outcomes or what follows from one: "
            f"{', '.join(self.set_aside)}; decide on each (its TODO says how)"
        )

    @property
    def n_todo(self) -> int:
        """Entries that wait for a person."""
        return sum(1 for name, lines in self.notes.items() if name and any("TODO" in line for line in lines))


@dataclass(frozen=True)
class Column:
    """What the data say about one column."""

    name: str
    rows: int
    words: tuple[str, ...]  # distinct non-missing cells
    numbers: np.ndarray | None  # all non-missing values, where every one is a number


def read_columns(table: Path) -> tuple[pa.Table, dict[str, Column]]:
    """A whole table and what each column holds.

    Raises:
        RegistryError: missing, damaged, ragged, not UTF-8, duplicate or nameless columns, empty, or numbers with a
            decimal comma.
    """
    names = tables.columns_of(table)
    if "" in names:
        raise RegistryError(
            f"{table}: column {names.index('') + 1} has no name; give it one, or leave it out (pandas writes its row "
            f"index so: to_csv(…, index=False))"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise RegistryError(f"{table}: column '{twice}' occurs {names.count(twice)} times; keep one")
    data = tables.read(table, names, [])
    if data.num_rows == 0:
        raise RegistryError(f"{table}: the table has no rows")
    _refuse_decimal_commas(table, data)
    return data, {name: _column(str(table), data, name) for name in names}


def _refuse_decimal_commas(table: Path, data: pa.Table) -> None:
    """Names the columns whose numbers would be drafted as words, all at once: they come from one export setting."""
    found: dict[str, np.ndarray] = {}
    for name in data.column_names:
        codes, words = tables.codes_of(data.column(name))
        commas = set(tables.decimal_commas(words))
        if commas:
            found[name] = np.flatnonzero(np.isin(codes, [i for i, word in enumerate(words) if word in commas]))
    if found:
        (first, rows), more = next(iter(found.items())), [f"'{name}'" for name in found][1:]
        others = f"; so do{'es' if len(more) == 1 else ''} {_listed(more)}" if more else ""
        raise RegistryError(
            f"{table}: column '{first}' holds numbers with a decimal comma ({tables.rows_text(rows)}){others}: "
            f"{tables.COMMA_ADVICE}; if they are codes and no numbers, write those without a comma"
        )


def _listed(names: Sequence[str]) -> str:
    """Names in a line, the first ten of many."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _column(table: str, data: pa.Table, name: str) -> Column:
    codes, words = tables.codes_of(data.column(name))
    filled = tuple(sorted({word for word in words if word not in MISSING_WORDS}))
    values: np.ndarray | None = None
    if filled and not pa.types.is_temporal(data.column(name).type) and not set(filled) <= {"True", "False"}:
        try:
            raw = tables.numbers(table, data, name)
            values = raw[~np.isnan(raw)]
        except RegistryError:
            values = None  # text somewhere: not a number column
    return Column(name, int(np.count_nonzero(codes >= 0)), filled, values)


def draft(table: Path, id_column: str | None = None) -> Draft:
    """A dictionary drafted from a table alone.

    Args:
        table: CSV, TSV or Parquet.
        id_column: the patient id, where it is not recognised by its name.

    Raises:
        RegistryError: the table cannot be read, has one row, or no column looks like a patient id.
    """
    data, columns = read_columns(table)
    if data.num_rows == 1:
        raise RegistryError(f"{table}: no usable feature: the table has one row, so no column has two different values")
    patient = id_column or find_id(columns)
    if patient is None or patient not in columns:
        got = f"no column '{id_column}'" if id_column else "no column looks like a patient id"
        raise RegistryError(f"{table}: {got}; name it with --id COLUMN")
    features: list[Feature] = []
    notes: dict[str, tuple[str, ...]] = {"": _HEAD}
    for column in columns.values():
        if column.name == patient:
            entry, lines = Feature(name=column.name, label="Patient", role="id"), ["one value a patient, a pseudonym"]
        elif _plain(column.name) in _SITE_NAMES and not any(f.role == "site" for f in features):
            entry, lines = Feature(name=column.name, label="Site", role="site"), ["the hospital a row comes from"]
        else:
            entry, lines = draft_entry(data, column)
        features.append(entry)
        notes[column.name] = tuple(lines)
    return finish(table, features, notes, "table")


def finish(
    source: Path,
    features: list[Feature],
    notes: dict[str, tuple[str, ...]],
    drafted_from: Literal["table", "redcap"],
) -> Draft:
    """The draft of these entries: likely outcomes set aside, labels made unique, name and title from the file.

    Raises:
        RegistryError: nothing among them can be a feature.
    """
    aside: list[str] = []
    for position, feature in enumerate(features):
        likely = outcomes.in_feature(feature) if feature.used else None
        if likely is not None:
            features[position], line = _set_aside(feature, *likely)
            notes[feature.name] = (line, *notes.get(feature.name, ()))
            aside.append(feature.name)
    if not any(feature.role == "feature" for feature in features):
        reasons = [f"'{f.name}': {f.reason}" for f in features if f.role == "excluded"]
        why = f" ({'; '.join(reasons[:_NAMED])})" if reasons else ""
        raise RegistryError(f"{source}: no usable feature: no column can be shown and asked{why}")
    taken: set[str] = set()
    for position, feature in enumerate(features):
        label = feature.label
        while feature.used and label in taken:
            label = f"{label} ({feature.name})"
        taken |= {label} if feature.used else set()
        features[position] = feature.model_copy(update={"label": label})
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", source.stem)[:64] or "registry"
    title = f"TODO: what {source.stem} is"
    made = Dictionary(name=name, title=title, drafted_from=drafted_from, features=tuple(features))
    return Draft(made, notes, tuple(aside))


def _set_aside(feature: Feature, kind: str, where: str) -> tuple[Feature, str]:
    """A feature that looks like an outcome as one, or, where it can only follow from one, excluded; never shown."""
    looks = f"looks like {kind} by its {where}"
    wrong = 'if it is known at known_at and restates no outcome, role = "feature" and not_outcome = true'
    if feature.kind == "category" and kind in outcomes.ASKED and where != "section":
        outcome = {"role": "outcome", "known_at": 1, "question": f"TODO: {feature.label}?"}
        line = f"TODO: {looks}: known_at = the first day on which it is known, hide = what restates it; or, {wrong}"
        return feature.model_copy(update=outcome), line
    line = f"TODO: {looks}: leave it out; or, {wrong}"
    return feature.model_copy(update={"role": "excluded", "reason": f"{looks}, known only after the outcome"}), line


def find_id(columns: dict[str, Column]) -> str | None:
    """The column that looks most like a patient id, by name; None when none does."""
    plain = {_plain(name): name for name in reversed(columns)}
    return next((plain[name] for name in _ID_NAMES if name in plain), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()).strip("_")


def pretty(name: str) -> str:
    """A column name as words: `heart_rateMax` → "Heart rate max"."""
    words = _plain(name).replace("_", " ")
    return words[:1].upper() + words[1:] if words else name


def draft_entry(data: pa.Table, column: Column) -> tuple[Feature, list[str]]:
    """One column's entry and its comment lines."""
    name, label = column.name, pretty(column.name)

    def excluded(reason: str, note: str = "") -> tuple[Feature, list[str]]:
        entry = Feature(name=name, label=label, role="excluded", reason=reason)
        return entry, [f"TODO: {note}"] if note else []

    kind = identifier_in(data, name, None)
    if kind == "a date":
        return excluded("a date", "share an age or a number of days instead")
    if kind is not None:
        return excluded(
            f"looks like {kind}", "a direct identifier: remove it from the table; else give it not_identifying = true"
        )
    if not column.words:
        return excluded("empty in every row")
    if len(column.words) == 1:
        return excluded("one value in every row")
    whole = column.numbers is not None and bool(np.all(column.numbers == np.round(column.numbers)))
    coded = column.numbers is None or (whole and len(column.words) <= _NUMBER_LEVELS)
    if coded and len(column.words) > MAX_LEVELS:
        return excluded(f"{len(column.words)} different words", "group them into at most 50 levels, or leave it out")
    if coded and len(column.words) > 0.5 * column.rows and column.rows > FEWEST_ROWS:
        return excluded("nearly every row has a word of its own", "free text or a code list?")
    if coded:
        return _draft_category(column, label)
    if whole and column.numbers is not None and _is_running(name, column.numbers):
        return excluded("a number of the patient, the stay or the sample", "or is it a measurement?")
    if _TIME.search(_plain(name)) and outcomes.by_name(name) is None:
        return excluded("a time to an event or the end of a stay restates an outcome", "is that so?")
    return number_entry(column, label)


def _is_running(name: str, values: np.ndarray) -> bool:
    """Whether whole numbers count patients, stays or samples: by name, never twice, or without a gap."""
    distinct = np.unique(values)
    gapless = len(distinct) == len(values) > FEWEST_ROWS and distinct[-1] - distinct[0] == len(values) - 1
    return bool(gapless) or is_serial(name, values, None)


def _draft_category(column: Column, label: str) -> tuple[Feature, list[str]]:
    if column.numbers is None:
        levels = {
            word: word.lower() if word.lower() in ("yes", "no", "true", "false") else word for word in column.words
        }
    else:
        levels = {word: word for word in sorted(column.words, key=float)}
    lines = ["TODO: label, section"]
    if set(levels) in ({"0", "1"}, {"True", "False"}):
        levels = dict(zip(sorted(levels), ("no", "yes"), strict=True))
    elif column.numbers is not None:
        lines = ["TODO: label, section, and what each code means"]
    if len(set(levels.values())) < len(levels):
        levels = {word: word for word in column.words}
    return Feature(name=column.name, label=label, section="Record", levels=levels), lines


def number_entry(column: Column, label: str, known: dict[str, Any] | None = None) -> tuple[Feature, list[str]]:
    """A number's entry from its values.

    Args:
        column: its values; none only if `known` has both low and high.
        label: what it is called.
        known: fields that a person already gave (unit, low, high, section, …); they win over guesses.
    """
    known = dict(known or {})
    values = column.numbers if column.numbers is not None else np.empty(0)
    lines = ["TODO: label, section, unit"] if "section" not in known else ["TODO: unit"]
    sentinels = _nines(values)
    if sentinels:
        values = values[~np.isin(values, sentinels)]
        codes = ", ".join(f"{mark:g}" for mark in sentinels)
        lines.append(f"TODO: {codes} looks like a code for 'not measured'; it is read as missing")
    spike = _spike(values)
    if spike is not None:
        lines.append(f"TODO: {spike[0]:.6g} stands in {spike[1]:.0%} of the rows: filled in? then add it to sentinels")
    decimals = _decimals(values)
    if "low" not in known or "high" not in known:
        low, high = _outward(values, decimals)
        lines.append(f"TODO: low and high are this table's extremes, rounded outward ({low:g} to {high:g})")
        given = next((end for end in ("low", "high") if end in known), None)
        known = {"low": low, "high": high} | known
        if known["low"] >= known["high"] and given is not None:
            lines.append(f"TODO: every value of this table lies beyond {given} = {known[given]:g}: is it in this unit?")
        if known["low"] >= known["high"]:
            known |= {"low": known["high"] - 1} if given == "high" else {"high": known["low"] + 1}
    while decimals < 6 and np.floor(known["high"] * 10.0**decimals) <= np.ceil(known["low"] * 10.0**decimals):
        decimals += 1  # a range given by a person may be narrower than the values' decimals can tell apart
    return Feature(
        name=column.name, label=label, section=known.pop("section", "Record"), kind="number", decimals=decimals,
        sentinels=tuple(sentinels), scale=_scale(values, known["low"]), **known,
    ), lines  # fmt: skip


def _nines(values: np.ndarray) -> list[float]:
    """Codes such as 999 or -9 that lie far outside the other values."""
    found: list[float] = []
    for mark in sorted(_NINES & set(np.unique(values).tolist()), key=abs, reverse=True):
        rest = values[~np.isin(values, [*found, mark])]
        if rest.size == 0:
            continue
        low, high = float(rest.min()), float(rest.max())
        reach = max(high - low, 1.0)
        if (mark < 0 <= low) or mark > high + 0.5 * reach:
            found.append(mark)
    return found


def _spike(values: np.ndarray) -> tuple[float, float] | None:
    """(value, share) of one value far more frequent than the next, unless it is an end of the range (0 drinks)."""
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) < 20:
        return None
    order = np.argsort(counts)[::-1]
    first, second = int(counts[order[0]]), int(counts[order[1]])
    share = first / len(values)
    return (float(distinct[order[0]]), share) if share >= _SPIKE_SHARE and first >= _SPIKE_TIMES * second else None


def _decimals(values: np.ndarray) -> int:
    """Fewest decimals that keep 99 % of the values (a stored 0.8999 counts as 0.9), else 3 significant digits."""
    sizes = np.abs(values[values != 0])
    if not sizes.size:
        return 0
    significant = int(np.clip(2 - math.floor(math.log10(float(np.median(sizes)))), 0, 6))
    for decimals in range(max(3, significant) + 1):
        rest = np.abs(values - np.round(values, decimals))
        if np.mean(rest <= np.maximum(1e-9, 3e-4 * np.abs(values))) >= 0.99:
            return decimals
    return significant


def _outward(values: np.ndarray, decimals: int) -> tuple[float, float]:
    """The extremes, rounded outward to about a twentieth of their span; a long tail keeps its low end above 0."""
    low, high = float(values.min()), float(values.max())
    step = _nice(max((high - low) / 20, 10.0**-decimals))
    bottom = math.floor(low / step) * step
    if bottom <= 0 < low and _scale(values, low) == "log":
        power = 10.0 ** math.floor(math.log10(low))
        bottom = next(power * times for times in (5, 2, 1) if power * times <= low)
    return round(bottom, 6), round(math.ceil(high / step) * step, 6)


def _nice(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten, at or above a positive value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * times for times in (1, 2, 5, 10) if power * times >= value * (1 - 1e-9))


def _scale(values: np.ndarray, low: float) -> Literal["linear", "log"]:
    """ "log" for positive values whose upper tail is long."""
    if low <= 0 or values.size == 0:
        return "linear"
    q1, middle, q99 = np.quantile(values, [0.01, 0.5, 0.99])
    return "log" if q1 > 0 and q99 / middle > 4 and middle / q1 > 1.5 else "linear"
