"""How many tokens go through a model at a time in training: from the free memory of a GPU, fixed on a CPU. Both roles.

An estimate, and what is said when it was wrong: a GPU without memory must not end a run with a traceback.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

from ..errors import ModelError
from .models import LanguageModel

# In bfloat16 a CPU rearranges the weights at every pass, which is worth it for many tokens only (about twice as many
# questions a second with 2,560 tokens as with 1,024, on a shared machine); in float32 larger parts are no faster.
_CPU_TOKENS = {torch.bfloat16: 2560, torch.float32: 1024}
_FREE_SHARE = 0.6  # of the free memory; the rest is for gradients, attention scores and fragments
_MOST_TOKENS = 65_536


def tokens_per_backward(lm: LanguageModel) -> int:
    """How many tokens a forward and backward pass may hold where the run's `speed` does not say."""
    if lm.device.type == "cpu":
        return _CPU_TOKENS[lm.dtype]
    free, _ = torch.cuda.mem_get_info(lm.device)
    return tokens_that_fit(free, lm.model.config, lm.dtype.itemsize)


def tokens_that_fit(free_bytes: int, config: Any, value_bytes: int) -> int:
    """Tokens whose activations fit into a share of the free memory, at least 256.

    A layer with frozen weights keeps about eight vectors of the hidden width and three of the MLP's width a token:
    norms, attention's inputs and output, residuals; gate, up and their product. SmolLM2 in float32: 1.1 MB a token.

    Args:
        free_bytes: of the device.
        config: the model's, of transformers.
        value_bytes: 4 for float32, 2 for bfloat16.
    """
    per_token = config.num_hidden_layers * value_bytes * (8 * config.hidden_size + 3 * config.intermediate_size)
    return int(min(_MOST_TOKENS, max(256, _FREE_SHARE * free_bytes / per_token)))


def give_back_free_memory() -> None:
    """Returns the C allocator's free pages to the system (glibc; elsewhere nothing happens).

    Parts of every size leave holes in its heap that no other size fits, and a process that trains round after round
    grows by them.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def out_of_memory(tokens: int, dearest: int) -> ModelError:
    """What to say when a GPU ran out of memory: one line with what to set.

    Args:
        tokens: of one pass, as it was tried.
        dearest: tokens of the largest single patient's pass; no setting of `speed` goes below it.
    """
    tried = max(tokens, dearest)
    half = tried // 2
    if half >= dearest:
        advice = f"set speed.tokens_per_backward = {half} or less"
    else:
        advice = (
            f"one patient's group alone has {dearest:,} tokens: lower grpo.group_size, questions.reasoning_tokens or "
            f"questions.features_per_record until it has {half:,} or fewer"
        )
    return ModelError(f"the GPU ran out of memory at {tried:,} tokens a pass; {advice}")
