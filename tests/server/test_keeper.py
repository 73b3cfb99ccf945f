"""The keeper of runs: what goes on by itself, what waits for a person, how often it tries."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from wardround.common.config import CoordinatorConfig, RunConfig, to_toml
from wardround.common.errors import ConfigError, ProtocolError
from wardround.server import keeper, run_status
from wardround.server.cohort import QuorumError
from wardround.server.control import FlowerRun
from wardround.server.coordinator import CoordinatorFolder, create
from wardround.server.keeper import TRIES, Keeper, want, wanted
from wardround.server.run_status import RunStatus, refuse

CONFIG = RunConfig.model_validate({"name": "trial", "privacy": {"enabled": False}})


@dataclass
class Flower:
    """A SuperLink's list of runs, as `Control` gives it."""

    known: dict[int, FlowerRun] = field(default_factory=dict)
    started: list[tuple[str, bool]] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)

    def runs(self) -> list[FlowerRun]:
        return list(self.known.values())

    def start(self, name: str, *, resume: bool) -> int:
        self.started.append((name, resume))
        number = 100 + len(self.started)
        self.set(number, "running")
        return number

    def stop(self, run: int) -> None:
        self.stopped.append(run)
        self.set(run, "finished:stopped")

    def set(self, run: int, status: str) -> None:
        self.known[run] = FlowerRun(run, "trial", False, status, "", 0.0)


@dataclass
class World:
    """A folder with one wanted run, whose time passes as the test says."""

    out: Path
    flower: Flower
    keeper: Keeper
    now: float = 1000.0

    def look(self, after_s: float = 0.0) -> list[tuple[str, bool]]:
        """What is started by one look."""
        self.now += after_s
        before = len(self.flower.started)
        self.keeper.look()
        return self.flower.started[before:]

    def says(
        self, number: int, ended: BaseException | None = None, *, done: bool = False, pid: int | None = None
    ) -> None:
        """What the run's process wrote last; without an end it is at work, or was killed (`pid`)."""
        status = RunStatus(self.out, CONFIG, number)
        if ended is not None or done:
            status.end(ended)
            pid = 2**22 + 1  # it is over
        if pid is not None:
            said = run_status.read(self.out) | {"pid": pid, "pid_started": 1}
            (self.out / run_status.FILE).write_text(json.dumps(said))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    create(tmp_path / "c", CoordinatorConfig(consortium="c", address="h:1"), "consortium = 'c'\naddress = 'h:1'\n")
    folder = CoordinatorFolder.open(tmp_path / "c")
    out = folder.run("trial")
    (out / "journal").mkdir(parents=True)
    (out / "run.toml").write_text(to_toml(CONFIG))
    want(out, 7)
    flower = Flower()
    flower.set(7, "running")
    made = World(out, flower, Keeper(folder, flower))  # type: ignore[arg-type]
    clock = SimpleNamespace(monotonic=lambda: made.now, time=time.time, strftime=time.strftime)
    monkeypatch.setattr(keeper, "time", clock)
    return made


DEAD = 2**22 + 1  # no process has this number


def test_a_run_that_is_at_work_or_about_to_begin_is_left_alone(world: World) -> None:
    assert world.look(3600) == []  # Flower has it, nobody has opened its journal yet
    world.says(7)
    assert world.look(3600) == []
    world.flower.set(7, "finished:failed")  # Flower lost sight of a process that works
    assert world.look(3600) == []
    del world.flower.known[7]
    assert world.look(3600) == []


def test_a_killed_process_is_followed_by_one_that_continues_though_flower_has_not_noticed(world: World) -> None:
    world.says(7, pid=DEAD)
    assert world.look() == []  # after a pause
    assert world.look(2.0) == [("trial", True)]
    assert world.flower.stopped == [7] and wanted(world.out) == 101
    assert world.look(100) == []


@pytest.mark.parametrize("ended", ["finished:failed", None])
def test_a_run_that_flower_ended_or_forgot_goes_on(world: World, ended: str | None) -> None:
    world.says(7, pid=DEAD)
    if ended is None:
        world.flower.known.clear()
    else:
        world.flower.set(7, ended)
    world.look()
    assert world.look(2.0) == [("trial", True)] and world.flower.stopped == []


def test_a_finished_run_is_wanted_no_more(world: World) -> None:
    world.says(7, done=True)
    world.flower.set(7, "finished:completed")
    assert world.look(10) == [] and wanted(world.out) is None
    assert world.look(1000) == []


def test_a_mistake_waits_for_a_person(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.says(7, ConfigError("base model: expected a folder, got nothing"))
    world.flower.set(7, "finished:failed")
    assert world.look(10) == [] and wanted(world.out) is None
    assert (
        "expected a folder, got nothing; mend it, then `wardround server run trial --resume`" in capsys.readouterr().out
    )


def test_one_that_could_not_even_begin_waits_for_a_person_too(world: World) -> None:
    refuse(world.out, 7, ConfigError("wrong passphrase"))
    world.flower.set(7, "finished:failed")
    assert world.look(10) == [] and wanted(world.out) is None


def test_too_few_hospitals_is_tried_for_as_long_as_it_takes_and_less_and_less_often(world: World) -> None:
    for attempt in range(2 * TRIES):
        number = wanted(world.out)
        assert number is not None
        world.says(number, QuorumError("warm-up: expected at least 3 sites"))
        world.flower.set(number, "finished:failed")
        pause = min(2.0 * 2**attempt, 300.0)
        assert world.look() == [] and world.look(pause - 0.5) == []
        assert world.look(1.0) == [("trial", True)]


def fail(world: World, error: BaseException) -> None:
    number = wanted(world.out)
    assert number is not None
    world.says(number, error)
    world.flower.set(number, "finished:failed")
    world.look()
    world.look(400.0)


def test_starts_that_get_nowhere_end_and_any_progress_begins_anew(world: World) -> None:
    for _ in range(TRIES - 1):
        fail(world, ProtocolError("sum of updates"))
    (world.out / "journal" / "round-00001-apply.record").write_bytes(b"one more phase")
    for _ in range(TRIES):
        fail(world, RuntimeError("a bug: what it says may hold anything"))
    assert wanted(world.out) is not None
    assert run_status.read(world.out)["ended"]["message"] == "RuntimeError"
    fail(world, RuntimeError("again"))
    assert wanted(world.out) is None and len(world.flower.started) == 2 * TRIES - 1


def test_a_run_that_a_person_stops_is_not_started_again(world: World) -> None:
    world.says(7, pid=DEAD)
    world.look()
    keeper.unwant(world.out)
    assert world.look(10) == []


def test_a_process_is_known_by_when_it_began_not_by_its_number(world: World) -> None:
    world.says(7)
    said: dict[str, Any] = run_status.read(world.out)
    assert run_status.alive(said) and said["pid"] == os.getpid()
    assert not run_status.alive(said | {"pid_started": said["pid_started"] - 1})
    assert not run_status.alive(said | {"pid": None}) and not run_status.alive({})


def test_files_that_are_cut_are_no_reason_to_fall(world: World) -> None:
    (world.out / run_status.FILE).write_text('{"run": ')
    assert run_status.read(world.out) == {} and world.look(10) == []
    (world.out / keeper.WANTED).write_text("{}")
    assert wanted(world.out) is None and world.look(10) == []
