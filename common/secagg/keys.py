"""Keys of one attempt of a secure sum, the signed advert of them, and the key list (docs/secure-sums.md §S1, §S3–§S6).

Used by both roles; pure functions on bytes. Enters: random bytes, adverts. Leaves: adverts (public). Private: the keys
in `AttemptKeys`, which live as long as one attempt. Fresh for every attempt: a key used for two sums would give their
difference away.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import SumError

PREFIX = b"wardround/secagg/1/"
KEY_BYTES = 32
SIGNATURE_BYTES = 64
MIN_MEMBERS = 3
MAX_MEMBERS = 1024

# Uses of HKDF and of signatures and digests: one word each, never two meanings.
USE_ADVERT, USE_COMMITMENT, USE_KEY_LIST = "advert", "commitment", "key-list"
USE_SHARE, USE_SHARE_KEY, USE_PAIR_MASK, USE_SELF_MASK = "share", "share-key", "pair-mask", "self-mask"
USE_SURVIVORS = "survivors"

COUNTS, UPDATE, VALIDATION, TEST = 1, 2, 3, 4
PURPOSES = {COUNTS: "counts", UPDATE: "update", VALIDATION: "validation", TEST: "test"}

_MAGIC = b"WSK1"
_SURVIVORS = struct.Struct("<H")
_BINDING = struct.Struct("<16sIBIQIId32s32s32s32s")
_ADVERT_BYTES = len(_MAGIC) + _BINDING.size + _SURVIVORS.size + 4 * KEY_BYTES + SIGNATURE_BYTES

# Curve25519: the field's prime, and u of the points whose product with any private key is one (RFC 7748 §6.1, §7).
_FIELD = 2**255 - 19
_LOW_ORDER = frozenset(
    {
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        _FIELD - 1,
    }
)

Random = Callable[[int], bytes]


def domain(use: str) -> bytes:
    """The prefix that separates one use of a hash or signature from all others, §S1."""
    return PREFIX + use.encode("ascii") + b"\0"


def hkdf(secret: bytes, use: str, context: bytes = b"") -> bytes:
    """32 bytes of HKDF-SHA256 (RFC 5869), without salt, for one use, §S1."""
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=domain(use) + context).derive(secret)


def digest(use: str, *parts: bytes) -> bytes:
    """SHA-256 over the use's domain and the parts, which the caller makes unambiguous."""
    state = hashlib.sha256(domain(use))
    for part in parts:
        state.update(part)
    return state.digest()


def agree(private: bytes, public: bytes) -> bytes:
    """X25519 (RFC 7748).

    Raises:
        SumError: "malformed", a public key of low order.
    """
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SumError("malformed", "a public key of low order") from None


def public_of(private: bytes) -> bytes:
    """The public half of an X25519 key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def verify(public: bytes, signature: bytes, signed: bytes, whose: str) -> None:
    """Checks an Ed25519 signature.

    Raises:
        SumError: "signature".
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, signed)
    except (InvalidSignature, ValueError):
        raise SumError("signature", f"{whose}: not signed by the identity key it claims") from None


