"""Set-up, evaluation and the end of a run, with sites that fail, come late, come back, or answer nonsense."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wardround.common.config import RunConfig
from wardround.common.errors import ProtocolError
from wardround.common.messages import EvaluateInstruction, Failure, Instruction, encode
from wardround.common.schema import Schema, derive_schema
from wardround.server.aggregation import LostSumError, SecureSums
from wardround.server.cohort import QuorumError
from wardround.server.journal import Journal, open_journal
from wardround.server.phases import Consortium
from wardround.server.roll_call import RollCall
from wardround.server.run import Coordinator
from wardround.server.tracking import SilentProgress

from tests.server import sites_case
from tests.server.sites_case import COUNTS, DICTIONARY, PATIENTS, ROUND_ZERO, Sites, Stopped, Twist, changed, failing

CONFIG = RunConfig.model_validate(
    {"name": "t", "privacy": {"enabled": False}, "evaluation": {"bootstrap_samples": 100, "questions_per_site": 10}}
)
SCHEMA = derive_schema(COUNTS, DICTIONARY, CONFIG.questions)


class Run:
    """The coordinator's process: what it has open, and the sites it talks to."""

    def __init__(self, out: Path, sites: Sites, config: RunConfig = CONFIG, *, resume: bool = False) -> None:
        sites.targets = SCHEMA.names
        self.journal: Journal = open_journal(out, config, resume)
        self.consortium = Consortium(sites, config, self.journal, SilentProgress())
        self.sums = SecureSums(self.consortium, sites.roster)
        self.coordinator = Coordinator(config, DICTIONARY, out, self.journal, self.consortium, self.sums)
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


Twists = dict[Any, Twist | str]
NAMES = ["site-01", "site-02", "site-03", "site-04", "site-05"]


def without(*names: str) -> list[str]:
    return [name for name in NAMES if name not in names]


def test_the_roll_call_learns_names_and_nothing_of_patients(tmp_path: Path):
    sites = Sites()
    with Run(tmp_path, sites) as run:
        run.roll_call.everyone()
        assert run.consortium.cohort.nodes == dict(zip(NAMES, range(2, 7), strict=True))
        assert losses(run) == []
    told = {name for answer in sites.answers for name in vars(answer.reply)}
    assert told == {"run_id", "site", "round_index", "model_digest", "dictionary_digest"}


@pytest.mark.parametrize(
    ("twist", "code"),
    [
        (failing("verification"), "verification"),
        (changed(model_digest="0" * 64), "protocol"),
        (changed(dictionary_digest="0" * 64), "protocol"),
        (changed(run_id="0" * 32), "protocol"),
        (changed(round_index=1), "protocol"),
    ],
)
def test_a_site_that_does_not_confirm_is_left_out_by_name(tmp_path: Path, twist: Twist, code: str):
    with Run(tmp_path, Sites(twists={("site-02", "Warmup"): twist})) as run:
        run.roll_call.everyone()
        assert run.consortium.cohort.names == without("site-02")
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
        assert run.consortium.cohort.nodes == {"site-01": 2, "site-02": 3, "site-04": 5, "site-05": 6}
        assert losses(run) == [("warm-up", "node 4", "protocol")]


def test_a_site_under_anothers_name_is_in_no_sum(tmp_path: Path):
    # Nobody else claims the name, so the roll call cannot tell; the roster's key can.
    sites = Sites(names={2: "site-01", 3: "site-02", 4: "site-03", 5: "site-04"})
    sites.roster, sites.names = Sites().roster, {**sites.names, 6: "site-05"}
    sites.identities = {"site-05": sites_case.identity("a stranger")}
    with Run(tmp_path, sites) as run:
        assert run.set_up().rows == 4 * COUNTS.rows
        assert losses(run) == [("counts", "site-05", "unknown-member")]


