"""The whole audit: open registry → model → three attacks, each kept when it is done → audit.json and audit.html.

Run on one machine, by `wardround simulate audit`. Enters: the config of a private run, whose plan (q, steps, C, δ) and
model are audited at its ε and at others. Leaves: the folder. The registries are open or synthetic ones; nothing speaks
about a patient.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...client.folder import TrainingPatients
from ...client.grpo import train_local_round
from ...client.private_optimizer import PrivateSteps
from ...client.questions import QuestionBuilder
from ...client.registry import Registry
from ...common import plan
from ...common.config import LoraConfig, RunConfig, to_toml
from ...common.counts import count
from ...common.errors import ConfigError, RunFolderError
from ...common.files import write_atomic
from ...common.lm import models
from ...common.lm.models import LanguageModel
from ...common.lm.scoring import option_log_probs
from ...common.privacy import Event, calibrate, epsilon_prv
from ...common.question import PromptTemplate, Question, load_prompt
from ...common.schema import derive_schema
from ...common.seeds import derive_rng, derive_seed
from ...common.statistics import wilson
from .. import small_model
from ..federation import load_registry
from ..small_model import SMALL
from . import inversion, membership, page
from .bound import CONFIDENCE, one_run, permitted_auc
from .canaries import AuditedEngine, Canaries, WithCanaries, observe

PARTS = ("one-run", "membership", "inversion")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """How much is tried.

    Attributes:
        epsilons: the ε that are claimed, one after the other.
        canaries: m of the one-run bound.
        width: values of the trained vector that a canary has.
        bystanders: patients among whom the canaries are.
        canary_members, ordinary_members: patients of each kind that are trained on in membership inference.
        others: patients of each kind that are not.
        attacked: patients whose records are read from an update.
        parts: of `PARTS`.
    """

    epsilons: tuple[float, ...] = (1.0, 2.0, 4.0)
    canaries: int = 4000
    width: int = 4
    bystanders: int = 100
    canary_members: int = 300
    ordinary_members: int = 100
    others: int = 700
    attacked: int = 20
    parts: tuple[str, ...] = PARTS


@dataclass(frozen=True, eq=False)
class Case:
    """What every part works on."""

    config: RunConfig
    settings: Settings
    registry: Registry
    template: PromptTemplate
    builder: QuestionBuilder
    questions: Sequence[Question]  # one of each patient

    def model(self, lora: LoraConfig) -> LanguageModel:
        return models.load(self.config.model, lora, seed=derive_seed(self.config.seed, "audit model"))

    def rng(self, use: str) -> np.random.Generator:
        return derive_rng(self.config.seed, f"audit {use}")

    @property
    def delta(self) -> float:
        assert self.config.privacy.delta is not None
        return self.config.privacy.delta

    @property
    def steps(self) -> int:
        return self.config.federation.rounds * self.config.grpo.local_steps

    def private(self, epsilon: float, rate: float, steps: int) -> tuple[PrivateSteps, Event, float]:
        """Steps that keep to ε, their event, and what the accountant says they cost."""
        privacy = self.config.privacy
        assert privacy.max_grad_norm is not None and privacy.declared_patients is not None
        sigma = calibrate(epsilon, self.delta, rate, steps)
        event = Event("rounds", sigma, rate, steps)
        private = PrivateSteps(sigma, privacy.max_grad_norm, rate, rate * privacy.declared_patients)
        return private, event, epsilon_prv([event], self.delta).epsilon


def audit(config: RunConfig, out: Path, settings: Settings, say: Say = lambda _: None) -> dict[str, Any]:
    """Runs what is not done yet, and writes audit.json and audit.html.

    Returns:
        The content of audit.json; "passed" says that nothing observed contradicts a claim.

    Raises:
        ConfigError: the config claims nothing, or its model has too few trained values for the canaries.
        RunFolderError: `out` holds another audit.
        UserError: registry, dictionary, prompt or model are not usable.
    """
    if not config.privacy.enabled:
        raise ConfigError("privacy.enabled = false: the config claims no ε that could be audited")
    _claim(out, config, settings)
    case = prepare(config, out, settings)
    makers = {"one-run": one_run_bounds, "membership": memberships, "inversion": inversions}
    result: dict[str, Any] = {
        "delta": case.delta,
        "confidence": CONFIDENCE,
        "model": config.model.id,
        "registry": case.registry.dictionary.title or case.registry.dictionary.name,
        "settings": asdict(settings),
        "max_grad_norm": config.privacy.max_grad_norm,
        "seed": config.seed,
        "wardround": version("wardround"),
    }
    for part in settings.parts:
        result[part.replace("-", "_")] = makers[part](case, out, say)
    result["passed"] = not contradictions(result)
    result["contradictions"] = contradictions(result)
    write_atomic(out / "audit.json", (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode(), mode=0o644)
    page.write(out / "audit.html", result, to_toml(config))
    return result


def _claim(out: Path, config: RunConfig, settings: Settings) -> None:
    """Makes the folder, or sees that it is of this audit."""
    # What is audited is the code as well: another version starts anew.
    text = json.dumps([config.digest(), asdict(settings), version("wardround")], sort_keys=True)
    digest, file = hashlib.sha256(text.encode()).hexdigest(), out / "parts" / "audit.digest"
    if file.exists():
        if file.read_text(encoding="utf-8") != digest:
            raise RunFolderError(f"{out}: holds an audit with another config or other options; use a new folder")
        return
    if out.exists() and any(out.iterdir()):
        raise RunFolderError(f"{out}: not empty, and not an audit's folder")
    file.parent.mkdir(parents=True)
    write_atomic(file, digest.encode(), mode=0o644)


def _kept(out: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gave, now or in an earlier run that was interrupted."""
    file = out / "parts" / f"{name}.json"
    if not file.exists():
        write_atomic(file, json.dumps(make(), ensure_ascii=False).encode(), mode=0o644)
    return json.loads(file.read_text(encoding="utf-8"))