@dataclass(frozen=True)
class Binding:
    """What one attempt of a sum is about (§S4): the same at every site, or there is no sum.

    Attributes:
        run_id: 16 bytes.
        round_index: 0 before the first training round.
        purpose: COUNTS, UPDATE, VALIDATION or TEST.
        attempt: 1, 2, …
        ring_values: d, values added modulo 2^32.
        tail_values: k, values added modulo 2^64.
        max_sites: most sites that a sum may have; with `range_` it decides the scale (§S10).
        range_: R, the clipping range of an update's values; 1.0 where nothing is quantised.
        roster, config, model, input: digests, 32 bytes each.
    """

    run_id: bytes
    round_index: int
    purpose: int
    attempt: int
    ring_values: int
    tail_values: int
    max_sites: int
    range_: float
    roster: bytes
    config: bytes
    model: bytes
    input: bytes

    def __post_init__(self) -> None:
        numbers = {
            "round_index": (self.round_index, 0, 2**32 - 1),
            "purpose": (self.purpose, COUNTS, TEST),
            "attempt": (self.attempt, 1, 2**32 - 1),
            "ring_values": (self.ring_values, 0, 2**32),
            "tail_values": (self.tail_values, 0, 2**20),
            "max_sites": (self.max_sites, MIN_MEMBERS, MAX_MEMBERS),
        }
        for name, (value, least, most) in numbers.items():
            if not least <= value <= most:
                raise SumError("malformed", f"binding: {name}: expected {least} to {most}, got {value}")
        if not (math.isfinite(self.range_) and self.range_ > 0):
            raise SumError("malformed", "binding: range_: expected a positive number")
        if self.ring_values + self.tail_values == 0:
            raise SumError("malformed", "binding: expected at least one value")
        for name in ("roster", "config", "model", "input"):
            if len(getattr(self, name)) != KEY_BYTES:
                raise SumError("malformed", f"binding: {name}: expected {KEY_BYTES} bytes")
        if len(self.run_id) != 16:
            raise SumError("malformed", f"binding: run_id: expected 16 bytes, got {len(self.run_id)}")

    def to_bytes(self) -> bytes:
        """The 177 bytes of §S4."""
        return _BINDING.pack(*(getattr(self, item.name) for item in fields(self)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Binding:
        """The inverse of `to_bytes`.

        Raises:
            SumError: "malformed".
        """
        if len(data) != _BINDING.size:
            raise SumError("malformed", f"binding: expected {_BINDING.size} bytes, got {len(data)}")
        return cls(*_BINDING.unpack(data))

    def difference(self, other: Binding) -> str:
        """The failure word for a binding that is not this one; "" when it is."""
        differing = [item.name for item in fields(self) if getattr(self, item.name) != getattr(other, item.name)]
        if len(differing) == 1 and differing[0] in ("roster", "config", "model", "input"):
            return f"other-{differing[0]}"
        return "other-sum" if differing else ""


@dataclass(frozen=True)
class AttemptKeys:
    """A site's secrets of one attempt; `repr` shows none of them."""

    encryption_key: bytes = field(repr=False)
    mask_key: bytes = field(repr=False)
    self_seed: bytes = field(repr=False)

    @classmethod
    def fresh(cls, random: Random) -> AttemptKeys:
        """New keys from `random`, which gives n uniform bytes: the system's generator, a tape only in tests."""
        return cls(random(KEY_BYTES), random(KEY_BYTES), random(KEY_BYTES))


@dataclass(frozen=True)
class Advert:
    """A site's public keys of one attempt, signed (§S5). `min_survivors`: what everybody's signature must respect."""

    binding: Binding
    min_survivors: int
    id: bytes
    encryption_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes

    BYTES = _ADVERT_BYTES

    @classmethod
    def make(cls, binding: Binding, min_survivors: int, keys: AttemptKeys, identity: Ed25519PrivateKey) -> Advert:
        """Signs the public halves of `keys`.

        Raises:
            SumError: "malformed", min_survivors out of range.
        """
        _check_survivors(min_survivors)
        site = identity.public_key().public_bytes_raw()
        parts = (
            binding,
            min_survivors,
            site,
            public_of(keys.encryption_key),
            public_of(keys.mask_key),
            commitment(keys.self_seed, binding, site),
        )
        unsigned = cls(*parts, signature=bytes(SIGNATURE_BYTES))
        return cls(*parts, signature=identity.sign(unsigned._signed()))

    def to_bytes(self) -> bytes:
        """The 375 bytes of §S5."""
        return self._body() + self.signature

    @classmethod
    def from_bytes(cls, data: bytes) -> Advert:
        """The inverse of `to_bytes`; the signature is not checked.

        Raises:
            SumError: "malformed".
        """
        if len(data) != cls.BYTES or data[: len(_MAGIC)] != _MAGIC:
            raise SumError("malformed", f"advert: expected {cls.BYTES} bytes that begin with {_MAGIC!r}")
        middle = len(_MAGIC) + _BINDING.size
        start = middle + _SURVIVORS.size
        binding = Binding.from_bytes(data[len(_MAGIC) : middle])
        (min_survivors,) = _SURVIVORS.unpack(data[middle:start])
        _check_survivors(min_survivors)
        site, encryption_key, mask_key, committed = (
            data[start + KEY_BYTES * i : start + KEY_BYTES * (i + 1)] for i in range(4)
        )
        for key in (encryption_key, mask_key):
            _check_public(key)
        return cls(binding, min_survivors, site, encryption_key, mask_key, committed, data[-SIGNATURE_BYTES:])

    def verify(self) -> None:
        """Checks the signature against `id`; whether `id` is a member is the caller's question.

        Raises:
            SumError: "signature".
        """
        verify(self.id, self.signature, self._signed(), "advert")

    def _body(self) -> bytes:
        keys = (self.id, self.encryption_key, self.mask_key, self.commitment)
        return b"".join((_MAGIC, self.binding.to_bytes(), _SURVIVORS.pack(self.min_survivors), *keys))

    def _signed(self) -> bytes:
        return domain(USE_ADVERT) + self._body()


def _check_survivors(min_survivors: int) -> None:
    if not MIN_MEMBERS <= min_survivors <= MAX_MEMBERS:
        raise SumError(
            "malformed", f"advert: min_survivors: expected {MIN_MEMBERS} to {MAX_MEMBERS}, got {min_survivors}"
        )


def _check_public(key: bytes) -> None:
    """Refuses a second encoding of one key, and keys whose shared secret everybody knows."""
    u = int.from_bytes(key, "little")
    if u >= _FIELD or u in _LOW_ORDER:
        raise SumError("malformed", "advert: a public key that is not canonical, or of low order")


def commitment(self_seed: bytes, binding: Binding, site: bytes) -> bytes:
    """What an advert says of the self seed (§S5): hides it, HKDF being a PRF, and binds it, SHA-256 not colliding."""
    return hkdf(self_seed, USE_COMMITMENT, hashlib.sha256(binding.to_bytes()).digest() + site)


@dataclass(frozen=True)
class KeyList:
    """The adverts of one attempt in order of ids, with the threshold (§S6).

    Attributes:
        threshold: t.
        adverts: n of them.
    """

    threshold: int
    adverts: tuple[Advert, ...]

    @classmethod
    def from_bytes(cls, threshold: int, data: bytes, max_sites: int = MAX_MEMBERS) -> KeyList:
        """The list that a coordinator sent; check 1 and 2 of §S6.

        Raises:
            SumError: "malformed": length, magic, number of members, order of ids, or t not a 16-bit number.
        """
        n, left = divmod(len(data), Advert.BYTES)
        if left or not MIN_MEMBERS <= n <= max_sites:
            raise SumError(
                "malformed", f"key list: expected {MIN_MEMBERS} to {max_sites} adverts, got {len(data)} bytes"
            )
        adverts = tuple(Advert.from_bytes(data[i * Advert.BYTES : (i + 1) * Advert.BYTES]) for i in range(n))
        ids = [advert.id for advert in adverts]
        if any(first >= second for first, second in itertools.pairwise(ids)):
            raise SumError("malformed", "key list: expected ids in ascending order, none twice")
        if not 1 <= threshold < 2**16:
            raise SumError("malformed", f"key list: expected a threshold of 1 to 65535, got {threshold}")
        return cls(threshold, adverts)

    def to_bytes(self) -> bytes:
        """All adverts, one after another."""
        return b"".join(advert.to_bytes() for advert in self.adverts)

    @cached_property
    def digest(self) -> bytes:
        """What every derived key and the survivors' signature bind: t, n and every byte of every advert."""
        return digest(USE_KEY_LIST, struct.pack("<HH", self.threshold, self.n), self.to_bytes())

    @property
    def n(self) -> int:
        """Members."""
        return len(self.adverts)

    @cached_property
    def ids(self) -> tuple[bytes, ...]:
        """Members' ids, ascending."""
        return tuple(advert.id for advert in self.adverts)

    def index(self, site: bytes) -> int:
        """A member's place, from 0.

        Raises:
            SumError: "own-keys", not on the list.
        """
        try:
            return self.ids.index(site)
        except ValueError:
            raise SumError("own-keys", "key list: expected this site's own advert") from None

    def check(
        self,
        own: Advert,
        active: Collection[bytes],
        verified: Collection[bytes],
        colluders: int,
        min_sites: int,
    ) -> None:
        """Checks 3 to 8 of §S6, in their order.

        Args:
            own: the advert that this site sent.
            active: ids of the active members of the roster that this site pinned.
            verified: ids that this site verified, its own among them.
            colluders: c, of this site's policy.
            min_sites: of this site's policy.

        Raises:
            SumError: the first that does not hold.
        """
        for advert in self.adverts:
            if advert.id not in active:
                raise SumError("unknown-member", "key list: a key of no active member of the pinned roster")
        for advert in self.adverts:
            advert.verify()
        others = {advert.binding for advert in self.adverts} - {own.binding}
        words = {own.binding.difference(binding) for binding in others}
        if words:
            word = words.pop() if len(words) == 1 else "other-sum"
            raise SumError(word, "key list: a member's advert is about something else than this site's")
        if self.adverts[self.index(own.id)] != own:
            raise SumError("own-keys", "key list: this site's own advert was changed")
        public = [key for advert in self.adverts for key in (advert.encryption_key, advert.mask_key)]
        if len(set(public)) != 2 * self.n or len({advert.commitment for advert in self.adverts}) != self.n:
            raise SumError("repeated-key", "key list: a key or commitment is there twice")
        if max(advert.min_survivors for advert in self.adverts) > self.n:
            raise SumError("threshold", f"key list: a member wants more survivors than the {self.n} members")
        check_threshold(self.n, self.threshold, len(set(self.ids) & (set(verified) | {own.id})), colluders, min_sites)

    def pair(self, first: int, second: int) -> bytes:
        """Context of two members' pair mask: the list, then the lower and the higher id."""
        low, high = sorted((self.ids[first], self.ids[second]))
        return self.digest + low + high


def check_threshold(n: int, threshold: int, verified: int, colluders: int, min_sites: int) -> None:
    """§S3: two survivor sets cannot both be signed, and a sum holds two honest members; members that this site has not
    verified count as colluders.

    Args:
        n: members of the key list.
        threshold: t.
        verified: members that this site verified, itself included.
        colluders: c.
        min_sites: of this site's policy, at least 3.

    Raises:
        SumError: "threshold".
    """
    against = colluders + n - verified
    if not (n >= MIN_MEMBERS and threshold <= n and 2 * threshold > n + against and threshold - against >= 2):
        raise SumError(
            "threshold",
            f"{n} members of which {verified} are verified, t = {threshold}, c = {colluders}: expected t ≤ n, "
            "2t > n + c + unverified and t − c − unverified ≥ 2",
        )
    if verified < max(min_sites, MIN_MEMBERS):
        raise SumError("threshold", f"{verified} verified members, this site's policy wants at least {min_sites}")


@dataclass(frozen=True)
class Giving:
    """Under which threshold and key list a payload was given, and who is in the sum where that was signed (§S9).

    Attributes:
        threshold: t.
        ids: of the key list.
        survivors: ids; empty where this site signed none.
        sum: run, round and purpose, as the site names them.
    """

    threshold: int
    ids: frozenset[bytes]
    survivors: tuple[bytes, ...] = ()
    sum: str = ""


def quorums_meet(first: Giving, second: Giving, verified: Collection[bytes], colluders: int) -> bool:
    """Whether any quorum of one key list and any of the other share a member that is honest (§S3).

    >>> five = frozenset(bytes([i]) for i in range(5))
    >>> quorums_meet(Giving(4, five), Giving(4, five), five, 2)
    True
    >>> quorums_meet(Giving(4, five), Giving(3, five - {b"4"}), five, 2)
    False
    """
    union = first.ids | second.ids
    return first.threshold + second.threshold > len(union) + colluders + len(union - set(verified))


def smallest_threshold(n: int, colluders: int) -> int | None:
    """The smallest t that §S3 allows when all members are verified; None where there is none.

    >>> [smallest_threshold(n, c) for n, c in ((3, 1), (5, 2), (7, 2), (4, 2))]
    [3, 4, 5, 4]
    >>> smallest_threshold(3, 2) is None
    True
    """
    threshold = max((n + colluders) // 2 + 1, colluders + 2)
    return threshold if threshold <= n else None


def bitmap(members: Collection[int], n: int) -> bytes:
    """Members of the key list, from 0, as ⌈n / 8⌉ bytes, least significant bit first (§S7).

    >>> bitmap({0, 9}, 10).hex()
    '0102'
    """
    value = sum(1 << member for member in set(members))
    return value.to_bytes((n + 7) // 8, "little")


def members_of(data: bytes, n: int) -> tuple[int, ...]:
    """The inverse of `bitmap`, ascending.

    Raises:
        SumError: "malformed": wrong length, or a bit beyond the last member.
    """
    value = int.from_bytes(data, "little")
    if len(data) != (n + 7) // 8 or value >> n:
        raise SumError("malformed", f"bitmap: expected {(n + 7) // 8} bytes for {n} members")
    return tuple(member for member in range(n) if value >> member & 1)


def pieces(data: bytes, count: int, size: int, what: str) -> Sequence[bytes]:
    """`count` pieces of `size` bytes.

    Raises:
        SumError: "malformed", another length.
    """
    if len(data) != count * size:
        raise SumError("malformed", f"{what}: expected {count} × {size} bytes, got {len(data)}")
    return [data[i * size : (i + 1) * size] for i in range(count)]
