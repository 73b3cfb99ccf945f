"""A site's work, one plain function a phase: decoded instruction in, reply out (docs/protocol.md §2).

Run by the site; called by client/gate.py, which decides whether a reply leaves. Enters: `site.toml`, the registry it
names, and an instruction that says everything else. Leaves: nothing from here. Private: the registry, its questions,
the stored update. Torch is imported only by the phases that run the model.

What is computed of patients stays here as a payload (client/payload.py); the reply says only that it is there, with the
keys for adding it up (client/sharing.py). Draws are streams of (run seed, purpose, site name, round), common/seeds.py:
the same instruction gives the same payload. In a private run they are the site's secret (client/randomness.py), and
what is stored is never made again once some of it has left.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..common import plan, sums
from ..common.bundle import wardround_version
from ..common.config import RunConfig
from ..common.counts import count
from ..common.dictionary import check_reviewed
from ..common.errors import RefusedError, RegistryError, VerificationError
from ..common.files import private_folder, read_record, sweep, write_atomic, write_record
from ..common.global_model import GlobalModel
from ..common.messages import (
    CountInstruction,
    EvaluateInstruction,
    EvaluateReply,
    FinalizeInstruction,
    FinalizeReply,
    Instruction,
    KeysReply,
    MaskInstruction,
    SchemaInstruction,
    SchemaReply,
    TrainInstruction,
    ValidateInstruction,
    WarmupInstruction,
    WarmupReply,
)
from ..common.noisy import resolution
from ..common.question import LETTERS, Question
from ..common.schema import Schema
from ..common.secagg.keys import COUNTS, TEST, UPDATE, VALIDATION
from ..common.seeds import derive_seed
from ..common.statistics import Tally
from . import local_report, payload, policy, private_release, sharing, update
from .checkpoint import Checkpoint
from .folder import Site, SiteRun, TrainingPatients, parse_manifest, parse_schema

if TYPE_CHECKING:
    from ..common.lm.answers import Outcomes
    from ..common.lm.models import LanguageModel
    from ..common.privacy import Event
    from ..common.tasks import Task
    from .exam import Exam
    from .ledger import Spend
    from .private_optimizer import PrivateSteps
    from .randomness import SecureRandom

EVALUATED = ("base", "warmup", "final")
CHECKPOINT = "training.record"  # of a round under way (client/checkpoint.py)
# Called with (site, "step" or "question", how many are done, of how many) in local training and scoring; set by a
# process that runs sites and shows their progress on the same machine. How many questions a site asks goes no further.
on_work: Callable[[str, str, int, int], None] | None = None


def warm_up(site: Site, instruction: WarmupInstruction) -> WarmupReply:
    """Takes the round-0 adapter: checks base model, dictionary, prompt and digest, and stores it."""
    from ..common.lm.packaged import base_digest, resolve

    run = SiteRun(site, instruction)
    if run.config.privacy.enabled:
        check_reviewed(site.dictionary)
    if instruction.dictionary_digest != site.dictionary.digest():
        raise VerificationError(
            f"dictionary: the run's is {instruction.dictionary_digest[:12]}…, here {site.dictionary.digest()[:12]}…"
        )
    manifest = parse_manifest(instruction.manifest)
    policy.check_model(site.config.policy, manifest.base_digest)
    if base_digest(resolve(run.config.model.id, digest=manifest.base_digest)) != manifest.base_digest:
        raise VerificationError("base model: this site's files are not those that the run names")
    model = GlobalModel(manifest, instruction.vector)
    model.verify(instruction.model_digest)
    if run.template.digest() != instruction.prompt_digest:
        raise VerificationError(
            f"prompt '{run.config.model.prompt}': the run's is {instruction.prompt_digest[:12]}…, "
            f"here {run.template.digest()[:12]}…"
        )
    if run.config.evaluation.tasks:  # now, not after all rounds
        from ..common.task_sums import run_tasks

        run_tasks(run.config.evaluation.tasks, site.dictionary)
    if not site.patients_of("train"):
        raise RegistryError("no training patient")
    policy.check_patients(site.config.policy, run.config.privacy, len(site.patients_of("train")))
    sweep(private_folder(run.folder))
    write_record(run.folder / "round-0.record", {"manifest": instruction.manifest}, {"vector": instruction.vector})
    return WarmupReply(**run.head, model_digest=model.digest, dictionary_digest=site.dictionary.digest())


def count_registry(site: Site, instruction: CountInstruction) -> KeysReply:
    """Counts training patients over the dictionary's bins, for the secure sum of all sites' counts."""
    run = SiteRun(site, instruction)
    if run.config.privacy.enabled:
        check_reviewed(site.dictionary)
    if instruction.dictionary_digest != site.dictionary.digest():
        raise VerificationError("dictionary: not the one that the counts were asked over")
    if instruction.model_digest != run.round_zero.digest:
        raise VerificationError("model: counts belong to the round-0 adapter, and this is another digest")
    inputs = sums.input_digest(instruction.dictionary_digest)

    def work() -> payload.Payload:
        policy.check_patients(site.config.policy, run.config.privacy, len(site.patients_of("train")))
        privacy, patients = run.config.privacy, site.patients_of("train")
        random = _spend(run, plan.schema_event, "counts behind the question schema") if privacy.enabled else None
        rows = site.splits["train"] if random is None else private_release.one_row_each(patients, random)
        values = {name: column[rows] for name, column in site.registry.values.items()}
        counts = count(values, site.dictionary, resolution(privacy))
        vector, most = counts.to_vector(), sums.count_limit(run.config)
        if vector.max() > most:
            raise RegistryError(f"more than {most} patients in a bin: lower federation.max_sites")
        if random is None:
            ring, number = vector.astype(np.uint32), len(patients)
        else:  # how many patients there are is not sent either
            ring = private_release.noised_counts(vector, counts.layout, privacy.schema_noise_multiplier, random)
            number = privacy.declared_patients
        return payload.Payload(instruction.model_digest, inputs, ring, np.array([number], np.int64))

    return _offered(run, COUNTS, instruction.attempt, inputs, work)


def take_schema(site: Site, instruction: SchemaInstruction) -> SchemaReply:
    """Stores the published schema after checking that it is over this dictionary."""
    run = SiteRun(site, instruction)
    schema = parse_schema(instruction.schema)
    schema.verify(site.dictionary)
    policy.check_schema(site.config.policy, schema)
    policy.allowed_targets(site.config.policy, schema.names)
    private_folder(run.folder)
    write_atomic(run.folder / "schema.json", schema.to_json().encode())
    return SchemaReply(**run.head, schema_digest=schema.digest())


def train(site: Site, instruction: TrainInstruction) -> KeysReply:
    """One local GRPO round. An identical repeat answers from disk; another one for the same or an older round is
    refused.
    """
    run = SiteRun(site, instruction)
    wanted = _input_digest(instruction, instruction.schema_digest)
    stored = update.load(run.folder, instruction.round_index)
    if stored is None:
        stored = _train(run, instruction, wanted)
        update.store(run.folder, instruction.round_index, stored)
        (run.folder / CHECKPOINT).unlink(missing_ok=True)
    elif stored.input_digest != wanted:
        raise RefusedError(f"round {instruction.round_index}: already trained from another model, config or schema")
    advert = sharing.offer(run, UPDATE, instruction.attempt, payload.of_update(stored))
    return KeysReply(**run.head, advert=advert)


def _train(run: SiteRun, instruction: TrainInstruction, input_digest: str) -> update.StoredUpdate:
    model = run.global_model(instruction.vector, instruction.model_digest)
    schema, name = run.schema(instruction.schema_digest), run.site.config.name
    targets = policy.allowed_targets(run.site.config.policy, schema.names)
    source = TrainingPatients(run.builder(schema), run.site.patients_of("train"), targets)
    policy.check_patients(run.site.config.policy, run.config.privacy, source.n_patients)
    update.claim(run.folder, instruction.round_index, input_digest)
    private = _private_steps(run) if run.config.privacy.enabled else None
    from .grpo import train_local_round  # trl takes seconds: not before everything was checked

    def tell(done: int, steps: int, _reward: float) -> None:
        if on_work is not None:
            on_work(name, "step", done, steps)

    index = instruction.round_index
    # In a private run questions and completions are the site's secret as well: in a stream that somebody knows, one
    # more patient in a draw would move what all patients after it are asked, and so more of the sum than its own part.
    secret = private is not None
    seed = secrets.randbits(128) if secret else derive_seed(run.config.seed, "train", name, index)
    # A round that a kill interrupted goes on, if all that it depends on is as it was. Who opted out since then is not
    # in what comes out: the registry's digest is another one.
    about = (input_digest, run.site.registry_digest, targets, wardround_version())
    result = train_local_round(
        run.language_model(model),
        source,
        run.template,
        run.config,
        seed=seed,
        round_index=index,
        private=private,
        on_step=tell,
        checkpoint=Checkpoint(
            run.folder / CHECKPOINT, hashlib.sha256(json.dumps(about).encode()).hexdigest(), private=secret
        ),
    )
    federation = run.config.federation
    values = {
        "weight": min(source.n_patients, federation.max_weight) if federation.weighting == "patients" else 1,
        "clipped": 0,
        "steps": result.steps,
        "questions": result.questions,
        "completions": result.completions,
        "reward": round(result.reward_sum * sums.REWARD_UNIT),
        "boxed": result.boxed,
        "completion_tokens": result.completion_tokens,
    }
    histogram = [int(number) for number in result.reward_histogram]
    if private is not None:  # who was drawn and what was right stays here; weight, clipping and steps say nothing of it
        values |= dict.fromkeys(("questions", "completions", "reward", "boxed", "completion_tokens"), 0)
        histogram = [0] * len(histogram)
    tail = [*(int(values[name]) for name in sums.UPDATE_TAIL), *histogram]
    return update.StoredUpdate(
        input_digest=input_digest,
        model_digest=instruction.model_digest,
        inputs=sums.input_digest(instruction.schema_digest).hex(),
        delta=update.difference(result.vector, model.trainable),
        tail=np.array(tail, np.int64),
    )


def _private_steps(run: SiteRun) -> PrivateSteps:
    """Spends a round's event, and says how its steps are made private."""
    from .private_optimizer import PrivateSteps  # imports torch

    privacy = run.config.privacy
    assert privacy.max_grad_norm is not None
    random = _spend(run, plan.round_event, "training steps of a round")
    return PrivateSteps(
        noise_multiplier=plan.noise_multiplier(run.config),
        max_grad_norm=privacy.max_grad_norm,
        rate=plan.rate(run.config),
        expected_patients=run.config.grpo.patients_per_step,
        random=random,
    )


