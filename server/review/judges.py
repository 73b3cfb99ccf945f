"""A program as a rater: its pairs go out as JSON lines, blinded, and come back rated. Never counted with people.

Runs at the coordinator. Enters: a file of ratings. Leaves: a file of pairs, in the judge's own order. Private: records
and answers, so the judge has to be a local one; whose an answer is, which is not in the file.

A line that goes out: {"pair": 1, "record": […], "question": "…", "options": […], "first": {"text", "chosen"},
"second": {…}}. A line that comes back: {"pair": 1, "preference": "first-slightly", "reasons": ["record"],
"unacceptable": ["second"], "comment": "…"}; all but the first two may be left out. The words are those of ratings.py.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from . import raters
from .database import Database
from .items import ReviewError
from .raters import Rater
from .ratings import Rating, pair_at, progress, rate


class _Rated(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    pair: int = Field(ge=1)
    preference: str
    reasons: tuple[str, ...] = ()
    unacceptable: tuple[str, ...] = ()
    comment: str = ""


def judge(database: Database, name: str) -> Rater:
    """The judge of that name; a new one where nobody has it.

    Raises:
        ReviewError: a person has it.
    """
    if not any(one.name.casefold() == name.casefold() for one in raters.raters(database)):
        raters.invite(database, name, "judge")
    return known(database, name)


def known(database: Database, name: str) -> Rater:
    """The judge of that name.

    Raises:
        ReviewError: there is none, or it is a person.
    """
    found = [one for one in raters.raters(database) if one.name.casefold() == name.casefold()]
    if not found:
        raise ReviewError(f"judge '{name}': has no pairs yet: write them with --pairs FILE first")
    if found[0].kind != "judge":
        raise ReviewError(f"judge '{name}': is a person, who rates on the pages; a judge needs a name of its own")
    return found[0]


def pairs(database: Database, one: Rater) -> str:
    """All of a judge's pairs, a JSON line each."""
    lines: list[str] = []
    for place in range(progress(database, one.number)[1]):
        pair = pair_at(database, one.number, place)
        assert pair is not None
        first, second = (answer.model_dump() for answer in pair.answers)
        shown = {
            "pair": place + 1, "record": [entry.model_dump() for entry in pair.item.record],
            "question": pair.item.question, "options": pair.item.options, "first": first, "second": second,
        }  # fmt: skip
        lines.append(json.dumps(shown, ensure_ascii=False) + "\n")
    return "".join(lines)


def take(database: Database, one: Rater, path: Path) -> int:
    """Keeps a judge's ratings; how many. A file is checked whole before any of it is kept.

    Raises:
        ReviewError: names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ReviewError(f"{path}: ratings: cannot be read as UTF-8 text") from None
    total, found = progress(database, one.number)[1], dict[int, Rating]()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            said = _Rated.model_validate_json(line)
            rating = Rating.of(said.preference, said.reasons, said.unacceptable, said.comment)
        except (ValidationError, ReviewError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise ReviewError(f"{path}: line {number}: {why}") from None
        if said.pair > total or said.pair in found:
            raise ReviewError(f"{path}: line {number}: pair {said.pair}: is there twice, or not at all")
        found[said.pair] = rating
    for pair, rating in found.items():
        rate(database, one.number, pair - 1, rating)
    return len(found)
