"""A training round with and without differential privacy: python benchmarks/dp_step.py [--repeats 3] [--reasoning 64]

The same patients and completions on both sides: SmolLM2-135M, LoRA rank 16 (A frozen), the demo's questions on the
SUPPORT ICU registry, answer-only with the exact expectation, or with --reasoning tokens of sampled text in groups of 7.
Privacy off runs as it runs fastest; privacy on clips the gradients of single patients, all told apart in the same
backward pass, and adds noise from the site's AES stream. Everybody is drawn in every step, so that both sides have the
same patients. In turns, median over repeats; peak memory of each side in a process of its own.

Writes benchmarks/results/dp_step.json. Targets: at most 1.15 times the step time and 1.1 times the memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from wardround.common.cli import quiet_third_parties

quiet_third_parties()

import numpy as np  # noqa: E402
from environment import peak_rss_bytes, record  # noqa: E402
from wardround.client.folder import TrainingPatients  # noqa: E402
from wardround.client.grpo import train_local_round  # noqa: E402
from wardround.client.private_optimizer import PrivateSteps  # noqa: E402
from wardround.client.questions import QuestionBuilder  # noqa: E402
from wardround.common.config import LoraConfig, ModelConfig, RunConfig  # noqa: E402
from wardround.common.counts import count  # noqa: E402
from wardround.common.lm.models import load  # noqa: E402
from wardround.common.question import load_prompt  # noqa: E402
from wardround.common.schema import derive_schema  # noqa: E402
from wardround.simulations import registries  # noqa: E402

PATIENTS, STEPS = 8, 2
TIME_TARGET, MEMORY_TARGET = 1.15, 1.1
SIDES = ("off", "on")


class Benchmark:
    """Model and patients, once; a round of either side."""

    def __init__(self, device: str, reasoning: int) -> None:
        self.config = RunConfig.model_validate(
            {
                "name": "benchmark",
                "privacy": {"enabled": False},
                "questions": {
                    "features_per_record": 6,
                    "context": "informative",
                    "outcome_share": 0.1,
                    "reasoning_tokens": reasoning,
                },
                "grpo": {
                    "local_steps": STEPS,
                    "patients_per_step": PATIENTS,
                    "expectation": "sampled" if reasoning else "exact",
                },
            }
        )
        registry, self.template = registries.load("support_icu"), load_prompt("en_short")
        schema = derive_schema(count(registry.values, registry.dictionary), registry.dictionary, self.config.questions)
        builder = QuestionBuilder(registry, schema, self.template, self.config.questions)
        self.source = TrainingPatients(builder, [np.array([row]) for row in range(PATIENTS)], list(schema.names))
        self.lm = load(ModelConfig.model_validate({"device": device}), LoraConfig(), seed=0)

    def round(self, side: str) -> dict[str, float]:
        """Seconds of one round, and of its parts."""
        self.lm.reset(0)
        private = PrivateSteps(1.0, 0.1, 1.0, float(PATIENTS)) if side == "on" else None
        began = time.perf_counter()
        result = train_local_round(self.lm, self.source, self.template, self.config, seed=1, private=private)
        seconds = time.perf_counter() - began
        if result.questions != STEPS * PATIENTS:
            raise SystemExit(f"expected {STEPS * PATIENTS} questions, got {result.questions}")
        return {"seconds": seconds / STEPS, **{name: part / STEPS for name, part in result.phase_seconds.items()}}


def main() -> int:
    """Runs both sides in turns, and each once in its own process for the memory."""
    parser = argparse.ArgumentParser(description="A training round with and without differential privacy.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reasoning", type=int, default=0, help="tokens of sampled text; 0: answer-only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    benchmark = Benchmark(asked.device, asked.reasoning)
    if asked.memory:
        benchmark.round(asked.memory)
        print(json.dumps({"peak_rss_bytes": peak_rss_bytes()}))
        return 0
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for side in SIDES:  # once for nothing: first calls allocate
        benchmark.round(side)
    for _ in range(asked.repeats):
        for side in SIDES:
            runs[side].append(benchmark.round(side))
            print(f"privacy {side:4s}", {key: round(value, 2) for key, value in runs[side][-1].items()}, flush=True)
    memory: dict[str, int] = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--memory", side, "--reasoning", str(asked.reasoning)]
        done = subprocess.run([*command, "--device", asked.device], capture_output=True, text=True, check=True)
        memory[side] = int(json.loads(done.stdout.splitlines()[-1])["peak_rss_bytes"])
    medians = {side: statistics.median(run["seconds"] for run in runs[side]) for side in SIDES}
    slower, larger = medians["on"] / medians["off"], memory["on"] / memory["off"]
    met = slower <= TIME_TARGET and larger <= MEMORY_TARGET
    payload: dict[str, Any] = {
        "setting": f"{PATIENTS} patients a step, SmolLM2-135M {benchmark.lm.dtype}, LoRA ffa r=16",
        "reasoning_tokens": asked.reasoning,
        "device": asked.device,
        "seconds_a_step": {side: round(value, 3) for side, value in medians.items()},
        "runs": runs,
        "peak_rss_bytes": memory,
        "time_ratio": round(slower, 3),
        "time_target": TIME_TARGET,
        "memory_ratio": round(larger, 3),
        "memory_target": MEMORY_TARGET,
        "met": met,
    }
    print(f"privacy on: {slower:.3f} times the time (at most {TIME_TARGET}), {larger:.3f} the memory ({MEMORY_TARGET})")
    name = "dp_step" + (f"_{asked.reasoning}" if asked.reasoning else "") + ("" if asked.device == "cpu" else "_cuda")
    print(record(name, payload))
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
