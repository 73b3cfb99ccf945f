"""The evaluation suite: every task over open registries, the model beside its base and usual models, one report.

Run on one machine, by `wardround evaluate MODEL --out FOLDER`. Enters: a model folder, tasks (common/tasks.py), open
registries; beside them what experts preferred, and the sums of the run that made the model, which are only passed on.
Leaves in FOLDER: evaluation.json (common/evaluation_file.py), report.html, card.md, reasoning.jsonl and review.jsonl
(for experts); answers/ lets an interrupted evaluation go on. Records in the last three are of open
registries; a closed one is refused here and scored by its hospital (client/score.py).

A model answers the same questions of the same held-out patients as all others, so differences are paired.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..client import score
from ..client.exam import Exam, answered, answered_by_probabilities, calibrated, make_exam
from ..client.registry import Registry
from ..client.tabular import Method, tabular_probabilities
from ..common.config import ModelConfig, RunConfig
from ..common.contrast import Spoken
from ..common.counts import count
from ..common.dictionary import load_dictionary
from ..common.errors import ConfigError, ModelError
from ..common.evaluation_file import Federated, evaluation, write_evaluation
from ..common.files import write_atomic
from ..common.findings import figures
from ..common.question import PromptTemplate, load_prompt, parse_answer
from ..common.schema import Schema, derive_schema
from ..common.scored import MAJORITY, Answered
from ..common.seeds import derive_rng, derive_seed
from ..common.subgroups import shown_direction
from ..common.summary import summarise_task
from ..common.task_sums import compared
from ..common.tasks import Task
from ..server import evaluate, task_tables
from . import registries, suite_words
from .suite_words import BASE, FINAL

CALIBRATED = {BASE: "base, calibrated", FINAL: "final, calibrated"}
RESERVED = (BASE, FINAL, *CALIBRATED.values(), "chance", "majority", *get_args(Method))
Step = Callable[[str, int], None]  # (what is being done, how many questions were done since)


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        model: a folder (a whole model, or a run's adapter), a packaged name or a cached id.
        base: what it was trained from; None: the model alone, compared with nothing.
        beside: name → model or adapter folder of a run, to stand in the same table: each hospital's own, the centrally
            trained one.
        tasks: of open registries.
        config: its prompt, questions and speed are used.
        n_questions: of each task, at most one a test patient.
        spoken: questions a registry that base and model also answer in words, for the audit of their reasoning.
        words: most tokens of such an answer.
        open_questions: patients of each open task.
        samples: texts a question whose majority is the answer; 1: the greedy one.
        calibrate: whether base and final stand in the table a second time, without their liking for letters.
        tabular: whether logistic regression and gradient boosting are trained beside.
        seed: of questions and resamples.
        tables: registry → file, for those that no package carries (`registries.FILED`).
        review: experts' preferences, as `common.evaluation_file.read_review` gives them; empty: none.
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
    calibrate: bool = False
    tabular: bool = True
    seed: int = 0
    tables: Mapping[str, Path] = field(default_factory=dict[str, Path])
    review: Mapping[str, Any] = field(default_factory=dict[str, Any])


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


def prepare(request: Request, out: Path) -> Suite:
    """Registries, schemas and questions of all tasks; tables are written into OUT/registries.

    Raises:
        ConfigError: no task, a task that its registry cannot serve, a name used twice, a registry that is not open, or
            samples without reasoning, or calibration with it or of sorted options.
    """
    taken = [name for name in request.beside if name in RESERVED]
    if taken:
        raise ConfigError(f"--beside: '{taken[0]}' is the name of another row; choose another")
    if not request.tasks:
        raise ConfigError("no task to evaluate")
    if request.samples > 1 and request.config.questions.reasoning_tokens == 0:
        raise ConfigError("--samples: expected questions.reasoning_tokens above 0: letters alone are not sampled")
    if request.calibrate and request.config.questions.reasoning_tokens:
        raise ConfigError("--calibrate: expected questions.reasoning_tokens = 0: texts have no probability of a letter")
    if request.calibrate and request.config.questions.option_order == "sorted":
        raise ConfigError(
            "--calibrate: expected questions.option_order = 'shuffled': where a letter stands for the same level every "
            "time, it would take away what is usual"
        )
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
    voices, facts = suite_words.Voices(), {}
    for name, model in named.items():
        facts[name] = _ask(suite, name, model, out, answers, permuted, voices, step)
    for exam in suite.exams:
        mine = answers[exam.task.name]
        final = mine.pop(FINAL)  # and put back at the end: the table ends with what it is about
        for method in get_args(Method) if request.tabular else ():
            step(f"{method}, {exam.task.name}", 0)
            mine[method] = answered_by_probabilities(_tabular(exam, method, request.seed, out))
        if request.calibrate:
            both = {name: own for name, own in ((BASE, mine.get(BASE)), (FINAL, final)) if own is not None}
            mine |= {CALIBRATED[name]: calibrated(own, exam) for name, own in both.items()}
        mine[FINAL] = final
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
    counts, contrasts = suite_words.audit(suite, voices, out)
    content = evaluation(
        tasks,
        provenance=_provenance(suite, facts),
        reasoning=counts,
        review=request.review,
        federated=federated(request.model),
    )
    suite_words.write_review(suite, voices, out)
    write_evaluation(out / "evaluation.json", content)
    return content, contrasts


def _ask(
    suite: Suite,
    name: str,
    model: str,
    out: Path,
    answers: dict[str, dict[str, Answered]],
    permuted: dict[str, dict[str, Answered]],
    voices: suite_words.Voices,
    step: Step,
) -> dict[str, Any]:
    """Everything that one model is asked; returns what it is."""
    from ..common.lm.answers import answer_questions, free_texts, greedy_texts, sampled_answers
    from ..common.lm.packaged import base_digest, resolve

    request, config = suite.request, suite.request.config
    adapter, base = _adapter(model)
    changed: ModelConfig = config.model.model_copy(update={"id": base})
    digest = base_digest(resolve(base))
    if adapter is not None:
        files = (adapter / "adapter_config.json", adapter / "adapter_model.safetensors")
        digest = " ".join([digest, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)])
    loaded: list[Any] = []

    def lm() -> Any:  # loaded only where something is left to ask
        if not loaded:
            step(f"loading {name}", 0)
            loaded.append(score.load_with(changed, adapter, 0))
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
        for registry, exam in suite_words.spoken_exams(suite).items():
            step(f"{name} reasons, {registry}", 0)
            questions = exam.questions[: request.spoken]
            texts = greedy_texts(lm(), questions, suite.template, request.words)
            chosen = [_read(text, len(question.options)) for text, question in zip(texts, questions, strict=True)]
            voices.spoken.setdefault(registry, {})[name] = Spoken(chosen, texts)
    if name in (BASE, FINAL):
        for task in suite.open_tasks:
            step(f"{name} advises, {task.name}", 0)
            messages = [suite_words.consultation(task, text) for text in suite_words.open_records(suite, task)[0]]
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


def federated(model: str) -> dict[str, Any]:
    """What the sites' own test patients gave at the end of the run that made `model`; for evaluation.json.

    Empty where `model` is not the model of a run, or the run's files do not tell.
    """
    folder = Path(model)
    try:
        facts = _json(folder / "provenance.json")
        run = _json(folder.parent / "run.json")
        if run["final_digest"] != facts["adapter_digest"]:  # another model was put there since
            return {}
        found = _json(folder.parent / "evaluation.json")
        if run["warmup"]["source"] == "none":
            found = evaluate.without_warmup(found)
        masked = run["secure_aggregation"] != "none"
        about = {"run": run["name"], "simulated": facts["simulated"], "masked": masked}
        return Federated.model_validate(about | _pooled(found)).model_dump(mode="json")
    # Files of a person's, read beside what was asked for: whatever is wrong with them must not cost the evaluation.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return {}


def _pooled(found: Mapping[str, Any]) -> dict[str, Any]:
    """A run's evaluation.json in the words of this one, without its features and sections: some are of few patients."""
    unreadable = found.get("tasks_unreadable")
    more = [*([f"The tasks have no result: {unreadable}."] if unreadable else []), task_tables.all_tasks(found)]
    return {
        **{key: found[key] for key in ("n", "sites", "noise", "chance")},
        "models": {
            name: {"value": found[name]["accuracy"], "ci95": found[name]["ci95"]}
            for name in (*evaluate.MODELS, MAJORITY)
            if name in found
        },
        "paired": [_pair(name, pair) for name, pair in found["paired"].items()],
        "findings": [evaluate.verdict(found), evaluate.baselines(found), *filter(None, more)],
        "worse": list(_got_worse(found)),
        "tasks": found.get("tasks", []),
    }


