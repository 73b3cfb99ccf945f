"""The hospital's own limits (`[policy]` in site.toml), checked before work starts and again before bytes leave.

Run by the site. Enters: the coordinator's config and the reply that is about to leave. Leaves: nothing; it only says
no, by raising `RefusedError`. A coordinator can never loosen a limit: nothing here reads a permission from a message.

Fail closed: what is not on the list of replies does not leave; a demand that is not understood is refused. Without
secure aggregation (`secure_aggregation = "none"`) only a simulated site of a public registry takes part in anything at
all. `min_sites` and `colluders` are enforced where sums are agreed to (common/secagg/client_state.py). Not enforced
here yet: budgets of differential privacy, hours of the day, opted-out patients.
"""

from __future__ import annotations

import json

from ..common.config import PolicyConfig, RunConfig
from ..common.dictionary import Dictionary
from ..common.errors import ConfigError, RefusedError
from ..common.messages import (
    EvaluateReply,
    Failure,
    FinalizeReply,
    Instruction,
    KeysReply,
    MaskedReply,
    Reply,
    SchemaReply,
    SharesReply,
    SurvivorsReply,
    UnmaskReply,
    WarmupReply,
)

NO_SAMPLES = "[]"

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
    policy: PolicyConfig, dictionary: Dictionary, config: RunConfig, instruction: Instruction
) -> None:
    """Refuses an instruction that asks for more than this hospital allows; called before any patient row is read.

    Raises:
        RefusedError: names the limit, what it is and what was asked.
        ConfigError: the policy itself names what the dictionary does not have.
    """
    check_targets(policy, dictionary)
    federation = config.federation
    if federation.secure_aggregation == "none" and not (policy.simulated and dictionary.public):
        raise RefusedError(
            "secure_aggregation = 'none' adds updates and counts up in the clear: only a simulated site "
            f"(policy.simulated, here {policy.simulated}) of a public registry (here {dictionary.public}) does that"
        )
    _at_most("max_rounds", policy.max_rounds, federation.rounds)
    _at_most("max_local_steps", policy.max_local_steps, config.grpo.local_steps)
    if not 0 <= instruction.round_index <= federation.rounds:
        raise RefusedError(f"round {instruction.round_index}: the run's config says rounds 0 to {federation.rounds}")


def check_targets(policy: PolicyConfig, dictionary: Dictionary) -> None:
    """Refuses a policy with a name that is not in the dictionary: it is there to keep a feature from being asked.

    Raises:
        ConfigError: names the first.
    """
    for name in policy.targets_never_asked:
        if name not in dictionary:
            raise ConfigError(f"policy.targets_never_asked: dictionary '{dictionary.name}' has no entry '{name}'")


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
    """The schema's targets without those this hospital never asks.

    Raises:
        RefusedError: none is left.
    """
    left = [name for name in names if name not in policy.targets_never_asked]
    if not left:
        raise RefusedError("policy.targets_never_asked leaves no target to ask")
    return left


def shares_samples(policy: PolicyConfig, dictionary: Dictionary) -> bool:
    """Whether sample questions of test patients may enter the coordinator's report."""
    return policy.share_samples and policy.simulated and dictionary.public


def check_egress(policy: PolicyConfig, dictionary: Dictionary, reply: Reply, size_bytes: int, sent_bytes: int) -> str:
    """The last check before a reply leaves.

    Args:
        policy: this hospital's.
        dictionary: of its registry.
        reply: what is about to leave.
        size_bytes: its encoded size.
        sent_bytes: what left this site before, for any run.

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
    return purpose


def _at_most(name: str, limit: int, asked: int) -> None:
    if asked > limit:
        raise RefusedError(f"policy.{name}: this hospital allows {limit}, the coordinator asks for {asked}")
