"""The fused LoRA layer against peft's own forward and autograd's own gradients."""

from pathlib import Path

import pytest
import torch
from torch import nn
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.lm import lora as lora_module
from wardround.common.lm import models
from wardround.common.lm.lora import fuse, merged, prepare_training

from tests.tiny import tiny_phi

IDS = torch.tensor([[5, 17, 33, 8, 90, 41], [7, 7, 120, 64, 3, 2]])


def adapted(path: Path, strategy: str = "ffa", dtype: str = "float32") -> models.LanguageModel:
    lm = models.load(
        ModelConfig(id=str(path), device="cpu", dtype=dtype), LoraConfig(strategy=strategy, rank=4), seed=0
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in lm.parameters.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return lm


def unfuse(lm: models.LanguageModel) -> int:
    """Gives every layer peft's own forward back."""
    return sum(vars(layer).pop("forward", None) is not None for layer in lm.model.modules())


def outputs_and_gradients(lm: models.LanguageModel, autocast: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = lm.model(input_ids=IDS).logits
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    trained = [parameter for parameter in lm.parameters.values() if parameter.requires_grad]
    return logits.detach(), list(torch.autograd.grad((logits.float() * weight).sum(), trained))


@pytest.mark.parametrize("strategy", ["ffa", "fedit"])
def test_outputs_and_gradients_equal_pefts(tiny_model_path: Path, strategy: str) -> None:
    lm = adapted(tiny_model_path, strategy)
    ours, our_gradients = outputs_and_gradients(lm)
    assert unfuse(lm) == 14  # seven linear layers in each of two blocks
    theirs, their_gradients = outputs_and_gradients(lm)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert len(our_gradients) == len(their_gradients) > 0
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


def test_phi_layers_are_fused_too(tmp_path: Path) -> None:
    lm = adapted(tiny_phi(tmp_path / "phi"))
    ours, our_gradients = outputs_and_gradients(lm)
    assert unfuse(lm) == 8  # fused qkv and gate_up: four linear layers a block
    theirs, their_gradients = outputs_and_gradients(lm)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for mine, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize(("dtype", "autocast"), [("bfloat16", False), ("float32", True)])
def test_in_bfloat16_gradients_point_where_float32_ones_do(tiny_model_path: Path, dtype: str, autocast: bool) -> None:
    exact = outputs_and_gradients(adapted(tiny_model_path))[1]
    lm = adapted(tiny_model_path, dtype=dtype)
    rough = outputs_and_gradients(lm, autocast)[1]
    assert all(gradient.dtype == torch.float32 for gradient in rough)
    a, b = torch.cat([g.flatten() for g in exact]), torch.cat([g.flatten() for g in rough])
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > 0.995
    assert 0.9 < float(b.norm() / a.norm()) < 1.1


def test_switching_the_adapter_off_gives_the_base_model(tiny_model_path: Path) -> None:
    lm = adapted(tiny_model_path)
    plain = models.load(ModelConfig(id=str(tiny_model_path), device="cpu"), None, seed=0)
    with torch.no_grad(), lm.base_only():
        assert torch.equal(lm.model(input_ids=IDS).logits, plain.model(input_ids=IDS).logits)


def test_only_x_times_a_is_kept_for_the_backward_pass_where_a_is_frozen(tiny_model_path: Path) -> None:
    lm = adapted(tiny_model_path)
    layer = next(module for module in lm.model.modules() if hasattr(module, "lora_A"))
    x = torch.randn(64, layer.in_features, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x)
    weights = layer.base_layer.weight.numel(), layer.lora_A["default"].weight.numel()
    assert sum(kept) == weights[0] + weights[1] + layer.lora_B["default"].weight.numel() + 64 * 4


def test_layers_of_another_kind_keep_pefts_forward() -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    def net(**settings) -> nn.Module:
        return get_peft_model(Net(), PeftConfig(r=2, target_modules=["first"], **settings))

    assert fuse(net()) == 1
    assert fuse(net(use_dora=True)) == 0
    assert fuse(net(lora_dropout=0.1)) == 0


def test_merged_layers_give_the_same_outputs_for_as_long_as_the_context_lasts(tiny_model_path: Path) -> None:
    lm = adapted(tiny_model_path)
    with torch.no_grad():
        before = lm.model(input_ids=IDS).logits
        with merged(lm.model):
            inside = lm.model(input_ids=IDS).logits
            with lm.base_only():
                base = lm.model(input_ids=IDS).logits
        after = lm.model(input_ids=IDS).logits
    torch.testing.assert_close(inside, before, rtol=0, atol=1e-5)
    assert not torch.equal(inside, before)  # another order of sums: the merged weights were used
    assert torch.equal(after, before)
    assert float((base - before).abs().max()) > 1e-2


def test_nothing_is_merged_in_bfloat16(tiny_model_path: Path) -> None:
    lm = adapted(tiny_model_path, dtype="bfloat16")
    with torch.no_grad():
        before = lm.model(input_ids=IDS).logits
        with merged(lm.model):
            assert torch.equal(lm.model(input_ids=IDS).logits, before)


def test_training_with_prepared_weights_gives_the_same_loss_and_gradients(tiny_model_path: Path) -> None:
    results = []
    for prepare in (False, True):
        lm = adapted(tiny_model_path)
        if prepare:
            prepare_training(lm.model)
        loss = lm.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in lm.model.parameters() if p.grad is not None)])
    plain, quicker = results
    assert len(plain) == len(quicker) > 1
    for a, b in zip(plain, quicker, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_only_float32_weights_on_a_cpu_and_small_models_are_prepared(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = adapted(tiny_model_path, dtype="bfloat16")
    prepare_training(half.model)
    whole = adapted(tiny_model_path)
    with monkeypatch.context() as patch:
        patch.setattr(lora_module, "_PREPARED_BYTES", 1)
        prepare_training(whole.model)
    assert not any(layer in lora_module._PREPARED for lm in (half, whole) for layer in lm.model.modules())
