"""Processes of hospitals and of the coordinator are killed in every phase of a run: it ends in the same bits."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from wardround.client.site import CHECKPOINT
from wardround.common.config import RunConfig, to_toml
from wardround.server import keeper

from .coordinator_case import Running, make_coordinator, started, wardround
from .site_case import Site, client, enrolled, new_hospital, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NAMES = ("north", "south", "west")
PHASES = (
    "query.warmup", "query.count", "query.shares", "query.mask", "query.survivors", "query.unmask", "query.schema",
    "train.local", "evaluate.test", "query.finalize",
)  # fmt: skip


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


@dataclass
class World:
    """A coordinator and three hospitals that run, and the adapter of a run that nobody disturbed.

    Attributes:
        phases: what the coordinator was at in that run.
        killed: in the last run, by phase: whose process.
    """

    coordinator: Running
    sites: list[Site]
    folder: Path
    base: Path
    whole: bytes = b""
    phases: set[str] = field(default_factory=set[str])
    killed: dict[str, str] = field(default_factory=dict[str, str])
    gone: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def dictionary(self) -> Path:
        return self.folder / "north-data" / "dictionary.toml"

    def run(self, name: str, look: Callable[[str], None]) -> bytes:
        """A whole run's adapter; `look` is called with the coordinator's phase, again and again."""
        submit(self.coordinator, self.folder, self.base, name, self.dictionary)
        self.killed, self.gone, deadline = {}, {}, time.monotonic() + 1200
        progress = self.coordinator.folder.run(name) / "progress.json"
        while (adapter := finished(self.coordinator, name)) is None:
            assert time.monotonic() < deadline, f"{name}: killed in {self.killed}\n{self.coordinator.logs()}"
            with suppress(OSError, ValueError):
                look(json.loads(progress.read_bytes())["phase"])
            time.sleep(0.01)
        return adapter.read_bytes()

    def kill_site(self, process: str) -> None:
        """One process of the first hospital that is in a phase in which none was killed yet."""
        for site in self.sites:
            said = site.worker()
            now = said.get("now") or {}
            phase, steps = now.get("phase"), now.get("steps") or [0, 0]
            if phase not in PHASES or (phase == "train.local" and steps[0] < 5):
                continue
            pid = site.processes().get(process)
            if process != "worker" or pid == said["pid"]:
                self._kill(phase, site.node.config.name, pid)

    def kill_coordinator(self, process: str, phase: str) -> None:
        """One of its processes, in a phase in which it was not killed yet."""
        if phase in self.phases:
            self._kill(phase, process, self.coordinator.processes().get(process))

    def _kill(self, phase: str, whose: str, pid: int | None) -> None:
        # One that is just being started again has nothing to lose.
        if phase not in self.killed and pid is not None and pid != self.gone.get(whose):
            os.kill(pid, signal.SIGKILL)
            self.killed[phase], self.gone[whose] = whose, pid


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Iterator[World]:
    path = tmp_path_factory.mktemp("kills")
    folder = make_coordinator(path / "coordinator")
    nodes = [new_hospital(path, name) for name in NAMES]
    enrolled(folder, nodes, path / "mail")
    with started(folder) as coordinator, ExitStack() as stack:
        sites = [stack.enter_context(running(node)) for node in nodes]
        for site in sites:
            site.until("it is connected", site.connected)
        made = World(coordinator, sites, path, tiny_model_path)
        made.whole = made.run("whole", made.phases.add)
        made.phases -= {"starting", "finished"}
        yield made


def check(world: World, name: str) -> None:
    """Everybody was in the round, and has it on record."""
    (record,) = map(json.loads, (world.coordinator.folder.run(name) / "rounds.jsonl").read_text().splitlines())
    assert record["sites"] == sorted(NAMES)
    for site in world.sites:
        assert not list(site.node.state.glob("runs/*/" + CHECKPOINT))
        client("ledger", "verify", site.node.site_toml)
    ledgers = [site.node.state / "ledger.jsonl" for site in world.sites]
    folder = world.coordinator.folder
    wardround("server", "receipts", "check", folder.run(name), *ledgers, "--roster", folder.path / "roster.json")


@pytest.mark.parametrize("process", ["worker", "supernode"])
def test_a_hospitals_process_may_be_killed_in_every_phase(world: World, process: str):
    assert world.run(f"no-{process}", lambda _: world.kill_site(process)) == world.whole
    assert set(world.killed) == set(PHASES)
    check(world, f"no-{process}")
    if process == "worker":
        victim = next(site for site in world.sites if site.node.config.name == world.killed["train.local"])
        assert "going on after this process was ended" in victim.log("worker")


@pytest.mark.parametrize("process", ["superlink", "serverapps"])
def test_a_process_of_the_coordinator_may_be_killed_in_every_phase(world: World, process: str):
    assert world.run(f"no-{process}", lambda phase: world.kill_coordinator(process, phase)) == world.whole
    assert set(world.killed) == world.phases and len(world.phases) > 15
    check(world, f"no-{process}")
