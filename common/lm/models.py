"""The base model with its adapter, and the adapter as a vector. Both roles; nothing private by itself.

`load` makes a model from files; `shared` is the same but keeps one copy in this process, because thirty-two simulated
hospitals must not hold thirty-two copies. What is trained is decided by `LoraConfig.strategy`:

    ffa     LoRA, A frozen after round 0, B trained: the mean over sites is exact (Sun et al. 2024, arXiv 2403.12313)
    fedit   LoRA, A and B trained: the mean of A and the mean of B are not the mean of BA
    full    every parameter, no adapter

A starts from the seed (uniform as peft's own initialisation, with a generator of its own), B at zero, so a fresh
adapter changes nothing. Adapter tensors are float32 whatever the base is.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..adapter import Float32Array, Manifest, TensorSpec, flatten, unflatten
from ..config import LoraConfig, ModelConfig
from ..errors import ModelError, VerificationError
from .lora import fuse
from .packaged import base_digest, cache_folder, resolve, weight_files

__all__ = ["LanguageModel", "base_digest", "cache_folder", "load", "resolve", "shared", "verify_adapter"]

_ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(eq=False)
class LanguageModel:
    """A model, its tokenizer, and the adapter as a vector.

    Attributes:
        model: a peft model; the plain model under strategy `full` and when `lora` is None. In evaluation mode.
        tokenizer: pads left; has a chat template.
        base_digest: identity of base weights, config and tokenizer.
        config: what was asked for.
        lora: None: no adapter, only for evaluation.
        path: folder of the base model.
        parameters: the adapter's tensors (all, under `full`) by name, in vector order; empty when `lora` is None.
    """

    model: Any
    tokenizer: Any
    base_digest: str
    config: ModelConfig
    lora: LoraConfig | None
    path: Path
    parameters: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the base model's weights and of the products with them; adapters are float32."""
        return self.model.get_input_embeddings().weight.dtype

    @cached_property
    def manifest(self) -> Manifest:
        """What the vector holds.

        Raises:
            ModelError: the model was loaded without an adapter.
        """
        if self.lora is None:
            raise ModelError(f"model '{self.config.id}' was loaded without an adapter")
        specs = tuple(
            TensorSpec(name, tuple(parameter.shape), parameter.requires_grad)
            for name, parameter in self.parameters.items()
        )
        return Manifest(specs, self.base_digest, self.lora.strategy)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that the rounds train, in vector order."""
        return {spec.name: self.parameters[spec.name] for spec in self.manifest.kept(trainable_only=True)}

    def vector(self, trainable_only: bool = True) -> Float32Array:
        """A copy of the trainable (default) or of the full adapter: float32, shape (size,).

        Raises:
            VerificationError: a value is NaN or infinite.
        """
        tensors = {
            spec.name: self.parameters[spec.name].detach().to("cpu", torch.float32).numpy()
            for spec in self.manifest.kept(trainable_only)
        }
        return flatten(tensors, self.manifest, trainable_only)

    @torch.no_grad()
    def set_vector(self, vector: Float32Array, trainable_only: bool = True) -> None:
        """Puts a vector into the model and reads it back; all of it or nothing.

        Raises:
            VerificationError: wrong size or dtype, NaN or infinity (nothing was changed); or what the model holds
                afterwards is not what was put in.
        """
        tensors = unflatten(vector, self.manifest, trainable_only)
        exact = True
        for name, tensor in tensors.items():
            # A copy: from_numpy refuses read-only arrays (views of received bytes) with a warning.
            source = torch.from_numpy(np.array(tensor))
            parameter = self.parameters[name]
            parameter.copy_(source)
            exact = exact and torch.equal(parameter.to("cpu", torch.float32), source.to(parameter.dtype).float())
        if not exact:
            raise VerificationError(f"adapter of '{self.config.id}': the model does not hold what was put in")

    def reset(self, seed: int) -> None:
        """The adapter as it is before round 0: A from the seed, B zero; under `full` the base weights."""
        if self.lora is None:
            return
        if self.lora.strategy == "full":
            self._load_base()
            return
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if "lora_A" in name:
                    # kaiming_uniform_(a=√5), which is what peft does, is U(±1/√fan_in); drawn on the CPU in name
                    # order so that every machine has the same A.
                    bound = 1 / math.sqrt(parameter.shape[1])
                    parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
                else:
                    parameter.zero_()

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Within it the model is the base model: adapter disabled, or under `full` the base weights put back."""
        if self.lora is None:
            yield
        elif self.lora.strategy == "full":
            current = self.vector()
            self._load_base()
            try:
                yield
            finally:
                self.set_vector(current)
        else:
            wanted = {name: parameter.requires_grad for name, parameter in self.parameters.items()}
            try:
                with self.model.disable_adapter():
                    yield
            finally:  # peft unfreezes every adapter tensor when it enables them again, A of `ffa` too
                for name, parameter in self.parameters.items():
                    parameter.requires_grad_(wanted[name])

    def save_adapter(self, folder: Path) -> None:
        """Writes the adapter in peft's format (adapter_config.json, safetensors); under `full` the whole model."""
        if self.lora is None:
            raise ModelError(f"model '{self.config.id}' was loaded without an adapter")
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora.strategy == "full":
            self.model.save_pretrained(folder)
        else:
            # save_embedding_layers=False: "auto" would look the base model's vocabulary up on the hub.
            self.model.save_pretrained(folder, save_embedding_layers=False)

    def load_adapter_folder(self, folder: Path) -> None:
        """Puts an adapter that `save_adapter` or peft wrote into the model.

        Raises:
            ModelError: no such file, not safetensors.
            VerificationError: its tensors are not exactly this adapter's.
        """
        if self.manifest.strategy == "full":
            raise ModelError("strategy 'full' has no adapter folder: load the model folder itself")
        tensors = {name: tensor.float().numpy() for name, tensor in read_tensors(folder / _ADAPTER_FILE).items()}
        self.set_vector(flatten(tensors, self.manifest, trainable_only=False), trainable_only=False)

    @torch.no_grad()
    def _load_base(self) -> None:
        base = {name: tensor for file in weight_files(self.path) for name, tensor in read_tensors(file).items()}
        missing = [name for name in self.parameters if name not in base]
        if missing:
            raise VerificationError(f"base model {self.path}: its weights lack '{missing[0]}'")
        for name, parameter in self.parameters.items():
            parameter.copy_(base[name])


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ModelError: no such file, or not a safetensors file.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        raise ModelError(f"{file}: no such file") from None
    except SafetensorError as error:
        raise ModelError(f"{file}: not a complete safetensors file ({error})") from None


