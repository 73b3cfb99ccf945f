"""One GRPO step, ours against stock trl: python benchmarks/grpo_step.py [--repeats 2] [--device cuda] [--ours-only]

The same work on both sides: 4 questions × 7 completions × 64 sampled tokens, end-of-sequence suppressed, SmolLM2-135M
in float32 with the same LoRA (rank 16, all linear layers, A frozen), dr_grpo, no gradient checkpointing. Rewards
alternate, so every group has variance and none is skipped. Ours also appends the forced answer, 12 tokens a completion
that stock trl does not have: it runs once as hospitals run it, and once with completions cut to the tokens that trl has
too, which is the pair that the target is about. trl runs with micro-batches of 7 and of 28 and its better one counts.
In turns, median over repeats. Prompts are questions of the SUPPORT ICU registry where its packages are installed, else
synthetic, with as many features as a run has by default.

Writes benchmarks/results/grpo_step.json. Target: at least 3 times faster. 5 to 10 minutes for 2 repeats on 2 cores.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from typing import Any, cast

from wardround.common.cli import quiet_third_parties

quiet_third_parties()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from environment import peak_rss_bytes, record  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from transformers.trainer_callback import PrinterCallback  # noqa: E402
from trl.trainer.grpo_config import GRPOConfig  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from wardround.client.grpo import Engine  # noqa: E402
from wardround.common.config import LoraConfig, ModelConfig, QuestionsConfig, RunConfig  # noqa: E402
from wardround.common.lm.lora import prepare_training  # noqa: E402
from wardround.common.lm.models import LanguageModel, load  # noqa: E402
from wardround.common.lm.scoring import encode, render  # noqa: E402
from wardround.common.question import PromptTemplate, Question, load_prompt  # noqa: E402

QUESTIONS, GROUP, TOKENS = 4, 7, 64
FEATURES = QuestionsConfig().features_per_record  # prompts of about 230 tokens
TARGET = 3.0


def questions(template: PromptTemplate) -> tuple[list[Question], str]:
    """Four questions and where they come from."""
    from wardround.client.questions import QuestionBuilder
    from wardround.common.counts import count
    from wardround.common.errors import WardroundError
    from wardround.common.schema import derive_schema
    from wardround.simulations import registries

    try:
        registry, name = registries.load("support_icu"), "SUPPORT ICU"
    except (WardroundError, ImportError):
        return [_synthetic(index) for index in range(QUESTIONS)], "synthetic"
    settings = QuestionsConfig(features_per_record=FEATURES)
    schema = derive_schema(count(registry.values, registry.dictionary), registry.dictionary, settings)
    builder = QuestionBuilder(registry, schema, template, settings)
    rng = np.random.default_rng(0)
    return builder.build(rng.choice(len(registry), 4 * QUESTIONS), rng)[:QUESTIONS], name


def _synthetic(index: int) -> Question:
    record_ = "\n".join(f"Laboratory value {k}: {100 + 7 * k + index} mmol/L" for k in range(FEATURES))
    options = tuple(str(120 + 9 * k) for k in range(5))
    listed = "\n".join(f"{letter}. {value} mmHg" for letter, value in zip("ABCDE", options, strict=True))
    text = f"Patient record\n\n{record_}\n\nQuestion: What would be the masked value of 'Pressure'?\n\n{listed}"
    return Question("pressure", "Vital signs", "feature", text, options, answer=index % 5, majority=0)


class Four:
    """A source of exactly the four questions: every patient is drawn with probability 1."""

    n_patients = QUESTIONS

    def __init__(self, asked: list[Question]) -> None:
        self.asked = asked

    def draw(self, patient_indices: np.ndarray, rng: np.random.Generator) -> list[Question]:
        return [self.asked[index] for index in patient_indices]


def alternating(prompts: list[Any], **_: Any) -> list[float]:
    """Rewards 0, 1, 0, 1, …: every group has variance, whatever was sampled."""
    return [float(row % 2) for row in range(len(prompts))]


class StepTimer(TrainerCallback):
    """Seconds of every optimizer step, of its optimizer part, and of processor time (on a busy machine the better)."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.optimizer: list[float] = []
        self.processor: list[float] = []
        self._began = self._optimizer_began = self._processor_began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        _synchronise()
        self._began, self._processor_began = time.perf_counter(), time.process_time()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        _synchronise()
        self._optimizer_began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        _synchronise()
        self.steps.append(time.perf_counter() - self._began)
        self.optimizer.append(time.perf_counter() - self._optimizer_began)
        self.processor.append(time.process_time() - self._processor_began)


