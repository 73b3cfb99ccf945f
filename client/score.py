"""Score any model folder on the held-out patients of any registry: `wardround evaluate`.

Run at one hospital, or on one machine over an open registry. Model, table and dictionary enter; evaluation counts as
JSON come out, in the shape of a run's evaluation.json. Questions and answers stay in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..common.config import LoraConfig, ModelConfig, RunConfig, SiteConfig, load_site
from ..common.counts import count
from ..common.errors import ConfigError, ModelError, RegistryError, VerificationError
from ..common.files import write_atomic
from ..common.question import load_prompt
from ..common.schema import Schema, derive_schema
from ..common.seeds import derive_rng
from ..common.statistics import Tally, summarise
from .folder import Site
from .questions import QuestionBuilder

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


def open_site(request: Request) -> Site:
    """The table as a site: its mapping and split, without touching anything on disk unless `site` is given."""
    table = str(request.table.resolve())
    dictionary = str(request.dictionary.resolve() if request.dictionary.is_file() else request.dictionary)
    if request.site is None:
        config = SiteConfig(name="evaluate", table=table, dictionary=dictionary, split_key=PUBLIC_SPLIT_KEY)
        return Site(Path(), config)
    config = load_site(request.site).model_copy(update={"table": table, "dictionary": dictionary})
    site = Site(request.site.resolve().parent, config)
    if config.split_key is None and not (site.state / "split.key").exists():
        raise ConfigError(f"{request.site}: this site has no split key yet, so it has no test patients")
    return site


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


def score(request: Request, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """The evaluation of one model.

    Args:
        request: what to score on what.
        progress: called with (questions done, questions in all).

    Returns:
        "model" and "majority": {"accuracy", "ci95", "n", "correct"}; "chance"; "by_feature"; "by_section";
        "provenance".

    Raises:
        RegistryError, DictionaryError, ConfigError, ModelError: one line each, before the model is loaded
            where possible.
    """
    site, settings = open_site(request), request.config
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
    rng = derive_rng(request.seed, "evaluate")
    patients = site.patients_of("test")
    rows = np.array([rng.choice(patients[i]) for i in rng.permutation(len(patients))], dtype=np.int64)
    questions = builder.build(rows, rng)[: request.n_questions]
    if not questions:
        raise RegistryError(f"{request.table}: none of its {len(patients)} test patients has a value that can be asked")

    from ..common.lm import models
    from .evaluation import evaluate_questions

    lora = None if request.adapter is None else adapter_settings(request.adapter)
    lm = models.load(settings.model, lora, seed=settings.seed)
    if request.adapter is not None:
        try:
            lm.load_adapter_folder(request.adapter)
        except VerificationError as error:
            raise ModelError(f"{request.adapter}: not an adapter of '{settings.model.id}': {error}") from None
    done = 0

    def on_done(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, len(questions))

    outcomes = evaluate_questions(lm, questions, template, settings, on_done=on_done)
    sections = {feature.name: feature.section for feature in registry.dictionary.used}
    result = summarise(
        Tally.of(questions, {MODEL: outcomes}, schema.names),
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
        "schema_digest": schema.digest(),
        "schema_from": "table" if request.schema is None else str(request.schema),
        "split_key": "public" if request.site is None else "site",
        "test_patients": len(patients),
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
