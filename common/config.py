"""Run, site and model configuration: frozen pydantic models read from TOML; unknown keys are refused.

Every default is a setting that was run (docs/results.md), unless it is said to be not tuned. Privacy numbers that must
be chosen have no default.
Mechanism settings (what is computed) and speed settings (`Speed`) are separate types, so nobody tunes one by the other.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, TypeVar, cast, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NAME = r"[A-Za-z0-9._-]{1,64}"  # of a run and of a site: safe in a path, in a log and on a page


def plain_fingerprint(text: str) -> str:
    """A fingerprint (secure-sums.md §S2) as people write it, without spaces and in capitals.

    Raises:
        ValueError: it is not 32 characters of base32.

    >>> plain_fingerprint("abcd efgh ijkl mnop qrst uvwx yz23 4567")
    'ABCDEFGHIJKLMNOPQRSTUVWXYZ234567'
    """
    plain = "".join(text.split()).upper()
    if not re.fullmatch("[A-Z2-7]{32}", plain):
        raise ValueError(f"fingerprint: expected 8 groups of 4 of A-Z and 2-7, got {len(plain)} characters")
    return plain


class Frozen(BaseModel):
    """Base of every configuration model: immutable, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Frozen):
    """The base model."""

    id: str = "smollm2-135m"  # a packaged name, a local folder, or a Hugging Face id in the local cache
    # Of the frozen weights and the products with them, in training and scoring; adapters are float32 in any case.
    # "auto": bfloat16 where the processor multiplies it natively, which is two to three times as fast, else float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    prompt: str = "en"  # name in configs/prompts or a path to a TOML


class LoraConfig(Frozen):
    """What is trained. `ffa`: A frozen after round 0, B trained (Sun et al. 2024, arXiv 2403.12313)."""

    strategy: Literal["ffa", "fedit", "full"] = "ffa"
    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: str | tuple[str, ...] = "all-linear"


OptionOrder = Literal["shuffled", "sorted"]


class QuestionsConfig(Frozen):
    """How questions are made from records (common/schema.py, client/questions.py)."""

    n_options: Annotated[int, Field(ge=2, le=10)] = 5
    features_per_record: Annotated[int, Field(ge=1)] = 16
    # Which of the known features a record shows when there are more: a random choice, or those that say most about the
    # target by the published schema. Shortcuts are hidden before.
    context: Literal["random", "informative"] = "random"
    # A feature is asked only if some feature that may be shown with it says at least so much about it (nats, by the
    # schema); 0 asks all. Outcomes are always asked.
    min_information_nats: Annotated[float, Field(ge=0)] = 0.0
    outcome_share: Fraction = 0.25  # share of questions that ask an outcome; the rest mask a feature
    mi_threshold: Annotated[float, Field(gt=0)] = 0.5
    mi_normalisation: Literal["target-entropy", "none"] = "target-entropy"
    option_spacing_sigma: Annotated[float, Field(gt=0)] = 2.0
    # "sorted": levels in the dictionary's order, numbers rising. Where all levels are offered a letter is then the same
    # one every time, and a relation between features one between a line and a letter. The warm-up shuffles either way.
    option_order: OptionOrder = "shuffled"
    mixture_components: Annotated[int, Field(ge=1, le=8)] = 3
    reasoning_tokens: Annotated[int, Field(ge=0, le=16384)] = 0  # 0: answer-only


class WarmupConfig(Frozen):
    """Public warm-up on synthetic questions, once, at the coordinator; off for models that need none."""

    enabled: bool = True
    adapter: str | None = None  # a released adapter (name in configs/adapters or a path); None: train it
    start: str | None = None  # a released adapter to train on from; None: a fresh one
    steps: Annotated[int, Field(ge=1)] = 200
    batch_size: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    features_per_record: Annotated[int, Field(ge=1)] = 6
    reasoning_tokens: Annotated[int, Field(ge=0)] = 0
    hinted_share: Fraction = 0.4  # share of questions whose record only hints at the answer
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0


