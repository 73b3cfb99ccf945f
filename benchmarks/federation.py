"""In-process federation: memory with 32 sites against 4, and what a round costs beside training and evaluation.

    python benchmarks/federation.py

Each number of sites is one run in a process of its own, with the same number of local trainings in all (a process grows
slowly with trainings, whoever does them): real Flower messages, real site folders, registry, ledger and
journal; a small but complete language model (tests/tiny.py), because what is measured is everything but the model; its
adapter is large for it (0.8 million trained values, 3.1 MB), so that a vector kept per site would show.
With secure sums, as hospitals run, and without, as a simulation may: the difference is what masks, signatures and the
book of sums cost. Peak memory is the process's largest resident size. Overhead is the rounds' wall time less what was
spent inside `train_local_round` and `evaluate_questions`, over sites and rounds. Targets: memory within 15 %, at most
0.1 s a site and round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

LOCAL_ROUNDS = 64  # sites × rounds: the same number of trainings, so that only the number of sites differs
SITES = (4, 32)
MEMORY_TARGET, OVERHEAD_TARGET_S = 1.15, 0.1


def settings(model: Path, sites: int, sums: str) -> dict[str, Any]:
    """The run: the same work at every site, however many there are."""
    return {
        "name": "benchmark",
        "privacy": {"enabled": False},
        "seed": 5,
        "model": {"id": str(model), "device": "cpu", "prompt": "en_short"},
        "warmup": {"enabled": False},
        "lora": {"rank": 1024, "alpha": 64},
        "grpo": {"local_steps": 2, "patients_per_step": 4, "expectation": "exact"},
        "federation": {
            "rounds": LOCAL_ROUNDS // sites,
            "validation_questions_per_site": 6,
            "patience": 99,
            "secure_aggregation": sums,
            "rollback_tolerance": 1.0,
        },
        "evaluation": {"questions_per_site": 6, "samples": 0, "bootstrap_samples": 100},
        "simulation": {"registry": "synthetic", "sites": sites},
    }


def one_run(sites: int, sums: str, model: Path, out: Path) -> dict[str, Any]:
    """One federation in this process."""
    from environment import peak_rss_bytes
    from wardround.client import evaluation, grpo
    from wardround.common.config import RunConfig
    from wardround.simulations.federation import simulate

    inside = {"wall": 0.0, "cpu": 0.0}

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            try:
                return work(*args, **kwargs)
            finally:
                inside["wall"] += time.perf_counter() - wall
                inside["cpu"] += time.process_time() - cpu

        return run

    # The site's functions look these up when they are called; imported above, so that trl's import is not counted.
    grpo.train_local_round = timed(grpo.train_local_round)
    evaluation.evaluate_questions = timed(evaluation.evaluate_questions)
    seen: list[dict[str, float]] = []

    def look() -> None:
        now = {"wall": time.perf_counter(), "cpu": time.process_time()}
        seen.append({kind: now[kind] - inside[kind] for kind in now})

    class Watch:
        """Reads the clocks, less what was spent in the model, when round 1 begins and when a round ends."""

        def begin(self, phase: str, round_index: int, sites: list[str]) -> None:
            if phase == "train" and round_index == 1:
                look()

        def round_done(self, record: dict[str, Any], rounds: int) -> None:
            look()

        def answered(self, phase: str, site: str, code: str) -> None: ...
        def warming_up(self, done: int, total: int, loss: float) -> None: ...
        def at_site(self, site: str, what: str, done: int, total: int) -> None: ...
        def note(self, text: str) -> None: ...

    config = RunConfig.model_validate(settings(model, sites, sums))
    simulate(config, out, resume=False, progress=Watch())  # type: ignore[arg-type]
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    overhead = {kind: (seen[-1][kind] - seen[0][kind]) / sites / len(records) for kind in ("wall", "cpu")}
    return {
        "sites": sites,
        "secure_aggregation": sums,
        "rounds": len(records),
        "peak_rss_mb": round(peak_rss_bytes() / 2**20, 1),
        "rounds_wall_s": round(sum(record["seconds"] for record in records), 3),
        "overhead_s_per_site_and_round": round(overhead["wall"], 4),
        "overhead_cpu_s_per_site_and_round": round(overhead["cpu"], 4),
        "bytes_up_per_site_and_round": round(sum(record["bytes_up"] for record in records) / sites / len(records)),
    }


def main() -> int:
    """Runs every number of sites in its own process, writes benchmarks/results/federation.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sums", default="bonawitz", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from wardround.common.cli import quiet_third_parties

    quiet_third_parties()
    if asked.one:
        print(json.dumps(one_run(asked.one, asked.sums, asked.folder / "model", asked.folder / "run")))
        return 0
    from environment import record

    from tests.tiny import tiny_model

    results: dict[str, list[dict[str, Any]]] = {"bonawitz": [], "none": []}
    environment = {**os.environ}
    with tempfile.TemporaryDirectory() as name:
        tiny_model(Path(name) / "model")
        environment["WARDROUND_CACHE"] = f"{name}/cache"
        for sums, runs in results.items():
            for sites in SITES:
                shutil.rmtree(Path(name) / "run", ignore_errors=True)
                command = [sys.executable, __file__, "--one", str(sites), "--sums", sums, "--folder", name]
                done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
                if done.returncode:
                    print(done.stderr, file=sys.stderr)
                    return 1
                runs.append(json.loads(done.stdout.splitlines()[-1]))
                print(runs[-1], flush=True)
    secure = results["bonawitz"]
    ratio = secure[-1]["peak_rss_mb"] / secure[0]["peak_rss_mb"]
    overhead, plain = (max(run["overhead_s_per_site_and_round"] for run in runs) for runs in results.values())
    # Other processes on the machine lengthen wall time: the file says how busy it was.
    met = ratio <= MEMORY_TARGET and overhead <= OVERHEAD_TARGET_S
    path = record(
        "federation",
        {
            "runs": [*secure, *results["none"]],
            "memory_ratio": round(ratio, 3),
            "memory_ratio_target": MEMORY_TARGET,
            "overhead_s_per_site_and_round": overhead,
            "overhead_without_secure_sums_s": plain,
            "overhead_target_s": OVERHEAD_TARGET_S,
            "load_average": [round(value, 2) for value in os.getloadavg()],
            "met": met,
        },
    )
    print(
        f"memory with {SITES[-1]} sites: {ratio:.3f} × that with {SITES[0]}; overhead {overhead:.3f} s, "
        f"without secure sums {plain:.3f} s; {path}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
