"""Training on a GPU: what the CPU computes, in parts that fit its memory, and one whole federated round."""

from pathlib import Path

import numpy as np
import pytest
import torch
from wardround.client.grpo import Engine, train_local_round
from wardround.client.private_optimizer import PrivateSteps
from wardround.client.randomness import SecureRandom
from wardround.common.config import LoraConfig, ModelConfig, RunConfig
from wardround.common.errors import ModelError
from wardround.common.lm import memory
from wardround.common.lm.models import LanguageModel, load
from wardround.common.lm.scoring import option_log_probs
from wardround.simulations.federation import simulate

from .test_grpo import PATIENTS, TEMPLATE, TOKENS, GivenCompletions, Source, configured, move, unforced

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none here"),
]
QUESTIONS = [Source().question(index) for index in range(PATIENTS)]


def model(path: Path, device: str, dtype: str = "float32") -> LanguageModel:
    found = load(ModelConfig(id=str(path), device=device, dtype=dtype), LoraConfig(rank=4), seed=0)
    move(found, 0.05, seed=3)
    return found


def gradients(lm: LanguageModel, config: RunConfig) -> np.ndarray:
    """Of one step over all patients, with given completions where the config reasons."""
    engine = GivenCompletions(lm, Source(), TEMPLATE, config, seed=0)
    if config.questions.reasoning_tokens:
        engine.given = unforced(len(lm.tokenizer))
    else:
        engine._complete = Engine._complete.__get__(engine)
    lm.model.train()
    for parameter in engine.trained:
        parameter.grad = torch.zeros_like(parameter)
    for loss in engine.losses(QUESTIONS):
        loss.backward()
    return np.concatenate([p.grad.detach().cpu().numpy().ravel() for p in lm.trainable().values()])


@pytest.mark.parametrize(("reasoning", "expectation"), [(TOKENS, "sampled"), (0, "sampled"), (0, "exact")])
def test_gradients_on_a_gpu_are_those_of_the_cpu(tiny_model_path: Path, reasoning: int, expectation: str) -> None:
    config = configured(reasoning, expectation=expectation)
    here, there = (gradients(model(tiny_model_path, device), config) for device in ("cpu", "cuda"))
    assert np.abs(here).max() > 0
    assert np.abs(here - there).max() <= 1e-4 * np.abs(here).max()


def test_scores_on_a_gpu_are_those_of_the_cpu(tiny_model_path: Path) -> None:
    here, there = (
        option_log_probs(model(tiny_model_path, device), QUESTIONS * 4, TEMPLATE, 3) for device in ("cpu", "cuda")
    )
    assert np.array_equal(np.isinf(here), np.isinf(there))
    assert np.abs(np.exp(here) - np.exp(there)).max() <= 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("reasoning", "expectation"), [(TOKENS, "sampled"), (0, "exact")])
def test_a_local_round_on_a_gpu_moves_a_float32_adapter(
    tiny_model_path: Path, dtype: str, reasoning: int, expectation: str
) -> None:
    lm = model(tiny_model_path, "cuda", dtype)
    before = lm.vector()
    result = train_local_round(lm, Source(), TEMPLATE, configured(reasoning, expectation=expectation), seed=1)
    assert result.vector.dtype == np.float32
    assert np.isfinite(result.vector).all()
    assert not np.array_equal(result.vector, before)
    assert result.steps == 2


def test_private_gradients_of_single_patients_are_those_of_the_cpu(tiny_model_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        lm = model(tiny_model_path, device)
        private = PrivateSteps(1.0, 0.5, 0.5, expected_patients=4.0, random=SecureRandom(bytes(range(32))))
        config = configured(0, expectation="exact")
        found.append(train_local_round(lm, Source(), TEMPLATE, config, seed=1, private=private).vector)
    # The same draws and the same noise; what differs is rounding. Adam's first steps hang on signs.
    assert np.mean(np.abs(found[0] - found[1]) <= 1e-3 * np.abs(found[0]).max()) > 0.99


def test_a_gpu_without_memory_says_what_would_fit(tiny_model_path: Path) -> None:
    lm = model(tiny_model_path, "cuda")
    config = configured(TOKENS, speed={"tokens_per_backward": 60_000})
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / total)
    try:
        with pytest.raises(ModelError, match=r"the GPU ran out of memory at 60,000 tokens a pass; set speed\.tokens"):
            train_local_round(lm, Many(), TEMPLATE, config, seed=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Many(Source):
    """Draws of 200 patients, whoever is asked for: more than two megabytes hold."""

    def draw(self, patient_indices: np.ndarray, rng: np.random.Generator) -> list:
        return [self.question(index) for index in range(200)]


def test_a_pass_holds_more_tokens_the_more_memory_is_free(tiny_model_path: Path) -> None:
    assert memory.tokens_per_backward(model(tiny_model_path, "cuda")) > 1024


def test_one_whole_federated_round_runs_on_a_gpu(tiny_model_path: Path, tmp_path: Path, cheap_scrypt: None) -> None:
    config = RunConfig.model_validate(
        {
            "name": "gpu",
            "privacy": {"enabled": False},
            "model": {"id": str(tiny_model_path), "device": "cuda", "dtype": "bfloat16", "prompt": "en_short"},
            "warmup": {"enabled": False},
            "grpo": {"local_steps": 2, "patients_per_step": 4, "expectation": "exact", "learning_rate": 0.01},
            "federation": {"rounds": 1, "validation_questions_per_site": 5, "rollback_tolerance": 1.0},
            "evaluation": {"questions_per_site": 10, "bootstrap_samples": 100, "samples": 1, "sample_tokens": 3},
            "simulation": {"registry": "synthetic", "sites": 3},
        }
    )
    result = simulate(config, tmp_path / "run", resume=False)
    assert result["final"]["n"] == 30
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
