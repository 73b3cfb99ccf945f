r"""What a text concludes about the options: which it keeps, which it rules out, by letter or by value.

Runs where reasoning is audited (common/reasoning.py). Enters: a completion and its question's options. English only: in
another language nothing is found, so nothing is flagged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .mentions import NUMBER, find_mentions, plain, readings, sentences
from .question import LETTERS
from .record import Record


@dataclass(frozen=True)
class Verdict:
    """One judgement of one option.

    Attributes:
        start, end: in the text.
        option: index of the option.
        keeps: it is the answer; False: it is ruled out.
        by: how the option is named, "letter" or "value".
    """

    start: int
    end: int
    option: int
    keeps: bool
    by: str


_KEEP_BEFORE = (
    r"\b(?:answer|choice|option|guess|pick|selection|estimate|value)\s+(?:here\s+)?(?:is|would be|must be|should be|has to "
    r"be)\s*:?\s*(?:therefore |thus |probably |most likely |likely )?",
    r"\b(?:answer|choice)\s*[:=]\s*",
    r"\b(?:choose|pick|select|go with|going with|settle on|opt for|prefer|favou?rs?|answer with|answer is|left with|"
    r"leaves?(?: us| me)?(?: only)?(?: with)?|leaving(?: us| me)?(?: only)?(?: with)?|points? (?:me |us )?to(?:wards?)?|"
    r"supports?|suggests?|indicates?|makes|conclude(?: with| that it is)?|chose|selected|match(?:es)?)\s+(?:only |just )?",
    r"^\W*(?:so|therefore|thus|hence|then|accordingly|consequently|overall)[,:]?\s+(?:it is |it's |it must be )?",
    r"\bonly\s+",
)  # fmt: skip
_ARTICLE = r"(?:the\s+)?(?:options?|choices?|answers?|letter)?\s*:?\s*"
_KEEP_AFTER = (
    r"\s*(?:\([^)]*\)\s*)?(?:(?:is|was|seems|appears|looks|would be|must be|remains)(?: to be)?\s+(?:the |a |by far )*(?:only|best|"
    r"(?:most|more) (?:likely|plausible|probable|consistent|reasonable|appropriate|fitting)|most|right|correct|closest|answer|likeliest|"
    r"likely(?! (?:too|wrong))|left|plausible answer)|remains|fits? (?:the )?(?:best|well|everything)|agrees best|works best|"
    r"it is\b|stands out)"
)
_DROP_BEFORE = (
    r"\b(?:rul(?:e[sd]?|ing) out|eliminat(?:e[sd]?|ing)|exclud(?:e[sd]?|ing)|discard(?:ed|ing)?|reject(?:ed|ing)?|"
    r"dismiss(?:ed|ing)?|cross(?:ed)? out)\s+",
    r"\b(?:not|isn't|cannot be|can't be|never)\s+",
)
_BAD = (
    r"(?:(?:be |been )?(?:ruled out|eliminated|excluded|discarded|rejected|dismissed)|unlikely|implausible|impossible|improbable|"
    r"incorrect|wrong|inconsistent|incompatible|unreasonable|too (?:low|high|small|large|big|extreme|long|short|old|young|much|"
    r"little)|out of (?:the )?(?:question|range)|off the table|out\b|the least|not (?:the|a|plausible|possible|likely|correct|right|"
    r"consistent|compatible|it)\b|not\b)"
)
_DROP_AFTER = (
    r"\s*(?:\([^)]*\)\s*)?(?:(?:can|could|may|must|should|has|have|is|are|was|seems?|appears?|looks?|would be|will)\s+"
    r"(?:safely |also |therefore |thus |clearly |far |much |way |very |highly |just |simply |quite )*" + _BAD + r"|(?:does|do|did|can|"
    r"would|could|is|are)(?: not|n't) |cannot |can't |makes? no sense|fails? )"
)  # fmt: skip
_HEDGED = re.compile(r"\b(?:if|could be|may be|might be|whether|possibly|perhaps)\b", re.IGNORECASE)
_TURNS = re.compile(r"\b(?:so|therefore|thus|hence|answer|conclu\w+|likely|probabl[ey]|plausible|estimate\w*|guess|must|best|"
                    r"closest|nearest|expect|settle|choose)\b", re.IGNORECASE)  # fmt: skip


def verdicts(text: str, record: Record) -> list[Verdict]:
    """Judgements of options, in order; at most one of a place and option.

    Args:
        text: the completion up to its (last) box.
        record: its question's.
    """
    text = plain(text)
    names = find_mentions(text, record.features)
    found: list[Verdict] = []
    for start, end in sentences(text):
        sentence = text[start:end]
        if sentence.rstrip().endswith("?"):
            continue
        named = _by_letter(sentence, len(record.options))
        valued = [] if _HEDGED.search(sentence) else _by_value(sentence, record, {p - start for m in names if m.level is None for p in range(m.start, m.end)})
        kept = {verdict.option for verdict in named if verdict.keeps}
        # "The answer is B (4.2)": a letter with the value of another option is a verdict on both.
        valued = [verdict for verdict in valued if not (verdict.keeps and verdict.option in kept)]
        found += [Verdict(start + v.start, start + v.end, v.option, v.keeps, v.by) for v in (*named, *valued)]
    return sorted(found, key=lambda verdict: (verdict.start, verdict.end))


def _by_letter(sentence: str, n: int) -> list[Verdict]:
    one = rf"\(?[A-{LETTERS[n - 1]}]\)?(?!-?[A-Za-z0-9'])"
    several = rf"{one}(?:\s*(?:,|and|or|&|/|, and|, or)\s*(?:options?\s+|choices?\s+)?{one})*"
    found: list[Verdict] = []
    for match in re.finditer(rf"(?<![A-Za-z0-9'°\\])(?<!\d )(?<!° ){several}", sentence):
        letters = [LETTERS.index(letter) for letter in re.findall(r"(?<![A-Za-z])[A-J](?![A-Za-z])", match[0])]
        before, after = sentence[: match.start()], sentence[match.end() :]
        if (
            match[0] == "A"
            and re.match(r"\s+[a-z]", after)
            and re.search(_KEEP_AFTER + "|" + _DROP_AFTER, after) is None
        ):
            continue  # the article
        dropped = _ends(before, _DROP_BEFORE) or re.match(_DROP_AFTER, after, re.IGNORECASE)
        kept = _ends(before, _KEEP_BEFORE) or re.match(_KEEP_AFTER, after, re.IGNORECASE)
        alone = not before.strip(" -–>:(") and re.fullmatch(r"[.):\s]*", after)
        if dropped:
            found += [Verdict(0, len(sentence), letter, False, "letter") for letter in letters]
        elif (kept or alone) and len(letters) == 1 and not _HEDGED.search(before):
            found.append(Verdict(0, len(sentence), letters[0], True, "letter"))
    return found


def _ends(before: str, forms: tuple[str, ...]) -> bool:
    return any(re.search(form + _ARTICLE + "$", before, re.IGNORECASE) for form in forms)


def _by_value(sentence: str, record: Record, named: set[int]) -> list[Verdict]:
    """Verdicts by value; `named` are the places of labels, whose own numbers ("day 1") are no values."""
    found: list[Verdict] = []
    for start, end, option in _values(sentence, record):
        if start in named:
            continue
        before, after = sentence[:start], sentence[end:]
        unit = record.target.unit
        if unit:
            after = re.sub(rf"^\s*{re.escape(unit)}", "", after, flags=re.IGNORECASE)
        if re.match(_DROP_AFTER, after, re.IGNORECASE):
            found.append(Verdict(0, len(sentence), option, False, "value"))
            continue
        linked = _ends(before, _KEEP_BEFORE[:3]) or re.search(
            r"\b(?:is|be|at|as|:|to)\s+(?:therefore |thus |probably |most likely |likely |about |around |approximately |the )*$",
            before,
            re.IGNORECASE,
        )
        if (linked and _TURNS.search(before)) or re.match(_KEEP_AFTER, after, re.IGNORECASE):
            found.append(Verdict(0, len(sentence), option, True, "value"))
        elif re.search(rf"[A-J]\)?\s*[(:,.–=-]\s*$", before) and _TURNS.search(before):
            found.append(Verdict(0, len(sentence), option, True, "value"))
    return found


def _values(sentence: str, record: Record) -> list[tuple[int, int, int]]:
    """(start, end, option) of option values in a sentence that name exactly one option."""
    if record.target.kind == "number":
        places = [(number.start(), number.end(), number[0]) for number in NUMBER.finditer(sentence)]
        result: list[tuple[int, int, int]] = []
        for start, end, written in places:
            same = [
                index
                for index, option in enumerate(record.options)
                if any(abs(value - float(option)) < 1e-9 for value, _ in readings(written))
            ]
            if len(same) == 1:
                result.append((start, end, same[0]))
        return result
    result, taken = [], bytearray(len(sentence))
    for index, option in sorted(enumerate(record.options), key=lambda item: -len(item[1])):
        word = re.escape(option)
        if option.lower() in ("no", "yes"):
            word += r"(?=\s*(?:[.,;:)\]\"'?!]|$|\bis\b|\bseems\b|\bwould\b))"
        for match in re.finditer(rf"(?<!\w){word}(?!\w)", sentence, re.IGNORECASE):
            if not any(taken[match.start() : match.end()]):
                taken[match.start() : match.end()] = b"\1" * (match.end() - match.start())
                result.append((match.start(), match.end(), index))
    return sorted(result)
