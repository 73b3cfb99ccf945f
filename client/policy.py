"""The hospital's own limits (`[policy]` in site.toml), checked before work starts and again before bytes leave.

Run by the site. Enters: the coordinator's config and the reply that is about to leave. Leaves: nothing; it only says
no, by raising `RefusedError`. A coordinator can never loosen a limit: nothing here reads a permission from a message.
client/policy_words.py says the limits in sentences.

Fail closed: what is not on the list of replies does not leave; a demand that is not understood is refused. Without
secure aggregation (`secure_aggregation = "none"`) only a simulated site of a public registry takes part in anything at
all, and only such a site takes part in a run without differential privacy, or in one with it and no budget of its own,
unless site.toml says `require_privacy = false`. `min_sites` and `colluders` are enforced where sums are agreed to
(common/secagg/client_state.py), `opt_out` where the registry is read (client/opt_out.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, time
from typing import TYPE_CHECKING

from ..common.config import TASKS, PolicyConfig, PrivacyConfig, RunConfig
from ..common.dictionary import Dictionary
from ..common.errors import ConfigError, RefusedError
from ..common.messages import (
    CountInstruction,
    EvaluateInstruction,
    EvaluateReply,
    Failure,
    FinalizeReply,
    Instruction,
    KeysReply,
    MaskedReply,
    Reply,
    SchemaReply,
    SharesReply,
    SumInstruction,
    SurvivorsReply,
    TrainInstruction,
    UnmaskReply,
    ValidateInstruction,
    WarmupReply,
)
from ..common.schema import Schema
from ..common.secagg.keys import COUNTS, TEST, UPDATE, VALIDATION

if TYPE_CHECKING:
    from ..common.privacy import Event
    from .ledger import Spend

NO_SAMPLES = "[]"
MOST_DELTA = 0.1  # δ times patients: a δ of one in the number of patients would allow giving one away whole

# What an instruction does with patients, in the policy's words; the exchanges of a sum by what is added up.
TASK_OF: Mapping[type[Instruction], str] = {
    CountInstruction: "counts",
    TrainInstruction: "train",
    ValidateInstruction: "validate",
    EvaluateInstruction: "test",
}
_TASK_OF_SUM = {COUNTS: "counts", UPDATE: "train", VALIDATION: "validate", TEST: "test"}
assert set(TASK_OF.values()) == set(_TASK_OF_SUM.values()) == set(TASKS)

# What each reply is for, as the ledger says it. A reply that is not here does not leave.
PURPOSE: dict[type[Reply], str] = {
    WarmupReply: "confirm the round-0 adapter",
    KeysReply: "public keys for a secure sum",
    SchemaReply: "confirm the question schema",
    EvaluateReply: "public keys for the secure sum of test results; samples of open registries only",
    SharesReply: "shares of this site's keys for a secure sum, encrypted to the other sites",
    MaskedReply: "a vector under masks: only the sum of a quorum can be read",
    SurvivorsReply: "signature over who is in a secure sum",
    UnmaskReply: "shares that unmask the sum of those who signed",
    FinalizeReply: "confirm the final adapter",
    Failure: "an error code",
}


def check_instruction(
    policy: PolicyConfig,
    dictionary: Dictionary,
    config: RunConfig,
    instruction: Instruction,
    now: datetime | None = None,
) -> None:
    """Refuses an instruction that asks for more than this hospital allows; called before any patient row is read.

    Args:
        policy: this hospital's.
        dictionary: of its registry.
        config: the run's, whose digest was checked.
        instruction: what is asked.
        now: this machine's local time; None: as its clock says.

    Raises:
        RefusedError: names the limit, what it is and what was asked.
        ConfigError: the policy itself names what the dictionary does not have.
    """
    check_targets(policy, dictionary)
    federation = config.federation
    if federation.secure_aggregation == "none" and not _open(policy, dictionary):
        raise RefusedError(
            "secure_aggregation = 'none' adds updates and counts up in the clear: only a simulated site "
            f"(policy.simulated, here {policy.simulated}) of a public registry (here {dictionary.public}) does that"
        )
    _at_most("max_rounds", policy.max_rounds, federation.rounds)
    _at_most("max_local_steps", policy.max_local_steps, config.grpo.local_steps)
    asked = config.evaluation.questions_per_site
    if asked < policy.min_test_patients:  # said at the start: after all rounds it would leave the run without a result
        raise RefusedError(
            f"policy.min_test_patients: this hospital allows {policy.min_test_patients} or more, the coordinator asks "
            f"for {asked} (evaluation.questions_per_site)"
        )
    if not 0 <= instruction.round_index <= federation.rounds:
        raise RefusedError(f"round {instruction.round_index}: the run's config says rounds 0 to {federation.rounds}")
    check_privacy(policy, dictionary, config.privacy)
    of_sum = isinstance(instruction, SumInstruction)
    task = _TASK_OF_SUM.get(instruction.purpose) if of_sum else TASK_OF.get(type(instruction))
    if task is not None and task not in policy.tasks:
        allowed = ", ".join(map(repr, policy.tasks)) or "none"
        raise RefusedError(f"policy.tasks: this hospital allows {allowed}, the coordinator asks for '{task}'")
    if not of_sum:
        check_hours(policy, now or local_time())


def local_time() -> datetime:
    """This machine's clock, in its time zone."""
    return datetime.now()


