"""Setting sites up: the round-0 adapter and the question schema, to all of them first, to latecomers before each round.

Run by the coordinator at the start of every process, also a resumed one: node ids may have changed, and a site may have
missed something. Enters: who is there. Leaves: the two instructions of round 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..common.errors import ProtocolError
from ..common.global_model import GlobalModel
from ..common.messages import SchemaInstruction, SchemaReply, WarmupInstruction, WarmupReply
from ..common.schema import Schema
from .phases import Consortium, PhaseResult


@dataclass(eq=False)
class RollCall:
    """Who was set up, and with what."""

    consortium: Consortium
    dictionary_digest: str
    prompt_digest: str
    round_zero: GlobalModel
    schema: Schema | None = None

    def everyone(self) -> None:
        """Gives every node the round-0 adapter and learns its name.

        Raises:
            QuorumError: fewer than `federation.min_sites` confirm it.
        """
        result = self._warm_up(self.consortium.exchange.nodes())
        self.consortium.cohort.require("warm-up", len(result.sites), result.failures)

    def publish(self, schema: Schema) -> None:
        """Gives every site the question schema, and latecomers from now on.

        Raises:
            QuorumError: fewer than `federation.min_sites` confirm it.
        """
        self.schema = schema
        result = self._send(schema, self.consortium.cohort.names)
        self.consortium.cohort.require("schema", len(result.sites), result.failures)

    def latecomers(self) -> None:
        """Sets up nodes that came, came back or failed since; nothing is sent when there is none."""
        cohort = self.consortium.cohort
        strangers = [node for node in self.consortium.exchange.nodes() if node not in cohort.nodes.values()]
        if strangers:
            self._warm_up(strangers)
        waiting = [name for name in cohort.names if name not in cohort.ready]
        if waiting and self.schema is not None:
            self._send(self.schema, waiting)

    def _warm_up(self, nodes: Sequence[int]) -> PhaseResult[WarmupReply]:
        consortium, model = self.consortium, self.round_zero
        instruction = WarmupInstruction(
            **consortium.head(0, model.digest),
            manifest=model.manifest.to_json(),
            dictionary_digest=self.dictionary_digest,
            prompt_digest=self.prompt_digest,
            vector=model.full,
        )

        def admit(node: int, reply: WarmupReply) -> None:
            if (reply.model_digest, reply.dictionary_digest) != (model.digest, self.dictionary_digest):
                raise ProtocolError(f"{reply.site}: confirmed another model or dictionary")
            consortium.cohort.admit(reply.site, node, consortium.exchange.nodes())

        return consortium.visit("warm-up", nodes, instruction, WarmupReply, admit)

    def _send(self, schema: Schema, names: Sequence[str]) -> PhaseResult[SchemaReply]:
        consortium = self.consortium
        instruction = SchemaInstruction(**consortium.head(0, self.round_zero.digest), schema=schema.to_json())

        def confirm(_: int, reply: SchemaReply) -> None:
            if reply.schema_digest != schema.digest():
                raise ProtocolError(f"{reply.site}: confirmed another schema")
            consortium.cohort.ready.add(reply.site)

        return consortium.visit("schema", consortium.here(names)[0], instruction, SchemaReply, confirm)
