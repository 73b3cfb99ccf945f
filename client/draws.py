"""Which patients a step trains on: one Poisson draw a step.

Runs at a hospital. Enters: its question source and a generator. What comes out are patients' questions; they stay here.
The generator is the run's while nothing is promised about single patients; under differential privacy draws come from
the site's own secret.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..common.question import Question

if TYPE_CHECKING:
    from .private_optimizer import PrivateSteps


@dataclass(frozen=True)
class Asked:
    """A question with its prompt as the model reads it."""

    question: Question
    prompt: list[int]

    @property
    def n_options(self) -> int:
        return len(self.question.options)


class QuestionSource(Protocol):
    """Where questions come from: one hospital's training patients."""

    @property
    def n_patients(self) -> int:
        """Patients that may be drawn."""
        ...

    def draw(self, patient_indices: np.ndarray, rng: np.random.Generator) -> list[Question]:
        """At most one question for each patient index."""
        ...


class Draws:
    """The steps of a round: each iteration is the questions of one Poisson draw, possibly none.

    Every patient is drawn with the same probability, independently of all others and of earlier steps; a draw is never
    cut to a size. Shuffled batches do not have the privacy of Poisson draws (Chua et al. 2024, arXiv 2403.17673).

    Attributes:
        rate: q, the probability of every patient in every step.
        expected_patients: q·N, the normaliser of a step's loss; a constant of the round.
    """

    def __init__(
        self,
        source: QuestionSource,
        patients_per_step: float,
        steps: int,
        rng: np.random.Generator,
        private: PrivateSteps | None = None,
    ) -> None:
        """Without `private` the rate and its normaliser follow from the patients that are here; with it both are its
        constants, and who is drawn is decided by the site's own randomness instead of `rng`.
        """
        self.source, self.steps, self.rng = source, steps, rng
        self._uniform: Callable[[int], np.ndarray] = private.random.uniform if private else rng.random
        self.rate = private.rate if private else min(1.0, patients_per_step / max(source.n_patients, 1))
        # Without patients every draw is empty; any positive constant will do.
        live = self.rate * source.n_patients or patients_per_step
        self.expected_patients = private.expected_patients if private else live

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[Question]]:
        for _ in range(self.steps):
            drawn = np.flatnonzero(self._uniform(self.source.n_patients) < self.rate)
            yield self.source.draw(drawn, self.rng) if len(drawn) else []
