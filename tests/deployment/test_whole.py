"""A consortium as people deploy it, from nothing: a private run over TLS, alone on loopback, whole under kills."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from wardround.common import config as configs
from wardround.common.config import RunConfig
from wardround.common.errors import RunFolderError
from wardround.simulations.deployment import WARDROUND, Deployment, DeploymentError, deployment, where
from wardround.simulations.faults import check_records, check_run, soak

from .site_case import descendants, sockets

slow = [pytest.mark.slow, pytest.mark.timeout(1800)]


def settings(rounds: int, *more: str) -> RunConfig:
    return configs.load_run(Path("soak"), (f"federation.rounds={rounds}", *more))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, list[str], set[str], set[str]]]:
    """A run of two rounds, with a fifth hospital that runs Flower's own programs.

    The commands that it took, and every address that anybody listened on or talked to.
    """
    out, said = tmp_path_factory.mktemp("whole") / "d", []
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CI", raising=False)  # with it set, trl's trainers do not call their hub anyway
        with deployment(out, settings(2, "simulation.sites=5"), said.append, stock=1) as made:
            made.submit()
            listened, talked, deadline = set[str](), set[str](), time.monotonic() + 1200
            while time.monotonic() < deadline:
                parties = (made.coordinator, *made.hospitals.values())
                own = [process for one in parties for process in (one.process, one.executor) if process is not None]
                pids = {pid for process in own for pid in descendants(process.pid)}
                for state, local, remote in sockets(pids):
                    (listened if state == "listen" else talked).add(local if state == "listen" else remote)
                path = made.run_folder / "progress.json"
                if path.exists() and json.loads(path.read_bytes())["ended"] is not None:
                    break
                time.sleep(0.1)
            yield made, list(said), listened, talked


class TestAWholeRun:
    pytestmark = slow

    def test_it_ends_with_model_report_and_records_that_agree(self, finished):
        made, *_ = finished
        assert json.loads((made.run_folder / "progress.json").read_bytes())["ended"]["code"] == ""
        assert check_run(made) == []
        assert all(path.exists() for _, path in where(made))
        assert json.loads((made.run_folder / "privacy.json").read_bytes())["enabled"]
        status = made.status()
        assert json.dumps(status).count('"site-0') >= 4
        made.stop()
        assert check_records(made) == []

    def test_a_stock_supernode_takes_part_in_every_round(self, finished):
        made, *_ = finished
        rounds = [json.loads(line) for line in (made.run_folder / "rounds.jsonl").read_text().splitlines()]
        assert [record["sites"] for record in rounds] == [sorted(made.hospitals)] * 2
        (fifth,) = [party for party in made.hospitals.values() if party.stock]
        assert not (fifth.state / "status.json").exists() and "SuperNode ID:" in fifth.log("supernode")

    def test_nobody_listens_or_talks_but_on_loopback(self, finished):
        made, _, listened, talked = finished
        assert listened and talked
        assert all(one.startswith("127.0.0.1:") for one in listened | talked), listened | talked
        public = [one for one in listened if one.endswith(f":{made.port}")]
        assert len(public) == 1 and len(listened) == 2 + len(made.hospitals)

    def test_no_passphrase_or_key_is_in_a_log(self, finished):
        made, *_ = finished
        secrets = [path.read_text().strip() for path in made.out.rglob("*passphrase*") if path.is_file()]
        assert len(secrets) == 1 + len(made.hospitals)
        logs = [path.read_text("utf-8", "replace") for path in made.out.rglob("*.log*") if path.is_file()]
        assert len(logs) > 8
        assert not any(secret in log for secret in secrets for log in logs)
        assert not any("PRIVATE KEY" in log for log in logs)

    def test_no_path_of_the_coordinator_reached_a_site(self, finished):
        made, *_ = finished
        for party in made.hospitals.values():
            for path in (party.state / "logs").iterdir():
                assert str(made.coordinator.folder) not in path.read_text("utf-8", "replace")

    def test_the_commands_are_those_of_the_documents(self, finished):
        """Every command from nothing to the run is in the documentation, by its first two words and its options."""
        _, said, *_ = finished
        text = "".join(path.read_text() for path in (Path(__file__).parents[2] / "docs").glob("deployment*.md"))
        for line in said:
            words = shlex.split(line.removesuffix(" &"))
            assert " ".join(words[:3] if words[0] == "wardround" else words[:2]) in text, line
            for option in (word for word in words if re.fullmatch(r"--[a-z-]+", word)):
                assert option in text or option in ("--site", "--json", "--wait"), line


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_under_kills_every_round_is_accounted_for(tmp_path: Path):
    """Three rounds are too few to judge memory by: that is for `make soak`."""
    result = soak(settings(3), tmp_path / "d", seed=5, minutes=20, kills=6)
    assert result["defects"] == [] and len(result["rounds"]) == 3 and result["kills"]
    assert json.loads((tmp_path / "d" / "soak.json").read_text()) == result


def test_a_folder_with_something_in_it_is_refused_before_anything_is_made(tmp_path: Path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(RunFolderError, match="expected a new or empty folder"):
        Deployment(tmp_path, settings(1)).found()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_command_that_fails_is_one_line_with_its_own_words(tmp_path: Path):
    with pytest.raises(DeploymentError, match=r"wardround server status: exit code 2: .*no coordinator\.toml here"):
        Deployment(tmp_path, settings(1)).call("server", "status", "-C", tmp_path / "nowhere")


def test_ctrl_c_ends_everything(tmp_path: Path):
    """The command is interrupted while hospitals are being set up: no process of it is left."""
    with subprocess.Popen(
        [str(WARDROUND), "simulate", "deploy", "soak", "--out", str(tmp_path / "d")],
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
    ) as running:
        assert running.stderr is not None
        assert b"server init" in running.stderr.readline()
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=120)
    assert running.returncode == 130
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert str(tmp_path).encode() not in entry.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