def _pair(name: str, pair: Mapping[str, Any]) -> dict[str, Any]:
    """A paired comparison of a run's file; `name`: "final-base"."""
    model, against = name.split("-")
    figures = {key: pair[key] for key in ("difference", "ci95", "detectable")}
    alone = {"only_model": pair["only_later"], "only_against": pair["only_earlier"]}
    return {"model": model, "against": against, **figures, "p": pair["mcnemar_p"], **alone}


def _got_worse(found: Mapping[str, Any]) -> Iterator[str]:
    """What is shown worse than before the rounds: all of it, tasks, subgroups of tasks."""
    before = "warmup" if "warmup" in found else "base"
    if evaluate.shown(found["paired"][f"final-{before}"]) < 0:
        yield evaluate.verdict(found)
    for told in found.get("tasks", ()):
        if "models" not in told:  # of too few patients
            continue
        for pair in told["paired"]:
            if pair["against"] == told["reference"] and shown_direction(pair) < 0:
                yield f"{told['title']}: {compared(pair, told['n'])}"
        for row in told["subgroups"]["worse"]:
            size = f"{100 * abs(row['difference']):.1f} points"
            yield f"{told['title']}: {row['axis']} '{row['stratum']}' got worse by {size} ({figures(row)})."


def _json(file: Path) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN, which evaluation.json does not hold

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def _adapter(model: str) -> tuple[Path | None, str]:
    """The adapter folder that `model` is, if it is one, and what is loaded under it.

    Raises:
        ModelError: an adapter that names no base model, or holds no weights.
    """
    folder = Path(model)
    if not (folder / "adapter_config.json").is_file():
        return None, model
    base = base_of(model)
    if base is None or not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder}: not the adapter folder of a run: no provenance.json, or no weights")
    return folder, base


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
