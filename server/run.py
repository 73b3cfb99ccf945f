"""A whole run: warm-up → schema → (train → collect → validate) × rounds → evaluate → finalize → report.

Run by the coordinator, called by server/app.py with a way to reach the sites. Enters: replies. Leaves: instructions,
and the files of the run folder. Torch is imported only to make the round-0 adapter and to merge the final model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.adapter import Manifest
from ..common.config import RunConfig, to_toml
from ..common.counts import Counts, Layout
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
)
from ..common.question import load_prompt
from ..common.schema import Schema, derive_schema
from ..common.statistics import Tally
from .evaluate import MODELS, evaluate, read_samples, write_evaluation
from .journal import Journal
from .phases import Consortium, Exchange
from .report import rewrite as write_report_of
from .roll_call import RollCall
from .rounds import Rounds, State
from .tracking import Progress, Tracker
from .validation import accuracy

_MOST = 2**40  # of any count that a site sends: sums over sites stay exact


@dataclass(frozen=True, eq=False)
class Coordinator:
    """One run's fixed parts. `split_key`: of simulated sites, hex; None: the sites are real."""

    config: RunConfig
    dictionary: Dictionary
    out: Path
    journal: Journal
    consortium: Consortium
    split_key: str | None = None

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

    def schema(self, sites: RollCall) -> Schema:
        """The question schema from the sum of the sites' counts; published to all of them, also when resuming."""
        consortium, digest = self.consortium, self.dictionary.digest()
        if not self.journal.has("schema"):
            total = np.zeros(Layout(self.dictionary).size, np.int64)

            def add(_: int, reply: CountReply) -> None:
                counts = Counts.from_vector(reply.counts, self.dictionary).vector
                if counts.max() > _MOST:
                    raise ProtocolError(f"counts of {reply.site}: expected at most {_MOST}, got {counts.max()}")
                np.add(total, counts, out=total)

            nodes, _ = consortium.here(consortium.cohort.names)
            instruction = CountInstruction(**consortium.head(0, sites.round_zero.digest), dictionary_digest=digest)
            asked = consortium.visit("counts", nodes, instruction, CountReply, add)
            consortium.cohort.require("counts", len(asked.sites), asked.failures)
            made = derive_schema(Counts(self.dictionary, total), self.dictionary, self.config.questions)
            self.journal.write("schema", {"schema": made.to_json(), "sites": asked.sites})
        schema = Schema.from_json(self.journal.read("schema").values["schema"])
        write_atomic(self.out / "schema.json", schema.to_json().encode() + b"\n", mode=0o644)
        sites.publish(schema)
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
            most = self.config.evaluation.samples if self.dictionary.public else 0

            def check(reply: EvaluateReply) -> None:
                tally = Tally.from_vector(reply.tally, schema.names, MODELS)
                if tally.n.sum() > self.config.evaluation.questions_per_site or tally.length.max() > _MOST:
                    raise ProtocolError(f"test counts of {reply.site}: of more questions or tokens than were asked for")
                read_samples(reply.samples, reply.site, most)

            replies = self.consortium.ask("evaluate", instruction, EvaluateReply, check).replies
            samples = [item for site, reply in replies.items() for item in read_samples(reply.samples, site, most)]
            tallies = {site: reply.tally for site, reply in replies.items()}
            self.journal.write("evaluate", {"samples": samples}, tallies)
        record = self.journal.read("evaluate")
        tallies = [Tally.from_vector(vector, schema.names, MODELS) for vector in record.vectors.values()]
        sections = {feature.name: feature.section for feature in self.dictionary.features}
        settings = self.config.evaluation
        result = evaluate(tallies, sections, settings.bootstrap_samples, self.config.seed)
        write_evaluation(self.out / "evaluation.json", result)
        return result

    def finalize(
        self, final: GlobalModel, schema: Schema, rounds: Rounds, state: State, evaluation: dict[str, Any]
    ) -> None:
        """OUT/adapter and OUT/model, merged and verified; again when one of them is no longer there."""
        if self._is_there(final):
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
            sites=len(_rounds_by_site(records)),
            rounds_run=len(records),
            kept_round=state.best.round_index,
            questions_trained=sum(record["questions"] for record in records),
            public=self.dictionary.public,
            simulated=self.split_key is not None,
            split_key=self.split_key,
        )
        self.consortium.progress.note("merging and verifying the final model")
        lm = models.shared(self.config.model, self.config.lora, self.config.seed)
        lm.set_vector(final.full, trainable_only=False)
        finalize(lm, self.out, facts, evaluation=evaluation)

    def _is_there(self, final: GlobalModel) -> bool:
        """Whether both folders hold the final model; each was put in place whole, or not at all."""
        try:
            made = [json.loads((self.out / name / "provenance.json").read_bytes()) for name in ("adapter", "model")]
            whose = {facts["adapter_digest"] for facts in made}
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return whose == {final.digest} and any((self.out / "model").glob("*.safetensors"))

    def hand_back(self, final: GlobalModel, index: int, sites: Collection[str]) -> None:
        """The final adapter to every site that has not confirmed it yet; one that is away gets it on a later resume.

        Args:
            final: the model.
            index: the run's last round.
            sites: who took part, there now or not.

        Raises:
            QuorumError: fewer than `federation.min_sites` have it.
        """
        consortium = self.consortium
        had = self.journal.read("finalize").values["sites"] if self.journal.has("finalize") else []
        nodes, absent = consortium.here({*sites, *consortium.cohort.names} - {*had})
        if not nodes and not absent:
            return
        instruction = FinalizeInstruction(
            **consortium.head(index, final.digest), manifest=final.manifest.to_json(), vector=final.full
        )

        def confirm(_: int, reply: FinalizeReply) -> None:
            if reply.model_digest != final.digest:
                raise ProtocolError(f"{reply.site}: confirmed another final adapter")

        asked = consortium.visit("finalize", nodes, instruction, FinalizeReply, confirm, absent=absent)
        have = sorted({*had, *asked.sites})
        self.journal.write("finalize", {"model_digest": final.digest, "sites": have})
        consortium.cohort.require("finalize", len(have), asked.failures)

    def summary(
        self, warmup: GlobalModel, rounds: Rounds, state: State, warmup_report: dict[str, Any], sites: RollCall
    ) -> None:
        """Writes run.json: what the report says of the run beside config, rounds and evaluation; then the report."""
        baseline, records = rounds.baseline(), rounds.finished_records()
        trained = _rounds_by_site(records)
        have = self.journal.read("finalize").values["sites"] if self.journal.has("finalize") else []
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
            "sites": {
                name: {"patients": patients, "rounds": trained.get(name, 0), "has_final": name in have}
                for name, patients in sorted(sites.declared().items())
            },
            "losses": self.journal.losses(),
            "warmup": warmup_report,
            "warmup_digest": warmup.digest,
            "baseline": {"accuracy": accuracy(baseline), "questions": sum(asked for asked, _ in baseline.values())},
            "rounds": len(records),
            "best_round": state.best.round_index,
            "final_digest": state.best_model.digest,
            "samples": self.journal.read("evaluate").values["samples"],
        }
        write_atomic(self.out / "run.json", json.dumps(content, indent=1, ensure_ascii=False).encode(), mode=0o644)
        write_report_of(self.out)


