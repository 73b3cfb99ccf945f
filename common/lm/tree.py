"""Prompts that begin alike, through the model once: a batch as a tree of its tokens. Both roles.

Used where questions are scored (common/lm/scoring.py). Enters: token ids, which may hold patients' records. Leaves:
last hidden states; nothing is stored.

Questions of one registry share the system message, then often "Age 60 to 69; Sex female; …": sorted, a fifth of their
tokens stands in the question before, and what a causal model computes of a token depends on it and the tokens before it
alone. So every branch of the tree is computed once, and there is no padding: norms and products, nearly all of the
arithmetic, run over the tree's tokens in one row. Only attention sees sequences again: queries, keys and values are
gathered for each prompt, and of its output every token of the tree takes one copy. The model's own layers run
unchanged, as in common/lm/prefix.py, whose exchange of the attention function this uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .models import LanguageModel
from .prefix import causal_model, shared_attention


class PromptTree:
    """The distinct tokens ("nodes") of a batch of prompts, each at the place where it stands in them.

    Attributes:
        ids: int64 (nodes,), token ids.
        positions: int64 (nodes,), how many tokens come before each.
        paths: of each prompt the nodes of its tokens, int64 (its length,).
    """

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prompts in any order, none empty; those that begin alike are found where they stand side by side."""
        ids: list[int] = []
        positions: list[int] = []
        paths: list[list[int]] = []
        self._starts: list[int] = []  # tokens of each prompt that it has from the one before
        for row, prompt in enumerate(prompts):
            before = prompts[row - 1] if row else ()
            most = min(len(prompt), len(before))
            alike = next((at for at in range(most) if prompt[at] != before[at]), most)
            paths.append([*(paths[-1][:alike] if row else ()), *range(len(ids), len(ids) + len(prompt) - alike)])
            ids.extend(prompt[alike:])
            positions.extend(range(alike, len(prompt)))
            self._starts.append(alike)
        self.ids, self.positions = torch.tensor(ids), torch.tensor(positions)
        self.paths = [torch.tensor(path) for path in paths]

    def last_states(self, lm: LanguageModel) -> Tensor:
        """The model's last hidden state of each prompt, shape (prompts, width): it predicts the next token.

        Raises:
            ModelError: the model cannot share a beginning (attention windows, no causal decoder).
        """
        base, device = causal_model(lm), lm.device
        self.paths = [path.to(device) for path in self.paths]
        ids, positions = self.ids.to(device)[None], self.positions.to(device)[None]
        with shared_attention(base):
            states = base.base_model(
                input_ids=ids, position_ids=positions, use_cache=False, shared_prefix=self
            ).last_hidden_state[0]
        return states[torch.stack([path[-1] for path in self.paths])]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attention of one layer; (1, heads, nodes, head width) in, the same out."""
        out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])
        rows = [part[0].transpose(0, 1) for part in (query, key, value)]
        done = 0
        for path, start in zip(self.paths, self._starts, strict=True):
            q, k, v = (part.index_select(0, path).transpose(0, 1)[None] for part in rows)
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            own = len(path) - start
            out[done : done + own] = found[0, :, start:].transpose(0, 1)
            done += own
        return out.transpose(0, 1)[None]
