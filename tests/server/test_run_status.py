"""How far a run has come, as others read it: phases, sites, rounds, what it cost, how it ended."""

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from wardround.common import plan
from wardround.common.config import CoordinatorConfig, RunConfig, to_toml
from wardround.common.privacy import epsilon_prv
from wardround.server import run_status, status
from wardround.server.certificates import make_authority, make_server
from wardround.server.cohort import QuorumError
from wardround.server.control import Node
from wardround.server.coordinator import CoordinatorFolder, create
from wardround.server.keeper import want
from wardround.server.run_status import RunStatus, refuse

PRIVATE = {"enabled": True, "epsilon": 8.0, "delta": 1e-5, "max_grad_norm": 0.5, "declared_patients": 900} | {
    "noise_multiplier": 1.0  # given, so that nothing is calibrated
}


def config(privacy: Mapping[str, Any]) -> RunConfig:
    federation = {"rounds": 4, "validation_questions_per_site": 0}
    return RunConfig.model_validate({"name": "trial", "privacy": privacy, "federation": federation})


def record(number: int, *sites: str, seconds: float = 600.0) -> dict[str, Any]:
    return {"round": number, "sites": list(sites), "seconds": seconds, "validation_accuracy": None}


@pytest.fixture
def folder(tmp_path: Path) -> CoordinatorFolder:
    create(tmp_path / "c", CoordinatorConfig(consortium="c", address="h:1"), "consortium = 'c'\naddress = 'h:1'\n")
    made = CoordinatorFolder.open(tmp_path / "c")
    make_authority(made.tls, "c")
    make_server(made.tls, "h")
    made.run("trial").mkdir(parents=True)
    (made.run("trial") / "run.toml").write_text(to_toml(config({"enabled": False})))
    return made


def shown(folder: CoordinatorFolder) -> dict[str, Any]:
    return status.gather(folder)["run"]


def test_a_run_is_followed_from_phase_to_phase(folder: CoordinatorFolder):
    out = folder.run("trial")
    said = RunStatus(out, config({"enabled": False}), 7)
    assert (out / run_status.FILE).stat().st_mode & 0o777 == 0o600
    said.begin("train", 1, ["south", "north"])
    said.answered("train", "north", "")
    run = shown(folder)
    assert (run["state"], run["phase"], run["round"], run["missing"]) == ("running", "train", 1, ["south"])
    assert run["eta_s"] is None
    said.answered("train", "south", "refused")
    said.answered("train", "node 12", "protocol")
    now = run_status.read(out)
    assert now["answered"] == {"north": "", "south": "refused", "node 12": "protocol"}
    assert set(now["sites"]) == {"north", "south"}  # a stranger is no site
    assert now["sites"]["south"]["code"] == "refused" and now["sites"]["south"]["answered"] is None
    said.round_done(record(1, "north"), 4)
    said.round_done(record(2, "north", "south", seconds=1200.0), 4)
    run = shown(folder)
    assert (run["rounds_done"], run["rounds"], run["eta_s"]) == (2, 4, 1800.0)
    sites = run_status.read(out)["sites"]
    assert {name: (site["rounds"], site["epsilon"]) for name, site in sites.items()} == {
        "north": (2, None),
        "south": (1, None),
    }
    text = "\n".join(status._head(status.gather(folder)))
    assert "run trial: running, 2 of 4 rounds, about 30 min of rounds left" in text


def test_a_resumed_run_counts_every_round_once_and_keeps_when_it_began(folder: CoordinatorFolder):
    out, settings = folder.run("trial"), config({"enabled": False})
    first = RunStatus(out, settings, 7)
    first.round_done(record(1, "north"), 4)
    began = run_status.read(out)["began"]
    second = RunStatus(out, settings, 8)
    second.round_done(record(1, "north"), 4)  # as server/rounds.py tells of earlier ones again
    now = run_status.read(out)
    assert (now["sites"]["north"]["rounds"], now["seconds_of_rounds"], now["began"]) == (1, [600.0], began)


def test_what_it_cost_a_patient_is_of_the_rounds_that_the_site_took_part_in(folder: CoordinatorFolder):
    out, settings = folder.run("trial"), config(PRIVATE)
    said = RunStatus(out, settings, 7)
    said.round_done(record(1, "north", "south"), 4)
    said.round_done(record(2, "north"), 4)
    sites = run_status.read(out)["sites"]
    for name, rounds in (("north", 2), ("south", 1)):
        events = [plan.schema_event(settings), *[plan.round_event(settings)] * rounds]
        assert sites[name]["epsilon"] == round(epsilon_prv(events, 1e-5).epsilon, 4)
    assert 0 < sites["south"]["epsilon"] < sites["north"]["epsilon"] < 8.0
    said.begin("finalize", 4, ["north", "south"])
    events = [plan.schema_event(settings), plan.round_event(settings), plan.metrics_event(settings)]
    assert run_status.read(out)["sites"]["south"]["epsilon"] == round(epsilon_prv(events, 1e-5).epsilon, 4)
    assert shown(folder)["epsilon_planned"] == 8.0


