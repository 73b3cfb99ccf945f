"""`wardround client start` against a real coordinator over TLS: it connects, listens nowhere else, survives, drains."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from .coordinator_case import make_coordinator, started
from .site_case import client, descendants, enrolled, new_hospital, running, sockets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_hospital_starts_connects_out_alone_restarts_what_is_killed_and_stops(tmp_path: Path):
    coordinator = make_coordinator(tmp_path / "coordinator")
    nodes = [new_hospital(tmp_path, name) for name in ("north", "south", "west")]
    enrolled(coordinator, nodes, tmp_path / "mail")
    north = nodes[0]
    with started(coordinator), running(north) as site:
        site.until("it is connected", site.connected)
        checked = client("check", "--site", north.site_toml, "--json", check=False)
        lines = {line["name"]: line for line in json.loads(checked.stdout)}
        assert checked.returncode == 0, lines
        # A second start is one line.
        again = client("start", "--site", north.site_toml, check=False)
        assert again.returncode == 2 and "is running already" in again.stderr.splitlines()[-1]
        # What listens is on loopback; what is connected is the coordinator or on loopback.
        found = sockets(descendants(site.process.pid))
        listening = [local for state, local, _ in found if state == "listen"]
        assert len(listening) == 1 and listening[0].startswith("127.0.0.1:"), found
        assert all(remote.startswith("127.0.0.1:") for state, _, remote in found if state == "other"), found
        # What is killed is started again.
        before = site.processes()
        os.kill(before["worker"], signal.SIGKILL)
        os.kill(before["supernode"], signal.SIGKILL)
        site.until("both are back", lambda: set(site.processes()) == set(before) and not (
            set(site.processes().values()) & set(before.values())))  # fmt: skip
        status = site.status()
        assert status["running"] and status["processes"]["worker"]["restarts"] == 1
        everything = descendants(site.process.pid) - {site.process.pid}
        assert site.stop() == 0
        assert not any((Path("/proc") / str(pid)).exists() for pid in everything)
    assert client("status", "--site", north.site_toml, "--json").stdout.count('"running": false') == 1
    for text in (site.log("worker"), site.log("supernode")):
        assert (north.folder / "passphrase.txt").read_text().strip() not in text


def test_nothing_of_a_site_is_left_when_its_supervisor_is_killed(tmp_path: Path):
    coordinator = make_coordinator(tmp_path / "coordinator")
    nodes = [new_hospital(tmp_path, name) for name in ("north", "south", "west")]
    enrolled(coordinator, nodes, tmp_path / "mail")
    with started(coordinator), running(nodes[0]) as site:
        site.until("it is connected", site.connected)
        pids = set(site.processes().values())
        site.process.kill()
        site.process.wait(10)
        import time

        deadline = time.monotonic() + 20
        while any((Path("/proc") / str(pid)).exists() for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    with running(nodes[0]) as site:  # the lock was the process's
        site.until("it runs again", lambda: len(site.processes()) == 2)