class GrpoConfig(Frozen):
    """One local GRPO round (client/grpo.py)."""

    group_size: Annotated[int, Field(ge=2, le=64)] = 7
    local_steps: Annotated[int, Field(ge=1)] = 4
    patients_per_step: Annotated[float, Field(gt=0)] = (
        8.0  # expected: the Poisson rate is this over the declared patients
    )
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    # The rate falls linearly over the rounds, to this share of it in the last; within a round it is constant.
    final_rate_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    loss_type: Literal["dr_grpo", "grpo", "bnpo", "dapo"] = "dr_grpo"
    scale_rewards: Literal["group", "none"] = "group"
    beta: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    expectation: Literal["sampled", "exact"] = "sampled"  # exact: answer-only, the G → ∞ limit
    # Reward for a nat of entropy over the options, with the exact expectation only: a policy that is sure of its
    # answers has no gradient left to learn from (client/grpo_loss.py).
    entropy_bonus: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def exact_has_no_reference_model(self) -> Self:
        if self.expectation == "exact" and self.beta > 0:
            raise ValueError("expectation = 'exact' has no KL term: set beta = 0")
        return self

    @model_validator(mode="after")
    def only_exact_has_an_entropy_bonus(self) -> Self:
        if self.expectation == "sampled" and self.entropy_bonus > 0:
            raise ValueError(
                "entropy_bonus is of expectation = 'exact' only: trl's loss of sampled completions has none"
            )
        return self


class FederationConfig(Frozen):
    """Rounds and how their mean update is applied.

    FedAdam's constants are not tuned yet: β₁ and β₂ as in Reddi et al. (2021), η and τ by the size of local updates,
    which is a few local steps of `grpo.learning_rate`: 1e-4 to 1e-3 a value.
    """

    rounds: Annotated[int, Field(ge=1)] = 2
    server_optimizer: Literal["fedavg", "fedadam"] = "fedavg"
    # η. None: 1 for fedavg, which applies the mean update as it is; 1e-3 for fedadam, whose step a value is about η
    # whatever the update's size (1 would move every value of the adapter by 1 and destroy it).
    server_learning_rate: Annotated[float, Field(gt=0)] | None = None
    server_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    server_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    server_epsilon: Annotated[float, Field(gt=0)] = 1e-4  # τ: values that move by less in a round take smaller steps
    weighting: Literal["uniform", "patients"] = "uniform"
    # "bonawitz": sites send masked integers only (docs/secure-sums.md). "none": a simulation adds up on its machine,
    # without a message; for comparison only, and refused by every site that is not simulated.
    secure_aggregation: Literal["bonawitz", "none"] = "bonawitz"
    colluders: Annotated[int, Field(ge=1)] = 1  # c: hospitals that may collude with the coordinator; decides thresholds
    max_sites: Annotated[int, Field(ge=3, le=1024)] = 64  # most sites of a sum: more make the fixed point coarser
    update_range: Annotated[float, Field(gt=0)] = 1.0  # values of an update outside ± this are clipped
    max_weight: Annotated[int, Field(ge=1)] = 100_000  # of a site, with weighting = "patients"; more patients count so
    validation_questions_per_site: Annotated[int, Field(ge=0)] = 40  # 0: no validation gate
    rollback_tolerance: Fraction = 0.02  # a round whose accuracy is further below the highest so far is rolled back
    # The final model. "best": of the round with the highest validation accuracy, the warmed-up one included. "last": of
    # the last round that was validated and not rolled back; for few questions, which cannot tell rounds apart whose
    # gain is below their standard error. Without validation it is the last round either way.
    keep: Literal["best", "last"] = "best"
    # Rounds without a new highest accuracy before stopping early, also with "last".
    patience: Annotated[int, Field(ge=1)] = 5
    min_sites: Annotated[int, Field(ge=1)] = 3
    phase_timeout_s: Annotated[float, Field(gt=0)] = 86400.0

    @model_validator(mode="after")
    def enough_sites_for_secure_sums(self) -> Self:
        least = max(3, self.colluders + 2)
        if self.secure_aggregation == "bonawitz" and not least <= self.min_sites <= self.max_sites:
            raise ValueError(
                f"secure_aggregation = 'bonawitz', colluders = {self.colluders}: expected min_sites from {least} to "
                f"max_sites = {self.max_sites}, got {self.min_sites}"
            )
        return self

    @property
    def validates(self) -> bool:
        """Whether rounds are validated."""
        return self.validation_questions_per_site > 0

    @property
    def weight_limit(self) -> int:
        """W, the largest weight that a site may have."""
        return self.max_weight if self.weighting == "patients" else 1

    @property
    def eta(self) -> float:
        """The server's learning rate, of this optimizer when none is set."""
        if self.server_learning_rate is not None:
            return self.server_learning_rate
        return 1.0 if self.server_optimizer == "fedavg" else 1e-3


