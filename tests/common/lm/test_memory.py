"""How many tokens go through a model at a time, and what is said when they do not fit."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from wardround.client import grpo
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.errors import ModelError
from wardround.common.lm.memory import out_of_memory, tokens_per_backward, tokens_that_fit
from wardround.common.lm.models import load
from wardround.common.question import load_prompt

from tests.client.test_grpo import Source, configured

SMOLLM2 = LlamaConfig(num_hidden_layers=30, hidden_size=576, intermediate_size=1536)
PHI4 = Phi3Config(num_hidden_layers=40, hidden_size=5120, intermediate_size=17920)


def test_more_memory_and_smaller_values_fit_more_tokens() -> None:
    gib = 2**30
    assert tokens_that_fit(4 * gib, SMOLLM2, 4) == pytest.approx(2330, rel=0.01)
    assert tokens_that_fit(4 * gib, SMOLLM2, 2) == pytest.approx(2 * 2330, rel=0.01)
    assert 3000 < tokens_that_fit(49 * gib, PHI4, 2) < 6000
    assert tokens_that_fit(1000 * gib, SMOLLM2, 2) == 65_536
    assert tokens_that_fit(0, PHI4, 2) == 256


def test_a_cpu_takes_more_at_a_time_in_bfloat16(tiny_model_path: Path) -> None:
    found = [
        tokens_per_backward(
            load(ModelConfig(id=str(tiny_model_path), device="cpu", dtype=dtype), LoraConfig(rank=2), seed=0)
        )
        for dtype in ("float32", "bfloat16")
    ]
    assert found == [1024, 2560]


def test_running_out_of_memory_says_what_would_fit(tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=4), seed=0)

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(grpo, "SharedPrefix", full)
    with pytest.raises(ModelError, match=r"out of memory at 900 tokens.*speed\.tokens_per_backward = 450 or less"):
        settings = configured(0, expectation="exact", speed={"tokens_per_backward": 900})
        grpo.train_local_round(lm, Source(), load_prompt("en_short"), settings, seed=0)


def test_a_group_that_is_too_large_by_itself_is_named() -> None:
    assert "one patient's group alone has 14,200 tokens" in str(out_of_memory(4000, 14_200))
    assert "speed.tokens_per_backward = 8000" in str(out_of_memory(16_000, 700))
