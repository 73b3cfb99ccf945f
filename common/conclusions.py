r"""What a text concludes about the options: which it keeps, which it rules out, by letter or by value.

Runs where reasoning is audited (common/reasoning.py). Enters: a completion and its question's options. English only: in
another language next to nothing is found, so next to nothing is flagged.
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
        start, end: of its sentence in the text.
        option: index of the option.
        keeps: it is the answer; False: it is ruled out.
        by: how the option is named, "letter" or "value".
    """

    start: int
    end: int
    option: int
    keeps: bool
    by: str


def _one_of(*forms: str) -> str:
    return "(?:" + "|".join(forms) + ")"


# Before an option: it is kept.
_ANSWER_IS = _one_of(
    r"\b(?:answer|choice|option|guess|pick|selection|estimate|value)\s+(?:here\s+)?"
    r"(?:is|would be|must be|should be|has to be)\s*:?\s*(?:therefore |thus |probably |most likely |likely )?",
    r"\b(?:answer|choice)\s*[:=]\s*",
    r"\b(?:choose|chose|pick|select|selected|go with|going with|settle on|opt for|prefer|favou?rs?|answer with|makes|"
    r"left with|leav(?:es?|ing)(?: us| me)?(?: only)?(?: with)?|points? (?:me |us )?to(?:wards?)?|supports?|suggests?|"
    r"indicates?|conclude(?: with| that it is)?|match(?:es)?)\s+(?:only |just )?",
)
_SO = r"^\W*(?:so|therefore|thus|hence|then|accordingly|consequently|overall)[,:]?\s+(?:it is |it's |it must be )?"
_KEPT = _one_of(_ANSWER_IS, _SO, r"\bonly\s+")
_ARTICLE = r"(?:the\s+)?(?:options?|choices?|answers?|letter)?\s*:?\s*$"
_BRACKET = r"\s*(?:\([^)]*\)\s*)?"
# After an option: it is kept.
_KEEPS = _BRACKET + _one_of(
    r"(?:is|was|seems|appears|looks|would be|must be|remains)(?: to be)?\s+(?:the |a |by far )*"
    + _one_of(
        r"(?:only|best|right|correct|closest|answer|likeliest|left|most)\b",
        r"(?:most|more) (?:likely|plausible|probable|consistent|reasonable|appropriate|fitting)",
        r"likely(?! (?:too|wrong))",
        r"plausible answer",
    ),
    r"remains",
    r"fits? (?:the )?(?:best|well|everything)",
    r"(?:agrees|works) best",
    r"it is\b",
    r"stands out",
)
# Before and after an option: it is ruled out.
_RULED_OUT = _one_of(
    r"\b(?:rul(?:e[sd]?|ing) out|eliminat(?:e[sd]?|ing)|exclud(?:e[sd]?|ing)|discard(?:ed|ing)?|reject(?:ed|ing)?|"
    r"dismiss(?:ed|ing)?|cross(?:ed)? out)\s+",
    r"\b(?:not|isn't|cannot be|can't be|never)\s+",
)
_FAILS = _BRACKET + _one_of(
    r"(?:can|could|may|must|should|has|have|is|are|was|seems?|appears?|looks?|would be|will)\s+"
    r"(?:safely |also |therefore |thus |clearly |far |much |way |very |highly |just |simply |quite )*"
    + _one_of(
        r"(?:be |been )?(?:ruled out|eliminated|excluded|discarded|rejected|dismissed)",
        r"(?:unlikely|implausible|impossible|improbable|incorrect|wrong|inconsistent|incompatible|unreasonable)",
        r"too (?:low|high|small|large|big|extreme|long|short|old|young|much|little)",
        r"out of (?:the )?(?:question|range)",
        r"off the table",
        r"out\b",
        r"the least",
        r"not\b",
    ),
    r"(?:does|do|did|can|would|could|is|are)(?: not|n't) ",
    r"cannot ",
    r"can't ",
    r"makes? no sense",
    r"fails? ",
)
_HEDGED = re.compile(r"\b(?:if|could be|may be|might be|whether|possibly|perhaps)\b", re.IGNORECASE)
_TURNS = re.compile(
    r"\b(?:so|therefore|thus|hence|answer|conclu\w+|likely|probabl[ey]|plausible|estimate\w*|guess|must|best|closest|"
    r"nearest|expect|settle|choose)\b",
    re.IGNORECASE,
)
_IS = re.compile(
    r"\b(?:is|be|at|as|:|to)\s+(?:therefore |thus |probably |most likely |likely |about |around |approximately |the )*"
    r"$",
    re.IGNORECASE,
)


