"""Set-up, evaluation and the end of a run, with sites that fail, come late, come back, or answer nonsense."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wardround.common.config import RunConfig
from wardround.common.messages import Failure
from wardround.common.schema import Schema, derive_schema
from wardround.server.cohort import QuorumError
from wardround.server.journal import Journal, open_journal
from wardround.server.phases import Consortium
from wardround.server.roll_call import RollCall
from wardround.server.run import Coordinator
from wardround.server.tracking import SilentProgress

from tests.server.sites_case import COUNTS, DICTIONARY, ROUND_ZERO, Sites, Twist, changed, failing

CONFIG = RunConfig.model_validate({"name": "t", "evaluation": {"bootstrap_samples": 100, "questions_per_site": 10}})
SCHEMA = derive_schema(COUNTS, DICTIONARY, CONFIG.questions)


class Run:
    """The coordinator's process: what it has open, and the sites it talks to."""

    def __init__(self, out: Path, sites: Sites, config: RunConfig = CONFIG, *, resume: bool = False) -> None:
        sites.targets = SCHEMA.names
        self.journal: Journal = open_journal(out, config, resume)
        self.consortium = Consortium(sites, config, self.journal, SilentProgress())
        self.coordinator = Coordinator(config, DICTIONARY, out, self.journal, self.consortium)
        self.roll_call = RollCall(self.consortium, DICTIONARY.digest(), "p", ROUND_ZERO)

    def set_up(self) -> Schema:
        self.roll_call.everyone()
        return self.coordinator.schema(self.roll_call)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()


def losses(run: Run) -> list[tuple[str, str, str]]:
    return [(loss["phase"], loss["site"], loss["code"]) for loss in run.journal.losses()]


def test_the_roll_call_learns_names_and_patients(tmp_path: Path):
    with Run(tmp_path, Sites()) as run:
        run.roll_call.everyone()
        assert run.consortium.cohort.nodes == {"site-01": 2, "site-02": 3, "site-03": 4}
        assert run.roll_call.declared() == {"site-01": 100, "site-02": 100, "site-03": 100}
        assert losses(run) == []


@pytest.mark.parametrize(
    ("twist", "code"),
    [
        (failing("verification"), "verification"),
        (changed(model_digest="0" * 64), "protocol"),
        (changed(dictionary_digest="0" * 64), "protocol"),
        (changed(patients=0), "protocol"),
        (changed(run_id="0" * 32), "protocol"),
        (changed(round_index=1), "protocol"),
    ],
)
def test_a_site_that_does_not_confirm_is_left_out_by_name(tmp_path: Path, twist: Twist, code: str):
    with Run(tmp_path, Sites(twists={("site-02", "Warmup"): twist})) as run:
        run.roll_call.everyone()
        assert run.consortium.cohort.names == ["site-01", "site-03"]
        assert losses(run) == [("warm-up", "site-02", code)]


@pytest.mark.parametrize("name", ["", "a/b", "../..", "<script>", "a\nb", "x" * 65, "node 3"])
def test_what_is_no_name_is_shown_nowhere(tmp_path: Path, name: str):
    with Run(tmp_path, Sites(twists={("site-02", "Warmup"): changed(site=name)})) as run:
        run.roll_call.everyone()
        assert losses(run) == [("warm-up", "node 3", "protocol")]
    sites = Sites(twists={("site-02", "Warmup"): lambda reply: Failure(run_id="", site=name, round_index=0, code=name)})
    with Run(tmp_path / "failing", sites) as run:
        run.roll_call.everyone()
        assert [loss[:2] for loss in losses(run)] == [("warm-up", "node 3")]
        assert losses(run)[0][2] in ("protocol", "failure")


def test_a_name_claimed_by_two_nodes_stays_with_the_first(tmp_path: Path):
    with Run(tmp_path, Sites(twists={("site-03", "Warmup"): changed(site="site-01")})) as run:
        run.roll_call.everyone()
        assert run.consortium.cohort.nodes == {"site-01": 2, "site-02": 3}
        assert losses(run) == [("warm-up", "node 4", "protocol")]


