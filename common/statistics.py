"""What an evaluation sends and what is concluded from it: integer counts, intervals, paired tests (numpy only).

Role: a site makes a `Tally` of its held-out questions; the coordinator adds the tallies up and summarises the sum; a
person with one model and one registry (`wardround evaluate`) does both in one process.
Enters: questions and what each model answered. Leaves a site: the tally's integers, never a question or an answer.
Private: a tally of few questions says something about few patients; summed over sites it says less. Counts are integers
so that a secure sum can carry them unchanged. Nothing here adds noise; where sites added some (common/noisy.py), the
tally says how much, and every interval and p-value counts it in.

The tally keeps, per target, how often each *pattern* of right and wrong occurred over (majority option, model 1, model
2, …). Every accuracy, every 2 × 2 table of two models and every bootstrap of them follows from these counts: drawing n
questions with replacement from n questions is a multinomial draw over the patterns. That question bootstrap is the
patient bootstrap where each patient has one question, which is how wardround asks its held-out patients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from .errors import ProtocolError, RegistryError

if TYPE_CHECKING:
    from .question import Question

CHANCE_UNIT = 2520  # lcm(1..10): 1 / n_options is a whole number of these for every allowed n_options
MAJORITY = "majority"
MAX_MODELS = 6  # 2^(models + 1) patterns a target
Z95 = 1.959963984540054  # standard normal quantile at 0.975
Z80 = 0.8416212335729143  # at 0.8, for the difference that four runs in five would show
MAX_COUNT = 2**53  # counts stay exactly representable in floats

Ints = NDArray[np.int64]


class Answers(Protocol):
    """What one model answered; `client.evaluation.Outcomes` is one."""

    @property
    def correct(self) -> NDArray[np.bool_]: ...
    @property
    def boxed(self) -> NDArray[np.bool_]: ...
    @property
    def length(self) -> NDArray[Any]: ...


@dataclass(frozen=True, eq=False)
class Tally:
    """Sufficient statistics of an evaluation, for T targets and M models.

    Attributes:
        targets: the schema's usable targets, in the schema's order: the same at every site.
        models: names, in the order they were made: ("base", "warmup", "final").
        patterns: int64 (T, 2^(M+1)). Bit 0 of the column index: the majority option was right; bit i + 1: model i was.
        chance: int64 (T,), sum over questions of CHANCE_UNIT / n_options.
        boxed: int64 (T, M), answers given in a box without being forced.
        length: int64 (T, M), completion tokens.
        noise: standard deviation of the normal noise on every number in `patterns`, of which some may then be below 0.
    """

    targets: tuple[str, ...]
    models: tuple[str, ...]
    patterns: Ints
    chance: Ints
    boxed: Ints
    length: Ints
    noise: float = 0.0

    @classmethod
    def empty(cls, targets: Sequence[str], models: Sequence[str]) -> Self:
        """The tally of no questions."""
        return cls.from_vector(np.zeros(tally_size(targets, models), dtype=np.int64), targets, models)

    @classmethod
    def of(cls, questions: Sequence[Question], outcomes: Mapping[str, Answers], targets: Sequence[str]) -> Self:
        """The tally of `questions` that every model in `outcomes` answered, in the same order.

        Raises:
            ValueError: a model's answers are not one per question, or a question's target is not in `targets`.
        """
        models = tuple(outcomes)
        for model, answers in outcomes.items():
            if len(answers.correct) != len(questions):
                raise ValueError(f"'{model}': expected {len(questions)} answers, got {len(answers.correct)}")
        tally = cls.empty(targets, models)
        index = {target: row for row, target in enumerate(tally.targets)}
        unknown = {question.target for question in questions} - set(index)
        if unknown:
            raise ValueError(f"targets that the schema does not name: {', '.join(sorted(unknown))}")
        rows = np.array([index[question.target] for question in questions], dtype=np.int64)
        right = np.array([question.majority == question.answer for question in questions], dtype=np.int64)
        for bit, answers in enumerate(outcomes.values(), start=1):
            right = right | (np.asarray(answers.correct, dtype=np.int64) << bit)
        np.add.at(tally.patterns, (rows, right), 1)
        np.add.at(tally.chance, rows, [CHANCE_UNIT // len(question.options) for question in questions])
        for column, answers in enumerate(outcomes.values()):
            np.add.at(tally.boxed[:, column], rows, np.asarray(answers.boxed, dtype=np.int64))
            np.add.at(tally.length[:, column], rows, np.asarray(answers.length, dtype=np.int64))
        return tally

    def __add__(self, other: Tally) -> Tally:
        """The tally of both sets of questions.

        Raises:
            ProtocolError: the tallies count other targets or other models.
        """
        if (self.targets, self.models) != (other.targets, other.models):
            raise ProtocolError("expected tallies of the same targets and models, got two different ones")
        return Tally.from_vector(self.to_vector() + other.to_vector(), self.targets, self.models)

    def to_vector(self) -> Ints:
        """All counts as one int64 vector of `tally_size` entries: adding vectors adds tallies."""
        return np.concatenate([self.patterns.ravel(), self.chance, self.boxed.ravel(), self.length.ravel()])

    @classmethod
    def from_vector(cls, vector: Ints, targets: Sequence[str], models: Sequence[str]) -> Self:
        """The tally whose counts are `vector`.

        Raises:
            ProtocolError: wrong length or type, a negative or too large count, or counts that contradict each other.
        """
        size = tally_size(targets, models)
        if vector.shape != (size,) or vector.dtype != np.int64:
            raise ProtocolError(f"expected {size} int64 counts, got {vector.shape} {vector.dtype}")
        if np.any(vector < 0) or np.any(vector > MAX_COUNT):
            raise ProtocolError("expected counts of 0 or more, got one out of range")
        t, m, k = len(targets), len(models), 2 ** (len(models) + 1)
        patterns, chance, boxed, length = np.split(vector.copy(), np.cumsum([t * k, t, t * m]))
        tally = cls(
            tuple(targets), tuple(models), patterns.reshape(t, k), chance, boxed.reshape(t, m), length.reshape(t, m)
        )
        n = tally.n
        if (
            np.any(tally.boxed > n[:, None])
            or np.any(chance > n * CHANCE_UNIT)
            or np.any(chance * 10 < n * CHANCE_UNIT)
        ):
            raise ProtocolError("expected counts of one set of questions, got counts that contradict each other")
        return tally

    @property
    def n(self) -> Ints:
        """int64 (T,): questions per target."""
        return self.patterns.sum(axis=1)

    def correct(self, model: str) -> Ints:
        """int64 (T,): questions per target that `model` (or "majority") had right."""
        return self.patterns[:, right_column_mask(self.models, model)].sum(axis=1)


def tally_size(targets: Sequence[str], models: Sequence[str]) -> int:
    """Length of the vector of a tally of these targets and models.

    >>> tally_size(["sex", "age"], ["base", "final"])
    26
    """
    if not 1 <= len(models) <= MAX_MODELS or len(set(models)) != len(models) or MAJORITY in models:
        raise ValueError(f"expected 1 to {MAX_MODELS} different models, none called '{MAJORITY}', got {list(models)}")
    return len(targets) * (2 ** (len(models) + 1) + 1 + 2 * len(models))


def right_column_mask(models: Sequence[str], model: str) -> NDArray[np.bool_]:
    """bool (2^(M+1),): the patterns in which `model` (or "majority") is right."""
    bit = 0 if model == MAJORITY else models.index(model) + 1
    return np.arange(2 ** (len(models) + 1), dtype=np.int64) & (1 << bit) != 0


def wilson(correct: int, n: int) -> list[float]:
    """95 % Wilson score interval of a share; unlike the bootstrap it has a width at 0 or n right, so groups use it.

    >>> [round(bound, 4) for bound in wilson(8, 8)]
    [0.6756, 1.0]
    """
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"expected 0 to n right of n at least 1, got {correct} of {n}")
    share, z2 = correct / n, Z95 * Z95
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p, from how often each model alone was right: Binomial(b + c, 1/2), doubled tail.

    >>> mcnemar_exact(1, 5)
    0.21875
    """
    n, k = only_first + only_second, min(only_first, only_second)
    term, tail = 1, 1  # C(n, 0) and the sum of C(n, 0..k), in whole numbers: exact at every n
    for i in range(k):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def bootstrap_patterns(patterns: Ints, n_bootstrap: int, seed: int) -> Ints:
    """int64 (n_bootstrap, cells): pattern counts of as many questions drawn with replacement.

    Args:
        patterns: int64 (cells,), counts.
    """
    n = int(patterns.sum())
    return np.random.default_rng(seed).multinomial(n, patterns / n, size=n_bootstrap)


