"""Base model + adapter → one merged model folder, verified before it gets its name. Both roles.

The coordinator merges the final model of a run; a hospital merges the adapter it received, on its own machine. What
enters: a base model folder and a peft adapter folder. What leaves: a folder that `AutoModelForCausalLM.from_pretrained`
loads. Nothing is written under its final name before all of this holds:

- the adapter in the computation is exactly the one in the file, and it changes the outputs if and only if B ≠ 0
  (a key mismatch gives base-model outputs without an error: vllm issue 34186);
- every merged weight is W + ΔW to the rounding of its type, and the merged model's logits are those of base + adapter
  (`TOLERANCE`);
- the files hold the merged tensors bit for bit, and what `from_pretrained` loads from them is what they hold.

Memory: one copy of the model at a time, plus one tensor. Disk: the model once more.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import ModelError, RunFolderError, VerificationError
from .models import amplified, read_tensors
from .packaged import weight_files

# Largest difference of a logit between the merged model and base + adapter, as a share of the largest logit.
# float32: (W + BA)x and Wx + B(Ax) differ by rounding. bfloat16: W + BA itself is rounded to 8 bits of mantissa.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
_RELOAD_TOLERANCE = 1e-6  # same weights, but another place in memory may mean another order of summation
_SHARD = "4GB"
_MARGIN_BYTES = 32 << 20  # tokenizer, configs, cards
_POSITIONS = 16  # logits compared at the last positions of each probe

_PROBES = (
    "Age: 64 years; Heart rate: 118 /min; Albumin: 2.9 g/dL; Sepsis: yes. What would be the masked value of "
    "'Creatinine'?\nA. 0.8\nB. 1.9\nC. 3.4",
    "Sodium: 139 mmol/L; Mean arterial pressure: 61 mmHg. Did the patient survive to discharge?\nA. yes\nB. no",
    "Which letter carries the value 'amber'?\nA. slate\nB. amber\nC. ochre\nD. teal",
)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was verified. Effect and difference are of logits, as shares of the largest; agreement is of positions."""

    adapter_is_zero: bool
    adapter_effect: float
    merge_difference: float
    tolerance: float
    greedy_agreement: float
    probes: int
    bytes_written: int


def probe_prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of a few public prompts in the model's own chat format: what outputs are compared on by default."""
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in _PROBES
    ]
    return [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def merge_adapter(
    base: Path, adapter: Path, out: Path, *, dtype: str | None = None, prompts: Sequence[Sequence[int]] | None = None
) -> MergeReport:
    """Merges a peft adapter folder into a base model folder and writes `out`, complete and verified or not at all.

    Args:
        base: folder of the base model.
        adapter: folder with adapter_config.json and adapter_model.safetensors.
        out: the model folder to write; replaced if it exists.
        dtype: "float32" or "bfloat16", of the merged weights; None: as the base is stored.
        prompts: token ids that outputs are compared on; None: `probe_prompts`.

    Raises:
        ModelError: base or adapter does not load.
        RunFolderError: not enough disk.
        VerificationError: outputs or files are not what they must be; nothing is left behind.
    """
    with new_folder(out) as work:
        return merge_into(base, adapter, work, dtype=dtype, prompts=prompts)


def merge_into(
    base: Path, adapter: Path, folder: Path, *, dtype: str | None = None, prompts: Sequence[Sequence[int]] | None = None
) -> MergeReport:
    """As `merge_adapter`, into an existing folder that the caller removes when this raises."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    dtype = dtype or stored_dtype(base)
    widened = 2 if dtype == "float32" and stored_dtype(base) == "bfloat16" else 1
    require_disk(folder, widened * sum(file.stat().st_size for file in weight_files(base)))
    tokenizer = AutoTokenizer.from_pretrained(base)
    probes = [list(ids) for ids in prompts] if prompts is not None else probe_prompts(tokenizer)
    plain = load_plain(base, getattr(torch, dtype))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's
            model: Any = PeftModel.from_pretrained(plain, str(adapter))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"adapter {adapter}: does not load: {str(error).splitlines()[0]:.200}") from None
    model.eval()
    zero = _verify_loaded(model, adapter)
    adapted = logits(model, probes)
    with model.disable_adapter():
        effect = difference(logits(model, probes), adapted)
    moves = effect > 0.0
    if not zero and not moves:  # in the computation, but too small to move a rounded logit?
        with amplified(model):
            moves = not torch.equal(logits(model, probes), adapted)
    if zero == moves:
        raise VerificationError(f"adapter {adapter}: B is {'' if zero else 'not '}zero, outputs move by {effect:.3g}")
    _merge_layers(model)
    merged = model.unload()
    del model, plain
    outputs = logits(merged, probes)
    off, tolerance = difference(outputs, adapted), TOLERANCE[dtype]
    if not off <= tolerance:
        raise VerificationError(
            f"merged model: logits are {off:.3g} of the largest off base + adapter, expected {tolerance:g} at most"
        )
    agreement = float((outputs.argmax(-1) == adapted.argmax(-1)).float().mean())
    holder = [merged]
    del merged
    written = save_verified(holder, tokenizer, folder, probes)
    return MergeReport(zero, effect, off, tolerance, agreement, len(probes), written)


def save_verified(holder: list[Any], tokenizer: Any, folder: Path, probes: Sequence[Sequence[int]]) -> int:
    """Saves a plain model with tokenizer and generation config, and verifies the files against memory.

    Args:
        holder: a list with the model as its only element; emptied, so that the model's memory is free before the files
            are loaded again. A caller that keeps a reference pays for two copies.
        tokenizer: saved beside it.
        folder: an existing folder.
        probes: token ids that outputs are compared on.

    Returns:
        Bytes of weights written.

    Raises:
        VerificationError: a file does not hold what memory holds, or loading the folder gives something else.
    """
    from transformers import AutoTokenizer

    model = holder.pop()
    before, first = logits(model, probes), next(model.parameters())
    dtype, device = first.dtype, first.device
    model.save_pretrained(folder, max_shard_size=_SHARD)
    tokenizer.save_pretrained(folder)
    _same_as_files(dict(model.state_dict()), folder, "memory")
    del model, first
    gc.collect()
    again = load_plain(folder, dtype).to(device)
    _same_as_files(dict(again.state_dict()), folder, "the reloaded model")
    if not (off := difference(logits(again, probes), before)) <= _RELOAD_TOLERANCE:
        raise VerificationError(f"model folder: reloaded, its logits are {off:.3g} of the largest off")
    if AutoTokenizer.from_pretrained(folder).chat_template != tokenizer.chat_template:
        raise VerificationError("model folder: the reloaded tokenizer has another chat template")
    return sum(file.stat().st_size for file in weight_files(folder))


def load_plain(folder: Path, dtype: torch.dtype) -> Any:
    """A model folder as a plain model on the CPU, in evaluation mode.

    Raises:
        ModelError: it does not load.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"model {folder}: does not load: {str(error).splitlines()[0]:.200}") from None
    return model.eval()


