"""A consortium over a network as it is: one hospital's line is cut, late, lossy and narrow; one machine is slow.

The coordinator and all hospitals but one are on one host, the last one on another (wire.py). Figures of
docs/reliability.md are what these tests print.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from wardround.server import run_status
from wardround.server.control import Control

from .consortium_case import NAMES, Consortium, answered_since, consortium, report, rounds, settings
from .coordinator_case import Running
from .wire import NotPermittedError, Wire, wire

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
FAR, PORT = NAMES[0], 9092  # each host has its own ports
Property = Callable[[str, object], None]


@pytest.fixture(scope="module")
def between() -> Iterator[Wire]:
    """Two hosts; the tests themselves are on the near one."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(wire(seed=7))
        except NotPermittedError as reason:
            pytest.skip(f"no network of our own: {reason}")
        stack.enter_context(made.at(made.near))
        yield made


@pytest.fixture
def line(between: Wire) -> Iterator[Wire]:
    """The wire; whatever a test does to it, the next finds it as new."""
    yield between
    between.delay_s, between.loss, between.bits_per_s = 0.0, 0.0, 0.0
    between.mend()


@pytest.fixture(scope="module")
def made(between: Wire, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    """A consortium whose first hospital is at the other end of the wire."""
    address = ("--address", f"{between.near.address}:{PORT}", "--loopback-port", PORT + 1)
    with consortium(
        tmp_path_factory.mktemp("network"),
        *address,
        place=lambda name: between.at(between.far if name == FAR else between.near),
    ) as one:
        yield one


def test_the_wire_is_late_lossy_narrow_or_cut_as_it_was_set(line: Wire):
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server((line.near.address, 9000)))
        with line.at(line.far):
            far = stack.enter_context(socket.create_connection((line.near.address, 9000), timeout=60))
        near = stack.enter_context(server.accept()[0])
        near.settimeout(60)

        def seconds(size: int = 1) -> float:
            """So much to the coordinator's side, and a byte back."""
            began = time.monotonic()
            sender = threading.Thread(target=far.sendall, args=(bytes(size),))
            sender.start()
            while size > 0:
                size -= len(near.recv(65536))
            near.sendall(b"x")
            assert far.recv(1) == b"x"
            sender.join()
            return time.monotonic() - began

        assert seconds() < 0.15
        line.delay_s = 0.1
        assert 0.2 <= seconds() < 0.5
        line.bits_per_s = 2e6
        assert 1.2 <= seconds(250_000) < 10
        line.loss, lost, carried = 0.05, line.lost, line.carried
        seconds(1_000_000)
        lost, carried = line.lost - lost, line.carried - carried
        assert 0.02 < lost / (lost + carried) < 0.2  # some by a full queue
        line.loss, line.bits_per_s = 0.0, 0.0
        line.cut()
        near.settimeout(2)
        far.sendall(b"x")
        with pytest.raises(TimeoutError):
            near.recv(1)
        line.mend()
        near.settimeout(30)
        assert near.recv(1) == b"x"


def test_a_hospital_behind_a_late_lossy_narrow_line_is_in_every_sum(
    made: Consortium, line: Wire, tiny_model_path: Path, record_property: Property
):
    line.delay_s, line.loss, line.bits_per_s = 0.1, 0.05, 2e6
    before, lost, began = made.restarts(), line.lost, time.time()
    run = made.submit(settings(tiny_model_path, "narrow", steps=4))
    ended = made.finished(run)
    (record,) = rounds(run)
    assert record["sites"] == sorted(NAMES) and record["failures"] == {}
    assert line.lost > lost and made.restarts() == before
    made.agree(run)
    report(record_property, "200 ms, 5 %, 2 Mbit/s", run=ended - began, round=record["seconds"], lost=line.lost - lost)