def prepare(config: RunConfig, out: Path, settings: Settings) -> Case:
    """Registry, questions and, where the config asks for it, the small model."""
    registry, template = load_registry(config), load_prompt(config.model.prompt)
    schema = derive_schema(count(registry.values, registry.dictionary), registry.dictionary, config.questions)
    builder = QuestionBuilder(registry, schema, template, config.questions)
    rng = derive_rng(config.seed, "audit questions")
    rows = rng.permutation(len(next(iter(registry.values.values()))))
    questions = builder.build(rows, rng)
    if config.model.id == SMALL:
        texts = small_model.texts_of(template, questions)
        small_model.make(out / SMALL, texts, seed=derive_seed(config.seed, "audit small model") % 2**32)
        config = config.model_copy(update={"model": config.model.model_copy(update={"id": str(out / SMALL)})})
    return Case(config, settings, registry, template, builder, questions)


def one_run_bounds(case: Case, out: Path, say: Say) -> list[dict[str, Any]]:
    """The one-run bound at every ε, for one look at everybody and for the config's own plan."""
    result: list[dict[str, Any]] = []
    for looks, rate, steps in (("everybody", 1.0, 1), ("plan", plan.rate(case.config), case.steps)):
        for epsilon in case.settings.epsilons:
            say(f"one-run bound: {looks}, ε = {epsilon:g}")
            name = f"one-run-{looks}-{epsilon:g}"
            result.append(_kept(out, name, lambda e=epsilon, q=rate, t=steps, w=looks: bound(case, e, q, t, w)))
    return result


