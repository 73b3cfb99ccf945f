"""A site's work, one plain function a phase: decoded instruction in, reply out (docs/protocol.md §2).

Run by the site; called by client/gate.py, which decides whether a reply leaves. Enters: `site.toml`, the registry it
names, and an instruction that says everything else. Leaves: nothing from here. Private: the registry, its questions,
the stored update. Torch is imported only by the phases that run the model.

Draws are streams of (run seed, purpose, site name, round), common/seeds.py: the same instruction gives the same reply.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.counts import count
from ..common.errors import RefusedError, RegistryError, VerificationError
from ..common.files import private_folder, read_record, sweep, write_atomic, write_record
from ..common.global_model import GlobalModel
from ..common.messages import (
    CollectInstruction,
    CollectReply,
    CountInstruction,
    CountReply,
    EvaluateInstruction,
    EvaluateReply,
    FinalizeInstruction,
    FinalizeReply,
    Instruction,
    SchemaInstruction,
    SchemaReply,
    TrainInstruction,
    TrainReply,
    ValidateInstruction,
    ValidateReply,
    WarmupInstruction,
    WarmupReply,
    decode,
    encode,
)
from ..common.question import LETTERS, Question
from ..common.seeds import derive_seed
from ..common.statistics import Tally
from . import local_report, policy, update
from .folder import Site, SiteRun, TrainingPatients, parse_manifest, parse_schema

if TYPE_CHECKING:
    from ..common.lm.models import LanguageModel

EVALUATED = ("base", "warmup", "final")
# Called with (site, steps done, steps) in local training; set by a process that runs sites and shows their progress.
on_step: Callable[[str, int, int], None] | None = None


def warm_up(site: Site, instruction: WarmupInstruction) -> WarmupReply:
    """Takes the round-0 adapter: checks base model, dictionary, prompt and digest, and stores it."""
    from ..common.lm.packaged import base_digest, resolve

    run = SiteRun(site, instruction)
    if instruction.dictionary_digest != site.dictionary.digest():
        raise VerificationError(
            f"dictionary: the run's is {instruction.dictionary_digest[:12]}…, here {site.dictionary.digest()[:12]}…"
        )
    manifest = parse_manifest(instruction.manifest)
    policy.check_model(site.config.policy, manifest.base_digest)
    if base_digest(resolve(run.config.model.id)) != manifest.base_digest:
        raise VerificationError("base model: this site's files are not those that the run names")
    model = GlobalModel(manifest, instruction.vector)
    model.verify(instruction.model_digest)
    if run.template.digest() != instruction.prompt_digest:
        raise VerificationError(
            f"prompt '{run.config.model.prompt}': the run's is {instruction.prompt_digest[:12]}…, "
            f"here {run.template.digest()[:12]}…"
        )
    patients = len(site.patients_of("train"))
    if patients == 0:
        raise RegistryError("no training patient")
    sweep(private_folder(run.folder))
    write_record(run.folder / "round-0.record", {"manifest": instruction.manifest}, {"vector": instruction.vector})
    return WarmupReply(
        **run.head, model_digest=model.digest, dictionary_digest=site.dictionary.digest(), patients=patients
    )


def count_registry(site: Site, instruction: CountInstruction) -> CountReply:
    """Counts of training patients over the dictionary's bins."""
    run = SiteRun(site, instruction)
    if instruction.dictionary_digest != site.dictionary.digest():
        raise VerificationError("dictionary: not the one that the counts were asked over")
    rows = site.splits["train"]
    values = {name: column[rows] for name, column in site.registry.values.items()}
    return CountReply(**run.head, counts=count(values, site.dictionary).to_vector())


def take_schema(site: Site, instruction: SchemaInstruction) -> SchemaReply:
    """Stores the published schema after checking that it is over this dictionary."""
    run = SiteRun(site, instruction)
    schema = parse_schema(instruction.schema)
    schema.verify(site.dictionary)
    policy.allowed_targets(site.config.policy, schema.names)
    private_folder(run.folder)
    write_atomic(run.folder / "schema.json", schema.to_json().encode())
    return SchemaReply(**run.head, schema_digest=schema.digest())


