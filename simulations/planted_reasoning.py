r"""Reasoning with planted defects, to measure the automatic audit (common/reasoning.py).

Run on one machine over open or synthetic registries. Enters: their questions. What comes out are texts as a model might
write them, from sentences of planted_wordings.py: clean ones, and ones with a single kind of defect whose place is
known. Clean texts are not made easy: they weigh options, state what is normal, ask what if, round values, write labels
in other ways and say what the record lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pyarrow as pa

from ..client.questions import QuestionBuilder
from ..client.registry import Registry, to_registry
from ..common.config import QuestionsConfig
from ..common.counts import count
from ..common.dictionary import Dictionary, Feature
from ..common.question import LETTERS, PromptTemplate, Question
from ..common.reasoning import KINDS, Flag
from ..common.record import Record, record_of, unit
from ..common.schema import Schema, derive_schema
from .planted_wordings import HELD_OUT, TUNED, Wordings
from .registries import load
from .synthetic_registry import make

# What is planted → the flag that should find it.
PLANTS = {
    "wrong number": "contradicts_record",
    "wrong level": "contradicts_record",
    "wrong yes or no": "contradicts_record",
    "wrong age or sex": "contradicts_record",
    "number not shown": "invented_value",
    "level not shown": "invented_value",
    "yes or no not shown": "invented_value",
    "quantity of no registry": "invented_value",
    "masked value as given": "invented_value",
    "another conclusion": "answer_does_not_follow",
    "ruled out": "answer_does_not_follow",
    "letter first": "leaked_letters",
    "several boxes": "leaked_letters",
    "no such option": "leaked_letters",
    "nothing": "no_reasoning",
    "repeated": "no_reasoning",
}
_SETTINGS = QuestionsConfig(features_per_record=12)
_SEX = {"male": ("man", "gentleman"), "female": ("woman", "lady")}
_NO, _YES = ("no", "none", "absent"), ("yes", "present")
# Quantities that none of the registries has, with a value and a unit.
_FOREIGN = {
    False: (
        ("C-reactive protein", "148", " mg/L"), ("troponin", "0.82", " ng/mL"), ("INR", "2.4", ""),
        ("D-dimer", "3.1", " mg/L"), ("oxygen saturation", "84", " %"), ("hemoglobin", "7.9", " g/dL"),
    ),
    True: (
        ("procalcitonin", "12.5", " ng/mL"), ("ferritin", "980", " µg/L"), ("fibrinogen", "1.7", " g/L"),
        ("amylase", "410", " U/L"), ("central venous pressure", "17", " mmHg"), ("APACHE II score", "31", ""),
    ),
}  # fmt: skip
_US_SPELLING = (("aem", "em"), ("Haem", "Hem"), ("chaem", "chem"), ("our", "or"), ("localised", "localized"))


@dataclass(frozen=True)
class Planted:
    """One text.

    Attributes:
        question: what was asked, with its `record`.
        text: the completion.
        plant: what was planted, a key of `PLANTS`, or "clean".
        span: (start, end) of the planted sentence in `text`; None in clean texts.
    """

    question: Question
    record: Record
    text: str
    plant: str
    span: tuple[int, int] | None


def open_questions(
    name: str, template: PromptTemplate, n: int, rng: np.random.Generator
) -> tuple[list[Question], Dictionary]:
    """At most n questions of an open registry (simulations/registries.py) or of "synthetic", and its dictionary.

    Raises:
        UserError: the package that the registry comes in is not installed.
    """
    registry, schema = _registry(name)
    builder = QuestionBuilder(registry, schema, template, _SETTINGS)
    rows = rng.permutation(len(next(iter(registry.values.values()))))[:n]
    return builder.build(rows, rng), registry.dictionary


@lru_cache(maxsize=4)
def _registry(name: str) -> tuple[Registry, Schema]:
    if name == "synthetic":
        table, dictionary = make(600, seed=11)
        registry = to_registry(name, pa.Table.from_pandas(table, preserve_index=False), dictionary)
    else:
        registry = load(name)
    return registry, derive_schema(count(registry.values, registry.dictionary), registry.dictionary, _SETTINGS)


def plant(
    questions: Sequence[Question],
    template: PromptTemplate,
    dictionary: Dictionary,
    *,
    held_out: bool,
    rng: np.random.Generator,
    clean_share: float = 0.4,
) -> Iterator[Planted]:
    """One text a question, `clean_share` of them clean, else one kind of defect, all kinds alike often.

    Args:
        questions: made with `template` over `dictionary`.
        template: their prompt.
        dictionary: their registry's.
        held_out: which wordings.
        rng: decides everything.
        clean_share: of all texts, in expectation; kinds that a question has no place for become clean texts.
    """
    kinds = list(PLANTS)
    for question in questions:
        kind = "clean" if rng.random() < clean_share else kinds[rng.integers(len(kinds))]
        yield _Writer(question, record_of(question, template, dictionary), held_out, rng).write(kind)


@dataclass
class _Writer:
    question: Question
    record: Record
    held_out: bool
    rng: np.random.Generator
    words: Wordings = field(init=False)

    def __post_init__(self) -> None:
        self.words = HELD_OUT if self.held_out else TUNED

    # --- one text -------------------------------------------------------------------------------------------------

    def write(self, kind: str) -> Planted:
        n = len(self.record.options)
        chosen = int(self.rng.integers(n))
        if kind == "nothing":
            return self._done(kind, [self._fill("bare", letter=LETTERS[chosen])], 0, "")
        body = self._body(chosen)
        other = int((chosen + self.rng.integers(1, n)) % n)
        end = [self._conclude(chosen)] if self.rng.random() < 0.8 else []
        box = self._fill("box", letter=LETTERS[chosen])
        planted: str | None = None
        place = int(self.rng.integers(len(body) + 1))
        if kind == "another conclusion":
            end, place, planted = [], len(body), self._conclude(other)
        elif kind == "ruled out":
            keep = self._fill("keep", letter=LETTERS[other])
            end, place, planted = [], len(body), f"{self._rule_out(chosen)} {keep}"
        elif kind == "letter first":
            place, planted = 0, self._fill("first", letter=LETTERS[chosen])
            if "boxed" in planted:
                box = ""
        elif kind == "several boxes":
            place, box = len(body) + len(end), ""
            planted = self._fill("several", letter=LETTERS[other], second=LETTERS[chosen])
        elif kind == "no such option" and n < len(LETTERS):
            place, end = len(body), []
            planted = self._fill("no_option", letter=LETTERS[int(self.rng.integers(n, len(LETTERS)))])
            box = "" if "boxed" in planted else box
        elif kind == "repeated":
            place, planted = len(body), (self._pick("repeated") * 12).rstrip()
            end = []
        elif kind != "clean":
            planted = self._statement_defect(kind, chosen)
        lines = [*body[:place], *([planted] if planted else []), *body[place:], *end, *([box] if box else [])]
        return self._done(kind if planted else "clean", lines, lines.index(planted) if planted else -1, planted or "")

    def _done(self, kind: str, lines: list[str], place: int, planted: str) -> Planted:
        joins = ["\n" if self.rng.random() < 0.3 or line.startswith(("-", "*")) else " " for line in lines]
        text, span = "", None
        for index, (line, join) in enumerate(zip(lines, joins, strict=True)):
            text += join if text else ""
            if index == place:
                span = (len(text), len(text) + len(planted or line))
            text += line
        return Planted(self.question, self.record, text, kind, span)

    def _body(self, chosen: int) -> list[str]:
        """Clean sentences in an order as one reasons: what is shown, what that means, the options."""
        shown = list(self.record.values)
        self.rng.shuffle(shown)
        facts = [self._state(name, self.record.values[name]) for name in shown[: self.rng.integers(2, 6)]]
        if self._who_is_known() and self.rng.random() < 0.5:
            facts.insert(0, self._who(self.record.values["age"], self.record.values["sex"]))
        rest = [self._general() for _ in range(self.rng.integers(0, 3))]
        rest += [self._fill("filler") for _ in range(self.rng.integers(0, 3))]
        hidden = self._hidden()
        if hidden and self.rng.random() < 0.4:
            rest.append(self._fill("unknown", label=self._label(hidden[0])))
        for fact in rest:
            facts.insert(int(self.rng.integers(1, len(facts) + 1)), fact)
        others = [index for index in range(len(self.record.options)) if index != chosen]
        weighed = [self._weigh(int(self.rng.choice(others))) for _ in range(self.rng.integers(0, 3))]
        return facts + weighed

    # --- sentences ------------------------------------------------------------------------------------------------

    def _pick(self, kind: str) -> str:
        forms: tuple[str, ...] = getattr(self.words, kind)
        return forms[self.rng.integers(len(forms))]

    def _fill(self, kind: str, **slots: str) -> str:
        sentence = self._pick(kind).format(**slots)
        first = next((place for place, sign in enumerate(sentence) if sign.isalnum()), 0)
        return sentence if "\\" in sentence[:first] or first > 2 else _capital(sentence, first)

    def _state(self, name: str, value: str) -> str:
        feature = self.record.features[name]
        label = self._label(feature)
        if feature.kind == "number":
            return self._fill("number", label=label, value=self._number(feature, value), unit=self._unit(feature))
        if _polarity(feature, value) is not None:
            return self._fill("yes" if _polarity(feature, value) else "no", label=label)
        return self._fill("level", label=label, value=self._spelt(value))

    def _who_is_known(self) -> bool:
        return {"age", "sex"} <= self.record.values.keys() and self.record.values["sex"].lower() in _SEX

    def _who(self, age: str, sex: str) -> str:
        nouns = (sex.lower(), *_SEX[sex.lower()])
        return self._fill("who", age=age, noun=nouns[self.rng.integers(len(nouns))])

    def _general(self) -> str:
        numbers = [feature for feature in self.record.features.values() if feature.kind == "number"]
        conditions = [feature for feature in self.record.features.values() if _is_yes_no(feature)]
        feature = numbers[self.rng.integers(len(numbers))]
        condition = conditions[self.rng.integers(len(conditions))]
        low, other, high = sorted(self._somewhere(feature) for _ in range(3))
        written = [f"{value:.{feature.decimals}f}" for value in (low, other, high)]
        return self._fill(
            "general", label=self._label(feature), condition=self._label(condition), low=written[0], other=written[1],
            high=written[2], unit=self._unit(feature),
        )  # fmt: skip

    def _about_option(self, kind: str, index: int) -> str:
        target = self.record.target
        return self._fill(
            kind, label=self._label(target), value=self.record.options[index], unit=unit(target), letter=LETTERS[index]
        )

    def _weigh(self, index: int) -> str:
        return self._about_option("weigh", index)

    def _conclude(self, index: int) -> str:
        return self._about_option("conclude", index)

    def _rule_out(self, index: int) -> str:
        return self._about_option("rule_out", index)

    # --- defects --------------------------------------------------------------------------------------------------

    def _statement_defect(self, kind: str, chosen: int) -> str | None:
        """A sentence with a wrong or invented value; None where the question has no feature for it."""
        if kind == "masked value as given":
            return self._about_option("given", chosen)
        if kind == "wrong age or sex":
            if not self._who_is_known():
                return None
            age, sex = self.record.values["age"], self.record.values["sex"]
            wrong = self._wrong(self.record.features["age"], age)
            if wrong is not None and self.rng.random() < 0.5:
                return self._who(wrong, sex)
            return self._who(age, next(other for other in _SEX if other != sex.lower()))
        if kind == "quantity of no registry":
            known = _FOREIGN[self.held_out]
            label, value, its_unit = known[self.rng.integers(len(known))]
            return self._fill("number", label=label, value=value, unit=its_unit if self.rng.random() < 0.7 else "")
        shown = kind.startswith("wrong")
        pool = [self.record.features[name] for name in self.record.values] if shown else self._hidden()
        if "number" in kind:
            pool = [feature for feature in pool if feature.kind == "number"]
        else:
            pool = [f for f in pool if f.kind == "category" and _is_yes_no(f) == ("yes or no" in kind)]
        if not pool:
            return None
        feature = pool[self.rng.integers(len(pool))]
        value = self._wrong(feature, self.record.values.get(feature.name))
        return None if value is None else self._state(feature.name, value)

    def _wrong(self, feature: Feature, right: str | None) -> str | None:
        """Another value than `right`, so far off that no rounding makes them one; any value where it is None."""
        if feature.kind == "category":
            # Not "none" of many levels: whether that was said is a matter of words ("no cancer").
            return str(self.rng.choice([level for level in feature.levels.values() if level != right]))
        low, high = feature.bounds
        siblings = [v for n, v in self.record.values.items() if _core(self.record.features[n]) == _core(feature)]
        for _ in range(100):
            value = self._somewhere(feature)
            if all(abs(value - float(s)) > max(0.15 * abs(float(s)), 3 * 10.0**-feature.decimals) for s in siblings):
                return f"{min(max(value, low), high):.{feature.decimals}f}"
        return None

    def _hidden(self) -> list[Feature]:
        """Features that are neither shown nor asked, and no sibling of such (another day's value), in random order."""
        used = {_core(self.record.features[name]) for name in self.record.values} | {_core(self.record.target)}
        said = " ".join(value.lower() for value in self.record.values.values())
        labels = " ".join(self.record.features[name].label.lower() for name in self.record.values)
        found = [
            feature
            for feature in self.record.features.values()
            if feature.role == "feature"
            and _core(feature) not in used
            and not any(word in said or word in labels for word in _core(feature).lower().split() if len(word) > 4)
        ]
        return [found[index] for index in self.rng.permutation(len(found))]

    # --- ways to write --------------------------------------------------------------------------------------------

    def _label(self, feature: Feature) -> str:
        label = feature.label
        core, comma, qualifier = label.partition(", ")
        style = self.rng.random()
        if comma and qualifier.startswith("day "):
            if self.held_out and style < 0.3:
                label = f"{core} ({qualifier})"
            elif self.held_out and style < 0.6:
                label = f"{core} on {qualifier}"
            elif style < 0.5:
                label = f"{qualifier} {core}"
        words = label.split(" ")
        if self.rng.random() < 0.7:
            label = " ".join(word if _keeps_capitals(word) else word.lower() for word in words)
        return self._spelt(label)

    def _spelt(self, words: str) -> str:
        if self.held_out and self.rng.random() < 0.3:
            for british, american in _US_SPELLING:
                words = words.replace(british, american)
        return words

    def _unit(self, feature: Feature) -> str:
        return unit(feature) if self.rng.random() < 0.7 else ""

    def _number(self, feature: Feature, value: str) -> str:
        style = self.rng.random()
        if "." in value and style < 0.1 and float(value) >= 10:
            return f"{float(value):.0f}"
        if self.held_out and "." in value and style < 0.25:
            return value.replace(".", ",")
        return value

    def _somewhere(self, feature: Feature) -> float:
        low, high = feature.bounds
        if feature.scale == "log":
            return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))
        return float(self.rng.uniform(low, high))


