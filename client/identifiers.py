"""Direct identifiers in a table: found by column name and by content, so that `check` can refuse them.

Run at one hospital. Reads a column's name and its distinct cells, says what kind of identifier it looks like, and never
repeats a cell. It is a net with holes: it knows common names and formats, not every one, and a name hidden in a code
list will pass. A hospital still has to look at its own table. Where it is wrong the other way, the dictionary says
`not_identifying = true` for the column.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date, datetime

_TOKENS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")

# What a name is made of → what it is. A tuple is matched as consecutive words of the column's name.
_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    *(((word,), "a name") for word in (
        "surname", "forename", "firstname", "lastname", "fullname", "initials", "vorname", "nachname", "achternaam",
        "voornaam", "prenom",
    )),
    *((words, "a name") for words in (
        ("first", "name"), ("last", "name"), ("family", "name"), ("given", "name"), ("full", "name"),
        ("patient", "name"), ("pt", "name"), ("maiden", "name"), ("name", "of", "patient"), ("mother", "name"),
        ("name", "last"), ("name", "first"), ("name", "family"), ("name", "given"),
    )),
    *(((word,), "a date of birth") for word in (
        "dob", "birthdate", "birthday", "dateofbirth", "birthdt", "geburtsdatum", "geboortedatum",
    )),
    *((words, "a date of birth") for words in (
        ("date", "of", "birth"), ("birth", "date"), ("birth", "day"), ("date", "birth"), ("born", "on"),
        ("birth", "dt"), ("dt", "birth"), ("date", "naissance"), ("date", "de", "naissance"),
    )),
    *(((word,), "a phone number") for word in (
        "phone", "telephone", "cellphone", "fax", "phonenumber", "telefon", "telefoon", "telefono",
    )),
    *(((word,), "an address") for word in ("address", "streetname", "housenumber", "addr", "adresse", "adres")),
    *(((word,), "a postcode") for word in ("postcode", "zip", "zipcode", "postalcode", "plz")),
    *((words, "a postcode") for words in (("postal", "code"), ("post", "code"), ("zip", "code"))),
    *((words, "an e-mail address") for words in (("email",), ("e", "mail"))),
    *(((word,), "a national or hospital number") for word in (
        "ssn", "nhsnumber", "personnummer", "bsn", "mrn", "passport", "nino", "hkid", "nric",
    )),
    *((words, "a national or hospital number") for words in (
        ("social", "security"), ("national", "id"), ("medical", "record"), ("insurance", "number"),
        ("resident", "registration"), ("hospital", "number"),
    )),
    *(((word,), "free text") for word in ("notes", "comment", "comments", "freetext", "remarks", "narrative")),
    *((words, "free text") for words in (("free", "text"),)),
)  # fmt: skip
# Words that are an identifier only if nothing but these accompanies them: `mobile_no`, but not `mobile_at_discharge`.
_ALONE = {
    "name": "a name", "names": "a name", "naam": "a name", "nom": "a name", "tel": "a phone number",
    "mobile": "a phone number", "street": "an address", "mail": "an e-mail address", "note": "free text",
    "cpr": "a national or hospital number", "nhs": "a national or hospital number",
    "rrn": "a national or hospital number",
}  # fmt: skip
_COMPANIONS = {"number", "no", "nr", "num", "name", "address", "patient", "patients", "pt", "home", "work"}
# Korean headings, whole but for a prefix: 주소 is an address, 주소증 the complaint.
_KOREAN = {
    "이름": "a name", "성명": "a name", "환자명": "a name", "생년월일": "a date of birth",
    "전화번호": "a phone number", "연락처": "a phone number", "휴대폰": "a phone number", "휴대전화": "a phone number",
    "휴대폰번호": "a phone number", "주소": "an address", "우편번호": "a postcode", "이메일": "an e-mail address",
    "주민등록번호": "a national or hospital number", "주민번호": "a national or hospital number",
    "등록번호": "a national or hospital number", "병록번호": "a national or hospital number",
    "차트번호": "a national or hospital number",
}  # fmt: skip
_KOREAN_PREFIX = re.compile(r"^(?:환자|보호자|자택|본인)의?|[\s_().\-]")

_EMAIL = re.compile(r"[^@\s]+@[^@\s]+\.[A-Za-z]{2,}")
_PHONE = re.compile(r"(?=.*[+()\s-])\+?[\d()\s./-]{8,20}")
# A decimal or a negative number is a measurement, however many digits it has: no phone number begins with a minus.
_MEASURED = re.compile(r"-\d+|[+-]?\d*\.\d+(?:[eE][+-]?\d+)?")
# Dates: 1950-03-12, 12.3.1950, 12/03/50, 19500312, 12-MAR-1950, 12 March 50, with or without a time after them.
_DATES = tuple(re.compile(rf"(?:{form})(?:[ T]\d.*)?", re.IGNORECASE) for form in (
    r"(?P<year>\d{4})([-/.])\d{1,2}\2\d{1,2}",
    r"\d{1,2}([-/.])\d{1,2}\1(?P<year>\d{4}|\d{2})",
    r"(?P<year>(?:19|20)\d\d)(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])",
    r"\d{1,2}[-/. ]?(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?[-/., ]*(?P<year>\d{4}|\d{2})",
))  # fmt: skip
_NATIONAL = re.compile(
    r"\d{3}-\d{2}-\d{4}"  # US social security number
    r"|\d{6}-[1-8]\d{6}"  # Korean resident registration number
    r"|\d{6}[-+]\d{4}"  # Danish CPR, Swedish personnummer
    r"|[A-Z]{2}\d{6}[A-D]"  # UK national insurance number
    r"|[A-Z]{6}\d{2}[A-Z]\d{2}[A-Z]\d{3}[A-Z]"  # Italian codice fiscale
)
_POSTCODE = re.compile(r"[A-Z]{1,2}\d[A-Z\d]? ?\d[A-Z]{2}|\d{4} ?[A-Z]{2}|\d{5}-\d{4}|[A-Z]\d[A-Z] ?\d[A-Z]\d")
_WORD = r"[A-ZÀ-Þ](?:[a-zß-ÿ'’-]|(?<=['’-])[A-ZÀ-Þ])+"  # Smith, O'Brien, García-López
_CAPITALS = r"[A-ZÀ-Þ][A-ZÀ-Þ'’-]+"  # SMITH, JOHN A: with its comma, or codes in capitals would be names
_PERSON = re.compile(
    rf"{_WORD}(?:,? (?:[A-ZÀ-Þ]\.|{_WORD})){{1,3}}|{_CAPITALS}, ?{_CAPITALS}(?: (?:[A-ZÀ-Þ]\.?|{_CAPITALS})){{0,2}}"
)
_FEWEST = 5  # distinct cells before content says anything but "e-mail"
_MOST = 2000  # distinct cells looked at


def words_of(column: str) -> list[str]:
    """What a column's name is made of, in lower case.

    >>> words_of("stayNr"), words_of("ENCOUNTER_ID"), words_of("crea1")
    (['stay', 'nr'], ['encounter', 'id'], ['crea', '1'])
    """
    return [word.lower() for word in _TOKENS.findall(column)]


def by_name(column: str) -> str | None:
    """What a column's name says it holds, or None.

    >>> by_name("PatientName"), by_name("NAME_LAST"), by_name("생년월일"), by_name("mobile_no")
    ('a name', 'a name', 'a date of birth', 'a phone number')
    >>> by_name("heart_rate"), by_name("drug_name"), by_name("cpr_performed"), by_name("주소증")
    (None, None, None, None)
    """
    words = words_of(column)
    alone = [word for word in words if word not in _COMPANIONS] or words[-1:]
    if len(alone) == 1 and alone[0] in _ALONE:
        return _ALONE[alone[0]]
    korean = _KOREAN.get(_KOREAN_PREFIX.sub("", column)) or _KOREAN.get(column.strip())
    if korean is not None:
        return korean
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
    years = sorted(year for cell in cells if (year := _year_of(cell)) is not None)
    if len(years) >= 0.8 * len(cells):
        return _dates(years)
    if share(_POSTCODE.fullmatch) >= 0.8:
        return "a postcode"
    if share(_is_phone) >= 0.5:
        return "a phone number"
    own = len(words) >= 0.5 * rows
    if own and share(_PERSON.fullmatch) >= 0.8:
        return "a name"
    if own and (share(lambda cell: len(cell.split()) >= 4) >= 0.5 or sum(map(len, cells)) / len(cells) > 40):
        return "free text"
    return None


def _is_phone(cell: str) -> bool:
    digits = sum(c.isdigit() for c in cell)
    return bool(_PHONE.fullmatch(cell)) and 8 <= digits <= 15 and not _MEASURED.fullmatch(cell)


def _year_of(cell: str) -> int | None:
    """The year of a cell that is a date as people write them, or None."""
    for form in _DATES:
        match = form.fullmatch(cell.strip())
        if match is not None:
            year = int(match["year"])
            century = 0 if year >= 100 else 2000 if year <= datetime.now().year % 100 else 1900
            return century + year
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
