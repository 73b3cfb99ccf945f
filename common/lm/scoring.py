"""Prompts as tokens, and the model's choice among a question's options without generating text.

Both roles: sites score held-out patients, the coordinator scores synthetic questions of the warm-up. What enters are
questions (a site's hold its patients' records and never leave); what leaves are log-probabilities over the options.

The choice is the softmax over the next token restricted to the question's letters, after the forced beginning of an
answer (`prompt.forced`, ending in `\\boxed{`). One forward pass a question, batched by length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..config import ModelConfig
from ..errors import ModelError
from ..question import LETTERS, PromptTemplate, Question, chat, prefill
from .lora import merged
from .models import LanguageModel
from .prefix import causal_model, option_log_softmax
from .tree import PromptTree

_MERGE_FROM = 8  # prompts from which merging the adapter pays: it takes as long as a prompt or two


class Reader(Protocol):
    """What turns questions into tokens: a model, or its tokenizer alone where there is no model."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tokenizer(self) -> Any: ...


def render(reader: Reader, template: PromptTemplate, question: Question, reasoning: bool) -> str:
    """The prompt as text: the model's chat template, the assistant's turn opened, and how it begins.

    Raises:
        ModelError: the model's chat template refuses the messages (some take no system turn).
    """
    from jinja2 import TemplateError

    try:
        opened = reader.tokenizer.apply_chat_template(
            chat(template, question), add_generation_prompt=True, tokenize=False
        )
    except TemplateError as error:
        raise ModelError(
            f"model '{reader.config.id}': its chat template refuses prompt '{template.name}': {error}"
        ) from None
    return str(opened) + prefill(template, reasoning)


def encode(reader: Reader, template: PromptTemplate, question: Question, reasoning: bool) -> list[int]:
    """The prompt as token ids, special tokens of the chat template included, nothing added."""
    return encode_texts(reader, [render(reader, template, question, reasoning)])[0]


def encode_texts(reader: Reader, texts: Sequence[str]) -> list[list[int]]:
    """Rendered texts as token ids; nothing is added (a chat template writes its own special tokens)."""
    return [list(ids) for ids in reader.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def option_token_ids(tokenizer: Any, context_text: str, n: int) -> list[int]:
    r"""Token ids of the first `n` letters as they follow `context_text`.

    Args:
        tokenizer: the model's.
        context_text: a prompt up to the open `\boxed{`.
        n: number of options, 2 to 10.

    Raises:
        ModelError: a letter is not exactly one more token there (not guaranteed by every tokenizer).
    """
    texts = [context_text, *(context_text + letter for letter in LETTERS[:n])]
    before, *after = tokenizer(texts, add_special_tokens=False)["input_ids"]
    found: list[int] = []
    for letter, ids in zip(LETTERS, after, strict=False):
        if len(ids) != len(before) + 1 or list(ids[:-1]) != list(before):
            raise ModelError(f"tokenizer: letter '{letter}' is not one token of its own after '{context_text[-24:]}'")
        found.append(int(ids[-1]))
    if len(set(found)) != len(found):
        raise ModelError("tokenizer: two option letters share a token")
    return found


def batches_by_length(lengths: Sequence[int], micro_batch: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that padding and surprises about memory are small."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), micro_batch):
        yield order[start : start + micro_batch]


def hidden_states(lm: LanguageModel, batch: Sequence[Sequence[int]]) -> torch.Tensor:
    """Last hidden states of sequences, shape (len(batch), longest, width); what lies past a sequence's end is noise.

    Padded on the right: a causal model's real tokens never see what comes after them, so no attention mask is needed
    and the fast attention path stays. The vocabulary head does not run.
    """
    return causal_model(lm).base_model(input_ids=_padded(lm, batch), use_cache=False).last_hidden_state


def _last_states(lm: LanguageModel, batch: Sequence[Sequence[int]]) -> torch.Tensor:
    """Last hidden state of each sequence, shape (len(batch), width): it predicts the next token.

    On a CPU each beginning that neighbours share is computed once; a GPU keeps its fused attention.
    """
    if lm.device.type == "cpu" and len(batch) > 1:
        return PromptTree(batch).last_states(lm)
    ends = torch.tensor([len(ids) - 1 for ids in batch], device=lm.device)
    return hidden_states(lm, batch)[torch.arange(len(batch), device=lm.device), ends]


def _batches(lm: LanguageModel, prompts: Sequence[Sequence[int]], micro_batch: int) -> Iterator[list[int]]:
    """Indices in batches: side by side what begins alike on a CPU, what is about as long on a GPU."""
    if lm.device.type != "cpu":
        yield from batches_by_length([len(ids) for ids in prompts], micro_batch)
        return
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    for start in range(0, len(order), micro_batch):
        yield order[start : start + micro_batch]


def _padded(lm: LanguageModel, batch: Sequence[Sequence[int]]) -> torch.Tensor:
    padded = torch.full((len(batch), max(len(ids) for ids in batch)), lm.tokenizer.pad_token_id, dtype=torch.long)
    for row, ids in enumerate(batch):
        padded[row, : len(ids)] = torch.tensor(ids)
    return padded.to(lm.device)


@torch.inference_mode()
def option_log_probs(
    lm: LanguageModel,
    questions: Sequence[Question],
    template: PromptTemplate,
    micro_batch: int,
    *,
    on_done: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    """Answer-only: the model's log-probability of every option, renormalised over the options.

    Args:
        lm: the model, with the adapter it has now.
        questions: with 2 to 10 options each.
        template: their prompt.
        micro_batch: questions a forward pass; changes time and memory only (rounding aside).
        on_done: called with the number of questions of each finished batch.

    Returns:
        float32, shape (len(questions), most options of any question); -inf past a question's own options.

    Raises:
        ModelError: an option letter is not one token after the forced beginning of an answer.
    """
    if not questions:
        return np.zeros((0, 0), np.float32)
    texts = [render(lm, template, question, reasoning=False) for question in questions]
    return log_probs_after(
        lm, encode_texts(lm, texts), [len(q.options) for q in questions], texts[0], micro_batch, on_done
    )


@torch.inference_mode()
def log_probs_after(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    n_options: Sequence[int],
    context_text: str,
    micro_batch: int,
    on_done: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    r"""As `option_log_probs` for token ids that end in an open `\boxed{`, whatever came before it."""
    widest = max(n_options)
    letters = torch.tensor(option_token_ids(lm.tokenizer, context_text, widest), device=lm.device)
    result = np.full((len(prompts), widest), -np.inf, np.float32)
    many = len(prompts) >= _MERGE_FROM
    with merged(lm.model, micro_batch * len(prompts[0])) if many else nullcontext():
        for batch in _batches(lm, prompts, micro_batch):
            hidden = _last_states(lm, [prompts[index] for index in batch])
            own = torch.tensor([n_options[index] for index in batch], device=lm.device)
            result[batch] = option_log_softmax(causal_model(lm), hidden, letters, own, 1.0).cpu().numpy()
            if on_done is not None:
                on_done(len(batch))
    return result