def test_too_few_at_the_roll_call_end_the_run_with_their_names(tmp_path: Path):
    twists: Twists = {(name, "Warmup"): failing("refused") for name in ("site-01", "site-03", "site-04")}
    with (
        Run(tmp_path, Sites(twists=twists)) as run,
        pytest.raises(QuorumError, match=r"warm-up: .* 2 finished; site-01 \(refused\), site-03 \(refused\)"),
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
        assert run.consortium.cohort.ready == set(NAMES)
        sites.asked.clear()
        run.roll_call.latecomers()
        assert sites.asked == []


@pytest.mark.parametrize("phase", ["Warmup", "Schema"])
def test_a_site_that_failed_in_the_set_up_is_asked_again(tmp_path: Path, phase: str):
    sites = Sites(twists={("site-02", phase): failing("registry")})
    with Run(tmp_path, sites) as run:
        run.set_up()
        assert run.consortium.cohort.ready == set(without("site-02"))
        sites.twists.clear()
        run.roll_call.latecomers()
        assert run.consortium.cohort.ready == set(NAMES)
        assert losses(run) == [({"Warmup": "warm-up", "Schema": "schema"}[phase], "site-02", "registry")]


def test_a_site_that_reconnects_as_another_node_keeps_its_name(tmp_path: Path):
    sites = Sites()
    with Run(tmp_path, sites) as run:
        run.set_up()
        sites.names = {**{node: name for node, name in sites.names.items() if name != "site-03"}, 9: "site-03"}
        run.roll_call.latecomers()
        assert run.consortium.cohort.nodes["site-03"] == 9
        assert sites.asked[-2:] == [("site-03", "Warmup"), ("site-03", "Schema")]
        assert losses(run) == []


def test_the_schema_comes_from_the_sum_of_the_counts(tmp_path: Path):
    with Run(tmp_path, Sites()) as run:
        schema = run.set_up()
        assert schema.rows == 5 * COUNTS.rows
        about = run.journal.read("schema").values
        assert (about["sites"], about["patients"]) == (NAMES, 5 * PATIENTS)
        assert not list((tmp_path / "journal").glob("counts*"))


@pytest.mark.parametrize("exchange", ["", "/Shares", "/Mask"])
def test_a_site_that_does_not_finish_the_counts_is_left_out_of_the_schema(tmp_path: Path, exchange: str):
    with Run(tmp_path, Sites(twists={("site-02", f"Count{exchange}"): failing("registry")})) as run:
        schema = run.set_up()
        assert schema.rows == 4 * COUNTS.rows
        about = run.journal.read("schema").values
        assert (about["sites"], about["patients"]) == (without("site-02"), 4 * PATIENTS)
        assert [loss[1:] for loss in losses(run)] == [("site-02", "registry")]


def test_counts_over_other_bins_are_left_out_by_name(tmp_path: Path):
    other = COUNTS.to_vector().astype(np.uint32)[:-1], np.array([PATIENTS])
    with Run(tmp_path, Sites(payloads={"site-02": other})) as run:
        assert run.set_up().rows == 4 * COUNTS.rows
        assert losses(run) == [("counts", "site-02", "other-sum")]


def test_too_few_for_the_counts_stop_the_run_until_it_is_resumed(tmp_path: Path):
    sites = Sites(twists={(name, "Count/Mask"): "silent" for name in ("site-01", "site-03")})
    with Run(tmp_path, sites) as run, pytest.raises(QuorumError, match="counts: expected at least 3"):
        run.set_up()
    sites.twists.clear()
    with Run(tmp_path, sites, resume=True) as run:
        assert run.set_up().rows == 5 * COUNTS.rows


def test_lost_counts_end_the_run_and_their_sites_can_still_finish_them(tmp_path: Path):
    sites = Sites(twists={(name, "Count/Unmask"): failing("silent") for name in ("site-01", "site-03")})
    with Run(tmp_path, sites) as run, pytest.raises(LostSumError, match="counts"):
        run.set_up()
    sites.twists.clear()
    with Run(tmp_path, sites, resume=True) as run:
        assert run.set_up().rows == 5 * COUNTS.rows


def test_another_schema_than_the_published_one_is_not_taken_for_ready(tmp_path: Path):
    with Run(tmp_path, Sites(twists={("site-02", "Schema"): changed(schema_digest="0" * 64)})) as run:
        run.set_up()
        assert losses(run) == [("schema", "site-02", "protocol")]
        assert "site-02" not in run.consortium.cohort.ready


def test_the_test_result_is_that_of_the_sum(tmp_path: Path):
    sites = Sites()
    with Run(tmp_path, sites) as run:
        evaluation = run.coordinator.evaluate(run.set_up(), ROUND_ZERO, ROUND_ZERO, 2)
        assert (evaluation["sites"], evaluation["n"], evaluation["final"]["correct"]) == (5, 50, 20)
        assert losses(run) == []
        assert not list((tmp_path / "journal").glob("evaluate-*"))
    alone = sites.tally().to_vector().tobytes()
    assert not any(alone in encode(answer.reply) for answer in sites.answers if answer.reply)


@pytest.mark.parametrize(
    "twist",
    [changed(samples="{"), changed(samples='[{"text": "a record"}]'), changed(samples='[{"text": 1}]')],
    ids=["json", "keys", "type"],
)
def test_a_test_reply_that_is_none_is_left_out_and_the_others_count(tmp_path: Path, twist: Twist):
    with Run(tmp_path, Sites(twists={("site-02", "Evaluate"): twist})) as run:
        evaluation = run.coordinator.evaluate(run.set_up(), ROUND_ZERO, ROUND_ZERO, 2)
        assert (evaluation["sites"], evaluation["n"], evaluation["final"]["correct"]) == (4, 40, 16)
        assert losses(run) == [("evaluate", "site-02", "protocol")]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"patterns": [1000] + 15 * [0], "chance": 1000 * 504}, "more questions than were asked"),
        ({"boxed": [11 * 5, 0, 0]}, "contradict"),
    ],
    ids=["questions", "boxed"],
)
def test_test_counts_that_are_none_stop_the_run_without_a_result(tmp_path: Path, changes: dict[str, Any], said: str):
    class Wrong(Sites):
        def payload(self, site: str, instruction: Instruction) -> tuple[np.ndarray, np.ndarray]:
            if site != "site-02" or not isinstance(instruction, EvaluateInstruction):
                return super().payload(site, instruction)
            tally = self.tally()
            for name, value in changes.items():
                getattr(tally, name)[0] = value
            return np.zeros(0, np.uint32), tally.to_vector()

    with Run(tmp_path, Wrong()) as run, pytest.raises(ProtocolError, match=said):
        run.coordinator.evaluate(run.set_up(), ROUND_ZERO, ROUND_ZERO, 2)
    assert not (tmp_path / "evaluation.json").exists()


