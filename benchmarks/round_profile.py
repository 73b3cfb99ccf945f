"""Where the time of one local round goes: python benchmarks/round_profile.py [CONFIG] [--device cuda] [--steps 12]

One hospital's round of a config's training (default: learn), on SUPPORT ICU, SmolLM2: host time by what asked for it
(questions, prompts, forward, backward, optimizer, the trainer around them) and, on a GPU, the time in which a kernel
ran. The first steps, which warm up, are not counted. Writes benchmarks/results/round_profile[_cuda].json.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wardround.common.cli import quiet_third_parties

quiet_third_parties()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from environment import record  # noqa: E402
from wardround.client import grpo  # noqa: E402
from wardround.client.folder import TrainingPatients  # noqa: E402
from wardround.client.questions import QuestionBuilder  # noqa: E402
from wardround.client.registry import split_rows  # noqa: E402
from wardround.common.config import load_run  # noqa: E402
from wardround.common.counts import count  # noqa: E402
from wardround.common.lm.models import load  # noqa: E402
from wardround.common.question import load_prompt  # noqa: E402
from wardround.common.schema import derive_schema  # noqa: E402
from wardround.server.warmup import round_zero_adapter  # noqa: E402
from wardround.simulations.federation import divide, load_registry, split_key  # noqa: E402

WARM = 3  # steps that are not counted


class Clock:
    """Exclusive host seconds by name; on a GPU every boundary waits for it, so a name's time includes its kernels'."""

    def __init__(self, wait: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.wait, self.inside, self.since = wait, ["trainer"], time.perf_counter()

    def turn(self) -> None:
        if self.wait:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self.inside[-1]] += now - self.since
        self.since = now

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        self.turn()
        self.inside.append(name)
        try:
            yield
        finally:
            self.turn()
            self.inside.pop()

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.of(name):
                return function(*args, **kwargs)

        return call


def main() -> None:
    """Runs a round with the clock, and one with torch's profiler on a GPU."""
    parser = argparse.ArgumentParser(description="Where the time of one local round goes.")
    parser.add_argument("config", nargs="?", type=Path, default=Path("learn"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="override a config key")
    asked = parser.parse_args()
    config = load_run(
        asked.config, [f"model.device={asked.device}", f"grpo.local_steps={asked.steps + WARM}", *asked.overrides]
    )
    registry = load_registry(config)
    site = registry.take(divide(registry, config)[0])
    train = site.take(split_rows(site, bytes.fromhex(split_key(config)))["train"])
    schema = derive_schema(count(train.values, train.dictionary), train.dictionary, config.questions)
    template = load_prompt(config.model.prompt)
    builder = QuestionBuilder(train, schema, template, config.questions)
    source = TrainingPatients(builder, [np.array([row]) for row in range(len(train))], list(schema.names))
    lm = load(config.model, config.lora, seed=config.seed)
    round_zero_adapter(lm, config)

    clock = Clock(asked.device == "cuda")
    TrainingPatients.draw = clock.wrapped(TrainingPatients.draw, "questions")  # type: ignore[method-assign]
    grpo.render = clock.wrapped(grpo.render, "prompts: chat template")
    grpo.encode_texts = clock.wrapped(grpo.encode_texts, "prompts: tokens")
    engine = grpo.Engine
    engine._exact_loss = clock.wrapped(engine._exact_loss, "forward")  # type: ignore[method-assign]
    engine._generate_and_score_completions = clock.wrapped(  # type: ignore[method-assign]
        engine._generate_and_score_completions, "rollout"
    )
    engine.compute_loss = clock.wrapped(engine.compute_loss, "forward")  # type: ignore[method-assign]
    made = engine.create_optimizer

    def create_optimizer(self: Any, *args: Any) -> Any:
        optimizer = made(self, *args)
        optimizer.step = clock.wrapped(optimizer.step, "optimizer")
        self.accelerator.backward = clock.wrapped(self.accelerator.backward, "backward")
        return optimizer

    engine.create_optimizer = create_optimizer  # type: ignore[method-assign]
    marks: list[tuple[float, dict[str, float]]] = []

    def on_step(done: int, steps: int, mean: float) -> None:
        if done in (WARM, steps):
            clock.turn()
            marks.append((time.perf_counter(), dict(clock.seconds)))

    result = grpo.train_local_round(lm, source, template, config, seed=1, on_step=on_step)
    (began, before), (ended, after) = marks
    step = (ended - began) / asked.steps
    shares = {name: round((after[name] - before.get(name, 0)) / asked.steps, 5) for name in after}
    print(f"{step:.3f} s a step of {result.questions / result.steps:.1f} questions, {asked.device}")
    for name, seconds in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"  {name:26s}{1000 * seconds:8.1f} ms  {seconds / step:5.0%}")
    payload: dict[str, Any] = {
        "config": str(asked.config),
        "overrides": asked.overrides,
        "questions_per_step": result.questions / result.steps,
        "seconds_per_step": step,
        "seconds_by_part": shares,
    }
    if asked.device == "cuda":
        payload |= kernels(lm, source, template, config)
    print(record("round_profile" if asked.device == "cpu" else f"round_profile_{asked.device}", payload))


def kernels(lm: Any, source: Any, template: Any, config: Any) -> dict[str, Any]:
    """Kernel time of a round without the clock's waiting, and the dearest kernels."""
    from torch.profiler import ProfilerActivity, profile

    began = time.perf_counter()
    grpo.train_local_round(lm, source, template, config, seed=2)
    wall = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        grpo.train_local_round(lm, source, template, config, seed=2)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in events) / 1e6
    print(f"a round: {wall:.2f} s, {total:.2f} s of it with a kernel running, {sum(e.count for e in events):,} kernels")
    dearest = [(e.key[:90], e.count, e.self_device_time_total / 1e6) for e in events[:12]]
    for name, number, seconds in dearest:
        print(f"  {seconds:7.3f} s {number:7,}  {name}")
    return {"round_seconds": wall, "kernel_seconds": total, "kernels": sum(e.count for e in events), "dearest": dearest}


if __name__ == "__main__":
    main()