def pick_device(asked: str) -> torch.device:
    """`auto` is the GPU where there is one.

    Raises:
        ModelError: `cuda` asked for, none seen.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device = 'cuda': torch sees no GPU here; use 'auto' or 'cpu'")
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(asked)


def pick_dtype(asked: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and on a CPU that multiplies it natively (AVX-512 BF16 or AMX), else float32.

    A CPU without it emulates bfloat16 and is slower than in float32.
    """
    if asked == "auto":
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        asked = "bfloat16" if device.type == "cuda" or native() else "float32"
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


def load(model: ModelConfig, lora: LoraConfig | None, *, seed: int) -> LanguageModel:
    """A model with a fresh adapter, from files.

    Args:
        model: which base model, dtype and device.
        lora: the adapter and what of it is trained; None: the plain model, for evaluation only.
        seed: of the adapter's A; the same seed gives the same A on every machine.

    Raises:
        ModelError: no such model, no chat template, damaged weights, LoRA targets that the model does not have.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve(model.id)
    device = pick_device(model.device)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if not tokenizer.chat_template:
        raise ModelError(f"model '{model.id}': its tokenizer has no chat template; use an instruction-tuned model")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = tokenizer.eos_token_id
    try:
        base = AutoModelForCausalLM.from_pretrained(path, dtype=pick_dtype(model.dtype, device))
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"model '{model.id}': {path} does not load: {str(error).splitlines()[0]:.200}") from None
    if device.type == "cuda":
        # cuDNN's attention plans anew for every shape, 2 ms a layer, and hardly two batches here have one shape: more
        # than half of a training step (H200). The flash kernels that torch takes instead need no plan.
        torch.backends.cuda.enable_cudnn_sdp(False)
    base.to(device)
    base.requires_grad_(lora is not None and lora.strategy == "full")
    wrapped: Any = base
    if lora is not None and lora.strategy != "full":
        wrapped = _with_lora(base, lora, model.id)
    wrapped.eval()
    result = LanguageModel(wrapped, tokenizer, base_digest(path), model, lora, path)
    if lora is not None:
        result.parameters.update(_adapter_parameters(wrapped, lora))
        _ = (
            result.manifest
        )  # fixed now: the warm-up unfreezes A for a while, which must not change what the rounds send
        if lora.strategy != "full":
            result.reset(seed)
    return result


def _with_lora(base: Any, lora: LoraConfig, model_id: str) -> Any:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    settings = PeftConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    # peft's initialisation draws from the global generator: keep the caller's stream untouched, ours comes after.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's
        try:
            model = get_peft_model(base, settings)
        except ValueError as error:
            raise ModelError(f"lora.targets = {lora.targets!r}: model '{model_id}': {error}") from None
    fuse(model)
    return model


def _adapter_parameters(model: Any, lora: LoraConfig) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name in vector order; freezes A under `ffa`."""
    if lora.strategy == "full":
        return dict(sorted(model.named_parameters()))
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.requires_grad_(lora.strategy == "fedit" or "lora_B" in name)
            found[name.replace(".default.", ".")] = parameter  # the names of peft's own files
    return dict(sorted(found.items()))


