"""Secure sums at the coordinator: five exchanges with the sites, and one sum that a quorum agreed to.

Run by the coordinator, called by server/run.py and server/rounds.py. Enters: adverts, sealed shares, masked vectors,
signatures, shares. Leaves: instructions; the sum. Nothing of one site can be read here: a masked vector is uniform by
itself. One sum is in memory, however many sites. Steps of docs/secure-sums.md §S5–§S9; the states are those of
common/secagg/server_state.py.

A site that fails an exchange is left out of the rest of the attempt. Too few before anybody was asked to sign: the sum
is tried again, with fresh keys and the same work, which the sites kept. After that only the same sites can finish it,
so what they need is in the journal before they are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..common import sums
from ..common.errors import ConfigError, ProtocolError, SumError
from ..common.messages import (
    EvaluateReply,
    Instruction,
    KeysReply,
    MaskedReply,
    MaskInstruction,
    Reply,
    SharesInstruction,
    SharesReply,
    SurvivorsInstruction,
    SurvivorsReply,
    UnmaskInstruction,
    UnmaskReply,
)
from ..common.roster import Roster
from ..common.secagg.keys import MIN_MEMBERS, Binding, smallest_threshold
from ..common.secagg.server_state import Attempt
from .cohort import QuorumError
from .phases import Consortium, Expected, Traffic

ATTEMPTS = 3  # of one sum in a row, before the run stops and waits to be resumed


@dataclass(frozen=True, eq=False)
class Work:
    """What is summed.

    Attributes:
        phase: what people call it.
        name: the journal's name of it.
        purpose: a number of secure-sums.md §S1.
        instruction: for an attempt, the instruction that makes sites do the work and answer with their keys.
        ring_values: d.
        tail_values: k.
        inputs: `sums.input_digest` of what the work depends on.
        take: given each first reply; raises ProtocolError for one that cannot be used.
    """

    phase: str
    name: str
    purpose: int
    instruction: Callable[[int], Instruction]
    ring_values: int
    tail_values: int
    inputs: bytes
    take: Callable[[Reply], object] = lambda reply: None


@dataclass(eq=False)
class Total:
    """A finished sum.

    Attributes:
        ring: uint32 (d,), modulo 2^32.
        tail: int64 (k,).
        sites: whose payloads are in it, sorted.
        failures: sites that are not, with their code.
        misfits: pairs of sites (who dealt, who answered) whose share did not fit: one of the two lied.
        traffic: bytes of all exchanges.
    """

    ring: NDArray[np.uint32]
    tail: NDArray[np.int64]
    sites: list[str]
    failures: dict[str, str] = field(default_factory=dict)
    misfits: list[list[str]] = field(default_factory=list)
    traffic: Traffic = field(default_factory=Traffic)


class LostSumError(SumError):
    """Survivors were asked to sign, and too few of them finished: this sum can no longer be had."""


class Sums(Protocol):
    """Adds up what sites made; the coordinator's only way to anything that says something of patients."""

    def total(self, work: Work) -> Total:
        """The sum over a quorum.

        Raises:
            QuorumError: too few sites; resume tries again.
            LostSumError: too few finished after survivors were fixed.
        """
        ...

    def forget(self, name: str) -> None:
        """Removes what was kept for resuming a sum, once its result is in the journal."""
        ...


