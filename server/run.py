"""A whole run: warm-up → schema → (train → collect → validate) × rounds → evaluate → finalize → report.

Run by the coordinator, called by server/app.py with a way to reach the sites. Enters: replies. Leaves: instructions,
and the files of the run folder. Torch is imported only to make the round-0 adapter and to merge the final model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.adapter import Manifest
from ..common.config import RunConfig, to_toml
from ..common.counts import Counts
from ..common.dictionary import Dictionary
from ..common.errors import ProtocolError
from ..common.files import write_atomic
from ..common.global_model import GlobalModel
from ..common.messages import (
    CountInstruction,
    CountReply,
    EvaluateInstruction,
    EvaluateReply,
    FinalizeInstruction,
    FinalizeReply,
    SchemaInstruction,
    SchemaReply,
    WarmupInstruction,
    WarmupReply,
)
from ..common.question import load_prompt
from ..common.schema import Schema, derive_schema
from ..common.statistics import Tally
from .evaluate import MODELS, evaluate, write_evaluation
from .journal import Journal, open_journal
from .phases import Consortium, Exchange, PhaseResult, Traffic
from .report import rewrite as write_report_of
from .rounds import Rounds, State
from .tracking import Progress, Tracker
from .validation import accuracy


@dataclass(frozen=True, eq=False)
class Coordinator:
    """One run's fixed parts."""

    config: RunConfig
    dictionary: Dictionary
    out: Path
    journal: Journal
    consortium: Consortium

    def round_zero(self) -> tuple[GlobalModel, dict[str, Any]]:
        """The round-0 adapter, made once; and the warm-up's report."""
        if not self.journal.has("warmup"):
            from ..common.lm import models
            from .warmup import round_zero_adapter

            lm = models.shared(self.config.model, self.config.lora, self.config.seed)
            made = round_zero_adapter(lm, self.config, on_step=self.consortium.progress.warming_up)
            self.journal.write(
                "warmup", {"manifest": made.manifest.to_json(), "report": made.report}, {"vector": made.vector_full}
            )
        record = self.journal.read("warmup")
        model = GlobalModel(Manifest.from_json(record.values["manifest"]), record.vectors["vector"])
        return model, dict(record.values["report"])

    def roll_call(self, model: GlobalModel) -> None:
        """Gives every node the round-0 adapter and learns its name; also when resuming, for nodes may have changed.

        Raises:
            QuorumError: fewer than `federation.min_sites` confirm it.
        """
        consortium = self.consortium
        instruction = WarmupInstruction(
            **consortium.head(0, model.digest),
            manifest=model.manifest.to_json(),
            dictionary_digest=self.dictionary.digest(),
            prompt_digest=load_prompt(self.config.model.prompt).digest(),
            vector=model.full,
        )
        result: PhaseResult[WarmupReply] = PhaseResult({}, {}, Traffic())
        for node, reply in consortium.stream("warm-up", consortium.exchange.nodes(), instruction, WarmupReply, result):
            try:
                if (reply.model_digest, reply.dictionary_digest) != (model.digest, self.dictionary.digest()):
                    raise ProtocolError(f"{reply.site}: confirmed another model or dictionary")
                consortium.cohort.admit(reply.site, node, reply.patients)
            except ProtocolError as error:
                result.failures[reply.site] = error.code
        consortium.cohort.require("warm-up", len(consortium.cohort.nodes), result.failures)

    def schema(self, model: GlobalModel) -> Schema:
        """The question schema from the sum of the sites' counts; published to all of them, also when resuming."""
        consortium, digest = self.consortium, self.dictionary.digest()
        if not self.journal.has("schema"):
            asked = consortium.ask(
                "counts", CountInstruction(**consortium.head(0, model.digest), dictionary_digest=digest), CountReply
            )
            vectors = [reply.counts for reply in asked.replies.values()]
            counts = Counts.from_vector(np.sum([_same_length(v, vectors[0]) for v in vectors], axis=0), self.dictionary)
            made = derive_schema(counts, self.dictionary, self.config.questions)
            self.journal.write("schema", {"schema": made.to_json(), "sites": list(asked.replies)})
        schema = Schema.from_json(self.journal.read("schema").values["schema"])
        write_atomic(self.out / "schema.json", schema.to_json().encode() + b"\n", mode=0o644)
        instruction = SchemaInstruction(**consortium.head(0, model.digest), schema=schema.to_json())
        consortium.ask("schema", instruction, SchemaReply)
        return schema

    def evaluate(self, schema: Schema, warmup: GlobalModel, final: GlobalModel, index: int) -> dict[str, Any]:
        """Base, warmed-up and final model on test patients, once; writes evaluation.json."""
        if not self.journal.has("evaluate"):
            instruction = EvaluateInstruction(
                **self.consortium.head(index, final.digest),
                schema_digest=schema.digest(),
                warmup_digest=warmup.digest,
                warmup=warmup.full,
                final=final.full,
            )
            asked = self.consortium.ask("evaluate", instruction, EvaluateReply)
            tallies = {site: reply.tally for site, reply in asked.replies.items()}
            for tally in tallies.values():
                Tally.from_vector(tally, schema.names, MODELS)  # malformed counts stop here, before the journal
            samples = [item for reply in asked.replies.values() for item in json.loads(reply.samples)]
            self.journal.write("evaluate", {"samples": samples, "failures": asked.failures}, tallies)
        record = self.journal.read("evaluate")
        tallies = [Tally.from_vector(vector, schema.names, MODELS) for vector in record.vectors.values()]
        sections = {feature.name: feature.section for feature in self.dictionary.features}
        settings = self.config.evaluation
        result = evaluate(tallies, sections, settings.bootstrap_samples, self.config.seed)
        write_evaluation(self.out / "evaluation.json", result)
        return result

    def finalize(
        self,
        final: GlobalModel,
        schema: Schema,
        rounds: Rounds,
        state: State,
        evaluation: dict[str, Any],
        simulated: bool,
    ) -> None:
        """OUT/adapter and OUT/model, merged and verified."""
        if self.journal.has("finalize"):
            return
        from ..common.lm import models
        from .finalize import finalize
        from .provenance import provenance

        records = rounds.finished_records()
        facts = provenance(
            self.config,
            base_digest=final.manifest.base_digest,
            adapter_digest=final.digest,
            schema_digest=schema.digest(),
            dictionary_digest=self.dictionary.digest(),
            sites=len(self.consortium.cohort.names),
            rounds_run=len(records),
            kept_round=state.best.round_index,
            questions_trained=sum(record["questions"] for record in records),
            simulated=simulated,
            public=self.dictionary.public,
        )
        self.consortium.progress.note("merging and verifying the final model")
        lm = models.shared(self.config.model, self.config.lora, self.config.seed)
        lm.set_vector(final.full, trainable_only=False)
        finalize(lm, self.out, facts, evaluation=evaluation)

    def hand_back(self, final: GlobalModel, index: int) -> None:
        """The final adapter to every site; a site that is away gets it when the run is resumed."""
        if self.journal.has("finalize"):
            return
        instruction = FinalizeInstruction(
            **self.consortium.head(index, final.digest), manifest=final.manifest.to_json(), vector=final.full
        )
        asked = self.consortium.ask("finalize", instruction, FinalizeReply)
        wrong = [site for site, reply in asked.replies.items() if reply.model_digest != final.digest]
        if wrong:
            raise ProtocolError(f"finalize: another digest than {final.digest[:12]}… at {', '.join(wrong)}")
        self.journal.write(
            "finalize", {"model_digest": final.digest, "sites": list(asked.replies), "failures": asked.failures}
        )

    def summary(
        self, warmup: GlobalModel, rounds: Rounds, state: State, warmup_report: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes run.json: what report and model card say of the run beside config, rounds and evaluation."""
        baseline, cohort = rounds.baseline(), self.consortium.cohort
        content = {
            "run_id": self.journal.run_id,
            "name": self.config.name,
            "config_digest": self.config.digest(),
            "dictionary": {
                "name": self.dictionary.name,
                "title": self.dictionary.title,
                "public": self.dictionary.public,
                "labels": {feature.name: feature.label for feature in self.dictionary.features},
            },
            "sites": {name: {"patients": cohort.patients[name]} for name in cohort.names},
            "warmup": warmup_report,
            "warmup_digest": warmup.digest,
            "baseline": {"accuracy": accuracy(baseline), "questions": sum(asked for asked, _ in baseline.values())},
            "rounds": len(rounds.finished_records()),
            "best_round": state.best.round_index,
            "final_digest": state.best_model.digest,
            "samples": self.journal.read("evaluate").values["samples"],
        }
        write_atomic(self.out / "run.json", json.dumps(content, indent=1, ensure_ascii=False).encode(), mode=0o644)
        return content


def run_all(
    exchange: Exchange,
    config: RunConfig,
    dictionary: Dictionary,
    out: Path,
    *,
    resume: bool,
    simulated: bool,
    progress: Progress,
) -> dict[str, Any]:
    """A whole run, from an empty folder or from wherever its journal says.

    Returns:
        The content of evaluation.json.

    Raises:
        RunFolderError: OUT holds another run or another config, or is in use.
        QuorumError: too few sites finished a phase.
    """
    journal = open_journal(out, config, resume)
    try:
        write_atomic(out / "config.resolved.toml", to_toml(config).encode(), mode=0o644)
        run = Coordinator(config, dictionary, out, journal, Consortium(exchange, config, journal.run_id, progress))
        round_zero, warmup_report = run.round_zero()
        run.roll_call(round_zero)
        schema = run.schema(round_zero)
        rounds = Rounds(config, run.consortium, journal, schema.digest(), round_zero)
        tracker = Tracker(out, rounds.finished_records(), accuracy(rounds.baseline()))
        try:
            state = rounds.run(tracker)
        finally:
            tracker.close()
        final = state.best_model
        evaluation = run.evaluate(schema, round_zero, final, config.federation.rounds)
        run.summary(round_zero, rounds, state, warmup_report)
        run.finalize(final, schema, rounds, state, evaluation, simulated)
        run.hand_back(final, config.federation.rounds)
        write_report_of(out)
        return evaluation
    finally:
        journal.close()


def _same_length(vector: np.ndarray, first: np.ndarray) -> np.ndarray:
    if vector.shape != first.shape:
        raise ProtocolError(f"counts: expected {first.shape} values of every site, got {vector.shape}")
    return vector