def mcnemar_noised(only_first: int, only_second: int, deviation: float) -> float:
    """Two-sided p of no difference, by the normal distribution, where the difference of the two has noise on it.

    Args:
        only_first, only_second: how often each model alone was right, with noise; may be below 0.
        deviation: standard deviation of the noise on their difference.

    >>> round(mcnemar_noised(25, 9, 0.0), 3), round(mcnemar_noised(25, 9, 12.0), 3)
    (0.006, 0.23)
    """
    variance = max(0, only_first + only_second) + deviation**2
    return math.erfc(abs(only_first - only_second) / math.sqrt(2 * variance)) if variance else 1.0


def _interval(values: NDArray[np.float64]) -> list[float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]


class _Bootstrap:
    """Shares of weighted patterns, and how far they scatter.

    Without noise: percentiles of the drawn shares. With noise a draw gets noise of its own, and its distance from the
    share that it was drawn around, which is known, stands for the estimate's distance from the truth: percentiles
    alone would be around the noised numbers cut off at 0, which are biased.
    """

    def __init__(self, patterns: Ints, noise: float, n_bootstrap: int, seed: int) -> None:
        self.patterns, self.noise, self.n = patterns, noise, max(1, int(patterns.sum()))
        # Where even how many questions there were is lost in the noise, a share can be anything.
        self.lost = noise > 0 and patterns.sum() < Z95 * noise * math.sqrt(patterns.size)
        if not noise:
            self.shares = bootstrap_patterns(patterns, n_bootstrap, seed) / self.n
            return
        around = np.maximum(patterns, 0)
        if not around.any():
            around[0] = 1  # all noise: nothing was right
        rng = np.random.default_rng(seed)
        drawn = rng.multinomial(self.n, around / around.sum(), size=n_bootstrap)
        drawn = drawn + rng.normal(0.0, noise, drawn.shape)
        self.shares = drawn / np.maximum(1.0, drawn.sum(axis=1, keepdims=True)) - around / around.sum()

    def share(self, weights: NDArray[Any]) -> float:
        """The weighted share; weights of 0 and 1 give an accuracy, of −1, 0 and 1 a difference."""
        return min(1.0, max(-1.0 if np.any(weights < 0) else 0.0, float(self.patterns @ weights) / self.n))

    def interval(self, weights: NDArray[Any]) -> tuple[list[float], float]:
        """95 % interval of the share, and its standard error."""
        drawn = self.shares @ weights.astype(np.float64)
        bounds = _interval(drawn)
        if self.noise:
            estimate, least = float(self.patterns @ weights) / self.n, -1.0 if np.any(weights < 0) else 0.0
            bounds = [min(1.0, max(least, estimate - error)) for error in reversed(bounds)]
            bounds = [least, 1.0] if self.lost else bounds
        return bounds, float(drawn.std())


