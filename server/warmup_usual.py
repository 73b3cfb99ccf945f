"""Warm-up questions whose prompt says what is usual: values drawn from laws, and the law is what the question says.

Runs at the coordinator; nothing here is private. What a small model needs before rounds of reinforcement learning teach
it anything of patients is to read a distribution and a number: which of five numbers is the likeliest when "Usually
138, mostly 131 to 144" is all that is known, and how that changes when the record shows the same thing two days
earlier. Each number has a law (one or two normal components, on the number or its logarithm), its options are a ladder
as a hospital draws it (client/options.py), and what is usual is said of the law as of a schema (client/usual.py). Words
and yes/no have levels with shares.

A case is one of three: only what is usual tells; the record shows the same thing at another time; the record states
the very answer. With each come the probabilities of its options, which the law decides: training on them instead of on
one drawn answer saves the noise of the draw. They are near, not exact (simulated): a ladder that has no room below is
likelier to begin with the truth than its shares say (lowest rung 0.13 said, 0.24 seen, in 9 % of unrelated numbers), a
rung that rounds to nothing is never the truth, and that a rare level is offered at all says a little for it (0.45 said,
0.43 seen, where there are more levels than options). A change to that makes the released adapter another one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..common.question import PromptTemplate
from .warmup_words import (
    KEPT_SHARE,
    NO_LINE,
    TIMES,
    UNITS,
    VALUES,
    Case,
    Item,
    Kind,
    Part,
    draw_item,
    draw_labels,
    half,
)

_KIND_SHARES: tuple[tuple[Kind, float], ...] = (("number", 0.65), ("word", 0.2), ("yes", 0.15))
_RELATED_SHARE = 0.5  # of hinted questions; in the others the record says nothing of what is asked
_ALL_OPTIONS = 0.85  # questions with as many options as there may be: those of patients nearly always have them
_FULL_RECORD = 0.7
_TIMED = 0.6  # labels that say when
_NUMBER_LEVELS = 0.2  # of categories, whose levels are written as numbers: scores
_MOST_LEVELS = 8
# How alike a thing is at two times: a patient's potassium hardly, weight nearly the same. A question does not say it.
_CORRELATIONS = np.array([0.3, 0.5, 0.7, 0.8, 0.9, 0.97])
_BIMODAL_SHARE = 0.25
_QUANTILE = 0.9674  # sds of a normal's middle two thirds, as client/usual.py writes them
_STEP = (2 / 3, 2.0)  # a ladder's step in sds, as client/options.py draws it with two sds at the widest


@dataclass(frozen=True, slots=True)
class Law:
    """How a number is distributed among all: normal components on the number or (`log`) on its logarithm.

    Attributes:
        weights: float64 (components,), positive, sum 1; means, sds: of the components, on the law's scale.
        log: whether that scale is the natural logarithm of the number.
        decimals: with which numbers are written.
    """

    weights: np.ndarray
    means: np.ndarray
    sds: np.ndarray
    log: bool
    decimals: int

    def place(self, number: float | np.ndarray) -> np.ndarray:
        """Where a number lies on the law's scale; at least half a decimal above nothing."""
        positive = np.maximum(number, 0.5 * 10.0**-self.decimals)
        return np.log(positive) if self.log else positive

    def number(self, place: float | np.ndarray) -> np.ndarray:
        """The number at a place."""
        return np.exp(place) if self.log else np.asarray(place)

    def joint(self, places: np.ndarray) -> np.ndarray:
        """Weight × density of every component, shape (places, components)."""
        z = (places[:, None] - self.means) / self.sds
        return self.weights / self.sds * np.exp(-0.5 * z * z)

    def usual(self) -> tuple[float, float, float]:
        """The densest number, and the ends of the middle two thirds."""
        if len(self.means) == 1:
            places = self.means[0] + self.sds[0] * np.array([0.0, -_QUANTILE, _QUANTILE])
        else:
            grid = np.linspace((self.means - 4 * self.sds).min(), (self.means + 4 * self.sds).max(), 301)
            density = self.joint(grid).sum(axis=1)
            mass = np.cumsum(density)
            low, high = (grid[np.searchsorted(mass, share * mass[-1])] for share in (1 / 6, 5 / 6))
            places = np.array([grid[np.argmax(density)], low, high])
        middle, low, high = self.number(places).tolist()
        return middle, low, high


