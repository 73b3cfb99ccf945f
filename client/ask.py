"""One question about one record, answered by one model: its reasoning and the probability of every option.

Run where the record may be: at its hospital, or anywhere for an open or invented one. Model and record enter; the
answer is for the screen of whoever asked. Nothing is stored or sent.

The record is a JSON object of the dictionary's columns: `{"age": 71, "sex": "Male", "creat": 140}`, cells written as in
a table. What is asked is a feature or an outcome; a value of it in the record is never shown to the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..common.config import QuestionsConfig, RunConfig
from ..common.counts import grid
from ..common.dictionary import Dictionary, Feature
from ..common.errors import ConfigError, RegistryError
from ..common.question import LETTERS, PromptTemplate, Question
from ..common.schema import Schema
from .exam import answered
from .questions import QuestionBuilder
from .registry import to_registry
from .usual import usual_words

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the schema's distribution: options of a number that are not given


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        question: what it was asked, as it read it.
        options: in letter order.
        probabilities: of the options, by one look at the letters.
        text: its reasoning in words; empty where none was asked for.
    """

    question: str
    options: tuple[str, ...]
    probabilities: tuple[float, ...]
    text: str


def read_record(path: Path) -> dict[str, Any]:
    """A record file.

    Raises:
        RegistryError: no such file, or not a JSON object of plain cells.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RegistryError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise RegistryError(f"{path}{where}: expected a JSON object of columns and values") from None
    if not isinstance(record, dict) or not record:
        raise RegistryError(f"{path}: expected a JSON object of columns and values")
    for name, cell in record.items():
        if not isinstance(cell, str | int | float | bool | None):
            raise RegistryError(f"{path}: '{name}': expected a number, a text or null")
    return record


def make_question(
    record: Mapping[str, Any],
    target: str,
    dictionary: Dictionary,
    schema: Schema | None,
    template: PromptTemplate,
    settings: QuestionsConfig,
    options: Sequence[str] = (),
) -> Question:
    """The question about `target` with the whole record as context; its `answer` and `majority` mean nothing.

    Args:
        record: column → cell.
        target: feature or outcome.
        dictionary: of the record.
        schema: for what is usual, and the options of a number; None: neither.
        template: the prompt.
        settings: only `features_per_record`, which here is the most that is shown.
        options: to choose among; empty: all levels, or for a number five quantiles of the schema.

    Raises:
        ConfigError: `target` is no feature or outcome; options are missing, too many or twice.
        RegistryError: a column that the dictionary does not have; nothing that may be shown.
    """
    features = {feature.name: feature for feature in dictionary.used}
    if target not in features:
        raise ConfigError(f"target '{target}': dictionary '{dictionary.name}' has no such feature or outcome")
    unknown = sorted(set(record) - {feature.name for feature in dictionary.features})
    if unknown:
        raise RegistryError(f"record: dictionary '{dictionary.name}' has no column '{unknown[0]}'")
    feature = features[target]
    cells = {name: [record.get(name)] for name in features}
    columns: dict[str, Any] = {
        name: pa.array([None if cell is None else str(cell)], pa.string()) for name, [cell] in cells.items()
    }
    columns[dictionary.id_column] = pa.array(["asked"], pa.string())
    if dictionary.site_column is not None:
        columns[dictionary.site_column] = pa.array(["here"], pa.string())
    registry = to_registry("record", pa.table(columns), dictionary)
    lost = [
        name
        for name, [cell] in cells.items()
        if cell is not None and name != target and not _known(registry.values[name][0])
    ]
    if lost:
        raise RegistryError(
            f"record: '{lost[0]}' has a value that the dictionary does not know: a level that is not listed, or a "
            "number outside its plausible range"
        )
    context = {shown.name for shown in dictionary.context_of(feature)}
    if schema is not None:
        context -= set(schema.hidden.get(target, ()))
    builder = QuestionBuilder(registry, schema or _no_schema(dictionary), template, settings)
    [text] = builder.records(np.array([0]), context, np.random.default_rng(0))
    if not text.strip():
        raise RegistryError(f"record: it has no value that may be shown when '{target}' is asked")
    chosen = tuple(options) or _options(feature, schema)
    if not 2 <= len(chosen) <= len(LETTERS) or len(set(chosen)) < len(chosen):
        raise ConfigError(f"options: expected 2 to {len(LETTERS)} different ones, got {len(chosen)}")
    unit = f" {feature.unit}" if feature.unit else ""
    if feature.role == "outcome":
        asked = template.outcome.format(label=feature.label, question=feature.question)
    else:
        asked = template.question.format(label=feature.label, unit=unit, section=feature.section)
    if schema is not None and target in schema.names:
        asked += usual_words(feature, schema.target(target), template, _writer(feature), unit)
    lines = [
        template.option.format(letter=letter, value=value, unit=unit)
        for letter, value in zip(LETTERS, chosen, strict=False)
    ]
    user = template.user.format(record=text, question=asked, options=template.option_separator.join(lines))
    kind = "outcome" if feature.role == "outcome" else "feature"
    return Question(target, feature.section, kind, user, chosen, 0, 0)


def _no_schema(dictionary: Dictionary) -> Schema:
    """A schema that knows nothing of any feature."""
    return Schema(
        dictionary_digest=dictionary.digest(),
        rows=0,
        mi_threshold=0.0,
        mi_normalisation="none",
        targets=(),
        unusable={},
        hidden={},
        shortcuts={},
        mi={},
    )


def _known(cell: Any) -> bool:
    return not np.isnan(cell) if isinstance(cell, np.floating) else bool(cell >= 0)


def _options(feature: Feature, schema: Schema | None) -> tuple[str, ...]:
    if feature.kind == "category":
        return tuple(feature.levels.values())
    if schema is None or feature.name not in schema.names:
        raise ConfigError(
            f"'{feature.name}' is a number: give its options with --option, or a run's schema.json with --schema"
        )
    points = grid(feature)
    indices = np.arange(points.first, points.last + 1)
    values = points.value(indices)
    scaled = np.log(values) if feature.scale == "log" else values
    mass = np.cumsum(np.exp(schema.target(feature.name).mixture.log_density(scaled)) * np.gradient(scaled))
    places = [int(indices[np.searchsorted(mass, share * mass[-1])]) for share in QUANTILES]
    return tuple(_writer(feature)(place) for place in dict.fromkeys(places))


def _writer(feature: Feature) -> Any:
    if feature.kind == "category":
        return list(feature.levels.values()).__getitem__
    return lambda index: f"{index / 10.0**feature.decimals:.{feature.decimals}f}"


def ask(config: RunConfig, question: Question, template: PromptTemplate, words: int) -> Answer:
    """The answer of `config.model`; `words`: most tokens of its reasoning, 0: none.

    Raises:
        ModelError: the model cannot be used with this prompt.
    """
    from ..common.lm import models
    from ..common.lm.answers import answer_questions, greedy_texts

    lm = models.load(config.model, None, seed=0)
    outcomes = answer_questions(lm, [question], template, reasoning_tokens=0, micro_batch=1)
    probabilities = answered(outcomes, [len(question.options)]).probabilities[0]
    text = greedy_texts(lm, [question], template, words)[0] if words else ""
    return Answer(question.text, question.options, tuple(float(p) for p in probabilities), text)