def _core(feature: Feature) -> str:
    return feature.label.partition(", ")[0]


def _capital(sentence: str, place: int) -> str:
    return sentence[:place] + sentence[place : place + 1].upper() + sentence[place + 1 :]


def _keeps_capitals(word: str) -> bool:
    return sum(sign.isupper() for sign in word) > 1 or any(sign.isdigit() for sign in word)


def _is_yes_no(feature: Feature) -> bool:
    levels = [level.lower() for level in feature.levels.values()]
    return len(levels) == 2 and levels[0] in _NO + _YES and levels[1] in _NO + _YES


def _polarity(feature: Feature, value: str) -> bool | None:
    return value.lower() in _YES if _is_yes_no(feature) else None


@dataclass(frozen=True)
class Found:
    """How often a flag was raised where it should be.

    Attributes:
        planted: texts that hold a defect of this kind.
        found: of these, texts where the flag was raised at the planted words.
        raised: texts with this flag.
        right: of these, texts that hold a defect of this kind.
    """

    planted: int
    found: int
    raised: int
    right: int

    @property
    def recall(self) -> float:
        """Share of defects found; NaN where none was planted."""
        return self.found / self.planted if self.planted else float("nan")

    @property
    def precision(self) -> float:
        """Share of flagged texts that hold the defect; NaN where none was flagged."""
        return self.right / self.raised if self.raised else float("nan")


