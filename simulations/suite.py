"""The evaluation suite: every task over open registries, the model beside its base and usual models, one report.

Run on one machine, by `wardround evaluate MODEL --out FOLDER`. Enters: a model folder, tasks (common/tasks.py), open
registries. Leaves in FOLDER: evaluation.json (common/evaluation_file.py), report.html, card.md, reasoning.jsonl and
review.jsonl (for experts); answers/ lets an interrupted evaluation go on. Records in the last three are of open
registries; a closed one is refused here and scored by its hospital (client/score.py).

A model answers the same questions of the same held-out patients as all others, so differences are paired.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..client import score
from ..client.exam import Exam, answered, answered_by_probabilities, make_exam
from ..client.questions import QuestionBuilder
from ..client.registry import Registry
from ..client.tabular import Method, tabular_probabilities
from ..common.config import ModelConfig, RunConfig
from ..common.contrast import Spoken, export, flag_all, flag_counts, rows, side_by_side
from ..common.counts import count
from ..common.dictionary import load_dictionary
from ..common.errors import ConfigError, ModelError
from ..common.evaluation_file import evaluation, write_evaluation
from ..common.files import write_atomic
from ..common.question import PromptTemplate, load_prompt, parse_answer
from ..common.record import Record, record_of, unit
from ..common.schema import Schema, derive_schema
from ..common.scored import Answered
from ..common.seeds import derive_rng, derive_seed
from ..common.summary import summarise_task
from ..common.tasks import Task
from . import registries

BASE, FINAL = "base", "final"
RESERVED = (BASE, FINAL, "chance", "majority", *get_args(Method))
Step = Callable[[str, int], None]  # (what is being done, how many questions were done since)


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        model: a folder, a packaged name or a cached id.
        base: what it was trained from; None: the model alone, compared with nothing.
        beside: name → model, to stand in the same table: each hospital's own, the centrally trained one.
        tasks: of open registries.
        config: its prompt, questions and speed are used.
        n_questions: of each task, at most one a test patient.
        spoken: questions a registry that base and model also answer in words, for the audit of their reasoning.
        words: most tokens of such an answer.
        open_questions: patients of each open task.
        samples: texts a question whose majority is the answer; 1: the greedy one.
        tabular: whether logistic regression and gradient boosting are trained beside.
        seed: of questions and resamples.
        tables: registry → file, for those that no package carries (`registries.FILED`).
    """

    model: str
    base: str | None
    beside: Mapping[str, str]
    tasks: Sequence[Task]
    config: RunConfig
    n_questions: int = 300
    spoken: int = 12
    words: int = 96
    open_questions: int = 4
    samples: int = 1
    tabular: bool = True
    seed: int = 0
    tables: Mapping[str, Path] = field(default_factory=dict[str, Path])


@dataclass(frozen=True, eq=False)
class Ward:
    """One registry as the suite uses it."""

    registry: Registry
    splits: Mapping[str, np.ndarray]
    split_key: str
    schema: Schema


@dataclass(frozen=True, eq=False)
class Suite:
    """All that is asked, made before a model is loaded."""

    request: Request
    template: PromptTemplate
    wards: Mapping[str, Ward]
    exams: list[Exam]
    open_tasks: list[Task]

    def work(self, exam: Exam) -> int:
        """Questions that models answer in this task, both orders counted."""
        return len(exam.questions) * (2 + (self.request.base is not None) + len(self.request.beside))


@dataclass
class Voices:
    """What models said in words: by registry for the audit, by open task for experts."""

    spoken: dict[str, dict[str, Spoken]] = field(default_factory=dict[str, dict[str, Spoken]])
    open_texts: dict[str, dict[str, list[str]]] = field(default_factory=dict[str, dict[str, list[str]]])