def test_a_round_whose_sum_was_lost_is_said_and_counts_as_spent_by_every_site(folder: CoordinatorFolder):
    private = config(PRIVATE)
    said = RunStatus(folder.run("trial"), private, 7)
    said.answered("train", "north", "")
    said.answered("train", "south", "")
    said.round_done(record(1, "north", "south"), 4)
    said.round_done(record(2), 4)
    two = [plan.schema_event(private), *[plan.round_event(private)] * 2]
    expected = epsilon_prv(two, 1e-5).epsilon
    sites = run_status.read(folder.run("trial"))["sites"]
    for site in sites.values():
        assert (site["rounds"], site["epsilon"]) == (1, pytest.approx(expected, abs=1e-3))
    assert (shown(folder)["rounds_done"], shown(folder)["rounds_lost"]) == (2, 1)
    assert any("in 1 of them no sum could be had" in line for line in status._head(status.gather(folder)))


def test_an_end_is_said_with_our_words_and_of_a_bug_with_its_kind_only(folder: CoordinatorFolder):
    out, settings = folder.run("trial"), config({"enabled": False})
    said = RunStatus(out, settings, 7)
    said.end(QuorumError("warm-up: expected at least 3 sites"))
    ended = run_status.read(out)["ended"]
    assert (ended["code"], ended["final"]) == ("quorum", False) and "expected at least 3" in ended["message"]
    said.end(ValueError("potassium 9.9 of patient 12"))
    assert run_status.read(out)["ended"]["message"] == "ValueError"
    said.end(OSError(errno.ENOSPC, "No space left on device", "/srv/patient-12"))
    assert run_status.read(out)["ended"]["message"] == "OSError: no space left on device"
    said.end(None)
    assert shown(folder)["state"] == "finished"
    refuse(out, 8, QuorumError("later"))
    assert run_status.read(out)["ended"]["code"] == ""


def test_a_full_disk_does_not_hide_why_a_run_ended(folder: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch):
    said = RunStatus(folder.run("trial"), config({"enabled": False}), 7)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_status, "write_atomic", full)
    said.end(QuorumError("x"))


def test_a_run_that_nobody_works_on_waits_or_rests(folder: CoordinatorFolder):
    out = folder.run("trial")
    RunStatus(out, config({"enabled": False}), 7)
    content = run_status.read(out) | {"pid": 2**22 + 1, "pid_started": 1}
    (out / run_status.FILE).write_text(json.dumps(content))
    assert shown(folder)["state"] == "stopped"
    assert "`wardround server run trial --resume` continues it" in "\n".join(status._head(status.gather(folder)))
    want(out, 7)
    assert shown(folder)["state"] == "waiting"


def test_examples_in_the_docstrings_hold() -> None:
    import doctest

    done = doctest.testmod(status)
    assert done.failed == 0 and done.attempted > 0


def test_a_node_that_has_not_said_who_it_is_is_named_by_its_key(
    folder: CoordinatorFolder, monkeypatch: pytest.MonkeyPatch
):
    known = [Node(12, "north", "online", 1.0, b"key")]
    monkeypatch.setattr(status, "_nodes", lambda _: (known, ""))
    monkeypatch.setattr(status, "holder", lambda _: 1)
    said = RunStatus(folder.run("trial"), config({"enabled": False}), 7)
    said.begin("warm-up", 0, ["node 12", "node 13"])
    assert shown(folder)["missing"] == ["node 13", "north"]
    said.answered("warm-up", "node 12", "protocol")
    assert (shown(folder)["missing"], shown(folder)["answered"]) == (["node 13"], {"north": "protocol"})


def test_a_run_that_nobody_has_worked_on_yet_is_starting_and_one_that_is_tried_again_says_so(folder: CoordinatorFolder):
    out = folder.run("trial")
    want(out, 7)
    assert "run trial: starting" in status._head(status.gather(folder))
    RunStatus(out, config({"enabled": False}), 7).end(QuorumError("too few"))
    said = run_status.read(out)
    (out / run_status.FILE).write_text(json.dumps(said | {"pid_started": -1}))
    lines = status._head(status.gather(folder))
    assert "run trial: waiting, 0 of 4 rounds" in lines and "  quorum: too few" in lines
    assert "  it is tried again by itself; logs/runs.log says when" in lines