_SHARED: dict[tuple[str, ...], tuple[LanguageModel, int]] = {}


def shared(model: ModelConfig, lora: LoraConfig | None, seed: int) -> LanguageModel:
    """`load`, once in this process per model and LoRA setting; every caller gets the same object.

    Whoever takes it puts its own vector in first (`set_vector(..., trainable_only=False)`): it holds what the last
    one left. Another seed resets the adapter.
    """
    device = str(pick_device(model.device))
    path = str(resolve(model.id))
    key = (path, model.dtype, device, lora.model_dump_json() if lora else "")
    if key not in _SHARED:
        _SHARED[key] = (load(model, lora, seed=seed), seed)
    found, last_seed = _SHARED[key]
    if last_seed != seed:
        found.reset(seed)
        _SHARED[key] = (found, seed)
    return found


def release_shared() -> None:
    """Forgets the shared models, so that their memory can be freed."""
    _SHARED.clear()


@contextmanager
def amplified(model: Any) -> Iterator[None]:
    """Within it the adapter of a peft model counts a million times: what it is connected to cannot stay as it is."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: value * 2**20 for name, value in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@torch.no_grad()
def verify_adapter(lm: LanguageModel, text: str = "The answer is") -> bool:
    """Checks that the adapter is really in the computation (vllm issue 34186: a key mismatch is silent).

    Returns:
        True when the adapter changes the outputs; False when B is zero, so that it must not and does not.

    Raises:
        VerificationError: B ≠ 0 and the outputs equal the base model's, or B = 0 and they differ; or not finite.
    """
    ids = torch.tensor([lm.tokenizer(text, add_special_tokens=False)["input_ids"]], device=lm.device)
    adapted = lm.model(input_ids=ids).logits[0, -1].float()
    with lm.base_only():
        base = lm.model(input_ids=ids).logits[0, -1].float()
    if not bool(torch.isfinite(adapted).all()):
        raise VerificationError(f"adapter of '{lm.config.id}': the model's outputs are not finite")
    differs = not torch.equal(adapted, base)
    if lm.lora is None or lm.lora.strategy == "full":
        return differs
    nonzero = any(bool(parameter.any()) for name, parameter in lm.parameters.items() if "lora_B" in name)
    if nonzero and not differs:  # in the computation, but too small to move a rounded output?
        with amplified(lm.model):
            differs = not torch.equal(lm.model(input_ids=ids).logits[0, -1].float(), base)
    if differs != nonzero:
        state = "is not zero but outputs equal the base model's" if nonzero else "is zero but outputs differ"
        raise VerificationError(f"adapter of '{lm.config.id}': B {state}")
    return differs
