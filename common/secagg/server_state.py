"""The coordinator's side of a secure sum: relays keys and shares, adds masked vectors, unmasks the sum.

Run by the coordinator, called by server/aggregation.py (docs/secure-sums.md §S5–§S9). Enters: what sites send, each
checked here and refused alone. Leaves: what is relayed; and one sum. In memory: one sum, whatever the number of sites.
Nothing here is secret before exchange 5; after it, the masks of this attempt are, until they are taken off.

An `Attempt` that was closed can be written down and read back (`to_record`, `from_record`), so that a coordinator that
was killed goes on with the same survivors: sites that signed join no other attempt.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ProtocolError, SumError, VerificationError
from . import masking, shamir
from .client_state import CIPHERTEXT_BYTES, pair_key, self_key, statement
from .keys import Advert, Binding, KeyList, bitmap, commitment, pieces, public_of, verify

Ring = NDArray[np.uint32]
Tail = NDArray[np.uint64]


class Attempt:
    """One attempt of one sum. Members are known by their id; a second message of one exchange by a member is refused.

    Attributes:
        binding: what the sum is about; a site that signs another one is not taken.
        adverts: by id.
        keys: the key list, once closed.
        misfits: pairs of ids (who dealt a share, who answered with it) that did not fit, once unmasked; which of the
            two lied cannot be told.
    """

    def __init__(self, binding: Binding) -> None:
        self.binding = binding
        self.adverts: dict[bytes, Advert] = {}
        self.misfits: tuple[tuple[bytes, bytes], ...] = ()
        self._keys: KeyList | None = None
        self._sealed: dict[int, list[bytes]] = {}
        self._recipients: tuple[int, ...] = ()
        self._added: set[int] = set()
        self._ring = np.zeros(0, np.uint32)
        self._tail = np.zeros(0, np.uint64)
        self._signatures: dict[int, bytes] = {}
        self._answers: dict[int, Mapping[int, int]] = {}

    @property
    def keys(self) -> KeyList:
        if self._keys is None:
            raise SumError("out-of-turn", "the key list is not closed yet")
        return self._keys

    def add_advert(self, site: bytes, data: bytes) -> None:
        """Exchange 1: takes a member's advert.

        Args:
            site: the id that the roster gives the sender.
            data: 375 bytes.

        Raises:
            SumError: "malformed", "signature", "other-…": the site was given, or has, something else than the others.
        """
        advert = Advert.from_bytes(data)
        if advert.id != site:
            raise SumError("unknown-member", "advert: not of the member that sent it")
        advert.verify()
        if word := self.binding.difference(advert.binding):
            raise SumError(word, "advert: about something else than this sum")
        if self._keys is not None or site in self.adverts:
            raise SumError("out-of-turn", "advert: a second one, or after the key list was closed")
        self.adverts[site] = advert

    def close_keys(self, threshold: int) -> KeyList:
        """The key list that exchange 2 sends.

        Raises:
            SumError: "malformed": fewer than three members, or a threshold above their number.
        """
        data = b"".join(self.adverts[site].to_bytes() for site in sorted(self.adverts))
        self._keys = KeyList.from_bytes(threshold, data, self.binding.max_sites)
        return self._keys

    def add_shares(self, site: bytes, ciphertexts: bytes) -> None:
        """Exchange 2: takes the ciphertexts that a member made for all others.

        Raises:
            SumError: "malformed", "out-of-turn".
        """
        member = self.keys.index(site)
        if member in self._sealed or self._recipients:
            raise SumError("out-of-turn", "shares: a second time, or after the recipients were fixed")
        self._sealed[member] = list(pieces(ciphertexts, self.keys.n - 1, CIPHERTEXT_BYTES, "shares"))

    def close_shares(self) -> bytes:
        """Fixes the recipients: members whose shares came. Their bitmap.

        Raises:
            SumError: "threshold": fewer than t.
        """
        self._require(len(self._sealed), "sent shares")
        self._recipients = tuple(sorted(self._sealed))
        self._ring = np.zeros(self.binding.ring_values, np.uint32)
        self._tail = np.zeros(self.binding.tail_values, np.uint64)
        return bitmap(self._recipients, self.keys.n)

    def ciphertexts_for(self, site: bytes) -> bytes:
        """What the other recipients sealed for this one, in order of senders."""
        member = self.keys.index(site)
        # A sender's list leaves the sender itself out.
        return b"".join(
            self._sealed[sender][member - (member > sender)] for sender in self._recipients if sender != member
        )

    @property
    def recipients(self) -> tuple[bytes, ...]:
        """Ids of the recipients."""
        return tuple(self.keys.ids[member] for member in self._recipients)

    def add_masked(self, site: bytes, masked: Ring) -> None:
        """Exchange 3: adds a member's masked vector to the sum.

        Args:
            site: whose.
            masked: uint32 (d + 2k,): the ring, then each tail value as low and high half.

        Raises:
            SumError: "malformed": another length; "out-of-turn": a second one, or not a recipient.
        """
        member, d = self.keys.index(site), self.binding.ring_values
        if masked.dtype != np.uint32 or masked.shape != (d + 2 * self.binding.tail_values,):
            raise SumError("malformed", f"masked vector: expected {d} + 2 × {self.binding.tail_values} uint32 values")
        if member not in self._recipients or member in self._added or not self._sealed:
            raise SumError("out-of-turn", "masked vector: a second one, of no recipient, or after the sum was closed")
        np.add(self._ring, masked[:d], out=self._ring)
        self._tail += masked[d:].astype("<u4").view("<u8")
        self._added.add(member)

    def close_sum(self) -> bytes:
        """Fixes the survivors: members whose masked vector is in the sum. Their bitmap.

        Raises:
            SumError: "threshold": fewer than t.
        """
        self._require(len(self._added), "sent a masked vector")
        self._sealed = {}
        return bitmap(self._added, self.keys.n)

    @property
    def survivors(self) -> tuple[bytes, ...]:
        """Ids of the survivors."""
        return tuple(self.keys.ids[member] for member in sorted(self._added))

    def add_signature(self, site: bytes, signature: bytes) -> None:
        """Exchange 4: takes a survivor's signature.

        Raises:
            SumError: "signature", "out-of-turn".
        """
        member = self.keys.index(site)
        if member not in self._added or member in self._signatures:
            raise SumError("out-of-turn", "signature: a second one, or of no survivor")
        signed = statement(self.keys, bitmap(self._recipients, self.keys.n), bitmap(self._added, self.keys.n))
        verify(site, signature, signed, "survivors' statement")
        self._signatures[member] = signature

    def close_signatures(self) -> tuple[bytes, bytes]:
        """The bitmap of signers, and their signatures in order.

        Raises:
            SumError: "threshold": fewer than t.
        """
        self._require(len(self._signatures), "signed")
        signers = sorted(self._signatures)
        return bitmap(signers, self.keys.n), b"".join(self._signatures[member] for member in signers)

    def add_answer(self, site: bytes, answer: bytes) -> None:
        """Exchange 5: takes a survivor's shares, one a recipient.

        Raises:
            SumError: "malformed", "out-of-turn".
        """
        member = self.keys.index(site)
        if member not in self._added or member in self._answers:
            raise SumError("out-of-turn", "answer: a second one, or of no survivor")
        try:
            values = [
                shamir.from_bytes(value)
                for value in pieces(answer, len(self._recipients), shamir.VALUE_BYTES, "answer")
            ]
        except ProtocolError as error:
            raise SumError("malformed", str(error)) from None
        self._answers[member] = dict(zip(self._recipients, values, strict=True))

    def unmask(self) -> tuple[Ring, Tail]:
        """The sum of the survivors' payloads. The masked sum is used up.

        Returns:
            uint32 (d,) modulo 2^32; uint64 (k,) modulo 2^64.

        Raises:
            SumError: "threshold": fewer than t answers; "share": no t of them fit what a member signed. Nothing was
                released; the masked sum is as it was.
        """
        self._require(len(self._answers), "answered")
        keys = self.keys
        misfits: list[tuple[int, int]] = []
        off: list[bytes] = []
        on: list[bytes] = []
        for member in self._recipients:
            alive = member in self._added
            secret = self._rebuild(member, misfits, seed=alive)
            if alive:
                off.append(self_key(keys, secret, member))
                continue
            for other in sorted(self._added):  # the lower of two members added their stream
                (off if other < member else on).append(pair_key(keys, secret, member, other))
        masking.apply(self._ring, self._tail, on, off)
        self.misfits = tuple((keys.ids[dealer], keys.ids[holder]) for dealer, holder in misfits)
        ring, tail = self._ring, self._tail
        self._ring, self._tail, self._answers = np.zeros(0, np.uint32), np.zeros(0, np.uint64), {}
        return ring, tail

    def _rebuild(self, member: int, misfits: list[tuple[int, int]], *, seed: bool) -> bytes:
        """A survivor's self seed or a dropped member's mask key, checked against what that member signed."""
        advert = self.keys.adverts[member]

        def fits(value: int) -> bool:
            secret = value.to_bytes(32, "little")
            if seed:
                return commitment(secret, self.binding, advert.id) == advert.commitment
            return public_of(secret) == advert.mask_key

        points = {answering + 1: values[member] for answering, values in self._answers.items()}
        try:
            value, wrong = shamir.reconstruct(
                points, self.keys.threshold, fits, suspects=sorted({holder + 1 for _, holder in misfits})
            )
        except VerificationError:
            raise SumError("share", f"no {self.keys.threshold} answers fit what member {member + 1} signed") from None
        misfits += [(member, x - 1) for x in wrong]
        return value.to_bytes(32, "little")

    def _require(self, count: int, what: str) -> None:
        if count < self.keys.threshold:
            raise SumError("threshold", f"{count} {what}, expected at least t = {self.keys.threshold}")

    def to_record(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """A closed sum as values and vectors: all that exchanges 4 and 5 need. Masked: it says nothing by itself."""
        values = {
            "threshold": self.keys.threshold,
            "keys": base64.b64encode(self.keys.to_bytes()).decode("ascii"),
            "recipients": list(self._recipients),
            "survivors": sorted(self._added),
        }
        vectors: dict[str, NDArray[Any]] = {"ring": self._ring.view(np.uint8), "tail": self._tail.view(np.uint8)}
        return values, vectors

    @classmethod
    def from_record(cls, values: Mapping[str, Any], vectors: Mapping[str, NDArray[Any]]) -> Attempt:
        """The inverse of `to_record`.

        Raises:
            SumError: "malformed".
        """
        try:
            threshold, data = values["threshold"], base64.b64decode(values["keys"], validate=True)
            recipients, survivors = list(values["recipients"]), list(values["survivors"])
            ring, tail = (np.array(vectors[name].view(dtype)) for name, dtype in (("ring", "<u4"), ("tail", "<u8")))
        except (KeyError, TypeError, ValueError):
            raise SumError("malformed", "record of a sum: a value or vector is missing, or of another kind") from None
        if any(type(number) is not int for number in (threshold, *recipients, *survivors)):
            raise SumError("malformed", "record of a sum: expected whole numbers")
        keys = KeyList.from_bytes(threshold, data)
        attempt = cls(keys.adverts[0].binding)
        if not (
            set(survivors) <= set(recipients) <= set(range(keys.n))
            and ring.shape == (attempt.binding.ring_values,)
            and tail.shape == (attempt.binding.tail_values,)
        ):
            raise SumError("malformed", "record of a sum: members or lengths that its key list does not have")
        attempt.adverts = {advert.id: advert for advert in keys.adverts}
        attempt._keys = keys
        attempt._recipients, attempt._added = tuple(sorted(set(recipients))), set(survivors)
        attempt._ring, attempt._tail = ring.astype(np.uint32, copy=False), tail.astype(np.uint64, copy=False)
        return attempt