def _open(policy: PolicyConfig, dictionary: Dictionary) -> bool:
    """A simulated site of a public registry: nobody's secret is at stake."""
    return policy.simulated and dictionary.public


def requires_privacy(policy: PolicyConfig, *, open_site: bool) -> bool:
    """Whether runs without differential privacy are refused: always, but where a person or a simulation says other."""
    if policy.require_privacy is not None:
        return policy.require_privacy
    limits = (policy.epsilon, policy.delta, policy.min_noise_multiplier, policy.max_grad_norm)
    return not open_site or any(limit is not None for limit in limits)


def check_privacy(policy: PolicyConfig, dictionary: Dictionary, asked: PrivacyConfig) -> None:
    """Refuses a run's `[privacy]` that is weaker than this hospital's limits.

    Raises:
        RefusedError: names the limit, what it is and what was asked.
    """
    open_site = _open(policy, dictionary)
    required = requires_privacy(policy, open_site=open_site)
    if not asked.enabled:
        if required:
            raise RefusedError(
                "policy.require_privacy: this hospital allows runs with differential privacy only, the coordinator "
                "asks for [privacy] enabled = false"
            )
        return
    epsilon, delta, bound, patients = asked.epsilon, asked.delta, asked.max_grad_norm, asked.declared_patients
    if epsilon is None or delta is None or bound is None or patients is None:
        raise RefusedError("privacy: expected epsilon, delta, max_grad_norm and declared_patients, one is missing")
    if policy.epsilon is None and not open_site and policy.require_privacy is not False:
        raise RefusedError(
            f"policy.epsilon: not set, so this hospital allows nothing, the coordinator asks for {epsilon}: "
            "set epsilon and delta in site.toml"
        )
    _at_most("epsilon_per_run", policy.epsilon_per_run, epsilon)
    _at_most("delta", policy.delta, delta)
    _at_most("max_grad_norm", policy.max_grad_norm, bound)
    for name in ("noise_multiplier", "schema_noise_multiplier", "metrics_noise_multiplier"):
        value: float | None = getattr(asked, name)
        if value is not None:  # else it follows from epsilon, and `check_spend` sees it
            _at_least("min_noise_multiplier", policy.min_noise_multiplier, value, f"{name} = ")
    _check_delta("the run's delta", delta, patients, "declared_patients")
    if policy.delta is not None:
        _check_delta("policy.delta", policy.delta, patients, "declared_patients")


def _check_delta(name: str, delta: float, patients: int, what: str) -> None:
    if delta * patients > MOST_DELTA * (1 + 1e-9):
        raise RefusedError(
            f"{name} = {delta}: this hospital allows at most 1 / (10 · {what}) = {MOST_DELTA / patients:.3g}, with "
            f"{what} = {patients}"
        )


def check_hours(policy: PolicyConfig, now: datetime) -> None:
    """Refuses to begin work outside the hours that this hospital allows; the end is outside.

    Raises:
        RefusedError: names the hours and the time.
    """
    if policy.hours is None:
        return
    begin, end = (time.fromisoformat(text) for text in policy.hours.split("-"))
    at = now.time()
    if not (begin <= at < end if begin < end else at >= begin or at < end):
        raise RefusedError(f"policy.hours: this hospital allows {policy.hours}, the coordinator asks at {at:%H:%M}")


