"""What a good tabular model answers on the very same questions: gradient boosting on the same masked inputs.

Run on one machine, over open registries. One model a target, from all training patients together; what a question's
record does not show is missing for the model too. It is no bound of what can be known, but a strong usual answer; a
language model of 135 million parameters that reads one record at a time has it as its ceiling here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...client.questions import QuestionBuilder
from ...client.registry import Registry
from ...common.dictionary import Feature
from ...common.question import Question
from ...common.schema import Schema

PARTS = 16  # a number is predicted as one of this many parts of equal mass
COPIES = 2  # questions asked of each training patient about each target
SETTINGS = {"max_iter": 60, "learning_rate": 0.1, "max_leaf_nodes": 12, "min_samples_leaf": 20, "early_stopping": False}


def gradient_boosting_answers(
    builder: QuestionBuilder,
    train_rows: np.ndarray,
    questions: Sequence[Question],
    rows: np.ndarray,
    shown: np.ndarray,
    seed: int,
    on_done: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The option that gradient boosting chooses on each question: int64 (n,).

    Args:
        builder: made the questions; asks the training patients in the same way.
        train_rows: rows of training patients.
        questions, rows, shown: of `QuestionBuilder.build_with_records` over held-out patients.
        seed: of the training questions and the models.
        on_done: called with (targets done, targets).
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    registry, schema = builder.registry, builder.schema
    table = _matrix(registry, builder.features)
    names = sorted({question.target for question in questions})
    chosen = np.zeros(len(questions), dtype=np.int64)
    rng = np.random.default_rng([seed, 0xCE11])
    for done, name in enumerate(names, start=1):
        feature = registry.dictionary.feature(name)
        asked, asked_rows, asked_shown = builder.build_with_records(np.tile(train_rows, COPIES), rng, targets=[name])
        mine = [index for index, question in enumerate(questions) if question.target == name]
        edges, truth = _classes(feature, registry, asked_rows)
        if not asked or len(np.unique(truth)) < 2:
            chosen[mine] = [questions[index].majority for index in mine]
            continue
        inputs = np.where(asked_shown, table[asked_rows], np.nan)
        unseen = np.isnan(inputs).all(axis=0)
        inputs[:, unseen] = 0.0  # a column without a value cannot be binned
        model = HistGradientBoostingClassifier(**SETTINGS, random_state=seed).fit(inputs, truth)
        held_out = np.where(shown[mine], table[rows[mine]], np.nan)
        held_out[:, unseen] = 0.0
        n_classes = len(feature.levels) if feature.kind == "category" else len(edges) + 1
        probabilities = np.zeros((len(mine), n_classes))
        probabilities[:, model.classes_.astype(np.int64)] = model.predict_proba(held_out)
        prior = np.bincount(truth, minlength=n_classes) / len(truth)
        for row, index in enumerate(mine):
            scores = _option_scores(questions[index], feature, schema, edges, probabilities[row], prior)
            chosen[index] = int(np.argmax(scores))
        if on_done is not None:
            on_done(done, len(names))
    return chosen


def _matrix(registry: Registry, names: Sequence[str]) -> np.ndarray:
    """float64 (rows, features): numbers on their scale, level indices of categories, NaN for missing."""
    columns: list[np.ndarray] = []
    for name in names:
        values = registry.values[name].astype(np.float64)
        columns.append(
            np.where(values < 0, np.nan, values) if registry.dictionary.feature(name).kind == "category" else values
        )
    return np.column_stack(columns)


def _classes(feature: Feature, registry: Registry, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inner edges of a number's parts (empty for categories), and the class of each row's true value."""
    values = registry.values[feature.name][rows]
    if feature.kind == "category":
        return np.empty(0), values.astype(np.int64)
    edges = np.unique(np.quantile(values, np.arange(1, PARTS) / PARTS))
    return edges, np.searchsorted(edges, values, side="right")


def _option_scores(
    question: Question,
    feature: Feature,
    schema: Schema,
    edges: np.ndarray,
    probabilities: np.ndarray,
    prior: np.ndarray,
) -> np.ndarray:
    """How likely each option is: a level's probability; a number's density (within a part, the schema's)."""
    if feature.kind == "category":
        labels = list(feature.levels.values())
        return probabilities[[labels.index(option) for option in question.options]]
    values = np.array([float(option) for option in question.options])
    part = np.searchsorted(edges, values, side="right")
    scaled = np.log(values) if feature.scale == "log" else values
    density = np.exp(schema.target(feature.name).mixture.log_density(scaled))
    return density * probabilities[part] / np.maximum(prior[part], 1e-9)
