"""A model's answers to questions: one look at the letters, or text up to a box with a forced answer as fallback.

Both roles: a hospital on its own patients' questions, the coordinator on synthetic ones. Texts from `greedy_texts`
speak about a patient where the question does, and go no further than the question may.

Deterministic: the most probable letter, or greedy text from the same rollouts that training uses (generation.py), so a
model is scored in the way it was rewarded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..question import LETTERS, PromptTemplate, Question, prefill
from .generation import Answering, Completion, rollout
from .models import LanguageModel
from .scoring import batches_by_length, encode_texts, option_log_probs, render


@dataclass(frozen=True)
class Outcomes:
    """Answers to n questions, in their order.

    Attributes:
        correct: bool (n,), the chosen option is the truth.
        chosen: int16 (n,), index of the chosen option; -1: the model boxed something that is no option (wrong).
        boxed: bool (n,), the model wrote the box itself, nothing was forced. Answer-only questions open the box for
            every model and look at the letters only: always True.
        length: int32 (n,), tokens generated, the forced ones not counted; 0 for answer-only questions.
        log_probs: float32 (n, most options), log-probability of every option (-inf past a question's own) for
            answer-only questions; None for texts.
    """

    correct: npt.NDArray[np.bool_]
    chosen: npt.NDArray[np.int16]
    boxed: npt.NDArray[np.bool_]
    length: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32] | None = None


def answer_questions(
    lm: LanguageModel,
    questions: Sequence[Question],
    template: PromptTemplate,
    *,
    reasoning_tokens: int,
    micro_batch: int,
    on_done: Callable[[int], None] | None = None,
) -> Outcomes:
    r"""The model's answer to every question.

    Answer-only (`reasoning_tokens` = 0): the most probable option letter. Else greedy text of at most that many tokens
    up to a complete box; where none came, `prompt.forced` is appended and the most probable letter taken.

    Args:
        lm: the model with the adapter to score; `lm.base_only()` around the call scores the base model.
        questions: 2 to 10 options each; may be empty.
        template: their prompt.
        reasoning_tokens: most tokens of a text; 0: answer-only.
        micro_batch: questions at a time; changes time and memory only (rounding aside).
        on_done: called with the number of questions just finished.

    Raises:
        ModelError: the prompt or its letters do not fit the model's tokenizer.
    """
    n = len(questions)
    truth = np.array([question.answer for question in questions], np.int16)
    if reasoning_tokens == 0 or n == 0:
        log_probs = option_log_probs(lm, questions, template, micro_batch, on_done=on_done)
        chosen = log_probs.argmax(axis=1).astype(np.int16) if n else np.zeros(0, np.int16)
        return Outcomes(chosen == truth, chosen, np.ones(n, np.bool_), np.zeros(n, np.int32), log_probs)
    completions = _greedy(lm, Answering(lm, template), questions, template, reasoning_tokens, micro_batch, on_done)
    answers = [-1 if completion.answer is None else completion.answer for completion in completions]
    chosen = np.array(answers, np.int16)
    boxed = np.array([completion.boxed for completion in completions], np.bool_)
    length = np.array([completion.generated for completion in completions], np.int32)
    return Outcomes(chosen == truth, chosen, boxed, length)


def greedy_texts(
    lm: LanguageModel, questions: Sequence[Question], template: PromptTemplate, n_tokens: int, micro_batch: int = 8
) -> list[str]:
    """The assistant's turn on every question: the cue to reason, at most `n_tokens` greedy tokens, and the answer.

    Where the model wrote no box, the text ends with the forced answer on a line of its own.
    """
    answering = Answering(lm, template)
    completions = _greedy(lm, answering, questions, template, n_tokens, micro_batch, None)
    cue = prefill(template, reasoning=True)
    texts: list[str] = []
    for completion in completions:
        if completion.boxed or completion.answer is None:
            texts.append(cue + answering.text(completion.ids))
        else:
            own = completion.ids[: -len(answering.forced_ids) - 1]
            answer = f"{answering.forced_text}{LETTERS[completion.answer]}}}"
            texts.append(cue + answering.text(own) + answer)
    return texts


def _greedy(
    lm: LanguageModel,
    answering: Answering,
    questions: Sequence[Question],
    template: PromptTemplate,
    n_tokens: int,
    micro_batch: int,
    on_done: Callable[[int], None] | None,
) -> list[Completion]:
    prompts = encode_texts(lm, [render(lm, template, question, reasoning=True) for question in questions])
    result = [Completion() for _ in questions]
    for batch in batches_by_length([len(ids) for ids in prompts], micro_batch):
        completions = rollout(
            lm,
            answering,
            [prompts[index] for index in batch],
            [len(questions[index].options) for index in batch],
            group_size=1,
            max_tokens=n_tokens,
        )
        for index, completion in zip(batch, completions, strict=True):
            result[index] = completion
        if on_done is not None:
            on_done(len(batch))
    return result
