"""The round loop with small sites that really answer: mean, gate, quorum, and a resume after a stop at any message."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from wardround.common.adapter import Manifest, TensorSpec
from wardround.common.config import RunConfig
from wardround.common.global_model import GlobalModel
from wardround.common.messages import (
    CollectInstruction,
    CollectReply,
    Failure,
    Instruction,
    Reply,
    TrainInstruction,
    TrainReply,
    ValidateInstruction,
    ValidateReply,
)
from wardround.server.cohort import QuorumError
from wardround.server.journal import open_journal
from wardround.server.phases import Answer, Consortium
from wardround.server.rounds import Rounds, State
from wardround.server.tracking import SilentProgress, Tracker

SPECS = (TensorSpec("a", (2,), False), TensorSpec("b", (3,), True))
ROUND_ZERO = GlobalModel(Manifest(SPECS, "base", "ffa"), np.array([1, 2, 0, 0, 0], np.float32))
NAMES = ["site-01", "site-02", "site-03"]
PATIENTS = {"site-01": 10, "site-02": 30, "site-03": 60}


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


@dataclass
class Sites:
    """Three sites that remember their update, as the real ones do; node ids are 2, 3, 4."""

    correct: Callable[[str, int], int] = lambda site, index: 50 + index
    broken: dict[tuple[str, str, int], Reply | str] = field(default_factory=dict)
    stop_after: int = 10**9
    stored: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    asked: list[tuple[str, str, int]] = field(default_factory=list)

    def nodes(self) -> list[int]:
        return [2, 3, 4]

    def ask(self, nodes: Sequence[int], instruction: Instruction) -> Iterator[Answer]:
        for node in nodes:
            if len(self.asked) >= self.stop_after:
                raise Stopped
            site = NAMES[node - 2]
            key = (site, type(instruction).__name__, instruction.round_index)
            self.asked.append(key)
            bad = self.broken.get(key)
            if isinstance(bad, str):
                yield Answer(node, None, bad, 0, 7)
            else:
                yield Answer(node, bad or self.reply(site, instruction), "", 5, 7)

    def reply(self, site: str, instruction: Instruction) -> Reply:
        head = {"run_id": instruction.run_id, "site": site, "round_index": instruction.round_index}
        index = instruction.round_index
        if isinstance(instruction, TrainInstruction):
            # The update depends on the model it starts from, so that a wrong start shows in every later round.
            moved = 0.1 * instruction.vector + (NAMES.index(site) + 1) * index
            self.stored[site, index] = moved.astype(np.float32)
            return TrainReply(
                **head, steps=1, questions=4, completions=8, reward_sum=4.0, boxed=8, completion_tokens=16, seconds=0.5,
                reward_histogram=np.array([1, 2, 1, 0, 0, 0, 0, 0]),
            )  # fmt: skip
        if isinstance(instruction, CollectInstruction):
            return CollectReply(**head, weight=1, delta=self.stored[site, index])
        assert isinstance(instruction, ValidateInstruction)
        return ValidateReply(**head, questions=100, correct=self.correct(site, index))


def config(**federation: object) -> RunConfig:
    set_up = {"rounds": 3, "patience": 9, "validation_questions_per_site": 100, **federation}
    return RunConfig.model_validate({"name": "t", "federation": set_up})


def go(out: Path, sites: Sites, run: RunConfig, *, resume: bool = False) -> State:
    journal = open_journal(out, run, resume)
    try:
        consortium = Consortium(sites, run, journal, SilentProgress())
        for node, name in enumerate(NAMES, start=2):
            consortium.cohort.admit(name, node, PATIENTS[name], sites.nodes())
        rounds = Rounds(run, consortium, journal, "schema", ROUND_ZERO)
        rounds.baseline()
        tracker = Tracker(out, rounds.finished_records(), None)
        try:
            return rounds.run(tracker)
        finally:
            tracker.close()
    finally:
        journal.close()


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def test_the_mean_update_is_applied_and_the_frozen_part_stays(tmp_path: Path):
    state = go(tmp_path, Sites(), config(rounds=2))
    # Round 1: mean of 1, 2, 3; round 2: a tenth of that plus mean of 2, 4, 6.
    assert state.model.full.tolist() == [1, 2, *[np.float32(2 + 0.2 + 4)] * 3]
    assert [line["round"] for line in lines(tmp_path)] == [1, 2]
    first = lines(tmp_path)[0]
    assert (first["site_count"], first["reward_mean"], first["questions"]) == (3, 0.5, 12)
    assert (first["bytes_up"], first["bytes_down"]) == (3 * 3 * 5, 3 * 3 * 7)
    assert first["reward_histogram"] == [3, 6, 3, 0, 0, 0, 0, 0]
    assert first["boxed_rate"] is None  # answer-only: no text, no box
    assert first["validation_accuracy"] == 0.51


def test_a_round_that_hurts_is_undone_and_the_next_starts_from_the_best(tmp_path: Path):
    accuracies = {0: 50, 1: 60, 2: 40, 3: 61}
    state = go(tmp_path, Sites(correct=lambda _, index: accuracies[index]), config())
    assert [line["rolled_back"] for line in lines(tmp_path)] == [False, True, False]
    assert [line["best_round"] for line in lines(tmp_path)] == [1, 1, 3]
    # Round 1 ends at 2; round 2 is undone; round 3 adds a tenth of 2 and the mean of 3, 6, 9.
    assert state.best_model.trainable.tolist() == [np.float32(2 + 0.2 + 6)] * 3


def test_the_warmed_up_model_stays_when_no_round_is_as_good(tmp_path: Path):
    state = go(tmp_path, Sites(correct=lambda _, index: 50 - 10 * index), config())
    assert state.best.round_index == 0
    assert state.best_model.digest == ROUND_ZERO.digest


def test_a_run_that_does_not_rise_stops_early(tmp_path: Path):
    go(tmp_path, Sites(correct=lambda _, index: 50 - (index > 0)), config(rounds=9, patience=2))
    assert len(lines(tmp_path)) == 2


def test_without_validation_the_last_round_is_final(tmp_path: Path):
    sites = Sites()
    state = go(tmp_path, sites, config(rounds=2, validation_questions_per_site=0))
    assert state.best.round_index == 2
    assert not any("Validate" in kind for _, kind, _ in sites.asked)


def test_a_site_that_fails_is_left_out_by_name_and_comes_back(tmp_path: Path):
    sites = Sites(broken={("site-02", "TrainInstruction", 1): "silent"})
    state = go(tmp_path, sites, config(rounds=2))
    assert [line["sites"] for line in lines(tmp_path)] == [["site-01", "site-03"], NAMES]
    assert lines(tmp_path)[0]["failures"] == {"site-02": "silent"}
    assert ("site-02", "CollectInstruction", 1) not in sites.asked
    assert state.model.trainable.tolist() == [np.float32(2 + 0.2 + 4)] * 3


def head(site: str, index: int, run_id: str = "") -> dict:
    return {"run_id": run_id, "site": site, "round_index": index}


@pytest.mark.parametrize(
    "reply",
    [
        CollectReply(**head("site-02", 1, "another run"), weight=1, delta=np.ones(3, np.float32)),
        CollectReply(**head("site-01", 1), weight=1, delta=np.ones(3, np.float32)),
        CollectReply(**head("site-02", 2), weight=1, delta=np.ones(3, np.float32)),
        ValidateReply(**head("site-02", 1), questions=1, correct=1),
        CollectReply(**head("site-02", 1), weight=5, delta=np.ones(3, np.float32)),
        CollectReply(**head("site-02", 1), weight=1, delta=np.ones(4, np.float32)),
        CollectReply(**head("site-02", 1), weight=1, delta=np.full(3, np.nan, np.float32)),
    ],
    ids=["run", "site", "round", "kind", "weight", "length", "nan"],
)
def test_an_update_that_does_not_fit_is_left_out(tmp_path: Path, reply: Reply):
    class Wrong(Sites):
        def reply(self, site: str, instruction: Instruction) -> Reply:
            right = super().reply(site, instruction)
            if site != "site-02" or not isinstance(instruction, CollectInstruction):
                return right
            run_id = reply.run_id or instruction.run_id
            return type(reply)(**{**vars(reply), "run_id": run_id})

    go(tmp_path, Wrong(), config(rounds=1))
    assert lines(tmp_path)[0]["sites"] == ["site-01", "site-03"]
    assert lines(tmp_path)[0]["failures"] == {"site-02": "protocol"}


@pytest.mark.parametrize(
    "numbers",
    [
        {"steps": -1},
        {"questions": -4},
        {"completions": 7},
        {"boxed": 9},
        {"completion_tokens": 2**62},
        {"reward_sum": 1e300},
        {"reward_sum": -1.0},
        {"seconds": -1.0},
        {"reward_histogram": np.array([1, 2, 1])},
        {"reward_histogram": np.array([-1, 2, 1, 0, 0, 0, 0, 0])},
        {"reward_histogram": np.array([2**62, 2**62, 2**62, 0, 0, 0, 0, 0])},
        {"reward_histogram": np.array([1, 2, 2, 0, 0, 0, 0, 0])},
    ],
    ids=lambda numbers: f"{next(iter(numbers))}",
)
def test_statistics_that_no_training_gives_leave_their_site_out(tmp_path: Path, numbers: dict):
    class Wrong(Sites):
        def reply(self, site: str, instruction: Instruction) -> Reply:
            right = super().reply(site, instruction)
            return replace(right, **numbers) if site == "site-02" and isinstance(right, TrainReply) else right

    go(tmp_path, Wrong(), config(rounds=1))
    (line,) = lines(tmp_path)
    assert (line["sites"], line["failures"]) == (["site-01", "site-03"], {"site-02": "protocol"})
    assert (line["questions"], line["reward_mean"]) == (8, 0.5)


@pytest.mark.parametrize("numbers", [{"correct": 101}, {"correct": -1}, {"questions": 10**6, "correct": 10**6}])
def test_a_validation_that_cannot_be_does_not_count_towards_the_quorum(tmp_path: Path, numbers: dict):
    class Wrong(Sites):
        wrong: tuple[str, ...] = ("site-02",)

        def reply(self, site: str, instruction: Instruction) -> Reply:
            right = super().reply(site, instruction)
            lies = site in self.wrong and instruction.round_index == 1 and isinstance(right, ValidateReply)
            return replace(right, **numbers) if lies else right

    go(tmp_path / "one", Wrong(), config(rounds=1))
    assert lines(tmp_path / "one")[0]["validation_questions"] == 200
    sites = Wrong()
    sites.wrong = ("site-01", "site-02")
    with pytest.raises(QuorumError, match=r"validate: .* 1 finished; site-01 \(protocol\), site-02 \(protocol\)"):
        go(tmp_path / "two", sites, config(rounds=1))


def test_every_round_begins_with_a_look_for_latecomers(tmp_path: Path):
    sites, run, seen = Sites(), config(rounds=2), []
    with open_journal(tmp_path, run, False) as journal:
        consortium = Consortium(sites, run, journal, SilentProgress())
        for node, name in enumerate(NAMES[:2], start=2):
            consortium.cohort.admit(name, node, PATIENTS[name], sites.nodes())

        def look() -> None:
            seen.append(len(sites.asked))
            consortium.cohort.admit("site-03", 4, PATIENTS["site-03"], sites.nodes())

        rounds = Rounds(run, consortium, journal, "schema", ROUND_ZERO, look)
        rounds.baseline()
        rounds.run(Tracker(tmp_path, [], None))
    assert seen == [2, 2 + 3 * 3]
    assert [line["sites"] for line in lines(tmp_path)] == [NAMES, NAMES]


def test_a_site_that_trained_and_is_gone_is_noted_as_absent(tmp_path: Path):
    whole = Sites()
    whole.stop_after = 3 + 3  # after round 1 was trained
    with pytest.raises(Stopped):
        go(tmp_path, whole, config(rounds=1))
    sites, run = Sites(stored=whole.stored), config(rounds=1)
    with open_journal(tmp_path, run, True) as journal:
        consortium = Consortium(sites, run, journal, SilentProgress())
        for node, name in enumerate(NAMES[:2], start=2):
            consortium.cohort.admit(name, node, PATIENTS[name], sites.nodes())
        Rounds(run, consortium, journal, "schema", ROUND_ZERO).run(Tracker(tmp_path, [], None))
        assert journal.losses() == [{"phase": "collect", "round": 1, "site": "site-03", "code": "absent"}]
    assert lines(tmp_path)[0]["sites"] == ["site-01", "site-02"]


def test_patients_weigh_the_mean_as_declared_before_round_1(tmp_path: Path):
    class Weighing(Sites):
        def reply(self, site: str, instruction: Instruction) -> Reply:
            right = super().reply(site, instruction)
            if isinstance(right, CollectReply):
                return CollectReply(**{**vars(right), "weight": PATIENTS[site]})
            return right

    state = go(tmp_path, Weighing(), config(rounds=1, weighting="patients"))
    assert state.model.trainable.tolist() == [np.float32((1 * 10 + 2 * 30 + 3 * 60) / 100)] * 3


@pytest.mark.parametrize("phase", ["TrainInstruction", "CollectInstruction", "ValidateInstruction"])
def test_below_quorum_the_run_stops_with_every_name_and_can_be_resumed(tmp_path: Path, phase: str):
    broken: dict = {("site-01", phase, 2): "silent", ("site-03", phase, 2): Failure(**head("", 2), code="refused")}
    with pytest.raises(
        QuorumError, match=r"at least 2 sites .*, 1 finished; site-01 \(silent\), site-03 \("
    ) as stopped:
        go(tmp_path, Sites(broken=broken), config())
    assert "--resume" in str(stopped.value)
    assert [line["round"] for line in lines(tmp_path)] == [1]
    # Sites keep their updates on disk: the second process finds them there.
    stored = Sites()
    go(tmp_path / "whole", stored, config())
    state = go(tmp_path, Sites(stored=stored.stored), config(), resume=True)
    assert [line["round"] for line in lines(tmp_path)] == [1, 2, 3]
    assert state.model.full.tolist() == go(tmp_path / "again", Sites(), config()).model.full.tolist()


@pytest.mark.parametrize("optimizer", ["fedavg", "fedadam"])
def test_a_run_stopped_at_any_message_resumes_to_the_same_bits(tmp_path: Path, optimizer: str):
    accuracies = {0: 50, 1: 60, 2: 59, 3: 40, 4: 61}
    run = config(rounds=4, server_optimizer=optimizer, server_learning_rate=0.3)
    whole = Sites(correct=lambda _, index: accuracies[index])
    expected = go(tmp_path / "whole", whole, run)
    for stop in range(0, len(whole.asked), 4):
        out = tmp_path / str(stop)
        sites = Sites(correct=whole.correct, stop_after=stop)
        with pytest.raises(Stopped):
            go(out, sites, run)
        sites.stop_after = 10**9
        state = go(out, sites, run, resume=True)
        assert state.best_model.full.tobytes() == expected.best_model.full.tobytes()
        assert (state.best.round_index, state.best.since) == (expected.best.round_index, expected.best.since)
        untimed = [
            [{k: v for k, v in line.items() if "seconds" not in k} for line in lines(folder)]
            for folder in (out, tmp_path / "whole")
        ]
        assert untimed[0] == untimed[1]


def test_only_the_newest_and_the_best_adapter_are_kept_on_disk(tmp_path: Path):
    accuracies = {0: 50, 1: 60, 2: 59, 3: 59, 4: 59}
    go(tmp_path, Sites(correct=lambda _, index: accuracies[index]), config(rounds=4))
    kept = sorted(path.name for path in (tmp_path / "journal").glob("*-apply.record"))
    assert kept == ["round-00001-apply.record", "round-00004-apply.record"]


def test_tensorboard_files_hold_each_round_once_after_a_resume(tmp_path: Path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    sites = Sites(stop_after=15)
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