class EvaluationConfig(Frozen):
    """Held-out evaluation: base, warmed-up and final model on the same questions of test patients."""

    questions_per_site: Annotated[int, Field(ge=1)] = 100
    bootstrap_samples: Annotated[int, Field(ge=100)] = 10_000
    samples: Annotated[int, Field(ge=0, le=50)] = (
        4  # questions shown with both models' answers (public registries only)
    )
    sample_tokens: Annotated[int, Field(ge=0)] = 48  # of a sample's text where answers are scored without text
    # Tasks (common/tasks.py) that test patients are asked besides, up to questions_per_site each: outcomes and features
    # by age, sex, comorbidity and severity. A name stands for a shipped one (configs/tasks); the config holds them in
    # full, so that its digest says what is asked, and a site reads no file that a coordinator names.
    tasks: tuple[dict[str, Any], ...] = ()

    @field_validator("tasks", mode="before")
    @classmethod
    def in_full(cls, tasks: Any) -> Any:
        from .tasks import Task, load_task, shipped  # which imports this module

        if not isinstance(tasks, list | tuple):
            raise ValueError("expected a list of tasks")
        found: list[Task] = []
        for place, item in enumerate(cast("list[Any]", tasks), start=1):
            if isinstance(item, str):
                if item not in shipped():
                    raise ValueError(
                        f"no such task {item!r}; shipped are {', '.join(shipped())}, others are given in full"
                    )
                found.append(load_task(item))
                continue
            try:
                found.append(Task.model_validate(item))
            except ValidationError as error:
                raise ValueError(f"task {place}: {describe(error)}") from None
        names = [task.name for task in found]
        if len(set(names)) < len(names):
            raise ValueError("a task is named twice")
        return tuple(task.model_dump(mode="json", exclude_defaults=True) for task in found)


class PrivacyConfig(Frozen):
    """Patient-level differential privacy (docs/privacy.md). What costs or promises privacy has no default.

    One training step at a site is one Poisson draw of its patients at rate q = `grpo.patients_per_step` /
    `declared_patients`, gradients of single patients clipped to `max_grad_norm` and Gaussian noise of standard
    deviation `noise_multiplier` · `max_grad_norm` on their sum. ε holds for every site by itself, for the whole run.
    """

    enabled: bool
    epsilon: Annotated[float, Field(gt=0)] | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None  # C
    declared_patients: Annotated[int, Field(ge=10)] | None = None  # N̂ of a site; never the live count
    noise_multiplier: Annotated[float, Field(gt=0)] | None = None  # σ; None: the smallest that keeps to epsilon
    # Of the counts behind the question schema and of test results: their noise over their L2 sensitivity. Fixed, so
    # that what is left of epsilon decides σ.
    schema_noise_multiplier: Annotated[float, Field(gt=0)] = 4.0
    metrics_noise_multiplier: Annotated[float, Field(gt=0)] = 4.0
    # Bins that a number has at most in the noised counts, in its histogram and in its pairs: every count carries the
    # same noise, so few bins with many patients. docs/privacy.md §P7 has what these and others leave of a schema.
    schema_bins: Annotated[int, Field(ge=2, le=192)] = 24
    schema_pair_bins: Annotated[int, Field(ge=2, le=24)] = 3

    @model_validator(mode="after")
    def all_or_nothing(self) -> Self:
        needed = ("epsilon", "delta", "max_grad_norm", "declared_patients")
        missing = [name for name in needed if getattr(self, name) is None]
        if self.enabled and missing:
            raise ValueError(f"enabled = true needs {', '.join(missing)}: none of them has a default")
        if self.enabled and self.delta * self.declared_patients * 10 > 1:  # type: ignore[operator]
            raise ValueError(
                f"delta = {self.delta}: expected at most 1 / (10 · declared_patients) = "
                f"{1 / (10 * self.declared_patients):.3g}"  # type: ignore[operator]
            )
        return self


