"""Prompts as tokens, and the model's choice among a question's options without generating text.

Both roles: sites score held-out patients, the coordinator scores synthetic questions of the warm-up. What enters are
questions (a site's hold its patients' records and never leave); what leaves are log-probabilities over the options.

The choice is the softmax over the next token restricted to the question's letters, after the forced beginning of an
answer (`prompt.forced`, ending in `\\boxed{`). One forward pass a question, batched by length. A tokenizer that splits
letters, or melts them into the brace, is read by `whole_text_log_probs`: slower, the same meaning, evaluation only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
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
_VOCABULARY_PART = 8192  # tokens whose logits exist at a time


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
        ModelError: a letter is not exactly one more token there (not guaranteed by every tokenizer), or two share one.
    """
    texts = [context_text, *(context_text + letter for letter in LETTERS[:n])]
    before, *after = tokenizer(texts, add_special_tokens=False)["input_ids"]
    found: list[int] = []
    for letter, ids in zip(LETTERS, after, strict=False):
        if len(ids) != len(before) + 1 or list(ids[:-1]) != list(before):
            raise ModelError(
                f"tokenizer: letter '{letter}' is not one token of its own after '{_end_of(context_text)}'; only "
                "evaluation without reasoning can score that: use another model"
            )
        found.append(int(ids[-1]))
    if len(set(found)) != len(found):
        raise ModelError("tokenizer: two option letters share a token")
    return found


