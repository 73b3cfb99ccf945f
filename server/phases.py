"""One phase: the same instruction to every site, their answers, enough of them or the run stops.

Run by the coordinator. Enters: replies, checked here for kind, run, round and sender. Leaves: instructions. No Flower
and no torch: `Exchange` is what server/app.py implements over a Flower grid.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from ..common.config import RunConfig
from ..common.messages import Instruction, Reply
from .cohort import Cohort
from .tracking import Progress

_CODE = re.compile(r"[a-z-]{1,32}")


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of one instruction to one node: a reply and "", or a code; and the bytes each way."""

    node: int
    reply: Reply | None
    code: str
    bytes_up: int
    bytes_down: int


class Exchange(Protocol):
    """Sends and receives; knows nodes, not sites."""

    def nodes(self) -> list[int]:
        """Nodes that are connected now."""
        ...

    def ask(self, nodes: Sequence[int], instruction: Instruction) -> Iterator[Answer]:
        """Exactly one answer for every node; silence after the deadline is an answer too."""
        ...


@dataclass
class Traffic:
    """Bytes of one or more phases, from the coordinator's view: up is what sites sent."""

    bytes_up: int = 0
    bytes_down: int = 0


Expected = TypeVar("Expected", bound=Reply)


@dataclass(eq=False)
class PhaseResult(Generic[Expected]):
    """A finished phase: replies by site in the order of their names, codes of the others, bytes."""

    replies: dict[str, Expected]
    failures: dict[str, str]
    traffic: Traffic


@dataclass(eq=False)
class Consortium:
    """The sites of one run, asked phase by phase."""

    exchange: Exchange
    config: RunConfig
    run_id: str
    progress: Progress
    cohort: Cohort = field(init=False)

    def __post_init__(self) -> None:
        self.cohort = Cohort(self.config.federation.min_sites)

    def head(self, round_index: int, model_digest: str) -> dict[str, Any]:
        """The fields that every instruction begins with."""
        return {
            "run_id": self.run_id,
            "config": self.config.to_json(),
            "config_digest": self.config.digest(),
            "round_index": round_index,
            "model_digest": model_digest,
        }

    def stream(
        self,
        phase: str,
        nodes: Sequence[int],
        instruction: Instruction,
        expected: type[Expected],
        result: PhaseResult[Expected],
    ) -> Iterator[tuple[int, Expected]]:
        """(node, reply) as they come, one in memory at a time; failures and bytes are noted in `result`."""
        asked = {node: self.cohort.name_of(node) for node in nodes}
        self.progress.begin(phase, instruction.round_index, list(asked.values()))
        for answer in self.exchange.ask(nodes, instruction):
            result.traffic.bytes_up += answer.bytes_up
            result.traffic.bytes_down += answer.bytes_down
            name, reply, code = asked[answer.node], answer.reply, answer.code
            if reply is not None and name.startswith("node "):
                name = reply.site
            if not code:
                code = _misfit(reply, expected, instruction, name)
            if code or not isinstance(reply, expected):
                result.failures[name] = code if _CODE.fullmatch(code) else "failure"
                self.progress.answered(phase, name, result.failures[name])
                continue
            yield answer.node, reply
            self.progress.answered(phase, name, result.failures.get(name, ""))

    def ask(
        self, phase: str, instruction: Instruction, expected: type[Expected], names: Sequence[str] | None = None
    ) -> PhaseResult[Expected]:
        """One phase with the sites `names` (default: all), whole.

        Raises:
            QuorumError: fewer than `federation.min_sites` answered as expected.
        """
        result: PhaseResult[Expected] = PhaseResult({}, {}, Traffic())
        nodes = self.nodes_of(names if names is not None else self.cohort.names, result.failures)
        found = {reply.site: reply for _, reply in self.stream(phase, nodes, instruction, expected, result)}
        result.replies = dict(sorted(found.items()))
        self.cohort.require(phase, len(result.replies), result.failures)
        return result

    def nodes_of(self, names: Sequence[str], failures: dict[str, str]) -> list[int]:
        """The sites' nodes, in the order of their names; sites that never came are noted as absent."""
        known = [name for name in sorted(names) if name in self.cohort.nodes]
        failures.update({name: "absent" for name in names if name not in self.cohort.nodes})
        return [self.cohort.nodes[name] for name in known]


def _misfit(reply: Reply | None, expected: type[Reply], instruction: Instruction, name: str) -> str:
    """ "protocol" for a reply that does not answer this instruction to this site, else ""."""
    fits = (
        isinstance(reply, expected)
        and reply.run_id == instruction.run_id
        and reply.round_index == instruction.round_index
        and reply.site == name
    )
    return "" if fits else "protocol"
