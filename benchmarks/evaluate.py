"""Questions scored a second, ours against lm-evaluation-harness: python benchmarks/evaluate.py [--device cuda]

One model on both sides, loaded once: SmolLM2-135M with the shipped adapter merged in, in float32, with the same number
of threads. One set of questions: SUPPORT ICU, as the demo asks them (prompts of about 155 tokens). The harness gets the
finished prompts, as in the task that client/harness.py writes, and its backend for Hugging Face models scores them with
its own shortcut for choices of one token: one forward pass a question, as ours. It runs at several batch sizes and the
best counts, "auto" among them on a GPU (on a CPU that is five passes of 64 prompts to find what fits into memory); ours
runs at the batch size that a run has by default, on a GPU at three.

In turns; every batch size once, then the best three again; medians. Both are timed from text to choice, tokens included
(the harness makes them anew for every option), and once more without. Both must choose the same option of every
question; in bfloat16, where the harness differs from itself between batch sizes, of 98 % of them.

Writes benchmarks/results/evaluate.json (evaluate_cuda.json). Target: at least 1.5 times as many questions a second.
About 15 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

from wardround.common.cli import quiet_third_parties

quiet_third_parties()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from environment import peak_rss_bytes, record  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from wardround.client.questions import QuestionBuilder  # noqa: E402
from wardround.common.config import LoraConfig, ModelConfig, RunConfig, Speed, load_run  # noqa: E402
from wardround.common.counts import count  # noqa: E402
from wardround.common.lm.merge import merge_adapter  # noqa: E402
from wardround.common.lm.models import LanguageModel, load  # noqa: E402
from wardround.common.lm.scoring import encode_texts, log_probs_after, render  # noqa: E402
from wardround.common.question import LETTERS, PromptTemplate, Question, load_prompt  # noqa: E402
from wardround.common.schema import derive_schema  # noqa: E402
from wardround.server.warmup import load_released  # noqa: E402
from wardround.simulations import registries  # noqa: E402

QUESTIONS = 200
BATCHES: dict[str, tuple[int | str, ...]] = {"cpu": (1, 2, 4, 8, 16, 32), "cuda": (16, 64, 128, 256, 512, "auto")}
_DEFAULT = Speed().micro_batch
OURS = {"cpu": (_DEFAULT,), "cuda": (_DEFAULT, 64, 256)}
AGAIN = 3  # of the harness's batch sizes, after the first turn
TARGET = 1.5
AGREEMENT = {"float32": 1.0, "bfloat16": 0.98}


_Backend: Any = HFLM  # its registering decorator hides its type


@dataclass(frozen=True)
class Turn:
    """One side once: seconds from text to choice, of them those without making tokens, and processor seconds."""

    seconds: float
    model_seconds: float
    processor: float
    chosen: np.ndarray


class Harness(_Backend):
    """The harness's own backend, with a clock around the part that runs the model."""

    model_seconds = 0.0

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        started = _now(self.device)
        found = super()._loglikelihood_tokens(*args, **kwargs)
        self.model_seconds = _now(self.device) - started
        return found


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def model(folder: Path, device: str, dtype: str) -> LanguageModel:
    """SmolLM2 with the shipped adapter merged in, as a model folder loaded without an adapter."""
    base = load(ModelConfig(id="smollm2-135m", device="cpu", dtype="float32"), LoraConfig(), seed=0)
    base.set_vector(load_released("smollm2-135m", base).vector_full, trainable_only=False)
    base.save_adapter(folder / "adapter")
    merge_adapter(base.path, folder / "adapter", folder / "model")
    return load(
        ModelConfig.model_validate({"id": str(folder / "model"), "device": device, "dtype": dtype}), None, seed=0
    )


def questions(settings: RunConfig, n: int) -> list[Question]:
    """The first n questions of patients drawn from the SUPPORT ICU registry."""
    registry, template = registries.load("support_icu"), load_prompt(settings.model.prompt)
    schema = derive_schema(count(registry.values, registry.dictionary), registry.dictionary, settings.questions)
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(registry))[: 2 * n]
    return QuestionBuilder(registry, schema, template, settings.questions).build(rows, rng)[:n]


def ours(lm: LanguageModel, asked: list[Question], template: PromptTemplate, micro_batch: int) -> Turn:
    """What `option_log_probs` does, in its two parts."""
    started, processor = _now(lm.device), time.process_time()
    texts = [render(lm, template, question, reasoning=False) for question in asked]
    prompts = encode_texts(lm, texts)
    encoded = _now(lm.device)
    found = log_probs_after(lm, prompts, [len(question.options) for question in asked], texts[0], micro_batch)
    ended = _now(lm.device)
    return Turn(ended - started, ended - encoded, time.process_time() - processor, found.argmax(1))