def bound(case: Case, epsilon: float, rate: float, steps: int, looks: str) -> dict[str, Any]:
    """One run with canaries, and what it proves."""
    settings, lm = case.settings, case.model(case.config.lora)
    private, event, claimed = case.private(epsilon, rate, steps)
    try:
        canaries = Canaries.plant(lm.vector().size, settings.canaries, settings.width, case.rng("canaries"))
    except ValueError as error:
        raise ConfigError(f"--canaries: {error}") from None
    rows = np.arange(settings.bystanders, dtype=np.int64)[:, None]
    patients = TrainingPatients(case.builder, list(rows), list(case.builder.schema.names))
    grpo = case.config.grpo.model_copy(update={"local_steps": steps})
    engine = AuditedEngine(
        lm,
        WithCanaries(patients, canaries),
        case.template,
        case.config.model_copy(update={"grpo": grpo}),
        canaries,
        seed=derive_seed(case.config.seed, "audit one run"),
        private=private,
    )
    found = one_run(observe(engine), canaries.included, case.delta)
    return {
        "looks": looks,
        "epsilon": epsilon,
        "claimed": claimed,
        "event": event.to_json(),
        "included": int(canaries.included.sum()),
        **{f"bound_{key}" if key == "epsilon" else key: value for key, value in asdict(found).items()},
    }


def memberships(case: Case, out: Path, say: Say) -> list[dict[str, Any]]:
    """Membership inference without privacy and at every ε, on the same patients."""
    settings = case.settings
    members = {"canary": settings.canary_members, "ordinary": settings.ordinary_members}
    try:
        groups = membership.groups(case.questions, members, settings.others, case.rng("membership"))
    except ValueError as error:
        raise ConfigError(f"--members: {error}") from None
    result: list[dict[str, Any]] = []
    for epsilon in (None, *settings.epsilons):
        claim = "without privacy" if epsilon is None else f"ε = {epsilon:g}"
        say(f"membership inference: {claim}")
        result.append(_kept(out, f"membership-{epsilon or 'off'}", lambda e=epsilon: infer(case, groups, e, say)))
    return result


def infer(case: Case, groups: dict[str, membership.Group], epsilon: float | None, say: Say) -> dict[str, Any]:
    """Trains on the members of both groups together, and attacks the result."""
    # The small model is trained whole: a LoRA adapter of it remembers little, and the worst case is wanted.
    small = Path(case.config.model.id).name == SMALL
    lm = case.model(LoraConfig(strategy="full") if small else case.config.lora)
    rate = plan.rate(case.config)
    private, claimed = None, None
    if epsilon is not None:
        private, _, claimed = case.private(epsilon, rate, case.steps)
    trained = [question for group in groups.values() for question in group.trained]

    def log_probs(group: membership.Group) -> membership.Float64:
        found = option_log_probs(lm, group.questions, case.template, case.config.speed.micro_batch)
        return found.astype(np.float64)

    before = {kind: log_probs(group) for kind, group in groups.items()}
    grpo = case.config.grpo.model_copy(update={"local_steps": case.steps, "patients_per_step": rate * len(trained)})
    config = case.config.model_copy(update={"grpo": grpo})
    seed = derive_seed(case.config.seed, "audit membership")

    def stepped(done: int, steps: int, _: float) -> None:
        if done % 50 == 0:
            say(f"  step {done} of {steps}")

    trained_round = train_local_round(
        lm, membership.Members(trained), case.template, config, seed=seed, private=private, on_step=stepped
    )
    found: dict[str, Any] = {}
    for kind, group in groups.items():
        scores = membership.scores(group.questions, before[kind], log_probs(group))
        found[kind] = {
            attack: {**membership.told_apart(values, group.member), "roc": membership.roc(values, group.member)}
            for attack, values in scores.items()
        }
        right = scores["reward"]
        found[kind] |= {"right_members": float(right[group.member].mean())}
        found[kind] |= {"right_others": float(right[~group.member].mean())}
    return {
        "epsilon": epsilon,
        "claimed": claimed,
        "permitted_auc": None if claimed is None else permitted_auc(claimed, case.delta),
        "passes": trained_round.questions / len(trained),
        "seconds": trained_round.seconds,
        "groups": found,
    }


