"""Words, numbers and lines of the warm-up's synthetic records: from this file and a generator, no patient data.

Two vocabularies that share no word: one to train on, one held out, so that what is measured is a skill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Part = Literal["train", "held-out"]
Kind = Literal["number", "word", "yes"]
KINDS: tuple[Kind, ...] = ("number", "word", "yes")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    "lamp river garden window bridge candle ladder mirror pencil basket hammer carpet bottle engine violin market "
    "harbour meadow tunnel pillow castle barrel anchor ticket kettle saddle temple orchard fence shelf drawer chimney "
    "wagon canoe statue fountain lantern compass blanket bucket curtain wheel tower stable cottage glacier island "
    "desert valley forest canyon lagoon cabin balcony cellar attic hallway stairway corridor platform runway railway"
)
ADJECTIVES = _words(
    "green wooden narrow golden silent broken northern heavy empty modern ancient yellow frozen hollow polished "
    "striped western curved painted dusty marble silver crooked spotted upper lower inner outer eastern southern"
)
VALUES = _words(
    "apple stone cloud tiger maple copper winter purple summer orange walnut falcon pepper wool ocean cotton velvet "
    "salmon cherry bamboo coral amber ivory ginger clover thunder cedar honey raven lemon olive pearl indigo saffron "
    "willow pebble acorn otter badger heron poplar juniper nutmeg basil almond quartz topaz garnet opal jasper flint "
    "linen denim satin canvas leather paper plastic rubber ceramic concrete"
)
UNITS = ("cm", "m", "kg", "g", "litres", "km", "m2", "days", "pieces", "hours", "%", "", "", "")
TIMES = (("day 1", "day 3"), ("first", "second"), ("morning", "evening"), ("before", "after"), ("day 1", "day 2"))
NO_LINE = -1
KEPT_SHARE = 0.85  # of words and yes/no that are the same at another time


@dataclass(frozen=True, slots=True)
class Item:
    """One line of a synthetic record and how its options are drawn."""

    label: str
    kind: Kind
    unit: str
    value: str
    number: float
    decimals: int


@dataclass(frozen=True, slots=True)
class Case:
    """The lines of a record, the item asked, its options, which line tells, and how likely each option is."""

    items: list[Item]
    asked: Item
    options: tuple[str, ...]
    answer: int
    telling: int  # a line, or NO_LINE: only what is usual tells
    usual: str = ""  # what the question says is usual
    shares: tuple[float, ...] = ()  # probability of each option; empty: the answer is certain, or drawn


def half(words: tuple[str, ...], part: Part) -> tuple[str, ...]:
    """One vocabulary's share of these words."""
    return words[0::2] if part == "train" else words[1::2]


def draw_labels(rng: np.random.Generator, count: int, part: Part) -> list[str]:
    """Distinct labels, or two lines would contradict each other."""
    nouns, adjectives = half(NOUNS, part), half(ADJECTIVES, part)
    labels: dict[str, None] = {}
    while len(labels) < count:
        noun = nouns[rng.integers(len(nouns))]
        label = f"{adjectives[rng.integers(len(adjectives))]} {noun}" if rng.random() < 0.5 else noun
        labels[label.capitalize()] = None
    return list(labels)


def draw_item(rng: np.random.Generator, label: str, part: Part, kind: Kind | None = None) -> Item:
    """A line with this label: a number, a word or yes/no, each with a third, or of this kind."""
    if kind is None:
        kind = KINDS[rng.integers(3)]
    if kind == "number":
        decimals = int(rng.integers(3))
        # As laboratory values do, magnitudes run from below one to thousands.
        number = round(float(np.exp(rng.uniform(np.log(2 * 10.0**-decimals), np.log(3000)))), decimals)
        return Item(label, "number", UNITS[rng.integers(len(UNITS))], f"{number:.{decimals}f}", number, decimals)
    if kind == "word":
        words = half(VALUES, part)
        return Item(label, "word", "", words[rng.integers(len(words))], 0.0, 0)
    return Item(label, "yes", "", ("yes", "no")[rng.integers(2)], 0.0, 0)