def prepare(request: Request, out: Path) -> Suite:
    """Registries, schemas and questions of all tasks; tables are written into OUT/registries.

    Raises:
        ConfigError: no task, a task that its registry cannot serve, a name used twice, a registry that is not open, or
            samples without reasoning.
    """
    taken = [name for name in request.beside if name in RESERVED]
    if taken:
        raise ConfigError(f"--beside: '{taken[0]}' is the name of another row; choose another")
    if not request.tasks:
        raise ConfigError("no task to evaluate")
    if request.samples > 1 and request.config.questions.reasoning_tokens == 0:
        raise ConfigError("--samples: expected questions.reasoning_tokens above 0: letters alone are not sampled")
    for task in request.tasks:  # before anything is built
        task.check(load_dictionary(registries.dictionary_path(task.registry)))
        if task.registry in registries.FILED and task.registry not in request.tables:
            raise ConfigError(f"task '{task.name}': name the file of its registry, --table {task.registry}=FILE")
    template, wards = load_prompt(request.config.model.prompt), {}
    for name in dict.fromkeys(task.registry for task in request.tasks):
        wards[name] = _ward(name, request, out)
    exams: list[Exam] = []
    for task in request.tasks:
        ward = wards[task.registry]
        if task.kind == "open":
            continue
        rng = derive_rng(request.seed, f"suite {task.name}")
        exams.append(
            make_exam(task, ward.registry, ward.splits, ward.schema, template, request.config, request.n_questions, rng)
        )
    return Suite(request, template, wards, exams, [task for task in request.tasks if task.kind == "open"])


def _ward(name: str, request: Request, out: Path) -> Ward:
    table, dictionary = registries.write(name, out / "registries" / name, request.tables.get(name))
    asked = score.Request(table=table, dictionary=dictionary, config=_divided_by(name, dictionary, table, request))
    site, split_key = score.open_site(asked)
    registry = site.registry
    if not registry.dictionary.public:
        raise ConfigError(f"registry '{name}' is not open: its hospital scores it, `wardround evaluate MODEL TABLE …`")
    train = registry.take(site.splits["train"])
    schema = derive_schema(count(train.values, registry.dictionary), registry.dictionary, request.config.questions)
    return Ward(registry, site.splits, split_key, schema)


def _divided_by(name: str, dictionary: Path, table: Path, request: Request) -> RunConfig:
    """The config of the model whose run divided this registry's patients, so that nobody's training patients are asked.

    Raises:
        ConfigError: two models were trained on two divisions of it.
    """
    described = load_dictionary(dictionary)
    trained: dict[str, RunConfig] = {}
    for model in (request.model, *([request.base] if request.base else []), *request.beside.values()):
        config = score.model_config(request.config, model)
        key = score.key_of_the_run(score.Request(table=table, dictionary=dictionary, config=config), described)
        if key is not None:
            trained.setdefault(key, config)
    if len(trained) > 1:
        first, second, *_ = (config.model.id for config in trained.values())
        raise ConfigError(
            f"'{first}' and '{second}' were trained on registry '{name}' with its patients divided in two ways: some "
            "test patients of the one are training patients of the other; compare models of runs with one seed"
        )
    return next(iter(trained.values()), score.model_config(request.config, request.model))