def summarise(
    tally: Tally, sections: Mapping[str, str], n_bootstrap: int = 10_000, seed: int = 0, min_cell: int = 5
) -> dict[str, Any]:
    """The content of evaluation.json.

    Accuracies and paired differences of all questions carry 95 % percentile bootstrap intervals; features and sections
    carry Wilson intervals. Features with fewer than `min_cell` questions are reported together under "small_features":
    nobody should read a percentage of three questions, and a published one could point at a patient. That is a
    courtesy, not a guarantee: totals minus rows can still give a small row away.

    A tally with noise has one target, all questions; its intervals and p-values (normal, not exact) count the noise in.

    Args:
        tally: the pooled counts.
        sections: target → its section.
        n_bootstrap: bootstrap draws.
        seed: of the bootstrap.
        min_cell: fewest questions reported on their own.

    Returns:
        "n"; one entry a model and "majority", each {"accuracy", "ci95", "n", "correct"} and for models "box_rate" (None
        where no text was generated: an answer-only model has no box to find) and "mean_length" (tokens); "chance";
        "paired": {"final-warmup": …} (the later model minus the earlier one); "mcnemar_p" (base against final, where
        both are there); "by_feature", "by_section" and "small_features"; "noise", its standard deviation on each count.

    Raises:
        RegistryError: the tally counts no question.
    """
    n = max(int(tally.n.sum()), 1 if tally.noise else 0)
    if n == 0:
        raise RegistryError(
            "no held-out question could be asked: no test patient has a value that may be masked, or no hospital has "
            "as many test patients as its policy's min_test_patients"
        )
    bootstrap = _Bootstrap(tally.patterns.sum(axis=0), tally.noise, n_bootstrap, seed)
    names = (*tally.models, MAJORITY)
    right = {name: right_column_mask(tally.models, name).astype(np.int64) for name in names}
    result: dict[str, Any] = {"n": n, "noise": tally.noise}
    for name in names:
        accuracy, (bounds, _) = bootstrap.share(right[name]), bootstrap.interval(right[name])
        result[name] = {"accuracy": accuracy, "ci95": bounds, "n": n, "correct": round(accuracy * n)}
    for column, name in enumerate(tally.models):
        tokens = int(tally.length[:, column].sum())
        result[name]["box_rate"] = int(tally.boxed[:, column].sum()) / n if tokens else None
        result[name]["mean_length"] = tokens / n
    result["chance"] = int(tally.chance.sum()) / CHANCE_UNIT / n
    result["paired"] = {
        f"{later}-{earlier}": _paired(bootstrap, right[later], right[earlier])
        for later, earlier in _pairs(tally.models)
    }
    if "final-base" in result["paired"]:
        result["mcnemar_p"] = result["paired"]["final-base"]["mcnemar_p"]
    if tally.noise:  # of which feature a question was is not counted
        return {**result, "by_feature": {}, "by_section": {}, "small_features": {"features": [], "n": 0}}
    counts = tally.n
    large = [row for row in range(len(tally.targets)) if counts[row] >= min_cell]
    small = [row for row in range(len(tally.targets)) if 0 < counts[row] < min_cell]
    result["by_feature"] = {
        tally.targets[row]: {"section": sections[tally.targets[row]], **_group(tally, [row])} for row in large
    }
    result["by_section"] = {}
    for section in dict.fromkeys(sections[target] for target in tally.targets):
        rows = [row for row, target in enumerate(tally.targets) if sections[target] == section]
        if int(counts[rows].sum()) >= min_cell:
            result["by_section"][section] = _group(tally, rows)
    result["small_features"] = {
        "features": [tally.targets[row] for row in small],
        "n": int(counts[small].sum()),
        "min_cell": min_cell,
        **(_group(tally, small) if int(counts[small].sum()) >= min_cell else {}),
    }
    return result


