r"""Automatic flags of one completion: does what it says fit the record, and does its answer follow from it.

Runs where questions and completions are: at a hospital over its own patients, or over an open or synthetic registry.
Enters: a question's record (common/record.py) and the completion. A flag's span and reason quote both, so flags of a
hospital's own questions stay in that hospital's own report; only those over open or synthetic registries may be shown
to experts elsewhere. How many there are of each kind is a count like others.

Rules without a model: cheap, repeatable, and blind where words fail them. They find what is stated plainly. They do not
find a wrong inference, a synonym that is no part of the dictionary ("renal failure" for "Chronic renal disease"), a
statement by pronoun ("it was 88"), a value spelled out ("sixty"), or one converted into another unit. Names and numbers
are matched in any language, as labels keep the dictionary's own; conclusions, hedges and negations are English: in
another language `answer_does_not_follow` finds next to nothing, and a weighed value may be taken for a stated one. How
well they do on planted truths is measured by benchmarks/reasoning_audit.py; on a model's own text a flag is a reason to
read it, no verdict.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from .claims import Claim, claims, negative_level
from .conclusions import Verdict, verdicts
from .dictionary import Feature
from .mentions import agrees, core, has_qualifier, one_unit, plain, sentences
from .question import LETTERS, PromptTemplate, boxes, parse_answer, prefill
from .record import Record, unit

Kind = Literal["contradicts_record", "invented_value", "answer_does_not_follow", "leaked_letters", "no_reasoning"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FEWEST_WORDS = 5  # beside the box and "the answer is"; fewer are no reasoning
REPEATS = 4  # so many times the same words one after the other are a loop


@dataclass(frozen=True)
class Flag:
    """One finding.

    Attributes:
        kind: which.
        start, end: of the words that show it in the completion, characters; the whole text where they are nowhere.
        reason: in a few words, made by rules; it quotes the record.
    """

    kind: Kind
    start: int
    end: int
    reason: str


def audit(
    record: Record, text: str, *, chosen: int | None = None, template: PromptTemplate | None = None
) -> list[Flag]:
    """All flags of one completion, in the order of the text.

    Args:
        record: what its question showed.
        text: the assistant's turn, with or without the template's cue.
        chosen: index of the option it was scored with, where that is another than its own box says (a forced answer);
            None: read from the text.
        template: the prompt; its cue is no reasoning of the model. None: the text has none.
    """
    cue = prefill(template, reasoning=True) if template is not None else ""
    skipped = len(cue) if cue and text.startswith(cue) else 0
    own = text[skipped:]
    if chosen is None:
        chosen = parse_answer(own, len(record.options))
    flags = _no_reasoning(own, record)
    if not any(flag.kind == "no_reasoning" and "repeated" not in flag.reason for flag in flags):
        flags += _letter_first(own, record)
    flags += _boxes(own, record)
    flags += _statements(own, record)
    if chosen is not None and chosen >= 0:
        flags += _follows(own, record, chosen)
    flags.sort(key=lambda flag: (flag.start, flag.end))
    flags = list({(flag.kind, flag.reason): flag for flag in reversed(flags)}.values())[::-1]  # said twice: the first
    return [Flag(flag.kind, flag.start + skipped, flag.end + skipped, flag.reason) for flag in flags]


# --- statements ---------------------------------------------------------------------------------------------------

_GIVEN = re.compile(
    r"\b(?:records?|chart|notes?|file|data|table|documents?|documentation)\s+(?:also\s+|clearly\s+)?(?:shows?|"
    r"says?|states?|"
    r"lists?|reports?|gives?|notes?|mentions?|puts|has|indicates?|reads?)\b|\b(?:recorded|documented|reported|"
    r"listed|given|noted|"
    r"stated|charted|measured)\b|\baccording to\b|\bwe (?:are told|know|see|read)\b|\b(?:from|in|"
    r"per) the (?:records?|notes?|"
    r"chart)\b",
    re.IGNORECASE,
)
_PREMISE = re.compile(
    r"\b(?:given|since|because(?: of)?|due to|considering|in view of|based on|as)\s+(?:that\s+)?(?:(?:the|a|an|"
    r"his|her|their|this|"
    r"patient's|known|high|low|elevated)\s+)*$",
    re.IGNORECASE,
)
_CONCLUDES = re.compile(
    r"\b(?:so|therefore|thus|hence|answer|conclu\w+|best|closest|guess|estimate\w*)\b", re.IGNORECASE
)


def _statements(text: str, record: Record) -> list[Flag]:
    text = plain(text)
    flags: list[Flag] = []
    for claim in claims(text, record.features):
        flag = _judge(claim, text, record)
        if flag is not None:
            flags.append(flag)
    return flags


def _judge(claim: Claim, text: str, record: Record) -> Flag | None:
    """The flag of one statement; None: the record bears it out, or it cannot be told."""
    said = " ".join(text[claim.start : claim.end].split())
    if not claim.features:
        return _of_no_feature(claim, said, record)
    names = _narrowed(claim, text, record)
    target = record.target.name
    shown = [name for name in names if name in record.values]
    if claim.kind == "yes" and claim.value == "no":  # the feature of that name says more than a level of another
        shown = [name for name in shown if not _has_level(record.features[name], claim.level)] or shown
    if any(_agrees(claim, record.features[name], record.values[name]) for name in shown):
        return None
    if target in names:
        if _as_given(claim, text):
            return Flag("invented_value", claim.start, claim.end, f"'{said}': given as known, but it is what is asked")
        if not shown or _is_option(claim, record):
            return None  # an option weighed, or the conclusion
    if _supported(claim, record):
        return None
    if shown:
        feature = record.features[shown[0]]
        value = record.values[shown[0]]
        return Flag("contradicts_record", claim.start, claim.end, f"'{said}': the record says {feature.label}: {value}")
    if target in names or (claim.kind == "yes" and claim.value == "no" and claim.level is not None):
        return None
    label = record.features[names[0]].label
    return Flag("invented_value", claim.start, claim.end, f"'{said}': the record does not show {label}")


def _narrowed(claim: Claim, text: str, record: Record) -> tuple[str, ...]:
    """Of features that one name may mean, those of the only qualifier that the sentence names."""
    if len(claim.features) < 2:
        return claim.features
    sentence = text[slice(*claim.sentence)]
    named = tuple(name for name in claim.features if has_qualifier(sentence, record.features[name]))
    return named if len(named) == 1 else claim.features


def _agrees(claim: Claim, feature: Feature, value: str) -> bool:
    if claim.kind == "number":
        number = re.match(_LEADING, value)
        return number is not None and agrees(claim.value, number[0], roughly=claim.roughly)
    if claim.kind == "level":
        return value.lower() == claim.value.lower()
    if _has_level(feature, claim.level):
        return (value.lower() == str(claim.level).lower()) == (claim.value == "yes")
    return (value == negative_level(feature)) == (claim.value == "no")


_LEADING = r"-?\d+(?:\.\d+)?"


def _has_level(feature: Feature, level: str | None) -> bool:
    return level is not None and any(other.lower() == level.lower() for other in feature.levels.values())


def _is_option(claim: Claim, record: Record) -> bool:
    """Whether what is stated is one of the values offered."""
    if claim.kind != "number":
        return True
    numbers = [number[0] for option in record.options if (number := re.match(_LEADING, option))]
    return any(agrees(claim.value, number) for number in numbers)


def _as_given(claim: Claim, text: str) -> bool:
    """Whether the sentence says that the record has it, or goes on from it as from something known."""
    start, end = claim.sentence
    if _CONCLUDES.search(text[start:end]):
        return False
    return _GIVEN.search(text[start:end]) is not None or _PREMISE.search(text[start : claim.start]) is not None


def _supported(claim: Claim, record: Record) -> bool:
    """Whether other words of the record say so: "sepsis" where a diagnosis is "multi-organ failure with sepsis"."""
    if claim.kind != "yes":
        return False
    feature = record.features[claim.features[0]]
    said = set(_telling(claim.level or core(feature)))
    for name, value in record.values.items():
        other = record.features[name]
        if name in claim.features and not _has_level(other, claim.level):
            continue
        there = value != negative_level(other)
        words = set(_telling(value if negative_level(other) is None else core(other)))
        if said and said <= words and there == (claim.value == "yes"):
            return True
    return False


def _telling(words: str) -> list[str]:
    return [word for word in re.findall(r"[a-z0-9]{3,}", words.lower()) if word not in ("diagnosis", "history", "the")]


def _of_no_feature(claim: Claim, said: str, record: Record) -> Flag | None:
    """A number of something that the dictionary has not under this name; it may be a synonym of what is shown."""
    target = set(_telling(record.target.label))
    if target & set(_telling(said)) or _is_option(claim, record):
        return None
    for name, value in record.values.items():
        number, its_unit = re.match(_LEADING, value), record.features[name].unit or ""
        if number is None or (claim.unit and one_unit(its_unit) != claim.unit):
            continue
        if agrees(claim.value, number[0], roughly=claim.roughly):
            return None
    return Flag("invented_value", claim.start, claim.end, f"'{said}': the record shows nothing of that name or value")


# --- the answer ---------------------------------------------------------------------------------------------------


def _follows(text: str, record: Record, chosen: int) -> list[Flag]:
    """Whether the last conclusion before the box names the boxed option."""
    found = boxes(text)
    before = text[: found[-1][0]] if found else text
    judged = sorted([*verdicts(before, record), *_stated(before, record)], key=lambda verdict: verdict.start)
    letter = LETTERS[chosen]
    kept = [verdict for verdict in judged if verdict.keeps]
    if kept:
        last = [verdict for verdict in kept if verdict.start == kept[-1].start]
        other = next((verdict for verdict in last if verdict.option != chosen), None)
        if other is not None and not _one_of_each(last, chosen):
            why = f"concludes option {LETTERS[other.option]} by its {other.by}, but the answer is {letter}"
            return [Flag("answer_does_not_follow", other.start, other.end, why)]
    mine = [verdict for verdict in judged if verdict.option == chosen]
    ruled_out = {verdict.option for verdict in judged if not verdict.keeps}
    if mine and not mine[-1].keeps and len(ruled_out) < len(record.options):
        if kept and kept[-1].option == chosen:
            return []
        why = f"rules out option {letter}, keeps another, but answers {letter}"
        return [Flag("answer_does_not_follow", mine[-1].start, mine[-1].end, why)]
    return []


def _stated(text: str, record: Record) -> list[Verdict]:
    """Plain statements of what is asked: "the patient had sepsis", "the masked value of Sodium is 131"."""
    text = plain(text)
    found: list[Verdict] = []
    for claim in claims(text, record.features):
        if _narrowed(claim, text, record) != (record.target.name,):
            continue
        named = [index for index, option in enumerate(record.options) if _agrees(claim, record.target, option)]
        if len(named) == 1:
            found.append(Verdict(*claim.sentence, named[0], True, "value"))
    return found


def _one_of_each(last: Sequence[Verdict], chosen: int) -> bool:
    """One sentence keeps two options by letter, the chosen one among them: no single conclusion."""
    return all(verdict.by == "letter" for verdict in last) and any(verdict.option == chosen for verdict in last)


# --- letters and emptiness ----------------------------------------------------------------------------------------

_LEAD = (
    r"\W*(?i:(?:(?:the|my)\s+)?(?:(?:correct|right|best|final|most likely)\s+)*"
    r"(?:(?:answer|option|choice)\b\s*(?:is\b|:|=)?\s*)?(?:option\s+)?)"
)
_ALONE = re.compile(_LEAD + r"\(?(?P<letter>[A-J])\)?(?!-?[A-Za-z0-9'])(?P<rest>[^\n]*)")
_NAMED = re.compile(
    r"\b(?i:options?|choices?|answers?)\s*(?:is|are|:|=|would be|"
    r"must be)?\s*\(?(?P<letter>[A-Z])\)?(?!-?[A-Za-z0-9'])"
    r"(?!(?<=I)\s+(?!is\b|fits\b|seems\b|looks\b|can\b|would\b)[a-z])"  # "the option I choose"
)
_ANSWER_WORDS = re.compile(
    r"\b(?:so|therefore|thus|hence|the|my|final|correct|best|answer|option|choice|is|it|must|be|step)\b|\b[A-J]\b",
    re.IGNORECASE,
)


def _words(text: str, record: Record) -> int:
    """Words that are neither a box nor the phrase before one, nor an option read out after its letter."""
    for start, end, _ in reversed(boxes(text)):
        text = text[:start] + " " + text[end:]
    offered = "|".join(map(re.escape, record.options))
    text = re.sub(rf"(?<![A-Za-z])[A-J][.):]\s+(?:{offered})(?:{re.escape(unit(record.target))})?(?!\w)", " ", text)
    return len(re.findall(r"[^\W\d_]{2,}|\d+(?:[.,]\d+)?", _ANSWER_WORDS.sub(" ", plain(text))))


def _letter_first(text: str, record: Record) -> list[Flag]:
    """The answer's letter before any reason for it; a text without a reason is `no_reasoning` instead."""
    why = "the answer's letter comes before any reasoning"
    found = boxes(text)
    if found and _words(text[: found[0][0]], record) < FEWEST_WORDS:
        return [Flag("leaked_letters", found[0][0], found[0][1], why)] if _words(text, record) >= FEWEST_WORDS else []
    line = plain(text)
    match = _ALONE.match(line)
    if match is None:
        return []
    index, rest = LETTERS.index(match["letter"]), match["rest"]
    phrase = re.search(
        r"\b(?:answer|option|choice)\b", match[0][: match.start("letter") - match.start()], re.IGNORECASE
    )
    if index >= len(record.options):
        return []
    if phrase:
        if "option" in phrase[0].lower() and re.match(r"\s*(?:\([^)]*\)|is|seems|would|can|could|looks)\b", rest):
            return []  # "Option A is low, …" weighs
    elif (
        not re.match(r"\s*(?:[.:)–-]|$|because\b|since\b|is\b|as\b)", rest)  # "A 65-year-old man"
        or index != parse_answer(text, len(record.options))
        or re.search(rf"\n\W*(?!{match['letter']})[A-J][.):]", line)  # the options, one after another
    ):
        return []
    return [Flag("leaked_letters", match.start("letter"), match.end("letter"), why)]


