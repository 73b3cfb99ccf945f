"""One prompt, many continuations: attention in which all completions of a group share the prompt's keys and values.

Used by rollouts (common/lm/generation.py) and by training (client/grpo.py), at sites and wherever text is generated.
Enters: token ids. Leaves: hidden states and log-probabilities; nothing is stored.

A group of G completions has one prompt. The usual way copies the prompt G times, in memory and in arithmetic; here it
goes through the model once and the completions attend to its keys and values where they lie, without a copy, and with
gradients through them. The model's own layers run unchanged: only the attention function is exchanged, by
transformers' attention interface, for the time of a forward pass.

Rows: prompts are numbered p < P, completions r < R = P·G with r // G the prompt. Prompts are padded on the right (a
causal model's real tokens never see what comes after them) and the padding is hidden from the completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from ..errors import ModelError
from .models import LanguageModel

_NAME = "wardround_shared_prefix"
# Attention scores up to this size (of all layers with gradients, of one without) are held; above it, SDPA.
_EAGER_BYTES = 2**32
# Prompts up to this length are attended to by plain products when training on a CPU: the backward pass of torch's fused
# attention there is slower at these lengths (16 x 150 tokens, SmolLM2: 16 against 9 ms in float32, 36 against 7 in
# bfloat16), and from about 500 tokens on the other way round.
_EAGER_TOKENS = 384
_HEAD_ROWS = 512  # positions of which the logits over the whole vocabulary exist at a time


class SharedPrefix:
    """Keys and values of P prompts, and of the G completions of each as they grow.

    Attributes:
        lengths: tokens of every prompt, shape (P,), on the model's device.
        filled: columns of completion tokens kept so far (`extend`).
        last_hidden: the model's last hidden state of every prompt, shape (P, width): it predicts the first token.
    """

    def __init__(self, lm: LanguageModel, prompts: Sequence[Sequence[int]], group_size: int) -> None:
        """Runs the prompts through the model once; with gradients where gradients are enabled.

        Raises:
            ModelError: the model cannot share a prefix (attention windows, gradient checkpointing, no causal decoder).
        """
        self.base = causal_model(lm)
        self.group_size, self.n_prompts = group_size, len(prompts)
        self.lengths = torch.tensor([len(ids) for ids in prompts], device=lm.device)
        longest = max(len(ids) for ids in prompts)
        padded = torch.full((len(prompts), longest), lm.tokenizer.pad_token_id, dtype=torch.long)
        for row, ids in enumerate(prompts):
            padded[row, : len(ids)] = torch.tensor(ids)
        # Added to attention scores: 0 for a real token, -inf for padding; None where no prompt is padded.
        hidden_from = torch.arange(longest, device=lm.device) >= self.lengths[:, None]
        self.padding = _additive(hidden_from) if bool(hidden_from.any()) else None
        self._prefix: dict[int, tuple[Tensor, Tensor]] = {}
        self._suffix: dict[int, tuple[Tensor, Tensor]] = {}
        self.filled = 0
        self._mask: Tensor | None = None  # additive, over suffix columns
        self._prefill, self._keep = True, False
        states = self._forward(padded.to(lm.device), torch.arange(longest, device=lm.device)[None])
        self.last_hidden = states[torch.arange(len(prompts), device=lm.device), self.lengths - 1]
        self._prefill = False

    def positions(self, offsets: Tensor) -> Tensor:
        """Position ids of completion tokens, from their offsets after the prompt, shape (R, T)."""
        return self.lengths.repeat_interleave(self.group_size)[:, None] + offsets

    def score(self, ids: Tensor) -> Tensor:
        """Hidden states of whole completions, nothing kept.

        Args:
            ids: int64 (R, T), padded on the right with any token; R a multiple of P, and of another group size the next
                time if need be.

        Returns:
            Hidden states, shape (R, T, width): those at column t predict token t + 1.
        """
        self.group_size = len(ids) // self.n_prompts
        offsets = torch.arange(ids.shape[1], device=ids.device)
        self._mask = _causal(ids.shape[1], 0, ids.device) if ids.shape[1] > 1 else None
        return self._forward(ids, self.positions(offsets[None]))

    def extend(self, ids: Tensor, offsets: Tensor, unseen: Tensor | None = None) -> Tensor:
        """Hidden states of the next tokens, whose keys and values are kept for those that follow.

        Args:
            ids: int64 (R, T), the next tokens.
            offsets: int64 (R, T) or (1, T), how far after the prompt each is.
            unseen: bool (R, columns kept so far): columns that do not exist for a row; None: all exist.

        Returns:
            Hidden states, shape (R, T, width).
        """
        width, new = self.filled, ids.shape[1]
        self._mask = _causal(new, width, ids.device) if new > 1 else None
        if unseen is not None:
            own = torch.zeros(len(unseen), new, dtype=torch.bool, device=ids.device)
            hidden = _additive(torch.cat([unseen, own], 1))[:, None, None]
            self._mask = hidden if self._mask is None else hidden + self._mask
        self._keep = True
        try:
            states = self._forward(ids, self.positions(offsets))
        finally:
            self._keep = False
        self.filled = width + new
        return states

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        with shared_attention(self.base):
            return self.base.base_model(
                input_ids=ids, position_ids=positions, use_cache=False, shared_prefix=self
            ).last_hidden_state

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one layer; (rows, heads, T, head width) in, the same out."""
        if self._prefill:
            self._prefix[layer] = key, value
            if torch.is_grad_enabled() and query.device.type == "cpu" and query.shape[2] <= _EAGER_TOKENS:
                return _causal_attention(query, key, value, scaling)
            if query.device.type == "cuda" and query.dtype != torch.float32:  # flash attention shares key heads itself
                return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        if self._keep:
            key, value = self._kept(layer, key, value)
        prefix_key, prefix_value = self._prefix[layer]
        scores_bytes = 4 * query.shape[0] * query.shape[1] * query.shape[2] * (prefix_key.shape[2] + key.shape[2])
        held = self.base.config.num_hidden_layers if torch.is_grad_enabled() else 1
        if scores_bytes * held > _EAGER_BYTES:
            return self._attend_expanded(query, key, value, prefix_key, prefix_value, scaling)
        return self._attend_grouped(query, key, value, prefix_key, prefix_value, scaling)

    def _attend_grouped(self, q: Tensor, key: Tensor, value: Tensor, pk: Tensor, pv: Tensor, scaling: float) -> Tensor:
        """Scores against the prompt by prompt, against the own tokens by completion, one softmax over both."""
        R, H, T, D = q.shape
        P, K, S, G = self.n_prompts, key.shape[1], pk.shape[2], self.group_size
        U, per = key.shape[2], H // K  # `per` query heads share a key head
        q = (q * scaling).contiguous()
        by_prompt = q.view(P, G, K, per * T, D).transpose(1, 2)  # (P, K, G, per·T, D)
        far = torch.matmul(by_prompt.reshape(P, K, G * per * T, D), pk.transpose(2, 3)).view(P, K, G, per * T, S)
        near = torch.matmul(q.view(R, K, per * T, D), key.transpose(2, 3))  # (R, K, per·T, U)
        if self.padding is not None:
            far = far + self.padding.view(P, 1, 1, 1, S).to(far.dtype)
        if self._mask is not None:
            near = (near.view(R, K * per, T, U) + self._mask.to(near.dtype)).view(R, K, per * T, U)
        near = near.view(P, G, K, per * T, U).transpose(1, 2)
        weights = torch.softmax(torch.cat([far, near], -1), -1)  # torch adds up in float32 in any dtype
        far, near = weights.split([S, U], -1)
        from_prompt = torch.matmul(far.reshape(P, K, G * per * T, S), pv).view(P, K, G, per * T, D).transpose(1, 2)
        from_own = torch.matmul(near.transpose(1, 2).reshape(R, K, per * T, U), value)
        return from_prompt.reshape(R, H, T, D) + from_own.view(R, H, T, D)

    def _attend_expanded(self, q: Tensor, key: Tensor, value: Tensor, pk: Tensor, pv: Tensor, scaling: float) -> Tensor:
        """The same with the prompt's keys copied to every completion, for sequences whose scores would not fit."""
        G, per, T, U, S = self.group_size, q.shape[1] // key.shape[1], q.shape[2], key.shape[2], pk.shape[2]
        near = self._mask if self._mask is not None else torch.zeros(T, U, device=q.device)
        if self.padding is None and near.dim() == 2:
            mask = torch.cat([near.new_zeros(T, S), near], 1)
        else:
            far = near.new_zeros(self.n_prompts, S) if self.padding is None else self.padding
            far = far.repeat_interleave(G, 0)[:, None, None].expand(-1, 1, T, S)
            mask = torch.cat([far, near.expand(len(far), 1, T, U)], -1)
        key = torch.cat([pk.repeat_interleave(G, 0), key], 2).repeat_interleave(per, 1)
        value = torch.cat([pv.repeat_interleave(G, 0), value], 2).repeat_interleave(per, 1)
        return F.scaled_dot_product_attention(q, key, value, attn_mask=mask.to(q.dtype), scale=scaling)

    def _kept(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the new columns in place into buffers that double when full; returns all columns so far."""
        end = self.filled + key.shape[2]
        held = self._suffix.get(layer)
        if held is None or end > held[0].shape[2]:
            room = max(64, 2 * self.filled, end)
            grown = key.new_empty(2, *key.shape[:2], room, key.shape[3])
            if held is not None:
                grown[0, :, :, : self.filled] = held[0][:, :, : self.filled]
                grown[1, :, :, : self.filled] = held[1][:, :, : self.filled]
            held = self._suffix[layer] = grown[0], grown[1]
        held[0][:, :, self.filled : end] = key
        held[1][:, :, self.filled : end] = value
        return held[0][:, :, :end], held[1][:, :, :end]


def _causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Causal attention by plain products, key heads shared by their query heads without a copy; shapes as `attend`."""
    R, H, T, D = query.shape
    K = key.shape[1]
    scores = torch.matmul((query * scaling).reshape(R, K, H // K * T, D), key.transpose(2, 3)).view(R, H, T, T)
    # In the scores' own dtype: torch adds up in float32 either way, and a float32 copy is what memory goes to.
    weights = torch.softmax(scores + _causal(T, 0, query.device).to(scores.dtype), -1)
    return torch.matmul(weights.view(R, K, H // K * T, T), value).view(R, H, T, D)


def _attention_function(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    prefix: Any = kwargs.get("shared_prefix")
    if prefix is None:
        raise ModelError("this model's layers do not hand their keyword arguments to the attention function")
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return prefix.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attention_function)


@contextmanager
def shared_attention(base: Any) -> Iterator[None]:
    """Within it the model's attention is the `attend` of what its forward pass is given as `shared_prefix`."""
    before = base.config._attn_implementation
    base.config._attn_implementation = _NAME
    try:
        yield
    finally:
        base.config._attn_implementation = before


def causal_model(lm: LanguageModel) -> Any:
    """The causal language model under the adapter, checked: it can share a prompt among completions.

    Raises:
        ModelError: it cannot share a prefix.
    """
    model = lm.model
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    kinds = set(getattr(base.config, "layer_types", None) or ["full_attention"])
    window = getattr(base.config, "sliding_window", None) if len(kinds) == 1 else None
    if kinds != {"full_attention"} or (window and getattr(base.config, "use_sliding_window", True)):
        raise ModelError(
            f"model '{lm.config.id}': attention windows ({', '.join(sorted(kinds))}) cannot share a prompt"
        )
    if getattr(base, "is_activation_checkpointing", False):
        raise ModelError("gradient checkpointing drops the shared prompt's keys and values: switch it off")
    if not vars(base).get("_wardround_head_checked"):
        _check_head(base, lm.config.id)
        base._wardround_head_checked = True
    return base


@torch.no_grad()
def _check_head(base: Any, name: str) -> None:
    """Log-probabilities here are last hidden states times the output embedding and nothing else: is that the model's?

    Raises:
        ModelError: its logits are something else: an adapted or biased head, soft-capping, a scale.
    """
    ids = torch.arange(1, 9, device=next(base.parameters()).device)[None]
    own = base(input_ids=ids, use_cache=False).logits[0].float()
    hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    head = base.get_output_embeddings()
    ours = F.linear(hidden, getattr(head, "weight", hidden)).float() if type(head) is torch.nn.Linear else own + 1
    if not torch.allclose(own, ours, rtol=2e-2, atol=2e-2 * float(own.abs().max())):
        raise ModelError(
            f"model '{name}': its output head is more than a matrix (adapter on it, bias, soft-capping, scale); "
            "leave the head out of lora.targets, or use another model"
        )


def _additive(hidden: Tensor) -> Tensor:
    """0 where visible, -inf where hidden; float32 of the same shape."""
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _causal(new: int, before: int, device: torch.device) -> Tensor:
    """Additive mask (new, before + new): a token sees all columns before it and itself."""
    return torch.full((new, before + new), float("-inf"), device=device).triu_(before + 1)


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(hidden · Wᵀ / temperature)[target], without the logits ever being kept.

    Row i's log-probability depends on row i's hidden state alone, so its gradient is one vector per row, known in
    the forward pass: (W[target] − Σ_v p_v W_v) / temperature. Backward is a multiplication.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
        result = torch.empty(len(hidden), device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), _HEAD_ROWS):
            rows = slice(start, start + _HEAD_ROWS)
            logits = F.linear(hidden[rows], weight).float().div_(temperature)
            total = torch.logsumexp(logits, 1, keepdim=True)
            result[rows] = (logits.gather(1, targets[rows, None]) - total).squeeze(1)
            if slope is not None:
                mean = logits.sub_(total).exp_().to(weight.dtype) @ weight
                slope[rows] = (weight[targets[rows]] - mean) / temperature
        if slope is not None:
            ctx.save_for_backward(slope)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return grads[0][:, None].to(slope.dtype) * slope, None, None, None


def token_log_probs(base: Any, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Log-probability of each target under the whole vocabulary.

    Args:
        base: the causal language model (its output embedding is used).
        hidden: last hidden states that predict the targets, shape (n, width).
        targets: int64 (n,).
        temperature: logits are divided by it.

    Returns:
        float32 (n,).
    """
    weight = base.get_output_embeddings().weight
    if weight.requires_grad:  # strategy "full": the embedding needs its gradient too
        logits = F.linear(hidden, weight).float() / temperature
        return torch.log_softmax(logits, 1).gather(1, targets[:, None]).squeeze(1)
    return _TokenLogProbs.apply(hidden, weight, targets, temperature)  # type: ignore[return-value]


def option_log_softmax(base: Any, hidden: Tensor, letters: Tensor, n_options: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the option letters, renormalised over each row's own options.

    Args:
        hidden: last hidden states after an open box, shape (n, width).
        letters: int64 (most,), token ids of the letters.
        n_options: int64 (n,), how many of them each row offers.
        temperature: logits are divided by it.

    Returns:
        float32 (n, most); -inf past a row's own options.
    """
    weight = base.get_output_embeddings().weight[letters]
    # A handful of rows: in float32 they cost nothing, while logits of 20 in bfloat16 are 0.125 apart.
    with torch.autocast(hidden.device.type, enabled=False):
        logits = F.linear(hidden.float(), weight.float()) / temperature
    outside = torch.arange(len(letters), device=hidden.device) >= n_options[:, None]
    return torch.log_softmax(logits.masked_fill(outside, float("-inf")), 1)
