"""The round loop with small sites that really answer: mean, gate, quorum, lost sums, and a resume after any stop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wardround.common import sums
from wardround.common.config import RunConfig
from wardround.common.errors import ProtocolError
from wardround.common.messages import Instruction, TrainInstruction
from wardround.server.aggregation import LostSumError, SecureSums
from wardround.server.cohort import QuorumError
from wardround.server.journal import open_journal
from wardround.server.phases import Consortium
from wardround.server.rounds import Rounds, State
from wardround.server.tracking import SilentProgress, Tracker

from tests.server.sites_case import ROUND_ZERO, Sites, Stopped, failing, names_of

NAMES = list(names_of(5).values())
# Updates become integers: the mean of five is right to 5 / scale, with this range about 2e-6.
RANGE = 64.0
CLOSE = 1e-5


def config(**federation: object) -> RunConfig:
    set_up = {
        "rounds": 3,
        "patience": 9,
        "validation_questions_per_site": 100,
        "max_sites": 8,
        "update_range": RANGE,
        **federation,
    }
    return RunConfig.model_validate({"name": "t", "privacy": {"enabled": False}, "federation": set_up})


def go(out: Path, sites: Sites, run: RunConfig, *, resume: bool = False) -> State:
    with open_journal(out, run, resume) as journal:
        consortium = Consortium(sites, run, journal, SilentProgress())
        for node in sites.nodes():
            consortium.cohort.admit(sites.names[node], node, sites.nodes())
        rounds = Rounds(run, consortium, journal, SecureSums(consortium, sites.roster), "schema", ROUND_ZERO)
        rounds.baseline()
        tracker = Tracker(out, rounds.finished_records(), None)
        try:
            return rounds.run(tracker)
        finally:
            tracker.close()


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def three() -> Sites:
    return Sites(names=names_of(3))


def test_the_mean_update_is_applied_and_the_frozen_part_stays(tmp_path: Path):
    sites = Sites()
    state = go(tmp_path, sites, config(rounds=2))
    # Round 1: mean of 1 … 5; round 2: a tenth of that plus mean of 2, 4 … 10.
    assert state.model.full[:2].tolist() == [1, 2]
    assert state.model.trainable == pytest.approx([3 + 0.3 + 6] * 3, abs=CLOSE)
    assert [line["round"] for line in lines(tmp_path)] == [1, 2]
    first = lines(tmp_path)[0]
    assert (first["site_count"], first["sites"], first["failures"]) == (5, NAMES, {})
    assert (first["reward_mean"], first["questions"], first["completions"], first["steps"]) == (0.5, 20, 40, 5)
    assert first["reward_histogram"] == [5, 10, 5, 0, 0, 0, 0, 0]
    assert first["boxed_rate"] is None  # answer-only: no text, no box
    assert (first["completion_tokens_mean"], first["clipped"]) == (2, 0)
    assert (first["validation_accuracy"], first["validation_questions"]) == (0.51, 500)
    assert first["update_norm_l2"] == pytest.approx(3 * 3**0.5, abs=CLOSE)


def test_the_traffic_of_a_round_is_that_of_its_two_sums(tmp_path: Path):
    sites = three()
    go(tmp_path, sites, config(rounds=1))
    about = [instruction.round_index == 1 for _, instruction in sites.instructions]
    (line,) = lines(tmp_path)
    for way in ("bytes_up", "bytes_down"):
        sent = (getattr(answer, way) for answer in sites.answers)
        assert line[way] == sum(size for size, mine in zip(sent, about, strict=True) if mine)


def test_values_outside_the_range_are_clipped_and_counted(tmp_path: Path):
    state = go(tmp_path, three(), config(rounds=1, update_range=2.0))
    assert state.model.trainable == pytest.approx([(1 + 2 + 2) / 3] * 3, abs=CLOSE)
    assert lines(tmp_path)[0]["clipped"] == 3


def test_a_round_that_hurts_is_undone_and_the_next_starts_from_the_best(tmp_path: Path):
    accuracies = {0: 50, 1: 60, 2: 40, 3: 61}
    sites = Sites(names=names_of(3), correct=lambda _, index: accuracies[index])
    state = go(tmp_path, sites, config())
    assert [line["rolled_back"] for line in lines(tmp_path)] == [False, True, False]
    assert [line["kept_round"] for line in lines(tmp_path)] == [1, 1, 3]
    # Round 1 ends at 2; round 2 is undone; round 3 adds a tenth of 2 and the mean of 3, 6, 9.
    assert state.kept_model.trainable == pytest.approx([2 + 0.2 + 6] * 3, abs=CLOSE)


def test_the_warmed_up_model_stays_when_no_round_is_as_good(tmp_path: Path):
    state = go(tmp_path, Sites(names=names_of(3), correct=lambda _, index: 50 - 10 * index), config())
    assert state.kept.round_index == 0
    assert state.kept_model.digest == ROUND_ZERO.digest


def test_the_last_round_is_final_where_it_is_asked_for_and_a_collapse_is_still_undone(tmp_path: Path):
    accuracies = {0: 50, 1: 60, 2: 59, 3: 40, 4: 59}
    state = go(
        tmp_path,
        Sites(names=names_of(3), correct=lambda _, index: accuracies[index]),
        config(rounds=4, keep="last"),
    )
    assert [line["rolled_back"] for line in lines(tmp_path)] == [False, False, True, False]
    assert [line["kept_round"] for line in lines(tmp_path)] == [1, 2, 2, 4]
    # Round 1 ends at 2, round 2 adds a tenth of it and the mean of 2, 4, 6; round 4 starts from there, not from the
    # highest, and adds a tenth and the mean of 4, 8, 12.
    assert state.kept_model.trainable == pytest.approx([1.1 * (2 + 0.2 + 4) + 8] * 3, abs=CLOSE)


def test_a_run_that_does_not_rise_stops_early(tmp_path: Path):
    sites = Sites(names=names_of(3), correct=lambda _, index: 50 - (index > 0))
    go(tmp_path, sites, config(rounds=9, patience=2))
    assert len(lines(tmp_path)) == 2


def test_without_validation_the_last_round_is_final(tmp_path: Path):
    sites = three()
    state = go(tmp_path, sites, config(rounds=2, validation_questions_per_site=0))
    assert state.kept.round_index == 2
    assert not any("Validate" in kind for _, kind in sites.asked)


@pytest.mark.parametrize("exchange", ["", "/Shares", "/Mask"])
def test_a_site_that_fails_is_left_out_by_name_and_comes_back(tmp_path: Path, exchange: str):
    sites = Sites(twists={("site-02", f"Train{exchange}", 1): "silent"})
    state = go(tmp_path, sites, config(rounds=2))
    assert [line["sites"] for line in lines(tmp_path)] == [[name for name in NAMES if name != "site-02"], NAMES]
    assert lines(tmp_path)[0]["failures"] == {"site-02": "silent"}
    assert state.model.trainable == pytest.approx([13 / 4 * 1.1 + 6] * 3, abs=CLOSE)


def test_a_site_that_failed_in_training_may_validate(tmp_path: Path):
    go(
        tmp_path,
        Sites(twists={("site-02", "Train", 1): "silent", ("site-04", "Validate", 1): "silent"}),
        config(rounds=1),
    )
    (line,) = lines(tmp_path)
    assert line["validation_questions"] == 400
    assert line["failures"] == {"site-02": "silent", "site-04": "silent"}


@pytest.mark.parametrize("exchange", ["/Survivors", "/Unmask"])
def test_a_lost_update_leaves_the_model_as_it_was_and_training_goes_on(tmp_path: Path, exchange: str):
    twists: dict[Any, Any] = {(name, f"Train{exchange}", 2): failing("silent") for name in ("site-01", "site-03")}
    state = go(tmp_path, Sites(twists=twists), config())
    assert [line["site_count"] for line in lines(tmp_path)] == [5, 0, 5]
    first, void, last = lines(tmp_path)
    assert (void["sites"], void["questions"], void["reward_mean"], void["update_norm_l2"]) == ([], 0, None, 0)
    assert (void["failures"], void["model_digest"]) == ({"sum": "threshold"}, first["model_digest"])
    assert void["reward_histogram"] == [0] * 8
    # Round 1 ends at 3; round 3 starts from there: a tenth of 3 and the mean of 3, 6 … 15.
    assert last["model_digest"] == state.model.digest
    assert state.model.trainable == pytest.approx([3 + 0.3 + 9] * 3, abs=CLOSE)
    assert not list((tmp_path / "journal").glob("*-sum.record"))  # it can no longer be had, also after a restart


def test_a_lost_update_resumes_to_the_same_bits(tmp_path: Path):
    twists: dict[Any, Any] = {(name, "Train/Unmask", 1): failing("silent") for name in ("site-01", "site-03")}
    expected = go(tmp_path / "whole", Sites(twists=dict(twists)), config(rounds=2))
    for stop in range(27, 80, 9):
        sites, out = Sites(twists=dict(twists), stop_after=stop), tmp_path / str(stop)
        with pytest.raises(Stopped):
            go(out, sites, config(rounds=2))
        sites.stop_after = 10**9
        assert go(out, sites, config(rounds=2), resume=True).model.digest == expected.model.digest


def test_a_lost_validation_keeps_the_round_and_the_best(tmp_path: Path):
    accuracies = {0: 50, 1: 60, 2: 20, 3: 59}
    twists: dict[Any, Any] = {(name, "Validate/Unmask", 2): failing("silent") for name in ("site-01", "site-03")}
    state = go(tmp_path, Sites(correct=lambda _, index: accuracies[index], twists=twists), config())
    assert [line["validation_accuracy"] for line in lines(tmp_path)] == [0.6, None, 0.59]
    assert [line["kept_round"] for line in lines(tmp_path)] == [1, 1, 1]
    assert [line["rolled_back"] for line in lines(tmp_path)] == [False, False, False]
    assert lines(tmp_path)[1]["failures"] == {"sum": "threshold"}
    assert state.kept_model.trainable == pytest.approx([3] * 3, abs=CLOSE)


def test_the_last_round_is_not_final_where_its_validation_is_lost(tmp_path: Path):
    twists: dict[Any, Any] = {(name, "Validate/Unmask", 2): failing("silent") for name in ("site-01", "site-03")}
    state = go(tmp_path, Sites(twists=twists), config(rounds=2, keep="last"))
    assert [line["kept_round"] for line in lines(tmp_path)] == [1, 1]
    assert state.kept_model.trainable == pytest.approx([3] * 3, abs=CLOSE)


def test_a_lost_baseline_stops_the_run_until_the_same_sites_finish_it(tmp_path: Path):
    sites = Sites(twists={(name, "Validate/Unmask", 0): failing("silent") for name in ("site-01", "site-03")})
    with pytest.raises(LostSumError):
        go(tmp_path, sites, config(rounds=1))
    sites.twists.clear()
    go(tmp_path, sites, config(rounds=1), resume=True)
    assert lines(tmp_path)[0]["kept_round"] == 1


@pytest.mark.parametrize(
    "numbers",
    [
        {"weight": 5},
        {"weight": 0},
        {"boxed": 90},
        {"reward": 2**40},
        {"histogram": 100},
    ],
    ids=lambda numbers: next(iter(numbers)),
)
def test_a_sum_that_no_training_gives_voids_the_round_and_nothing_is_applied(tmp_path: Path, numbers: dict[str, int]):
    class Wrong(Sites):
        def payload(self, site: str, instruction: Instruction) -> tuple[np.ndarray, np.ndarray]:
            ring, tail = super().payload(site, instruction)
            if site == "site-02" and isinstance(instruction, TrainInstruction):
                ring, tail = sums.fixed_point(config()).quantise(ring, 1.0, bytes(32))[0], tail.copy()
                for name, value in numbers.items():
                    tail[len(sums.UPDATE_TAIL) if name == "histogram" else sums.UPDATE_TAIL.index(name)] = value
            return ring, tail

    go(tmp_path, Wrong(names=names_of(3)), config(rounds=1))
    (line,) = lines(tmp_path)
    assert line["sites"] == [] and line["failures"] == {"sum": "protocol"} and line["update_norm_l2"] == 0


@pytest.mark.parametrize("numbers", [(100, 101), (100, 1000), (10**6, 10**6)])
def test_a_validation_that_cannot_be_stops_the_run(tmp_path: Path, numbers: tuple[int, int]):
    class Wrong(Sites):
        def payload(self, site: str, instruction: Instruction) -> tuple[np.ndarray, np.ndarray]:
            ring, tail = super().payload(site, instruction)
            lies = instruction.round_index == 1 and not isinstance(instruction, TrainInstruction)
            return ring, np.array(numbers) if lies else tail

    with pytest.raises(ProtocolError, match="sum of validation"):
        go(tmp_path, Wrong(names=names_of(3)), config(rounds=1))


def test_every_round_begins_with_a_look_for_latecomers(tmp_path: Path):
    sites, run, seen = Sites(names=names_of(4)), config(rounds=2), []
    with open_journal(tmp_path, run, False) as journal:
        consortium = Consortium(sites, run, journal, SilentProgress())
        for node in (2, 3, 4):
            consortium.cohort.admit(sites.names[node], node, sites.nodes())

        def look() -> None:
            seen.append(len(sites.asked))
            consortium.cohort.admit("site-04", 5, sites.nodes())

        rounds = Rounds(run, consortium, journal, SecureSums(consortium, sites.roster), "schema", ROUND_ZERO, look)
        rounds.baseline()
        rounds.run(Tracker(tmp_path, [], None))
    assert seen == [5 * 3, 5 * 3 + 2 * 5 * 4]
    assert [line["sites"] for line in lines(tmp_path)] == [NAMES[:4]] * 2


def test_patients_weigh_the_mean(tmp_path: Path):
    class Weighing(Sites):
        def weight(self, site: str) -> int:
            return {"site-01": 10, "site-02": 30, "site-03": 60}[site]

    state = go(tmp_path, Weighing(names=names_of(3)), config(rounds=1, weighting="patients", max_weight=100))
    assert state.model.trainable == pytest.approx([(1 * 10 + 2 * 30 + 3 * 60) / 100] * 3, abs=CLOSE)


@pytest.mark.parametrize("phase", ["Train", "Train/Shares", "Train/Mask", "Validate", "Validate/Mask"])
def test_below_quorum_the_run_stops_with_every_name_and_can_be_resumed(tmp_path: Path, phase: str):
    sites = three()
    sites.twists = {("site-01", phase, 2): "silent", ("site-03", phase, 2): failing("refused")}
    with pytest.raises(
        QuorumError, match=r"at least 3 sites .*, fewer finished; site-01 \(silent\), site-03 \(refused\)"
    ) as stopped:
        go(tmp_path, sites, config())
    assert "--resume" in str(stopped.value)
    assert [line["round"] for line in lines(tmp_path)] == [1]
    sites.twists.clear()
    state = go(tmp_path, sites, config(), resume=True)
    assert [line["round"] for line in lines(tmp_path)] == [1, 2, 3]
    assert state.model.full.tolist() == go(tmp_path / "again", three(), config()).model.full.tolist()


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
def test_a_run_stopped_at_any_message_resumes_to_the_same_bits(tmp_path: Path, optimizer: str, keep: str):
    accuracies = {0: 50, 1: 60, 2: 59, 3: 40, 4: 61}
    run = config(rounds=4, server_optimizer=optimizer, server_learning_rate=0.3, keep=keep)
    whole = Sites(names=names_of(3), correct=lambda _, index: accuracies[index])
    expected = go(tmp_path / "whole", whole, run)
    assert len(whole.asked) == (1 + 2 * 4) * 5 * 3
    # In time at every exchange; the two optimizers share the places between them.
    for stop in range(11 * (optimizer == "fedadam"), len(whole.asked), 22):
        out = tmp_path / str(stop)
        sites = Sites(names=names_of(3), correct=whole.correct, stop_after=stop)
        with pytest.raises(Stopped):
            go(out, sites, run)
        sites.stop_after = 10**9
        state = go(out, sites, run, resume=True)
        assert state.kept_model.full.tobytes() == expected.kept_model.full.tobytes()
        assert (state.kept.round_index, state.kept.since) == (expected.kept.round_index, expected.kept.since)
        timed = ("seconds", "seconds_train", "bytes_up", "bytes_down")  # of one process
        untimed = [
            [{k: v for k, v in line.items() if k not in timed} for line in lines(folder)]
            for folder in (out, tmp_path / "whole")
        ]
        assert untimed[0] == untimed[1]


@pytest.mark.parametrize(("keep", "adapters"), [("best", [1, 4]), ("last", [4])])
def test_only_the_newest_adapter_and_the_one_kept_are_on_disk(tmp_path: Path, keep: str, adapters: list[int]):
    accuracies = {0: 50, 1: 60, 2: 59, 3: 59, 4: 59}
    sites = Sites(names=names_of(3), correct=lambda _, index: accuracies[index])
    go(tmp_path, sites, config(rounds=4, keep=keep))
    found = sorted(path.name for path in (tmp_path / "journal").glob("*-apply.record"))
    assert found == [f"round-{index:05d}-apply.record" for index in adapters]
    # Nothing of a finished sum is left.
    parts = ("sum", "signed", "attempt")
    assert not [path for part in parts for path in (tmp_path / "journal").glob(f"*-{part}.record")]


def test_tensorboard_files_hold_each_round_once_after_a_resume(tmp_path: Path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    sites = three()
    sites.stop_after = 15 + 2 * 15 + 20  # in round 2
    with pytest.raises(Stopped):
        go(tmp_path, sites, config())
    sites.stop_after = 10**9
    go(tmp_path, sites, config(), resume=True)
    (events,) = (tmp_path / "tensorboard").iterdir()
    steps = [
        event.step
        for event in EventFileLoader(str(events)).Load()
        for value in event.summary.value
        if value.tag == "train/reward_mean"
    ]
    assert steps == [1, 2, 3]
