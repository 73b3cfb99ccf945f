r"""Completions of prompts: groups that share one prefill, and an answer for every one of them.

Runs at sites (rollouts of GRPO, evaluation with reasoning) and at the coordinator (samples of public registries). What
enters are prompts of patients' questions, what leaves are completions; both stay where they are.

A completion ends with the end-of-sequence token, with a complete `\boxed{…}`, or at its token limit. **Forced
answers**: one that came without a box gets the template's forced text appended (never in a loss) and one letter, drawn
from the softmax restricted to the question's options, so every completion has an answer and a small model has something
to learn from. Where the model had ended its turn, the forced text stands in the place of the end token; the decision to
end is still its own, and stays in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..question import LETTERS, PromptTemplate, parse_answer
from .lora import merged
from .models import LanguageModel
from .prefix import SharedPrefix, option_log_softmax, token_log_probs
from .products import Product, prepared
from .scoring import option_token_ids

_DRAW_BLOCK = 256  # tokens whose probabilities are added up together when one is drawn
_MERGE_FROM = 16  # tokens a completion from which merging the adapter pays


@dataclass
class Completion:
    """What follows one prompt.

    Attributes:
        ids: tokens after the prompt as the model read them, forced text and letter included.
        targets: what position i is scored on: `ids[i]`, or the end token where forced text took its place.
        in_loss: whether position i was the model's own choice.
        log_probs: of `targets`, at the temperature and (for a forced letter) under the restricted softmax; 0 elsewhere.
        generated: tokens the model wrote before it ended, answered or ran out; an end token counts.
        answer: index of the chosen option; None: a box that holds no letter of an option.
        boxed: it came with a box of its own.
        forced: its last token is a letter under the restricted softmax.
    """

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    in_loss: list[bool] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    generated: int = 0
    answer: int | None = None
    boxed: bool = False
    forced: bool = False

    def add(self, token: int, log_prob: float, *, target: int | None = None, in_loss: bool = True) -> None:
        """Appends one position."""
        self.ids.append(token)
        self.targets.append(token if target is None else target)
        self.in_loss.append(in_loss)
        self.log_probs.append(log_prob)


class Answering:
    """The tokens that end, force and read answers, looked up once per model and template.

    Attributes:
        forced_text: appended where no box came; begins on a new line.
        letters: token ids of the letters after the forced text, on the model's device.
        ends: ids of the tokens that end a turn.
    """

    def __init__(self, lm: LanguageModel, template: PromptTemplate, most_options: int = len(LETTERS)) -> None:
        """Looks the tokens up.

        Raises:
            ModelError: a letter is not one token after the forced text.
        """
        self.tokenizer: Any = lm.tokenizer
        self.forced_text = "\n" + template.forced
        self.forced_ids: list[int] = list(self.tokenizer(self.forced_text, add_special_tokens=False)["input_ids"])
        letters = option_token_ids(self.tokenizer, self.forced_text, most_options)
        self.letters = torch.tensor(letters, device=lm.device)
        declared = lm.model.generation_config.eos_token_id
        ends = [declared] if isinstance(declared, int) else list(declared or [])
        self.ends = frozenset([*ends, self.tokenizer.eos_token_id])

    @cached_property
    def _closing(self) -> frozenset[int]:
        """Tokens that can close a box: only after them the text is looked at."""
        return frozenset(i for token, i in self.tokenizer.get_vocab().items() if "}" in token)

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def completes_box(self, ids: Sequence[int]) -> bool:
        """Whether the last token completed a box with something in it."""
        return ids[-1] in self._closing and has_answer_box(self.text(ids))


def has_answer_box(text: str) -> bool:
    r"""Whether the last `\boxed{` of a text is closed and not empty (a model may quote the instruction's own).

    >>> has_answer_box(r"so \boxed{\text{B}}"), has_answer_box(r"in \boxed{}"), has_answer_box(r"\boxed{B")
    (True, False, False)
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return False
    depth, first = 0, start + len("\\boxed")
    for place in range(first, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return bool(text[first + 1 : place].strip())
    return False


@torch.inference_mode()
def rollout(
    lm: LanguageModel,
    answering: Answering,
    prompts: Sequence[Sequence[int]],
    n_options: Sequence[int],
    *,
    group_size: int,
    max_tokens: int,
    temperature: float = 1.0,
    uniform: Tensor | None = None,
    suppress: Sequence[int] = (),
) -> list[Completion]:
    """`group_size` completions of every prompt, all decoded in one batch, each with an answer.

    Args:
        lm: the model, with the adapter it has now.
        answering: its answer tokens.
        prompts: token ids, one list a question.
        n_options: options of each question.
        group_size: completions a prompt.
        max_tokens: most tokens a completion may have before it is forced to answer; 0: forced at once.
        temperature: logits are divided by it.
        uniform: float64 in [0, 1), shape (P·G, max_tokens + 1), the only source of chance: one number a token, the last
            for a forced letter, so what a completion becomes does not depend on what it is decoded beside; None: greedy
            (the most likely token and letter).
        suppress: tokens that are never generated (benchmarks suppress the end token).

    Returns:
        Completions in prompt order, those of a prompt next to each other: prompt p has [p·G, (p + 1)·G).
    """
    if not prompts:
        return []
    with merged(lm.model, len(prompts) * group_size) if max_tokens >= _MERGE_FROM else nullcontext():
        return _rollout(lm, answering, prompts, n_options, group_size, max_tokens, temperature, uniform, suppress)


def _rollout(
    lm: LanguageModel,
    answering: Answering,
    prompts: Sequence[Sequence[int]],
    n_options: Sequence[int],
    group_size: int,
    max_tokens: int,
    temperature: float,
    uniform: Tensor | None,
    suppress: Sequence[int],
) -> list[Completion]:
    prefix = SharedPrefix(lm, prompts, group_size)
    completions = [Completion() for _ in range(len(prompts) * group_size)]
    open_rows = list(range(len(completions)))
    head: Product = prefix.base.get_output_embeddings()
    if max_tokens >= _MERGE_FROM:
        head = prepared(prefix.base.get_output_embeddings().weight, rows=len(completions))
    hidden = prefix.last_hidden.repeat_interleave(group_size, 0)
    for step in range(max_tokens):
        logits = head(hidden).float().div_(temperature)
        if suppress:
            logits[:, list(suppress)] = float("-inf")
        tokens, log_probs = _choose(torch.log_softmax(logits, 1), None if uniform is None else uniform[:, step])
        still: list[int] = []
        for row in open_rows:
            completion = completions[row]
            completion.generated += 1
            if tokens[row] in answering.ends:
                # The end token is not read: forced text takes its place, and the end token is its target.
                completion.add(answering.forced_ids[0], log_probs[row], target=tokens[row])
                continue
            completion.add(tokens[row], log_probs[row])
            if answering.completes_box(completion.ids):
                completion.boxed = True
                continue
            still.append(row)
        open_rows = still
        if not open_rows:
            break
        fed = torch.tensor([completion.ids[-1] for completion in completions], device=lm.device)[:, None]
        # Rows that have ended go along; what they write is hidden from them later.
        hidden = prefix.extend(fed, torch.full((1, 1), step, device=lm.device))[:, 0]
    _force(lm, answering, prefix, completions, n_options, temperature, None if uniform is None else uniform[:, -1])
    for row, completion in enumerate(completions):
        if completion.boxed:
            completion.answer = parse_answer(answering.text(completion.ids), n_options[row // group_size])
    return completions


def draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Samples from distributions by the inverse of their distribution functions, in float64.

    One uniform number decides one sample, so what a row draws depends neither on other rows nor on the size of the
    vocabulary. A token of probability zero is never drawn.

    Args:
        log_probs: shape (n, vocabulary).
        uniform: float64 in [0, 1), shape (n, k).

    Returns:
        int64 (n, k), token indices.
    """
    mass = F.pad(log_probs.exp(), (0, -log_probs.shape[1] % _DRAW_BLOCK)).unflatten(1, (-1, _DRAW_BLOCK))
    # First the block, then the token in it: a running sum over the whole vocabulary would take longer than the rest.
    blocks = mass.sum(2, dtype=torch.float64).cumsum(1)
    block, wanted = _first_above(blocks, uniform.to(blocks.device) * blocks[:, -1:])
    before = F.pad(blocks, (1, 0)).gather(1, block)
    rows = torch.arange(len(mass), device=mass.device)[:, None]
    tokens = mass[rows, block].cumsum(2, dtype=torch.float64)  # (n, k, _DRAW_BLOCK)
    token, _ = _first_above(tokens, (wanted - before)[..., None])
    return block * _DRAW_BLOCK + token[..., 0]


def _first_above(sums: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Places in running sums of the first above each wanted value, and the values, below the last sum if they were not.

    A product or a difference may round up to the whole mass; the last place with any mass is then the one meant.
    """
    last = sums[..., -1:]
    wanted = torch.minimum(wanted, torch.nextafter(last, torch.zeros_like(last)))
    return torch.searchsorted(sums, wanted, right=True), wanted


def _choose(log_probs: Tensor, uniform: Tensor | None) -> tuple[list[int], list[float]]:
    """One token a row, sampled or (without random numbers) the most likely, and its log-probability."""
    chosen = log_probs.argmax(1, keepdim=True) if uniform is None else draw(log_probs, uniform[:, None])
    return chosen[:, 0].tolist(), log_probs.gather(1, chosen)[:, 0].tolist()


def _force(
    lm: LanguageModel,
    answering: Answering,
    prefix: SharedPrefix,
    completions: list[Completion],
    n_options: Sequence[int],
    temperature: float,
    uniform: Tensor | None,
) -> None:
    """Appends the forced text and a letter to every completion without a box."""
    if all(completion.boxed for completion in completions):
        return
    forced, device = answering.forced_ids, lm.device
    own = [len(c.ids) - (not c.boxed and c.targets[-1:] != c.ids[-1:]) for c in completions]
    lengths = torch.tensor(own, device=device)[:, None]
    unseen = torch.arange(prefix.filled, device=device) >= lengths
    fed = torch.tensor([forced], device=device).expand(len(completions), -1)
    hidden = prefix.extend(fed, lengths + torch.arange(len(forced), device=device), unseen)[:, -1]
    options = torch.tensor(n_options, device=device).repeat_interleave(prefix.group_size)
    log_probs = option_log_softmax(prefix.base, hidden, answering.letters[: max(n_options)], options, temperature)
    chosen, chosen_log_probs = _choose(log_probs, uniform)
    letters = answering.letters.tolist()
    for row, completion in enumerate(completions):
        if completion.boxed:
            continue
        for token in forced[len(completion.ids) - own[row] :]:
            completion.add(token, 0.0, in_loss=False)
        completion.add(letters[chosen[row]], chosen_log_probs[row])
        completion.answer, completion.forced = chosen[row], True


def completion_log_probs(
    lm: LanguageModel,
    answering: Answering,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    n_options: Sequence[int],
    temperature: float,
) -> Tensor:
    """Log-probabilities of completions under the model as it is now, with gradients where they are enabled.

    Args:
        lm: the model.
        answering: its answer tokens.
        prompts: token ids of P prompts.
        completions: R = P·G, in prompt order as `rollout` returns them.
        n_options: options of each question, P.
        temperature: as in the rollout.

    Returns:
        float32 (R, longest completion): of `targets` where `in_loss`, 0 elsewhere.

    Raises:
        ModelError: the model cannot share a prefix.
    """
    group_size = len(completions) // len(prompts)
    prefix = SharedPrefix(lm, prompts, group_size)
    width = max(len(completion.ids) for completion in completions)
    ids = torch.full((len(completions), width), lm.tokenizer.pad_token_id, dtype=torch.long)
    targets, scored = ids.clone(), torch.zeros(ids.shape, dtype=torch.bool)
    for row, completion in enumerate(completions):
        ids[row, : len(completion.ids)] = torch.tensor(completion.ids)
        targets[row, : len(completion.ids)] = torch.tensor(completion.targets)
        scored[row, : len(completion.ids)] = torch.tensor(completion.in_loss)
    forced = [row for row, completion in enumerate(completions) if completion.forced]
    last = [len(completions[row].ids) - 1 for row in forced]
    scored[forced, last] = False  # under the softmax over all tokens; the letter's own follows below
    hidden = prefix.last_hidden.repeat_interleave(group_size, 0)[:, None]
    if width > 1:
        hidden = torch.cat([hidden, prefix.score(ids[:, :-1].to(lm.device))], 1)
    ids, targets, scored = ids.to(lm.device), targets.to(lm.device), scored.to(lm.device)
    result = hidden.new_zeros(ids.shape, dtype=torch.float32)
    result = result.masked_scatter(scored, token_log_probs(prefix.base, hidden[scored], targets[scored], temperature))
    if forced:
        options = torch.tensor([n_options[row // group_size] for row in forced], device=lm.device)
        letters = answering.letters[: max(n_options)]
        restricted = option_log_softmax(prefix.base, hidden[forced, last], letters, options, temperature)
        chosen = (letters == ids[forced, last][:, None]).int().argmax(1, keepdim=True)
        result = result.index_put((torch.tensor(forced), torch.tensor(last)), restricted.gather(1, chosen)[:, 0])
    return result
