"""The site's side of secure sums across messages: the state in between, on disk and encrypted; one answer an exchange.

Run by the site, called by client/site.py (keys) and client/gate.py (the other exchanges). Enters: instructions. Leaves:
adverts, sealed shares, masked vectors, signatures, shares, each made by common/secagg/client_state.py. Private: the
book of open sums, with keys and shares in it. Steps of docs/secure-sums.md §S5–§S9; no torch, no registry.

    state/sums-0.sealed, sums-1.sealed   the book, AES-256-GCM under the identity's storage key: in turns the newest one
    sums.counter                         beside site.toml: how often it was written, and the SHA-256 of what was

The book is written before a reply that depends on it is given: to the file that does not hold the newest one, then the
counter, which makes it the newest. A state folder that was put back from a copy holds an older book than the counter
says; a site that went on from it would answer twice, so it refuses (`restored`). Whoever can put both back is the
hospital's own administrator.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from ..common import sums
from ..common.errors import ProtocolError, SumError, VerificationError
from ..common.files import overwrite, private_folder, write_atomic
from ..common.identity import Identity
from ..common.messages import (
    MaskedReply,
    MaskInstruction,
    SharesInstruction,
    SharesReply,
    SumInstruction,
    SurvivorsInstruction,
    SurvivorsReply,
    UnmaskInstruction,
    UnmaskReply,
)
from ..common.secagg import client_state
from ..common.secagg.client_state import ClientSum, Membership
from ..common.secagg.keys import PURPOSES, Advert, Giving, domain
from . import payload
from .folder import Site, SiteRun
from .identity import SiteKeys

_NONCE_BYTES = 12
_DATA = domain("sums")
Bytes = NDArray[np.uint8]


@dataclass(eq=False)
class Book:
    """Every sum this site must not forget.

    Attributes:
        newest: the highest round of each run in which a sum was begun; older ones are over.
        sums: by run and purpose: round and state, of the newest round only.
        given: digest of a payload → how it was given, in all runs.
    """

    newest: dict[str, int] = field(default_factory=dict)
    sums: dict[str, dict[str, tuple[int, ClientSum]]] = field(default_factory=dict, repr=False)
    given: dict[str, list[Giving]] = field(default_factory=dict)

    def get(self, run_id: str, round_index: int, purpose: int) -> ClientSum:
        """The state of a sum, empty before its first attempt.

        Raises:
            SumError: "out-of-turn": of a round before the newest.
        """
        if round_index < self.newest.get(run_id, 0):
            raise SumError("out-of-turn", f"round {round_index}: sums of a later round were begun already")
        found_round, state = self.sums.get(run_id, {}).get(str(purpose), (round_index, ClientSum()))
        return state if found_round == round_index else ClientSum()

    def put(self, run_id: str, round_index: int, purpose: int, state: ClientSum) -> None:
        """Notes a sum's new state; a new round makes the book forget those before."""
        self.newest[run_id] = round_index
        kept = {key: item for key, item in self.sums.get(run_id, {}).items() if item[0] == round_index}
        self.sums[run_id] = {**kept, str(purpose): (round_index, state)}

    def to_json(self) -> str:
        """Everything, as text."""
        states = {
            run: {key: [index, state.to_json()] for key, (index, state) in found.items()}
            for run, found in self.sums.items()
        }
        given = {
            content: [
                [one.threshold, sorted(site.hex() for site in one.ids), [site.hex() for site in one.survivors], one.sum]
                for one in givings
            ]
            for content, givings in self.given.items()
        }
        return json.dumps({"newest": self.newest, "sums": states, "given": given}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Book:
        """The inverse of `to_json`."""
        found: dict[str, Any] = json.loads(text)
        states = {
            run: {key: (int(index), ClientSum.from_json(state)) for key, (index, state) in items.items()}
            for run, items in found["sums"].items()
        }
        given = {
            content: [
                Giving(threshold, frozenset(map(bytes.fromhex, ids)), tuple(map(bytes.fromhex, survivors)), about)
                for threshold, ids, survivors, about in givings
            ]
            for content, givings in found["given"].items()
        }
        return cls(dict(found["newest"]), states, given)

    def note(self, content: str, giving: Giving) -> None:
        """Remembers that a payload was given; a signed giving takes the place of the same one without survivors."""
        known = self.given.get(content, [])
        key = (giving.sum, giving.threshold, giving.ids)
        alike = [one for one in known if (one.sum, one.threshold, one.ids) == key]
        if giving in alike or (alike and not giving.survivors):
            return
        self.given[content] = [one for one in known if one.survivors or one not in alike] + [giving]


@dataclass(frozen=True, eq=False)
class Sharing:
    """One site's identity, its view of the roster, and its book."""

    site: Site
    identity: Identity
    members: Membership
    roster_digest: bytes

    @classmethod
    def open(cls, site: Site) -> Sharing:
        """Of a site.

        Raises:
            ConfigError: no identity, wrong passphrase, no pinned roster.
            VerificationError: the roster is not the pinned one, or this site is not on it.
        """
        keys = SiteKeys(site.folder, site.config)
        identity = keys.identity()
        view, limits = keys.members(identity.id), site.config.policy
        members = Membership(view.active, view.verified, limits.colluders, limits.min_sites)
        return cls(site, identity, members, view.roster.digest)

    def before(self, book: Book, content: str, about: str) -> list[Giving]:
        """How a payload was given before: in all sums, or in `about` alone where the policy lets other sums differ."""
        known, others = book.given.get(content, []), self.site.config.policy.repeat_with_others
        return [giving for giving in known if not others or giving.sum == about]

    def _book_path(self, writes: int) -> Path:
        return self.site.state / f"sums-{writes % 2}.sealed"

    @property
    def _counter_path(self) -> Path:
        return self.site.folder / "sums.counter"

    @contextmanager
    def book(self) -> Iterator[Book]:
        """The book, held against other processes of this site; written when the block ends without an error.

        Raises:
            SumError: "restored".
            VerificationError: the book cannot be opened with this site's identity.
        """
        private_folder(self.site.state)
        handle = os.open(self.site.state / "sums.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            writes, sealed = self._read()
            before = Book().to_json() if sealed is None else self._open(sealed)
            book = Book.from_json(before)
            yield book
            after = book.to_json()
            if after != before:
                self._write(writes + 1, self._seal(after))
        finally:
            os.close(handle)

    def _read(self) -> tuple[int, bytes | None]:
        """How often the book was written, and the book; None before the first time."""
        if not self._counter_path.exists():
            # The first book is in file 1; a kill before the counter was made leaves it, with nothing answered from it.
            if not self._book_path(0).exists():
                return 0, None
            raise self._restored("the counter is missing")
        try:
            counter = json.loads(self._counter_path.read_bytes())
            writes, wanted = int(counter["writes"]), str(counter["sha256"])
        except (ValueError, KeyError, TypeError):
            raise self._restored("the counter is damaged") from None
        path = self._book_path(writes)
        sealed = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(sealed).hexdigest() != wanted:
            raise self._restored("the book is not the one last written")
        return writes, sealed

    def _restored(self, what: str) -> SumError:
        return SumError(
            "restored",
            f"{self._counter_path} and {self._book_path(0)}: {what}; a state folder put back from a copy could answer "
            f"twice. If no run is under way, remove both and {self._book_path(1).name}; rounds that were begun are "
            "lost to this site",
        )

    def _write(self, writes: int, sealed: bytes) -> None:
        overwrite(self._book_path(writes), sealed)
        counter = {"writes": writes, "sha256": hashlib.sha256(sealed).hexdigest()}
        write_atomic(self._counter_path, json.dumps(counter).encode() + b"\n")
        # What this site forgot must not lie on in the book before. Emptied, not removed: no folder to sync next time.
        if (before := self._book_path(writes + 1)).exists():
            os.truncate(before, 0)

    def _seal(self, text: str) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + AESGCM(self.identity.storage_key()).encrypt(nonce, text.encode(), _DATA)

    def _open(self, sealed: bytes) -> str:
        nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        # After a rotation the book may still be under the previous key.
        for identity in (self.identity, *SiteKeys(self.site.folder, self.site.config).retired()):
            try:
                return AESGCM(identity.storage_key()).decrypt(nonce, rest, _DATA).decode()
            except InvalidTag:
                continue
        raise VerificationError(f"{self.site.state}: the book of sums is not encrypted by this site's identity")


def offer(run: SiteRun, purpose: int, attempt: int, given: payload.Payload) -> Bytes:
    """Exchange 1: this site's advert for adding `given` up; empty where a simulation adds up in the clear.

    Raises:
        SumError: "out-of-turn", "restored", "malformed".
        ConfigError, VerificationError: identity or roster are not usable.
    """
    if run.config.federation.secure_aggregation == "none":  # client/policy.py lets simulated sites alone come here
        return np.zeros(0, np.uint8)
    here, instruction = Sharing.open(run.site), run.instruction
    about = sums.binding(
        run.config,
        run_id=instruction.run_id,
        round_index=instruction.round_index,
        purpose=purpose,
        attempt=attempt,
        ring_values=len(given.ring),
        tail_values=len(given.tail),
        roster=here.roster_digest,
        model_digest=given.model_digest,
        inputs=given.inputs,
    )
    key = (instruction.run_id, instruction.round_index, purpose)
    with here.book() as book:
        state, advert = client_state.advertise(book.get(*key), here.members, about, here.identity.key, os.urandom)
        book.put(*key, state)
    return np.frombuffer(advert, np.uint8)


def shares(site: Site, instruction: SharesInstruction) -> SharesReply:
    """Exchange 2."""
    run, here = SiteRun(site, instruction), Sharing.open(site)
    with _sum(here, instruction) as (book, key, state):
        after, ciphertexts = client_state.share(
            state, here.members, instruction.threshold, instruction.key_list.tobytes(), os.urandom
        )
        book.put(*key, after)
    return SharesReply(**run.head, ciphertexts=np.frombuffer(ciphertexts, np.uint8))


def mask(site: Site, instruction: MaskInstruction) -> MaskedReply:
    """Exchange 3: the stored payload under its masks."""
    run, here = SiteRun(site, instruction), Sharing.open(site)
    given = payload.require(run.folder, instruction.round_index, instruction.purpose)
    with _sum(here, instruction) as (book, key, state):
        content = given.content_digest(instruction.purpose)
        _same(state, given, content)
        after, keys = client_state.mask(
            state,
            here.members,
            instruction.recipients.tobytes(),
            instruction.ciphertexts.tobytes(),
            here.before(book, content, _about(key)),
        )
        masked = given.masked(run.config, site.config.name, instruction.round_index, keys)
        if after is not state:
            after = replace(after, content=bytes.fromhex(content))
            book.note(content, Giving(after.threshold, frozenset(after.list.ids), (), _about(key)))
        book.put(*key, after)
    return MaskedReply(**run.head, masked=masked)


def survivors(site: Site, instruction: SurvivorsInstruction) -> SurvivorsReply:
    """Exchange 4: agrees to who is in the sum, and remembers with whom this payload was added up."""
    run, here = SiteRun(site, instruction), Sharing.open(site)
    with _sum(here, instruction) as (book, key, state):
        content = state.content.hex()  # of what was masked, which is all that can be in the sum
        if not content:
            raise SumError("out-of-turn", "survivors: this site gave no masked vector")
        after, signature = client_state.sign(
            state,
            here.members,
            instruction.survivors.tobytes(),
            here.identity.key,
            here.before(book, content, _about(key)),
        )
        signed = Giving(after.threshold, frozenset(after.list.ids), after.survivor_ids, _about(key))
        book.note(content, signed)
        book.put(*key, after)
    return SurvivorsReply(**run.head, signature=np.frombuffer(signature, np.uint8))


def unmask(site: Site, instruction: UnmaskInstruction) -> UnmaskReply:
    """Exchange 5: one share for each recipient; keys and shares of the attempt are forgotten."""
    run, here = SiteRun(site, instruction), Sharing.open(site)
    with _sum(here, instruction) as (book, key, state):
        after, answer = client_state.unmask(
            state, here.members, instruction.signers.tobytes(), instruction.signatures.tobytes()
        )
        book.put(*key, after)
    return UnmaskReply(**run.head, answer=np.frombuffer(answer, np.uint8))


@contextmanager
def _sum(here: Sharing, instruction: SumInstruction) -> Iterator[tuple[Book, tuple[str, int, int], ClientSum]]:
    """The book, with the sum's key and state, which must be in the attempt that the instruction names."""
    if instruction.purpose not in PURPOSES:
        raise ProtocolError(f"purpose: expected one of {sorted(PURPOSES)}, got {instruction.purpose}")
    key = (instruction.run_id, instruction.round_index, instruction.purpose)
    with here.book() as book:
        state = book.get(*key)
        if not state.advert or state.attempt != instruction.attempt:
            raise SumError("out-of-turn", f"attempt {instruction.attempt}: this site is in attempt {state.attempt}")
        about = Advert.from_bytes(state.advert).binding
        # The config decides range, weight and rounding: the same payload under the same masks, made of another one,
        # would show the payload.
        if (about.config.hex(), about.model.hex()) != (instruction.config_digest, instruction.model_digest):
            raise SumError("out-of-turn", "this site's keys were made for another config or model")
        yield book, key, state


def _about(key: tuple[str, int, int]) -> str:
    """A sum's name in the book of givings."""
    return "/".join(map(str, key))


def _same(state: ClientSum, given: payload.Payload, content: str) -> None:
    """The payload on disk must be the one that the advert was about, and once masked, the one that was."""
    about = Advert.from_bytes(state.advert).binding
    if (about.model.hex(), about.input) != (given.model_digest, given.inputs):
        raise SumError("other-sum", "the stored vector is not the one that this site's keys were made for")
    if state.content and state.content.hex() != content:
        raise SumError("other-sum", "the stored vector is not the one that was masked with this site's keys")