def _boxes(text: str, record: Record) -> list[Flag]:
    """Several boxes, several letters in one, and letters that no option has."""
    flags: list[Flag] = []
    n = len(record.options)
    found = boxes(text)
    contents = [re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", content.upper()) for _, _, content in found]
    if len({letters[0] for letters in contents if letters}) > 1:
        flags.append(Flag("leaked_letters", found[0][0], found[-1][1], f"{len(found)} boxes with different letters"))
    for (start, end, content), letters in zip(found, contents, strict=True):
        if re.fullmatch(r"\(?[A-Ja-j]\)?(?:\s*(?:,|/|;|and|or|&)\s*\(?[A-Ja-j]\)?)+", content):
            flags.append(Flag("leaked_letters", start, end, f"one box with {len(letters)} letters"))
        elif re.fullmatch(r"\(?[A-Za-z]\)?(?:[.:)].*)?", content) and letters[0] not in LETTERS[:n]:
            flags.append(Flag("leaked_letters", start, end, f"letter {letters[0]} is none of the {n} options"))
    for match in _NAMED.finditer(plain(text)):
        if match["letter"] not in LETTERS[:n]:
            why = f"letter {match['letter']} is none of the {n} options"
            flags.append(Flag("leaked_letters", match.start(), match.end(), why))
    return flags


def _no_reasoning(text: str, record: Record) -> list[Flag]:
    if _words(text, record) < FEWEST_WORDS:
        return [Flag("no_reasoning", 0, len(text), "hardly a word beside the answer")]
    loop = _LOOP.search(text)
    if loop and len(loop[0]) >= 40:
        return [Flag("no_reasoning", loop.start(), loop.end(), "the same words, repeated")]
    places: dict[str, list[tuple[int, int]]] = {}
    for start, end in sentences(text):
        words = re.sub(r"[\W\d]+", " ", text[start:end]).strip().lower()
        if len(words) >= 8:
            places.setdefault(words, []).append((start, end))
    again = [place for same in places.values() if len(same) > 1 for place in same]
    if len(again) >= REPEATS and sum(map(len, places.values())) >= 2 * len(places):
        return [Flag("no_reasoning", min(again)[0], max(again)[1], "the same sentences, repeated")]
    return []


_LOOP = re.compile(rf"(?P<part>\S[^\n]{{3,200}}?\s*)(?:(?P=part)){{{REPEATS - 1},}}")