def _spend(run: SiteRun, of: Callable[[RunConfig], Event], purpose: str) -> SecureRandom:
    """Records what is about to be spent of the privacy budget, before it is; the randomness to spend it with.

    An instruction that comes again spends once. It is worked on again only while nothing of the first work has left: a
    second noise on the same numbers would be a second release.

    Raises:
        RefusedError: the budget does not hold; released already, and the record of it is gone.
    """
    from .randomness import SecureRandom  # imports torch

    config, instruction, ledger = run.config, run.instruction, run.site.ledger
    event = of(config)

    def afford(history: Sequence[Spend]) -> Mapping[str, float]:
        return policy.check_spend(
            run.site.config.policy,
            history,
            event,
            run_id=instruction.run_id,
            plan=plan.events(config),
            privacy=config.privacy,
        )

    about = instruction.run_id, instruction.round_index
    number = ledger.spend(event.to_json(), *about, purpose, afford)
    if ledger.has_left(*about, MaskInstruction.ROUTE, since=number):
        raise RefusedError(f"{purpose}: released already, and the file that held it is gone; it is not made again")
    return SecureRandom()


def validate(site: Site, instruction: ValidateInstruction) -> KeysReply:
    """Scores the global model on validation patients, for the secure sum of right answers."""
    run = SiteRun(site, instruction)
    inputs = sums.input_digest(instruction.schema_digest)

    def work() -> payload.Payload:
        model = run.global_model(instruction.vector, instruction.model_digest)
        n = run.config.federation.validation_questions_per_site
        questions, right = run.held_out("validation", run.schema(instruction.schema_digest), n), 0
        if questions:
            from .evaluation import evaluate_questions

            lm, tell = run.language_model(model), _telling(run, len(questions))
            outcomes = evaluate_questions(lm, questions, run.template, run.config, on_done=tell)
            right = int(np.sum(outcomes.correct))
        tail = np.array([len(questions), right], np.int64)
        return payload.Payload(instruction.model_digest, inputs, np.zeros(0, np.uint32), tail)

    return _offered(run, VALIDATION, instruction.attempt, inputs, work)


