"""The coordinator's disk is full in the middle of a run: it waits, says so, and goes on when there is room."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from .consortium_case import NAMES, answered_since, consortium, report, rounds, settings
from .coordinator_case import wardround
from .small_disk import NotPermittedError, small_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_on_a_full_disk_the_coordinator_waits_and_goes_on_when_there_is_room(
    tmp_path: Path, tiny_model_path: Path, record_property: Callable[[str, object], None]
):
    with ExitStack() as stack:
        try:
            disk = stack.enter_context(small_disk(tmp_path / "disk", 96 << 20))
        except NotPermittedError as reason:
            pytest.skip(f"no disk of our own: {reason}")
        where = disk.path / "coordinator"
        made = stack.enter_context(consortium(tmp_path, names=NAMES[:3], coordinator_folder=where))
        run = made.submit(settings(tiny_model_path, "full", steps=2))
        made.coordinator.until("training", lambda: made.at(run, "train", 1), 300)
        began = time.time()
        disk.fill()

        def tried_to_send() -> bool:
            """Whether everybody's update waits for the coordinator; what others give back is taken again."""
            disk.fill()
            last = [site.worker().get("last") or {} for site in made.sites.values()]
            return all(one.get("phase") == "train.local" for one in last)

        made.coordinator.until("everybody has trained", lambda: tried_to_send() or None, 300)
        until = time.time() + 20
        while time.time() < until:
            assert anybody_answered_since(run, began) is None
            disk.fill()
            time.sleep(0.2)
        said = wardround("server", "status", "-C", where).stdout
        assert f"{where}: the disk is full" in said
        restarts = made.restarts()
        disk.make_room()
        room = time.time()
        answered = made.coordinator.until("somebody answers", lambda: anybody_answered_since(run, room), 300) - room
        ended = made.finished(run)
        assert [record["sites"] for record in rounds(run)] == [sorted(NAMES[:3])]
        assert restarts == made.restarts() == {}
        made.agree(run)
        report(record_property, "a full disk", full=room - began, answers=answered, run=ended - room)


def anybody_answered_since(run: Path, when: float) -> float | None:
    return max(filter(None, (answered_since(run, name, when) for name in NAMES)), default=None)
