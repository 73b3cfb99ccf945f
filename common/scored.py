"""One task's questions and what every model answered: what all statistics of an evaluation are computed from.

Role: where questions were scored: at a hospital on its own patients, at a coordinator or a researcher on open
registries. Enters: answers as arrays, questions as their target, section and subgroups, never as text. Leaves: nothing
by itself; common/summary.py turns it into figures, common/patient_sums.py into sums that may leave a hospital.
Private: all of it. A row is one question about one patient, and its subgroups may point at who that is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

CHANCE, MAJORITY = "chance", "majority"  # computed, so no model may be called that
AXES = ("site", "age", "sex", "comorbidity", "severity", "period")  # usual axes of `Scored.strata`; others are allowed
_CLOSE = 1e-6  # how far a row of probabilities may be from a sum of 1: they come from float32


@dataclass(frozen=True, eq=False)
class Answered:
    """What one model answered to Q questions with at most W options.

    Attributes:
        probabilities: float64 (Q, W), over the question's own options: rows sum to 1, 0 past its last option; a uniform
            row where unknown.
        chosen: int64 (Q,), the option it chose; -1: none of them, which is wrong.
        boxed: bool (Q,); False: the answer was forced, or fell back to log-probabilities.
        length: int64 (Q,), tokens generated; 0 where none were.

    Raises:
        ValueError: shapes, types or values that contradict the above.
    """

    probabilities: Floats
    chosen: Ints
    boxed: Bools
    length: Ints

    def __post_init__(self) -> None:
        _array("probabilities", self.probabilities, np.float64, (len(self.chosen), None))
        _array("chosen", self.chosen, np.int64, (None,))
        _array("boxed", self.boxed, np.bool_, self.chosen.shape)
        _array("length", self.length, np.int64, self.chosen.shape)
        p = self.probabilities
        if not np.all(np.isfinite(p)) or np.any(p < 0) or np.any(np.abs(p.sum(axis=1) - 1) > _CLOSE):
            raise ValueError("probabilities: expected rows of numbers of 0 or more with the sum 1")
        if np.any(self.chosen < -1) or np.any(self.chosen >= p.shape[1]):
            raise ValueError(f"chosen: expected -1 to {p.shape[1] - 1}, got one out of range")
        if np.any(self.length < 0):
            raise ValueError("length: expected 0 or more tokens, got a negative one")

    def take(self, indices: Ints) -> Answered:
        """The answers to some of the questions, in the order of `indices`."""
        return Answered(self.probabilities[indices], self.chosen[indices], self.boxed[indices], self.length[indices])


@dataclass(frozen=True, eq=False)
class Scored:
    """Q questions of one task, and every model's answers to all of them.

    Attributes:
        patients: int64 (Q,), a pseudonymous number of the patient.
        targets: (Q,), the masked feature or the outcome.
        sections: (Q,), its section.
        n_options: int64 (Q,), 2 or more.
        answer: int64 (Q,), index of the truth among the options.
        majority: int64 (Q,), index of the option that is most frequent under the schema.
        event: int64 (Q,), for outcomes the index of the option that means that it happened; -1 elsewhere.
        strata: axis ("site", "age", …) → stratum of every question; "" where unknown.
        models: name → answers, in the order in which they are reported.
        permuted: the same questions with their options in another order, the answers mapped back to the original
            option's index. Of some of the models, or empty.
        shown_at: int64 (Q, 2), at which letter the truth stood in the original and in the permuted order; -1 where the
            question was not asked in that order.
        ordered: whether options stand in an order that their values decide (`questions.option_order = "sorted"`).

    Raises:
        ValueError: shapes, types or values that contradict the above; the message names the field.
    """

    patients: Ints
    targets: tuple[str, ...]
    sections: tuple[str, ...]
    n_options: Ints
    answer: Ints
    majority: Ints
    event: Ints
    strata: Mapping[str, tuple[str, ...]]
    models: Mapping[str, Answered]
    permuted: Mapping[str, Answered]
    shown_at: Ints
    ordered: bool = False

    def __post_init__(self) -> None:
        q = len(self.patients)
        for name in ("patients", "n_options", "answer", "majority", "event"):
            _array(name, getattr(self, name), np.int64, (q,))
        _array("shown_at", self.shown_at, np.int64, (q, 2))
        labels = {"targets": self.targets, "sections": self.sections}
        for name, values in {**labels, **{f"strata '{axis}'": values for axis, values in self.strata.items()}}.items():
            if len(values) != q:
                raise ValueError(f"{name}: expected {q}, one a question, got {len(values)}")
        if np.any(self.n_options < 2):
            raise ValueError("n_options: expected 2 or more, got fewer")
        for name, values, least in (
            ("answer", self.answer, 0),
            ("majority", self.majority, 0),
            ("event", self.event, -1),
        ):
            if np.any(values < least) or np.any(values >= self.n_options):
                raise ValueError(f"{name}: expected {least} to the question's last option, got one out of range")
        if np.any(self.shown_at < -1) or np.any(self.shown_at >= self.n_options[:, None]):
            raise ValueError("shown_at: expected -1 to the question's last option, got one out of range")
        reserved = {CHANCE, MAJORITY} & set(self.models)
        if not self.models or reserved:
            raise ValueError(f"models: expected one or more, none called {' or '.join(sorted(reserved)) or 'so'}")
        if set(self.permuted) - set(self.models):
            raise ValueError("permuted: expected models that also answered in the original order, got others")
        for kind, models in (("models", self.models), ("permuted", self.permuted)):
            for name, answers in models.items():
                self._check(f"{kind} '{name}'", answers)

    def _check(self, name: str, answers: Answered) -> None:
        q, width = answers.probabilities.shape
        if q != len(self):
            raise ValueError(f"{name}: expected {len(self)} answers, got {q}")
        if q and width < int(self.n_options.max()):
            raise ValueError(f"{name}: expected probabilities of {int(self.n_options.max())} options, got {width}")
        if np.any(answers.chosen >= self.n_options):
            raise ValueError(f"{name}: chose an option that its question does not have")
        if np.any(answers.probabilities[np.arange(width) >= self.n_options[:, None]] > 0):
            raise ValueError(f"{name}: expected probability 0 past a question's own options")

    def __len__(self) -> int:
        return len(self.patients)

    @property
    def n_patients(self) -> int:
        """How many different patients were asked about."""
        return len(np.unique(self.patients))

    def correct(self, model: str) -> Bools:
        """bool (Q,): where `model` (or "majority") chose the truth."""
        chosen = self.majority if model == MAJORITY else self.models[model].chosen
        return chosen == self.answer

    def take(self, indices: Ints) -> Scored:
        """Some of the questions, in the order of `indices`; patients keep their numbers."""
        chosen = [int(index) for index in indices]
        return Scored(
            self.patients[indices],
            tuple(self.targets[index] for index in chosen),
            tuple(self.sections[index] for index in chosen),
            self.n_options[indices],
            self.answer[indices],
            self.majority[indices],
            self.event[indices],
            {axis: tuple(values[index] for index in chosen) for axis, values in self.strata.items()},
            {name: answers.take(indices) for name, answers in self.models.items()},
            {name: answers.take(indices) for name, answers in self.permuted.items()},
            self.shown_at[indices],
            self.ordered,
        )


def concat(parts: Sequence[Scored]) -> Scored:
    """The questions of all parts, one after the other; patients of different parts are different patients.

    An axis that a part lacks is "" there, unknown.

    Raises:
        ValueError: no part, or parts that other models answered.
    """
    if not parts:
        raise ValueError("expected one or more parts, got none")
    for part in parts:
        if list(part.models) != list(parts[0].models) or set(part.permuted) != set(parts[0].permuted):
            raise ValueError(f"expected answers of {', '.join(parts[0].models)} in every part, got other models")
    patients: list[Ints] = []
    first = 0
    for part in parts:
        own = np.unique(part.patients, return_inverse=True)[1].astype(np.int64)
        patients.append(own + first)
        first += part.n_patients
    axes = list(dict.fromkeys(axis for part in parts for axis in part.strata))
    return Scored(
        np.concatenate(patients),
        tuple(target for part in parts for target in part.targets),
        tuple(section for part in parts for section in part.sections),
        np.concatenate([part.n_options for part in parts]),
        np.concatenate([part.answer for part in parts]),
        np.concatenate([part.majority for part in parts]),
        np.concatenate([part.event for part in parts]),
        {axis: tuple(s for part in parts for s in part.strata.get(axis, ("",) * len(part))) for axis in axes},
        {name: _joined([part.models[name] for part in parts]) for name in parts[0].models},
        {name: _joined([part.permuted[name] for part in parts]) for name in parts[0].permuted},
        np.concatenate([part.shown_at for part in parts]),
        any(part.ordered for part in parts),
    )


def _joined(parts: Sequence[Answered]) -> Answered:
    width = max(part.probabilities.shape[1] for part in parts)
    padded = [np.pad(p.probabilities, ((0, 0), (0, width - p.probabilities.shape[1]))) for p in parts]
    return Answered(
        np.concatenate(padded),
        np.concatenate([part.chosen for part in parts]),
        np.concatenate([part.boxed for part in parts]),
        np.concatenate([part.length for part in parts]),
    )


def _array(name: str, value: NDArray[np.generic], dtype: type[np.generic], shape: tuple[int | None, ...]) -> None:
    fits = len(value.shape) == len(shape) and all(b in (None, a) for a, b in zip(value.shape, shape, strict=True))
    if value.dtype != dtype or not fits:
        expected = "×".join("any" if size is None else str(size) for size in shape)
        got = "×".join(map(str, value.shape))
        raise ValueError(f"{name}: expected {np.dtype(dtype)} of shape {expected}, got {value.dtype} of shape {got}")


def groups(labels: Sequence[str]) -> dict[str, Ints]:
    """The rows of every label, in the order in which labels first appear; "" (unknown) is left out.

    >>> groups(["b", "a", "", "b"])
    {'b': array([0, 3]), 'a': array([1])}
    """
    found: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        if label:
            found.setdefault(label, []).append(row)
    return {label: np.array(rows, dtype=np.int64) for label, rows in found.items()}
