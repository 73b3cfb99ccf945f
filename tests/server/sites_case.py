"""Sites that answer every phase but training from one small registry, and that can be told to misbehave."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from wardround.client.registry import to_registry
from wardround.common.adapter import Manifest, TensorSpec
from wardround.common.counts import Counts, count
from wardround.common.global_model import GlobalModel
from wardround.common.messages import (
    CountInstruction,
    CountReply,
    EvaluateInstruction,
    EvaluateReply,
    Failure,
    FinalizeInstruction,
    FinalizeReply,
    Instruction,
    Reply,
    SchemaInstruction,
    SchemaReply,
    WarmupInstruction,
    WarmupReply,
)
from wardround.common.schema import Schema
from wardround.common.statistics import CHANCE_UNIT, Tally
from wardround.server.evaluate import MODELS
from wardround.server.phases import Answer
from wardround.simulations.synthetic_registry import make

SPECS = (TensorSpec("a", (2,), False), TensorSpec("b", (3,), True))
ROUND_ZERO = GlobalModel(Manifest(SPECS, "base", "ffa"), np.array([1, 2, 0, 0, 0], np.float32))
TABLE, DICTIONARY = make(200, seed=2)
REGISTRY = to_registry("synthetic", pa.Table.from_pandas(TABLE, preserve_index=False), DICTIONARY)
COUNTS: Counts = count(REGISTRY.values, DICTIONARY)

Twist = Callable[[Any], Reply]  # what a site makes of its right reply


def failing(code: str) -> Twist:
    """A reply that says only that it failed."""
    return lambda reply: Failure(run_id=reply.run_id, site=reply.site, round_index=reply.round_index, code=code)


def changed(**fields: Any) -> Twist:
    """The right reply with other fields."""
    return lambda reply: replace(reply, **fields)


@dataclass
class Sites:
    """Node → name; `twists` by (name, phase's instruction); every question and its asker are remembered."""

    names: dict[int, str] = field(default_factory=lambda: {2: "site-01", 3: "site-02", 4: "site-03"})
    twists: dict[tuple[str, str], Twist] = field(default_factory=dict)
    away: set[str] = field(default_factory=set)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def nodes(self) -> list[int]:
        return [node for node, name in self.names.items() if name not in self.away]

    def ask(self, nodes: Sequence[int], instruction: Instruction) -> Iterator[Answer]:
        for node in nodes:
            site, kind = self.names.get(node, "?"), type(instruction).__name__.removesuffix("Instruction")
            self.asked.append((site, kind))
            if site in self.away or site == "?":
                yield Answer(node, None, "silent", 0, 7)
                continue
            reply = self.twists.get((site, kind), lambda reply: reply)(self.reply(site, instruction))
            yield Answer(node, reply, reply.code if isinstance(reply, Failure) else "", 5, 7)

    def reply(self, site: str, instruction: Instruction) -> Reply:
        head = {"run_id": instruction.run_id, "site": site, "round_index": instruction.round_index}
        if isinstance(instruction, WarmupInstruction):
            digests = {"model_digest": ROUND_ZERO.digest, "dictionary_digest": DICTIONARY.digest()}
            return WarmupReply(**head, **digests, patients=100)
        if isinstance(instruction, CountInstruction):
            return CountReply(**head, counts=COUNTS.to_vector())
        if isinstance(instruction, SchemaInstruction):
            return SchemaReply(**head, schema_digest=Schema.from_json(instruction.schema).digest())
        if isinstance(instruction, FinalizeInstruction):
            return FinalizeReply(**head, model_digest=instruction.model_digest)
        assert isinstance(instruction, EvaluateInstruction)
        return EvaluateReply(**head, samples="[]", tally=self.tally().to_vector())

    def tally(self) -> Tally:
        result = Tally.empty(self.targets, MODELS)
        result.patterns[0, [0, 8]] = [6, 4]  # ten questions; the final model has four right
        result.chance[0] = 10 * CHANCE_UNIT // 5
        return result

    targets: tuple[str, ...] = ()
