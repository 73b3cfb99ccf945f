"""The public warm-up: what a small model must learn before reinforcement learning has anything to reinforce.

Runs at the coordinator, once, before round 1. Enters: the base model and a generator of synthetic questions
(warmup_questions.py); nothing of a patient. Leaves: the round-0 adapter that every site starts from. SmolLM2-135M
cannot bind letters to options, so every group of completions is a lottery; minutes of supervised training on
questions whose answer is written in them, or hinted at, mend that (figures in configs/adapters/smollm2-135m.json).
Large models need none (`warmup.enabled = false`).

Under `ffa` the warm-up trains A and B; A is frozen from round 0 on.

The result is kept in the cache folder by a digest of all that decides it. An adapter may also be **released**: a pair
NAME.safetensors and NAME.json (configs/adapters), whose digest, base model and LoRA settings are checked on loading.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn.functional import log_softmax
from torch.utils.data import DataLoader, Dataset

from ..common.adapter import Float32Array, Manifest, flatten, unflatten, vector_digest
from ..common.config import NO_PRIVACY, LoraConfig, ModelConfig, RunConfig, WarmupConfig, load_run, packaged
from ..common.errors import ConfigError, ModelError, VerificationError
from ..common.lm.answers import answer_questions
from ..common.lm.models import LanguageModel, cache_folder, read_tensors, verify_adapter
from ..common.lm.prefix import causal_model
from ..common.lm.scoring import Reader, encode_texts, hidden_states, option_token_ids, render
from ..common.question import LETTERS, PromptTemplate, load_prompt
from .warmup_questions import Stated, synthetic_questions

CODE_VERSION = 2  # raised when a change here or in the files of questions changes what is trained
HELD_OUT_QUESTIONS = 200
_USAGE_KEY = b"wardround warm-up 1\0"
_HELD_OUT_STREAM, _TRAIN_STREAM = 1, 0
_RAMP_STEPS = 10  # the learning rate rises over these, then falls linearly to a tenth
_GRADIENT_NORM = 1.0
_WORKERS = 6  # processes that write questions for a GPU, which would wait for one

# What a report keeps of the adapter that its training went on from.
_FIRST_PART = (
    "binding_before",
    "binding_after",
    "first_part",
    "machine",
    "prompt",
    "questions_trained",
    "seconds",
    "settings",
    "sha256",
)

OnStep = Callable[[int, int, float], None]


@dataclass(frozen=True)
class WarmupResult:
    """The round-0 adapter and how it came about.

    Attributes:
        vector_full: float32 (manifest.total_size,), A and B.
        manifest: what the vector holds.
        report: JSON-ready: source (trained, cached, released, none), binding accuracy before and after, settings, …
    """

    vector_full: Float32Array
    manifest: Manifest
    report: dict[str, Any]


def warm_up(lm: LanguageModel, config: RunConfig, *, on_step: OnStep | None = None) -> WarmupResult:
    """Trains the adapter on synthetic questions, starting from what `lm` holds; `lm` holds the result afterwards.

    Values are rounded to float16 at the end (LoRA strategies), so that the adapter trained here and the one released
    as float16 are the same.

    Args:
        lm: a model with a fresh adapter; `warmup.start` is put in its place where the config names one.
        config: its `warmup`, `lora`, `questions.n_options` and `model.prompt` decide the result.
        on_step: called with (steps done, steps in all, loss).

    Raises:
        ModelError: the prompt's letters are not single tokens of the model.
        VerificationError: training gave NaN or infinity, or an adapter that does not change the model's outputs.
    """
    settings, template = config.warmup, load_prompt(config.model.prompt)
    first_part: dict[str, Any] = {}
    if settings.start is not None:
        start = _put(lm, load_released(settings.start, lm)).report
        first_part = {"first_part": {key: start[key] for key in _FIRST_PART if key in start}}
    held_out = held_out_questions(config, template)
    before = binding_accuracy(lm, held_out, template, config)
    started = time.perf_counter()
    losses = _train(lm, config, template, on_step)
    seconds = time.perf_counter() - started
    vector = lm.vector(trainable_only=False)
    if lm.manifest.strategy != "full":
        vector = vector.astype(np.float16).astype(np.float32)
        lm.set_vector(vector, trainable_only=False)
    if not verify_adapter(lm):
        raise VerificationError("warm-up: training left the model's outputs as they were")
    after = binding_accuracy(lm, held_out, template, config)
    report = {
        "source": "trained",
        "binding_before": before,
        "binding_after": after,
        "binding_questions": len(held_out),
        "questions_trained": settings.steps * settings.batch_size,
        "loss_last": float(np.mean(losses[-10:])),
        "seconds": round(seconds, 1),
        "machine": _machine(lm),
        "model": config.model.id,
        "base_digest": lm.base_digest,
        "vector_digest": vector_digest(lm.manifest, vector),
        "prompt": template.name,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "n_options": config.questions.n_options,
        "lora": config.lora.model_dump(mode="json"),
        "settings": _deciding(settings),
        "code_version": CODE_VERSION,
        "command": _command(config),
        **first_part,
    }
    return WarmupResult(vector, lm.manifest, report)


def round_zero_adapter(
    lm: LanguageModel, config: RunConfig, *, cache: Path | None = None, on_step: OnStep | None = None
) -> WarmupResult:
    """The adapter that round 0 hands to every site; `lm` holds it afterwards.

    The released one when `warmup.adapter` names one; else this machine's cached one for exactly these settings; else
    it is trained and cached. With the warm-up off, the fresh adapter of the run's seed.

    Raises:
        ModelError: no such released adapter, or it belongs to another model or other LoRA settings.
        VerificationError: its file is not the one that was released; or as `warm_up`.
    """
    lm.reset(config.warmup.seed if config.warmup.enabled else config.seed)
    if not config.warmup.enabled:
        return WarmupResult(lm.vector(trainable_only=False), lm.manifest, {"source": "none"})
    if config.warmup.adapter is not None:
        return _put(lm, load_released(config.warmup.adapter, lm))
    folder, name = cache_folder(cache) / "warmup", warmup_key(lm, config)
    if (folder / f"{name}.json").is_file():
        try:
            found = load_released(folder / f"{name}.safetensors", lm)
        except (ModelError, VerificationError):
            pass  # half of the pair was replaced before a crash: train it again
        else:
            return _put(lm, WarmupResult(found.vector_full, found.manifest, {**found.report, "source": "cached"}))
    result = warm_up(lm, config, on_step=on_step)
    try:
        save_released(result, folder, name)
    except OSError:  # an unwritable cache costs the next run minutes; this one has its adapter
        result.report["cached"] = False
    return result


def _put(lm: LanguageModel, result: WarmupResult) -> WarmupResult:
    lm.set_vector(result.vector_full, trainable_only=False)
    verify_adapter(lm)
    return result


def held_out_questions(config: RunConfig, template: PromptTemplate, count: int = HELD_OUT_QUESTIONS) -> list[Stated]:
    """Synthetic questions from the held-out vocabulary, the same for every call with this config."""
    return synthetic_questions(
        count,
        np.random.default_rng([config.warmup.seed, _HELD_OUT_STREAM]),
        template,
        features_per_record=config.warmup.features_per_record,
        n_options=config.questions.n_options,
        part="held-out",
    )


def binding_accuracy(lm: LanguageModel, stated: Sequence[Stated], template: PromptTemplate, config: RunConfig) -> float:
    """Share of synthetic questions whose stated value the model finds among the options."""
    outcomes = answer_questions(
        lm,
        [item.question for item in stated],
        template,
        reasoning_tokens=config.warmup.reasoning_tokens,
        micro_batch=config.speed.micro_batch,
    )
    return float(outcomes.correct.mean())


def _train(lm: LanguageModel, config: RunConfig, template: PromptTemplate, on_step: OnStep | None) -> list[float]:
    settings = config.warmup
    parameters = dict(lm.parameters)
    frozen = [parameter for parameter in parameters.values() if not parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    losses: list[float] = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for step, batch in enumerate(_batches(lm, config, template)):
            ramp = min(1.0, (step + 1) / _RAMP_STEPS)
            fall = 1.0 - 0.9 * step / settings.steps
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * ramp * fall
            optimizer.zero_grad()
            loss = torch.zeros((), device=lm.device)
            for start in range(0, len(batch), config.speed.micro_batch):
                share = _loss(lm, batch[start : start + config.speed.micro_batch]) / len(batch)
                share.backward()
                loss += share.detach()
            torch.nn.utils.clip_grad_norm_(parameters.values(), _GRADIENT_NORM)
            optimizer.step()
            losses.append(float(loss))
            if on_step is not None:
                on_step(step + 1, settings.steps, losses[-1])
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.grad = None
    return losses


@dataclass(frozen=True, slots=True)
class Example:
    """A synthetic question as tokens.

    Attributes:
        prompt: its token ids, up to the answer.
        target: the answer's token ids: the right letter, or the reasoning, the letter and the end of the turn.
        letters: ids of the options' letters, and what each is trained to be (sums to 1); empty with reasoning.
    """

    prompt: list[int]
    target: list[int]
    letters: list[int]
    shares: list[float]


@dataclass(frozen=True)
class _Tokens:
    """A tokenizer without its model, for processes that have none."""

    config: ModelConfig
    tokenizer: Any


class _Batches(Dataset[list[Example]]):
    """The training questions of every step, by its number alone, so that any process may write any of them."""

    def __init__(self, reader: Reader, config: RunConfig, template: PromptTemplate) -> None:
        self.reader, self.config, self.template = reader, config, template

    def __len__(self) -> int:
        return self.config.warmup.steps

    def __getitem__(self, step: int) -> list[Example]:
        """Questions of a step, the shortest first: those that go through the model together are alike in length."""
        settings = self.config.warmup
        made = synthetic_questions(
            settings.batch_size,
            np.random.default_rng([settings.seed, _TRAIN_STREAM, step]),
            self.template,
            features_per_record=settings.features_per_record,
            n_options=self.config.questions.n_options,
            hinted_share=settings.hinted_share,
        )
        return sorted(examples(self.reader, made, self.template, settings), key=lambda item: len(item.prompt))


def _batches(lm: LanguageModel, config: RunConfig, template: PromptTemplate) -> Iterable[list[Example]]:
    reader = _Tokens(lm.config, lm.tokenizer)
    workers = _WORKERS if lm.device.type == "cuda" else 0
    return DataLoader(
        _Batches(reader, config, template),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # CUDA does not survive a fork
        prefetch_factor=4 if workers else None,
    )


def examples(
    reader: Reader, batch: Sequence[Stated], template: PromptTemplate, settings: WarmupConfig
) -> list[Example]:
    """Synthetic questions as tokens.

    Raises:
        ModelError: the prompt's letters are not single tokens of the model.
    """
    reasoning = settings.reasoning_tokens > 0
    texts = [render(reader, template, item.question, reasoning) for item in batch]
    prompts = encode_texts(reader, texts)
    if reasoning:
        end = turn_end(reader, template)
        answers = [f" {item.reason}\n{template.forced}{LETTERS[item.question.answer]}}}" + end for item in batch]
        targets = encode_texts(reader, answers)
        return [Example(prompt, target, [], []) for prompt, target in zip(prompts, targets, strict=True)]
    letters = option_token_ids(reader.tokenizer, texts[0], max(len(item.question.options) for item in batch))
    made: list[Example] = []
    for item, prompt in zip(batch, prompts, strict=True):
        n, answer = len(item.question.options), item.question.answer
        certain = item.shares or tuple(float(index == answer) for index in range(n))
        smooth = settings.label_smoothing
        shares = [(1 - smooth) * share + smooth / n for share in certain]
        made.append(Example(prompt, [letters[answer]], letters[:n], shares))
    return made


def _loss(lm: LanguageModel, batch: Sequence[Example]) -> torch.Tensor:
    """Sum over questions of the cross-entropy of their letters, or of the mean over the reasoning's tokens."""
    hidden = hidden_states(lm, [item.prompt + item.target[:-1] for item in batch])
    places = [(row, len(item.prompt) - 1 + k) for row, item in enumerate(batch) for k in range(len(item.target))]
    rows, columns = torch.tensor(places, device=lm.device).T
    log_probs = log_softmax(causal_model(lm).get_output_embeddings()(hidden[rows, columns]).float(), dim=-1)
    # Each place's tokens and what they are trained to be; a question's places weigh 1 together.
    wanted: list[tuple[int, int, float]] = []
    for item in batch:
        first = wanted[-1][0] + 1 if wanted else 0
        if item.letters:
            wanted += [(first, token, share) for token, share in zip(item.letters, item.shares, strict=True)]
        else:
            wanted += [(first + k, token, 1 / len(item.target)) for k, token in enumerate(item.target)]
    at, token, share = zip(*wanted, strict=True)
    chosen = log_probs[torch.tensor(at, device=lm.device), torch.tensor(token, device=lm.device)]
    return -(torch.tensor(share, device=lm.device) * chosen).sum()


