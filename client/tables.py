"""Table files as Arrow tables: CSV, TSV and Parquet, with errors that say where to look.

Run at one hospital. Reads bytes, returns columns; knows nothing of dictionaries. Messages of pandas and pyarrow are
never passed on, because they quote the offending line, which is a patient's.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from ..common.dictionary import level_code
from ..common.errors import RegistryError

# Cells that mean "no value" in any column, unless the dictionary lists the word as a level.
MISSING_WORDS = frozenset({"", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null", "None", "."})
_TEXT_SUFFIXES = {".csv", ".tsv"}
_ROWS_NAMED = 3
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
_COMMA_NUMBER = re.compile(r"[+-]?\d+(?:\.\d{3})*,\d+")  # 3,5 and 1.234,5
_PLAIN_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
_COMMA_SHARE = 0.8  # of the distinct cells that are numbers once a comma is allowed: a "< 0,5" among them may stay
COMMA_ADVICE = "write decimals with a point (3.5) and nothing between thousands"


def rows_text(rows: np.ndarray) -> str:
    """Row indices (0-based) as people count them.

    >>> rows_text(np.array([0])), rows_text(np.array([4, 6, 9, 11]))
    ('row 1', 'rows 5, 7, 10 and 1 more')
    """
    shown = ", ".join(str(row + 1) for row in rows[:_ROWS_NAMED].tolist())
    more = f" and {rows.size - _ROWS_NAMED} more" if rows.size > _ROWS_NAMED else ""
    return f"row{'s' if rows.size > 1 else ''} {shown}{more}"


def _is_text(table: Path) -> bool:
    suffix = table.suffix.lower()
    if not table.exists():
        raise RegistryError(f"{table}: no such table")
    if table.is_dir():
        raise RegistryError(f"{table}: expected a table file, got a folder")
    if suffix not in _TEXT_SUFFIXES | {".parquet"}:
        raise RegistryError(f"{table}: expected a .csv, .tsv or .parquet file, got '{suffix or table.name}'")
    if table.stat().st_size == 0:
        raise RegistryError(f"{table}: the file is empty")
    return suffix in _TEXT_SUFFIXES


def columns_of(table: Path) -> list[str]:
    """Column names in order, duplicates kept; reads the header only.

    Raises:
        RegistryError: no such file, unknown kind, empty, not UTF-8, damaged, a line break in a name.
    """
    names = header(table)[1] if _is_text(table) else list(_schema(table).names)
    for number, name in enumerate(names, start=1):
        if "\n" in name or "\r" in name:
            raise RegistryError(
                f"{table}: the name of column {number} holds a line break; look for an unclosed quotation mark"
            )
    return names


def _schema(table: Path) -> pa.Schema:
    try:
        return pq.read_schema(table)
    except (pa.ArrowException, OSError):
        raise RegistryError(f"{table}: not a Parquet file, or damaged; write it again from its source") from None


def header(table: Path) -> tuple[str, list[str]]:
    """(delimiter, column names) of a text table. The delimiter is the one of , ; and tab that the header has most of.

    Raises:
        RegistryError: not UTF-8, or an empty header.
    """
    odd_quotes = _refuse_other_encodings(table)
    with table.open(encoding="utf-8-sig", newline="") as stream:
        first = stream.readline()
        delimiter = max(_DELIMITERS, key=first.count)
        stream.seek(0)
        try:
            names = next(csv.reader(stream, delimiter=delimiter), [])
        except csv.Error:  # a name longer than csv reads: it goes on to the next quotation mark, or to the end
            raise RegistryError(f"{table}: the header: a quotation mark is not closed") from None
    if not any(names):
        raise RegistryError(f"{table}: the first line has no column names")
    if odd_quotes:
        _refuse_ragged(table, delimiter)  # an unclosed quotation mark would swallow rows without a word
    return delimiter, names


def _refuse_other_encodings(table: Path) -> bool:
    """Names the first row that is not UTF-8, else says whether the number of quotation marks is odd: one pass."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines_before = quotes = 0
    with table.open("rb") as stream:
        while True:
            block = stream.read(2**20)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # error.object is what was left of the block before, then this block; that rest held no line end
                line = lines_before + error.object[: error.start].count(b"\n") + 1
                where = "the header" if line == 1 else f"row {line - 1} (line {line})"
                raise RegistryError(f"{table}: {where} is not UTF-8 text; save the table as 'CSV UTF-8'") from None
            if not block:
                return quotes % 2 == 1
            lines_before += block.count(b"\n")
            quotes += block.count(b'"')


def read(table: Path, columns: list[str], numbers: list[str]) -> pa.Table:
    """These columns of a table; `numbers` as float64 where every cell allows it, else as text for `numbers()` to judge.

    Raises:
        RegistryError: ragged rows (with the row), damaged file.
    """
    if not _is_text(table):
        try:
            data = pq.read_table(table, columns=columns)
        except (pa.ArrowException, OSError):
            raise RegistryError(f"{table}: damaged Parquet file; write it again from its source") from None
        _refuse_nested(table, data)
        return data
    delimiter, _ = header(table)
    text = pa.dictionary(pa.int32(), pa.string())
    types: dict[str, pa.DataType] = dict.fromkeys(columns, text) | {name: pa.float64() for name in numbers}
    try:
        return _read_text(table, delimiter, columns, types)
    except pa.ArrowInvalid:
        _refuse_ragged(table, delimiter)
    # Not ragged, so some number column holds text: read those as text too, so that the cell can be named.
    try:
        return _read_text(table, delimiter, columns, dict.fromkeys(columns, text))
    except pa.ArrowInvalid:
        raise RegistryError(f"{table}: not a readable CSV file: look for an unclosed quotation mark") from None


