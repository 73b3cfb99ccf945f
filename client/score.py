"""Score any model folder on the held-out patients of any registry: `wardround evaluate`.

Run at one hospital, or on one machine over an open registry. Model, table and dictionary enter; evaluation counts as
JSON come out, in the shape of a run's evaluation.json. Questions and answers stay in memory.

Whose patients are held out depends on the key that divides them. With `site` it is the hospital's own. Without, a model
that a simulated run trained brings that run's key in its provenance.json, so that the patients it was trained on are
left out; a model trained on real hospitals of this dictionary is refused. Any other model, whose registry this cannot
have been as far as can be told, is scored on patients divided by a public key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.config import LoraConfig, ModelConfig, RunConfig, SiteConfig, load_site
from ..common.counts import count
from ..common.dictionary import Dictionary, load_dictionary
from ..common.errors import ConfigError, ModelError, RegistryError, VerificationError
from ..common.files import write_atomic
from ..common.question import PromptTemplate, Question, load_prompt
from ..common.schema import Schema, derive_schema
from ..common.seeds import derive_rng
from ..common.statistics import Tally, summarise
from .folder import Site
from .harness import check_folder, task_name, write_harness_task
from .questions import QuestionBuilder

if TYPE_CHECKING:
    from ..common.lm.models import LanguageModel

# Without a site's own key, patients are divided with this one, which everybody knows: everywhere the same.
PUBLIC_SPLIT_KEY = hashlib.sha256(b"wardround.evaluate.public-split").hexdigest()
MODEL = "model"


@dataclass(frozen=True)
class Request:
    """What to score on what."""

    table: Path
    dictionary: Path
    config: RunConfig  # its model, prompt, question and evaluation settings are used
    adapter: Path | None = None  # a peft folder to put on the model
    schema: Path | None = None  # a run's schema.json; None: from the table's own training patients
    site: Path | None = None  # a site.toml: its mapping and split key
    n_questions: int = 500
    seed: int = 0
    harness: Path | None = None  # a new folder for the questions as a task of lm-evaluation-harness
    inside_hospital: bool = False  # somebody answers for it that this folder stays inside


@dataclass(frozen=True)
class Exam:
    """What one model is asked, made before it is loaded.

    Attributes:
        request: what to score on what.
        site: the table as a site.
        split_key: what divided its patients: "site", "run" (the one that trained the model) or "public".
        schema: the question schema.
        template: the prompt.
        questions: one a test patient, at most `request.n_questions`.
        test_patients: how many there are.
    """

    request: Request
    site: Site
    split_key: str
    schema: Schema
    template: PromptTemplate
    questions: list[Question]
    test_patients: int


def open_site(request: Request) -> tuple[Site, str]:
    """The table as a site: its mapping and split, without touching anything on disk; and whose split key it has.

    Raises:
        ConfigError: the site has no key yet, or the model was trained on a registry of this dictionary and does not
            say how its patients were divided.
        ModelError: the model's provenance is not readable.
    """
    table = str(request.table.resolve())
    dictionary = str(request.dictionary.resolve() if request.dictionary.is_file() else request.dictionary)
    if request.site is None:
        key = key_of_the_run(request, load_dictionary(request.dictionary))
        config = SiteConfig(name="evaluate", table=table, dictionary=dictionary, split_key=key or PUBLIC_SPLIT_KEY)
        return Site(Path(), config), "run" if key else "public"
    config = load_site(request.site).model_copy(update={"table": table, "dictionary": dictionary})
    site = Site(request.site.resolve().parent, config)
    if config.split_key is None and not (site.state / "split.key").exists():
        raise ConfigError(
            f"{request.site}: this site has no split key yet, so it has no test patients: its first run makes "
            f"{site.state / 'split.key'}; for a model that was trained elsewhere set split_key in site.toml (64 random "
            "hexadecimal digits), or leave --site out for a public split of patients"
        )
    return site, "site"


def key_of_the_run(request: Request, dictionary: Dictionary) -> str | None:
    """The key of the simulated run that trained model or adapter on this dictionary's registry; None: none did."""
    keys: set[str] = set()
    for folder in (Path(request.config.model.id), request.adapter):
        file = None if folder is None else folder / "provenance.json"
        if file is None or not file.is_file():
            continue
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            trained_here, key = facts["dictionary_digest"] == dictionary.digest(), str(facts.get("split_key", ""))
            bytes.fromhex(key)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{file}: not a model's provenance; expected the file that a run wrote") from None
        if trained_here:
            keys.add(key)
    if len(keys) > 1 or "" in keys:
        what = "this model was" if "" in keys else "model and adapter were each"
        raise ConfigError(
            f"{what} trained on a registry with this dictionary: name the hospital's site.toml with --site so that its "
            f"training patients are left out"
        )
    return keys.pop() if keys else None