def test_too_few_at_the_roll_call_end_the_run_with_their_names(tmp_path: Path):
    twists = {(name, "Warmup"): failing("refused") for name in ("site-01", "site-03")}
    with (
        Run(tmp_path, Sites(twists=twists)) as run,
        pytest.raises(QuorumError, match=r"warm-up: .* 1 finished; site-01 \(refused\), site-03 \(refused\)"),
    ):
        run.roll_call.everyone()


def test_a_site_that_comes_late_is_set_up_before_the_next_round(tmp_path: Path):
    sites = Sites(away={"site-03"})
    with Run(tmp_path, sites) as run:
        run.set_up()
        sites.away.clear()
        sites.asked.clear()
        run.roll_call.latecomers()
        assert sites.asked == [("site-03", "Warmup"), ("site-03", "Schema")]
        assert run.consortium.cohort.ready == {"site-01", "site-02", "site-03"}
        sites.asked.clear()
        run.roll_call.latecomers()
        assert sites.asked == []


@pytest.mark.parametrize("phase", ["Warmup", "Schema"])
def test_a_site_that_failed_in_the_set_up_is_asked_again(tmp_path: Path, phase: str):
    sites = Sites(twists={("site-02", phase): failing("registry")})
    with Run(tmp_path, sites) as run:
        run.set_up()
        assert run.consortium.cohort.ready == {"site-01", "site-03"}
        sites.twists.clear()
        run.roll_call.latecomers()
        assert run.consortium.cohort.ready == {"site-01", "site-02", "site-03"}
        assert losses(run) == [({"Warmup": "warm-up", "Schema": "schema"}[phase], "site-02", "registry")]


def test_a_site_that_reconnects_as_another_node_keeps_its_name(tmp_path: Path):
    sites = Sites()
    with Run(tmp_path, sites) as run:
        run.set_up()
        sites.names = {2: "site-01", 3: "site-02", 9: "site-03"}
        run.roll_call.latecomers()
        assert run.consortium.cohort.nodes == {"site-01": 2, "site-02": 3, "site-03": 9}
        assert sites.asked[-2:] == [("site-03", "Warmup"), ("site-03", "Schema")]
        assert losses(run) == []


@pytest.mark.parametrize(
    "twist",
    [
        changed(counts=np.array([1, 2])),
        changed(counts=-COUNTS.to_vector()),
        changed(counts=COUNTS.to_vector() + 2**60),
        failing("registry"),
    ],
    ids=["length", "negative", "huge", "failure"],
)
def test_counts_that_are_none_are_left_out_of_the_schema(tmp_path: Path, twist: Twist):
    with Run(tmp_path, Sites(twists={("site-02", "Count"): twist})) as run:
        schema = run.set_up()
        assert schema.rows == 2 * COUNTS.rows
        assert run.journal.read("schema").values["sites"] == ["site-01", "site-03"]
        assert [loss[:2] for loss in losses(run)] == [("counts", "site-02")]


def test_another_schema_than_the_published_one_is_not_taken_for_ready(tmp_path: Path):
    with Run(tmp_path, Sites(twists={("site-02", "Schema"): changed(schema_digest="0" * 64)})) as run:
        run.set_up()
        assert losses(run) == [("schema", "site-02", "protocol")]
        assert "site-02" not in run.consortium.cohort.ready


def tally(**changes: Any) -> np.ndarray:
    sites = Sites(targets=SCHEMA.names)
    result = sites.tally()
    for name, value in changes.items():
        getattr(result, name)[0] = value
    return result.to_vector()


@pytest.mark.parametrize(
    "twist",
    [
        changed(tally=np.array([1])),
        changed(tally=-tally()),
        changed(tally=tally(length=2**50)),
        changed(tally=tally(patterns=[1000] + 15 * [0], chance=1000 * 504)),
        changed(samples="{"),
        changed(samples='[{"text": "a record"}]'),
        changed(samples='[{"text": 1}]'),
    ],
    ids=["length", "negative", "tokens", "questions", "json", "keys", "type"],
)
def test_a_test_reply_that_is_none_is_left_out_and_the_others_count(tmp_path: Path, twist: Twist):
    with Run(tmp_path, Sites(twists={("site-02", "Evaluate"): twist})) as run:
        schema = run.set_up()
        evaluation = run.coordinator.evaluate(schema, ROUND_ZERO, ROUND_ZERO, 2)
        assert (evaluation["sites"], evaluation["n"], evaluation["final"]["correct"]) == (2, 20, 8)
        assert losses(run) == [("evaluate", "site-02", "protocol")]


