"""A question's record read back from its text: which features it shows, with which values.

Runs where questions are (a hospital, or an open registry). Enters: a `Question`, its prompt template and dictionary.
What comes out is a patient's record and stays with the question. A `Question` carries text only, so that what is
audited is what the model was shown, not what the table says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter

from .dictionary import Dictionary, Feature
from .errors import VerificationError
from .question import LETTERS, PromptTemplate, Question

_NUMBER = r"-?\d+(?:\.\d+)?"


@dataclass(frozen=True)
class Record:
    """What a question showed of a patient.

    Attributes:
        target: the feature or outcome that is asked.
        values: feature name → value as written, without unit, in the order of the record. The target is never there.
        features: all features and outcomes of the dictionary by name, shown or not.
        options: the values offered, in letter order.
    """

    target: Feature
    values: Mapping[str, str]
    features: Mapping[str, Feature]
    options: tuple[str, ...]

    def pairs(self) -> list[tuple[str, str]]:
        """(label, value with its unit) of all features shown."""
        return [(self.features[name].label, value + unit(self.features[name])) for name, value in self.values.items()]


def unit(feature: Feature) -> str:
    """A feature's unit as templates write it: with a space before it, or empty."""
    return f" {feature.unit}" if feature.unit else ""


def record_of(question: Question, template: PromptTemplate, dictionary: Dictionary) -> Record:
    """The record that a question shows.

    Args:
        question: made with this template over this dictionary.
        template: any whose `user` has its parts in any order.
        dictionary: tells labels from values where the template puts only a space between them.

    Raises:
        VerificationError: the text is not what this template and dictionary write (no patient's value is in the
            message).
    """
    target = dictionary.feature(question.target)
    layout = _pattern(template.user, {
        "record": "(?P<record>.*?)",
        "question": _asked(template, target),
        "options": re.escape(_options(template, target, question.options)),
    })  # fmt: skip
    found = re.fullmatch(layout, question.text, re.DOTALL)
    if found is None:
        raise VerificationError(f"question about '{target.name}': its text was not made with prompt '{template.name}'")
    features = {feature.name: feature for feature in dictionary.used}
    values = _values(found["record"], template, dictionary, target)
    return Record(target, values, features, question.options)


def _pattern(form: str, parts: Mapping[str, str]) -> str:
    """A template's format string as a regular expression, its placeholders replaced by `parts`."""
    out: list[str] = []
    seen: set[str] = set()
    for literal, name, _, _ in Formatter().parse(form):
        out.append(re.escape(literal))
        if name is not None:
            part = parts[name]
            if name in seen:  # a group can be named once
                part = re.sub(r"\(\?P<\w+>", "(?:", part)
            seen.add(name)
            out.append(part)
    return "".join(out)


def _asked(template: PromptTemplate, target: Feature) -> str:
    """What asks for the target, and, where the template says it, what is usual of it."""
    if target.role == "outcome":
        asked = template.outcome.format(label=target.label, question=target.question)
    else:
        asked = template.question.format(label=target.label, unit=unit(target), section=target.section)
    if not template.says_usual:
        return re.escape(asked)
    usual = template.usual_levels if target.kind == "category" else template.usual_number
    return re.escape(asked) + _pattern(
        usual,
        dict.fromkeys(("middle", "low", "high"), _NUMBER) | {"unit": re.escape(unit(target)), "levels": r"[^\n]*?"},
    )


def _options(template: PromptTemplate, target: Feature, options: Sequence[str]) -> str:
    return template.option_separator.join(
        template.option.format(letter=letter, value=value, unit=unit(target))
        for letter, value in zip(LETTERS, options, strict=False)
    )


def _values(text: str, template: PromptTemplate, dictionary: Dictionary, target: Feature) -> dict[str, str]:
    """The record's parts from left to right; of those that could stand at a place, the longest that ends a part."""
    features = dictionary.with_role("feature")
    ends = rf"(?={re.escape(template.separator)}|\Z)"  # lest level "9" be read of "94"
    forms: list[tuple[str | None, re.Pattern[str]]] = []
    for feature in features:
        value = (
            _NUMBER
            if feature.kind == "number"
            else "|".join(re.escape(level) for level in sorted(feature.levels.values(), key=len, reverse=True))
        )
        parts = {"label": re.escape(feature.label), "value": f"(?P<value>{value})", "unit": re.escape(unit(feature))}
        forms.append((feature.name, re.compile(_pattern(template.line, parts) + ends)))
    if template.masked:
        written = template.masked.format(label=target.label, unit=unit(target))
        forms.append((None, re.compile(re.escape(written) + ends)))
    if template.section:
        for section in dict.fromkeys(feature.section for feature in features):
            forms.append((None, re.compile(re.escape(template.section.format(section=section)) + ends)))
    values: dict[str, str] = {}
    place = 0
    while True:
        best: tuple[int, str | None, str] | None = None
        for name, form in forms:
            match = form.match(text, place)
            if match is not None and (best is None or match.end() > best[0]):
                best = (match.end(), name, match["value"] if name is not None else "")
        if best is None:
            raise VerificationError(
                f"question about '{target.name}': character {place} of its record begins no line that prompt "
                f"'{template.name}' writes of dictionary '{dictionary.name}'"
            )
        place, name, value = best
        if name is not None:
            values[name] = value
        if place == len(text):
            return values
        place += len(template.separator)