def verdicts(text: str, record: Record) -> list[Verdict]:
    """Judgements of options, in order of their sentences.

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
        inside = [
            (name.start - start, name.end - start, record.target.name in name.features)
            for name in names
            if name.level is None and start <= name.start < end
        ]
        valued = [] if _HEDGED.search(sentence) else _by_value(sentence, record, inside)
        valued += _of_death(sentence, record)
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
        named = re.search(r"(?:option|choice|answer(?: is)?|letter)\s*:?\s*$", before, re.IGNORECASE)
        keeps, fails = (re.match(form, after, re.IGNORECASE) for form in (_KEEPS, _FAILS))
        if match[0] == "A" and re.match(r"\s+[A-Za-z]", after) and not (named or keeps or fails):
            continue  # the article
        alone = not before.strip(" -–>:(") and re.fullmatch(r"[.):\s]*", after)
        if fails or _ends(before, _RULED_OUT):
            found += [Verdict(0, len(sentence), letter, False, "letter") for letter in letters]
        elif (keeps or alone or _ends(before, _KEPT)) and len(letters) == 1 and not _HEDGED.search(before):
            found.append(Verdict(0, len(sentence), letters[0], True, "letter"))
    return found


def _ends(before: str, form: str) -> bool:
    return re.search(form + _ARTICLE, before, re.IGNORECASE) is not None


def _by_value(sentence: str, record: Record, names: list[tuple[int, int, bool]]) -> list[Verdict]:
    """Verdicts by value.

    `names` are (start, end, of the target) of names in the sentence: their own numbers ("day 1") are no values, and a
    value after the name of another feature is that one's.
    """
    found: list[Verdict] = []
    unit = record.target.unit
    for start, end, option in _values(sentence, record):
        before_it = [name for name in names if name[0] < start]
        if before_it and (start < before_it[-1][1] or not before_it[-1][2]):
            continue
        before, after = sentence[:start], sentence[end:]
        if unit:
            after = re.sub(rf"^\s*{re.escape(unit)}", "", after, flags=re.IGNORECASE)
        if re.match(_FAILS, after, re.IGNORECASE):
            found.append(Verdict(0, len(sentence), option, False, "value"))
            continue
        if re.search(_SO + "$", before, re.IGNORECASE) and not after.strip(" .!)"):
            found.append(Verdict(0, len(sentence), option, True, "value"))
            continue
        linked = _ends(before, _ANSWER_IS) or _IS.search(before) or re.search(r"[A-J]\)?\s*[(:,.–=-]\s*$", before)
        if (linked and _TURNS.search(before)) or re.match(_KEEPS, after, re.IGNORECASE):
            found.append(Verdict(0, len(sentence), option, True, "value"))
    return found


_DIED = re.compile(
    r"\b(?:patient|he|she|they)\s+(?:has |had |have |will |would |most likely |likely |probably |therefore |also )*"
    r"(?P<what>did(?: not|n't) die|did(?: not|n't) survive|died|die|passed away|survived|survive)\b",
    re.IGNORECASE,
)


def _of_death(sentence: str, record: Record) -> list[Verdict]:
    """The commonest outcome is concluded without its label: "the patient died"."""
    if not re.search(r"\bdie\b", record.target.question or "") or _IF.search(sentence):
        return []
    found: list[Verdict] = []
    for match in _DIED.finditer(sentence):
        died = match["what"].lower() in ("died", "die", "passed away") or "survive" in match["what"][5:].lower()
        same = [index for index, option in enumerate(record.options) if option.lower() == ("yes" if died else "no")]
        found += [Verdict(0, len(sentence), index, True, "value") for index in same]
    return found


_IF = re.compile(r"\b(?:if|whether|could|may|might|patients)\b", re.IGNORECASE)


def _values(sentence: str, record: Record) -> list[tuple[int, int, int]]:
    """(start, end, option) of option values in a sentence that name exactly one option."""
    result: list[tuple[int, int, int]] = []
    if record.target.kind == "number":
        for number in NUMBER.finditer(sentence):
            values = {value for value, _ in readings(number[0])}
            same = [index for index, option in enumerate(record.options) if float(option) in values]
            if len(same) == 1:
                result.append((number.start(), number.end(), same[0]))
        return result
    taken = bytearray(len(sentence))
    for index, option in sorted(enumerate(record.options), key=lambda item: -len(item[1])):
        word = re.escape(option)
        if option.lower() in ("no", "yes"):
            word += r"(?=\s*(?:[.,;:)\]\"'?!]|$|\bis\b|\bseems\b|\bwould\b))"
        for match in re.finditer(rf"(?<!\w){word}(?!\w)", sentence, re.IGNORECASE):
            if not any(taken[match.start() : match.end()]):
                taken[match.start() : match.end()] = b"\1" * (match.end() - match.start())
                result.append((match.start(), match.end(), index))
    return sorted(result)