def _refuse_nested(table: Path, data: pa.Table) -> None:
    """Raises for a column whose cells are no numbers, words or times: lists, structs, maps."""
    for field in data.schema:
        try:
            pa.array([], field.type).dictionary_encode()
        except pa.ArrowNotImplementedError:
            raise RegistryError(
                f"{table}: column '{field.name}': expected a number or a word in each cell, got type {field.type}; "
                f"leave it out of the table, or write a column for each part"
            ) from None


def _read_text(table: Path, delimiter: str, columns: list[str], types: dict[str, pa.DataType]) -> pa.Table:
    return pacsv.read_csv(
        table,
        parse_options=pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pacsv.ConvertOptions(
            include_columns=columns,
            column_types=types,
            null_values=sorted(MISSING_WORDS),
            strings_can_be_null=False,  # "None" may be a level; codes are judged against the dictionary
            auto_dict_encode=False,
        ),
    )


def _refuse_ragged(table: Path, delimiter: str) -> None:
    """Raises for the first row whose number of cells is not the header's, or whose quotation mark is never closed."""
    with table.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        width, row = 0, 0
        try:
            width = len(next(reader))
            for cells in reader:
                if not cells:  # an empty line is no row
                    continue
                row += 1
                if len(cells) != width:
                    raise RegistryError(
                        f"{table}: row {row} (line {reader.line_num}) has {len(cells)} cells, expected {width} as in "
                        f"the header; look for a missing or extra {_DELIMITERS[delimiter]}"
                    )
        except csv.Error:
            where = f"row {row + 1}" if width else "the header"
            raise RegistryError(f"{table}: {where}: a quotation mark is not closed, or stands inside a cell") from None


def numbers(table: str, data: pa.Table, column: str, missing: frozenset[str] = frozenset()) -> np.ndarray:
    """A column as float64 (rows,), NaN where it holds no value or a word of `missing`; all finite.

    Raises:
        RegistryError: text that is no number, with its row, or a type that is none (a date).
    """
    cells = data.column(column)
    kind = cells.type
    if pa.types.is_dictionary(kind):
        codes, words = codes_of(cells)
        values, bad = _parse(words, MISSING_WORDS | missing)
        wrong = np.flatnonzero(np.append(bad, False)[codes])
        if wrong.size:
            where = f"{table}: column '{column}': {rows_text(wrong)}: expected a number"
            if decimal_commas(words):
                raise RegistryError(f"{where}, got one with a decimal comma; {COMMA_ADVICE}")
            comma = f" ({COMMA_ADVICE})" if any(_COMMA_NUMBER.fullmatch(word) for word in words) else ""
            raise RegistryError(f"{where}, got text{comma}; correct the cells, or describe the column as a category")
        return np.append(values, np.nan)[codes]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return numbers(table, pa.table({column: cells.dictionary_encode()}), column, missing)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
            or pa.types.is_boolean(kind) or pa.types.is_null(kind)):  # fmt: skip
        raise RegistryError(f"{table}: column '{column}': expected numbers, got type {kind}")
    values = np.asarray(cells.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), dtype=np.float64)
    infinite = np.flatnonzero(np.isinf(values))
    if infinite.size:
        raise RegistryError(f"{table}: column '{column}': {rows_text(infinite)}: expected a number, got infinity")
    return values


def decimal_commas(words: Sequence[str]) -> list[str]:
    """Those of a column's distinct cells that are numbers with a decimal comma, where the column is one of numbers.

    >>> decimal_commas(["3,5", "4", "1.204,75", "NA"]), decimal_commas(["3,5 mg", "low, then high"])
    (['3,5', '1.204,75'], [])
    """
    filled = [word for word in words if word not in MISSING_WORDS]
    commas = [word for word in filled if _COMMA_NUMBER.fullmatch(word)]
    numbers = len(commas) + sum(1 for word in filled if _PLAIN_NUMBER.fullmatch(word))
    return commas if numbers >= _COMMA_SHARE * len(filled) else []


def _parse(words: list[str], missing: frozenset[str]) -> tuple[np.ndarray, np.ndarray]:
    """(values, which are no number) of distinct cells."""
    values, bad = np.full(len(words), np.nan), np.zeros(len(words), bool)
    for i, word in enumerate(words):
        if word in missing:
            continue
        try:
            values[i] = float(word) if "_" not in word else np.nan
        except ValueError:
            bad[i] = True
        bad[i] |= not np.isfinite(values[i])
    return values, bad


def rows_with(column: pa.ChunkedArray, wanted: frozenset[str]) -> int:
    """How many cells of a text column are one of these words; 0 for columns of numbers."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not wanted or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return 0
    codes, words = codes_of(column)
    return int(np.isin(codes, [i for i, word in enumerate(words) if word in wanted]).sum())


def number_word(value: float) -> str:
    """A number as a level code: whole numbers without a point, so that 1, 1.0 and "1.0" are one code."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(float(value))


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "True" if value else "False"  # as pandas writes them to CSV
    if isinstance(value, int | float):
        return number_word(value)
    return level_code(value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value))


def codes_of(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """(index of each row into the words, -1 for a null; the distinct cells as words), numbers in one spelling."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    array = encoded.unify_dictionaries().combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    if isinstance(array, pa.ChunkedArray):  # combine_chunks keeps several chunks only when there is nothing in them
        array = array.chunk(0) if array.num_chunks else pa.array([], encoded.type)
    words = [_word(value) if value is not None else "" for value in array.dictionary.to_pylist()]
    codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return codes, words