def test_too_few_test_replies_stop_the_run_until_it_is_resumed(tmp_path: Path):
    sites = Sites(twists={(name, "Evaluate"): changed(samples="[") for name in without("site-02", "site-04")})
    with Run(tmp_path, sites) as run, pytest.raises(QuorumError, match="evaluate"):
        run.coordinator.evaluate(run.set_up(), ROUND_ZERO, ROUND_ZERO, 2)
    sites.twists.clear()
    with Run(tmp_path, sites, resume=True) as run:
        assert run.coordinator.evaluate(run.set_up(), ROUND_ZERO, ROUND_ZERO, 2)["sites"] == 5


SAMPLE = {
    "target": "t", "section": "s", "text": "a record", "options": ["1", "2"], "answer": "A",
    "models": {name: {"chosen": "A", "text": ""} for name in ("base", "final")},
}  # fmt: skip


def test_samples_of_a_registry_that_is_not_open_are_not_taken(tmp_path: Path):
    for public, taken in ((True, 1), (False, 0)):
        sites = Sites(twists={("site-02", "Evaluate"): changed(samples=json.dumps([SAMPLE]))})
        with Run(tmp_path / str(public), sites) as run:
            schema = run.set_up()
            private = DICTIONARY.model_copy(update={"public": public})
            coordinator = replace(run.coordinator, dictionary=private)
            coordinator.evaluate(schema, ROUND_ZERO, ROUND_ZERO, 2)
            assert len(run.journal.read("evaluate").values["samples"]) == taken
            assert "a record" not in (tmp_path / str(public) / "evaluation.json").read_text()


