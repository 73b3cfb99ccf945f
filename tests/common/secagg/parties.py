"""Sites and a coordinator of secure sums without disk and network, for tests: the product's state machines, driven.

A `Party` does what client/sharing.py does with a book; `relay` is an honest coordinator, which `Bent` can bend.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from wardround.common import sums
from wardround.common.errors import SumError
from wardround.common.identity import Identity
from wardround.common.secagg import client_state, masking
from wardround.common.secagg.client_state import ClientSum, Membership
from wardround.common.secagg.keys import COUNTS, Binding, Giving
from wardround.common.secagg.server_state import Attempt

Ring = NDArray[np.uint32]
Tail = NDArray[np.uint64]
Key = tuple[bytes, int, int]

# Every sum below is about this, unless a test changes something.
BINDING = Binding(
    run_id=bytes(range(16)),
    round_index=1,
    purpose=COUNTS,
    attempt=1,
    ring_values=6,
    tail_values=2,
    max_sites=16,
    range_=1.0,
    roster=b"r" * 32,
    config=b"c" * 32,
    model=b"m" * 32,
    input=b"i" * 32,
)


def tape(name: str) -> Callable[[int], bytes]:
    """Random bytes that a name decides."""
    state, taken = hashlib.shake_256(name.encode()), 0

    def random(size: int) -> bytes:
        nonlocal taken
        taken += size
        return state.digest(taken)[taken - size :]

    return random


@dataclass(eq=False)
class Party:
    """One site: its state machine, and what it must not forget."""

    identity: Identity
    members: Membership
    ring: Ring
    tail: Tail
    random: Callable[[int], bytes]
    sums: dict[Key, ClientSum] = field(default_factory=dict)
    given: dict[str, list[Giving]] = field(default_factory=dict)
    now: Key | None = None

    @property
    def id(self) -> bytes:
        return self.identity.id

    @property
    def state(self) -> ClientSum:
        assert self.now is not None
        return self.sums.get(self.now, ClientSum())

    def content(self) -> str:
        if not self.state.advert:
            return ""
        binding = client_state.Advert.from_bytes(self.state.advert).binding
        payload = self.ring.tobytes() + self.tail.astype(np.int64).tobytes()
        return sums.content_digest(binding.purpose, binding.model.hex(), binding.input, payload)

    def keys(self, binding: Binding) -> bytes:
        key = (binding.run_id, binding.round_index, binding.purpose)
        before = self.sums.get(key, ClientSum())
        after, reply = client_state.advertise(before, self.members, binding, self.identity.key, self.random)
        self.now, self.sums[key] = key, after
        return reply

    def shares(self, threshold: int, key_list: bytes) -> bytes:
        return self._keep(client_state.share(self.state, self.members, threshold, key_list, self.random))

    def masked(self, recipients: bytes, ciphertexts: bytes) -> Ring:
        before, content = self.state, self.content()
        known = self.given.setdefault(content, [])
        after, keys = client_state.mask(before, self.members, recipients, ciphertexts, known)
        d = len(self.ring)
        out = np.empty(d + 2 * len(self.tail), np.uint32)
        out[:d] = self.ring
        out[d:].view(np.uint64)[:] = self.tail
        masking.apply(out[:d], out[d:].view(np.uint64), keys.plus, keys.minus)
        if after is not before:
            known.append(Giving(after.threshold, frozenset(after.list.ids)))
        self._keep((after, b""))
        return out

    def consistency(self, survivors: bytes) -> bytes:
        known = self.given.setdefault(self.content(), [])
        before = self.state
        reply = self._keep(client_state.sign(before, self.members, survivors, self.identity.key, known))
        if self.state is not before:
            after = self.state
            known.append(Giving(after.threshold, frozenset(after.list.ids), after.survivor_ids))
        return reply

    def unmask(self, signers: bytes, signatures: bytes) -> bytes:
        return self._keep(client_state.unmask(self.state, self.members, signers, signatures))

    def restart(self) -> None:
        """Everything goes through text, as through a book on disk."""
        self.sums = {key: ClientSum.from_json(state.to_json()) for key, state in self.sums.items()}

    def _keep(self, result: tuple[ClientSum, bytes]) -> bytes:
        assert self.now is not None
        self.sums[self.now] = result[0]
        return result[1]


def identity(n: int) -> Identity:
    return Identity.from_seed(hashlib.sha256(b"party %d" % n).digest())


def parties(
    n: int,
    colluders: int = 1,
    *,
    min_sites: int = 3,
    extra: Iterable[bytes] = (),
    verified: Collection[bytes] | None = None,
    binding: Binding = BINDING,
    name: str = "",
) -> list[Party]:
    """n sites in the order of their ids, all on each other's roster; with payloads that follow from their ids.

    Args:
        n: how many.
        colluders: c of each one's policy.
        min_sites: likewise.
        extra: ids of active members that are none of them.
        verified: whom everybody has verified, beside itself; None: all n.
        binding: for the payloads' lengths.
        name: of the tapes: another name, other random bytes.
    """
    identities = sorted((identity(i) for i in range(n)), key=lambda one: one.id)
    ids = frozenset(one.id for one in identities)
    trusted = ids if verified is None else frozenset(verified)
    made: list[Party] = []
    for one in identities:
        members = Membership(ids | frozenset(extra), trusted | {one.id}, colluders, min_sites)
        rng = np.random.default_rng(int.from_bytes(one.id[:8], "little"))
        ring = rng.integers(0, 2**32, binding.ring_values, np.uint64).astype(np.uint32)
        tail = rng.integers(0, 2**40, binding.tail_values, np.uint64)
        made.append(Party(one, members, ring, tail, tape(f"{name} {one.id.hex()}")))
    return made


def plain_sum(sites: Iterable[Party]) -> tuple[list[int], list[int]]:
    """What a secure sum must give, with Python's integers."""
    listed = list(sites)
    ring = [sum(map(int, column)) % 2**32 for column in zip(*(site.ring for site in listed), strict=True)]
    return ring, [sum(map(int, column)) % 2**64 for column in zip(*(site.tail for site in listed), strict=True)]


