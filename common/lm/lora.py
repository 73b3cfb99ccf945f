"""One linear layer with its LoRA adapter as one step: y = x Wᵀ + s (x Aᵀ) Bᵀ, forward and backward.

Used wherever a model with an adapter runs (common/lm/models.py puts it in). Enters and leaves: activations. Private:
nothing by itself.

peft writes a LoRA layer as four operations, two of which (the scaling and the sum) pass over the whole output once
more, and autograd keeps what each of them needs. With 210 adapted layers in SmolLM2 that is a fifth of a training step.
Here the low-rank product is accumulated into the output of the base layer, and the only activation kept for the
backward pass is x Aᵀ (tokens × rank); x itself only where A is trained. peft's modules, names and files stay as they
are: only their forward is exchanged, and only where it is plain LoRA on a plain linear layer.

Precision: products run in the dtype of the activations (bfloat16 under autocast), A and B rounded to it for the
product; the gradients of A and B are float32 as A and B are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .products import Product, packs, prepared


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ for frozen W and b; x of shape (tokens, in)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        products: tuple[Product, Product] | None,
    ) -> Tensor:
        low, high = a.to(x.dtype), b.to(x.dtype)
        inner = x @ low.T
        y = products[0](x) if products else F.linear(x, weight, bias)
        y.addmm_(inner, high.T, alpha=scaling)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, weight, low, high, inner)
        ctx.scaling, ctx.trained, ctx.products = scaling, (a, b), products
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, low, high, inner = ctx.saved_tensors
        dy, s, (a, b) = grads[0], ctx.scaling, ctx.trained
        dx = da = db = None
        dinner = dy @ high
        if ctx.needs_input_grad[0]:
            dx = ctx.products[1](dy) if ctx.products else dy @ weight
            dx.addmm_(dinner, low, alpha=s)
        if ctx.needs_input_grad[3]:
            da = _gradient(a, dinner, x, s)
        if ctx.needs_input_grad[4]:
            db = _gradient(b, dy, inner, s)
        return dx, None, None, da, db, None, None


# Gradients of single patients, by parameter, and how many patients a pass holds; None: gradients add up as usual.
_patients: int | None = None
_of_patients: dict[Tensor, Tensor] = {}


def _gradient(parameter: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor | None:
    """scaling · leftᵀ right for rows of all patients; with `patient_gradients`, by patient and put aside."""
    if _patients is None:
        return (left.T @ right).to(parameter.dtype).mul_(scaling)
    # Rows of a patient lie next to each other, and all have the same number of them (padding has gradient zero).
    found = torch.bmm(left.view(_patients, -1, left.shape[1]).mT, right.view(_patients, -1, right.shape[1]))
    found = found.to(parameter.dtype).mul_(scaling)
    known = _of_patients.get(parameter)
    _of_patients[parameter] = found if known is None else known.add_(found)
    return None


@contextmanager
def patient_gradients(patients: int) -> Iterator[dict[Tensor, Tensor]]:
    """Around a backward pass whose rows are those of `patients` patients, in their order: what it leaves in the dict
    that is yielded are gradients of single patients, shape (patients, *parameter's), and in `.grad` nothing.

    One pass for all of them, at the cost of the usual one: B's gradient is a product over a patient's own tokens either
    way. Only parameters of layers that `fuse` exchanged; the loss must be a sum of terms of single patients.
    """
    global _patients
    if _patients is not None:
        raise RuntimeError("patient_gradients: already inside one")
    _patients = patients
    _of_patients.clear()
    try:
        result: dict[Tensor, Tensor] = {}
        yield result
        result.update(_of_patients)
    finally:
        _patients = None
        _of_patients.clear()


def fused_parameters(model: nn.Module) -> set[Tensor]:
    """The trained parameters whose gradients `patient_gradients` can tell apart."""
    layers = _fused(model)
    return {half["default"].weight for layer in layers for half in (layer.lora_A, layer.lora_B)}


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = layer.base_layer
    # trl keeps a second adapter as its reference model; that, and everything else but the plain case, is peft's.
    if layer.disable_adapters or layer.merged or layer.active_adapters != ["default"] or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    if layer in _MERGED and not torch.is_grad_enabled():  # the merged weights know nothing of A and B
        return _MERGED[layer](x)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    bias = None if base.bias is None else base.bias.to(dtype)
    with torch.autocast(device, enabled=False):
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        products = _PREPARED.get(layer) if dtype == base.weight.dtype else None
        y = _LoraLinear.apply(flat, base.weight.to(dtype), bias, a, b, layer.scaling["default"], products)
    return y.view(*x.shape[:-1], -1)  # type: ignore[union-attr]


# x ↦ x Wᵀ + b and y ↦ y W of each layer's frozen weights, for training passes on a CPU.
_PREPARED: WeakKeyDictionary[nn.Module, tuple[Product, Product]] = WeakKeyDictionary()
_PREPARED_BYTES = 2**30  # of weights of which two more copies are made; a larger model trains without
_TRAINING_ROWS = 1024
# The product with W + sBA of each layer, while `merged` holds.
_MERGED: WeakKeyDictionary[nn.Module, Product] = WeakKeyDictionary()


@contextmanager
def merged(model: nn.Module, rows: int = 32) -> Iterator[None]:
    """Within it fused float32 layers multiply by W + sBA, made once: for many passes without gradients.

    A decoding step has a row for each completion, and two more products of rank 16 cost as much as the one they
    accompany. The sums go on in another order, so log-probabilities move by rounding (1e-6). In bfloat16 nothing is
    merged: rounding W + sBA would lose an adapter that is small beside W. Costs one more copy of the adapted weights.

    Args:
        model: with layers that `fuse` exchanged; without any, nothing happens.
        rows: about how many rows a product will have.
    """
    layers = [layer for layer in _fused(model) if not layer.disable_adapters]
    try:
        for layer in layers:
            base = layer.base_layer
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index]
            if base.weight.dtype == torch.float32:  # type: ignore[union-attr]
                with torch.no_grad():
                    both = torch.addmm(base.weight, b, a, alpha=layer.scaling["default"])  # type: ignore
                _MERGED[layer] = prepared(both, base.bias, rows=rows)  # type: ignore
        yield
    finally:
        for layer in layers:
            _MERGED.pop(layer, None)


def prepare_training(model: nn.Module) -> None:
    """Makes fused layers multiply by rearranged copies of their frozen weights, in passes with gradients too.

    On a CPU in float32, where it is a fifth faster (SmolLM2, prompts of 140 tokens); elsewhere, and for models whose
    copies would take more than 2 GiB, nothing happens. The base weights must not change afterwards, and here they
    never do: peft's own merging is told by its flag and takes peft's way.
    """
    layers = [layer for layer in _fused(model) if layer.base_layer.weight.dtype == torch.float32]
    weights: list[Tensor] = [layer.base_layer.weight for layer in layers]
    cpu = all(weight.device.type == "cpu" for weight in weights)
    if not cpu or not packs() or sum(weight.nbytes for weight in weights) > _PREPARED_BYTES:
        return
    for layer, weight in zip(layers, weights, strict=True):
        if layer not in _PREPARED:
            back = prepared(weight.T.contiguous(), rows=_TRAINING_ROWS)
            _PREPARED[layer] = prepared(weight, layer.base_layer.bias, rows=_TRAINING_ROWS), back


def _fused(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(vars(layer).get("forward"), partial)]


def fuse(model: nn.Module) -> int:
    """Exchanges the forward of every plain LoRA layer of a peft model with one adapter; the number of them.

    Layers of another kind (DoRA, embeddings, dropout, an adapted layer that is trained itself) keep peft's.
    """
    from peft.tuners.lora.layer import Linear

    count = 0
    for layer in model.modules():
        if (
            type(layer) is Linear
            and type(layer.base_layer) is nn.Linear
            and not layer.lora_variant
            and not layer.base_layer.weight.requires_grad
            and list(layer.lora_A) == ["default"]
            and isinstance(layer.lora_dropout["default"], nn.Identity)
            and layer.lora_A["default"].bias is None
            and layer.lora_B["default"].bias is None
        ):
            layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
            count += 1
    return count