def measure(texts: Sequence[Planted], flags: Sequence[Sequence[Flag]]) -> dict[str, Found]:
    """By flag, and by plant (then `raised` and `right` are those of its flag in these texts, and say nothing new).

    Args:
        texts: with and without defects; one kind at most each.
        flags: what the audit said of each.
    """
    result: dict[str, Found] = {}
    rows = [
        (PLANTS.get(text.plant), text, {flag.kind: flag for flag in found}, found)
        for text, found in zip(texts, flags, strict=True)
    ]
    for kind in KINDS:
        planted = [row for row in rows if row[0] == kind]
        raised = [row for row in rows if kind in row[2]]
        hit = sum(_hits(text, found, kind) for _, text, _, found in planted)
        result[kind] = Found(len(planted), hit, len(raised), sum(row[0] == kind for row in raised))
    for plant_, kind in PLANTS.items():
        planted = [row for row in rows if row[1].plant == plant_]
        hit = sum(_hits(text, found, kind) for _, text, _, found in planted)
        raised = sum(kind in row[2] for row in planted)
        result[plant_] = Found(len(planted), hit, raised, raised)
    clean = [row for row in rows if row[0] is None]
    result["clean"] = Found(0, 0, sum(bool(row[3]) for row in clean), 0)
    return result


def _hits(text: Planted, flags: Sequence[Flag], kind: str) -> bool:
    start, end = text.span or (0, 0)
    return any(flag.kind == kind and flag.start <= end and flag.end >= start for flag in flags)