NO_PRIVACY = PrivacyConfig(enabled=False)


class SimulationConfig(Frozen):
    """Only for `wardround simulate`: which registry, how it is divided into sites."""

    registry: str = "support_icu"  # a built registry's name, or "synthetic", or a table's path
    dictionary: str | None = None  # with a table's path
    sites: Annotated[int, Field(ge=1, le=1024)] = 4
    partition: Literal["even", "dirichlet", "column"] = "even"
    partition_feature: str | None = None
    dirichlet_alpha: Annotated[float, Field(gt=0)] = 0.5

    @model_validator(mode="after")
    def a_skewed_partition_names_its_feature(self) -> Self:
        if self.partition != "even" and not self.partition_feature:
            raise ValueError(f"partition = '{self.partition}' needs partition_feature")
        return self


class Speed(Frozen):
    """Settings that change time and memory, and results in their last bits only: sums are added in another order."""

    micro_batch: Annotated[int, Field(ge=1)] = 16
    threads: Annotated[int, Field(ge=0)] = 0  # 0: as torch chooses
    # Tokens of one forward and backward pass of training, at least one patient; it decides the memory that training
    # needs (SmolLM2: about 1 MB a token, half in bfloat16). 0: 1024 on a CPU, 2560 there in bfloat16, on a GPU what its
    # free memory holds (common/lm/memory.py).
    tokens_per_backward: Annotated[int, Field(ge=0)] = 0


