"""Processes of hospitals and of the coordinator are killed in every phase of a run: it ends in the same bits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from wardround.client.site import CHECKPOINT
from wardround.server import keeper, run_status

from .consortium_case import Consortium, consortium, rounds, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NAMES = ("north", "south", "west")
PHASES = (
    "query.warmup", "query.count", "query.shares", "query.mask", "query.survivors", "query.unmask", "query.schema",
    "train.local", "evaluate.test", "query.finalize",
)  # fmt: skip


@dataclass
class World:
    """A coordinator and three hospitals that run, and the adapter of a run that nobody disturbed.

    Attributes:
        phases: what the coordinator was at in that run.
        killed: in the last run, by phase: whose process.
    """

    made: Consortium
    base: Path
    whole: bytes = b""
    phases: set[str] = field(default_factory=set[str])
    killed: dict[str, str] = field(default_factory=dict[str, str])
    gone: dict[str, int] = field(default_factory=dict[str, int])

    def run(self, name: str, look: Callable[[str], None]) -> bytes:
        """A whole run's adapter; `look` is called with the coordinator's phase, again and again."""
        run = self.made.submit(settings(self.base, name, steps=20))
        self.killed, self.gone, deadline = {}, {}, time.monotonic() + 1200
        while keeper.wanted(run) is not None:
            assert time.monotonic() < deadline, f"{name}: killed in {self.killed}\n{self.made.coordinator.logs()}"
            if phase := run_status.read(run).get("phase"):
                look(phase)
            time.sleep(0.01)
        return (run / "adapter" / "adapter_model.safetensors").read_bytes()

    def kill_site(self, process: str) -> None:
        """One process of the first hospital that is in a phase in which none was killed yet."""
        for site in self.made.sites.values():
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
            self._kill(phase, process, self.made.coordinator.processes().get(process))

    def _kill(self, phase: str, whose: str, pid: int | None) -> None:
        # One that is just being started again has nothing to lose.
        if phase not in self.killed and pid is not None and pid != self.gone.get(whose):
            os.kill(pid, signal.SIGKILL)
            self.killed[phase], self.gone[whose] = whose, pid


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Iterator[World]:
    with consortium(tmp_path_factory.mktemp("kills"), names=NAMES) as made:
        found = World(made, tiny_model_path)
        found.whole = found.run("whole", found.phases.add)
        found.phases -= {"starting", "finished"}
        yield found


def check(world: World, name: str) -> None:
    """Everybody was in the round, and has it on record."""
    run = world.made.coordinator.folder.run(name)
    assert [record["sites"] for record in rounds(run)] == [sorted(NAMES)]
    assert not [left for site in world.made.sites.values() for left in site.node.state.glob("runs/*/" + CHECKPOINT)]
    world.made.agree(run)


@pytest.mark.parametrize("process", ["worker", "supernode"])
def test_a_hospitals_process_may_be_killed_in_every_phase(world: World, process: str):
    assert world.run(f"no-{process}", lambda _: world.kill_site(process)) == world.whole
    assert set(world.killed) == set(PHASES)
    check(world, f"no-{process}")
    if process == "worker":
        victim = world.made.sites[world.killed["train.local"]]
        assert "going on after this process was ended" in victim.log("worker")


@pytest.mark.parametrize("process", ["superlink", "serverapps"])
def test_a_process_of_the_coordinator_may_be_killed_in_every_phase(world: World, process: str):
    assert world.run(f"no-{process}", lambda phase: world.kill_coordinator(process, phase)) == world.whole
    assert set(world.killed) == world.phases and len(world.phases) > 15
    check(world, f"no-{process}")
