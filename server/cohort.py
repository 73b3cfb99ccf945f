"""Who takes part: which node is which site, who answered, whether they are enough.

Run by the coordinator. Enters: replies' names and declared numbers of patients. Leaves: nothing; names go into logs and
the run's own files. Node ids are Flower's and may change when a site reconnects; site names do not. A name is what the
site says of itself: binding names to keys is the roster's work, which is not there yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..common.errors import ProtocolError, WardroundError


class QuorumError(WardroundError):
    """Fewer sites than `federation.min_sites` finished a phase; the run stops here and can be resumed."""

    code = "quorum"


@dataclass
class Cohort:
    """Sites by name, in the order of their names, with their node and what they declared."""

    min_sites: int
    nodes: dict[str, int] = field(default_factory=dict)
    patients: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All known sites, sorted: the order in which updates are added up."""
        return sorted(self.nodes)

    def admit(self, name: str, node_id: int, patients: int) -> None:
        """Takes a site in, or notes the new node of a known one.

        Raises:
            ProtocolError: two nodes claim one name, or fewer than one patient is declared.
        """
        if self.nodes.get(name, node_id) != node_id:
            raise ProtocolError(f"site name '{name}': claimed by two nodes")
        if patients < 1:
            raise ProtocolError(f"site '{name}': expected at least 1 training patient, got {patients}")
        self.nodes[name] = node_id
        self.patients[name] = patients

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