def read_schema(path: Path) -> Schema:
    """A run's schema.json.

    Raises:
        ConfigError: no such file, or not a schema.
    """
    try:
        return Schema.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (ValueError, UnicodeDecodeError):
        raise ConfigError(f"{path}: not a question schema; expected the schema.json of a run") from None


def adapter_settings(folder: Path) -> LoraConfig:
    """Rank, scale and targets of a peft adapter.

    Raises:
        ModelError: no adapter_config.json there, or not of a LoRA adapter.
    """
    file = folder / "adapter_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        targets = found["target_modules"]
        return LoraConfig(
            strategy="fedit",
            rank=found["r"],
            alpha=found["lora_alpha"],
            targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        )
    except FileNotFoundError:
        raise ModelError(f"{folder}: not a peft adapter folder: no adapter_config.json in it") from None
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{file}: not the configuration of a LoRA adapter") from None


def load_with(settings: ModelConfig, adapter: Path | None, seed: int) -> LanguageModel:
    """A base model, with a peft adapter folder on it if there is one.

    Raises:
        ModelError: the model cannot be loaded, or the folder is no adapter of it.
    """
    from ..common.lm import models

    lm = models.load(settings, None if adapter is None else adapter_settings(adapter), seed=seed)
    if adapter is not None:
        try:
            lm.load_adapter_folder(adapter)
        except VerificationError as error:
            raise ModelError(f"{adapter}: not an adapter of '{settings.id}': {error}") from None
    return lm


def prepare(request: Request) -> Exam:
    """The questions for one model.

    Raises:
        RegistryError, DictionaryError, ConfigError, ModelError: one line each.
    """
    (site, split_key), settings = open_site(request), request.config
    registry = site.registry
    template = load_prompt(settings.model.prompt)
    if request.schema is not None:
        schema = read_schema(request.schema)
    else:
        train = registry.take(site.splits["train"])
        schema = derive_schema(count(train.values, registry.dictionary), registry.dictionary, settings.questions)
    try:
        builder = QuestionBuilder(registry, schema, template, settings.questions)
    except VerificationError as error:
        raise ConfigError(f"{request.schema}: {error}") from None
    if request.harness is not None:  # before a model is loaded
        check_folder(request.harness, public=registry.dictionary.public, inside_hospital=request.inside_hospital)
    rng = derive_rng(request.seed, "evaluate")
    patients = site.patients_of("test")
    rows = np.array([rng.choice(patients[i]) for i in rng.permutation(len(patients))], dtype=np.int64)
    questions = builder.build(rows, rng)[: request.n_questions]
    if not questions:
        raise RegistryError(f"{request.table}: none of its {len(patients)} test patients has a value that can be asked")
    return Exam(request, site, split_key, schema, template, questions, len(patients))


def score(exam: Exam, progress: Callable[[int], None] | None = None) -> dict[str, Any]:
    """The evaluation of one model.

    Args:
        exam: what it is asked.
        progress: called with the number of questions done.

    Returns:
        "model" and "majority": {"accuracy", "ci95", "n", "correct"}; "chance"; "by_feature"; "by_section";
        "provenance".

    Raises:
        ModelError: the model or its adapter cannot be used.
    """
    from .evaluation import evaluate_questions

    request, registry = exam.request, exam.site.registry
    settings, questions = request.config, exam.questions
    lm = load_with(settings.model, request.adapter, settings.seed)
    if request.harness is not None:
        write_harness_task(
            request.harness,
            questions,
            exam.template,
            lm,
            task_name(registry.dictionary.name),
            public=registry.dictionary.public,
            inside_hospital=request.inside_hospital,
        )
    done = 0

    def on_done(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done)

    outcomes = evaluate_questions(lm, questions, exam.template, settings, on_done=on_done)
    sections = {feature.name: feature.section for feature in registry.dictionary.used}
    result = summarise(
        Tally.of(questions, {MODEL: outcomes}, exam.schema.names),
        sections,
        settings.evaluation.bootstrap_samples,
        request.seed,
    )
    result["provenance"] = {
        "model": settings.model.id,
        "base_digest": lm.base_digest,
        "adapter": None if request.adapter is None else str(request.adapter),
        "registry": registry.dictionary.name,
        "registry_digest": registry.digest,
        "dictionary_digest": registry.dictionary.digest(),
        "schema_digest": exam.schema.digest(),
        "schema_from": "table" if request.schema is None else str(request.schema),
        "split_key": exam.split_key,
        "test_patients": exam.test_patients,
        "prompt": settings.model.prompt,
        "questions": settings.questions.model_dump(mode="json"),
        "seed": request.seed,
        "wardround": version("wardround"),
    }
    return result


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes the result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(result, indent=2, sort_keys=True) + "\n").encode(), mode=0o644)


def model_config(settings: RunConfig, model: str) -> RunConfig:
    """The run config with another base model."""
    changed: ModelConfig = settings.model.model_copy(update={"id": model})
    return settings.model_copy(update={"model": changed})
