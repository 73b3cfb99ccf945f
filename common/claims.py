r"""What a text states about the patient: this feature has this value.

Runs where reasoning is audited (common/reasoning.py). Enters: a completion and the features that it may speak of; what
comes out quotes the completion.

A statement is a name and a value that stand together in one sentence as people write it: with "is", "of", ":", "=",
"at", in parentheses, or with a few words between; of a yes/no feature also "has", "no", "without", "history of". What
only weighs, asks, expects or generalises is none: questions, "if", "would", "may", "usually", "normal is", "patients
with", comparisons and ranges. These words are English; in another language names, numbers and levels are found by
nearness alone, so that its hedges and negations are taken for statements (see `common/reasoning.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .dictionary import Feature
from .mentions import NEGATIVE, NUMBER, POSITIVE, Mention, find_mentions, is_clinical, one_unit, sentences, unit_after
from .phrases import (
    ABOUT,
    AFFIRMS,
    AFTER,
    AGE,
    BREAKS,
    COMMA,
    COMPARED,
    DENIES,
    MAY_BE,
    NO_VALUE,
    NOT_SAID,
    OF_NAME,
    PERSON,
    SAYS,
    UNKNOWN,
    UNKNOWN_BEFORE,
)

GAP = 64  # most characters between a name and its value
GAP_WORDS = 7


@dataclass(frozen=True)
class Claim:
    """One statement.

    Attributes:
        start, end: of name and value in the text.
        features: which features it may be about; empty: a quantity that the dictionary does not have.
        kind: "number": `value` as written; "level": `value` is a level as the dictionary writes it; "yes": the thing
            is there (`value` "yes") or not ("no").
        value: what is stated.
        unit: after a number, as `mentions.one_unit` writes it; empty: none.
        roughly: "about" and the like.
        sentence: (start, end) of the sentence it is in.
        level: of kind "yes": what is said to be there is this level of those features that have it.
    """

    start: int
    end: int
    features: tuple[str, ...]
    kind: Literal["number", "level", "yes"]
    value: str
    unit: str
    roughly: bool
    sentence: tuple[int, int]
    level: str | None = None


def claims(text: str, features: Mapping[str, Feature]) -> list[Claim]:
    """All statements of a text, in order.

    Args:
        text: as `mentions.plain` gives it.
        features: all features and outcomes of the dictionary by name.
    """
    return _Reader(text, features).read()


class _Reader:
    """One text; `used` are the places of numbers that have an owner."""

    def __init__(self, text: str, features: Mapping[str, Feature]) -> None:
        self.text, self.features = text, features
        self.units = {feature.unit for feature in features.values() if feature.unit}
        self.mentions = find_mentions(text, features)
        self.used: set[int] = set()

    def read(self) -> list[Claim]:
        found: list[Claim] = []
        for start, end in sentences(self.text):
            inside = [mention for mention in self.mentions if start <= mention.start < end]
            found += self._person(start, end)
            if self.text[start:end].rstrip().endswith("?"):
                continue
            open_: list[Mention] = []
            for index, mention in enumerate(inside):
                stop = inside[index + 1].start if index + 1 < len(inside) else end
                claim = self._right(mention, start, stop, end)
                if claim is not None:
                    found.append(claim)
                else:
                    open_.append(mention)
            for mention in open_:
                claim = self._left(mention, start, end) or self._there(mention, inside, start, end)
                if claim is not None:
                    found.append(claim)
            found += self._unnamed(start, end, inside)
        return sorted(found, key=lambda claim: claim.start)

    # --- a value after its name -----------------------------------------------------------------------------------

    def _right(self, mention: Mention, start: int, stop: int, end: int) -> Claim | None:
        """The claim of a name with its value after it, before the next name at `stop`."""
        before = re.sub(r"\bmasked value of\b", "", self.text[start : mention.start])
        if NOT_SAID.search(before) or UNKNOWN_BEFORE.search(before) or COMPARED.search(before):
            return None
        if any(self._scored(name) for name in mention.features):
            claim = self._level_right(mention, start, stop, end)
            if claim is not None:
                return claim
        numeric = self._numeric(mention)
        if numeric:
            for number in NUMBER.finditer(self.text, mention.end, min(stop, mention.end + GAP)):
                if NO_VALUE.search(self.text[mention.end : number.start()]):
                    continue
                gap = self.text[mention.end : number.start()]
                if re.search(r"\bnormal\s*$", before, re.I) and not re.match(r"\s*(?:\(|at|of)", gap):
                    return None
                if self._gap_holds(gap) and self._alone(number):
                    return self._number(mention, number, gap, numeric, start, end)
                return None
        return self._level_right(mention, start, stop, end)

    def _numeric(self, mention: Mention) -> tuple[str, ...]:
        """Of the features meant, those whose value is a number; a quantity of no feature counts as one."""
        if mention.level is not None:
            return ()
        names = tuple(name for name in mention.features if self.features[name].kind == "number" or self._scored(name))
        return names if mention.features else ("",)

    def _scored(self, name: str) -> bool:
        """A category with numbers for levels: "9", "0 (awake)"."""
        levels = self.features[name].levels.values()
        return bool(levels) and all(level[:1].isdigit() for level in levels)

    def _gap_holds(self, gap: str) -> bool:
        if len(re.findall(r"\w+", gap)) > GAP_WORDS or BREAKS.search(gap) or re.search(r"[<>≤≥?!]|\)\s*\S*\s*\w", gap):
            return False
        return "," not in gap or COMMA.search(gap) is not None

    def _alone(self, number: re.Match[str]) -> bool:
        """Not an end of a range, nor a bound."""
        after = self.text[number.end() : number.end() + 30]
        if re.match(r"\s*(?:[-–/]|to\b|and\b(?=\s*\d))\s*\d", after) and not re.match(r"/\s*min", after):
            return re.match(r"\s*/\s*(?:15|58|100|10|7)\b", after) is not None  # "12/15": out of a scale's best
        found = unit_after(self.text, number.end(), self.units)
        rest = self.text[found[1] : found[1] + 40] if found else self.text[number.end() : number.end() + 40]
        return re.match(r"\s*(?:[-–]|to\b)\s*\d", rest) is None and AFTER.match(rest) is None

    def _number(
        self, mention: Mention, number: re.Match[str], gap: str, numeric: tuple[str, ...], start: int, end: int
    ) -> Claim | None:
        self.used.add(number.start())
        found = unit_after(self.text, number.end(), self.units)
        unit, stop = found or ("", number.end())
        names = tuple(name for name in numeric if name)
        if unit and names:
            same = [n for n in names if (u := self.features[n].unit) is not None and one_unit(u) == unit]
            if not same:
                return None  # 88 of another thing, or converted
            names = tuple(same)
        if not names and unit and not is_clinical(unit) and unit != "%":
            return None
        span = sorted((mention.start, number.start()))
        return Claim(
            span[0],
            max(stop, mention.end),
            names,
            "number",
            number[0],
            unit,
            ABOUT.search(gap) is not None,
            (start, end),
        )

    def _level_right(self, mention: Mention, start: int, stop: int, end: int) -> Claim | None:
        """The claim of a name with a level after it, or with what says that it is there or not."""
        if mention.level is not None:
            return None
        after, limit = self.text[mention.end : end], min(stop - mention.end, GAP)
        if UNKNOWN.search(after[:GAP]):
            return None
        for name in mention.features:
            for level in sorted(self.features[name].levels.values(), key=len, reverse=True):
                if level.lower() in ("no", "yes"):
                    continue  # below, with other words that say so
                found = re.search(rf"(?<!\w){re.escape(level)}(?!\w)", after, re.IGNORECASE)
                if found and found.start() <= GAP and self._holds(after, found):
                    return self._claim(mention, mention.end + found.end(), "level", level, (start, end))
        if any(negative_level(self.features[name]) is not None for name in mention.features):
            found = SAYS.search(after)
            if found and found.end() <= limit and self._holds(after, found):
                turned = re.search(r"(?:\bnot|n't)\s+(?:\w+\s+)?$", after[: found.start()]) is not None
                denied = (found["yes"] is None) != turned  # "not absent" is there
                return self._claim(mention, mention.end + found.end(), "yes", "no" if denied else "yes", (start, end))
        return None

    def _holds(self, after: str, found: re.Match[str]) -> bool:
        """What stands between name and level links the two, and nothing after it takes it back."""
        gap = re.sub(r"\b(?:not|n't)\s*$", "", after[: found.start()])
        return self._gap_holds(gap) and not self._unsure(after[found.end() :])

    def _unsure(self, after: str) -> bool:
        return AFTER.match(after) is not None

    def _claim(
        self, mention: Mention, stop: int, kind: Literal["level", "yes"], value: str, sentence: tuple[int, int]
    ) -> Claim:
        return Claim(mention.start, stop, mention.features, kind, value, "", False, sentence, mention.level)

    # --- a value before its name ----------------------------------------------------------------------------------

    def _left(self, mention: Mention, start: int, end: int) -> Claim | None:
        """A number before its name ("at 88, the heart rate", "a value of 88 for the heart rate"), or a level."""
        before = self.text[start : mention.start]
        if NOT_SAID.search(before) or self._unsure(self.text[mention.end : end]):
            return None
        numeric = self._numeric(mention)
        numbers = list(NUMBER.finditer(self.text, start, mention.start)) if numeric else []
        if numbers and numbers[-1].start() not in self.used and self._alone(numbers[-1]):
            number = numbers[-1]
            found = unit_after(self.text, number.end(), self.units)
            between = self.text[found[1] if found else number.end() : mention.start]
            led = re.search(r"\b(?:at|with)\s+(?:about |around )?$", self.text[start : number.start()], re.IGNORECASE)
            if OF_NAME.match(between) or (
                led and re.match(r"\s*,\s*(?:the|his|her|their|this)\s+(?:patient's )?$", between, re.I)
            ):
                return self._number(mention, number, self.text[start : number.start()], numeric, start, end)
        for name in mention.features if mention.level is None else ():
            for level in self.features[name].levels.values():
                found = re.search(rf"(?<!\w){re.escape(level)}[\s-]+$", before, re.IGNORECASE)
                if found and level.lower() not in NEGATIVE | POSITIVE:
                    return Claim(
                        start + found.start(), mention.end, mention.features, "level", level, "", False, (start, end)
                    )
        return None

    def _there(self, mention: Mention, inside: list[Mention], start: int, end: int) -> Claim | None:
        """Whether the sentence says that a finding is there or not; None: neither, or of people in general."""
        if mention.level is None and not any(
            negative_level(self.features[name]) is not None for name in mention.features
        ):
            return None
        before, after = self.text[start : mention.start], self.text[mention.end : end]
        after = re.split(r"[,;.]|\b(?:which|and|but|so)\b", after, maxsplit=1)[0]
        if NOT_SAID.search(before) or UNKNOWN_BEFORE.search(before) or UNKNOWN.search(after) or MAY_BE.search(after):
            return None
        marked = list(before)  # other names become one sign, so that lists can be read through
        for other in inside:
            if other.start < mention.start:
                first, last = other.start - start, other.end - start
                marked[first:last] = ["§", *[""] * (last - first - 1)]
        line = "".join(marked)
        denied, affirmed = DENIES.search(line), AFFIRMS.search(line)
        if denied and (affirmed is None or denied.start() >= affirmed.start() or denied.end() == affirmed.end()):
            return self._claim(mention, mention.end, "yes", "no", (start, end))
        if affirmed:
            return self._claim(mention, mention.end, "yes", "yes", (start, end))
        return None

    # --- persons, and quantities without a name -------------------------------------------------------------------

    def _person(self, start: int, end: int) -> list[Claim]:
        """Age and sex as they open a case: "a 72-year-old man"."""
        found: list[Claim] = []
        text = self.text[start:end]
        ages = tuple(name for name, f in self.features.items() if f.label.lower() == "age" and f.kind == "number")
        for match in AGE.finditer(text) if ages else ():
            group = 1 if match[1] else 2
            place = start + match.start(group)
            if place in self.used or NOT_SAID.search(text[: match.start()]) or self._bounded(text, match):
                continue
            self.used.add(place)
            found.append(
                Claim(start + match.start(), start + match.end(), ages, "number", match[group], "", False, (start, end))
            )
        for name, feature in self.features.items():
            if {level.lower() for level in feature.levels.values()} != set(PERSON):
                continue
            for level in feature.levels.values():
                for match in PERSON[level.lower()].finditer(text):
                    if not NOT_SAID.search(text[: match.start()]) and not text.rstrip().endswith("?"):
                        place = start + match.start(1)
                        found.append(
                            Claim(place, start + match.end(1), (name,), "level", level, "", False, (start, end))
                        )
        return found

    def _bounded(self, text: str, match: re.Match[str]) -> bool:
        if re.search(r"(?:over|under|above|below|than|least)\s*$", text[: match.start()], re.IGNORECASE):
            return True
        return (
            re.match(r"\s*(?:and|or) (?:over|older|above|under|younger)|\s*(?:[-–]|to)\s*\d|\+", text[match.end() :])
            is not None
        )

    def _unnamed(self, start: int, end: int, inside: list[Mention]) -> list[Claim]:
        """Numbers with a clinical unit beside words that are no feature: "fibrinogen of 1.7 g/L"."""
        found: list[Claim] = []
        for number in NUMBER.finditer(self.text, start, end):
            unit = unit_after(self.text, number.end(), self.units)
            if number.start() in self.used or unit is None or not is_clinical(unit[0]) or not self._alone(number):
                continue
            before = self.text[max([start, *(m.end for m in inside if m.end <= number.start())]) : number.start()]
            named = re.search(
                r"([A-Za-z][A-Za-z0-9-]{2,})\s*(?:\(|:|=|→|[-–]\s|\b(?:is|was|of|at|came back at|measured)\b)\s*$",
                before,
            )
            whole = self.text[start : number.start()]
            if named and not NOT_SAID.search(whole) and not BREAKS.search(before) and named[1].lower() not in _NO_NAMES:
                self.used.add(number.start())
                found.append(
                    Claim(
                        start + len(whole) - len(before) + named.start(),
                        unit[1],
                        (),
                        "number",
                        number[0],
                        unit[0],
                        False,
                        (start, end),
                    )
                )
        return found


_NO_NAMES = {
    "value",
    "level",
    "result",
    "reading",
    "figure",
    "answer",
    "option",
    "one",
    "that",
    "this",
    "which",
    "normal",
}


def negative_level(feature: Feature) -> str | None:
    """The level that says that there is none of it: "no", "none", "never"; None: the feature has none such."""
    return next((level for level in feature.levels.values() if level.lower() in NEGATIVE), None)
