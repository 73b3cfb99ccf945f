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
import torch

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

    Answer-only (`reasoning_tokens` = 0): the most probable option letter, of however many tokens. Else greedy text of
    at most that many tokens up to a complete box; where none came, `prompt.forced` is appended and the most probable
    letter taken. Texts come from training's own rollouts, which refuse a tokenizer whose letters are not single tokens.

    Args:
        lm: the model with the adapter to score; `lm.base_only()` around the call scores the base model.
        questions: 2 to 10 options each; may be empty.
        template: their prompt.
        reasoning_tokens: most tokens of a text; 0: answer-only.
        micro_batch: questions at a time; changes time and memory only (rounding aside).
        on_done: called with the number of questions just finished.

    Raises:
        ModelError: the prompt or its letters do not fit the model's tokenizer; with reasoning: a letter is not one
            token.
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


def sampled_answers(
    lm: LanguageModel,
    questions: Sequence[Question],
    template: PromptTemplate,
    *,
    reasoning_tokens: int,
    samples: int,
    seed: int,
    micro_batch: int,
    on_done: Callable[[int], None] | None = None,
) -> tuple[Outcomes, npt.NDArray[np.float64]]:
    """The option that most of `samples` texts chose, at temperature 1, and the share of texts that chose each option.

    Args:
        lm, questions, template, micro_batch, on_done: as `answer_questions`.
        reasoning_tokens: most tokens of a text, 1 or more.
        samples: texts a question, 2 or more.
        seed: of the draws; what one question draws does not depend on the others.

    Returns:
        Outcomes, where a tie goes to the earlier letter, `boxed` says that most texts had a box of their own and
        `length` is their mean; and float64 (n, most options), 0 past a question's own; a text without an option counts
        for none.
    """
    n, widest = len(questions), max((len(question.options) for question in questions), default=2)
    votes, boxed, length = np.zeros((n, widest)), np.zeros(n), np.zeros(n)
    answering = Answering(lm, template)
    prompts = encode_texts(lm, [render(lm, template, question, reasoning=True) for question in questions])
    for batch in batches_by_length([len(ids) for ids in prompts], max(1, micro_batch // samples)):
        drawn = [np.random.default_rng([seed, index]).random((samples, reasoning_tokens + 1)) for index in batch]
        completions = rollout(
            lm,
            answering,
            [prompts[index] for index in batch],
            [len(questions[index].options) for index in batch],
            group_size=samples,
            max_tokens=reasoning_tokens,
            uniform=torch.from_numpy(np.concatenate(drawn)),
        )
        for place, completion in enumerate(completions):
            index = batch[place // samples]
            if completion.answer is not None:
                votes[index, completion.answer] += 1
            boxed[index] += completion.boxed
            length[index] += completion.generated
        if on_done is not None:
            on_done(len(batch))
    chosen = np.where(votes.any(axis=1), votes.argmax(axis=1), -1).astype(np.int16)
    truth = np.array([question.answer for question in questions], np.int16)
    outcomes = Outcomes(chosen == truth, chosen, 2 * boxed > samples, np.rint(length / samples).astype(np.int32))
    return outcomes, votes / samples


@torch.inference_mode()
def free_texts(lm: LanguageModel, messages: Sequence[list[dict[str, str]]], n_tokens: int) -> list[str]:
    """Greedy answers in free text, nothing forced: open tasks, which experts judge.

    Args:
        lm: the model.
        messages: chats that end with the user's turn.
        n_tokens: most tokens of an answer.
    """
    if not messages:
        return []
    opened = [
        str(lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)) for chat in messages
    ]
    # Padded on the left, as `models.load` sets it, so that all answers begin at the same place.
    batch = lm.tokenizer(opened, add_special_tokens=False, padding=True, return_tensors="pt").to(lm.device)
    made = lm.model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=n_tokens,
        do_sample=False,
        pad_token_id=lm.tokenizer.pad_token_id,
    )
    own = made[:, batch["input_ids"].shape[1] :]
    return [lm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in own]