def run(suite: Suite, out: Path, step: Step) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Answers, scores and writes everything.

    Returns:
        The content of evaluation.json; and by registry the questions that only one of base and final had right, as
        `common.contrast.rows` tells them, for the report.

    Raises:
        ModelError: a model cannot be used with this prompt.
    """
    request = suite.request
    named = {**({BASE: request.base} if request.base is not None else {}), **request.beside, FINAL: request.model}
    answers: dict[str, dict[str, Answered]] = {exam.task.name: {} for exam in suite.exams}
    permuted: dict[str, dict[str, Answered]] = {exam.task.name: {} for exam in suite.exams}
    voices, facts = Voices(), {}
    for name, model in named.items():
        facts[name] = _ask(suite, name, model, out, answers, permuted, voices, step)
    if request.tabular:
        for exam in suite.exams:
            for method in get_args(Method):
                step(f"{method}, {exam.task.name}", 0)
                found = _tabular(exam, method, request.seed, out)
                # Before "final", so that the table ends with what it is about.
                final = answers[exam.task.name].pop(FINAL)
                answers[exam.task.name] |= {method: answered_by_probabilities(found), FINAL: final}
    tasks: list[dict[str, Any]] = []
    for exam in suite.exams:
        step(f"statistics, {exam.task.name}", 0)
        scored = exam.scored(answers[exam.task.name], permuted[exam.task.name])
        tasks.append(
            summarise_task(
                scored,
                name=exam.task.name,
                reference=BASE if request.base is not None else FINAL,
                final=FINAL,
                n_bootstrap=request.config.evaluation.bootstrap_samples,
                seed=derive_seed(request.seed, f"bootstrap {exam.task.name}") % 2**32,
            )
        )
    counts, contrasts = _audit(suite, voices, out)
    content = evaluation(tasks, provenance=_provenance(suite, facts), reasoning=counts)
    _write_review(suite, voices, out)
    write_evaluation(out / "evaluation.json", content)
    return content, contrasts


def _ask(
    suite: Suite,
    name: str,
    model: str,
    out: Path,
    answers: dict[str, dict[str, Answered]],
    permuted: dict[str, dict[str, Answered]],
    voices: Voices,
    step: Step,
) -> dict[str, Any]:
    """Everything that one model is asked; returns what it is."""
    from ..common.lm import models
    from ..common.lm.answers import answer_questions, free_texts, greedy_texts, sampled_answers
    from ..common.lm.packaged import base_digest, resolve

    request, config = suite.request, suite.request.config
    changed: ModelConfig = config.model.model_copy(update={"id": model})
    digest = base_digest(resolve(model))
    loaded: list[Any] = []

    def lm() -> Any:  # loaded only where something is left to ask
        if not loaded:
            step(f"loading {name}", 0)
            loaded.append(models.load(changed, None, seed=0))
        return loaded[0]

    def ask(exam: Exam, questions: Sequence[Any], order: str) -> Answered:
        key = f"{digest} {exam.digest()} {order} {config.questions.reasoning_tokens} {request.samples} {request.seed}"
        file = out / "answers" / f"{name}-{exam.task.name}-{order}.npz"
        found = _stored(file, key)
        if found is not None:
            step(f"{name}, {exam.task.name}", len(questions))
            return found
        settings = {
            "reasoning_tokens": config.questions.reasoning_tokens,
            "micro_batch": config.speed.micro_batch,
            "on_done": lambda done: step(f"{name}, {exam.task.name}", done),
        }
        options = [len(question.options) for question in questions]
        if request.samples > 1:
            outcomes, votes = sampled_answers(
                lm(), questions, suite.template, samples=request.samples, seed=request.seed, **settings
            )
            own = answered(outcomes, options)
            voted = votes.sum(axis=1, keepdims=True)
            shares = np.where(voted > 0, votes / np.maximum(voted, 1e-12), own.probabilities)
            found = Answered(shares, own.chosen, own.boxed, own.length)
        else:
            found = answered(answer_questions(lm(), questions, suite.template, **settings), options)
        _store(file, key, found)
        return found

    for exam in suite.exams:
        answers[exam.task.name][name] = ask(exam, exam.questions, "first")
        if name == FINAL:
            permuted[exam.task.name][name] = ask(exam, exam.reordered, "second")
    if name in (BASE, FINAL) and request.spoken:
        for registry, exam in _spoken_exams(suite).items():
            step(f"{name} reasons, {registry}", 0)
            questions = exam.questions[: request.spoken]
            texts = greedy_texts(lm(), questions, suite.template, request.words)
            chosen = [_read(text, len(question.options)) for text, question in zip(texts, questions, strict=True)]
            voices.spoken.setdefault(registry, {})[name] = Spoken(chosen, texts)
    if name in (BASE, FINAL):
        for task in suite.open_tasks:
            step(f"{name} advises, {task.name}", 0)
            messages = [_consultation(task, text) for text in _open_records(suite, task)[0]]
            voices.open_texts.setdefault(task.name, {})[name] = free_texts(lm(), messages, request.words)
    return {"model": model, "digest": digest}


def _read(text: str, n_options: int) -> int:
    found = parse_answer(text, n_options)
    return -1 if found is None else found


def _stored(file: Path, key: str) -> Answered | None:
    """Answers of an interrupted evaluation, where they are to the same questions by the same model."""
    try:
        with np.load(file, allow_pickle=False) as data:
            if str(data["key"]) == key:
                return Answered(data["probabilities"], data["chosen"], data["boxed"], data["length"])
    except (OSError, ValueError, KeyError, EOFError):
        pass
    return None


def _store(file: Path, key: str, found: Answered) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        key=np.array(key),
        probabilities=found.probabilities,
        chosen=found.chosen,
        boxed=found.boxed,
        length=found.length,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, buffer.getvalue(), mode=0o600)


def _tabular(exam: Exam, method: Method, seed: int, out: Path) -> np.ndarray:
    """A tabular model's probabilities, kept like a language model's answers."""
    file, key = out / "answers" / f"{method.replace(' ', '-')}-{exam.task.name}.npz", f"{exam.digest()} {seed}"
    found = _stored(file, key)
    if found is not None:
        return found.probabilities
    probabilities = tabular_probabilities(
        method, exam.builder, exam.train_rows, exam.questions, exam.rows, exam.shown, seed
    )
    _store(file, key, answered_by_probabilities(probabilities))
    return probabilities


def _spoken_exams(suite: Suite) -> dict[str, Exam]:
    """The first scored task of every registry: models also reason about some of its questions in words."""
    found: dict[str, Exam] = {}
    for exam in suite.exams:
        found.setdefault(exam.task.registry, exam)
    return found


def _audit(suite: Suite, voices: Voices, out: Path) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Counts of flags by registry and model, and the differing questions, which also go to reasoning.jsonl."""
    counts: dict[str, Any] = {}
    contrasts: dict[str, list[dict[str, Any]]] = {}
    lines: list[str] = []
    for registry, spoken in voices.spoken.items():
        exam, dictionary = _spoken_exams(suite)[registry], suite.wards[registry].registry.dictionary
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


