"""Is it the reward or the adapter? One relation of the sanity registry, learnt by cross-entropy or by expected reward.

    python benchmarks/relation.py --target signal_c [--order sorted] [--loss reward] [--start fresh] [--device cuda]

With shuffled options `wardround simulate experiment sanity` does not learn relations between different words
(docs/results.md). Here nothing is in the way of one: a single process, no federation, no privacy, no validation gate,
every question about one feature, every line of the record shown, Adam on the trained tensors. If cross-entropy, which
knows the answer, does not learn it either, the reward is not what stands in the way. With `--order sorted` a letter is
the same level every time. The reward is scaled by its group, as in training. Prints accuracy on held-out rows every 50
steps and writes benchmarks/results/relation_TARGET_LOSS_STRATEGY_START.json, with what else was set in its name. No
target of its own: it looks for a cause.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from wardround.common.cli import quiet_third_parties

quiet_third_parties()

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
from environment import record  # noqa: E402
from wardround.client.grpo_loss import exact_loss  # noqa: E402
from wardround.client.questions import QuestionBuilder  # noqa: E402
from wardround.client.registry import to_registry  # noqa: E402
from wardround.common.config import LoraConfig, ModelConfig, load_run  # noqa: E402
from wardround.common.counts import count  # noqa: E402
from wardround.common.lm.answers import answer_questions  # noqa: E402
from wardround.common.lm.merge import merge_adapter  # noqa: E402
from wardround.common.lm.models import LanguageModel, load  # noqa: E402
from wardround.common.lm.prefix import causal_model  # noqa: E402
from wardround.common.lm.scoring import encode_texts, hidden_states, option_token_ids, render  # noqa: E402
from wardround.common.question import PromptTemplate, Question, load_prompt  # noqa: E402
from wardround.common.schema import derive_schema  # noqa: E402
from wardround.server.warmup import load_released  # noqa: E402
from wardround.simulations.experiments import sanity  # noqa: E402

ROWS, SEED = 12_000, 1


def model(settings: ModelConfig, strategy: str, start: str) -> LanguageModel:
    """Where training begins: the shipped adapter or a fresh one; under `full` all weights, the adapter merged in."""
    lora = LoraConfig.model_validate({"strategy": "ffa" if strategy == "full" else strategy})
    lm = load(settings, lora, seed=0)
    if start == "released":
        lm.set_vector(load_released("smollm2-135m", lm).vector_full, trainable_only=False)
    if strategy != "full":
        return lm
    with tempfile.TemporaryDirectory() as folder:
        lm.save_adapter(Path(folder) / "adapter")
        merge_adapter(lm.path, Path(folder) / "adapter", Path(folder) / "model")
        merged = settings.model_copy(update={"id": str(Path(folder) / "model"), "dtype": "float32"})
        return load(merged, LoraConfig(strategy="full"), seed=0)


def loss_of(
    lm: LanguageModel, asked: list[Question], template: PromptTemplate, kind: str, bonus: float
) -> torch.Tensor:
    """Mean loss of one question each: cross-entropy over its options, or GRPO's with the exact expectation."""
    texts = [render(lm, template, question, reasoning=False) for question in asked]
    prompts, widest = encode_texts(lm, texts), max(len(question.options) for question in asked)
    letters = torch.tensor(option_token_ids(lm.tokenizer, texts[0], widest), device=lm.device)
    last = torch.tensor([len(ids) - 1 for ids in prompts], device=lm.device)
    states = hidden_states(lm, prompts)[torch.arange(len(prompts), device=lm.device), last]
    logits = causal_model(lm).get_output_embeddings()(states).float()[:, letters]
    own = torch.tensor([len(question.options) for question in asked], device=lm.device)
    logits = logits.masked_fill(torch.arange(widest, device=lm.device) >= own[:, None], -torch.inf)
    truth = torch.tensor([question.answer for question in asked], device=lm.device)
    if kind == "cross-entropy":
        return torch.nn.functional.cross_entropy(logits, truth)
    return exact_loss(logits.log_softmax(-1), truth, "group", bonus).mean()