def check_targets(policy: PolicyConfig, dictionary: Dictionary) -> None:
    """Refuses a policy with a name that is not in the dictionary: it is there to keep a feature from being asked.

    Raises:
        ConfigError: names the first.
    """
    for key, names in (
        ("targets_never_asked", policy.targets_never_asked),
        ("targets_allowed", policy.targets_allowed),
    ):
        for name in names:
            if name not in dictionary:
                raise ConfigError(f"policy.{key}: dictionary '{dictionary.name}' has no entry '{name}'")


def check_patients(policy: PolicyConfig, privacy: PrivacyConfig, patients: int) -> None:
    """Refuses work on fewer training patients than this hospital allows, or on too many for the run's δ.

    Args:
        policy: this hospital's.
        privacy: the run's.
        patients: training patients here, without those who opted out.

    Raises:
        RefusedError: names the limit. The text stays here; the number of patients is in it.
    """
    if patients < policy.min_training_patients:
        raise RefusedError(
            f"policy.min_training_patients: this hospital allows {policy.min_training_patients} or more, there are "
            f"{patients}"
        )
    if privacy.enabled and privacy.delta is not None:
        _check_delta("the run's delta", privacy.delta, patients, "training patients here")


def enough_test_patients(policy: PolicyConfig, asked: int) -> bool:
    """Whether the answers of `asked` patients, one question each, may be added to a sum of test results.

    Where they may not, the hospital adds zeros, which nobody sees. It counts who was asked, not who there is: how many
    are asked is the coordinator's wish.
    """
    return asked >= policy.min_test_patients


def check_test_patients(policy: PolicyConfig, patients: int) -> None:
    """Refuses to take part in a private run's test with fewer patients than this hospital allows.

    Zeros would not do there: with one patient more they would all become counts, which the noise is not made for.

    Raises:
        RefusedError: names the limit. The text stays here; the number of patients is in it.
    """
    if not enough_test_patients(policy, patients):
        raise RefusedError(
            f"policy.min_test_patients: this hospital allows {policy.min_test_patients} or more, there are {patients}"
        )


def check_schema(policy: PolicyConfig, schema: Schema) -> None:
    """Refuses a question schema that shows a level of too few patients of all hospitals together.

    A schema has the share of each level among known values, and the number of rows. Rows times share is the most that
    a level can have; where values are missing, or patients have several rows, it has fewer patients than that. So a
    level is refused here only if it certainly has too few.

    Raises:
        RefusedError: names the feature, never the level.
    """
    least = policy.min_level_patients
    for target in schema.targets:
        shown = [share for share in target.frequencies if share > 0]
        if shown and min(shown) * schema.rows < least - 0.5:
            raise RefusedError(
                f"policy.min_level_patients: this hospital allows {least} or more, the schema shows a level of "
                f"'{target.name}' with about {min(shown) * schema.rows:.0f}"
            )


def check_spend(
    policy: PolicyConfig,
    history: Sequence[Spend],
    event: Event,
    *,
    run_id: str,
    plan: Sequence[Event],
    privacy: PrivacyConfig,
) -> dict[str, float]:
    """Refuses an event that this hospital's budget does not afford; `Ledger.spend` calls it under its lock.

    Each budget has a Rényi filter (common/privacy.py's `Filter`), whose order is fixed before the first event that it
    counts and recorded with it: in all runs "total", in this one "run". The third, "plan", is what the run itself says
    of its ε: a coordinator that asks for more counts or rounds than it planned is refused by every site.

    Args:
        policy: this hospital's.
        history: every event that was spent, of all runs.
        event: what is asked for.
        run_id: the run's.
        plan: all events of the run as it is planned, public numbers: it decides the order of a filter that has none.
        privacy: the run's.

    Returns:
        Orders that were fixed now, by filter.

    Raises:
        RefusedError: names the budget, what is spent and what was asked.
    """
    from ..common.privacy import Event, Filter, pin_order

    _at_least("min_noise_multiplier", policy.min_noise_multiplier, event.noise_multiplier, f"{event.kind}: σ = ")
    fixed: dict[str, float] = {}
    delta = policy.delta if policy.delta is not None else privacy.delta
    mine = [one for one in history if one.run == run_id]
    for name, key, limit, at, spent in (
        ("total", "policy.epsilon: this hospital allows", policy.epsilon, delta, list(history)),
        ("run", "policy.epsilon_per_run: this hospital allows", policy.epsilon_per_run, delta, mine),
        ("plan", "privacy.epsilon: the run says", privacy.epsilon, privacy.delta, mine),
    ):
        wanted = privacy.epsilon if limit is None else limit  # without a limit the order is fixed all the same
        known = [one.orders[name] for one in spent if name in one.orders]
        if wanted is None or at is None:
            raise RefusedError("privacy: expected epsilon and delta")
        try:
            order = known[0] if known else pin_order(plan, wanted, at)
            budget = Filter(wanted, at, order)
            before = [Event.from_json(one.event) for one in spent]
            affordable = limit is None or budget.affords(before, event)
        except ConfigError as error:
            raise RefusedError(f"{key.partition(':')[0]}: {error}") from None
        if not affordable:
            raise RefusedError(
                f"{key} {limit:g} at delta = {at:g}; spent {budget.spent(before):.3g}, "
                f"and with '{event.kind}' (σ = {event.noise_multiplier:g}, rate {event.sample_rate:.3g}, {event.steps} "
                f"steps), which the coordinator asks for, it would be {budget.spent([*before, event]):.3g}"
            )
        if not known:
            fixed[name] = order
    return fixed


