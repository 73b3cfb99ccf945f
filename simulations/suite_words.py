"""What models said in words in an evaluation: the audit of their reasoning, and pairs of answers for experts.

Run on one machine, over open registries, by suite.py. Enters: texts of base and final on the same questions. Leaves:
reasoning.jsonl and review.jsonl, which hold records, and counts of what was flagged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..client.exam import Exam
from ..client.questions import QuestionBuilder
from ..common.contrast import Spoken, export, flag_all, flag_counts, rows, side_by_side
from ..common.files import write_atomic
from ..common.record import Record, record_of, unit
from ..common.seeds import derive_rng
from ..common.tasks import Task

if TYPE_CHECKING:
    from .suite import Suite

BASE, FINAL = "base", "final"


@dataclass
class Voices:
    """What models said in words: by registry for the audit, by open task for experts."""

    spoken: dict[str, dict[str, Spoken]] = field(default_factory=dict[str, dict[str, Spoken]])
    open_texts: dict[str, dict[str, list[str]]] = field(default_factory=dict[str, dict[str, list[str]]])


def spoken_exams(suite: Suite) -> dict[str, Exam]:
    """The first scored task of every registry: models also reason about some of its questions in words."""
    found: dict[str, Exam] = {}
    for exam in suite.exams:
        found.setdefault(exam.task.registry, exam)
    return found


def audit(suite: Suite, voices: Voices, out: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Counts of flags by registry and model, and the differing questions, which also go to reasoning.jsonl."""
    counts: dict[str, Any] = {}
    contrasts: dict[str, list[dict[str, Any]]] = {}
    lines: list[str] = []
    for registry, spoken in voices.spoken.items():
        exam, dictionary = spoken_exams(suite)[registry], suite.wards[registry].registry.dictionary
        questions = exam.questions[: suite.request.spoken]
        counts[registry] = {
            name: {"n": len(questions), **flag_counts(flag_all(questions, suite.template, dictionary, said))}
            for name, said in spoken.items()
        }
        if BASE in spoken:
            pairs = side_by_side(questions, suite.template, dictionary, spoken[BASE], spoken[FINAL])
            contrasts[registry] = rows(pairs)
            part = out / "answers" / f"reasoning-{registry}.jsonl"
            part.parent.mkdir(parents=True, exist_ok=True)
            export(part, pairs, dictionary)
            lines.append(part.read_text(encoding="utf-8"))
    if lines:
        write_atomic(out / "reasoning.jsonl", "".join(lines).encode(), mode=0o600)
    return counts, contrasts


def open_records(suite: Suite, task: Task) -> tuple[list[str], list[int]]:
    """Records of some test patients of an open task, as text, and their rows."""
    ward, request = suite.wards[task.registry], suite.request
    registry, rng = ward.registry, derive_rng(request.seed, f"suite {task.name}")
    asked = rng.permutation(ward.splits["test"])
    for name, label in task.only.items():
        level = list(registry.dictionary.feature(name).levels.values()).index(label)
        asked = asked[registry.values[name][asked] == level]
    asked = asked[: request.open_questions]
    builder = QuestionBuilder(registry, ward.schema, suite.template, request.config.questions)
    return builder.records(asked, task.shown(registry.dictionary), rng), asked.tolist()


def consultation(task: Task, record: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{record}\n\n{task.question}"}]


def write_review(suite: Suite, voices: Voices, out: Path) -> None:
    """Pairs of answers in words as `wardround server review start` reads them."""
    lines: list[dict[str, Any]] = [{"wardround_review": 1, "data": "open", "title": "Reasoning of two models"}]
    for registry, spoken in voices.spoken.items():
        if BASE not in spoken:
            continue
        exam, dictionary = spoken_exams(suite)[registry], suite.wards[registry].registry.dictionary
        for index, question in enumerate(exam.questions[: suite.request.spoken]):
            record = record_of(question, suite.template, dictionary)
            lines.append(
                {
                    "id": f"{exam.task.name}-{index + 1:04d}",
                    "section": question.section,
                    "target": question.target,
                    "record": _entries(record),
                    "question": _asked(record),
                    "options": list(question.options),
                    "answers": {
                        name: {
                            "text": said.texts[index],
                            "chosen": None if said.chosen[index] < 0 else said.chosen[index],
                        }
                        for name, said in spoken.items()
                    },
                }
            )
    for task in suite.open_tasks:
        texts = voices.open_texts.get(task.name, {})
        if set(texts) < {BASE, FINAL}:
            continue
        records, _ = open_records(suite, task)
        for index, record in enumerate(records):
            lines.append(
                {
                    "id": f"{task.name}-{index + 1:04d}",
                    "section": task.title,
                    "target": task.name,
                    "record": [{"section": "Record", "label": "As the model saw it", "value": record}],
                    "question": task.question,
                    "options": [],
                    "answers": {name: {"text": said[index], "chosen": None} for name, said in texts.items()},
                }
            )
    if len(lines) > 1:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(out / "review.jsonl", text.encode(), mode=0o600)


def _asked(record: Record) -> str:
    target = record.target
    return target.question or f"What would be the masked value of '{target.label}'?"


def _entries(record: Record) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for name, value in record.values.items():
        feature = record.features[name]
        entries.append(
            {"section": feature.section, "label": feature.label, "value": value, "unit": unit(feature).strip() or None}
        )
    return entries