class RunConfig(Frozen):
    """Everything that decides a run's result, with its seed."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    questions: QuestionsConfig = QuestionsConfig()
    warmup: WarmupConfig = WarmupConfig()
    grpo: GrpoConfig = GrpoConfig()
    federation: FederationConfig = FederationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    privacy: PrivacyConfig
    simulation: SimulationConfig = SimulationConfig()
    speed: Speed = Speed()

    @model_validator(mode="after")
    def private_runs_couple_no_patients(self) -> Self:
        """DESIGN.md §4's allow-list: whatever lets one patient's data change another's gradient, or leaves unnoised."""
        if not self.privacy.enabled:
            return self
        grpo, federation = self.grpo, self.federation
        for setting, value, allowed, why in (
            ("grpo.loss_type", grpo.loss_type, ("dr_grpo", "grpo"), "it divides by the tokens of all patients drawn"),
            ("federation.weighting", federation.weighting, ("uniform",), "a weight is a count of patients"),
            (
                "federation.validation_questions_per_site",
                federation.validation_questions_per_site,
                (0,),
                "the validation gate would steer the run by patients without noise",
            ),
            ("evaluation.tasks", self.evaluation.tasks, ((),), "sums of tasks by subgroup carry no noise"),
        ):
            if value not in allowed:
                expected = " or ".join(map(repr, allowed))
                raise ValueError(f"privacy.enabled = true: {setting}: expected {expected}, got {value!r}: {why}")
        if grpo.patients_per_step > self.privacy.declared_patients:  # type: ignore[operator]
            raise ValueError("privacy.declared_patients: fewer than grpo.patients_per_step")
        return self

    @model_validator(mode="after")
    def exact_expectation_is_answer_only(self) -> Self:
        if self.grpo.expectation == "exact" and self.questions.reasoning_tokens > 0:
            raise ValueError("grpo.expectation = 'exact' needs questions.reasoning_tokens = 0 (answer-only)")
        return self

    @model_validator(mode="after")
    def trained_weights_are_float32(self) -> Self:
        if self.lora.strategy == "full" and self.model.dtype != "float32":
            raise ValueError(
                "lora.strategy = 'full' trains the base weights, and steps of 1e-5 vanish in bfloat16: "
                f"expected model.dtype = 'float32', got '{self.model.dtype}'"
            )
        return self

    def learning_rate_of(self, round_index: int) -> float:
        """The local learning rate of a round, from 1.

        >>> run = RunConfig.model_validate(
        ...     {"name": "r", "grpo": {"learning_rate": 0.1, "final_rate_share": 0.2}, "federation": {"rounds": 5},
        ...      "privacy": {"enabled": False}})
        >>> [round(run.learning_rate_of(index), 3) for index in (1, 3, 5)]
        [0.1, 0.06, 0.02]
        """
        rounds, share = self.federation.rounds, self.grpo.final_rate_share
        done = (round_index - 1) / (rounds - 1) if rounds > 1 else 0.0
        return self.grpo.learning_rate * (1 - (1 - share) * done)

    def to_json(self) -> str:
        """Canonical JSON (sorted keys, no spaces): what travels and what the digest covers."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """SHA-256 hex of the canonical JSON without `speed`, which changes last bits at most."""
        kept = {key: value for key, value in self.model_dump(mode="json").items() if key != "speed"}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> Self:
        return parse(cls, json.loads(text), "run config from the coordinator")


TASKS = ("counts", "train", "validate", "test")  # what a run does with patients, each with its own secure sum
Positive = Annotated[float, Field(gt=0)]


class PolicyConfig(Frozen):
    """A hospital's own limits, `[policy]` in site.toml; checked before any work, never loosened by a coordinator.

    `wardround client policy explain` says them in sentences (client/policy_words.py).
    """

    simulated: bool = False  # only a simulated site of a public registry may send an unmasked update
    # Differential privacy (docs/privacy.md). `require_privacy` left out: runs without it are refused, except by a
    # simulated site of a public registry that sets none of these limits. `false` is a hospital's own decision.
    require_privacy: bool | None = None
    epsilon: Positive | None = None  # of this hospital, over all runs and for good: what client/ledger.py has recorded
    epsilon_per_run: Positive | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None  # at which epsilon is; the largest of a run
    min_noise_multiplier: Positive | None = None  # σ of every mechanism of a run
    max_grad_norm: Positive | None = None  # C
    # What a run may do with patients, and of whom.
    tasks: tuple[Literal["counts", "train", "validate", "test"], ...] = TASKS
    targets_allowed: tuple[str, ...] = ()  # dictionary entries that may be asked; empty: all
    targets_never_asked: tuple[str, ...] = ()
    min_training_patients: Annotated[int, Field(ge=1)] = 1  # of this hospital
    min_test_patients: Annotated[int, Field(ge=1)] = 1  # of this hospital, for its part in the sum of test results
    min_level_patients: Annotated[int, Field(ge=1)] = 1  # of all hospitals, of any level that a question schema shows
    opt_out: str | None = None  # a file with one patient id a line, relative to site.toml: rows that are never read
    max_rounds: Annotated[int, Field(ge=1)] = 1000
    max_local_steps: Annotated[int, Field(ge=1)] = 10_000
    max_bytes_per_run: Annotated[int, Field(ge=1)] | None = None
    # A coordinator names the runs, so limits of one run would be none: these two hold over all of them, for good. More
    # runs are taken part in when run folders are removed from the state folder, more bytes when the limit is raised.
    max_runs: Annotated[int, Field(ge=1)] = 100
    max_upload_bytes: Annotated[int, Field(ge=1)] = 2**36
    # "20:00-06:00", this machine's local time: when work begins. A secure sum whose work is done ends at any hour.
    hours: str | None = None
    allowed_models: tuple[str, ...] = ()  # digests; empty: any
    # The same counts may be added up again with other hospitals, in another run: the difference of the two sums then
    # shows the hospitals that were in one only, together.
    repeat_with_others: bool = False
    share_samples: bool = False  # sample questions may enter the coordinator's report; public registries only
    # Secure sums (secure-sums.md §S3): the fewest hospitals, verified by this one, whose sum it takes part in, and how
    # many hospitals that collude with the coordinator it wants to withstand.
    min_sites: Annotated[int, Field(ge=3)] = 3
    colluders: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def limits_agree(self) -> Self:
        if (self.epsilon is None) != (self.delta is None):
            given, missing = ("epsilon", "delta") if self.delta is None else ("delta", "epsilon")
            raise ValueError(f"{given} without {missing}: a budget is both")
        if self.epsilon_per_run is not None and self.epsilon is None:
            raise ValueError("epsilon_per_run without epsilon and delta: runs have no end, so it limits nothing")
        if self.epsilon_per_run is not None and self.epsilon is not None and self.epsilon_per_run > self.epsilon:
            raise ValueError(f"epsilon_per_run = {self.epsilon_per_run}: more than epsilon = {self.epsilon} in all")
        if self.hours is not None and not re.fullmatch("{0}-{0}".format(r"([01]\d|2[0-3]):[0-5]\d"), self.hours):
            raise ValueError(f"hours = {self.hours!r:.40}: expected begin and end, as '20:00-06:00'")
        if self.hours is not None and self.hours[:5] == self.hours[6:]:
            raise ValueError(f"hours = '{self.hours}': begin and end are the same: leave it out for the whole day")
        return self


class IdentityConfig(Frozen):
    """`[identity]` in site.toml: which roster this hospital pinned, and whom it verified (secure-sums.md §S2)."""

    roster: str = "roster.json"  # signed by the coordinator; relative to site.toml
    roster_digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None  # None: nothing is pinned yet
    # Fingerprints that this hospital compared with those hospitals itself; spaces and case are ignored.
    verified: tuple[Annotated[str, AfterValidator(plain_fingerprint)], ...] = ()
    passphrase_file: str | None = None  # mode 0600; the environment variable WARDROUND_PASSPHRASE goes first


class MappingConfig(Frozen):
    """`[mapping]` in site.toml: this hospital's names, units and codes → the consortium's dictionary."""

    columns: Mapping[str, str] = {}  # dictionary feature → local column
    units: Mapping[str, str | float] = {}  # dictionary feature → local unit (converted) or a factor
    levels: Mapping[str, Mapping[str, str]] = {}  # dictionary feature → {local code → dictionary level}


class SiteConfig(Frozen):
    """One hospital's `site.toml`. Relative paths are relative to the file."""

    name: Annotated[str, Field(pattern=f"^{NAME}$")]
    table: str
    dictionary: str
    state: str = "state"  # folder for what must survive a restart; mode 0700
    split_key: str | None = None  # hex; None: 32 random bytes made once in the state folder
    policy: PolicyConfig = PolicyConfig()
    identity: IdentityConfig = IdentityConfig()
    mapping: MappingConfig = MappingConfig()