def inversions(case: Case, out: Path, say: Say) -> list[dict[str, Any]]:
    """What is read from an update, by what is seen of it."""
    lm = case.model(case.config.lora)
    # Of the claims the weakest: a smaller ε has more noise.
    names = ["alone", "crowd", "masked", f"private-{max(case.settings.epsilons):g}"]
    result: list[dict[str, Any]] = []
    for name in names:
        say(f"gradient inversion: {name}")
        result.append(_kept(out, f"inversion-{name}", lambda n=name: invert(case, lm, n, say)))
    return result


def invert(case: Case, lm: LanguageModel, seen: str, say: Say) -> dict[str, Any]:
    """Reads the records of some patients from what is seen of their updates; the same candidates for all of `seen`."""
    rng, template, config, n = case.rng("inversion"), case.template, case.config, case.settings.attacked
    lm.reset(derive_seed(config.seed, "audit model"))
    start = lm.vector()
    records = [inversion.Record.of(question, template) for question in case.questions]
    lines = inversion.alternatives(records, case.registry.dictionary, template)
    attacker = inversion.Attacker(lm, template, config, start)
    epsilon = float(seen.removeprefix("private-")) if seen.startswith("private-") else None
    values = right = answers = 0
    value_chance = answer_chance = 0.0
    for index in range(n):
        mine = case.questions[index * inversion.CROWD : (index + 1) * inversion.CROWD]
        if seen != "crowd":
            mine = mine[:1]
        private = None
        if epsilon is not None:
            # Of the config's plan one step, in which this patient happens to be the only one drawn.
            private = replace(case.private(epsilon, plan.rate(config), case.steps)[0], rate=1.0)
        update = inversion.update_of(lm, mine, template, config, start, private)
        if seen == "masked":
            update = inversion.masked(update, config)
        record = records[index * inversion.CROWD]
        lists = [_candidates(line, lines[line], rng) for line in record.lines]
        found, answer = attacker.read(update, record, lists, rng)
        asked = [place for place, each in enumerate(lists) if len(each) > 1]
        values += len(asked)
        right += sum(found[place] == record.lines[place] for place in asked)
        value_chance += sum(1 / len(lists[place]) for place in asked)
        answers += answer == record.question.answer
        answer_chance += 1 / len(record.question.options)
        if (index + 1) % 5 == 0:
            say(f"  patient {index + 1} of {n}")
    return {
        "seen": "private" if epsilon is not None else seen,
        "epsilon": epsilon,
        "patients": n,
        "values": {"n": values, "right": right, "ci95": wilson(right, values), "chance": value_chance / values},
        "answers": {"n": n, "right": answers, "ci95": wilson(answers, n), "chance": answer_chance / n},
    }


def _candidates(true: str, lines: Sequence[str], rng: np.random.Generator) -> list[str]:
    others = [line for line in lines if line != true]
    chosen = rng.choice(len(others), min(inversion.CANDIDATES - 1, len(others)), replace=False) if others else []
    return sorted([true, *(others[index] for index in chosen)])


def contradictions(result: dict[str, Any]) -> list[str]:
    """What was seen and cannot be if the claims hold, one sentence each."""
    found = [
        f"One run at ε = {run['claimed']:.3f} ({run['looks']}): {run['right']} of {run['guesses']} guesses were right, "
        f"which refutes every ε below {run['bound_epsilon']:.3f}."
        for run in result.get("one_run", ())
        if run["bound_epsilon"] > run["claimed"]
    ]
    for run in result.get("membership", ()):
        if run["claimed"] is None:
            continue
        for kind, group in run["groups"].items():
            for attack in membership.ATTACKS:
                if group[attack]["auc_ci95"][0] > run["permitted_auc"]:
                    found.append(
                        f"Membership of {kind} patients at ε = {run['claimed']:.3f} by {membership.ATTACKS[attack]}: "
                        f"AUC {group[attack]['auc']:.3f}, above {run['permitted_auc']:.3f}, the most that ε permits."
                    )
    return found