def informed_case(
    rng: np.random.Generator, template: PromptTemplate, longest: int, n_options: int, part: Part, *, hinted: bool
) -> Case:
    """One case, its record of at most `longest` lines; `hinted`: the record does not state the answer."""
    kind = _KIND_SHARES[int(rng.choice(len(_KIND_SHARES), p=[share for _, share in _KIND_SHARES]))][0]
    related = hinted and rng.random() < _RELATED_SHARE
    length = longest if rng.random() < _FULL_RECORD else int(rng.integers(1, longest + 1))
    times = TIMES[rng.integers(len(TIMES))]
    known_at, asked_at = (times[index] for index in rng.permutation(2))
    *labels, name = draw_labels(rng, length + 1, part)
    items = [draw_item(rng, _timed(rng, label, times), part) for label in labels]
    count = n_options if rng.random() < _ALL_OPTIONS else int(rng.integers(2, n_options + 1))
    unit = UNITS[rng.integers(len(UNITS))] if kind == "number" else ""
    blank = Item(f"{name}, {asked_at}" if related else _timed(rng, name, times), kind, unit, "", 0.0, 0)
    if kind == "number":
        asked, known, options, shares, usual = _number(rng, template, blank, count, related)
    else:
        asked, known, options, shares, usual = _level(rng, template, blank, count, part, related)
    telling = NO_LINE
    if related or not hinted:
        telling = int(rng.integers(length))
        items[telling] = replace(known, label=f"{name}, {known_at}") if related else asked
    if not hinted:
        shares = tuple(float(option == asked.value) for option in options)
    order = rng.permutation(len(options)).tolist()
    options, shares = tuple(options[i] for i in order), tuple(shares[i] for i in order)
    return Case(items, asked, options, options.index(asked.value), telling, usual, shares)


def _timed(rng: np.random.Generator, label: str, times: tuple[str, str]) -> str:
    return f"{label}, {times[rng.integers(2)]}" if rng.random() < _TIMED else label


_Drawn = tuple[Item, Item, tuple[str, ...], tuple[float, ...], str]  # asked, known, options, shares, what is usual


def _number(rng: np.random.Generator, template: PromptTemplate, blank: Item, count: int, related: bool) -> _Drawn:
    """A number of a law; another time's is correlated with it, how much is drawn and not said."""
    law = draw_law(rng, bimodal=not related)
    decimals = law.decimals
    c = int(rng.choice(len(law.means), p=law.weights))
    place, known = float(rng.normal(law.means[c], law.sds[c])), blank
    weights, centres, widths = law.weights, law.means, law.sds
    if related:
        rho = float(rng.choice(_CORRELATIONS))
        known = _item(blank, float(law.number(place)), decimals)
        shown = float(law.place(known.number))
        place = float(law.means[0] + rho * (shown - law.means[0]) + np.sqrt(1 - rho**2) * law.sds[0] * rng.normal())
        centres = law.means[0] + _CORRELATIONS * (shown - law.means[0])
        widths = law.sds[0] * np.sqrt(1 - _CORRELATIONS**2)
        weights = np.full(len(_CORRELATIONS), 1 / len(_CORRELATIONS))
    asked = _item(blank, float(law.number(place)), decimals)
    options = _ladder(rng, law, asked, int(law.joint(law.place(np.array([asked.number])))[0].argmax()), count)
    places = law.place(np.array([float(option) for option in options]))
    posterior = Law(weights, centres, widths, law.log, decimals)
    # A density may underflow at every rung when two times differ by many sds.
    density = posterior.joint(places).sum(axis=1) + 1e-12
    middle, low, high = (f"{max(number, 0.0):.{decimals}f}" for number in law.usual())
    usual = template.usual_number.format(middle=middle, low=low, high=high, unit=f" {blank.unit}" if blank.unit else "")
    return asked, known, options, tuple((density / density.sum()).tolist()), usual