class Unforced(Engine):
    """Completions without the forced answer, which the rollout still makes: the tokens of stock trl's."""

    def _rollouts(self, asked: list[Any]) -> list[Any]:
        completions = super()._rollouts(asked)
        for completion in completions:
            for name in ("ids", "targets", "in_loss", "log_probs"):
                del getattr(completion, name)[TOKENS:]
            completion.forced = False
        return completions


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ours(
    lm: LanguageModel, template: PromptTemplate, asked: list[Question], kind: type[Engine] = Engine
) -> dict[str, float]:
    """One step of client/grpo.py."""
    config = RunConfig.model_validate(
        {
            "name": "benchmark",
            "privacy": {"enabled": False},
            "questions": {"reasoning_tokens": TOKENS},
            "grpo": {"local_steps": 1, "patients_per_step": QUESTIONS, "group_size": GROUP},
        }
    )
    lm.reset(0)
    timer = StepTimer()
    prepare_training(lm.model)
    engine = kind(lm, Four(asked), template, config, seed=0)
    engine.reward_funcs, engine.never_generated = [alternating], sorted(engine.answering.ends)
    engine.add_callback(timer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.train()
    engine.close()
    if engine.counts.completion_tokens != QUESTIONS * GROUP * TOKENS:
        raise SystemExit(f"expected {QUESTIONS * GROUP * TOKENS} sampled tokens, got {engine.counts.completion_tokens}")
    phases = {"rollout": engine.phase_seconds["rollout"], "forward_backward": engine.phase_seconds["loss"]}
    return {"step": timer.steps[0], **phases, "optimizer": timer.optimizer[0], "processor": timer.processor[0]}


def stock(lm: LanguageModel, template: PromptTemplate, asked: list[Question], micro_batch: int) -> dict[str, float]:
    """One step of trl's own trainer on the same prompts and the same trainable tensors."""
    lm.reset(0)
    prompts = [render(lm, template, question, reasoning=True) for question in asked]
    ends = [lm.tokenizer.eos_token_id]
    base = lm.model.get_base_model()
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = GRPOConfig(
            output_dir=folder,
            use_cpu=lm.device.type == "cpu",
            bf16=False,
            max_steps=1,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=QUESTIONS * GROUP // micro_batch,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            temperature=1.0,
            generation_kwargs={"suppress_tokens": ends},
            loss_type="dr_grpo",
            beta=0.0,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            optim="adamw_torch",
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=lm.model,
            args=arguments,
            reward_funcs=cast(Any, alternating),
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=lm.tokenizer,
            callbacks=[timer],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    vars(base).pop("forward", None)
    lm.model.eval()
    lm.model.zero_grad(set_to_none=True)
    return {"step": timer.steps[0], "optimizer": timer.optimizer[0], "processor": timer.processor[0]}


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """Median of every phase over the runs."""
    return {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}


def main() -> None:
    """Runs in turns and writes the record."""
    parser = argparse.ArgumentParser(description="One GRPO step, ours against stock trl.")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ours-only", action="store_true", help="no stock trl, nothing written")
    options = parser.parse_args()
    template = load_prompt("en_short")
    lm = load(ModelConfig(device=options.device), LoraConfig(), seed=0)
    asked, source = questions(template)
    lengths = [len(encode(lm, template, question, reasoning=True)) for question in asked]
    print(f"{source} prompts of {lengths} tokens, {torch.get_num_threads()} threads, {options.device}", flush=True)
    sides = {
        "ours": lambda: ours(lm, template, asked, Unforced),
        "ours, forced answers": lambda: ours(lm, template, asked),
    }
    if not options.ours_only:
        sides["trl, micro-batch 7"] = lambda: stock(lm, template, asked, 7)
        sides["trl, micro-batch 28"] = lambda: stock(lm, template, asked, 28)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(options.repeats):
        for name, side in sides.items():
            runs[name].append(side())
            print(f"{name:22s}", {key: round(value, 2) for key, value in runs[name][-1].items()}, flush=True)
    if options.ours_only:
        return
    medians = {name: median(one) for name, one in runs.items()}
    best = min((name for name in runs if name.startswith("trl")), key=lambda name: medians[name]["step"])
    ratio, forced = (medians[best]["step"] / medians[name]["step"] for name in ("ours", "ours, forced answers"))
    print(
        f"ours {medians['ours']['step']} s, {best} {medians[best]['step']} s: {ratio:.2f} times (target {TARGET}); "
        f"with forced answers, which trl does not have, {forced:.2f} times"
    )
    payload = {
        "setting": f"{QUESTIONS} questions x {GROUP} completions x {TOKENS} tokens, SmolLM2-135M fp32, LoRA ffa r=16",
        "prompts": source,
        "prompt_tokens": lengths,
        "device": options.device,
        "torch_threads": torch.get_num_threads(),
        "median_seconds": medians,
        "runs_seconds": runs,
        "better_trl": best,
        "speedup": round(ratio, 2),
        "speedup_with_forced_answers": round(forced, 2),
        "target": TARGET,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    print(record("grpo_step" if options.device == "cpu" else f"grpo_step_{options.device}", payload))


if __name__ == "__main__":
    main()
