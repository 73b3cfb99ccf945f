r"""The reward of a completion: 1 when the option it chose is the patient's true value, else 0.

Runs at a hospital, during training. The chosen option is read by common/question.py (the last `\boxed{}` counts; a
letter that is no option is wrong) or was forced (common/lm/generation.py), so training and evaluation agree on what an
answer is. Rewards of single patients stay at the hospital; sums and histograms of a round leave in its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.question import Question, parse_answer


def reward(chosen: int | None, question: Question) -> float:
    """1.0 for the true option, 0.0 for another one or for none."""
    return float(chosen == question.answer)


def text_reward(text: str, question: Question) -> float:
    r"""The reward of a completion's text.

    >>> asked = Question("age", "Patient", "feature", "…", ("41", "63"), answer=1, majority=0)
    >>> text_reward(r"first \boxed{A}, no: \boxed{B}", asked), text_reward(r"\boxed{E}", asked)
    (1.0, 0.0)
    """
    return reward(parse_answer(text, len(question.options)), question)


def trl_reward(chosen: Sequence[int | None], question: Sequence[Question], **_: Any) -> list[float]:
    """`reward` in the shape that trl calls: one entry a completion."""
    return [reward(one, asked) for one, asked in zip(chosen, question, strict=True)]


class RoundCounts:
    """Sums over a round, of which the statistics that leave are made.

    Attributes:
        questions: trained on; patients drawn who had something to ask.
        empty_draws: steps whose draw gave no question.
        completions: of the questions; in exact mode one a question.
        reward_sum: over completions; in exact mode over the truth's probabilities.
        boxed: completions that answered without being forced (answer-only: none can).
        completion_tokens: tokens the model chose.
        histogram: questions by how many of their completions were right, int64 (group_size + 1,); in exact mode by the
            truth's probability, in as many equal bins.
    """

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self.questions = self.empty_draws = self.completions = self.boxed = self.completion_tokens = 0
        self.reward_sum = 0.0
        self.histogram: npt.NDArray[np.int64] = np.zeros(group_size + 1, np.int64)

    def add_draw(self, questions: int) -> None:
        """One draw and how many questions it gave."""
        self.questions += questions
        self.empty_draws += questions == 0

    def add_rewards(self, rewards: npt.NDArray[np.floating[Any]], boxed: int, tokens: int) -> None:
        """Rewards of whole groups, shape (questions, group_size), with how many were boxed and their tokens.

        >>> counts = RoundCounts(3)
        >>> counts.add_rewards(np.array([[0.0, 0, 0], [1, 1, 0], [0, 1, 1]]), boxed=0, tokens=9)
        >>> counts.histogram
        array([1, 0, 2, 0])
        """
        right = rewards.sum(1).astype(np.int64)
        self.histogram += np.bincount(right, minlength=self.group_size + 1)
        self.reward_sum += float(rewards.sum())
        self.completions += rewards.size
        self.boxed += boxed
        self.completion_tokens += tokens

    def add_probabilities(self, p_truth: npt.NDArray[np.floating[Any]]) -> None:
        """Exact mode: probabilities of the truth, one a question.

        >>> counts = RoundCounts(3)
        >>> counts.add_probabilities(np.array([0.0, 0.6, 1.0]))
        >>> counts.histogram
        array([1, 0, 1, 1])
        """
        bins = np.minimum((p_truth * (self.group_size + 1)).astype(np.int64), self.group_size)
        self.histogram += np.bincount(bins, minlength=self.group_size + 1)
        self.reward_sum += float(p_truth.sum())
        self.completions += len(p_truth)
        self.completion_tokens += len(p_truth)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {**vars(self), "histogram": self.histogram.tolist()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """The inverse of `to_dict`."""
        vars(self).update(saved)
        self.histogram = np.array(saved["histogram"], np.int64)


@dataclass
class LocalResult:
    """What one round at one hospital gave.

    Attributes:
        vector: the new trainable vector, float32.
        steps: optimizer steps.
        reward_histogram: `RoundCounts.histogram`.
        seconds: wall time.
        phase_seconds: of it: rollout, loss (forward and backward), other (the optimizer, building the engine).
        The others: as in `RoundCounts`.
    """

    vector: npt.NDArray[np.float32]
    questions: int
    completions: int
    reward_sum: float
    boxed: int
    completion_tokens: int
    steps: int
    empty_draws: int
    reward_histogram: npt.NDArray[np.int64]
    seconds: float
    phase_seconds: dict[str, float] = field(default_factory=dict)