@torch.no_grad()
def logits(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """float32 (rows, vocabulary) on the CPU: logits at the last positions of each prompt, one prompt after another."""
    device = next(model.parameters()).device
    rows = [
        model(input_ids=torch.tensor([list(ids)], device=device)).logits[0, -_POSITIONS:].float().cpu()
        for ids in prompts
    ]
    return torch.cat(rows)


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest difference of two logit tables as a share of the largest logit; NaN, which no check takes, if one is."""
    return float((first - second).abs().max() / second.abs().max())


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Refuses to begin what would not fit.

    Raises:
        RunFolderError: fewer bytes are free than `needed_bytes` and a margin, with both figures.
    """
    free, needed = shutil.disk_usage(folder).free, needed_bytes + _MARGIN_BYTES
    if free < needed:
        raise RunFolderError(f"{folder}: the model needs {needed / 1e6:,.0f} MB of disk, {free / 1e6:,.0f} MB are free")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A work folder beside `out` that takes its place when the block ends well, and is removed when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{out.name}.new-*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
    work.chmod(0o755)  # mkdtemp's 0700 would be the finished folder's mode
    try:
        yield work
        if out.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{out.name}.new-", dir=out.parent))
            out.rename(replaced / out.name)
            work.rename(out)
            shutil.rmtree(replaced)
        else:
            work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def stored_dtype(base: Path) -> str:
    """The dtype in which a model folder is merged: bfloat16 where it is stored in 16 bits, else float32."""
    stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return "bfloat16" if "16" in str(stored.get("dtype", stored.get("torch_dtype", ""))) else "float32"


def _verify_loaded(model: Any, adapter: Path) -> bool:
    """Whether B is zero, after checking that the model holds the file's tensors, all of them and no others."""
    from peft import get_peft_model_state_dict

    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    file = read_tensors(adapter / "adapter_model.safetensors")
    if held.keys() != file.keys():
        other = sorted(held.keys() ^ file.keys())
        raise VerificationError(f"adapter {adapter}: {len(other)} tensors fit no layer or are missing: '{other[0]}'")
    for name, tensor in file.items():
        if not torch.equal(held[name].float(), tensor.float()):
            raise VerificationError(f"adapter {adapter}: the model does not hold tensor '{name}' of the file")
    return not any(bool(tensor.any()) for name, tensor in file.items() if "lora_B" in name)


def _merge_layers(model: Any) -> None:
    """Adds each layer's ΔW to its W in place, one layer at a time, and checks every weight.

    The logits alone could not tell in bfloat16, where rounding W + ΔW moves them as much as a small adapter does.
    """
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_base_layer().weight
        delta = layer.get_delta_weight("default").detach().float()  # type: ignore[operator]
        expected = weight.detach().float() + delta
        layer.merge(safe_merge=True)  # type: ignore[operator]
        bound = torch.finfo(weight.dtype).eps * (expected.abs() + delta.abs())
        if not bool(((weight.detach().float() - expected).abs() <= bound).all()):
            raise VerificationError(f"merged model: the weight of '{name}' is not W + ΔW")


def _same_as_files(held: dict[str, torch.Tensor], folder: Path, who: str) -> None:
    """Every tensor in the files is the one held, bit for bit; what they lack shares memory with one they have."""
    in_files: set[int] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (a safetensors handle is not a mapping)
                if name not in held or not torch.equal(stored.get_tensor(name), held[name].cpu()):
                    raise VerificationError(f"{file.name}: tensor '{name}' is not the one {who} holds")
                in_files.add(held[name].data_ptr())
    lost = [name for name, tensor in held.items() if tensor.data_ptr() not in in_files]
    if lost:
        raise VerificationError(f"model folder: the files lack tensor '{lost[0]}' ({len(lost)} in all)")