class CoordinatorConfig(Frozen):
    """The coordinator's `coordinator.toml` (`wardround server init` writes it). Relative paths are relative to it."""

    consortium: Annotated[str, Field(min_length=1, max_length=100)]  # its name, as people read it; in every roster
    address: str  # host:port that hospitals dial, in their invitations; another one needs new invitations
    listen_host: str = "0.0.0.0"  # the public socket, which answers hospitals and nobody else
    listen_port: Annotated[int, Field(ge=1, le=65535)] = 9092
    loopback_port: Annotated[int, Field(ge=1, le=65535)] = 9093  # on 127.0.0.1: for this coordinator's own processes
    passphrase_file: str | None = None  # mode 0600; the environment variable WARDROUND_PASSPHRASE goes first
    # Of the public socket. Flower cuts what is long into pieces of 5 MiB, so that no request needs much more.
    max_body_bytes: Annotated[int, Field(ge=2**20, le=2**31)] = 64 * 2**20
    max_connections: Annotated[int, Field(ge=8, le=65536)] = 1024
    max_connections_per_address: Annotated[int, Field(ge=4, le=65536)] = 256  # hospitals behind one address share it
    max_failures_per_minute: Annotated[int, Field(ge=1)] = 60  # refused requests of an address, before it has to wait
    request_timeout_s: Annotated[float, Field(gt=0)] = 300.0  # for the whole of a request to arrive

    @model_validator(mode="after")
    def two_sockets(self) -> Self:
        if self.listen_port == self.loopback_port:
            raise ValueError(f"loopback_port = {self.loopback_port}: expected another port than listen_port")
        if self.max_connections_per_address > self.max_connections:
            raise ValueError("max_connections_per_address: expected no more than max_connections")
        return self


Model = TypeVar("Model", bound=BaseModel)