def _end_of(text: str) -> str:
    """The last 24 characters of its last line: of the prompt template alone, and an error stays one line."""
    return text.rpartition("\n")[2][-24:]


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

    From the letters' single tokens; where one of them is not, from whole texts (`whole_text_log_probs`).

    Args:
        lm: the model, with the adapter it has now.
        questions: with 2 to 10 options each.
        template: their prompt.
        micro_batch: questions a forward pass; changes time and memory only (rounding aside).
        on_done: called with the number of questions of each finished batch.

    Returns:
        float32, shape (len(questions), most options of any question); -inf past a question's own options.

    Raises:
        ModelError: the tokenizer does not tell the letters apart.
    """
    if not questions:
        return np.zeros((0, 0), np.float32)
    texts = [render(lm, template, question, reasoning=False) for question in questions]
    n_options = [len(question.options) for question in questions]
    try:
        letters = option_token_ids(lm.tokenizer, texts[0], max(n_options))
    except ModelError:
        return whole_text_log_probs(lm, texts, n_options, micro_batch, on_done)
    return _letter_log_probs(lm, encode_texts(lm, texts), n_options, letters, micro_batch, on_done)


@torch.inference_mode()
def log_probs_after(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    n_options: Sequence[int],
    context_text: str,
    micro_batch: int,
    on_done: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    r"""As `option_log_probs` for token ids that end in an open `\boxed{`, whatever came before it.

    Raises:
        ModelError: an option letter is not one token after `context_text` (token ids do not say how a letter changes
            them; `whole_text_log_probs` has the texts).
    """
    letters = option_token_ids(lm.tokenizer, context_text, max(n_options))
    return _letter_log_probs(lm, prompts, n_options, letters, micro_batch, on_done)


def _letter_log_probs(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    n_options: Sequence[int],
    letter_ids: Sequence[int],
    micro_batch: int,
    on_done: Callable[[int], None] | None,
) -> npt.NDArray[np.float32]:
    letters = torch.tensor(letter_ids, device=lm.device)
    result = np.full((len(prompts), len(letters)), -np.inf, np.float32)
    with _merged_for(lm, prompts, micro_batch):
        for batch in _batches(lm, prompts, micro_batch):
            hidden = _last_states(lm, [prompts[index] for index in batch])
            own = torch.tensor([n_options[index] for index in batch], device=lm.device)
            result[batch] = option_log_softmax(causal_model(lm), hidden, letters, own, 1.0).cpu().numpy()
            if on_done is not None:
                on_done(len(batch))
    return result


def _merged_for(lm: LanguageModel, prompts: Sequence[Sequence[int]], micro_batch: int) -> AbstractContextManager[None]:
    return merged(lm.model, micro_batch * len(prompts[0])) if len(prompts) >= _MERGE_FROM else nullcontext()


@torch.inference_mode()
def whole_text_log_probs(
    lm: LanguageModel,
    texts: Sequence[str],
    n_options: Sequence[int],
    micro_batch: int,
    on_done: Callable[[int], None] | None = None,
) -> npt.NDArray[np.float32]:
    r"""As `option_log_probs` from rendered prompts, whatever tokens the tokenizer makes of the letters.

    A question's options are compared as whole texts, prompt + letter, each with the tokens that the tokenizer gives all
    of it: a letter may be several tokens, or melt into the brace, and then the tokens of the prompt alone are not the
    first of them. An option's score is the sum of the log-probabilities of its tokens from the first in which the
    question's own options differ; what comes before is the same for all and would cancel. Not divided by the number of
    tokens: it is the probability that the model writes this text. Of single tokens it is what `option_log_probs` gives.

    Raises:
        ModelError: the tokens of one option begin those of another.
    """
    parts = [_parted(lm, text, n) for text, n in zip(texts, n_options, strict=True)]
    begins = [begin for begin, _ in parts]
    result = np.full((len(texts), max(n_options)), -np.inf, np.float32)
    with _merged_for(lm, begins, micro_batch):
        for batch in _batches(lm, begins, micro_batch):
            sums = np.full((len(batch), result.shape[1]), -np.inf)
            scored: list[tuple[int, int, tuple[int, ...], int]] = []  # row, option, tokens so far, the next one
            for row, index in enumerate(batch):
                begin, ends = parts[index]
                sums[row, : len(ends)] = 0
                for option, end in enumerate(ends):
                    scored += [(row, option, (*begin, *end[:at]), token) for at, token in enumerate(end)]
            rows, options, contexts, tokens = zip(*scored, strict=True)
            np.add.at(sums, (rows, options), _next_token_log_probs(lm, contexts, tokens, micro_batch))
            result[batch] = torch.from_numpy(sums).log_softmax(1).numpy()
            if on_done is not None:
                on_done(len(batch))
    return result


def _parted(reader: Reader, text: str, n: int) -> tuple[list[int], list[list[int]]]:
    """Tokens with which `text` + letter begins for all of the first `n` letters, and how each goes on.

    Raises:
        ModelError: the tokens of one begin those of another.
    """
    variants = encode_texts(reader, [text + letter for letter in LETTERS[:n]])
    ordered = sorted(variants)  # what begins another stands right before one that it begins
    if any(after[: len(before)] == before for before, after in pairwise(ordered)):
        raise ModelError(
            f"tokenizer: the tokens of one option letter begin those of another after '{_end_of(text)}': "
            "use another model"
        )
    alike = next(at for at, (one, other) in enumerate(zip(ordered[0], ordered[-1], strict=False)) if one != other)
    return variants[0][:alike], [ids[alike:] for ids in variants]


def _next_token_log_probs(
    lm: LanguageModel, contexts: Sequence[tuple[int, ...]], tokens: Sequence[int], micro_batch: int
) -> npt.NDArray[np.float64]:
    """Log-probability of each token after its context, under the whole vocabulary; equal contexts are run once.

    `micro_batch` contexts a forward pass: a question has one for each token but the last of each of its options.
    """
    distinct = sorted(set(contexts))  # side by side what begins alike
    at = {context: row for row, context in enumerate(distinct)}
    hidden = torch.cat(
        [_last_states(lm, distinct[start : start + micro_batch]) for start in range(0, len(distinct), micro_batch)]
    ).float()
    weight = causal_model(lm).get_output_embeddings().weight
    # In float32, as `option_log_softmax` does, and so that no float32 copy of the whole vocabulary is made.
    totals = [(hidden @ part.float().T).logsumexp(1) for part in weight.split(_VOCABULARY_PART)]
    rows, columns = torch.tensor([at[context] for context in contexts]), torch.tensor(tokens)
    logits = (hidden[rows] * weight[columns].float()).sum(1)
    return (logits - torch.stack(totals).logsumexp(0)[rows]).double().cpu().numpy()
