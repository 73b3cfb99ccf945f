"""Who takes part: which node is which site, who answered, whether they are enough.

Run by the coordinator. Enters: replies' names. Leaves: nothing; names go into logs and the run's own files. Node ids
are Flower's and may change when a site reconnects; site names do not. A name is what the site says of itself; in every
secure sum it must be the roster's name of the key that signs (server/aggregation.py).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ..common.errors import ProtocolError, WardroundError


class QuorumError(WardroundError):
    """Fewer sites than `federation.min_sites` finished a phase; the run stops here and can be resumed."""

    code = "quorum"


@dataclass
class Cohort:
    """Sites by name, with their node; `ready` are those that also hold the question schema."""

    min_sites: int
    nodes: dict[str, int] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """All known sites, sorted."""
        return sorted(self.nodes)

    def admit(self, name: str, node_id: int, connected: Collection[int]) -> None:
        """Takes a site in, or notes the new node of a known one that reconnected.

        Args:
            name: what the site calls itself.
            node_id: where it answered from.
            connected: the nodes that are there now.

        Raises:
            ProtocolError: two nodes that are both there claim one name.
        """
        before = self.nodes.get(name, node_id)
        if before != node_id and before in connected:
            raise ProtocolError(f"site name '{name}': claimed by two nodes")
        self.nodes[name] = node_id
        self.ready.discard(name)

    def name_of(self, node_id: int) -> str:
        """A node's site name, or what can be said of it before it gave one."""
        return next((name for name, node in self.nodes.items() if node == node_id), f"node {node_id}")

    def require(self, phase: str, answered: int, failures: dict[str, str]) -> None:
        """Ends the run when too few sites finished a phase.

        Raises:
            QuorumError: names the phase and every site that failed, with its code.
        """
        if answered < self.min_sites:
            raise QuorumError(self.shortage(phase, failures, answered))

    def shortage(self, phase: str, failures: dict[str, str], answered: int | None = None) -> str:
        """Why a run stops: the phase, how many finished where that is known, and every site that failed."""
        lost = ", ".join(f"{site} ({code})" for site, code in sorted(failures.items())) or "no other was connected"
        finished = "fewer finished" if answered is None else f"{answered} finished"
        return (
            f"{phase}: expected at least {self.min_sites} sites (federation.min_sites), {finished}; {lost}. "
            "Each site's own state/site.log says why; --resume continues the run"
        )
