r"""Where a text names a feature of a dictionary, and what its numbers and units are.

Runs where reasoning is audited (common/reasoning.py). Enters: a completion, which may quote a patient's record; what
comes out are places in it and never leaves with less care than the text.

Names are matched as people write them: any case, British or American spelling, spaces or hyphens; "Heart rate, day 1"
also as "day 1 heart rate", "heart rate on day 1" or just "heart rate", which then may mean any day's; labels of three
words and more also by their initials (MAP, BUN). Words that only medicine knows for synonyms ("kidney function") are
not found.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .dictionary import Feature

# A letter or digit of a Latin script: Hangul particles may follow a label without a space.
_WORD = "A-Za-z0-9À-ɏµμ"
_START, _END = rf"(?<![{_WORD}])", rf"(?![{_WORD}])"
NUMBER = re.compile(rf"(?<![{_WORD}.,^])[-−]?\d+(?:[.,]\d+)*(?![\d^])")
NEGATIVE = frozenset({"no", "none", "absent", "never", "negative"})
POSITIVE = frozenset({"yes", "present", "positive"})

# Ways to write a unit → one of them. What a dictionary's own units are is added to these.
_UNITS: Mapping[str, str] = {
    "/min": r"beats ?(?:/|per) ?min(?:ute)?s?|breaths ?(?:/|per) ?min(?:ute)?s?|bpm|/ ?min|per minute",
    "c": r"°\s?C|degrees? C(?:elsius)?|celsius|C",
    "f": r"°\s?F|degrees? F(?:ahrenheit)?|fahrenheit|F",
    "years": r"-?years?(?:[- ]old| of age)?|yrs?|y/?o|-year-olds?",
    "%": r"%|per ?cent",
    "umol/l": r"[µμu]mol(?:/| per )l(?:iter|itre)?",
    "mmol/l": r"mmol(?:/| per )l(?:iter|itre)?|m?eq/l",
    "mg/dl": r"mg(?:/| per )d(?:eci)?l(?:iter|itre)?",
    "10^9/l": r"(?:[x×] ?)?10\^?9 ?/ ?l|(?:[x×] ?)?10⁹/l|giga/l|k/[uµμ]l|[x×] ?10\^?3/[uµμ]l",
    "ml/24h": r"ml ?(?:/|per) ?(?:24 ?h(?:ours)?|d(?:ay)?)",
    "points": r"points?",
    "kg/m2": r"kg/m[²2]|kg/m\^2",
    "mmhg": r"mm ?hg",
}
# Units of laboratories and monitors that a text may use though no feature of the dictionary has them.
_CLINICAL = ("g/dl", "g/l", "mg/l", "ng/ml", "pg/ml", "µg/l", "ug/l", "u/l", "iu/l", "miu/l", "kpa", "ml/min", "nmol/l",
             "pmol/l", "meq/l", "cmh2o", "l/min", "mm/h")  # fmt: skip
_OTHER = ("hours?", "hrs?", "h", "minutes?", "mins?", "days?", "weeks?", "months?", "times?", "patients?", "cm", "m",
          "kg", "lbs?", "g", "ml", "l", "mm", "options?", "features?")  # fmt: skip
# Quantities that models like to make up; where a dictionary has none of that name, a value of it is invented.
_COMMON = (
    r"lactate|lactic acid|c-reactive protein|CRP|procalcitonin|troponin(?: [IT])?|BNP|NT-proBNP|d-dimer|INR|ESR|"
    r"h(?:a?)emoglobin|hgb|platelets?|platelet count|ferritin|fibrinogen|amylase|lipase|ALT|AST|HbA1c|GFR|eGFR|"
    r"bicarbonate|HCO3|base excess|anion gap|calcium|magnesium|phosphate|chloride|ammonia|TSH|oxygen saturation|"
    r"SpO2|SaO2|blood pressure|BP|GCS|glasgow coma (?:scale|score)|NIHSS|APACHE(?: II| III)? score|SOFA score|"
    r"ejection fraction|central venous pressure|CVP|PEEP|FiO2|BMI|body mass index|heart rate|pulse|temperature|"
    r"respiratory rate|creatinine|urea|sodium|potassium|glucose|albumin|bilirubin|h(?:a?)ematocrit|cholesterol|weight|"
    r"height"
)


@dataclass(frozen=True)
class Mention:
    """A place where a text names something.

    Attributes:
        start, end: of the name in the text.
        features: which features the name may mean, by name in the dictionary; empty: a quantity that it does not have.
        level: the name is that of a level of these features ("lung cancer"), not of the features themselves.
    """

    start: int
    end: int
    features: tuple[str, ...]
    level: str | None = None


def plain(text: str) -> str:
    """The text without markup and with plain quotes, every character at its old place."""
    return text.translate(_PLAIN)


_PLAIN = {ord(sign): " " for sign in "*`#$\u00a0"} | {ord("’"): "'", ord("—"): "–"}
_SENTENCE = re.compile(r"(?<=[.!?;])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)\s+|\n+")
LONGEST = 600  # characters that are read as one sentence: what a model that has got stuck writes has no end
_LETTER_END = re.compile(r"\b[A-J]\.$")
_ENUMERATED = re.compile(r"\W*(?:[A-Z]|\d{1,2})\.")


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of the text's sentences; a line, a part up to ";", and `LONGEST` characters, are one as well."""
    for start, end in _whole_sentences(text):
        while end - start > LONGEST:
            cut = text.rfind(" ", start + 1, start + LONGEST)
            cut = cut if cut > 0 else start + LONGEST
            yield start, cut
            start = cut
        yield start, end


