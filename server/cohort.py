"""Who takes part: which node is which site, who answered, whether they are enough.

Run by the coordinator. Enters: replies' names and declared numbers of patients. Leaves: nothing; names go into logs and
the run's own files. Node ids are Flower's and may change when a site reconnects; site names do not. A name is what the
site says of itself: binding names to keys is the roster's work, which is not there yet.
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
    """Sites by name, with their node and what they declared; `ready` are those that also hold the question schema."""

    min_sites: int
    nodes: dict[str, int] = field(default_factory=dict)
    patients: dict[str, int] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        """All known sites, sorted."""
        return sorted(self.nodes)

    def admit(self, name: str, node_id: int, patients: int, connected: Collection[int]) -> None:
        """Takes a site in, or notes the new node of a known one that reconnected.

        Args:
            name: what the site calls itself.
            node_id: where it answered from.
            patients: training patients that it declares.
            connected: the nodes that are there now.

        Raises:
            ProtocolError: two nodes that are both there claim one name, or fewer than one patient is declared.
        """
        before = self.nodes.get(name, node_id)
        if before != node_id and before in connected:
            raise ProtocolError(f"site name '{name}': claimed by two nodes")
        if patients < 1:
            raise ProtocolError(f"site '{name}': expected at least 1 training patient, got {patients}")
        self.nodes[name] = node_id
        self.patients[name] = patients
        self.ready.discard(name)

    def name_of(self, node_id: int) -> str:
        """A node's site name, or what can be said of it before it gave one."""
        return next((name for name, node in self.nodes.items() if node == node_id), f"node {node_id}")

    def require(self, phase: str, answered: int, failures: dict[str, str]) -> None:
        """Ends the run when too few sites finished a phase.

        Raises:
            QuorumError: names the phase and every site that failed, with its code.
        """
        if answered >= self.min_sites:
            return
        lost = ", ".join(f"{site} ({code})" for site, code in sorted(failures.items())) or "none failed"
        raise QuorumError(
            f"{phase}: expected at least {self.min_sites} sites (federation.min_sites), {answered} finished; {lost}. "
            "Each site's own state/site.log says why; --resume continues the run"
        )
