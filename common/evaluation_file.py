"""evaluation.json of `wardround evaluate`: its fields, its version, reading and writing.

Role: written where an evaluation ran, read by reports and comparisons. Private: figures of groups, as private as the
registry that they are of; no question, no patient.

Every share is between 0 and 1, every difference is of shares (0.05 is 5 points), every "ci95" is [low, high] of a 95 %
interval by patient, every p-value is two-sided. None (null) where a figure cannot be had; the field says why.

The version grows when a field goes away or comes to mean something else, or a new one must be understood. A file of
another version is refused: figures that mean other things are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .config import describe
from .errors import ConfigError
from .files import write_atomic

EVALUATION_SCHEMA = 1

Interval = list[float]  # [low, high]
Bounds = tuple[float, float]  # (low, high), in parts that come from elsewhere


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Value(_Part):
    """A figure."""

    value: float
    ci95: Interval


class Difference(_Part):
    """A difference that is not tested: of Brier scores, of areas."""

    difference: float
    ci95: Interval


class ComparedDifference(Difference):
    """A difference of accuracies. p: exact sign-flip test by patient (McNemar's, where each has one question)."""

    p: float


class Corrected(ComparedDifference):
    """One of a family. A gap's p is Fisher's where each patient has one question, else normal."""

    p_holm: float


class Group(Corrected):
    """One of all targets or sections; both corrections run over all of them."""

    p_bh: float


class Bin(_Part):
    """A point of a reliability diagram: n questions of which the model gave `predicted` on average, and `observed` were
    so. `low` and `high` are the least and the most that it gave."""

    n: int
    low: float
    high: float
    predicted: float
    observed: float


class CalibrationError(Value):
    """Expected calibration error over equal-mass bins; too high where questions are few. by_chance: what a perfectly
    calibrated model would show on so many. The interval (common/intervals.py) allows for that, and may lie below it."""

    by_chance: float


class Calibration(_Part):
    """brier: of all options (0 to 2), or of the event (0 to 1)."""

    brier: Value | None
    ece: CalibrationError | None
    reliability: list[Bin] | None


class EventFigures(Calibration):
    """Of outcomes: how the probability of the event ranks and meets what happened."""

    n: int
    events: int
    auroc: Value
    auprc: Value


class Accuracies(_Part):
    """balanced_accuracy: of outcomes, the mean of both recalls (happened, did not); of features, of the shares right
    where the truth is the most frequent option and where it is another, so that always choosing that one has 0.5."""

    n: int
    correct: int
    accuracy: Value
    balanced_accuracy: Value


class ModelTold(Accuracies, Calibration):
    """One model. fallback_rate (answers that were forced) and mean_length (tokens): None where no text was generated.
    brier, ece, reliability (of the chosen option) and event: None where the model gave no probabilities; event also
    where no outcome was asked, or fewer than min_cell patients had it or did not."""

    fallback_rate: Value | None
    mean_length: Value | None
    event: EventFigures | None


class Pair(ComparedDifference):
    """`model` minus `against` on the same questions. only_*: questions that one of both alone had right, with McNemar's
    exact p by question. discordance: their share. design_effect: variance over that of as many independent questions.
    detectable: the true difference that 80 % of such evaluations find. brier below 0 and auroc above 0 favour `model`;
    None where one of both gave no probabilities, or no event is reported."""

    model: str
    against: str
    only_model: int
    only_against: int
    mcnemar_p: float
    discordance: float
    design_effect: float
    detectable: float
    brier: Difference | None
    auroc: Difference | None


class Hidden(_Part):
    """What is not reported on its own: too few patients, or left out so that those cannot be had by subtraction."""

    labels: list[str]
    n: int
    patients: int


class GroupRow(_Part):
    """A target or a section. accuracy: of every model and "majority". difference: final minus reference, None where
    both are one model."""

    name: str
    section: str
    n: int
    patients: int
    chance: float
    accuracy: dict[str, float]
    difference: Group | None


class Groups(_Part):
    """All targets, or all sections."""

    rows: list[GroupRow]
    hidden: Hidden | None


class StratumModel(_Part):
    """gap: the stratum minus everybody else (None where there is nobody else). change: the model minus the reference in
    the stratum (None for the reference). p_holm: over all strata of all axes, for each model apart."""

    accuracy: Value
    gap: Corrected | None
    change: Corrected | None


class Stratum(_Part):
    """One stratum of an axis."""

    stratum: str
    n: int
    patients: int
    models: dict[str, StratumModel]


class Axis(_Part):
    """An axis of subgroups."""

    strata: list[Stratum]
    hidden: Hidden | None


class NamedStratum(Corrected):
    """A stratum in which final is shown worse or better than the reference: interval without 0 and p_holm < 0.05."""

    axis: str
    stratum: str
    n: int


class Subgroups(_Part):
    """axes: "site", "age", "sex", "comorbidity", "severity", "period", as far as a task has them."""

    axes: dict[str, Axis]
    worse: list[NamedStratum]
    better: list[NamedStratum]


class Without(_Part):
    """The estimate without one site; influence: minus that of all. n and patients are the site's."""

    left_out: str
    n: int
    patients: int
    value: float
    ci95: Interval
    influence: float


class LeaveOneOut(_Part):
    """measure: final minus reference, or final's accuracy where both are one model."""

    measure: Literal["difference", "accuracy"]
    all: Value
    without: list[Without]
    largest: str


class Fold(_Part):
    """held_out: the measure in the stratum; rest: in all other questions; error: the first minus the second."""

    stratum: str
    n: int
    held_out: float
    rest: float
    error: float


class Folds(_Part):
    """Cross-validation over an axis's strata: how well the rest foretells a stratum; no model is trained again. rmse:
    of the errors, weighted by n; rmse_by_chance: what sampling alone gives. p: Cochran's Q of one measure for all
    strata; None where a stratum shows no scatter."""

    measure: Literal["difference", "accuracy"]
    folds: list[Fold]
    low: float
    high: float
    rmse: float
    rmse_by_chance: float
    p: float | None


class Choices(_Part):
    """Of questions with so many options, the share of choices at each letter, and of truths. p: of equal shares, by
    chi-square; None where too few. fixed_order: options are sorted, or the event always stands at one letter, so p says
    nothing of letters. p_holm: over a model's tests of position."""

    n_options: int
    n: int
    patients: int
    chosen: list[float]
    truth: list[float]
    p: float | None
    p_holm: float | None
    fixed_order: bool


class LetterEffect(_Part):
    """letter_effect: how much likelier an answer is right with its truth at each letter; mean 0."""

    n_options: int
    n: int
    letter_effect: list[float]
    p: float | None
    p_holm: float | None


class Permuted(_Part):
    """Questions asked in two orders. same: share whose choice stayed. accuracy_change: second minus first order."""

    n: int
    patients: int
    same: Value
    accuracy_change: ComparedDifference
    by_options: list[LetterEffect]


class ModelPosition(_Part):
    """permuted: None where the model was not asked in another order, or fewer than min_cell patients were."""

    by_options: list[Choices]
    permuted: Permuted | None
    flagged: bool


class Position(_Part):
    """rule: when a model is flagged, in words."""

    rule: str
    models: dict[str, ModelPosition]


class Power(_Part):
    """What a difference of `model` and `against` would have to be to be seen; as a sentence besides."""

    n: int
    patients: int
    model: str
    against: str
    discordance: float
    design_effect: float
    detectable: float
    sentence: str


class Bootstrap(_Part):
    """draws: of patients; rank_draws: of these, for areas under curves."""

    draws: int
    rank_draws: int
    seed: int


class Task(_Part):
    """One task; what common/summary.py makes."""

    name: str
    n: int  # questions
    patients: int
    reference: str
    final: str
    min_cell: int  # fewest patients of a group that is reported
    bootstrap: Bootstrap
    chance: float
    majority: Accuracies  # always choosing the most frequent option
    models: dict[str, ModelTold]
    paired: list[Pair]  # every model minus reference; final minus every other model; final minus "majority"
    by_target: Groups
    by_section: Groups
    subgroups: Subgroups
    leave_one_site_out: LeaveOneOut | None  # None: fewer than two sites are reported
    cross_validation: dict[str, Folds]  # by axis; axes of two strata or more
    position: Position
    power: Power
    findings: list[str]  # the most important first


class Counted(_Part):
    """A share of ratings, Wilson interval; both None of none."""

    of: int
    count: int
    share: float | None
    ci95: Bounds | None


class SignTest(_Part):
    """Items whose mean rating is for one model; exact p."""

    items_for_a: int
    items_for_b: int
    p: float


class Preference(_Part):
    """Ratings for a, for b, for neither; strong: much better, either. score: of b, a tie is half. decided: b's share
    without ties. Intervals are of bootstraps, over items and over raters and items; None where too few."""

    n: int
    items: int
    a: int
    b: int
    equal: int
    strong: int
    score: float | None
    ci95_items: Bounds | None
    ci95_raters_items: Bounds | None
    decided: Counted
    sign_test: SignTest


class LogOdds(_Part):
    """That b is preferred."""

    log_odds: float
    standard_error: float


class Ability(LogOdds):
    """A bound is None where it is infinite; a rater where theirs are."""

    ci95_items: tuple[float | None, float | None] | None
    ci95_raters_items: tuple[float | None, float | None] | None
    by_rater: dict[str, LogOdds | None]


class Agreement(_Part):
    """Krippendorff's alpha: of five steps, and of better, equal, worse."""

    raters: int
    shared_items: int
    ordinal: float
    nominal: float


class Consistency(_Part):
    """Of pairs seen twice: how often the same model, the same step, the other model was preferred."""

    same_preference: Counted
    same_step: int
    reversed: int
    by_rater: dict[str, Counted]


class Ratings(_Part):
    """Of one kind of raters. position: the first answer preferred, of decided. reasons: for a, for b. unacceptable: a's
    answer, b's. What is None has its reason in not_possible."""

    preference: Preference
    by_section: dict[str, Preference]
    by_rater: dict[str, Preference]
    bradley_terry: Ability | None
    agreement: Agreement | None
    self_consistency: Consistency | None
    position: Counted
    reasons: dict[str, tuple[int, int]]
    unacceptable: tuple[Counted, Counted]
    not_possible: dict[str, str]


class Rater(_Part):
    """How far one is."""

    rater: str
    kind: Literal["person", "judge"]
    rated: int
    of: int


class Review(_Part):
    """A blinded review, as `wardround server review stats STUDY --json` prints it (server/review/results.py). models: a
    and b. People and judges, which are programs, are never counted together; None where none has rated."""

    version: Literal[1]
    title: str
    data: str
    models: list[str]
    items: int
    planted_twice: float
    raters: list[Rater]
    people: Ratings | None
    judges: Ratings | None

    @field_validator("models")
    @classmethod
    def _two(cls, models: list[str]) -> list[str]:
        if len(models) != 2 or not all(name.strip() for name in models) or models[0] == models[1]:
            raise ValueError("expected the names of two models")
        return models


class SumsPair(ComparedDifference):
    """p: McNemar's exact one; normal where the sums carry noise."""

    model: str
    against: str
    only_model: int
    only_against: int
    detectable: float


class SumsTask(_Part):
    """A task that the sites asked their own patients; besides, what common/task_sums.py tells of it."""

    model_config = ConfigDict(extra="allow")

    name: str
    title: str
    n: int
    patients: int
    findings: list[str]


class Federated(_Part):
    """The held-out evaluation at the end of the run that made the model, of which only sums left its sites.

    run: its name. simulated: the sites were folders of one machine. masked: sums were added up under masks.
    noise: standard deviation on every count; 0 without privacy. models: accuracies of "base", "warmup" (where the run
    had one), "final", "majority". findings: the verdict first. worse: what is shown worse than before the rounds.
    """

    run: str
    simulated: bool
    masked: bool
    sites: int
    n: int
    noise: float
    chance: float
    models: dict[Literal["base", "warmup", "final", "majority"], Value]
    paired: list[SumsPair]
    findings: list[str]
    worse: list[str]
    tasks: list[SumsTask]


class Nothing(_Part):
    """A part that there is not: {}."""


class Evaluation(_Part):
    """The whole file.

    `provenance` and `reasoning` are what their makers put there; everything else is checked field by field.
    """

    evaluation_schema: Literal[1]
    wardround: str  # the version that wrote it
    tasks: list[Task]
    provenance: dict[str, Any] = Field(default_factory=dict[str, Any])  # models, registries, settings, digests
    reasoning: dict[str, Any] = Field(default_factory=dict[str, Any])  # counts of the audit's flags
    review: Review | Nothing = Nothing()  # experts' preferences; never counted with what is scored
    federated: Federated | Nothing = Nothing()  # figures of which only sums arrived


def evaluation(tasks: Sequence[Mapping[str, Any]], **parts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file, checked.

    Args:
        tasks: from `common.summary.summarise_task`.
        parts: "provenance", "reasoning", "review", "federated"; JSON-safe.

    Raises:
        ValidationError: a task that is not of this schema; a mistake of the program's.
    """
    whole = {"evaluation_schema": EVALUATION_SCHEMA, "wardround": version("wardround"), "tasks": tasks, **parts}
    return Evaluation.model_validate(whole).model_dump(mode="json")


def write_evaluation(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the file, whole or not at all."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode(), mode=0o644)


def read_evaluation(path: Path) -> dict[str, Any]:
    """The content of a file that `write_evaluation` wrote.

    Raises:
        ConfigError: no such file, no JSON, another schema version, or not what that version says.
    """
    content = _read_json(path, "`wardround evaluate`")
    got: object = (
        cast(dict[str, Any], content).get("evaluation_schema", "none") if isinstance(content, dict) else "none"
    )
    if got != EVALUATION_SCHEMA:
        raise ConfigError(
            f"{path}: expected evaluation schema {EVALUATION_SCHEMA}, got {got!s:.20}; evaluate again with this "
            "version of wardround, or read it with the version that wrote it"
        )
    try:
        return Evaluation.model_validate(content).model_dump(mode="json")
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from None


def read_review(path: Path) -> dict[str, Any]:
    """What `wardround server review stats STUDY --json` printed into a file, as `evaluation` takes it for "review".

    Raises:
        ConfigError: no such file, no JSON, not what that command prints, or its models are not two that are named.
    """
    command = "`wardround server review stats STUDY --json`"
    content = _read_json(path, command)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected the JSON of {command}, got something else")
    try:
        return Review.model_validate(content).model_dump(mode="json")
    except ValidationError as error:
        raise ConfigError(f"{path}: expected the JSON of {command}: {describe(error)}") from None


def _read_json(path: Path, command: str) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: expected the JSON of {command}, got something else") from None