def check_runs(policy: PolicyConfig, runs: int) -> None:
    """Refuses a run that this hospital has not taken part in yet, when it would be one too many.

    Args:
        policy: this hospital's.
        runs: how many it has taken part in, with the new one.

    Raises:
        RefusedError: more than `max_runs`.
    """
    _at_most("max_runs", policy.max_runs, runs)


def check_model(policy: PolicyConfig, base_digest: str) -> None:
    """Refuses a base model that this hospital did not allow; an empty list allows any.

    Raises:
        RefusedError: the base model's digest is not on the list.
    """
    if policy.allowed_models and base_digest not in policy.allowed_models:
        raise RefusedError(f"base model {base_digest[:12]}… is not among policy.allowed_models")


def allowed_targets(policy: PolicyConfig, names: tuple[str, ...]) -> list[str]:
    """The schema's targets that this hospital allows, without those it never asks.

    Raises:
        RefusedError: none is left.
    """
    only = policy.targets_allowed or names
    left = [name for name in names if name in only and name not in policy.targets_never_asked]
    if not left:
        raise RefusedError("policy.targets_allowed and targets_never_asked leave no target to ask")
    return left


def shares_samples(policy: PolicyConfig, dictionary: Dictionary) -> bool:
    """Whether sample questions of test patients may enter the coordinator's report."""
    return policy.share_samples and _open(policy, dictionary)


def check_egress(
    policy: PolicyConfig,
    dictionary: Dictionary,
    reply: Reply,
    size_bytes: int,
    sent_bytes: int,
    sent_in_run: int = 0,
) -> str:
    """The last check before a reply leaves.

    Args:
        policy: this hospital's.
        dictionary: of its registry.
        reply: what is about to leave.
        size_bytes: its encoded size.
        sent_bytes: what left this site before, for any run.
        sent_in_run: what left it before, for this run.

    Returns:
        The purpose that the ledger records.

    Raises:
        RefusedError: a kind of reply that is not allowed out, samples of patients, or too many bytes.
    """
    purpose = PURPOSE.get(type(reply))
    if purpose is None:
        raise RefusedError(f"a {type(reply).__name__} is not among the replies that may leave")
    if isinstance(reply, EvaluateReply) and not shares_samples(policy, dictionary) and reply.samples != NO_SAMPLES:
        raise RefusedError(f"sample questions do not leave: expected samples {json.dumps(NO_SAMPLES)}, got some")
    _at_most("max_upload_bytes", policy.max_upload_bytes, sent_bytes + size_bytes)
    _at_most("max_bytes_per_run", policy.max_bytes_per_run, sent_in_run + size_bytes)
    return purpose


def _at_most(name: str, limit: float | None, asked: float) -> None:
    if limit is not None and asked > limit:
        raise RefusedError(f"policy.{name}: this hospital allows {limit}, the coordinator asks for {asked}")


def _at_least(name: str, limit: float | None, asked: float, what: str) -> None:
    if limit is not None and asked < limit:
        raise RefusedError(
            f"policy.{name}: this hospital allows {limit} or more, the coordinator asks for {what}{asked}"
        )