def train(site: Site, instruction: TrainInstruction) -> TrainReply:
    """One local GRPO round. An identical repeat answers from disk; another one for the same or an older round is
    refused.
    """
    run = SiteRun(site, instruction)
    wanted = _input_digest(instruction, instruction.schema_digest)
    stored = update.load(run.folder, instruction.round_index)
    if stored is None:
        stored = _train(run, instruction, wanted)
        update.store(run.folder, instruction.round_index, stored)
    elif stored.input_digest != wanted:
        raise RefusedError(f"round {instruction.round_index}: already trained from another model, config or schema")
    return TrainReply(**run.head, **stored.statistics, reward_histogram=stored.histogram)


def _train(run: SiteRun, instruction: TrainInstruction, input_digest: str) -> update.StoredUpdate:
    model = run.global_model(instruction.vector, instruction.model_digest)
    schema, name = run.schema(instruction.schema_digest), run.site.config.name
    targets = policy.allowed_targets(run.site.config.policy, schema.names)
    source = TrainingPatients(run.builder(schema), run.site.patients_of("train"), targets)
    update.claim(run.folder, instruction.round_index, input_digest)
    from .grpo import train_local_round  # trl takes seconds: not before everything was checked

    def tell(done: int, steps: int, _reward: float) -> None:
        if on_step is not None:
            on_step(name, done, steps)

    index = instruction.round_index
    seed = derive_seed(run.config.seed, "train", name, index)
    result = train_local_round(
        run.language_model(model),
        source,
        run.template,
        run.config,
        seed=seed,
        round_index=index,
        on_step=tell,
    )
    return update.StoredUpdate(
        input_digest=input_digest,
        model_digest=instruction.model_digest,
        weight=source.n_patients if run.config.federation.weighting == "patients" else 1,
        delta=update.difference(result.vector, model.trainable),
        statistics={
            "steps": int(result.steps),
            "questions": int(result.questions),
            "completions": int(result.completions),
            "reward_sum": float(result.reward_sum),
            "boxed": int(result.boxed),
            "completion_tokens": int(result.completion_tokens),
            "seconds": float(result.seconds),
        },
        histogram=np.asarray(result.reward_histogram, np.int64),
    )


def collect(site: Site, instruction: CollectInstruction) -> CollectReply:
    """The stored update of this round."""
    run = SiteRun(site, instruction)
    stored = update.load_for(run.folder, instruction.round_index, instruction.model_digest)
    return CollectReply(**run.head, weight=stored.weight, delta=stored.delta)


def validate(site: Site, instruction: ValidateInstruction) -> ValidateReply:
    """Scores the global model on validation patients."""
    run = SiteRun(site, instruction)
    model = run.global_model(instruction.vector, instruction.model_digest)
    n = run.config.federation.validation_questions_per_site
    questions = run.held_out("validation", run.schema(instruction.schema_digest), n)
    if not questions:
        return ValidateReply(**run.head, questions=0, correct=0)
    from .evaluation import evaluate_questions

    outcomes = evaluate_questions(run.language_model(model), questions, run.template, run.config)
    return ValidateReply(**run.head, questions=len(questions), correct=int(np.sum(outcomes.correct)))


def evaluate(site: Site, instruction: EvaluateInstruction) -> EvaluateReply:
    """Scores base, warmed-up and final model on test patients: once; a repeat answers from disk."""
    run = SiteRun(site, instruction)
    wanted = _input_digest(instruction, instruction.schema_digest, instruction.warmup_digest)
    path = run.folder / "test.record"
    if path.exists():
        record = read_record(path)
        if record.values["input_digest"] != wanted:
            raise RefusedError("evaluate: test patients were already scored for another model")
        return decode(record.vectors["reply"].tobytes(), EvaluateReply)
    reply = _evaluate(run, instruction)
    write_record(path, {"input_digest": wanted}, {"reply": np.frombuffer(encode(reply), np.uint8)})
    return reply


