"""A hospital whose worker is killed in the middle of a round: the run ends in the bits of one without a kill."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from wardround.client.site import CHECKPOINT
from wardround.common.config import RunConfig, to_toml
from wardround.server import keeper

from .coordinator_case import Running, make_coordinator, started, wardround
from .site_case import Site, enrolled, new_hospital, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NAMES = ("north", "south", "west")


def settings(base: Path, name: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": name,
            "privacy": {"enabled": False},
            "seed": 3,
            "model": {"id": str(base), "device": "cpu", "prompt": "en_short"},
            "warmup": {"enabled": False},
            "grpo": {
                "local_steps": 20, "patients_per_step": 4, "expectation": "exact", "learning_rate": 0.001,
            },
            "federation": {"rounds": 1, "validation_questions_per_site": 0, "phase_timeout_s": 600},
            "evaluation": {"questions_per_site": 5, "bootstrap_samples": 100, "samples": 0},
        }
    )  # fmt: skip


def submit(coordinator: Running, folder: Path, base: Path, name: str, dictionary: Path) -> None:
    config = folder / f"{name}.toml"
    config.write_text(to_toml(settings(base, name)))
    wardround("server", "run", config, "-C", coordinator.folder.path, "--dictionary", dictionary)


def finished(coordinator: Running, name: str) -> Path | None:
    run = coordinator.folder.run(name)
    return None if keeper.wanted(run) is not None else run / "adapter" / "adapter_model.safetensors"


def test_a_run_with_killed_workers_gives_the_adapter_of_one_without(tmp_path: Path, tiny_model_path: Path):
    folder = make_coordinator(tmp_path / "coordinator")
    nodes = [new_hospital(tmp_path, name) for name in NAMES]
    enrolled(folder, nodes, tmp_path / "mail")
    dictionary = tmp_path / "north-data" / "dictionary.toml"
    with started(folder) as coordinator, ExitStack() as stack:
        sites: list[Site] = [stack.enter_context(running(node)) for node in nodes]
        for site in sites:
            site.until("it is connected", site.connected)
        submit(coordinator, tmp_path, tiny_model_path, "whole", dictionary)
        whole = coordinator.until("the first run ends", lambda: finished(coordinator, "whole"), 600)
        pids = {site: site.worker()["pid"] for site in sites}

        submit(coordinator, tmp_path, tiny_model_path, "killed", dictionary)
        victim = sites[0]

        def training() -> bool:
            now = victim.worker().get("now") or {}
            return now.get("phase") == "train.local" and victim.worker()["pid"] != pids[victim]

        victim.until("it trains in the second run", training, 300)
        os.kill(victim.worker()["pid"], signal.SIGKILL)
        killed = coordinator.until("the second run ends", lambda: finished(coordinator, "killed"), 600)
        assert "going on after this process was ended" in victim.log("worker")
        assert killed.read_bytes() == whole.read_bytes()
        status = victim.status()
        assert status["rounds_trained"] == 2 and status["processes"]["worker"]["restarts"] >= 2
        assert not list(victim.node.state.glob("runs/*/" + CHECKPOINT))