def parse(kind: type[Model], data: Mapping[str, Any], source: str) -> Model:
    """`data` as a `kind`, or one line that names the source, the key, what was expected and what came.

    Raises:
        ConfigError: unknown key, missing key, wrong type, out of range.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error as one line, with how many more there are."""
    first, more = error.errors()[0], len(error.errors()) - 1
    where = ".".join(str(part) for part in first["loc"]) or "(whole file)"
    if first["type"] == "extra_forbidden":
        text = f"unknown key '{where}'; check its spelling and its section"
    elif first["type"] == "missing":
        text = f"missing key '{where}'"
    else:
        text = f"'{where}': {first['msg'].removeprefix('Value error, ')}, got {first['input']!r:.80}"
    return text + (f" (and {more} more)" if more else "")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        ConfigError: no such file, not UTF-8, not TOML (with line and column).
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: expected a TOML file, got a folder") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text, byte {error.start} is not") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def packaged(folder: str, name: str) -> Path:
    """Path of a file shipped in `configs/`, whether or not it exists."""
    # configs/ is a sibling of common/, installed or not; importlib.resources cannot see it in an editable install.
    return Path(__file__).resolve().parent.parent / "configs" / folder / name


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`--set section.key=value` applied to raw TOML data of a run; values are TOML, bare words are strings.

    TOML has no null, so `none` takes an optional key away; a file of that name is written in quotes.

    >>> apply_overrides({"grpo": {"group_size": 7}}, ["grpo.group_size=5", "name=trial"])
    {'grpo': {'group_size': 5}, 'name': 'trial'}
    >>> apply_overrides({"warmup": {"adapter": "smollm2-135m"}}, ["warmup.adapter=none", "grpo.scale_rewards=none"])
    {'warmup': {}, 'grpo': {'scale_rewards': 'none'}}
    """
    result = copy.deepcopy(data)
    for item in overrides:
        dotted, separator, text = item.partition("=")
        if not separator or not dotted.strip():
            raise ConfigError(f"--set: expected section.key=value, got '{item}'")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        node = result
        *parents, last = dotted.strip().split(".")
        for parent in parents:
            child: Any = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set: '{dotted}': '{parent}' is a value, not a section")
            node = cast(dict[str, Any], child)
        if value == "none" == text.strip() and _may_be_none([*parents, last]):
            node.pop(last, None)
        else:
            node[last] = value
    return result


def _may_be_none(keys: Sequence[str]) -> bool:
    """Whether a run config's key is optional and None when it is absent."""
    kind: Any = RunConfig
    for key in keys:
        fields: Mapping[str, Any] = getattr(kind, "model_fields", {})
        if key not in fields:
            return False
        kind = fields[key].annotation
    return NoneType in get_args(kind)


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run config from a TOML file, or by name from those shipped (`demo`, `phi4`)."""
    # Only a bare name: a wrong path that ends in "demo" must not run the demo instead.
    if not path.exists() and len(path.parts) == 1 and path.suffix == "" and packaged("", f"{path}.toml").exists():
        path = packaged("", f"{path}.toml")
    return parse(RunConfig, apply_overrides(read_toml(path), overrides), str(path))


_sites: dict[tuple[str, bytes], SiteConfig] = {}  # by path and content: a round opens it ten times


def load_site(path: Path) -> SiteConfig:
    """A hospital's site.toml."""
    try:
        key = str(path), path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file: name this hospital's site.toml, or make one with `wardround client init`"
        ) from None
    except OSError:
        return parse(SiteConfig, read_toml(path), str(path))  # which says what is wrong
    if key not in _sites:
        config = parse(SiteConfig, read_toml(path), str(path))
        if len(_sites) >= 64:
            _sites.clear()
        _sites[key] = config
    return _sites[key]


def load_coordinator(path: Path) -> CoordinatorConfig:
    """The coordinator's coordinator.toml."""
    return parse(CoordinatorConfig, read_toml(path), str(path))


def without_none(value: Any) -> Any:
    """TOML has no null: drop keys whose value is None, at any depth."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}  # type: ignore[misc]
    if isinstance(value, list):
        return [without_none(item) for item in value]  # type: ignore[misc]
    return value


def to_toml(config: BaseModel) -> str:
    """The whole resolved config as TOML, defaults included."""
    return tomli_w.dumps(without_none(config.model_dump(mode="json")))
