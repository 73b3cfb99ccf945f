"""A whole run: warm-up → schema → (train → validate) × rounds → evaluate → finalize → report.

Run by the coordinator, called by server/app.py with a way to reach the sites. Enters: replies, and sums over the sites.
Leaves: instructions, and the files of the run folder. Torch is imported only to make the round-0 adapter and to merge
the final model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common import sums
from ..common.adapter import Manifest
from ..common.config import RunConfig, to_toml
from ..common.counts import Counts, Layout
from ..common.dictionary import Dictionary
from ..common.errors import ProtocolError
from ..common.files import write_atomic
from ..common.global_model import GlobalModel
from ..common.messages import (
    CountInstruction,
    EvaluateInstruction,
    EvaluateReply,
    FinalizeInstruction,
    FinalizeReply,
    Reply,
)
from ..common.noisy import EVERYTHING, read_counts, read_results, resolution
from ..common.question import load_prompt
from ..common.schema import Schema, derive_schema
from ..common.secagg.keys import COUNTS, TEST
from ..common.statistics import Tally, tally_size
from ..common.task_sums import run_tasks, tasks_size, told
from ..common.tasks import Task
from .aggregation import Sums, Total, Work
from .evaluate import MODELS, evaluate, read_samples, write_evaluation
from .journal import Journal
from .phases import Consortium, Exchange
from .privacy_report import cost, privacy_report, write_privacy_report
from .receipts import Receipts
from .report import rewrite as write_report_of
from .roll_call import RollCall
from .rounds import Rounds, State
from .tracking import Progress, Tracker
from .validation import accuracy


@dataclass(frozen=True, eq=False)
class Coordinator:
    """One run's fixed parts. `split_key`: of simulated sites, hex; None: the sites are real."""

    config: RunConfig
    dictionary: Dictionary
    out: Path
    journal: Journal
    consortium: Consortium
    sums: Sums
    split_key: str | None = None
    tasks: Sequence[Task] = ()

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
        if not self.journal.has("schema"):
            model, digest = sites.round_zero.digest, self.dictionary.digest()

            def instruction(attempt: int) -> CountInstruction:
                return CountInstruction(**self.consortium.head(0, model), attempt=attempt, dictionary_digest=digest)

            size, inputs = Layout(self.dictionary, resolution(self.config.privacy)).size, sums.input_digest(digest)
            total = self.sums.total(Work("counts", "counts", COUNTS, instruction, size, len(sums.COUNTS_TAIL), inputs))
            made = derive_schema(self._counts(total), self.dictionary, self.config.questions)
            about = {"schema": made.to_json(), "sites": total.sites, "patients": int(total.tail[0])}
            self.journal.write("schema", about)
            self.sums.forget("counts")
        schema = Schema.from_json(self.journal.read("schema").values["schema"])
        write_atomic(self.out / "schema.json", schema.to_json().encode() + b"\n", mode=0o644)
        sites.publish(schema)
        return schema

    def _counts(self, total: Total) -> Counts:
        """The sum as counts: exact, or with the sites' noise."""
        privacy = self.config.privacy
        if not privacy.enabled:
            return Counts.from_vector(total.ring.astype(np.int64), self.dictionary)
        return read_counts(total.ring, self.dictionary, privacy, len(total.sites))

    def _tally(self, tail: NDArray[np.int64], schema: Schema, sites: int) -> Tally:
        if not self.config.privacy.enabled:
            return Tally.from_vector(tail, schema.names, MODELS)
        multiplier = self.config.privacy.metrics_noise_multiplier
        return read_results(tail, self._chance(schema), MODELS, sites, multiplier)

    def _chance(self, schema: Schema) -> float:
        """Of guessing right, on average over the targets: in a private run it is not counted which were asked."""
        most = self.config.questions.n_options
        options = [min(most, sum(share > 0 for share in target.frequencies) or most) for target in schema.targets]
        return float(np.mean([1 / max(2, number) for number in options]))

    def evaluate(self, schema: Schema, warmup: GlobalModel, final: GlobalModel, index: int) -> dict[str, Any]:
        """Base, warmed-up and final model on test patients, once; writes evaluation.json."""
        settings = self.config.evaluation
        if not self.journal.has("evaluate"):
            samples: dict[str, list[dict[str, Any]]] = {}
            most = settings.samples if self.dictionary.public else 0

            def instruction(attempt: int) -> EvaluateInstruction:
                return EvaluateInstruction(
                    **self.consortium.head(index, final.digest),
                    attempt=attempt,
                    schema_digest=schema.digest(),
                    warmup_digest=warmup.digest,
                    warmup=warmup.full,
                    final=final.full,
                )

            def take(reply: Reply) -> None:
                if isinstance(reply, EvaluateReply):
                    samples[reply.site] = read_samples(reply.samples, reply.site, most)
                    if samples[reply.site]:  # a resumed sum does not always ask for them again
                        self.journal.write("evaluate-samples", {"samples": samples})

            private, tasks = self.config.privacy.enabled, self.tasks
            inputs = sums.input_digest(schema.digest(), warmup.digest)
            size = 2 ** (len(MODELS) + 1) if private else tally_size(schema.names, MODELS)
            more = tasks_size(tasks, self.dictionary, MODELS) if tasks else 0
            total = self.sums.total(Work("evaluate", "evaluate", TEST, instruction, 0, size + more, inputs, take))
            counts, of_tasks = np.split(total.tail, [size])
            tally = self._tally(counts, schema, len(total.sites))
            if not private and tally.n.sum() > len(total.sites) * settings.questions_per_site:
                raise ProtocolError("sum of test counts: of more questions than were asked for")
            if self.journal.has("evaluate-samples"):
                samples = self.journal.read("evaluate-samples").values["samples"]
            shown = [item for site in sorted(samples) for item in samples[site]]
            vectors = {"tally": counts, **({"tasks": of_tasks} if tasks else {})}
            self.journal.write("evaluate", {"samples": shown, "sites": total.sites}, vectors)
            self.sums.forget("evaluate")
            self.journal.drop("evaluate-samples")
        record = self.journal.read("evaluate")
        sites = len(record.values["sites"])
        tally = self._tally(record.vectors["tally"], schema, sites)
        sections = {feature.name: feature.section for feature in self.dictionary.features} | {EVERYTHING: "all"}
        result = evaluate(tally, sites, sections, settings.bootstrap_samples, self.config.seed)
        if self.tasks:
            before, most = "warmup" if self.config.warmup.enabled else "base", sites * settings.questions_per_site
            result |= told(record.vectors["tasks"], self.tasks, self.dictionary, MODELS, before, "final", most)
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
            kept_round=state.kept.round_index,
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
        self,
        warmup: GlobalModel,
        rounds: Rounds,
        state: State,
        warmup_report: dict[str, Any],
        evaluation: Mapping[str, Any],
    ) -> None:
        """Writes run.json: what the report says of the run beside config, rounds and evaluation; then the report."""
        baseline, records = rounds.baseline(), rounds.finished_records()
        schema = self.journal.read("schema").values
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
                name: {"rounds": trained.get(name, 0), "has_final": name in have}
                for name in sorted({*self.consortium.cohort.names, *trained, *have, *schema["sites"]})
            },
            "training_patients": schema["patients"],
            "secure_aggregation": self.config.federation.secure_aggregation,
            "losses": self.journal.losses(),
            "warmup": warmup_report,
            "warmup_digest": warmup.digest,
            "baseline": {"accuracy": accuracy(baseline), "questions": baseline[0]},
            "rounds": len(records),
            "kept_round": state.kept.round_index,
            "final_digest": state.kept_model.digest,
            "samples": self.journal.read("evaluate").values["samples"],
        }
        write_atomic(self.out / "run.json", json.dumps(content, indent=1, ensure_ascii=False).encode(), mode=0o644)
        report = privacy_report(self.config, trained, len(records))
        if self.config.privacy.enabled:
            sites = len(self.journal.read("evaluate").values["sites"])
            updates, parameters = sum(trained.values()), warmup.manifest.size
            report["cost"] = cost(self.config, evaluation, updates=updates, sites=sites, parameters=parameters)
        write_privacy_report(self.out / "privacy.json", report)
        write_report_of(self.out)


