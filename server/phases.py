"""One phase: the same instruction to every site, their answers, enough of them or the run stops.

Run by the coordinator. Enters: replies, checked here for kind, run, round and sender. Leaves: instructions. No Flower
and no torch: `Exchange` is what server/app.py implements over a Flower grid.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from ..common.config import NAME, RunConfig
from ..common.errors import LedgerBehindError, ProtocolError, SumError, VerificationError
from ..common.messages import Instruction, Reply
from .cohort import Cohort
from .journal import Journal
from .receipts import Receipts
from .tracking import Progress

_CODE = re.compile(r"[a-z-]{1,32}")
_NAME = re.compile(NAME)


@dataclass(frozen=True, eq=False)
class Answer:
    """What came of one instruction to one node: a reply and "", or a code; the bytes each way; SHA-256 of its head."""

    node: int
    reply: Reply | None
    code: str
    bytes_up: int
    bytes_down: int
    sha256: str = ""


class Exchange(Protocol):
    """Sends and receives; knows nodes, not sites."""

    def nodes(self) -> list[int]:
        """Nodes that are connected now."""
        ...

    def ask(self, instructions: Mapping[int, Instruction]) -> Iterator[Answer]:
        """Exactly one answer for every node, in their order if possible; silence after the deadline is one too."""
        ...


@dataclass
class Traffic:
    """Bytes of one or more phases, from the coordinator's view: up is what sites sent."""

    bytes_up: int = 0
    bytes_down: int = 0


Expected = TypeVar("Expected", bound=Reply)


@dataclass(eq=False)
class PhaseResult(Generic[Expected]):
    """A finished phase.

    Attributes:
        sites: whose reply was taken, sorted.
        failures: the others, with their code.
        traffic: bytes.
        replies: by site, sorted; empty where each was used up as it came.
    """

    sites: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    replies: dict[str, Expected] = field(default_factory=dict)