def _whole_sentences(text: str) -> Iterator[tuple[int, int]]:
    start = 0
    for cut in _SENTENCE.finditer(text):
        if "\n" not in cut[0]:
            if _ENUMERATED.fullmatch(text, start, cut.start()):
                continue  # "B. 3.5 mmol/L is too low"
            if _LETTER_END.search(text, start, cut.start()) and re.match("[0-9a-z]", text[cut.end() : cut.end() + 1]):
                continue  # "the answer is B. 3.5 mmol/L"
        if text[start : cut.start()].strip():
            yield start, cut.start()
        start = cut.end()
    if text[start:].strip():
        yield start, len(text)


def find_mentions(text: str, features: Mapping[str, Feature]) -> list[Mention]:
    """Names in a text, longest first where they overlap, then in order.

    Args:
        text: as `plain` gives it.
        features: all features and outcomes of the dictionary by name.
    """
    found: list[Mention] = []
    for pattern, names, level in _names(tuple(features.values())):
        found += [Mention(match.start(), match.end(), names, level) for match in pattern.finditer(text)]
    # The more specific of two names of one length: one that means fewer features, and a label before a level.
    found.sort(key=lambda mention: (mention.start - mention.end, not mention.features, len(mention.features)))
    taken, kept = bytearray(len(text)), dict[tuple[int, int], Mention]()
    for mention in found:
        place = (mention.start, mention.end)
        other = kept.get(place)
        if not any(taken[mention.start : mention.end]):
            taken[mention.start : mention.end] = b"\1" * (mention.end - mention.start)
            kept[place] = mention
        elif other is not None and other.level is None and mention.level is not None:
            # the same words name a label and a level: "congestive heart failure"
            kept[place] = Mention(*place, other.features + mention.features, mention.level)
    return sorted(kept.values(), key=lambda mention: mention.start)


def core(feature: Feature) -> str:
    """The label without what follows its first comma: "Heart rate" of "Heart rate, day 1"."""
    return feature.label.partition(", ")[0]


def qualifier(feature: Feature) -> str:
    """What follows the label's first comma, or empty."""
    return feature.label.partition(", ")[2]


def has_qualifier(text: str, feature: Feature) -> bool:
    """Whether the text names the feature's qualifier ("day 3", "by hand"); False where it has none."""
    words = qualifier(feature)
    return bool(words) and re.search(_START + _words(words) + _END, text, re.IGNORECASE) is not None


def distinct_levels(features: Sequence[Feature]) -> dict[str, tuple[str, ...]]:
    """Levels that name a finding by themselves ("microalbuminuria", "lung cancer") → features that have them."""
    levels: dict[str, tuple[str, ...]] = {}
    for feature in features:
        for level in feature.levels.values():
            word = level.lower()
            telling = " " in word or len(word) >= 8 or level.isupper()
            if feature.role != "outcome" and telling and word not in NEGATIVE | POSITIVE and not word[0].isdigit():
                levels[word] = (*levels.get(word, ()), feature.name)
    return levels


def _names(features: Sequence[Feature]) -> list[_Name]:
    labels = tuple((feature.name, feature.label) for feature in features)
    return _compiled(labels, tuple(distinct_levels(features).items()))


_Name = tuple[re.Pattern[str], tuple[str, ...], str | None]


@lru_cache(maxsize=16)
def _compiled(labels: tuple[tuple[str, str], ...], levels: tuple[tuple[str, tuple[str, ...]], ...]) -> list[_Name]:
    by_form: dict[tuple[str, int], list[str]] = {}
    for name, label in labels:
        head, _, rest = label.partition(", ")
        forms = {_words(label)}
        if rest:
            whole, detail = _words(head), _words(rest)
            forms |= {
                whole,
                rf"{detail}(?:'s)?[\s\-]+{whole}",
                rf"{whole}\s*(?:,|\(|\[)?\s*(?:(?:on|at|from|of|in|measured)\s+)*{detail}\s*(?:\)|\])?",
            }
        for form in forms:
            by_form.setdefault((form, re.IGNORECASE), []).append(name)
        for letters in _initials(head):
            by_form.setdefault((letters, 0), []).append(name)
        if head.lower() in _ADJECTIVES:
            by_form.setdefault((_ADJECTIVES[head.lower()], re.IGNORECASE), []).append(name)
    names: list[_Name] = [
        (re.compile(_START + form + _END, flags), tuple(of), None) for (form, flags), of in by_form.items()
    ]
    words: list[_Name] = [(re.compile(_START + _words(level) + _END, re.IGNORECASE), of, level) for level, of in levels]
    return [*names, *words, (re.compile(rf"{_START}(?:{_COMMON}){_END}", re.IGNORECASE), (), None)]