def turn_end(lm: Reader, template: PromptTemplate) -> str:
    """What this model's chat template writes after the assistant's text, without trailing white space."""
    mark = "wardround"
    messages = [{"role": "user", "content": template.cue}, {"role": "assistant", "content": mark}]
    text = str(lm.tokenizer.apply_chat_template(messages, tokenize=False))
    return text.rpartition(mark)[2].rstrip()


def warmup_key(lm: LanguageModel, config: RunConfig) -> str:
    """SHA-256 hex of all that decides the warm-up's result: base model, LoRA, settings, prompt, code version."""
    data = {
        "base": lm.base_digest,
        "code_version": CODE_VERSION,
        "dtype": str(lm.dtype),
        "lora": config.lora.model_dump(mode="json"),
        "n_options": config.questions.n_options,
        "prompt": load_prompt(config.model.prompt).model_dump(mode="json"),
        "settings": _deciding(config.warmup),
        "start": load_released(config.warmup.start, lm).report["sha256"] if config.warmup.start is not None else None,
    }
    return hashlib.sha256(_USAGE_KEY + json.dumps(data, sort_keys=True).encode()).hexdigest()


def _deciding(settings: WarmupConfig) -> dict[str, Any]:
    return {key: value for key, value in settings.model_dump(mode="json").items() if key not in ("adapter", "enabled")}