def test_a_hospital_that_was_cut_off_takes_part_again_by_itself(
    made: Consortium, line: Wire, tiny_model_path: Path, record_property: Property
):
    """For longer than Flower waits for a heartbeat (60 s), while it trains."""
    far, before = made.sites[FAR], made.restarts()
    run = made.submit(settings(tiny_model_path, "cut", rounds=2, steps=10))
    made.coordinator.until("training", lambda: made.at(run, "train", 1), 300)
    far.until("it trains", lambda: (far.worker().get("now") or {}).get("phase") == "train.local", 300)
    line.cut()
    cut = time.time()
    gone = made.coordinator.until("it is gone", lambda: None if online(made.coordinator) else time.time(), 120) - cut
    time.sleep(max(0.0, cut + 75 - time.time()))
    line.mend()
    mended = time.time()
    back = made.coordinator.until("it is there", lambda: online(made.coordinator), 120) - mended
    answered = made.coordinator.until("it answers", lambda: answered_since(run, FAR, mended), 300) - mended
    ended = made.finished(run)
    assert [record["sites"] for record in rounds(run)] == [sorted(NAMES)] * 2
    assert made.restarts() == before
    made.agree(run)
    report(record_property, "cut for 75 s", gone=gone, online=back, answers=answered, run=ended - cut)


def test_a_hospital_ten_times_slower_is_in_the_sum_where_the_deadline_leaves_it_time(
    made: Consortium, line: Wire, tiny_model_path: Path, record_property: Property
):
    before, began = made.restarts(), time.time()
    with Brake(made) as brake:
        run = made.submit(settings(tiny_model_path, "patient", steps=10, deadline_s=1500))
        ended = made.finished(run)
    (record,) = rounds(run)
    assert record["sites"] == sorted(NAMES) and record["failures"] == {}
    slow, others = brake.trained[FAR], max(brake.trained[name] for name in NAMES if name != FAR)
    assert slow > 4 * others  # with three others on two cores; alone it has a core for itself
    assert made.restarts() == before
    made.agree(run)
    report(record_property, "ten times slower, in time", others=others, slow=slow, run=ended - began)


def test_a_hospital_ten_times_slower_costs_the_others_the_deadline_and_is_named(
    made: Consortium, line: Wire, tiny_model_path: Path, record_property: Property
):
    before, began, deadline = made.restarts(), time.time(), 100.0
    with Brake(made) as brake:
        run = made.submit(settings(tiny_model_path, "strict", steps=10, deadline_s=deadline))
        made.coordinator.until("the round is over", lambda: run_status.read(run).get("rounds_done") == 1, 900)
    ended = made.finished(run)
    (record,) = rounds(run)
    assert record["sites"] == sorted(set(NAMES) - {FAR}) and record["failures"] == {FAR: "silent"}
    assert deadline < record["seconds"] < 3 * deadline
    others = max(brake.trained[name] for name in NAMES if name != FAR)
    assert made.restarts() == before
    made.agree(run)
    report(
        record_property, "ten times slower, too late", others=others, deadline=deadline, round=record["seconds"],
        run=ended - began,
    )  # fmt: skip


class Brake:
    """Lets one hospital's worker have a tenth of the time while it trains: stopped, and let run for a moment."""

    RUNS_S, CYCLE_S = 0.04, 0.4

    def __init__(self, made: Consortium) -> None:
        self._made, self._ended = made, threading.Event()
        self._thread = threading.Thread(target=self._hold)
        self.trained: dict[str, float] = {}  # seconds of each one's last training

    def __enter__(self) -> Brake:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Lets it run from now on."""
        self._ended.set()
        self._thread.join()

    def _hold(self) -> None:
        slow = self._made.sites[FAR]
        while not self._ended.wait(self.RUNS_S):
            for name, site in self._made.sites.items():
                last = site.worker().get("last") or {}
                if last.get("phase") == "train.local":
                    self.trained[name] = last["until"] - last["since"]
            said = slow.worker()
            if (said.get("now") or {}).get("phase") == "train.local":
                with suppress(ProcessLookupError):
                    os.kill(said["pid"], signal.SIGSTOP)
                    self._ended.wait(self.CYCLE_S - self.RUNS_S)
                    os.kill(said["pid"], signal.SIGCONT)


def online(coordinator: Running) -> float | None:
    with Control(coordinator.folder) as control:
        return time.time() if any(node.name == FAR and node.status == "online" for node in control.nodes()) else None
