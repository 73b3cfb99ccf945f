"""The training rounds: train, collect, apply, validate; the best round is kept, one that hurts is undone.

Run by the coordinator, between set-up and the end of a run (server/run.py). Enters: statistics, updates, validation
counts. Leaves: the global adapter of each round. Every step ends in one journal file; a step whose file is there is not
repeated, so a killed run goes on where it was and ends with the same bits.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.config import RunConfig
from ..common.errors import ProtocolError
from ..common.global_model import GlobalModel
from ..common.messages import (
    CollectInstruction,
    CollectReply,
    TrainInstruction,
    TrainReply,
    ValidateInstruction,
    ValidateReply,
)
from .aggregation import MeanUpdate
from .journal import Journal
from .optimizer import ServerOptimizer
from .phases import Consortium, PhaseResult, Traffic
from .tracking import Tracker
from .validation import Best, Scores, accuracy, judge


@dataclass(eq=False)
class State:
    """Where training stands after a round."""

    model: GlobalModel
    optimizer: ServerOptimizer
    best: Best
    best_model: GlobalModel
    best_optimizer: ServerOptimizer


@dataclass(eq=False)
class Rounds:
    """The loop over rounds of one run."""

    config: RunConfig
    consortium: Consortium
    journal: Journal
    schema_digest: str
    round_zero: GlobalModel

    def baseline(self) -> Scores:
        """Validation of round 0, before any training on patients."""
        if not self.journal.has("baseline"):
            scores, result = self._validate(0, self.round_zero)
            self.journal.write("baseline", {"scores": scores, **_traffic(result)})
        return _scores(self.journal.read("baseline").values["scores"])

    def run(self, tracker: Tracker) -> State:
        """All rounds that are left, up to the last or to early stopping.

        Raises:
            QuorumError: too few sites in a phase; resume continues with that phase.
        """
        federation, progress = self.config.federation, self.consortium.progress
        state, done = self._restored()
        for record in self.finished_records():
            progress.round_done(record, federation.rounds)
        for index in range(done + 1, federation.rounds + 1):
            if state.best.since >= federation.patience:
                progress.note(f"stopped after round {index - 1}: {state.best.since} rounds without a better validation")
                break
            state, record = self._round(index, state)
            tracker.add(record)
            progress.round_done(record, federation.rounds)
            for old in range(1, index):  # resuming needs the newest adapter and the best, no other
                if old != state.best.round_index:
                    self.journal.drop(_name(old, "apply"))
        return state

    def _restored(self) -> tuple[State, int]:
        """The state after the last complete round, and its index; 0 before the first."""
        best, verdict, done = Best(0, self.baseline()), "best", 0
        while self.journal.has(_name(done + 1, "validate")):
            done += 1
            scores = _scores(self.journal.read(_name(done, "validate")).values["scores"])
            verdict, best = judge(best, done, scores, self.config.federation.rollback_tolerance)
        best_model, best_optimizer = self._applied(best.round_index)
        if verdict == "kept":
            model, optimizer = self._applied(done)
        else:  # the newest is the best, or was rolled back to it
            model, optimizer = best_model, best_optimizer
        return State(model, optimizer, best, best_model, best_optimizer), done

    def _applied(self, index: int) -> tuple[GlobalModel, ServerOptimizer]:
        """Global model and optimizer after a round's server step; round 0 has had none."""
        if index == 0:
            return self.round_zero, ServerOptimizer(self.config.federation)
        record = self.journal.read(_name(index, "apply"))
        moments = {key: value for key, value in record.vectors.items() if key != "vector"}
        return self.round_zero.moved(record.vectors["vector"]), ServerOptimizer.restored(
            self.config.federation, moments
        )

    def finished_records(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl of rounds that are complete."""
        names = (_name(index, "validate") for index in range(1, self.config.federation.rounds + 1))
        return [dict(self.journal.read(name).values["record"]) for name in names if self.journal.has(name)]

    def _round(self, index: int, before: State) -> tuple[State, dict[str, Any]]:
        """One round that is not complete yet."""
        trained = self._train(index, before.model)
        model, optimizer = self._apply(index, before, trained)
        started = time.monotonic()
        scores, result = self._validate(index, model)
        verdict, best = judge(before.best, index, scores, self.config.federation.rollback_tolerance)
        record = self._record(index, model, scores, verdict, best, result, time.monotonic() - started)
        self.journal.write(_name(index, "validate"), {"scores": scores, "record": record})
        if verdict == "best":
            return State(model, optimizer, best, model, optimizer), record
        if verdict == "kept":
            return State(model, optimizer, best, before.best_model, before.best_optimizer), record
        return State(before.best_model, before.best_optimizer, best, before.best_model, before.best_optimizer), record

    def _train(self, index: int, model: GlobalModel) -> list[str]:
        """Sites train and keep their update; who did."""
        name = _name(index, "train")
        if not self.journal.has(name):
            started = time.monotonic()
            instruction = TrainInstruction(
                **self.consortium.head(index, model.digest), schema_digest=self.schema_digest, vector=model.trainable
            )
            result = self.consortium.ask("train", instruction, TrainReply)
            self.journal.write(
                name,
                {
                    "sites": list(result.replies),
                    "statistics": _statistics(list(result.replies.values())),
                    "seconds": time.monotonic() - started,
                    **_traffic(result),
                },
            )
        return list(self.journal.read(name).values["sites"])

    def _apply(self, index: int, before: State, trained: list[str]) -> tuple[GlobalModel, ServerOptimizer]:
        """Collects the updates of those that trained, one in memory at a time, and applies their mean."""
        name = _name(index, "apply")
        if not self.journal.has(name):
            started = time.monotonic()
            instruction = CollectInstruction(**self.consortium.head(index, before.model.digest))
            result: PhaseResult[CollectReply] = PhaseResult({}, {}, Traffic())
            nodes = self.consortium.nodes_of(trained, result.failures)
            total = MeanUpdate(before.model.manifest.size)
            for _, reply in self.consortium.stream("collect", nodes, instruction, CollectReply, result):
                try:
                    total.add(reply.site, reply.delta, self._weight(reply))
                except ProtocolError as error:
                    result.failures[reply.site] = error.code
            self.consortium.cohort.require("collect", len(total.sites), result.failures)
            mean = total.mean()
            vector, optimizer = before.optimizer.step(before.model.trainable, mean)
            self.journal.write(
                name,
                {
                    "sites": total.sites,
                    "weight": total.weight,
                    "update_norm": float(math.sqrt(float(mean @ mean))),
                    "seconds": time.monotonic() - started,
                    **_traffic(result),
                },
                {"vector": vector, **optimizer.state()},
            )
        return self._applied(index)

    def _weight(self, reply: CollectReply) -> int:
        """The weight a site may have: 1, or what it declared before round 1."""
        expected = self.consortium.cohort.patients[reply.site] if self.config.federation.weighting == "patients" else 1
        if reply.weight != expected:
            raise ProtocolError(f"update of {reply.site}: expected weight {expected}, got {reply.weight}")
        return expected

    def _validate(self, index: int, model: GlobalModel) -> tuple[Scores, PhaseResult[ValidateReply]]:
        """Each site's (questions, correct); empty when the gate is off."""
        result: PhaseResult[ValidateReply] = PhaseResult({}, {}, Traffic())
        if self.config.federation.validation_questions_per_site == 0:
            return {}, result
        instruction = ValidateInstruction(
            **self.consortium.head(index, model.digest), schema_digest=self.schema_digest, vector=model.trainable
        )
        result = self.consortium.ask("validate", instruction, ValidateReply)
        scores: dict[str, tuple[int, int]] = {}
        for site, reply in result.replies.items():
            if 0 <= reply.correct <= reply.questions:
                scores[site] = (reply.questions, reply.correct)
            else:
                result.failures[site] = ProtocolError.code
        return scores, result

    def _record(
        self,
        index: int,
        model: GlobalModel,
        scores: Scores,
        verdict: str,
        best: Best,
        validated: PhaseResult[ValidateReply],
        seconds: float,
    ) -> dict[str, Any]:
        """One line of rounds.jsonl."""
        train = self.journal.read(_name(index, "train")).values
        applied = self.journal.read(_name(index, "apply")).values
        phases = (train, applied, {**_traffic(validated), "seconds": seconds})
        return {
            "round": index,
            "site_count": len(applied["sites"]),
            "sites": applied["sites"],
            **train["statistics"],
            "seconds": round(sum(phase["seconds"] for phase in phases), 3),
            "seconds_train": round(train["seconds"], 3),
            "bytes_up": sum(phase["bytes_up"] for phase in phases),
            "bytes_down": sum(phase["bytes_down"] for phase in phases),
            "update_norm_l2": applied["update_norm"],
            "validation_accuracy": accuracy(scores),
            "validation_questions": sum(asked for asked, _ in scores.values()),
            "rolled_back": verdict == "rolled-back",
            "best_round": best.round_index,
            "failures": {**train["failures"], **applied["failures"], **validated.failures},
            "model_digest": model.digest,
        }


def _name(index: int, step: str) -> str:
    return f"round-{index:05d}-{step}"


def _scores(values: dict[str, Any]) -> Scores:
    return {site: (int(asked), int(correct)) for site, (asked, correct) in values.items()}


def _traffic(result: PhaseResult[Any]) -> dict[str, Any]:
    return {
        "failures": result.failures,
        "bytes_up": result.traffic.bytes_up,
        "bytes_down": result.traffic.bytes_down,
    }


def _statistics(replies: list[TrainReply]) -> dict[str, Any]:
    """Sums over sites, and the means that a person reads; None where nothing was asked."""
    questions, completions = sum(r.questions for r in replies), sum(r.completions for r in replies)
    length = max(len(r.reward_histogram) for r in replies)
    histogram = np.zeros(length, np.int64)
    for reply in replies:
        histogram[: len(reply.reward_histogram)] += reply.reward_histogram
    return {
        "questions": questions,
        "completions": completions,
        "reward_mean": sum(r.reward_sum for r in replies) / completions if completions else None,
        "boxed_rate": sum(r.boxed for r in replies) / completions if completions else None,
        "completion_tokens_mean": sum(r.completion_tokens for r in replies) / completions if completions else None,
        "reward_histogram": histogram.tolist(),
        "steps": sum(r.steps for r in replies),
    }
