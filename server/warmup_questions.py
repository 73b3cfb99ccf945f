"""Synthetic questions of the public warm-up: words and numbers from this file and a generator, no patient data.

Runs at the coordinator; nothing here is private. Each question looks exactly like a real one (same prompt template:
record, question, options, letters), but its record **states** the value that is asked, so the right answer needs no
knowledge: find the value, find the option that carries it, say its letter. That is all a small model must learn here.

A share of the questions may only **hint** at the answer, as records of patients do: the same thing at another time is
stated and the truth lies near it, or the asked yes/no is as frequent as the record's other lines make it. Their truth
is drawn, so a model can do no better than the right probabilities, and learns not to be sure of everything.

Where the prompt says what is usual (`usual_number`), questions are those of warmup_usual.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..common.question import LETTERS, PromptTemplate, Question
from .warmup_usual import informed_case
from .warmup_words import KEPT_SHARE, NO_LINE, TIMES, VALUES, Case, Item, Part, draw_item, draw_labels, half

_MOST_LINES = 64  # far fewer than there are labels, so that drawing distinct ones ends soon
_SECTIONS = ("House", "Garden", "Workshop", "Harbour", "Village", "Road")


@dataclass(frozen=True, slots=True)
class Stated:
    """A synthetic question, and in words why its answer is right: the line that tells, then the option it leads to.

    `shares` are the probabilities of its options where they are known, and are trained on in place of the answer.
    """

    question: Question
    reason: str
    shares: tuple[float, ...] = ()


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
        Questions of which a third each have numbers, words and yes/no as options (more yes/no among the hinted, mostly
        numbers where the prompt says what is usual); the answer's position is uniform.
    """
    made: list[Stated] = []
    longest = min(features_per_record, _MOST_LINES)
    for _ in range(count):
        hinted = hinted_share > 0 and rng.random() < hinted_share
        if template.says_usual:
            made.append(_written(rng, template, informed_case(rng, template, longest, n_options, part, hinted=hinted)))
            continue
        length = int(rng.integers(1, longest + 1))
        if hinted and rng.random() < 0.5:
            case = _base_rate(rng, max(length, 4), part)
        elif hinted:
            case = _related(rng, length, n_options, part)
        else:
            case = _stated(rng, length, n_options, part)
        made.append(_written(rng, template, case))
    return made


def _stated(rng: np.random.Generator, length: int, n_options: int, part: Part) -> Case:
    """The asked item is a line of the record."""
    items = [draw_item(rng, label, part) for label in draw_labels(rng, length, part)]
    place = int(rng.integers(length))
    options, answer = _options(rng, items[place], n_options, part)
    return Case(items, items[place], options, answer, place)


def _related(rng: np.random.Generator, length: int, n_options: int, part: Part) -> Case:
    """The record states the thing at one time, the question asks another: near it, or mostly the same."""
    items = [draw_item(rng, label, part) for label in draw_labels(rng, length, part)]
    place = int(rng.integers(length))
    name = items[place].label
    times = TIMES[rng.integers(len(TIMES))]
    first, then = (times[index] for index in rng.permutation(2))
    items[place] = replace(items[place], label=f"{name}, {first}")
    known = items[place]
    if known.kind == "number":
        sd = float(rng.uniform(0.03, 0.3))
        number = max(known.number * (1 + sd * float(rng.normal())), 10.0**-known.decimals)
        asked = replace(known, label=f"{name}, {then}", value=f"{number:.{known.decimals}f}", number=number)
        options, answer = _options(rng, asked, n_options, part, step_share=2 * sd * known.number / number)
    else:
        kept = rng.random() < KEPT_SHARE
        value = known.value if kept else draw_item(rng, name, part, known.kind).value
        asked = replace(known, label=f"{name}, {then}", value=value)
        options, answer = _options(rng, asked, n_options, part, among=known.value)
    return Case(items, asked, options, answer, place)


def _base_rate(rng: np.random.Generator, length: int, part: Part) -> Case:
    """Yes or no, as frequent as among the record's other lines."""
    *labels, asked_label = draw_labels(rng, length + 1, part)
    rate = float(rng.beta(0.6, 0.6))
    items = [draw_item(rng, label, part, "yes" if rng.random() < 0.75 else None) for label in labels]
    drawn = [replace(i, value="yes" if rng.random() < rate else "no") if i.kind == "yes" else i for i in items]
    asked = Item(asked_label, "yes", "", "yes" if rng.random() < rate else "no", 0.0, 0)
    options, answer = _options(rng, asked, 2, part)
    return Case(drawn, asked, options, answer, int(rng.integers(length)))


def _written(rng: np.random.Generator, template: PromptTemplate, case: Case) -> Stated:
    """The case as the prompt template writes it."""
    asked, section = case.asked, _SECTIONS[rng.integers(len(_SECTIONS))]
    unit = f" {asked.unit}" if asked.unit else ""
    lines = [
        template.line.format(label=item.label, value=item.value, unit=f" {item.unit}" if item.unit else "")
        for item in case.items
    ]
    telling = case.usual.strip(" .") if case.telling == NO_LINE else lines[case.telling]
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
    return Stated(question, f"{telling}. {shown[case.answer]}.", case.shares)


def _options(
    rng: np.random.Generator,
    item: Item,
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
        others = [word for word in half(VALUES, part) if word != item.value]
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
