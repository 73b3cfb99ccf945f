"""The training rounds: train, add the updates up, apply, validate; what hurts is undone, and one round kept as final.

Run by the coordinator, between set-up and the end of a run (server/run.py). Enters: sums over sites, of updates with
their statistics and of validation answers (server/aggregation.py). Leaves: the global adapter of each round. Every step
ends in one journal file; a step whose file is there is not repeated, so a killed run goes on where it was. Sums are of
integers, so neither the order of replies nor a repetition changes a bit of the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..common import sums
from ..common.config import RunConfig
from ..common.errors import ProtocolError
from ..common.global_model import GlobalModel
from ..common.messages import TrainInstruction, ValidateInstruction
from ..common.secagg.keys import UPDATE, VALIDATION
from .aggregation import LostSumError, Sums, Total, Work
from .journal import Journal, round_phase
from .optimizer import ServerOptimizer
from .phases import Consortium
from .tracking import Tracker
from .validation import NOTHING, Kept, Score, accuracy, judge


@dataclass(eq=False)
class State:
    """Where training stands after a round."""

    model: GlobalModel
    optimizer: ServerOptimizer
    kept: Kept
    kept_model: GlobalModel
    kept_optimizer: ServerOptimizer


@dataclass(eq=False)
class Rounds:
    """The loop over rounds of one run. `before_round` is called first in each: it lets in sites that came late."""

    config: RunConfig
    consortium: Consortium
    journal: Journal
    sums: Sums
    schema_digest: str
    round_zero: GlobalModel
    before_round: Callable[[], None] = lambda: None

    def baseline(self) -> Score:
        """Validation of round 0, before any training on patients.

        Raises:
            QuorumError: too few sites; resume tries again.
            LostSumError: too few finished the sum; resume asks the same sites again.
        """
        if not self.journal.has("baseline"):
            score, about = self._validate("baseline", 0, self.round_zero)
            self.journal.write("baseline", {"score": score, **about})
            self.sums.forget("baseline")
        return _score(self.journal.read("baseline").values["score"])

    def run(self, tracker: Tracker) -> State:
        """All rounds that are left, up to the last or to early stopping.

        Raises:
            QuorumError: too few sites in a phase; resume continues with that phase.
        """
        federation, progress = self.config.federation, self.consortium.progress
        state, done = self.restored()
        for record in self.finished_records():
            progress.round_done(record, federation.rounds)
        for index in range(done + 1, federation.rounds + 1):
            if state.kept.since >= federation.patience:
                progress.note(f"stopped after round {index - 1}: {state.kept.since} rounds without a better validation")
                break
            self.before_round()
            state, record = self._round(index, state)
            tracker.add(record)
            progress.round_done(record, federation.rounds)
            for old in range(1, index):  # resuming needs the newest adapter and the one kept, no other
                if old != state.kept.round_index:
                    self.journal.drop(round_phase(old, "apply"))
        return state

    def restored(self) -> tuple[State, int]:
        """The state after the last complete round, and its index; 0 before the first."""
        kept, verdict, done = Kept(0, self.baseline()), "kept", 0
        while self.journal.has(round_phase(done + 1, "validate")):
            done += 1
            score = _score(self.journal.read(round_phase(done, "validate")).values["score"])
            verdict, kept = judge(kept, done, score, self.config.federation)
        kept_model, kept_optimizer = self._applied(kept.round_index)
        if verdict == "continued":
            model, optimizer = self._applied(done)
        else:  # the newest is the one kept, or was rolled back to it
            model, optimizer = kept_model, kept_optimizer
        return State(model, optimizer, kept, kept_model, kept_optimizer), done

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
        model, optimizer = self._train(index, before)
        name, started = round_phase(index, "validate"), time.monotonic()
        score, about = self._validate(name, index, model)
        verdict, kept = judge(before.kept, index, score, self.config.federation)
        about["seconds"] = time.monotonic() - started
        record = self._record(index, model, score, verdict, kept, about)
        self.journal.write(name, {"score": score, "record": record})
        self.sums.forget(name)
        if verdict == "kept":
            return State(model, optimizer, kept, model, optimizer), record
        if verdict == "continued":
            return State(model, optimizer, kept, before.kept_model, before.kept_optimizer), record
        return State(before.kept_model, before.kept_optimizer, kept, before.kept_model, before.kept_optimizer), record

    def _train(self, index: int, before: State) -> tuple[GlobalModel, ServerOptimizer]:
        """Sites train; the sum of their updates is applied. A sum that is lost leaves the model as it was."""
        name = round_phase(index, "apply")
        if not self.journal.has(name):
            started, model = time.monotonic(), before.model
            values: dict[str, Any]
            try:
                total = self.sums.total(self._training(name, index, model))
                values, update = self._read_update(total, model)
                vector, optimizer = before.optimizer.step(model.trainable, update)
            except (LostSumError, ProtocolError) as error:  # a sum that cannot be had, or that no sites' work gives
                values = {"sites": [], "statistics": self._statistics({}, []), "failures": {"sum": error.code}}
                values |= {"bytes_up": 0, "bytes_down": 0, "weight": 0, "clipped": 0, "update_norm": 0.0, "misfits": []}
                vector, optimizer = model.trainable, before.optimizer
                self.consortium.progress.note(f"round {index}: {error}; the model stays as it was")
            values["seconds"] = time.monotonic() - started
            self.journal.write(name, values, {"vector": vector, **optimizer.state()})
            self.sums.forget(name)
        return self._applied(index)

    def _training(self, name: str, index: int, model: GlobalModel) -> Work:
        def instruction(attempt: int) -> TrainInstruction:
            return TrainInstruction(
                **self.consortium.head(index, model.digest),
                attempt=attempt,
                schema_digest=self.schema_digest,
                vector=model.trainable,
            )

        inputs = sums.input_digest(self.schema_digest)
        size, tail = model.manifest.size, sums.update_tail(self.config)
        return Work("train", name, UPDATE, instruction, size, tail, inputs)

    def _read_update(self, total: Total, model: GlobalModel) -> tuple[dict[str, Any], Any]:
        """The mean update, and what the journal keeps of the sum.

        Raises:
            ProtocolError: numbers that no training of these sites gives.
        """
        known: dict[str, int] = dict(zip(sums.UPDATE_TAIL, map(int, total.tail), strict=False))
        histogram = [int(value) for value in total.tail[len(sums.UPDATE_TAIL) :]]
        n, most = len(total.sites), self.config.federation.weight_limit
        if (
            not n <= known["weight"] <= n * most
            or known["clipped"] > n * model.manifest.size
            or known["boxed"] > known["completions"]
            or known["reward"] > known["completions"] * sums.REWARD_UNIT + n
            or sum(histogram) > known["questions"]
        ):
            raise ProtocolError("sum of updates: numbers that no local round gives; a site sent something else")
        update = sums.fixed_point(self.config).mean(total.ring, known["weight"])
        return {
            "sites": total.sites,
            "statistics": self._statistics(known, histogram),
            "weight": known["weight"],
            "clipped": known["clipped"],
            "update_norm": float(math.sqrt(float(update @ update))),
            "misfits": total.misfits,
            **_about(total),
        }, update

    def _validate(self, name: str, index: int, model: GlobalModel) -> tuple[Score, dict[str, Any]]:
        """Questions asked and answered right by all sites together; none when the gate is off, or the sum is lost."""
        if not self.config.federation.validates:
            return NOTHING, {"failures": {}, "bytes_up": 0, "bytes_down": 0}

        def instruction(attempt: int) -> ValidateInstruction:
            return ValidateInstruction(
                **self.consortium.head(index, model.digest),
                attempt=attempt,
                schema_digest=self.schema_digest,
                vector=model.trainable,
            )

        inputs = sums.input_digest(self.schema_digest)
        work = Work("validate", name, VALIDATION, instruction, 0, len(sums.VALIDATION_TAIL), inputs)
        try:
            total = self.sums.total(work)
        except LostSumError as error:
            if index == 0:  # rounds are measured from the baseline; its sites may still finish the sum
                raise
            self.consortium.progress.note(f"round {index}: {error}; nothing is known of its validation")
            return NOTHING, {"failures": {"sum": error.code}, "bytes_up": 0, "bytes_down": 0}
        questions, correct = (int(value) for value in total.tail)
        most = len(total.sites) * self.config.federation.validation_questions_per_site
        if not 0 <= correct <= questions <= most:
            raise ProtocolError(f"sum of validation: {correct} right of {questions} questions, {most} were asked")
        return (questions, correct), _about(total)

    def _record(
        self, index: int, model: GlobalModel, score: Score, verdict: str, kept: Kept, validated: dict[str, Any]
    ) -> dict[str, Any]:
        """One line of rounds.jsonl."""
        applied = self.journal.read(round_phase(index, "apply")).values
        phases = (applied, validated)
        return {
            "round": index,
            "site_count": len(applied["sites"]),
            "sites": applied["sites"],
            **applied["statistics"],
            "seconds": round(sum(phase["seconds"] for phase in phases), 3),
            "seconds_train": round(applied["seconds"], 3),
            "bytes_up": sum(phase["bytes_up"] for phase in phases),
            "bytes_down": sum(phase["bytes_down"] for phase in phases),
            "update_norm_l2": applied["update_norm"],
            "clipped": applied["clipped"],
            "validation_accuracy": accuracy(score),
            "validation_questions": score[0],
            "rolled_back": verdict == "rolled-back",
            "kept_round": kept.round_index,
            "failures": {**applied["failures"], **validated["failures"]},
            "model_digest": model.digest,
        }

    def _statistics(self, known: dict[str, int], histogram: list[int]) -> dict[str, Any]:
        """The sums and means that a person reads; None where nothing was asked, or no text was written."""
        questions, completions = known.get("questions", 0), known.get("completions", 0)
        written = completions > 0 and self.config.questions.reasoning_tokens > 0
        reward, tokens = known.get("reward", 0) / sums.REWARD_UNIT, known.get("completion_tokens", 0)
        return {
            "questions": questions,
            "completions": completions,
            "reward_mean": reward / completions if completions else None,
            "boxed_rate": known["boxed"] / completions if written else None,
            "completion_tokens_mean": tokens / completions if completions else None,
            "reward_histogram": histogram or [0] * (self.config.grpo.group_size + 1),
            "steps": known.get("steps", 0),
        }


def _score(values: list[int]) -> Score:
    questions, correct = values
    return int(questions), int(correct)


def _about(total: Total) -> dict[str, Any]:
    return {
        "failures": total.failures,
        "bytes_up": total.traffic.bytes_up,
        "bytes_down": total.traffic.bytes_down,
    }
