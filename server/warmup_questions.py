"""Synthetic questions of the public warm-up: words and numbers from this file and a generator, no patient data.

Runs at the coordinator; nothing here is private. Each question looks exactly like a real one (same prompt template:
record, question, options, letters), but its record **states** the value that is asked, so the right answer needs no
knowledge: find the value, find the option that carries it, say its letter. That is all a small model must learn here.

A share of the questions may only **hint** at the answer, as records of patients do: the same thing at another time is
stated and the truth lies near it, or the asked yes/no is as frequent as the record's other lines make it. Their truth
is drawn, so a model can do no better than the right probabilities, and learns not to be sure of everything.

Where the prompt says what is usual (`usual_number`), so do these, and a hint may be nothing but that: values are drawn
from what is said to be usual, and where the record tells more, what it tells is right more often.

Two vocabularies that share no word: one to train on, one held out, so that the measured accuracy is of the skill.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from ..common.question import LETTERS, USUAL_LEVELS, PromptTemplate, Question

Part = Literal["train", "held-out"]
Kind = Literal["number", "word", "yes"]
_KINDS: tuple[Kind, ...] = ("number", "word", "yes")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NOUNS = _words(
    "lamp river garden window bridge candle ladder mirror pencil basket hammer carpet bottle engine violin market "
    "harbour meadow tunnel pillow castle barrel anchor ticket kettle saddle temple orchard fence shelf drawer chimney "
    "wagon canoe statue fountain lantern compass blanket bucket curtain wheel tower stable cottage glacier island "
    "desert valley forest canyon lagoon cabin balcony cellar attic hallway stairway corridor platform runway railway"
)
_ADJECTIVES = _words(
    "green wooden narrow golden silent broken northern heavy empty modern ancient yellow frozen hollow polished "
    "striped western curved painted dusty marble silver crooked spotted upper lower inner outer eastern southern"
)
_VALUES = _words(
    "apple stone cloud tiger maple copper winter purple summer orange walnut falcon pepper wool ocean cotton velvet "
    "salmon cherry bamboo coral amber ivory ginger clover thunder cedar honey raven lemon olive pearl indigo saffron "
    "willow pebble acorn otter badger heron poplar juniper nutmeg basil almond quartz topaz garnet opal jasper flint "
    "linen denim satin canvas leather paper plastic rubber ceramic concrete"
)
_UNITS = ("cm", "m", "kg", "g", "litres", "km", "m2", "days", "pieces", "hours", "%", "", "", "")
_TIMES = (("day 1", "day 3"), ("first", "second"), ("morning", "evening"), ("before", "after"), ("day 1", "day 2"))
_SPREAD = (0.1, 0.5)  # standard deviation of what is usual, as a share of its middle
_MOST_USUAL = USUAL_LEVELS + 1  # levels of a word; one of them may not be said
_NO_LINE = -1
_KEPT_SHARE = 0.85  # of words and yes/no that are the same at another time
_MOST_LINES = 64  # far fewer than there are labels, so that drawing distinct ones ends soon
# Of hinted questions where the prompt says what is usual; the rest are base rates.
_USUAL_SHARE, _RELATED_SHARE = 0.5, 0.35
_SECTIONS = ("House", "Garden", "Workshop", "Harbour", "Village", "Road")


@dataclass(frozen=True, slots=True)
class _Item:
    """One line of a synthetic record and how its options are drawn."""

    label: str
    kind: Kind
    unit: str
    value: str
    number: float
    decimals: int


@dataclass(frozen=True, slots=True)
class Stated:
    """A synthetic question, and in words why its answer is right: the line that tells, then the option it leads to."""

    question: Question
    reason: str


def synthetic_questions(
    count: int,
    rng: np.random.Generator,
    template: PromptTemplate,
    *,
    features_per_record: int,
    n_options: int,
    part: Part = "train",
    hinted_share: float = 0.0,
) -> list[Stated]:
    """Questions whose record states the answer, or hints at it.

    Args:
        count: how many.
        rng: decides everything.
        template: the prompt the model will be asked with.
        features_per_record: at most this many lines in a record, at least one; the asked one at a uniform place.
        n_options: at most this many options, at least two; yes/no questions have two.
        part: the vocabulary: "train" and "held-out" share no word.
        hinted_share: probability of a question whose record only hints at the answer.

    Returns:
        Questions of which a third each have numbers, words and yes/no as options (more yes/no among the hinted); the
        answer's position is uniform.
    """
    made: list[Stated] = []
    for _ in range(count):
        hinted = hinted_share > 0 and rng.random() < hinted_share
        length = int(rng.integers(1, min(features_per_record, _MOST_LINES) + 1))
        if template.says_usual:
            case = _informed(rng, template, length, n_options, part, hinted)
        elif hinted and rng.random() < 0.5:
            case = _base_rate(rng, max(length, 4), part)
        elif hinted:
            case = _related(rng, length, n_options, part)
        else:
            case = _stated(rng, length, n_options, part)
        made.append(_written(rng, template, case))
    return made


def _half(words: tuple[str, ...], part: Part) -> tuple[str, ...]:
    return words[0::2] if part == "train" else words[1::2]


@dataclass(frozen=True, slots=True)
class _Case:
    """The lines of a record, the item asked, its options, and which line tells."""

    items: list[_Item]
    asked: _Item
    options: tuple[str, ...]
    answer: int
    telling: int  # a line, or _NO_LINE: only what is usual tells
    usual: str = ""  # what the question says is usual


def _informed(
    rng: np.random.Generator, template: PromptTemplate, length: int, n_options: int, part: Part, hinted: bool
) -> _Case:
    """A case of one of the kinds, whose question says what is usual."""
    kind = rng.random() if hinted else 1.0
    if kind < _USUAL_SHARE:
        return _usual(rng, template, length, n_options, part)
    if kind < _USUAL_SHARE + _RELATED_SHARE:
        case = _related(rng, length, n_options, part)
    elif hinted:
        case = _base_rate(rng, max(length, 4), part)
    else:
        case = _stated(rng, length, n_options, part)
    known = case.items[case.telling] if case.asked.kind != "yes" or not hinted else case.asked
    if known.kind != case.asked.kind:
        known = case.asked
    return replace(case, usual=_said_usual(rng, template, known, part))


def _usual(rng: np.random.Generator, template: PromptTemplate, length: int, n_options: int, part: Part) -> _Case:
    """The record says nothing of the asked item: what is usual is all there is to go by."""
    *labels, asked_label = _labels(rng, length + 1, part)
    items = [_item(rng, label, part) for label in labels]
    middle = _item(rng, asked_label, part)
    if middle.kind != "number":
        options_of = partial(_options, rng, n_options=n_options, part=part)
        levels = _levels(rng, middle, part, min(_MOST_USUAL, n_options))
        value = levels[rng.choice(len(levels), p=[share for _, share in levels])][0]
        asked = replace(middle, value=value)
        if middle.kind == "yes":
            options, answer = options_of(asked)
        else:
            values = [level for level, _ in levels]
            options = tuple(values[index] for index in rng.permutation(len(values)))
            answer = options.index(value)
        return _Case(items, asked, options, answer, _NO_LINE, template.usual_shares(levels))
    spread = float(rng.uniform(*_SPREAD))
    number = max(middle.number * (1 + spread * float(rng.normal())), 10.0**-middle.decimals)
    asked = replace(middle, value=f"{number:.{middle.decimals}f}", number=number)
    step = float(rng.uniform(2 / 3, 2)) * spread * middle.number / number
    options, answer = _options(rng, asked, n_options, part, step_share=step)
    said = _number_words(template, middle, middle.number, spread)
    return _Case(items, asked, options, answer, _NO_LINE, said)


def _said_usual(rng: np.random.Generator, template: PromptTemplate, known: _Item, part: Part) -> str:
    """What is usual of an item that has this value: it may be any that is drawn from it."""
    if known.kind != "number":
        return template.usual_shares(_levels(rng, known, part))
    spread = float(rng.uniform(*_SPREAD))
    middle = known.number / max(1 + spread * float(rng.normal()), 0.2)
    return _number_words(template, known, middle, spread)


def _levels(rng: np.random.Generator, item: _Item, part: Part, most: int = _MOST_USUAL) -> list[tuple[str, float]]:
    """Two to `most` levels of which `item` has one, with their shares; the level was drawn by them."""
    if item.kind == "yes":
        values = ["yes", "no"]
    else:
        others = [word for word in _half(_VALUES, part) if word != item.value]
        count = int(rng.integers(1, most))
        values = [item.value, *(others[index] for index in rng.permutation(len(others))[:count])]
    shares = rng.dirichlet(np.full(len(values), 0.8))
    drawn = int(rng.choice(len(values), p=shares))
    own = values.index(item.value)
    shares[[own, drawn]] = shares[[drawn, own]]
    return list(zip(values, shares.tolist(), strict=True))


def _number_words(template: PromptTemplate, item: _Item, middle: float, spread: float) -> str:
    written = (f"{max(middle * (1 + k * spread), 0):.{item.decimals}f}" for k in (0, -1, 1))
    middle_, low, high = written
    return template.usual_number.format(middle=middle_, low=low, high=high, unit=f" {item.unit}" if item.unit else "")


def _stated(rng: np.random.Generator, length: int, n_options: int, part: Part) -> _Case:
    """The asked item is a line of the record."""
    items = [_item(rng, label, part) for label in _labels(rng, length, part)]
    place = int(rng.integers(length))
    options, answer = _options(rng, items[place], n_options, part)
    return _Case(items, items[place], options, answer, place)


def _related(rng: np.random.Generator, length: int, n_options: int, part: Part) -> _Case:
    """The record states the thing at one time, the question asks another: near it, or mostly the same."""
    items = [_item(rng, label, part) for label in _labels(rng, length, part)]
    place = int(rng.integers(length))
    name = items[place].label
    times = _TIMES[rng.integers(len(_TIMES))]
    first, then = (times[index] for index in rng.permutation(2))
    items[place] = replace(items[place], label=f"{name}, {first}")
    known = items[place]
    if known.kind == "number":
        sd = float(rng.uniform(0.03, 0.3))
        number = max(known.number * (1 + sd * float(rng.normal())), 10.0**-known.decimals)
        asked = replace(known, label=f"{name}, {then}", value=f"{number:.{known.decimals}f}", number=number)
        options, answer = _options(rng, asked, n_options, part, step_share=2 * sd * known.number / number)
    else:
        kept = rng.random() < _KEPT_SHARE
        value = known.value if kept else _item(rng, name, part, known.kind).value
        asked = replace(known, label=f"{name}, {then}", value=value)
        options, answer = _options(rng, asked, n_options, part, among=known.value)
    return _Case(items, asked, options, answer, place)


def _base_rate(rng: np.random.Generator, length: int, part: Part) -> _Case:
    """Yes or no, as frequent as among the record's other lines."""
    *labels, asked_label = _labels(rng, length + 1, part)
    rate = float(rng.beta(0.6, 0.6))
    items = [_item(rng, label, part, "yes" if rng.random() < 0.75 else None) for label in labels]
    drawn = [replace(i, value="yes" if rng.random() < rate else "no") if i.kind == "yes" else i for i in items]
    asked = _Item(asked_label, "yes", "", "yes" if rng.random() < rate else "no", 0.0, 0)
    options, answer = _options(rng, asked, 2, part)
    return _Case(drawn, asked, options, answer, int(rng.integers(length)))