def main() -> int:
    """Trains, and tells accuracy as it goes."""
    parser = argparse.ArgumentParser(description="One relation of the sanity registry, by cross-entropy or by reward.")
    parser.add_argument("--target", default="signal_c", help="features with commas between them, or all")
    parser.add_argument("--loss", choices=("cross-entropy", "reward"), default="cross-entropy")
    parser.add_argument("--start", choices=("released", "fresh"), default="released")
    parser.add_argument("--strategy", choices=("ffa", "fedit", "full"), default="ffa")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--order", choices=("shuffled", "sorted"), default="shuffled")
    parser.add_argument("--entropy-bonus", type=float, default=0.0)
    options = parser.parse_args()
    targets = list(sanity.LEVELS) if options.target == "all" else options.target.split(",")
    if not set(targets) <= set(sanity.LEVELS):
        parser.error(f"--target: expected some of {', '.join(sanity.LEVELS)}")
    if options.entropy_bonus < 0 or (options.entropy_bonus and options.loss != "reward"):
        parser.error("--entropy-bonus: expected 0 or more, and --loss reward")
    if options.held_out < 20 * len(targets):
        parser.error(f"--held-out: expected {20 * len(targets)} or more for so many features")
    config = load_run(
        Path("sanity-smollm2"), (f"model.device='{options.device}'", f"questions.option_order='{options.order}'")
    )
    table, dictionary = sanity.make(ROWS, SEED)
    registry = to_registry("sanity", pa.Table.from_pandas(table, preserve_index=False), dictionary)
    schema = derive_schema(count(registry.values, dictionary), dictionary, config.questions)
    template = load_prompt(config.model.prompt)
    builder = QuestionBuilder(registry, schema, template, config.questions)
    rng = np.random.default_rng(SEED)
    rows = rng.permutation(len(registry))
    held_out = builder.build(rows[: options.held_out], np.random.default_rng(0), targets=targets)
    lm = model(config.model, options.strategy, options.start)
    parameters = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.0)
    curve: list[tuple[int, float, float]] = []
    seen, started = options.held_out, time.perf_counter()
    losses: list[float] = []
    by_target: dict[str, float] = {}
    for step in range(options.steps + 1):
        if step % 50 == 0 or step == options.steps:
            answers = answer_questions(lm, held_out, template, reasoning_tokens=0, micro_batch=32)
            curve.append(
                (step * options.batch, float(answers.correct.mean()), float(np.mean(losses[-50:] or [np.nan])))
            )
            asked = np.array([question.target for question in held_out])
            by_target = {name: float(answers.correct[asked == name].mean()) for name in targets}
            seconds = time.perf_counter() - started
            print(
                f"{curve[-1][0]:6d} questions: {curve[-1][1]:.3f} right, loss {curve[-1][2]:.3f}, {seconds:.0f} s"
                + "".join(f", {name} {right:.2f}" for name, right in by_target.items() if len(targets) > 1),
                flush=True,
            )
        if step == options.steps:
            break
        for group in optimizer.param_groups:  # five steps up, then down to a tenth
            group["lr"] = options.rate * min(1.0, (step + 1) / 5) * (1 - 0.9 * step / options.steps)
        drawn = rows[np.arange(seen, seen + options.batch) % len(rows)]
        seen += options.batch
        loss = loss_of(lm, builder.build(drawn, rng, targets=targets), template, options.loss, options.entropy_bonus)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    best = {name: sanity.best_accuracy(name) for name in targets}
    chance = {name: 1 / len(sanity.LEVELS[name]) for name in targets}
    for name, right in by_target.items():
        print(f"{name}: {right:.3f}, chance {chance[name]:.3f}, best {best[name]:.3f}")
    payload = {
        "command": " ".join(["python", *sys.argv]),
        "features": {
            name: {"accuracy": right, "chance": chance[name], "best": best[name]} for name, right in by_target.items()
        },
        "trained_values": sum(parameter.numel() for parameter in parameters),
        "dtype": str(lm.dtype),
        "curve": [
            {"questions": n, "accuracy": right, "loss": None if np.isnan(loss) else loss} for n, right, loss in curve
        ],
    }
    setting = [options.target.replace(",", "-"), options.loss.replace("-", "_"), options.strategy, options.start]
    setting += ["sorted"] if options.order == "sorted" else []
    setting += [f"entropy_{options.entropy_bonus:g}"] if options.entropy_bonus else []
    setting += [f"rate_{options.rate:g}"] if options.rate != parser.get_default("rate") else []
    print(record("_".join(["relation", *setting]), payload))
    return 0


if __name__ == "__main__":
    sys.exit(main())