def _open_records(suite: Suite, task: Task) -> tuple[list[str], list[int]]:
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


def _consultation(task: Task, record: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{record}\n\n{task.question}"}]


def _write_review(suite: Suite, voices: Voices, out: Path) -> None:
    """Pairs of answers in words as `wardround server review start` reads them."""
    lines: list[dict[str, Any]] = [{"wardround_review": 1, "data": "open", "title": "Reasoning of two models"}]
    for registry, spoken in voices.spoken.items():
        if BASE not in spoken:
            continue
        exam, dictionary = _spoken_exams(suite)[registry], suite.wards[registry].registry.dictionary
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
        records, _ = _open_records(suite, task)
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


def _provenance(suite: Suite, facts: Mapping[str, Any]) -> dict[str, Any]:
    request = suite.request
    return {
        "models": dict(facts),
        "tasks": {
            exam.task.name: {
                "title": exam.task.title,
                "kind": exam.task.kind,
                "metric": exam.task.metric,
                "registry": exam.task.registry,
                "questions_digest": exam.digest(),
            }
            for exam in suite.exams
        },
        "open_tasks": [task.name for task in suite.open_tasks],
        "registries": {
            name: {
                "title": ward.registry.dictionary.title,
                "dictionary_digest": ward.registry.dictionary.digest(),
                "schema_digest": ward.schema.digest(),
                "split_key": ward.split_key,
                "training_patients": len(ward.splits["train"]),
                "test_patients": len(ward.splits["test"]),
            }
            for name, ward in suite.wards.items()
        },
        "prompt": request.config.model.prompt,
        "questions": request.config.questions.model_dump(mode="json"),
        "samples": request.samples,
        "seed": request.seed,
    }


def base_of(model: str) -> str | None:
    """The base model that a run's model folder says it was trained from; None: it says nothing.

    Raises:
        ModelError: its provenance.json is not what a run writes.
    """
    file = Path(model) / "provenance.json"
    if not file.is_file():
        return None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["base_model"])
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{file}: not a model's provenance; expected the file that a run wrote") from None