def _labels(rng: np.random.Generator, count: int, part: Part) -> list[str]:
    """Distinct labels, or two lines would contradict each other."""
    nouns, adjectives = _half(_NOUNS, part), _half(_ADJECTIVES, part)
    labels: dict[str, None] = {}
    while len(labels) < count:
        noun = nouns[rng.integers(len(nouns))]
        label = f"{adjectives[rng.integers(len(adjectives))]} {noun}" if rng.random() < 0.5 else noun
        labels[label.capitalize()] = None
    return list(labels)


def _written(rng: np.random.Generator, template: PromptTemplate, case: _Case) -> Stated:
    """The case as the prompt template writes it."""
    asked, section = case.asked, _SECTIONS[rng.integers(len(_SECTIONS))]
    unit = f" {asked.unit}" if asked.unit else ""
    lines = [
        template.line.format(label=item.label, value=item.value, unit=f" {item.unit}" if item.unit else "")
        for item in case.items
    ]
    telling = case.usual.strip(" .") if case.telling == _NO_LINE else lines[case.telling]
    if template.section:
        lines.insert(0, template.section.format(section=section))
    if rng.random() < 0.2:
        text = template.outcome.format(label=asked.label, question=f"What is the {asked.label}?")
    else:
        text = template.question.format(label=asked.label, unit=unit, section=section)
    text += case.usual
    shown = [
        template.option.format(letter=letter, value=value, unit=unit)
        for letter, value in zip(LETTERS, case.options, strict=False)
    ]
    question = Question(
        target=asked.label,
        section=section,
        kind="feature",
        text=template.user.format(
            record=template.separator.join(lines), question=text, options=template.option_separator.join(shown)
        ),
        options=case.options,
        answer=case.answer,
        majority=0,
    )
    return Stated(question, f"{telling}. {shown[case.answer]}.")


