"""Reads what is to be reviewed: pairs of answers by two models, with the record each pair is about.

Runs at the coordinator. Enters: a file of JSON lines. Leaves: a `Study`, checked, which server/review/store.py keeps.
Private: records. Only synthetic ones, ones of people who consented, and open registries' may be shown to raters; which
of them they are stands on every page.

The file, UTF-8. Its first line may be a header, which says what the command's options would say otherwise:

    {"wardround_review": 1, "data": "open", "title": "Stroke outcomes", "language": "en"}

Every other line is one item, with answers of the same two models:

    {"id": "q-0001", "section": "Laboratory", "target": "Lactate",
     "record": [{"section": "Vital signs", "label": "Heart rate", "value": 112, "unit": "/min"},
                {"section": "Vital signs", "label": "Temperature", "value": null, "unit": "°C"}],
     "question": "Which lactate was measured on the first day?",
     "options": ["below 2 mmol/L", "2 mmol/L or more"],
     "answers": {"base":  {"text": "The patient is …", "chosen": 1},
                 "final": {"text": "Heart rate and …", "chosen": 0}}}

`id` is unique; `section` and `target` group the statistics and are not shown; `value` is text, a number, true, false or
null (not recorded); `unit` may be left out; `options` may be empty (an open question), and `chosen` is the index of an
option or null (none). Unknown keys are refused: a true answer that slipped in would be shown to nobody, but kept.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError, model_validator

from ...common.errors import UserError

FORMAT = 1
HEADER = "wardround_review"
MAX_ITEMS, MAX_LINE_BYTES = 100_000, 1_000_000

Data = Literal["synthetic", "consented", "open"]
M = TypeVar("M", bound=BaseModel)
Short = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200)]


class ReviewError(UserError):
    """A review that cannot be made, opened or continued as asked; one line."""

    code = "review"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Frozen):
    """One line of a record."""

    section: Short
    label: Short
    value: bool | int | FiniteFloat | Annotated[str, StringConstraints(max_length=2000)] | None
    unit: Annotated[str, StringConstraints(max_length=60)] | None = None


class Answer(_Frozen):
    """What one model answered."""

    text: Annotated[str, StringConstraints(max_length=20_000)]
    chosen: Annotated[int, Field(ge=0)] | None = None


class Item(_Frozen):
    """A pair of answers to one question about one record."""

    id: Short
    section: Short
    target: Short
    record: tuple[Entry, ...] = Field(min_length=1, max_length=500)
    question: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=5000)]
    options: tuple[Annotated[str, StringConstraints(min_length=1, max_length=500)], ...] = Field(max_length=26)
    answers: dict[Short, Answer] = Field(min_length=2, max_length=2)

    @model_validator(mode="after")
    def _chosen_is_an_option(self) -> Self:
        for answer in self.answers.values():
            if answer.chosen is not None and answer.chosen >= len(self.options):
                raise ValueError(f"chosen: expected an index below {len(self.options)}, got {answer.chosen}")
        return self


class _Header(_Frozen):
    wardround_review: Literal[1]
    data: Data | None = None
    title: Short | None = None
    language: Annotated[str, StringConstraints(pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")] | None = None


@dataclass(frozen=True)
class Study:
    """What is reviewed.

    Attributes:
        title: as raters read it.
        data: the kind of records.
        language: of records and answers, a BCP 47 tag.
        models: the two names, sorted; positive statistics speak for the second.
        items: in the file's order.
        digest: SHA-256 of the file's bytes, hex.
    """

    title: str
    data: Data
    language: str
    models: tuple[str, str]
    items: tuple[Item, ...]
    digest: str

    def named_in_answers(self) -> int:
        """In how many items an answer says a model's name as a word: those give away what is hidden."""
        words = _words(self.models)
        return sum(any(words.search(answer.text) for answer in item.answers.values()) for item in self.items)


def read_study(path: Path, data: str | None = None, title: str | None = None) -> Study:
    """Reads a file of items.

    Args:
        path: the file.
        data: "synthetic", "consented" or "open", where the header does not say it.
        title: in place of the header's.

    Raises:
        ReviewError: not the format; no or another kind of records than the header says; other models in one line than
            in the first; an id twice; a title that names a model. Names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ReviewError(f"{path}: items: cannot be read: {(error.strerror or '').lower()}") from None
    header, items, seen = _Header(wardround_review=FORMAT), [], dict[str, int]()
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where, value = f"{path}: line {number}", _json(line, f"{path}: line {number}")
        if HEADER in value:
            if items or header.model_fields_set - {HEADER}:
                raise ReviewError(f"{where}: a header is the first line")
            if value[HEADER] != FORMAT:
                raise ReviewError(f"{where}: {HEADER}: this wardround reads format {FORMAT}, got {value[HEADER]!r}")
            header = _checked(_Header, value, where)
            continue
        item = _checked(Item, value, where)
        if item.id in seen:
            raise ReviewError(f"{where}: id '{item.id}' is that of line {seen[item.id]}")
        if items and set(item.answers) != set(items[0].answers):
            expected, got = (" and ".join(sorted(names)) for names in (items[0].answers, item.answers))
            raise ReviewError(f"{where}: answers: expected those of {expected}, as in the first item, got {got}")
        if len(items) == MAX_ITEMS:
            raise ReviewError(f"{where}: expected at most {MAX_ITEMS:,} items; split the study")
        seen[item.id] = number
        items.append(item)
    if not items:
        raise ReviewError(f"{path}: expected items, one a line, got none")
    first, second = sorted(items[0].answers)
    title = title or header.title or "Review of answers"
    if _words((first, second)).search(title):
        raise ReviewError(f"title '{title}': names a model, which raters must not know; choose another")
    digest = hashlib.sha256(content).hexdigest()
    kind = _kind(path, data, header.data)
    return Study(title, kind, header.language or "en", (first, second), tuple(items), digest)


def _kind(path: Path, option: str | None, header: Data | None) -> Data:
    """The kind of records, on which option and header must agree."""
    if option is not None and header is not None and option != header:
        raise ReviewError(f"--data {option}: the header of {path} says '{header}'; correct the one that is wrong")
    for known in get_args(Data):
        if (option or header) == known:
            return known
    raise ReviewError(
        f"{path}: which kind of records? Expected --data synthetic, consented or open: no others are shown to raters"
    )


def _json(line: bytes, where: str) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise ReviewError(f"{where}: expected at most {MAX_LINE_BYTES:,} bytes, got {len(line):,}")
    try:
        value = json.loads(line)
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise ReviewError(f"{where}: expected a line of JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise ReviewError(f"{where}: expected an object")
    return value


def _checked(kind: type[M], value: Mapping[str, Any], where: str) -> M:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise ReviewError(f"{where}: {field + ': ' if field else ''}{problem['msg'].lower()}") from None


def _words(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names), re.IGNORECASE)
