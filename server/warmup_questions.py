"""Synthetic questions of the public warm-up: words and numbers from this file and a generator, no patient data.

Runs at the coordinator; nothing here is private. Each question looks exactly like a real one (same prompt template:
record, question, options, letters), but its record **states** the value that is asked, so the right answer needs no
knowledge: find the value, find the option that carries it, say its letter. That is all a small model must learn here.

Two vocabularies that share no word: one to train on, one held out, so that the measured accuracy is of the skill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..common.question import LETTERS, PromptTemplate, Question

Part = Literal["train", "held-out"]


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
_MOST_LINES = 64  # far fewer than there are labels, so that drawing distinct ones ends soon
_SECTIONS = ("House", "Garden", "Workshop", "Harbour", "Village", "Road")


@dataclass(frozen=True, slots=True)
class _Item:
    """One line of a synthetic record and how its options are drawn."""

    label: str
    kind: Literal["number", "word", "yes"]
    unit: str
    value: str
    number: float
    decimals: int


@dataclass(frozen=True, slots=True)
class Stated:
    """A synthetic question, and in words why its answer is right: the stated line, then the option that repeats it."""

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
) -> list[Stated]:
    """Questions whose record states the answer.

    Args:
        count: how many.
        rng: decides everything.
        template: the prompt the model will be asked with.
        features_per_record: at most this many lines in a record, at least one; the asked one at a uniform place.
        n_options: at most this many options, at least two; yes/no questions have two.
        part: the vocabulary: "train" and "held-out" share no word.

    Returns:
        Questions of which a third each have numbers, words and yes/no as options; the answer's position is uniform.
    """
    return [_question(rng, template, features_per_record, n_options, part) for _ in range(count)]


def _half(words: tuple[str, ...], part: Part) -> tuple[str, ...]:
    return words[0::2] if part == "train" else words[1::2]


def _question(
    rng: np.random.Generator, template: PromptTemplate, features_per_record: int, n_options: int, part: Part
) -> Stated:
    nouns, adjectives = _half(_NOUNS, part), _half(_ADJECTIVES, part)
    length = int(rng.integers(1, min(features_per_record, _MOST_LINES) + 1))
    labels: dict[str, None] = {}
    while len(labels) < length:  # distinct labels, or two lines would contradict each other
        noun = nouns[rng.integers(len(nouns))]
        label = f"{adjectives[rng.integers(len(adjectives))]} {noun}" if rng.random() < 0.5 else noun
        labels[label.capitalize()] = None
    items = [_item(rng, label, part) for label in labels]
    place = int(rng.integers(length))
    asked = items[place]
    options, answer = _options(rng, asked, n_options, part)
    section = _SECTIONS[rng.integers(len(_SECTIONS))]
    unit = f" {asked.unit}" if asked.unit else ""
    lines = [
        template.line.format(label=item.label, value=item.value, unit=f" {item.unit}" if item.unit else "")
        for item in items
    ]
    stated = lines[place]
    if template.section:
        lines.insert(0, template.section.format(section=section))
    if rng.random() < 0.2:
        text = template.outcome.format(label=asked.label, question=f"What is the {asked.label}?")
    else:
        text = template.question.format(label=asked.label, unit=unit, section=section)
    shown = [
        template.option.format(letter=letter, value=value, unit=unit)
        for letter, value in zip(LETTERS, options, strict=False)
    ]
    question = Question(
        target=asked.label,
        section=section,
        kind="feature",
        text=template.user.format(
            record=template.separator.join(lines), question=text, options=template.option_separator.join(shown)
        ),
        options=options,
        answer=answer,
        majority=0,
    )
    return Stated(question, f"{stated}. {shown[answer]}.")


def _item(rng: np.random.Generator, label: str, part: Part) -> _Item:
    kind = ("number", "word", "yes")[rng.integers(3)]
    if kind == "number":
        decimals = int(rng.integers(3))
        # As laboratory values do, magnitudes run from below one to thousands.
        number = round(float(np.exp(rng.uniform(np.log(2 * 10.0**-decimals), np.log(3000)))), decimals)
        return _Item(label, "number", _UNITS[rng.integers(len(_UNITS))], f"{number:.{decimals}f}", number, decimals)
    if kind == "word":
        words = _half(_VALUES, part)
        return _Item(label, "word", "", words[rng.integers(len(words))], 0.0, 0)
    return _Item(label, "yes", "", ("yes", "no")[rng.integers(2)], 0.0, 0)


def _options(rng: np.random.Generator, item: _Item, n_options: int, part: Part) -> tuple[tuple[str, ...], int]:
    """Options in a random order, and where the truth is."""
    count = int(rng.integers(2, n_options + 1))
    if item.kind == "yes":
        values = ["yes", "no"]
    elif item.kind == "word":
        others = [word for word in _half(_VALUES, part) if word != item.value]
        values = [item.value, *(others[index] for index in rng.permutation(len(others))[: count - 1])]
    else:
        # A ladder around the truth with the truth at a uniform rank, as real questions have (client/options.py).
        step = max(abs(item.number) * float(rng.uniform(0.05, 0.6)), 10.0**-item.decimals)
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
