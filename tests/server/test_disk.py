"""A full disk at the coordinator: nothing ends, nothing is started in vain, and one line says what is wrong."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from wardround.client import worker
from wardround.common import supervisor
from wardround.common.config import CoordinatorConfig
from wardround.server import disk, keeper
from wardround.server.certificates import make_authority, make_server
from wardround.server.coordinator import CoordinatorFolder, create
from wardround.server.disk import full
from wardround.server.gate import Later
from wardround.server.run_status import RunStatus
from wardround.server.status import gather
from wardround.server.superlink import BusyError, check_database

from .test_gate import Inner, ask
from .test_keeper import CONFIG, DEAD, World, world

__all__ = ["world"]  # a fixture


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is free is too little."""
    monkeypatch.setattr(disk, "LEAST_BYTES", 1 << 62)


def test_a_disk_with_room_is_not_full_and_one_that_nobody_can_look_at_neither(tmp_path: Path):
    assert full(tmp_path) == "" and full(tmp_path / "nowhere") == ""


def test_a_full_disk_is_one_line_with_what_to_do(tmp_path: Path, filled: None):
    assert full(tmp_path).startswith(f"{tmp_path}: the disk is full (less than ") and "make room" in full(tmp_path)


@pytest.mark.parametrize(
    ("status", "reason", "expected"),
    [(500, "the disk is full", 503), (500, "", 500), (200, "the disk is full", 200), (404, "the disk is full", 404)],
)
def test_what_fails_for_a_reason_that_goes_away_is_to_be_tried_again(status: int, reason: str, expected: int):
    assert ask(Later(Inner(status), lambda: reason))[0] == expected


def test_the_reason_is_in_the_log_once_a_minute(caplog: pytest.LogCaptureFixture):
    app = Later(Inner(500), lambda: "the disk is full")
    with caplog.at_level("WARNING", "wardround.superlink"):
        assert [ask(app)[0] for _ in range(3)] == [503] * 3
    assert [record.message for record in caplog.records] == ["the disk is full"]


def test_the_keeper_starts_nothing_on_a_full_disk_however_long_it_lasts_and_then_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    world.says(7, OSError(28, "No space left on device"), pid=DEAD)
    world.flower.set(7, "finished:failed")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "LEAST_BYTES", 1 << 62)
        assert [started for _ in range(50) for started in world.look(100)] == []
    assert world.look(0) == [] and world.look(2) == [("trial", True)]


def test_what_a_run_says_of_itself_may_be_lost(tmp_path: Path):
    status = RunStatus(tmp_path, CONFIG, 7)
    (tmp_path / "progress.json").unlink()
    tmp_path.rmdir()
    status.begin("train", 1, ["north"])
    status.answered("train", "north", "")
    status.end(None)


@pytest.mark.parametrize("say", [supervisor._say, keeper._say, worker.say])
def test_a_line_that_no_log_can_take_is_lost_and_ends_nothing(
    say: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
):
    stream = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream)
        patch.setattr("sys.stderr", stream)
        say("a line")
        say("another")
    with pytest.raises(OSError, match="No space left"):  # it was tried
        stream.close()


def test_a_database_that_a_full_disk_keeps_from_being_opened_is_neither_a_mistake_nor_damaged(
    tmp_path: Path, filled: None
):
    path = tmp_path / "superlink.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (a)")
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BusyError, match="the disk is full"):
            check_database(path)
    assert path.exists() and check_database(path) is None


def test_status_says_that_the_disk_is_full(tmp_path: Path, filled: None):
    create(tmp_path / "c", CoordinatorConfig(consortium="c", address="h:1"), "consortium = 'c'\naddress = 'h:1'\n")
    folder = CoordinatorFolder.open(tmp_path / "c")
    make_authority(folder.tls, "c")
    make_server(folder.tls, "h")
    assert gather(folder)["problem"] == full(folder.path) != ""