def _evaluate(run: SiteRun, instruction: EvaluateInstruction) -> EvaluateReply:
    manifest = run.round_zero.manifest
    warmup, final = GlobalModel(manifest, instruction.warmup), GlobalModel(manifest, instruction.final)
    warmup.verify(instruction.warmup_digest)
    final.verify(instruction.model_digest)
    schema = run.schema(instruction.schema_digest)
    questions = run.held_out("test", schema, run.config.evaluation.questions_per_site)
    if not questions:
        return EvaluateReply(**run.head, samples="[]", tally=Tally.empty(schema.names, EVALUATED).to_vector())
    from .evaluation import evaluate_questions

    lm = run.language_model(warmup)
    outcomes: dict[str, Any] = {}
    with lm.base_only():
        outcomes["base"] = evaluate_questions(lm, questions, run.template, run.config)
    outcomes["warmup"] = evaluate_questions(lm, questions, run.template, run.config)
    lm.set_vector(final.full, trainable_only=False)
    outcomes["final"] = evaluate_questions(lm, questions, run.template, run.config)
    tally, samples = Tally.of(questions, outcomes, schema.names), _samples(run, lm, questions, outcomes)
    local_report.write(
        run.folder / "report.html",
        site=run.site.config.name,
        run_id=instruction.run_id,
        tally=tally,
        labels={feature.name: feature.label for feature in run.site.dictionary.features},
        samples=samples,
        answer_only=run.config.questions.reasoning_tokens == 0,
    )
    shared = policy.shares_samples(run.site.config.policy, run.site.dictionary)
    return EvaluateReply(
        **run.head, samples=json.dumps(samples, sort_keys=True) if shared else "[]", tally=tally.to_vector()
    )


def finalize(site: Site, instruction: FinalizeInstruction) -> FinalizeReply:
    """Takes the final adapter home: checks its digest and stores it in peft's format, whole or not at all."""
    run = SiteRun(site, instruction)
    manifest = parse_manifest(instruction.manifest)
    if manifest.digest() != run.round_zero.manifest.digest():
        raise VerificationError("adapter manifest: the final adapter's is not that of round 0")
    model = GlobalModel(manifest, instruction.vector)
    model.verify(instruction.model_digest)
    adapter, making = run.folder / "adapter", run.folder / "adapter.tmp"
    shutil.rmtree(making, ignore_errors=True)
    run.language_model(model).save_adapter(making)
    (making / "digest.txt").write_text(model.digest + "\n", encoding="ascii")
    shutil.rmtree(adapter, ignore_errors=True)
    making.rename(adapter)
    return FinalizeReply(**run.head, model_digest=model.digest)


def _input_digest(instruction: Instruction, *more: str) -> str:
    """What a round's result depends on; not `config` itself, whose speed settings change nothing."""
    parts = (instruction.run_id, str(instruction.round_index), instruction.config_digest, instruction.model_digest)
    return hashlib.sha256(json.dumps([*parts, *more]).encode()).hexdigest()


def _samples(
    run: SiteRun, lm: LanguageModel, questions: list[Question], outcomes: dict[str, Any]
) -> list[dict[str, Any]]:
    """The first questions with what base and final model chose and wrote.

    Where answers are scored by their text, the text is that one; else the models are asked to think aloud beside.
    """
    from .evaluation import sample_reasoning

    shown = questions[: run.config.evaluation.samples]
    if not shown:
        return []
    tokens = run.config.questions.reasoning_tokens or run.config.evaluation.sample_tokens
    with lm.base_only():
        texts = {"base": sample_reasoning(lm, shown, run.template, tokens)}
    texts["final"] = sample_reasoning(lm, shown, run.template, tokens)
    return [
        {
            "site": run.site.config.name,
            "target": question.target,
            "section": question.section,
            "text": question.text,
            "options": list(question.options),
            "answer": LETTERS[question.answer],
            "models": {
                name: {"chosen": _letter(int(outcomes[name].chosen[index])), "text": written[index]}
                for name, written in texts.items()
            },
        }
        for index, question in enumerate(shown)
    ]


def _letter(chosen: int) -> str:
    """A choice as a person reads it; "–" for −1, an answer that is no option."""
    return LETTERS[chosen] if chosen >= 0 else "–"
