"""Direct identifiers in a table: found by column name and by content, so that `check` can refuse them.

Run at one hospital. Reads a column's name and its distinct cells, says what kind of identifier it looks like, and never
repeats a cell. It is a net with holes: it knows common names and formats, not every one, and a name hidden in a code
list will pass. A hospital still has to look at its own table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date, datetime

_TOKENS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

# What a name is made of → what it is. A tuple is matched as consecutive words of the column's name.
_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    *(((word,), "a name") for word in ("surname", "forename", "firstname", "lastname", "fullname", "initials")),
    *((words, "a name") for words in (
        ("first", "name"), ("last", "name"), ("family", "name"), ("given", "name"), ("full", "name"),
        ("patient", "name"), ("pt", "name"), ("maiden", "name"), ("name", "of", "patient"), ("mother", "name"),
    )),
    *(((word,), "a date of birth") for word in ("dob", "birthdate", "birthday", "dateofbirth", "birthdt")),
    *((words, "a date of birth") for words in (
        ("date", "of", "birth"), ("birth", "date"), ("birth", "day"), ("date", "birth"), ("born", "on"),
    )),
    *(((word,), "a phone number") for word in ("phone", "telephone", "mobile", "cellphone", "fax", "phonenumber")),
    *(((word,), "an address") for word in ("address", "street", "streetname", "housenumber", "addr")),
    *(((word,), "a postcode") for word in ("postcode", "zip", "zipcode", "postalcode", "plz")),
    *((words, "a postcode") for words in (("postal", "code"), ("post", "code"), ("zip", "code"))),
    *(((word,), "an e-mail address") for word in ("email", "mail")),
    *((words, "an e-mail address") for words in (("e", "mail"),)),
    *(((word,), "a national or hospital number") for word in (
        "ssn", "nhs", "nhsnumber", "cpr", "personnummer", "bsn", "rrn", "mrn", "passport", "nino", "hkid", "nric",
    )),
    *((words, "a national or hospital number") for words in (
        ("social", "security"), ("nhs", "number"), ("nhs", "no"), ("national", "id"), ("medical", "record"),
        ("insurance", "number"), ("resident", "registration"), ("hospital", "number"),
    )),
    *(((word,), "free text") for word in ("notes", "note", "comment", "comments", "freetext", "remarks", "narrative")),
    *((words, "free text") for words in (("free", "text"),)),
)  # fmt: skip
_WHOLE_NAMES = {"name": "a name", "names": "a name", "naam": "a name", "nom": "a name", "tel": "a phone number"}

_EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[A-Za-z]{2,}")
_PHONE = re.compile(r"(?=.*[+()\s-])\+?[\d()\s./-]{8,20}")
_ISO_DATE = re.compile(r"(?:\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4})(?:[ T]\d.*)?")
_YEAR = re.compile(r"\d{4}")
_NATIONAL = re.compile(
    r"\d{3}-\d{2}-\d{4}"  # US social security number
    r"|\d{6}-[1-8]\d{6}"  # Korean resident registration number
    r"|\d{6}[-+]\d{4}"  # Danish CPR, Swedish personnummer
    r"|[A-Z]{2}\d{6}[A-D]"  # UK national insurance number
    r"|[A-Z]{6}\d{2}[A-Z]\d{2}[A-Z]\d{3}[A-Z]"  # Italian codice fiscale
)
_POSTCODE = re.compile(r"[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}|\d{4} ?[A-Z]{2}|\d{5}-\d{4}|[A-Z]\d[A-Z] ?\d[A-Z]\d")
_WORD = r"[A-ZÀ-Þ](?:[a-zß-ÿ'’-]|(?<=['’-])[A-ZÀ-Þ])+"  # Smith, O'Brien, García-López
_PERSON = re.compile(rf"{_WORD}(?:,? (?:[A-ZÀ-Þ]\.|{_WORD})){{1,3}}")
_FEWEST = 5  # distinct cells before content says anything but "e-mail"
_MOST = 2000  # distinct cells looked at


def by_name(column: str) -> str | None:
    """What a column's name says it holds, or None.

    >>> by_name("PatientName"), by_name("date_of_birth"), by_name("heart_rate"), by_name("drug_name")
    ('a name', 'a date of birth', None, None)
    """
    words = [word.lower() for word in _TOKENS.findall(column)]
    whole = "".join(words)
    if whole in _WHOLE_NAMES:
        return _WHOLE_NAMES[whole]
    for pattern, kind in _NAMES:
        length = len(pattern)
        if any(tuple(words[i : i + length]) == pattern for i in range(len(words) - length + 1)):
            return kind
    return None


def by_content(words: Sequence[str], rows: int) -> str | None:
    """What a column's distinct cells look like, or None.

    Args:
        words: distinct non-missing cells as text.
        rows: how many rows hold a value; tells a code list from something of each patient's own.
    """
    cells = [word.strip() for word in words[:_MOST]]
    if any(_EMAIL.fullmatch(cell) for cell in cells):
        return "an e-mail address"
    if len(cells) < _FEWEST:
        return None

    def share(test: Callable[[str], object]) -> float:
        return sum(1 for cell in cells if test(cell)) / len(cells)

    if share(_NATIONAL.fullmatch) >= 0.8 or share(_valid_number) >= 0.9:
        return "a national or hospital number"
    if share(_ISO_DATE.fullmatch) >= 0.8:
        years = sorted(int(match.group()) for cell in cells if (match := _YEAR.search(cell)))
        return _dates(years)
    if share(_POSTCODE.fullmatch) >= 0.8:
        return "a postcode"
    if share(lambda cell: _PHONE.fullmatch(cell) and 8 <= sum(c.isdigit() for c in cell) <= 15) >= 0.5:
        return "a phone number"
    own = len(words) >= 0.5 * rows
    if own and share(_PERSON.fullmatch) >= 0.8:
        return "a name"
    if own and (share(lambda cell: len(cell.split()) >= 4) >= 0.5 or sum(map(len, cells)) / len(cells) > 40):
        return "free text"
    return None


def of_dates(values: Sequence[date | datetime]) -> str:
    """What a column of dates is: dates of birth lie decades before the newest of them."""
    return _dates(sorted(value.year for value in values)) or "a date"


def _dates(years: list[int]) -> str:
    spread = years[-1] - years[len(years) // 2] if years else 0
    return "a date of birth" if spread >= 15 else "a date"


def _valid_number(cell: str) -> bool:
    """Whether 9 or 10 digits carry a valid check digit (NHS number, Dutch BSN); one random number in eleven does."""
    digits = [int(c) for c in cell if c.isdigit()]
    if len(digits) != len(cell.replace(" ", "").replace("-", "")):
        return False
    if len(digits) == 10:
        check = (11 - sum(d * w for d, w in zip(digits[:9], range(10, 1, -1), strict=True)) % 11) % 11
        return check == digits[9]
    if len(digits) == 9:
        return sum(d * w for d, w in zip(digits, [9, 8, 7, 6, 5, 4, 3, 2, -1], strict=True)) % 11 == 0
    return False