def as_lists(total: tuple[Ring, Tail]) -> tuple[list[int], list[int]]:
    return total[0].tolist(), total[1].tolist()


@dataclass(eq=False)
class Relay:
    """An honest coordinator, one exchange after another; who is silent from an exchange on is a matter of the test.

    Attributes:
        attempt: its state.
        sites: by id.
        threshold: t.
        gone: exchange (1 to 5) → ids that answer nothing from there on.
    """

    sites: Mapping[bytes, Party]
    threshold: int
    binding: Binding = BINDING
    gone: Mapping[int, Collection[bytes]] = field(default_factory=dict)
    before: Callable[[int], None] = lambda exchange: None
    attempt: Attempt = field(init=False)
    said: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.attempt = Attempt(self.binding)

    def _there(self, exchange: int, asked: Iterable[bytes]) -> list[bytes]:
        self.before(exchange)
        left = {site for at, ids in self.gone.items() if at <= exchange for site in ids}
        return [site for site in asked if site not in left]

    def keys(self) -> bytes:
        for site in self._there(1, self.sites):
            self.attempt.add_advert(site, self.sites[site].keys(self.binding))
        self.said["key_list"] = self.attempt.close_keys(self.threshold).to_bytes()
        return self.said["key_list"]

    def shares(self) -> bytes:
        for site in self._there(2, self.attempt.keys.ids):
            self.attempt.add_shares(site, self.sites[site].shares(self.threshold, self.said["key_list"]))
        self.said["recipients"] = self.attempt.close_shares()
        return self.said["recipients"]

    def masked(self) -> bytes:
        for site in self._there(3, self.attempt.recipients):
            vector = self.sites[site].masked(self.said["recipients"], self.attempt.ciphertexts_for(site))
            self.attempt.add_masked(site, vector)
        self.said["survivors"] = self.attempt.close_sum()
        return self.said["survivors"]

    def consistency(self) -> tuple[bytes, bytes]:
        for site in self._there(4, self.attempt.survivors):
            self.attempt.add_signature(site, self.sites[site].consistency(self.said["survivors"]))
        self.said["signers"], self.said["signatures"] = self.attempt.close_signatures()
        return self.said["signers"], self.said["signatures"]

    def unmask(self) -> tuple[Ring, Tail]:
        for site in self._there(5, self.attempt.survivors):
            answer = self.sites[site].unmask(self.said["signers"], self.said["signatures"])
            self.attempt.add_answer(site, answer)
        return self.attempt.unmask()

    def run(self, until: int = 5, after: int = 0) -> tuple[Ring, Tail] | None:
        """Exchanges `after` + 1 to `until`; the sum after the fifth."""
        total = None
        for step in (self.keys, self.shares, self.masked, self.consistency, self.unmask)[after:until]:
            total = step()
        return total if until == 5 else None  # pyright: ignore[reportReturnType]


def relay(sites: Sequence[Party], threshold: int, **more: object) -> Relay:
    """An honest coordinator of these sites."""
    return Relay({site.id: site for site in sites}, threshold, **more)  # pyright: ignore[reportArgumentType]


def refused(code: str, site: Party, ask: Callable[[], object]) -> SumError:
    """The refusal of one request, twice: by its word, with the site as it was, its memory included."""
    states, given = dict(site.sums), {content: list(found) for content, found in site.given.items()}
    error: SumError | None = None
    for _ in range(2):
        try:
            ask()
        except SumError as caught:
            error = caught
        else:
            raise AssertionError(f"expected the refusal '{code}', got an answer")
        assert error.code == code, error
        assert site.sums == states
        assert {content: found for content, found in site.given.items() if found} == {
            content: found for content, found in given.items() if found
        }
    assert error is not None
    return error


def changed(binding: Binding = BINDING, **parts: object) -> Binding:
    return replace(binding, **parts)  # pyright: ignore[reportArgumentType]
