r"""Two models' reasoning side by side: the questions that one got right and the other wrong, with automatic flags.

Runs where questions and completions are: at a hospital over its own patients, or over an open or synthetic registry.
Enters: questions and both models' choices and texts. What comes out shows records and texts: `export` writes it for
experts from open or synthetic registries only, a hospital's own go into its own report (`rows`); `flag_counts` are
counts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .dictionary import Dictionary
from .errors import UserError
from .files import write_atomic
from .question import LETTERS, PromptTemplate, Question
from .reasoning import KINDS, Flag, audit
from .record import Record, record_of

FORMAT = "wardround side by side 1"
Change = Literal["gained", "lost"]  # the final model is right and the base wrong; the reverse


@dataclass(frozen=True)
class Spoken:
    """One model's answers to n questions.

    Attributes:
        chosen: index of the chosen option; −1: none.
        texts: the assistant's turns.
    """

    chosen: Sequence[int]
    texts: Sequence[str]


@dataclass(frozen=True)
class Said:
    """One model's answer to one question, and what is odd about it."""

    chosen: int
    text: str
    flags: tuple[Flag, ...]


@dataclass(frozen=True)
class Pair:
    """One question that the two models answered differently, one of them rightly.

    Attributes:
        index: of the question among those asked.
        change: seen from the base.
        question: what was asked; `record`: what it showed.
        base, final: the two answers.
    """

    index: int
    change: Change
    question: Question
    record: Record
    base: Said
    final: Said


def flag_all(
    questions: Sequence[Question], template: PromptTemplate, dictionary: Dictionary, spoken: Spoken
) -> list[tuple[Flag, ...]]:
    """The flags of every completion, in the order of the questions.

    Raises:
        ValueError: not one choice and text a question.
        VerificationError: a question was not made with this template over this dictionary.
    """
    return [
        tuple(audit(record_of(question, template, dictionary), text, chosen=int(chosen), template=template))
        for question, chosen, text in zip(questions, spoken.chosen, spoken.texts, strict=True)
    ]


def flag_counts(flags: Iterable[Sequence[Flag]]) -> dict[str, int]:
    """In how many completions each kind was raised; "any": in how many at least one."""
    kinds = [{flag.kind for flag in found} for found in flags]
    return {kind: sum(kind in found for found in kinds) for kind in KINDS} | {"any": sum(map(bool, kinds))}


def side_by_side(
    questions: Sequence[Question],
    template: PromptTemplate,
    dictionary: Dictionary,
    base: Spoken,
    final: Spoken,
) -> list[Pair]:
    """Questions that exactly one of two models got right: first those gained, then those lost, in their order.

    Args:
        questions: all that were asked, made with `template` over `dictionary`.
        template: their prompt.
        dictionary: their registry's.
        base: the model before training.
        final: the model after.

    Raises:
        ValueError: not one choice and text a question.
        VerificationError: a question was not made with this template over this dictionary.
    """
    pairs: list[Pair] = []
    answers = zip(questions, base.chosen, base.texts, final.chosen, final.texts, strict=True)
    for index, (question, before, before_text, after, after_text) in enumerate(answers):
        if (before == question.answer) == (after == question.answer):
            continue
        record = record_of(question, template, dictionary)
        said = [
            Said(int(chosen), text, tuple(audit(record, text, chosen=int(chosen), template=template)))
            for chosen, text in ((before, before_text), (after, after_text))
        ]
        change: Change = "gained" if after == question.answer else "lost"
        pairs.append(Pair(index, change, question, record, said[0], said[1]))
    return sorted(pairs, key=lambda pair: (pair.change, pair.index))


def export(
    path: Path, pairs: Sequence[Pair], dictionary: Dictionary, *, names: Mapping[str, str] | None = None
) -> None:
    """Writes pairs for experts, one JSON object a line; the file is its owner's alone.

    Args:
        path: a .jsonl file.
        pairs: of one registry.
        dictionary: that registry's.
        names: what to call "base" and "final"; left out, by these words. To blind readers, give others.

    Raises:
        UserError: the registry is not open: its records stay in the hospital's own report.
    """
    if not dictionary.public:
        raise UserError(
            f"dictionary '{dictionary.name}' is not public: records of its patients are shown in the hospital's own "
            "report only, and not exported"
        )
    lines = [json.dumps(_entry(pair, dictionary, names or {}), ensure_ascii=False) for pair in pairs]
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())


def _entry(pair: Pair, dictionary: Dictionary, names: Mapping[str, str]) -> dict[str, Any]:
    question = pair.question
    return {
        "format": FORMAT,
        "registry": dictionary.name,
        "question": pair.index,
        "change": pair.change,
        "target": question.target,
        "label": pair.record.target.label,
        "section": question.section,
        "record": [list(line) for line in pair.record.pairs()],
        "text": question.text,
        "options": list(question.options),
        "answer": LETTERS[question.answer],
        "models": {
            names.get(name, name): {
                "chosen": _letter(said.chosen),
                "text": said.text,
                "flags": [
                    {
                        "kind": flag.kind,
                        "start": flag.start,
                        "end": flag.end,
                        "quote": said.text[flag.start : flag.end],
                        "reason": flag.reason,
                    }
                    for flag in said.flags
                ],
            }
            for name, said in (("base", pair.base), ("final", pair.final))
        },
    }


def rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """What a report shows of each pair; texts are as they were, so that whoever writes a page escapes them.

    Returns:
        One mapping a pair: "change", "label", "question" (the whole text), "answer" (letter and value), and "base" and
        "final", each with "chosen" (letter and value), "right", "text", "parts" ((words, flag kinds) in order, which
        joined are the text) and "flags" ((kind, reason)).
    """
    return [
        {
            "change": pair.change,
            "label": pair.record.target.label,
            "question": pair.question.text,
            "answer": _option(pair.question, pair.question.answer),
            **{
                name: {
                    "chosen": _option(pair.question, said.chosen),
                    "right": said.chosen == pair.question.answer,
                    "text": said.text,
                    "parts": marked(said.text, said.flags),
                    "flags": [(flag.kind, flag.reason) for flag in said.flags],
                }
                for name, said in (("base", pair.base), ("final", pair.final))
            },
        }
        for pair in pairs
    ]


def marked(text: str, flags: Sequence[Flag]) -> list[tuple[str, tuple[str, ...]]]:
    """The text in parts, each with the kinds of the flags that cover it, for a page to mark.

    >>> marked("age 80, so B", [Flag("contradicts_record", 0, 6, "")])
    [('age 80', ('contradicts_record',)), (', so B', ())]
    """
    cuts = sorted({0, len(text), *(place for flag in flags for place in (flag.start, flag.end))})
    parts: list[tuple[str, tuple[str, ...]]] = []
    for start, end in itertools.pairwise(cuts):
        kinds = tuple(sorted({flag.kind for flag in flags if flag.start <= start and end <= flag.end}))
        parts.append((text[start:end], kinds))
    return parts


def _letter(option: int) -> str | None:
    return LETTERS[option] if option >= 0 else None


def _option(question: Question, option: int) -> str:
    return f"{LETTERS[option]}. {question.options[option]}" if option >= 0 else "no option"