def _pairs(models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(later, earlier) of every two models, then the last model against the majority option."""
    for second in range(len(models)):
        for first in range(second):
            yield models[second], models[first]
    yield models[-1], MAJORITY


def _paired(bootstrap: _Bootstrap, later: Ints, earlier: Ints) -> dict[str, Any]:
    """The paired comparison of two models on the same questions."""
    alone = [later * (1 - earlier), earlier * (1 - later)]
    only_later, only_earlier = (int(bootstrap.patterns @ weights) for weights in alone)
    bounds, error = bootstrap.interval(later - earlier)
    deviation = bootstrap.noise * math.sqrt(sum(int(weights.sum()) for weights in alone))
    return {
        "difference": bootstrap.share(later - earlier),
        "ci95": bounds,
        "mcnemar_p": mcnemar_noised(only_later, only_earlier, deviation)
        if bootstrap.noise
        else mcnemar_exact(only_later, only_earlier),
        "only_later": only_later,
        "only_earlier": only_earlier,
        # The difference that 80 % of such evaluations would find at the 5 % level: (z.975 + z.80) standard errors.
        "detectable": (Z95 + Z80) * error,
    }


def _group(tally: Tally, rows: Sequence[int]) -> dict[str, Any]:
    """Accuracy and Wilson interval of every model on the targets `rows`."""
    n = int(tally.n[rows].sum())
    group: dict[str, Any] = {"n": n, "chance": int(tally.chance[rows].sum()) / CHANCE_UNIT / n}
    for name in (*tally.models, MAJORITY):
        correct = int(tally.correct(name)[rows].sum())
        group[name] = {"accuracy": correct / n, "ci95": wilson(correct, n), "n": n, "correct": correct}
    return group