def _item(rng: np.random.Generator, label: str, part: Part, kind: Kind | None = None) -> _Item:
    if kind is None:
        kind = _KINDS[rng.integers(3)]
    if kind == "number":
        decimals = int(rng.integers(3))
        # As laboratory values do, magnitudes run from below one to thousands.
        number = round(float(np.exp(rng.uniform(np.log(2 * 10.0**-decimals), np.log(3000)))), decimals)
        return _Item(label, "number", _UNITS[rng.integers(len(_UNITS))], f"{number:.{decimals}f}", number, decimals)
    if kind == "word":
        words = _half(_VALUES, part)
        return _Item(label, "word", "", words[rng.integers(len(words))], 0.0, 0)
    return _Item(label, "yes", "", ("yes", "no")[rng.integers(2)], 0.0, 0)


def _options(
    rng: np.random.Generator,
    item: _Item,
    n_options: int,
    part: Part,
    *,
    step_share: float | None = None,
    among: str | None = None,
) -> tuple[tuple[str, ...], int]:
    """Options in a random order, and where the truth is.

    `step_share` is the ladder's step as a share of the number (drawn when None); `among` is a word to offer as well.
    """
    count = int(rng.integers(2, n_options + 1))
    if item.kind == "yes":
        values = ["yes", "no"]
    elif item.kind == "word":
        others = [word for word in _half(_VALUES, part) if word != item.value]
        first = [among] if among is not None and among != item.value else []
        others = first + [others[index] for index in rng.permutation(len(others)) if others[index] not in first]
        values = [item.value, *others[: count - 1]]
    else:
        # A ladder around the truth with the truth at a uniform rank, as real questions have (client/options.py).
        share = float(rng.uniform(0.05, 0.6)) if step_share is None else step_share
        step = max(abs(item.number) * share, 10.0**-item.decimals)
        rank = int(rng.integers(count))
        ladder = [item.number + (place - rank) * step for place in range(count)]
        if ladder[0] < 0:
            ladder = [item.number * (1 + step / max(item.number, step)) ** (place - rank) for place in range(count)]
        written = [item.value if place == rank else f"{v:.{item.decimals}f}" for place, v in enumerate(ladder)]
        values = list(dict.fromkeys([item.value, *written]))  # rounding may have made two of them equal
        if len(values) == 1:
            values.append(f"{item.number + 10.0**-item.decimals:.{item.decimals}f}")
    order = rng.permutation(len(values))
    options = tuple(values[index] for index in order)
    return options, options.index(values[0] if item.kind != "yes" else item.value)
