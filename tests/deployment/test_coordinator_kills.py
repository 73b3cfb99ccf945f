"""A run whose coordinator is killed and stopped in the middle of secure sums: it goes on, and loses nothing."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from wardround.common.config import RunConfig
from wardround.server import run_status
from wardround.simulations.deployment import Deployment, deployment

from ..server.superlink_case import missing

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing()), reason=f"Flower's commands are not beside this Python: {missing()}"),
]
SITES, ROUNDS = 3, 2


def config(base: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "trial",
            "privacy": {"enabled": False},
            "seed": 3,
            "model": {"id": str(base), "device": "cpu", "prompt": "en_short"},
            "warmup": {"enabled": False},
            "grpo": {"local_steps": 2, "patients_per_step": 4, "expectation": "exact", "learning_rate": 0.01},
            "federation": {"rounds": ROUNDS, "validation_questions_per_site": 0, "phase_timeout_s": 300},
            "evaluation": {"questions_per_site": 10, "bootstrap_samples": 100, "samples": 0},
            "simulation": {"registry": "synthetic", "sites": SITES},
        }
    )


def follow(made: Deployment, faults: dict[tuple[str, int], Callable[[dict[str, Any]], None]]) -> dict[str, Any]:
    """Causes each fault as its phase begins, until the run has ended; what it last said."""
    left, deadline = dict(faults), time.monotonic() + 1500
    while time.monotonic() < deadline:
        said = run_status.read(made.run_folder)
        if said.get("ended") and said["ended"]["code"] == "":
            assert not left, f"never came to {list(left)}"
            return said
        cause = left.pop((said.get("phase", ""), said.get("round", 0)), None) if said.get("ended") is None else None
        if cause is not None:
            cause(said)
        time.sleep(0.1)
    raise AssertionError(f"{run_status.read(made.run_folder)}\n{made.coordinator.log('runs')}")


def test_a_run_goes_on_after_each_process_of_the_coordinator_was_killed_and_after_a_stop(
    tmp_path: Path, tiny_model_path: Path
) -> None:
    with deployment(tmp_path / "d", config(tiny_model_path), OMP_NUM_THREADS="1") as made:

        def stop_and_resume(said: dict[str, Any]) -> None:
            made.call("server", "stop", "trial", "-C", made.coordinator.folder)
            assert not run_status.alive(said)
            assert made.status()["run"]["state"] == "stopped"
            made.call("server", "run", "trial", "--resume", "-C", made.coordinator.folder)

        made.submit()
        said = follow(
            made,
            {
                ("counts: consistency", 0): stop_and_resume,
                ("train: masked", 1): lambda said: os.kill(said["pid"], signal.SIGKILL),
                ("train: shares", 2): lambda _: made.kill("coordinator", "superlink") and None,
                ("evaluate: shares", 2): lambda _: made.kill("coordinator", "serverapps") and None,
            },
        )
        assert said["rounds_done"] == ROUNDS
        assert {site["rounds"] for site in said["sites"].values()} == {ROUNDS} and len(said["sites"]) == SITES
        restarts = {name: one["restarts"] for name, one in made.status()["processes"].items()}
        assert restarts == {"superlink": 1, "serverapps": 1, "runs": 0}
        ledgers = sorted(made.out.glob("hospitals/*/state/ledger.jsonl"))
        assert len(ledgers) == SITES
        # What was asked for again after a kill is in the ledgers as what left; receipts and ledgers agree on all of it.
        for ledger in ledgers:
            lines = [json.loads(line) for line in ledger.read_text().splitlines()]
            assert {line["round"] for line in lines if line["phase"] == "train.local"} == {1, 2}
        roster = made.coordinator.folder / "roster.json"
        done = made.call("server", "receipts", "check", made.run_folder, *ledgers, "--roster", roster)
        assert done.returncode == 0