def draw_law(rng: np.random.Generator, *, bimodal: bool) -> Law:
    """A law; of two components with some probability where it may be `bimodal`.

    Magnitudes run from below one to thousands; the sd is from a hundredth to half of the middle, or from 0.15 to 1 on
    the logarithm, and that of the first component always more than a decimal.
    """
    decimals, log = int(rng.choice(3, p=[0.55, 0.3, 0.15])), bool(rng.random() < 0.4)
    decimal = 10.0**-decimals
    middle = float(np.exp(rng.uniform(np.log(4 * decimal), np.log(3000 if decimals == 0 else 300))))
    share = float(rng.uniform(0.15, 1.0)) if log else float(np.exp(rng.uniform(np.log(0.01), np.log(0.5))))
    share = max(share, min(1.5 * decimal / middle, 0.5))
    means, sds = np.array([np.log(middle) if log else middle]), np.array([share if log else share * middle])
    if not (bimodal and rng.random() < _BIMODAL_SHARE):
        return Law(np.ones(1), means, sds, log, decimals)
    weight = float(rng.uniform(0.3, 0.7))
    other = float(means[0] + sds[0] * rng.choice([-1, 1]) * rng.uniform(1.5, 4))
    if not log:
        other = max(other, 2 * decimal)
    return Law(
        np.array([weight, 1 - weight]),
        np.array([means[0], other]),
        np.array([sds[0], sds[0] * rng.uniform(0.5, 1.5)]),
        log,
        decimals,
    )


def _item(blank: Item, number: float, decimals: int) -> Item:
    """The item with this number, as it is written."""
    value = f"{max(number, 10.0**-decimals):.{decimals}f}"
    return replace(blank, value=value, number=float(value), decimals=decimals)


def _ladder(rng: np.random.Generator, law: Law, asked: Item, component: int, count: int) -> tuple[str, ...]:
    """An even ladder on the law's scale, the truth at a uniform rank of those with room; equal rungs once."""
    place, decimal = float(law.place(asked.number)), 10.0**-law.decimals
    step = float(rng.uniform(*_STEP)) * float(law.sds[component])
    step = max(step, np.log1p(decimal / asked.number) if law.log else decimal)
    room = count - 1 if law.log else min(count - 1, int((place - decimal) / step))
    rank = int(rng.integers(room + 1))
    rungs = law.number(place + (np.arange(count) - rank) * step).tolist()
    written = [f"{max(rung, 0.0):.{law.decimals}f}" for rung in rungs]
    written[rank] = asked.value
    distinct = tuple(dict.fromkeys(written))
    return distinct if len(distinct) > 1 else (asked.value, f"{asked.number + decimal:.{law.decimals}f}")


def _level(
    rng: np.random.Generator, template: PromptTemplate, blank: Item, count: int, part: Part, related: bool
) -> _Drawn:
    """A word or yes/no, its levels with their shares; another time keeps the level more often than not."""
    levels = ["no", "yes"] if blank.kind == "yes" else _level_names(rng, part)
    frequencies = rng.dirichlet(np.full(len(levels), 0.8))
    own = int(rng.choice(len(levels), p=frequencies))
    chances, known = frequencies, blank
    if related:
        known = replace(blank, value=levels[own])
        chances = (1 - KEPT_SHARE) * frequencies
        chances[own] += KEPT_SHARE
        own = int(rng.choice(len(levels), p=chances))
    # The truth, then others by frequency, as client/options.py draws them; but what the record shows is always offered.
    keys = np.log(frequencies + 1e-12) + rng.gumbel(size=len(levels))
    keys[own] = np.inf
    if related:
        keys[levels.index(known.value)] = max(keys[levels.index(known.value)], 1e9)
    chosen = np.argsort(-keys)[: min(count, len(levels))]
    shares = chances[chosen] / chances[chosen].sum()
    usual = template.usual_shares(list(zip(levels, frequencies.tolist(), strict=True)))
    return (
        replace(blank, value=levels[own]),
        known,
        tuple(levels[index] for index in chosen),
        tuple(shares.tolist()),
        usual,
    )


def _level_names(rng: np.random.Generator, part: Part) -> list[str]:
    count = int(rng.integers(2, _MOST_LEVELS + 1))
    if rng.random() < _NUMBER_LEVELS:
        return [str(number) for number in np.sort(rng.permutation(101)[:count]).tolist()]
    words = half(VALUES, part)
    return [words[index] for index in rng.permutation(len(words))[:count]]
