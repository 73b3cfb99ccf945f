"""A model's answers to questions: one look at the letters, or text up to a box with a fallback.

Both roles: a hospital on its own patients' questions, the coordinator on synthetic ones. Texts from `greedy_texts`
speak about a patient where the question does, and go no further than the question may.

Deterministic: greedy decoding, or no decoding at all when questions are answer-only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..question import PromptTemplate, Question, parse_answer, prefill
from .models import LanguageModel
from .scoring import (
    batches_by_length,
    encode_texts,
    log_probs_after,
    option_log_probs,
    render,
    scoring_precision,
)

_CLOSED_BOX = re.compile(r"\\boxed\s*\{[^{}]*\S[^{}]*\}")


@dataclass(frozen=True)
class Outcomes:
    """Answers to n questions, in their order.

    Attributes:
        correct: bool (n,), the chosen option is the truth.
        chosen: int16 (n,), index of the chosen option; -1: the model boxed something that is no option (wrong).
        boxed: bool (n,), the model wrote a box itself, without the fallback. Answer-only questions open the box for it:
            then, whether the log-probability choice was made at all by one look at the letters (always True).
        length: int32 (n,), tokens generated, the forced ones not counted; 0 for answer-only questions.
        log_probs: float32 (n, most options), log-probability of each option where the choice was made by it
            (answer-only, or the fallback), else NaN; -inf past a question's own options.
    """

    correct: npt.NDArray[np.bool_]
    chosen: npt.NDArray[np.int16]
    boxed: npt.NDArray[np.bool_]
    length: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]


def answer_questions(
    lm: LanguageModel,
    questions: Sequence[Question],
    template: PromptTemplate,
    *,
    reasoning_tokens: int,
    micro_batch: int,
    on_done: Callable[[int], None] | None = None,
) -> Outcomes:
    """The model's answer to every question.

    Answer-only (`reasoning_tokens` = 0): the most probable option letter. Else greedy text of at most that
    many tokens, the last box counts; where none came, `prompt.forced` is appended and the most probable letter taken.

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
    widest = max((len(question.options) for question in questions), default=0)
    truth = np.array([question.answer for question in questions], np.int16)
    if reasoning_tokens == 0 or n == 0:
        log_probs = option_log_probs(lm, questions, template, micro_batch, on_done=on_done)
        chosen = log_probs.argmax(axis=1).astype(np.int16) if n else np.zeros(0, np.int16)
        return Outcomes(chosen == truth, chosen, np.ones(n, np.bool_), np.zeros(n, np.int32), log_probs)

    texts = [render(lm, template, question, reasoning=True) for question in questions]
    prompts = encode_texts(lm, texts)
    completions = _greedy(lm, prompts, reasoning_tokens, micro_batch, on_done)
    chosen = np.full(n, -1, np.int16)
    boxed = np.ones(n, np.bool_)
    log_probs = np.full((n, widest), np.nan, np.float32)
    cue = prefill(template, reasoning=True)
    for index, (question, ids) in enumerate(zip(questions, completions, strict=True)):
        text = cue + str(lm.tokenizer.decode(ids, skip_special_tokens=True))
        answer = parse_answer(text, len(question.options))
        if answer is not None:
            chosen[index] = answer
        else:  # a closed box that holds no option is an answer, a wrong one; only its absence is mended
            boxed[index] = bool(_CLOSED_BOX.search(text))
    unanswered = [index for index in range(n) if not boxed[index]]
    if unanswered:
        forced_text = forced_suffix(template)
        [forced] = encode_texts(lm, [forced_text])
        log_probs[unanswered] = _padded(
            log_probs_after(
                lm,
                [prompts[index] + completions[index] + forced for index in unanswered],
                [len(questions[index].options) for index in unanswered],
                forced_text,
                micro_batch,
            ),
            widest,
        )
        chosen[unanswered] = log_probs[unanswered].argmax(axis=1)
    length = np.array([len(ids) for ids in completions], np.int32)
    return Outcomes(chosen == truth, chosen, boxed, length, log_probs)


def greedy_texts(
    lm: LanguageModel, questions: Sequence[Question], template: PromptTemplate, n_tokens: int, micro_batch: int = 8
) -> list[str]:
    """The greedy text of every question, its beginning (`prompt.cue`) included, at most `n_tokens` new tokens."""
    texts = [render(lm, template, question, reasoning=True) for question in questions]
    completions = _greedy(lm, encode_texts(lm, texts), n_tokens, micro_batch, None)
    cue = prefill(template, reasoning=True)
    return [cue + str(lm.tokenizer.decode(ids, skip_special_tokens=True)) for ids in completions]


def forced_suffix(template: PromptTemplate) -> str:
    """What is appended to a text without a box, so that a letter must follow."""
    return "\n" + template.forced


@torch.inference_mode()
def _greedy(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    micro_batch: int,
    on_done: Callable[[int], None] | None,
) -> list[list[int]]:
    """Greedy completions, without the token that ends them."""
    from transformers import GenerationConfig

    if n_tokens == 0:
        return [[] for _ in prompts]
    ends = end_token_ids(lm)
    # A configuration of our own: the model's may sample, or penalise repetition.
    settings = GenerationConfig(
        max_new_tokens=n_tokens, do_sample=False, eos_token_id=ends, pad_token_id=lm.tokenizer.pad_token_id
    )
    result: list[list[int]] = [[] for _ in prompts]
    for batch in batches_by_length([len(ids) for ids in prompts], micro_batch):
        width = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), width), lm.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):  # padded on the left: every row's next token is at the same place
            ids[row, width - len(prompts[index]) :] = torch.tensor(list(prompts[index]))
            mask[row, width - len(prompts[index]) :] = 1
        with scoring_precision(lm):
            output: Any = lm.model.generate(
                input_ids=ids.to(lm.device), attention_mask=mask.to(lm.device), generation_config=settings
            )
        for row, index in enumerate(batch):
            tokens = output[row, width:].tolist()
            stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
            result[index] = tokens[:stop]
        if on_done is not None:
            on_done(len(batch))
    return result


def end_token_ids(lm: LanguageModel) -> list[int]:
    """Tokens that end the assistant's turn: the generation config's (one or several) and the tokenizer's."""
    configured = lm.model.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*listed, lm.tokenizer.eos_token_id] if token is not None})


def _padded(log_probs: npt.NDArray[np.float32], widest: int) -> npt.NDArray[np.float32]:
    missing = widest - log_probs.shape[1]
    return np.pad(log_probs, ((0, 0), (0, missing)), constant_values=-np.inf)