def run_all(
    exchange: Exchange,
    config: RunConfig,
    dictionary: Dictionary,
    out: Path,
    journal: Journal,
    *,
    split_key: str | None,
    progress: Progress,
) -> dict[str, Any]:
    """A whole run, from an empty folder or from wherever its journal says.

    Args:
        exchange: reaches the sites.
        config: the run's.
        dictionary: the consortium's.
        out: the run's folder.
        journal: its open journal; the caller closes it.
        split_key: as `Coordinator`.
        progress: who is told.

    Returns:
        The content of evaluation.json.

    Raises:
        QuorumError: too few sites finished a phase.
    """
    prompt_digest = load_prompt(config.model.prompt).digest()
    write_atomic(out / "config.resolved.toml", to_toml(config).encode(), mode=0o644)
    consortium = Consortium(exchange, config, journal, progress)
    run = Coordinator(config, dictionary, out, journal, consortium, split_key)
    round_zero, warmup_report = run.round_zero()
    sites = RollCall(consortium, dictionary.digest(), prompt_digest, round_zero)
    sites.everyone()
    schema = run.schema(sites)
    rounds = Rounds(config, consortium, journal, schema.digest(), round_zero, sites.latecomers)
    tracker = Tracker(out, rounds.finished_records(), accuracy(rounds.baseline()))
    try:
        state = rounds.run(tracker)
    finally:
        tracker.close()
    sites.latecomers()
    final = state.best_model
    evaluation = run.evaluate(schema, round_zero, final, config.federation.rounds)
    run.finalize(final, schema, rounds, state, evaluation)
    # Once before the sites are asked a last time, for too few that answer must not cost the report; once after.
    run.summary(round_zero, rounds, state, warmup_report, sites)
    run.hand_back(final, config.federation.rounds, _rounds_by_site(rounds.finished_records()))
    run.summary(round_zero, rounds, state, warmup_report, sites)
    return evaluation


def _rounds_by_site(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """In how many rounds each site's update was used: who took part in the run."""
    return dict(Counter(site for record in records for site in record["sites"]))