@dataclass(eq=False)
class Consortium:
    """The sites of one run, asked phase by phase. `receipts`: what is signed for replies; None: nothing is."""

    exchange: Exchange
    config: RunConfig
    journal: Journal
    progress: Progress
    receipts: Receipts | None = None
    cohort: Cohort = field(init=False)

    def __post_init__(self) -> None:
        self.cohort = Cohort(self.config.federation.min_sites)

    def head(self, round_index: int, model_digest: str) -> dict[str, Any]:
        """The fields that every instruction begins with."""
        return {
            "run_id": self.journal.run_id,
            "config": self.config.to_json(),
            "config_digest": self.config.digest(),
            "round_index": round_index,
            "model_digest": model_digest,
        }

    def visit(
        self,
        phase: str,
        nodes: Sequence[int],
        instruction: Instruction | Mapping[int, Instruction],
        expected: type[Expected],
        take: Callable[[int, Expected], object],
        *,
        absent: Collection[str] = (),
    ) -> PhaseResult[Expected]:
        """One instruction to `nodes`; each reply goes to `take` as it comes, so that one is in memory at a time.

        A site fails alone: one that does not answer this instruction, or whose reply `take` refuses, is noted with a
        code and the others go on. Whether they are enough is the caller's question.

        Args:
            phase: its name.
            nodes: who is asked.
            instruction: what; by node where each is asked something else.
            expected: the kind of reply.
            take: called with (node, reply); raises ProtocolError, VerificationError or SumError for one that cannot be
                used.
            absent: sites that should be asked but are not there, noted as failures.
        """
        asked = {node: self.cohort.name_of(node) for node in nodes}
        each = dict.fromkeys(nodes, instruction) if isinstance(instruction, Instruction) else instruction
        round_index = next((one.round_index for one in each.values()), 0)
        self.progress.begin(phase, round_index, list(asked.values()))
        result: PhaseResult[Expected] = PhaseResult(failures=dict.fromkeys(absent, "absent"))
        for answer in self.exchange.ask(self._with_receipts(each, asked)):
            result.traffic.bytes_up += answer.bytes_up
            result.traffic.bytes_down += answer.bytes_down
            name, reply, code = asked[answer.node], answer.reply, answer.code
            if name not in self.cohort.nodes and reply is not None and _NAME.fullmatch(reply.site):
                name = reply.site  # its first words; anything but a name is never shown
            signed = self._sign_for(answer, each[answer.node])
            if not code and isinstance(reply, expected) and _fits(reply, each[answer.node], name):
                try:
                    take(answer.node, reply)
                except (ProtocolError, VerificationError):
                    code = ProtocolError.code
                except SumError as error:
                    code = error.code
            else:
                code = code or ProtocolError.code
            if not signed:  # it was a stranger until now
                self._sign_for(answer, each[answer.node])
            if code:
                # A stranger that claims a known site's name must not make that site look broken.
                name = name if self.cohort.nodes.get(name, answer.node) == answer.node else f"node {answer.node}"
                code = code if _CODE.fullmatch(code) else "failure"
                result.failures[name] = code
            else:
                result.sites.append(name)
            self.progress.answered(phase, name, code)
        result.sites.sort()
        self.journal.add_losses(phase, round_index, result.failures)
        return result

    def _with_receipts(self, each: Mapping[int, Instruction], asked: Mapping[int, str]) -> Mapping[int, Instruction]:
        """The instructions, each with the newest receipt for its site."""
        if self.receipts is None:
            return each
        newest = {node: self.receipts.newest(asked[node]) for node in each}
        return {node: replace(one, receipt=newest[node]) if newest[node] else one for node, one in each.items()}

    def _sign_for(self, answer: Answer, instruction: Instruction) -> bool:
        """Signs for a reply of the node that is known as this site; whether it did.

        Not for a ledger that says it is behind: it would be made whole by saying so. Nor for a stranger with a name.
        """
        reply, asked = answer.reply, (instruction.run_id, instruction.round_index)
        if self.receipts is None or reply is None or not answer.sha256 or answer.code == LedgerBehindError.code:
            return False
        if self.cohort.nodes.get(reply.site) != answer.node or (reply.run_id, reply.round_index) != asked:
            return False
        self.receipts.note(reply.site, reply.round_index, instruction.ROUTE, answer.bytes_up, answer.sha256)
        return True

    def ask(
        self,
        phase: str,
        instruction: Instruction,
        expected: type[Expected],
        check: Callable[[Expected], object] = lambda reply: None,
    ) -> PhaseResult[Expected]:
        """One phase with all sites of the cohort, whole, with their replies.

        Args:
            phase: its name.
            instruction: what is asked.
            expected: the kind of reply.
            check: raises ProtocolError or VerificationError for a reply that cannot be used; its site then failed.

        Raises:
            QuorumError: fewer than `federation.min_sites` answered as expected.
        """
        replies: dict[str, Expected] = {}

        def keep(_: int, reply: Expected) -> None:
            check(reply)
            replies[reply.site] = reply

        nodes, _ = self.here(self.cohort.names)
        result = self.visit(phase, nodes, instruction, expected, keep)
        self.cohort.require(phase, len(result.sites), result.failures)
        result.replies = dict(sorted(replies.items()))
        return result

    def here(self, names: Collection[str]) -> tuple[list[int], list[str]]:
        """The sites' nodes, in the order of their names; and the sites that this process has not seen."""
        known = [name for name in sorted(names) if name in self.cohort.nodes]
        return [self.cohort.nodes[name] for name in known], sorted(set(names) - set(known))


def _fits(reply: Reply, instruction: Instruction, name: str) -> bool:
    """Whether a reply answers this instruction to this site; "node 3" is what we call a stranger, not a name."""
    asked = (instruction.run_id, instruction.round_index, name)
    return (reply.run_id, reply.round_index, reply.site) == asked and _NAME.fullmatch(reply.site) is not None