def test_too_few_test_replies_stop_the_run_until_it_is_resumed(tmp_path: Path):
    twists = {(name, "Evaluate"): changed(samples="[") for name in ("site-01", "site-03")}
    with Run(tmp_path, Sites(twists=twists)) as run, pytest.raises(QuorumError, match="evaluate"):
        run.coordinator.evaluate(run.set_up(), ROUND_ZERO, ROUND_ZERO, 2)
    with Run(tmp_path, Sites(), resume=True) as run:
        assert run.coordinator.evaluate(run.set_up(), ROUND_ZERO, ROUND_ZERO, 2)["sites"] == 3


def test_samples_of_a_registry_that_is_not_open_are_not_taken(tmp_path: Path):
    sample = {
        "target": "t", "section": "s", "text": "a record", "options": ["1", "2"], "answer": "A",
        "models": {name: {"chosen": "A", "text": ""} for name in ("base", "final")},
    }  # fmt: skip
    for public, taken in ((True, 1), (False, 0)):
        sites = Sites(twists={("site-02", "Evaluate"): changed(samples=json.dumps([sample]))})
        with Run(tmp_path / str(public), sites) as run:
            schema = run.set_up()
            private = DICTIONARY.model_copy(update={"public": public})
            coordinator = Coordinator(CONFIG, private, tmp_path / str(public), run.journal, run.consortium)
            coordinator.evaluate(schema, ROUND_ZERO, ROUND_ZERO, 2)
            assert len(run.journal.read("evaluate").values["samples"]) == taken
            assert "a record" not in (tmp_path / str(public) / "evaluation.json").read_text()


def handed(run: Run) -> list[str]:
    return run.journal.read("finalize").values["sites"]


def test_a_site_that_is_away_at_the_end_gets_the_model_on_a_later_resume(tmp_path: Path):
    names = ["site-01", "site-02", "site-03"]
    with Run(tmp_path, Sites(twists={("site-03", "Finalize"): failing("model")})) as run:
        run.roll_call.everyone()
        run.coordinator.hand_back(ROUND_ZERO, 2, names)
        assert handed(run) == ["site-01", "site-02"]
    away = Sites(away={"site-03"})
    with Run(tmp_path, away, resume=True) as run:
        run.roll_call.everyone()
        run.coordinator.hand_back(ROUND_ZERO, 2, names)
        assert handed(run) == ["site-01", "site-02"]
        assert losses(run) == [("finalize", "site-03", "model"), ("finalize", "site-03", "absent")]
    back = Sites()
    with Run(tmp_path, back, resume=True) as run:
        run.roll_call.everyone()
        run.coordinator.hand_back(ROUND_ZERO, 2, names)
        assert handed(run) == names
        run.coordinator.hand_back(ROUND_ZERO, 2, names)
    assert [asked for asked in back.asked if asked[1] == "Finalize"] == [("site-03", "Finalize")]


def test_another_digest_of_the_final_adapter_is_not_taken_for_having_it(tmp_path: Path):
    with Run(tmp_path, Sites(twists={("site-01", "Finalize"): changed(model_digest="0" * 64)})) as run:
        run.roll_call.everyone()
        run.coordinator.hand_back(ROUND_ZERO, 2, [])
        assert handed(run) == ["site-02", "site-03"]
        assert losses(run) == [("finalize", "site-01", "protocol")]


def test_too_few_at_the_end_stop_the_run_and_nobody_is_asked_twice(tmp_path: Path):
    names = ["site-01", "site-02", "site-03"]
    twists = {(name, "Finalize"): failing("model") for name in names[:2]}
    with Run(tmp_path, Sites(twists=twists)) as run:
        run.roll_call.everyone()
        with pytest.raises(QuorumError, match=r"finalize: .* 1 finished; site-01 \(model\), site-02 \(model\)"):
            run.coordinator.hand_back(ROUND_ZERO, 2, names)
    back = Sites()
    with Run(tmp_path, back, resume=True) as run:
        run.roll_call.everyone()
        run.coordinator.hand_back(ROUND_ZERO, 2, names)
        assert handed(run) == names
    assert ("site-03", "Finalize") not in back.asked