def test_a_kill_while_the_test_is_summed_costs_neither_result_nor_samples(tmp_path: Path):
    for stop in range(0, 5 * 5, 4):
        sites, out = (
            Sites(twists={("site-02", "Evaluate"): changed(samples=json.dumps([SAMPLE]))}),
            tmp_path / str(stop),
        )
        with Run(out, sites) as run:
            schema = run.set_up()
            sites.stop_after = len(sites.asked) + stop
            with pytest.raises(Stopped):
                run.coordinator.evaluate(schema, ROUND_ZERO, ROUND_ZERO, 2)
        sites.stop_after = 10**9
        with Run(out, sites, resume=True) as run:
            evaluation = run.coordinator.evaluate(run.set_up(), ROUND_ZERO, ROUND_ZERO, 2)
            assert (evaluation["sites"], evaluation["n"]) == (5, 50)
            assert [sample["site"] for sample in run.journal.read("evaluate").values["samples"]] == ["site-02"]


def handed(run: Run) -> list[str]:
    return run.journal.read("finalize").values["sites"]


def test_a_site_that_is_away_at_the_end_gets_the_model_on_a_later_resume(tmp_path: Path):
    with Run(tmp_path, Sites(twists={("site-03", "Finalize"): failing("model")})) as run:
        run.roll_call.everyone()
        run.coordinator.hand_back(ROUND_ZERO, 2, NAMES)
        assert handed(run) == without("site-03")
    away = Sites(away={"site-03"})
    with Run(tmp_path, away, resume=True) as run:
        run.roll_call.everyone()
        run.coordinator.hand_back(ROUND_ZERO, 2, NAMES)
        assert handed(run) == without("site-03")
        assert losses(run) == [("finalize", "site-03", "model"), ("finalize", "site-03", "absent")]
    back = Sites()
    with Run(tmp_path, back, resume=True) as run:
        run.roll_call.everyone()
        run.coordinator.hand_back(ROUND_ZERO, 2, NAMES)
        assert handed(run) == NAMES
        run.coordinator.hand_back(ROUND_ZERO, 2, NAMES)
    assert [asked for asked in back.asked if asked[1] == "Finalize"] == [("site-03", "Finalize")]


def test_another_digest_of_the_final_adapter_is_not_taken_for_having_it(tmp_path: Path):
    with Run(tmp_path, Sites(twists={("site-01", "Finalize"): changed(model_digest="0" * 64)})) as run:
        run.roll_call.everyone()
        run.coordinator.hand_back(ROUND_ZERO, 2, [])
        assert handed(run) == without("site-01")
        assert losses(run) == [("finalize", "site-01", "protocol")]


def test_too_few_at_the_end_stop_the_run_and_nobody_is_asked_twice(tmp_path: Path):
    twists: Twists = {(name, "Finalize"): failing("model") for name in NAMES[:3]}
    with Run(tmp_path, Sites(twists=twists)) as run:
        run.roll_call.everyone()
        with pytest.raises(QuorumError, match=r"finalize: .* 2 finished; site-01 \(model\), site-02 \(model\)"):
            run.coordinator.hand_back(ROUND_ZERO, 2, NAMES)
    back = Sites()
    with Run(tmp_path, back, resume=True) as run:
        run.roll_call.everyone()
        run.coordinator.hand_back(ROUND_ZERO, 2, NAMES)
        assert handed(run) == NAMES
    assert ("site-04", "Finalize") not in back.asked