def run_all(
    exchange: Exchange,
    config: RunConfig,
    dictionary: Dictionary,
    out: Path,
    journal: Journal,
    *,
    make_sums: Callable[[Consortium], Sums],
    split_key: str | None,
    progress: Progress,
    receipts: Receipts | None = None,
) -> dict[str, Any]:
    """A whole run, from an empty folder or from wherever its journal says.

    Args:
        exchange: reaches the sites.
        config: the run's.
        dictionary: the consortium's.
        out: the run's folder.
        journal: its open journal; the caller closes it.
        make_sums: how what sites made is added up, given the sites.
        split_key: as `Coordinator`.
        progress: who is told.
        receipts: of what sites send, open; None: they get none.

    Returns:
        The content of evaluation.json.

    Raises:
        QuorumError: too few sites finished a phase.
    """
    prompt_digest = load_prompt(config.model.prompt).digest()
    write_atomic(out / "config.resolved.toml", to_toml(config).encode(), mode=0o644)
    consortium = Consortium(exchange, config, journal, progress, receipts)
    adding = make_sums(consortium)
    tasks = run_tasks(config.evaluation.tasks, dictionary)  # refused now, not after all rounds
    run = Coordinator(config, dictionary, out, journal, consortium, adding, split_key, tasks)
    round_zero, warmup_report = run.round_zero()
    sites = RollCall(consortium, dictionary.digest(), prompt_digest, round_zero)
    sites.everyone()
    schema = run.schema(sites)
    rounds = Rounds(config, consortium, journal, adding, schema.digest(), round_zero, sites.latecomers)
    tracker = Tracker(out, rounds.finished_records(), accuracy(rounds.baseline()))
    try:
        state = rounds.run(tracker)
    finally:
        tracker.close()
    sites.latecomers()
    final = state.kept_model
    evaluation = run.evaluate(schema, round_zero, final, config.federation.rounds)
    run.finalize(final, schema, rounds, state, evaluation)
    # Once before the sites are asked a last time, for too few that answer must not cost the report; once after.
    run.summary(round_zero, rounds, state, warmup_report, evaluation)
    run.hand_back(final, config.federation.rounds, _rounds_by_site(rounds.finished_records()))
    run.summary(round_zero, rounds, state, warmup_report, evaluation)
    return evaluation


def _rounds_by_site(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """In how many rounds each site's update was used: who took part in the run."""
    return dict(Counter(site for record in records for site in record["sites"]))