def evaluate(site: Site, instruction: EvaluateInstruction) -> EvaluateReply:
    """Scores base, warmed-up and final model on test patients: once; a repeat answers from disk."""
    run = SiteRun(site, instruction)
    wanted = _input_digest(instruction, instruction.schema_digest, instruction.warmup_digest)
    path = run.folder / "test.record"
    if path.exists():
        record = read_record(path)
        if record.values["input_digest"] != wanted:
            raise RefusedError("evaluate: test patients were already scored for another model")
        samples = str(record.values["samples"])
    else:
        if run.config.privacy.enabled:
            policy.check_test_patients(site.config.policy, len(site.patients_of("test")))
        counts, samples = _evaluate(run, instruction)
        inputs = sums.input_digest(instruction.schema_digest, instruction.warmup_digest)
        given = payload.Payload(instruction.model_digest, inputs, np.zeros(0, np.uint32), counts)
        payload.store(run.folder, instruction.round_index, TEST, given)
        write_record(path, {"input_digest": wanted, "samples": samples})
    given = payload.require(run.folder, instruction.round_index, TEST)
    advert = sharing.offer(run, TEST, instruction.attempt, given)
    return EvaluateReply(**run.head, samples=samples, advert=advert)


def _telling(run: SiteRun, total: int) -> Callable[[int], None]:
    """Called with the number of questions just answered, tells this machine how many of `total` are."""
    done = 0

    def tell(n: int) -> None:
        nonlocal done
        done += n
        if on_work is not None:
            on_work(run.site.config.name, "question", done, total)

    return tell