_ADJECTIVES = {"diabetes": "diabetic", "hypertension": "hypertensive", "obesity": "obese", "smoking": "smoker"}


def _initials(label: str) -> set[str]:
    words = [word for word in re.findall(r"[A-Za-z]+", label) if word.lower() not in ("of", "the", "and", "or", "in")]
    found = {"".join(word[0] for word in words).upper()}
    if words and words[-1].lower() in ("order", "disease", "score", "rate"):
        found.add("".join(word[0] for word in words[:-1]).upper())
    return {letters for letters in found if len(letters) >= 3}


@lru_cache(maxsize=1024)
def _words(label: str) -> str:
    """A label as a pattern: spelling, spaces, hyphens and commas as one likes."""
    out: list[str] = []
    for token in re.findall(r"[A-Za-z0-9À-ɏ]+|[^\sA-Za-z0-9À-ɏ]", label):
        if token[0].isalnum():
            out.append(_spelling(re.escape(token)))
        elif token in ",-('’)":
            out.append(rf"{re.escape(token)}?")
        else:
            out.append(re.escape(token))
    return r"[\s\-]*".join(out) + ("s?" if out and out[-1][-1].isalpha() else "")


def _spelling(word: str) -> str:
    word = re.sub(r"(?i)(?<=[a-z])?(ae|oe)(?=[a-z])", lambda found: f"{found[0][0]}?{found[0][1]}", word)
    word = re.sub(r"(?i)our\b", "ou?r", word)
    return re.sub(r"(?i)(?<=[a-z])is(?=(?:ed?|ation|ing)\b)", "i[sz]", word)


# --- numbers ------------------------------------------------------------------------------------------------------


def readings(written: str) -> list[tuple[float, int]]:
    """(value, decimals) that a number as written may mean: a comma is a decimal sign or one of thousands.

    >>> readings("3,5"), readings("1,234"), readings("7.40")
    ([(3.5, 1)], [(1.234, 3), (1234.0, 0)], [(7.4, 2)])
    """
    sign = -1.0 if written[0] in "-−" else 1.0
    digits = written.lstrip("-−")
    found: list[tuple[float, int]] = []
    if digits.count(".") + digits.count(",") <= 1:
        whole, _, part = digits.replace(",", ".").partition(".")
        found.append((sign * float(f"{whole}.{part or 0}"), len(part)))
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits):
        whole, _, part = digits.replace(",", "").partition(".")
        found.append((sign * float(f"{whole}.{part or 0}"), len(part)))
    return found


def agrees(written: str, shown: str, *, roughly: bool = False) -> bool:
    """Whether a number as written is the one shown, rounded to the fewer decimals of both or cut to them.

    Args:
        written: in the text.
        shown: in the record, with a point.
        roughly: the text says "about": 5 % either way.
    """
    exact, decimals = float(shown), len(shown.partition(".")[2])
    for value, own in readings(written):
        step = 10.0 ** -min(own, decimals)
        if abs(value - exact) <= 0.5 * step + 1e-9 or (own < decimals and 0 <= exact - value < step - 1e-9):
            return True
        if roughly and abs(value - exact) <= max(0.05 * abs(exact), 0.5 * step):
            return True
    return False


@lru_cache(maxsize=64)
def _unit_pattern(units: tuple[str, ...]) -> re.Pattern[str]:
    own = sorted((re.escape(word) for word in {*units, *_CLINICAL}), key=len, reverse=True)
    parts = [*own, *_UNITS.values(), *_OTHER]
    return re.compile(rf"\s?-?\s?(?P<unit>{'|'.join(parts)})(?![{_WORD}/²])", re.IGNORECASE)


def unit_after(text: str, place: int, units: Collection[str]) -> tuple[str, int] | None:
    """The unit that stands at `place`, in one way of writing, and where it ends; None: none is known there."""
    found = _unit_pattern(tuple(sorted(units))).match(text, place)
    return (one_unit(found["unit"]), found.end()) if found else None


@lru_cache(maxsize=1024)
def one_unit(written: str) -> str:
    """One way to write a unit.

    >>> one_unit("beats/min"), one_unit("bpm"), one_unit("μmol/L")
    ('/min', '/min', 'umol/l')
    """
    for name, forms in _UNITS.items():
        if re.fullmatch(forms, written.strip(), re.IGNORECASE):
            return name
    return re.sub(r"\s", "", written).lower().replace("µ", "u").replace("μ", "u")


def is_clinical(unit: str) -> bool:
    """Whether a unit, as `one_unit` writes it, is one of a laboratory or monitor."""
    return unit in {one_unit(word) for word in _CLINICAL} | {"mmhg", "mmol/l", "mg/dl", "umol/l", "10^9/l", "/min", "c"}
