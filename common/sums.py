"""What each secure sum carries, and what it is bound to (docs/secure-sums.md §S4, §S11).

Used by both roles, so that a site's payload and the coordinator's reading of the sum cannot differ. Pure; holds no
value of a patient.
"""

from __future__ import annotations

import hashlib
import json

from .config import RunConfig
from .fixedpoint import FixedPoint
from .secagg.keys import COUNTS, UPDATE, Binding, domain

REWARD_UNIT = 2**20  # rewards travel as whole numbers of 1 / this
# The first tail values of an update; the histogram of rewards follows, group_size + 1 values.
UPDATE_TAIL = ("weight", "clipped", "steps", "questions", "completions", "reward", "boxed", "completion_tokens")
CLIPPED = UPDATE_TAIL.index("clipped")
COUNTS_TAIL = ("patients",)
VALIDATION_TAIL = ("questions", "correct")


def fixed_point(config: RunConfig) -> FixedPoint:
    """How updates of a run become integers."""
    federation = config.federation
    return FixedPoint(federation.update_range, federation.max_sites, float(federation.weight_limit))


def update_tail(config: RunConfig) -> int:
    """Tail values of an update."""
    return len(UPDATE_TAIL) + config.grpo.group_size + 1


def input_digest(*parts: str) -> bytes:
    """32 bytes for what a payload depends on beside run, config and model: digests, in the order of §S11."""
    return hashlib.sha256(domain("input") + json.dumps(parts).encode()).digest()


def count_limit(config: RunConfig) -> int:
    """The largest count of one site in the 32-bit ring: sums of `max_sites` of them do not wrap."""
    return (2**32 - 1) // config.federation.max_sites


def binding(
    config: RunConfig,
    *,
    run_id: str,
    round_index: int,
    purpose: int,
    attempt: int,
    ring_values: int,
    tail_values: int,
    roster: bytes,
    model_digest: str,
    inputs: bytes,
) -> Binding:
    """The binding of an attempt (§S4).

    Args:
        config: the run's.
        run_id: 32 hexadecimal digits.
        round_index: of the sum.
        purpose: a number of §S1.
        attempt: from 1.
        ring_values: d.
        tail_values: k.
        roster: digest of the roster, 32 bytes.
        model_digest: hexadecimal.
        inputs: as `input_digest` gives.

    Raises:
        SumError: "malformed", a number out of range.
    """
    return Binding(
        run_id=bytes.fromhex(run_id),
        round_index=round_index,
        purpose=purpose,
        attempt=attempt,
        ring_values=ring_values,
        tail_values=tail_values,
        max_sites=config.federation.max_sites,
        range_=config.federation.update_range if purpose == UPDATE else 1.0,
        roster=roster,
        config=bytes.fromhex(config.digest()),
        model=bytes.fromhex(model_digest),
        input=inputs,
    )


def content_digest(purpose: int, model_digest: str, inputs: bytes, *content: bytes | memoryview) -> str:
    """What a site remembers of a payload that it gave to a sum (§S9), hexadecimal.

    Counts do not depend on the model, so theirs is the same in every run over the same registry.
    """
    state = hashlib.sha256(domain("content") + bytes([purpose]))
    state.update(b"" if purpose == COUNTS else bytes.fromhex(model_digest))
    for part in (inputs, *content):
        state.update(part)
    return state.hexdigest()