def _offered(run: SiteRun, purpose: int, attempt: int, inputs: bytes, work: Callable[[], payload.Payload]) -> KeysReply:
    """Does the work unless its result is on disk, and offers it to the secure sum."""
    index = run.instruction.round_index
    given = payload.load(run.folder, index, purpose)
    if given is None or (given.model_digest, given.inputs) != (run.instruction.model_digest, inputs):
        given = work()
        payload.store(run.folder, index, purpose, given)
    return KeysReply(**run.head, advert=sharing.offer(run, purpose, attempt, given))


def _evaluate(run: SiteRun, instruction: EvaluateInstruction) -> tuple[NDArray[np.int64], str]:
    """Counts of the test questions' answers, as they may leave, and the samples that may be shown, as JSON."""
    manifest, privacy = run.round_zero.manifest, run.config.privacy
    warmup, final = GlobalModel(manifest, instruction.warmup), GlobalModel(manifest, instruction.final)
    warmup.verify(instruction.warmup_digest)
    final.verify(instruction.model_digest)
    schema = run.schema(instruction.schema_digest)
    random = _spend(run, plan.metrics_event, "results on test patients") if privacy.enabled else None
    tally, of_tasks, samples = _scored(run, schema, warmup, final)
    if random is None:
        return np.concatenate([tally.to_vector(), of_tasks]), samples
    # Samples are whole records: in a private run they stay in the site's own report, of an open registry as well.
    return private_release.noised_results(tally, privacy.metrics_noise_multiplier, random), policy.NO_SAMPLES


def _scored(
    run: SiteRun, schema: Schema, warmup: GlobalModel, final: GlobalModel
) -> tuple[Tally, NDArray[np.int64], str]:
    """The tally of test questions, the sums of the run's tasks (int64, empty without any), and the samples, as JSON."""
    settings, limits = run.config.evaluation, run.site.config.policy
    questions = run.held_out("test", schema, settings.questions_per_site)
    # In a private run `evaluate` has refused already if it had to: zeros here would turn on a single patient.
    if not run.config.privacy.enabled and not policy.enough_test_patients(limits, len(questions)):
        questions = []
    tasks: list[Task] = []
    exams: list[Exam | None] = []
    of_tasks = np.zeros(0, np.int64)
    if settings.tasks:  # their statistics import scipy
        from ..common.task_sums import run_tasks, tasks_size
        from .task_exams import make_exams

        tasks = run_tasks(settings.tasks, run.site.dictionary)
        of_tasks = np.zeros(tasks_size(tasks, run.site.dictionary, EVALUATED), np.int64)
        exams = make_exams(run, schema, tasks)
    if not questions and not any(exams):
        return Tally.empty(schema.names, EVALUATED), of_tasks, policy.NO_SAMPLES
    from .evaluation import evaluate_questions

    lm = run.language_model(warmup)
    able = [exam for exam in exams if exam is not None]
    asked = [questions, *(exam.questions for exam in able)]
    # Where no round was better than the warm-up, they are one model.
    same = final.digest == warmup.digest
    tell = _telling(run, (2 if same else 3) * sum(map(len, asked)))

    def answers() -> list[Outcomes]:
        return [evaluate_questions(lm, some, run.template, run.config, on_done=tell) for some in asked]

    every: dict[str, list[Outcomes]] = {}
    with lm.base_only():
        every["base"] = answers()
    every["warmup"] = answers()
    lm.set_vector(final.full, trainable_only=False)
    every["final"] = every["warmup"] if same else answers()
    if tasks:
        from .task_exams import task_vector

        of_exams = {name: found[1:] for name, found in every.items()}
        of_tasks = task_vector(tasks, exams, of_exams, run.site.dictionary, limits)
    outcomes = {name: found[0] for name, found in every.items()}
    tally, samples = Tally.of(questions, outcomes, schema.names), _samples(run, lm, questions, outcomes)
    local_report.write(
        run.folder / "report.html",
        site=run.site.config.name,
        run_id=run.instruction.run_id,
        tally=tally,
        labels={feature.name: feature.label for feature in run.site.dictionary.features},
        samples=samples,
        answer_only=run.config.questions.reasoning_tokens == 0,
        tasks=[
            (exam.task.title, {name: found[at].correct for name, found in every.items()})
            for at, exam in enumerate(able, start=1)
        ],
    )
    shared = policy.shares_samples(run.site.config.policy, run.site.dictionary)
    return tally, of_tasks, json.dumps(samples, sort_keys=True) if shared else policy.NO_SAMPLES


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
    run: SiteRun, lm: LanguageModel, questions: list[Question], outcomes: Mapping[str, Outcomes]
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
