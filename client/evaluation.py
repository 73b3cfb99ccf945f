"""A hospital's own held-out evaluation: the model's answers to its patients' questions, and samples of its reasoning.

Runs at a hospital. Questions and texts speak about patients and never leave; what comes out of `evaluate_questions` are
arrays whose counts (common/statistics.py) are what a site may send. Texts from `sample_reasoning` stay in the site's
own report unless its registry is public. How a model answers is in common/lm/answers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..common.config import RunConfig
from ..common.lm.answers import Outcomes, answer_questions, greedy_texts
from ..common.lm.models import LanguageModel
from ..common.question import PromptTemplate, Question

__all__ = ["Outcomes", "evaluate_questions", "sample_reasoning"]


def evaluate_questions(
    lm: LanguageModel,
    questions: Sequence[Question],
    template: PromptTemplate,
    config: RunConfig,
    *,
    on_done: Callable[[int], None] | None = None,
) -> Outcomes:
    """The model's answer to every question, in the way the run config trains it (answer-only or reasoning).

    Args:
        lm: the model with the adapter to score; `lm.base_only()` around the call scores the base model.
        questions: 2 to 10 options each; may be empty.
        template: their prompt.
        config: its `questions.reasoning_tokens` and `speed.micro_batch` are used.
        on_done: called with the number of questions just finished.

    Raises:
        ModelError: the prompt or its letters do not fit the model's tokenizer.
    """
    return answer_questions(
        lm,
        questions,
        template,
        reasoning_tokens=config.questions.reasoning_tokens,
        micro_batch=config.speed.micro_batch,
        on_done=on_done,
    )


def sample_reasoning(
    lm: LanguageModel, questions: Sequence[Question], template: PromptTemplate, n_tokens: int
) -> list[str]:
    """The model's greedy text on every question, at most `n_tokens` new tokens after the cue to reason."""
    return greedy_texts(lm, questions, template, n_tokens)