@dataclass(eq=False)
class SecureSums:
    """Sums by secure aggregation (Bonawitz et al. 2017).

    Attributes:
        consortium: the sites.
        roster: their ids.
    """

    consortium: Consortium
    roster: Roster

    def total(self, work: Work) -> Total:
        """As `Sums.total`."""
        journal, name = self.consortium.journal, f"{work.name}-sum"
        failures: dict[str, str] = {}
        traffic = Traffic()
        attempt = self._closed(name)
        for _ in range(ATTEMPTS):
            if attempt is not None:
                break
            attempt = self._masked_sum(work, self._next_attempt(work), failures, traffic)
        if attempt is None:
            raise QuorumError(self.consortium.cohort.shortage(work.phase, failures))
        if not journal.has(name):
            journal.write(name, *attempt.to_record())
        return self._unmasked(work, attempt, failures, traffic)

    def forget(self, name: str) -> None:
        """As `Sums.forget`."""
        for part in ("sum", "signed", "attempt"):
            self.consortium.journal.drop(f"{name}-{part}")

    def _closed(self, name: str) -> Attempt | None:
        """The attempt whose survivors were fixed before a restart."""
        journal = self.consortium.journal
        if not journal.has(name):
            return None
        record = journal.read(name)
        return Attempt.from_record(record.values, record.vectors)

    def _next_attempt(self, work: Work) -> int:
        """Counts an attempt before sites hear of it: none is used twice, also after a kill."""
        values = self._attempts(work)
        values["attempt"] += 1
        self.consortium.journal.write(f"{work.name}-attempt", values)
        return values["attempt"]

    def _attempts(self, work: Work) -> dict[str, Any]:
        """The newest attempt, and thresholds and key lists of those that got to masked vectors."""
        journal, name = self.consortium.journal, f"{work.name}-attempt"
        return dict(journal.read(name).values) if journal.has(name) else {"attempt": 0, "given": []}

    def _threshold(self, work: Work, ids: Collection[bytes]) -> int | None:
        """The smallest t that sites accept: §S3's for this key list, and towards every list they gave vectors under."""
        colluders = self.consortium.config.federation.colluders
        least = smallest_threshold(len(ids), colluders)
        if least is None:
            return None
        for before, listed in self._attempts(work)["given"]:
            least = max(least, len({*ids} | {bytes.fromhex(site) for site in listed}) + colluders - before + 1)
        return least if least <= len(ids) else None

    def _masked_sum(self, work: Work, number: int, failures: dict[str, str], traffic: Traffic) -> Attempt | None:
        """Exchanges 1 to 3; None when too few sites finished them."""
        consortium, instruction = self.consortium, work.instruction(number)
        attempt = Attempt(self._binding(work, number, instruction))
        failures.clear()

        def keys(_: int, reply: Reply) -> None:
            if not isinstance(reply, KeysReply | EvaluateReply):
                raise ProtocolError(f"{reply.site}: expected keys")
            work.take(reply)
            attempt.add_advert(self._id(reply.site), reply.advert.tobytes())

        names, most = consortium.cohort.names, consortium.config.federation.max_sites
        if len(names) > most:
            raise ConfigError(f"{len(names)} sites are connected: expected at most federation.max_sites = {most}")
        self._exchange(work.phase, dict.fromkeys(names, instruction), Reply, keys, failures, traffic)
        n = len(attempt.adverts)
        threshold = self._threshold(work, attempt.adverts) if n else None
        if n < max(MIN_MEMBERS, consortium.config.federation.min_sites) or threshold is None:
            return None
        listed = attempt.close_keys(threshold)
        try:
            head = self._head(work, number, instruction)
            asked = SharesInstruction(**head, threshold=threshold, key_list=_array(listed.to_bytes()))
            self._exchange(
                f"{work.phase}: shares",
                {self._name(site): asked for site in listed.ids},
                SharesReply,
                lambda _, reply: attempt.add_shares(self._id(reply.site), reply.ciphertexts.tobytes()),
                failures,
                traffic,
            )
            recipients = _array(attempt.close_shares())
            values = self._attempts(work)
            values["given"].append([threshold, [site.hex() for site in listed.ids]])
            consortium.journal.write(f"{work.name}-attempt", values)
            self._exchange(
                f"{work.phase}: masked",
                {
                    self._name(site): MaskInstruction(
                        **head, recipients=recipients, ciphertexts=_array(attempt.ciphertexts_for(site))
                    )
                    for site in attempt.recipients
                },
                MaskedReply,
                lambda _, reply: attempt.add_masked(self._id(reply.site), reply.masked),
                failures,
                traffic,
            )
            attempt.close_sum()
        except SumError:  # fewer than t: the failures say who
            return None
        # Sites that sign go by the largest wish of a recipient: with fewer nobody would, and the sum would be lost.
        wished = max(attempt.adverts[site].min_survivors for site in attempt.recipients)
        return attempt if len(attempt.survivors) >= max(wished, consortium.config.federation.min_sites) else None

    def _unmasked(self, work: Work, attempt: Attempt, failures: dict[str, str], traffic: Traffic) -> Total:
        """Exchanges 4 and 5."""
        number = attempt.binding.attempt
        head = self._head(work, number, work.instruction(number))
        names = [self._name(site) for site in attempt.survivors]
        journal, signed = self.consortium.journal, f"{work.name}-signed"
        try:
            if not journal.has(signed):
                asked = SurvivorsInstruction(**head, survivors=_array(attempt.close_sum()))
                self._exchange(
                    f"{work.phase}: consistency",
                    dict.fromkeys(names, asked),
                    SurvivorsReply,
                    lambda _, reply: attempt.add_signature(self._id(reply.site), reply.signature.tobytes()),
                    failures,
                    traffic,
                )
                # Sites answer one set of signatures: after a restart it must be the same one.
                signers, signatures = attempt.close_signatures()
                journal.write(signed, {"signers": signers.hex(), "signatures": signatures.hex()})
            values = journal.read(signed).values
            signers, signatures = (bytes.fromhex(values[key]) for key in ("signers", "signatures"))
            self._exchange(
                f"{work.phase}: unmask",
                dict.fromkeys(names, UnmaskInstruction(**head, signers=_array(signers), signatures=_array(signatures))),
                UnmaskReply,
                lambda _, reply: attempt.add_answer(self._id(reply.site), reply.answer.tobytes()),
                failures,
                traffic,
            )
            ring, tail = attempt.unmask()
        except SumError as error:
            raise LostSumError(
                error.code, f"{work.phase}: {error}; " + ", ".join(map(" ".join, failures.items()))
            ) from None
        if tail.size and int(tail.max()) >= 2**63:
            raise ProtocolError(f"{work.phase}: a sum of counts is out of range")
        # A survivor that fell silent later is in the sum all the same.
        outside = {site: code for site, code in failures.items() if site not in names}
        misfits = [[self._name(site) for site in pair] for pair in attempt.misfits]
        return Total(ring, tail.astype(np.int64), sorted(names), outside, misfits, traffic)

    def _exchange(
        self,
        phase: str,
        asked: Mapping[str, Instruction],
        expected: type[Expected],
        take: Callable[[int, Expected], object],
        failures: dict[str, str],
        traffic: Traffic,
    ) -> None:
        """One exchange with the sites named."""
        consortium = self.consortium
        nodes, absent = consortium.here(asked)
        each = {consortium.cohort.nodes[name]: asked[name] for name in asked if name not in absent}
        result = consortium.visit(phase, nodes, each, expected, take, absent=absent)
        failures.update(result.failures)
        traffic.bytes_up += result.traffic.bytes_up
        traffic.bytes_down += result.traffic.bytes_down

    def _binding(self, work: Work, number: int, instruction: Instruction) -> Binding:
        return sums.binding(
            self.consortium.config,
            run_id=instruction.run_id,
            round_index=instruction.round_index,
            purpose=work.purpose,
            attempt=number,
            ring_values=work.ring_values,
            tail_values=work.tail_values,
            roster=self.roster.digest,
            model_digest=instruction.model_digest,
            inputs=work.inputs,
        )

    def _head(self, work: Work, number: int, instruction: Instruction) -> dict[str, Any]:
        head = self.consortium.head(instruction.round_index, instruction.model_digest)
        return {**head, "purpose": work.purpose, "attempt": number}

    def _id(self, name: str) -> bytes:
        """A site's id.

        Raises:
            SumError: "unknown-member".
        """
        for member in self.roster.members:
            if member.name == name and member.active:
                return member.id
        raise SumError("unknown-member", "no active member of the roster has this name")

    def _name(self, site: bytes) -> str:
        member = self.roster.member(site)
        if member is None:
            raise SumError("unknown-member", "not on the roster")
        return member.name


def _array(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