def _command(config: RunConfig) -> str:
    """The command that makes this adapter again: a shipped config by its name, and what was set otherwise."""
    try:
        named = load_run(Path(config.name))
    except ConfigError:
        named = RunConfig(name=config.name, privacy=NO_PRIVACY)
    changed: list[str] = []
    for section in ("model", "lora", "questions", "warmup"):
        before, now = (one.model_dump(mode="json")[section] for one in (named, config))
        # How questions of patients are made does not matter here, but for how many options they have.
        keys = ["n_options"] if section == "questions" else [key for key in now if key not in ("adapter", "enabled")]
        changed += [f"--set {section}.{key}={now[key]}" for key in keys if now[key] != before[key]]
    return " ".join([f"wardround server warmup {config.name} --out adapters", *changed])


def _machine(lm: LanguageModel) -> str:
    place = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else platform.machine()
    return f"{place}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def save_released(result: WarmupResult, folder: Path, name: str) -> Path:
    """Writes NAME.safetensors (float16; float32 under `full`) and NAME.json with its SHA-256 into `folder`.

    Each file is complete or absent; the JSON comes last and is what makes the pair valid.

    Returns:
        The path of the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kind = np.float32 if result.manifest.strategy == "full" else np.float16
    tensors = unflatten(result.vector_full, result.manifest, trainable_only=False)
    weights = folder / f"{name}.safetensors"
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as work:
        written = Path(work) / "adapter.safetensors"
        save_file({key: np.ascontiguousarray(value.astype(kind)) for key, value in tensors.items()}, written)
        written.chmod(0o644)  # safetensors writes for its owner alone; a cache or a release may be shared
        report = {**result.report, "sha256": _sha256(written), "size_bytes": written.stat().st_size}
        description = Path(work) / "adapter.json"
        description.write_text(json.dumps(report, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written.replace(weights)
        description.replace(folder / f"{name}.json")
    return folder / f"{name}.json"


def load_released(name_or_path: str | Path, lm: LanguageModel) -> WarmupResult:
    """A released adapter, checked to be the released one and to fit `lm`.

    Args:
        name_or_path: a name in configs/adapters, or the path of a .safetensors file with its .json beside it.

    Raises:
        ModelError: no such pair; another base model or LoRA setting.
        VerificationError: the file's SHA-256 or its tensors are not what the JSON says.
    """
    weights = Path(name_or_path)
    if weights.suffix != ".safetensors":
        weights = packaged("adapters", f"{name_or_path}.safetensors")
    description = weights.with_suffix(".json")
    for file in (weights, description):
        if not file.is_file():
            raise ModelError(f"warmup.adapter '{name_or_path}': {file} does not exist; leave the key out to train one")
    try:
        report: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
        expected, base, lora = str(report["sha256"]), str(report["base_digest"]), dict(report["lora"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{description}: not the description of an adapter ({error!r})") from None
    if (got := _sha256(weights)) != expected:
        raise VerificationError(f"{weights}: expected SHA-256 {expected[:16]}…, got {got[:16]}…")
    if base != lm.base_digest:
        raise ModelError(
            f"warmup.adapter '{name_or_path}' was made for base model {base[:16]}…, '{lm.config.id}' is "
            f"{lm.base_digest[:16]}…; leave the key out to train one"
        )
    _same_lora(name_or_path, lora, lm.lora)
    tensors = {key: tensor.float().numpy() for key, tensor in read_tensors(weights).items()}
    vector = flatten(tensors, lm.manifest, trainable_only=False)
    return WarmupResult(vector, lm.manifest, {**report, "source": "released", "adapter": str(name_or_path)})


def _same_lora(name: str | Path, made: Mapping[str, Any], asked: LoraConfig | None) -> None:
    if asked is None:
        raise ModelError(f"warmup.adapter '{name}': the model was loaded without an adapter")
    wanted = asked.model_dump(mode="json")
    full = "full" in (made.get("strategy"), wanted["strategy"])
    for key in ("rank", "alpha", "targets", *(("strategy",) if full else ())):
        if made.get(key) != wanted[key]:
            raise ModelError(f"warmup.adapter '{name}': made with lora.{key} = {made.get(key)!r}, got {wanted[key]!r}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