def harness(lm: LanguageModel, asked: list[Question], template: PromptTemplate, batch_size: int | str) -> Turn:
    """The harness on the same prompts, already made."""
    texts = [render(lm, template, question, reasoning=False) for question in asked]
    requests = [
        Instance("loglikelihood", {}, (text, letter), index)
        for text, question in zip(texts, asked, strict=True)
        for index, letter in enumerate(LETTERS[: len(question.options)])
    ]
    most = max(size for size in BATCHES[lm.device.type] if isinstance(size, int))
    backend = Harness(lm.model, tokenizer=lm.tokenizer, batch_size=batch_size, max_batch_size=most, add_bos_token=False)
    with redirect_stdout(StringIO()):  # it prints what "auto" found
        started, processor = _now(lm.device), time.process_time()
        answers = iter(backend.loglikelihood(requests, disable_tqdm=True))
        seconds = _now(lm.device) - started
    processor = time.process_time() - processor
    chosen = [int(np.argmax([next(answers)[0] for _ in question.options])) for question in asked]
    return Turn(seconds, backend.model_seconds, processor, np.array(chosen))


def main() -> int:
    """Runs in turns and writes the record."""
    parser = argparse.ArgumentParser(description="Scoring by log-probability, ours against lm-evaluation-harness.")
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(AGREEMENT), default="float32")
    options = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    settings = load_run(Path("demo"))
    template = load_prompt(settings.model.prompt)
    with tempfile.TemporaryDirectory() as folder:
        lm = model(Path(folder), options.device, options.dtype)
    asked = questions(settings, options.questions)
    lengths = [len(ids) for ids in encode_texts(lm, [render(lm, template, one, reasoning=False) for one in asked])]
    print(
        f"{len(asked)} questions of {min(lengths)} to {max(lengths)} tokens, {options.device}, {options.dtype}, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    mine = {f"wardround, micro-batch {size}": partial(ours, micro_batch=size) for size in OURS[options.device]}
    theirs = {f"harness, batch {size}": partial(harness, batch_size=size) for size in BATCHES[options.device]}
    turns: dict[str, list[Turn]] = {name: [] for name in (*mine, *theirs)}
    for side in (*mine.values(), *theirs.values()):  # what is done once: kernels chosen, memory taken
        side(lm, asked[:8], template)
    running, load_before = {**mine, **theirs}, os.getloadavg()[0]
    for _ in range(options.repeats):
        for name, side in running.items():
            turn = side(lm, asked, template)
            turns[name].append(turn)
            print(f"{name:28s} {len(asked) / turn.seconds:8.2f} questions/s", flush=True)
        fastest = sorted(theirs, key=lambda name: _median(turns[name], "seconds"))[:AGAIN]
        running = {name: running[name] for name in (*mine, *fastest) if name in running}
    best = {
        part: [min(side, key=lambda name: _median(turns[name], part)) for side in (mine, theirs)]
        for part in ("seconds", "model_seconds")
    }
    ratios = {part: _median(turns[b], part) / _median(turns[a], part) for part, (a, b) in best.items()}
    truth = np.array([question.answer for question in asked])
    first = turns[best["seconds"][0]][0].chosen
    agreement = min(float((turn.chosen == first).mean()) for side in turns.values() for turn in side)
    accuracy = {name: round(float((side[0].chosen == truth).mean()), 4) for name, side in turns.items()}
    agreed = agreement >= AGREEMENT[options.dtype] and (options.dtype != "float32" or len(set(accuracy.values())) == 1)
    met = ratios["seconds"] >= TARGET and agreed
    per_second = {name: round(len(asked) / _median(side, "seconds"), 2) for name, side in turns.items()}
    a, b = best["seconds"]
    print(
        f"{a}: {per_second[a]} questions/s; {b}: {per_second[b]}: {ratios['seconds']:.2f} times (target {TARGET}), "
        f"without making tokens {ratios['model_seconds']:.2f}; the same option of {agreement:.1%} of the questions"
    )
    name = "evaluate" if options.device == "cpu" else f"evaluate_{options.device}"
    payload = {
        "setting": "SmolLM2-135M with the shipped adapter merged in, SUPPORT ICU questions as the demo asks them",
        "lm_eval": version("lm-eval"),
        "questions": len(asked),
        "prompt_tokens_mean": round(statistics.mean(lengths), 1),
        "device": options.device,
        "dtype": options.dtype,
        "torch_threads": torch.get_num_threads(),
        "load_before_and_after": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        "questions_per_second": per_second,
        "seconds": {name: [round(turn.seconds, 2) for turn in side] for name, side in turns.items()},
        "model_seconds": {name: [round(turn.model_seconds, 2) for turn in side] for name, side in turns.items()},
        "processor_seconds": {name: [round(turn.processor, 2) for turn in side] for name, side in turns.items()},
        "accuracy": accuracy,
        "same_choices": agreement,
        "best": best["seconds"],
        "ratio": round(ratios["seconds"], 2),
        "ratio_without_making_tokens": round(ratios["model_seconds"], 2),
        "target": TARGET,
        "target_met": met,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    print(record(name, payload))
    return 0 if met else 1


def _median(side: list[Turn], part: str) -> float:
    return statistics.median(getattr(turn, part) for turn in side)


if __name__ == "__main__":
    sys.exit(main())
