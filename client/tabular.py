"""What a good tabular model answers on the very same questions, from the same masked inputs.

Run at a hospital on its own patients, or on one machine over open registries. One model a target, from training
patients; what a question's record does not show is missing for the model too. Gradient boosting is no bound of what can
be known, but a strong usual answer, which a language model that reads one record at a time has as its ceiling here;
logistic regression is the plain one that reviewers ask for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from ..common.dictionary import Feature
from ..common.question import Question
from ..common.schema import Schema
from .questions import QuestionBuilder
from .registry import Registry

Method = Literal["gradient boosting", "logistic regression"]
PARTS = 16  # a number is predicted as one of this many parts of equal mass
# Questions asked of each training patient about each target. Logistic regression, with few parameters, gains nothing
# from a second look at the same patients and would take most of an evaluation's time.
COPIES: Mapping[Method, int] = {"gradient boosting": 2, "logistic regression": 1}
SETTINGS = {"max_iter": 60, "learning_rate": 0.1, "max_leaf_nodes": 12, "min_samples_leaf": 20, "early_stopping": False}


def tabular_probabilities(
    method: Method,
    builder: QuestionBuilder,
    train_rows: np.ndarray,
    questions: Sequence[Question],
    rows: np.ndarray,
    shown: np.ndarray,
    seed: int,
    on_done: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """The probability of every option of every question: float64 (n, most options), 0 past a question's own.

    Args:
        method: which model.
        builder: made the questions; asks the training patients in the same way.
        train_rows: rows of training patients.
        questions, rows, shown: of `QuestionBuilder.build_with_records` over held-out patients.
        seed: of the training questions and the models.
        on_done: called with (targets done, targets).
    """
    registry, schema = builder.registry, builder.schema
    table = _matrix(registry, builder.features)
    names = sorted({question.target for question in questions})
    found = np.zeros((len(questions), max((len(question.options) for question in questions), default=0)))
    rng = np.random.default_rng([seed, 0xCE11])
    for done, name in enumerate(names, start=1):
        feature = registry.dictionary.feature(name)
        looks = np.tile(train_rows, COPIES[method])
        asked, asked_rows, asked_shown = builder.build_with_records(looks, rng, targets=[name])
        mine = [index for index, question in enumerate(questions) if question.target == name]
        edges, truth = _classes(feature, registry, asked_rows)
        if not asked or len(np.unique(truth)) < 2:
            for index in mine:  # nothing to learn from: the most frequent option, and no doubt about it
                found[index, questions[index].majority] = 1.0
            continue
        inputs = np.where(asked_shown, table[asked_rows], np.nan)
        unseen = np.isnan(inputs).all(axis=0)
        inputs[:, unseen] = 0.0  # a column without a value cannot be binned
        with warnings.catch_warnings():  # 100 steps are enough to rank options, if not to converge in every digit
            warnings.filterwarnings("ignore", message="lbfgs failed to converge")
            model = _model(method, seed).fit(inputs, truth)
        held_out = np.where(shown[mine], table[rows[mine]], np.nan)
        held_out[:, unseen] = 0.0
        n_classes = len(feature.levels) if feature.kind == "category" else len(edges) + 1
        probabilities = np.zeros((len(mine), n_classes))
        probabilities[:, model.classes_.astype(np.int64)] = model.predict_proba(held_out)
        prior = np.bincount(truth, minlength=n_classes) / len(truth)
        for row, index in enumerate(mine):
            scores = _option_scores(questions[index], feature, schema, edges, probabilities[row], prior)
            total, n = scores.sum(), len(scores)
            found[index, :n] = scores / total if total > 0 else 1 / n
        if on_done is not None:
            on_done(done, len(names))
    return found


def _model(method: Method, seed: int) -> Any:
    """An unfitted classifier that takes missing values."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if method == "gradient boosting":
        return HistGradientBoostingClassifier(**SETTINGS, random_state=seed)
    # Means for what is missing, and a column that says so: the usual way, as in published risk models.
    impute = SimpleImputer(add_indicator=True, keep_empty_features=True)
    return make_pipeline(impute, StandardScaler(), LogisticRegression(max_iter=100, random_state=seed))


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
