"""The training rounds: train, collect, apply, validate; the best round is kept, one that hurts is undone.

Run by the coordinator, between set-up and the end of a run (server/run.py). Enters: statistics, updates, validation
counts. Leaves: the global adapter of each round. Every step ends in one journal file; a step whose file is there is not
repeated, so a killed run goes on where it was and, where replies come in the same order (`wardround simulate`), ends
with the same bits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
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
from .journal import Journal, round_phase
from .optimizer import ServerOptimizer
from .phases import Consortium, PhaseResult
from .tracking import Tracker
from .validation import Best, Scores, accuracy, judge

_MOST = 2**40  # of any number in a training reply: sums over sites stay exact
_SLACK = 1e-3  # rewards are summed as floats


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
    """The loop over rounds of one run. `before_round` is called first in each: it lets in sites that came late."""

    config: RunConfig
    consortium: Consortium
    journal: Journal
    schema_digest: str
    round_zero: GlobalModel
    before_round: Callable[[], None] = lambda: None

    @property
    def gate(self) -> bool:
        """Whether rounds are validated."""
        return self.config.federation.validation_questions_per_site > 0

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
            self.before_round()
            state, record = self._round(index, state)
            tracker.add(record)
            progress.round_done(record, federation.rounds)
            for old in range(1, index):  # resuming needs the newest adapter and the best, no other
                if old != state.best.round_index:
                    self.journal.drop(round_phase(old, "apply"))
        return state

    def _restored(self) -> tuple[State, int]:
        """The state after the last complete round, and its index; 0 before the first."""
        best, verdict, done = Best(0, self.baseline()), "best", 0
        while self.journal.has(round_phase(done + 1, "validate")):
            done += 1
            scores = _scores(self.journal.read(round_phase(done, "validate")).values["scores"])
            verdict, best = judge(best, done, scores, self.config.federation.rollback_tolerance, gate=self.gate)
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
        record = self.journal.read(round_phase(index, "apply"))
        moments = {key: value for key, value in record.vectors.items() if key != "vector"}
        return self.round_zero.moved(record.vectors["vector"]), ServerOptimizer.restored(
            self.config.federation, moments
        )

    def finished_records(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl of rounds that are complete."""
        names = (round_phase(index, "validate") for index in range(1, self.config.federation.rounds + 1))
        return [dict(self.journal.read(name).values["record"]) for name in names if self.journal.has(name)]

    def _round(self, index: int, before: State) -> tuple[State, dict[str, Any]]:
        """One round that is not complete yet."""
        trained = self._train(index, before.model)
        model, optimizer = self._apply(index, before, trained)
        started = time.monotonic()
        scores, result = self._validate(index, model)
        tolerance = self.config.federation.rollback_tolerance
        verdict, best = judge(before.best, index, scores, tolerance, gate=self.gate)
        record = self._record(index, model, scores, verdict, best, result, time.monotonic() - started)
        self.journal.write(round_phase(index, "validate"), {"scores": scores, "record": record})
        if verdict == "best":
            return State(model, optimizer, best, model, optimizer), record
        if verdict == "kept":
            return State(model, optimizer, best, before.best_model, before.best_optimizer), record
        return State(before.best_model, before.best_optimizer, best, before.best_model, before.best_optimizer), record

    def _train(self, index: int, model: GlobalModel) -> list[str]:
        """Sites train and keep their update; who did."""
        name = round_phase(index, "train")
        if not self.journal.has(name):
            started = time.monotonic()
            instruction = TrainInstruction(
                **self.consortium.head(index, model.digest), schema_digest=self.schema_digest, vector=model.trainable
            )
            result = self.consortium.ask("train", instruction, TrainReply, self._check_statistics)
            self.journal.write(
                name,
                {
                    "sites": result.sites,
                    "statistics": self._statistics(list(result.replies.values())),
                    "seconds": time.monotonic() - started,
                    **_traffic(result),
                },
            )
        return list(self.journal.read(name).values["sites"])

    def _apply(self, index: int, before: State, trained: list[str]) -> tuple[GlobalModel, ServerOptimizer]:
        """Collects the updates of those that trained, one in memory at a time, and applies their mean."""
        name = round_phase(index, "apply")
        if not self.journal.has(name):
            started = time.monotonic()
            instruction = CollectInstruction(**self.consortium.head(index, before.model.digest))
            nodes, absent = self.consortium.here(trained)
            total = MeanUpdate(before.model.manifest.size)

            def add(_: int, reply: CollectReply) -> None:
                total.add(reply.site, reply.delta, self._weight(reply))

            result = self.consortium.visit("collect", nodes, instruction, CollectReply, add, absent=absent)
            self.consortium.cohort.require("collect", len(result.sites), result.failures)
            mean = total.mean()
            vector, optimizer = before.optimizer.step(before.model.trainable, mean)
            self.journal.write(
                name,
                {
                    "sites": result.sites,
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
        if not self.gate:
            return {}, PhaseResult()
        instruction = ValidateInstruction(
            **self.consortium.head(index, model.digest), schema_digest=self.schema_digest, vector=model.trainable
        )
        result = self.consortium.ask("validate", instruction, ValidateReply, self._check_validation)
        return {site: (reply.questions, reply.correct) for site, reply in result.replies.items()}, result

    def _check_validation(self, reply: ValidateReply) -> None:
        if not 0 <= reply.correct <= reply.questions <= self.config.federation.validation_questions_per_site:
            raise ProtocolError(f"validation of {reply.site}: {reply.correct} right of {reply.questions} questions")

    def _check_statistics(self, reply: TrainReply) -> None:
        """Refuses numbers that no training gives, before they are added to those of others."""
        counts, histogram = (reply.steps, reply.questions, reply.boxed, reply.completion_tokens), reply.reward_histogram
        if (
            min(counts) < 0
            or max(counts) > _MOST
            or not 0 <= reply.boxed <= reply.completions <= _MOST
            or not 0 <= reply.seconds <= _MOST
            or not -_SLACK <= reply.reward_sum <= reply.completions + _SLACK
            or histogram.shape != (self.config.grpo.group_size + 1,)
            or not 0 <= histogram.min() <= histogram.max() <= _MOST
            or histogram.sum() > reply.questions
        ):
            raise ProtocolError(f"statistics of {reply.site}: numbers that no local round gives")

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
        train = self.journal.read(round_phase(index, "train")).values
        applied = self.journal.read(round_phase(index, "apply")).values
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

    def _statistics(self, replies: list[TrainReply]) -> dict[str, Any]:
        """Sums over sites, and the means that a person reads; None where nothing was asked, or no text was written."""
        questions, completions = sum(r.questions for r in replies), sum(r.completions for r in replies)
        written = completions > 0 and self.config.questions.reasoning_tokens > 0
        return {
            "questions": questions,
            "completions": completions,
            "reward_mean": sum(r.reward_sum for r in replies) / completions if completions else None,
            "boxed_rate": sum(r.boxed for r in replies) / completions if written else None,
            "completion_tokens_mean": sum(r.completion_tokens for r in replies) / completions if completions else None,
            "reward_histogram": np.sum([r.reward_histogram for r in replies], axis=0).tolist(),
            "steps": sum(r.steps for r in replies),
        }


def _scores(values: dict[str, Any]) -> Scores:
    return {site: (int(asked), int(correct)) for site, (asked, correct) in values.items()}


def _traffic(result: PhaseResult[Any]) -> dict[str, Any]:
    return {
        "failures": result.failures,
        "bytes_up": result.traffic.bytes_up,
        "bytes_down": result.traffic.bytes_down,
    }
