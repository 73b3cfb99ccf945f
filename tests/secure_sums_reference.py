"""A second implementation of docs/secure-sums.md, for reading: integers and lists, no blocks, nothing of common/.

Tests write the golden vectors with it and check the product against them. It follows the specification's sections in
order and keeps its symbols; members are numbers 1 … n in the order of the key list, which is the order of their ids.
It is slow, keeps secrets in plain sight and must never run at a site.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice, pairwise
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

P = 2**256 + 297
ADVERT_BYTES, CIPHERTEXT_BYTES, VALUE_BYTES, SIGNATURE_BYTES = 375, 82, 33, 64
Random = Callable[[int], bytes]
Vector = tuple[list[int], list[int]]
"""d values modulo 2^32, k values modulo 2^64."""


class Refused(Exception):  # noqa: N818
    """A check did not hold; `word` is the specification's name of the failure."""

    def __init__(self, word: str, why: str = ""):
        super().__init__(f"{word}: {why}")
        self.word = word


def check(holds: bool, word: str, why: str = "") -> None:
    if not holds:
        raise Refused(word, why)


# ---- S1. Primitives and key derivation


def domain(use: str) -> bytes:
    return f"wardround/secagg/1/{use}".encode("ascii") + b"\0"


def h(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def hkdf_sha256(secret: bytes, info: bytes, size: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=size, salt=None, info=info).derive(secret)


def hkdf(secret: bytes, use: str, context: bytes) -> bytes:
    return hkdf_sha256(secret, domain(use) + context, 32)


def x25519_public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def x25519(private: bytes, public: bytes) -> bytes:
    """The shared secret; cryptography raises ValueError for 32 zero bytes, for which the specification has no word."""
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise Refused("malformed", "public key of low order") from None


def ed25519_public(identity: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(identity).public_key().public_bytes_raw()


def sign(identity: bytes, message: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(identity).sign(message)


def check_signature(public: bytes, signature: bytes, message: bytes) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise Refused("signature", public.hex()) from None


def aes_256_ctr(key: bytes, first_counter_block: bytes, data: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.CTR(first_counter_block)).encryptor().update(data)


# ---- S3. Parameters


@dataclass(frozen=True)
class Policy:
    """What a site decided itself: the roster that it pinned, whom it verified (itself included), and its demands."""

    active: frozenset[bytes]
    verified: frozenset[bytes]
    c: int
    min_sites: int

    @property
    def min_survivors(self) -> int:
        """What this site's adverts ask everybody to respect."""
        return self.min_sites + len(self.active - self.verified)


def smallest_threshold(n: int, c: int) -> int:
    return max((n + c) // 2 + 1, c + 2)


def check_parameters(t: int, ids: Sequence[bytes], policy: Policy) -> None:
    n, f = len(ids), sum(i not in policy.verified for i in ids)
    check(t <= n, "threshold", "t > n")
    check(2 * t > n + policy.c + f, "threshold", "2t <= n + c + f")
    check(t - policy.c - f >= 2, "threshold", "t - c - f < 2")
    check(n - f >= policy.min_sites, "threshold", "fewer than min_sites verified members")


class Giving(NamedTuple):
    """A payload that was given: under t and a key list; with whom it was signed into a sum, None where it was not."""

    t: int
    ids: frozenset[bytes]
    survivors: frozenset[bytes] | None = None


def check_quorums_meet(now: Giving, before: Iterable[Giving], policy: Policy) -> None:
    """Any quorum of this list and any of one before share an honest member."""
    for other in before:
        union = now.ids | other.ids
        unverified = len(union - policy.verified)
        check(now.t + other.t > len(union) + policy.c + unverified, "difference", "t + t' <= |union| + c + f")


# ---- S4. Binding


@dataclass(frozen=True)
class Binding:
    run_id: bytes
    round_index: int
    purpose: int
    attempt: int
    d: int
    k: int
    max_sites: int
    range_r: float
    roster_digest: bytes
    config_digest: bytes
    model_digest: bytes
    input_digest: bytes

    def encode(self) -> bytes:
        numbers = (self.round_index, self.purpose, self.attempt, self.d, self.k, self.max_sites, self.range_r)
        digests = self.roster_digest + self.config_digest + self.model_digest + self.input_digest
        return self.run_id + struct.pack("<IBIQIId", *numbers) + digests


def check_ranges(binding: bytes) -> None:
    """The bounds of §S1 and §S3, and a clipping range that is one."""
    _, _, purpose, attempt, d, k, max_sites, range_r = struct.unpack("<16sIBIQIId", binding[:49])
    check(1 <= purpose <= 4 and attempt >= 1, "malformed", "purpose or attempt")
    check(d <= 2**32 and k <= 2**20 and 3 <= max_sites <= 1024, "malformed", "d, k or max_sites")
    check(math.isfinite(range_r) and range_r > 0, "malformed", "clipping range")


DIGESTS = {49: "other-roster", 81: "other-config", 113: "other-model", 145: "other-input"}


def check_bindings(own: bytes, others: Iterable[bytes]) -> None:
    """Check 5 of exchange 2: every binding is this site's; the word names a digest where nothing else differs."""
    words = set()
    for other in others:
        if other[:49] != own[:49]:
            words.add("other-sum")
        words |= {word for at, word in DIGESTS.items() if other[at : at + 32] != own[at : at + 32]}
    check(not words, words.pop() if len(words) == 1 else "other-sum")


# ---- S5. Exchange 1: keys


@dataclass(frozen=True)
class Secrets:
    encryption_key: bytes
    mask_key: bytes
    self_seed: bytes


def make_secrets(random: Random) -> Secrets:
    encryption_key, mask_key, self_seed = random(32), random(32), random(32)
    return Secrets(encryption_key, mask_key, self_seed)


def commitment(self_seed: bytes, binding: bytes, member_id: bytes) -> bytes:
    return hkdf(self_seed, "commitment", h(binding) + member_id)


def make_advert(identity: bytes, binding: bytes, min_survivors: int, secrets: Secrets) -> bytes:
    own_id = ed25519_public(identity)
    keys = x25519_public(secrets.encryption_key) + x25519_public(secrets.mask_key)
    committed = commitment(secrets.self_seed, binding, own_id)
    body = b"WSK1" + binding + struct.pack("<H", min_survivors) + own_id + keys + committed
    return body + sign(identity, domain("advert") + body)


class Advert(NamedTuple):
    raw: bytes
    magic: bytes
    binding: bytes
    min_survivors: int
    id: bytes
    encryption_key: bytes
    mask_key: bytes
    commitment: bytes
    signature: bytes


def read_advert(raw: bytes) -> Advert:
    return Advert(raw, *struct.unpack("<4s177sH32s32s32s32s64s", raw))


FIELD = 2**255 - 19


def low_order_points() -> set[int]:
    """u of the points of order 1, 2, 4 and 8 on Curve25519 and its twist, from the curve's equation.

    Doubling (RFC 7748 §5, affine): u(2P) = (u² − 1)² / (4u (u² + A u + 1)), A = 486662. A point of order 2 has u = 0
    (the point at infinity is u = 0, too); of order 4 it doubles to u = 0, so u² = 1; of order 8 to u = ±1.
    """
    points = {0, 1, FIELD - 1}

    def roots(a: int) -> list[int]:
        """Square roots modulo 2^255 − 19, which is 5 modulo 8."""
        for root in (pow(a, (FIELD + 3) // 8, FIELD), pow(a, (FIELD + 3) // 8, FIELD) * pow(2, FIELD // 4, FIELD)):
            if root * root % FIELD == a % FIELD:
                return [root % FIELD, -root % FIELD]
        return []

    # (u² − 1)² = 4u (u² + A u + 1) s for s = ±1; divided by u², with w = u + 1/u: w² − 4 = 4s (w + A),
    # and so w = 2s ± sqrt(8 + 4sA), and u = (w ± sqrt(w² − 4)) / 2.
    half = pow(2, -1, FIELD)
    for s in (1, -1):
        for root in roots(8 + 4 * s * 486662):
            w = (2 * s + root) % FIELD
            points |= {(w + other) * half % FIELD for other in roots(w * w - 4)}
    return points


LOW_ORDER = low_order_points()


def check_public_key(public: bytes) -> None:
    """Of X25519: its one encoding, and a key whose shared secrets not everybody knows."""
    u = int.from_bytes(public, "little")
    check(u < FIELD and u not in LOW_ORDER, "malformed", "public key")


def read_key_list(key_list: bytes) -> list[Advert]:
    return [read_advert(key_list[at : at + ADVERT_BYTES]) for at in range(0, len(key_list), ADVERT_BYTES)]


# ---- S6. Exchange 2: shares


def list_digest(t: int, key_list: bytes) -> bytes:
    return h(domain("key-list") + struct.pack("<HH", t, len(key_list) // ADVERT_BYTES) + key_list)


def check_key_list(t: int, key_list: bytes, own_advert: bytes, max_sites: int, policy: Policy) -> list[Advert]:
    n, rest = divmod(len(key_list), ADVERT_BYTES)
    check(rest == 0 and 3 <= n <= max_sites, "malformed", "length")
    adverts = read_key_list(key_list)
    for a in adverts:
        check(a.magic == b"WSK1" and 3 <= a.min_survivors <= 1024, "malformed", "magic or min_survivors")
        check_ranges(a.binding)
        check_public_key(a.encryption_key)
        check_public_key(a.mask_key)
    ids = [a.id for a in adverts]
    check(all(x < y for x, y in pairwise(ids)), "malformed", "order of ids")
    check(policy.active.issuperset(ids), "unknown-member")
    for a in adverts:
        check_signature(a.id, a.signature, domain("advert") + a.raw[:311])
    check_bindings(read_advert(own_advert).binding, [a.binding for a in adverts])
    check(own_advert in [a.raw for a in adverts], "own-keys")
    keys = [key for a in adverts for key in (a.encryption_key, a.mask_key)]
    check(len(set(keys)) == 2 * n and len({a.commitment for a in adverts}) == n, "repeated-key")
    check_parameters(t, ids, policy)
    check(max(a.min_survivors for a in adverts) <= n, "threshold", "a member wants more survivors than members")
    return adverts


def share(secret: bytes, t: int, n: int, random: Random) -> list[int]:
    """Shamir (1979): member i gets the value at i of a random polynomial whose value at 0 is the secret."""
    coefficients = [int.from_bytes(secret, "little")]
    coefficients += [int.from_bytes(random(48), "little") % P for _ in range(t - 1)]
    return [sum(a * i**degree for degree, a in enumerate(coefficients)) % P for i in range(1, n + 1)]


def interpolate(points: dict[int, int], x: int = 0) -> int:
    """The value at x of the polynomial of lowest degree through the points (Lagrange)."""
    total = 0
    for i, y in points.items():
        above = math.prod(x - j for j in points if j != i)
        below = math.prod(i - j for j in points if j != i)
        total += y * above * pow(below, -1, P)
    return total % P


def encode_pair(of_seed: int, of_key: int) -> bytes:
    return of_seed.to_bytes(VALUE_BYTES, "little") + of_key.to_bytes(VALUE_BYTES, "little")


def share_key(private: bytes, public: bytes, digest: bytes, u: bytes, v: bytes) -> bytes:
    return hkdf(x25519(private, public), "share-key", digest + u + v)


def encrypt_pair(key: bytes, digest: bytes, u: bytes, v: bytes, pair: bytes) -> bytes:
    return AESGCM(key).encrypt(bytes(12), pair, domain("share") + digest + u + v)


def decrypt_pair(key: bytes, digest: bytes, u: bytes, v: bytes, ciphertext: bytes) -> tuple[int, int]:
    try:
        pair = AESGCM(key).decrypt(bytes(12), ciphertext, domain("share") + digest + u + v)
    except InvalidTag:
        raise Refused("share", "does not open") from None
    values = int.from_bytes(pair[:VALUE_BYTES], "little"), int.from_bytes(pair[VALUE_BYTES:], "little")
    check(max(values) < P, "share", "value is not below p")
    return values


# ---- S7. Exchange 3: masked vectors


def make_bitmap(members: Iterable[int], n: int) -> bytes:
    return sum(1 << (i - 1) for i in members).to_bytes((n + 7) // 8, "little")


def read_bitmap(bitmap: bytes, n: int) -> list[int]:
    number = int.from_bytes(bitmap, "little")
    check(len(bitmap) == (n + 7) // 8 and number < 1 << n, "malformed", "bitmap")
    return [i + 1 for i in range(n) if number >> i & 1]


def check_quorum(members: list[int], adverts: list[Advert], t: int, at_least: int, policy: Policy) -> None:
    verified = sum(adverts[i - 1].id in policy.verified for i in members)
    check(verified >= max(t, at_least), "threshold", f"{verified} verified")


def self_key(self_seed: bytes, digest: bytes, v: bytes) -> bytes:
    return hkdf(self_seed, "self-mask", digest + v)


def pair_key(private: bytes, public: bytes, digest: bytes, v: bytes, w: bytes) -> bytes:
    return hkdf(x25519(private, public), "pair-mask", digest + min(v, w) + max(v, w))


def stream(key: bytes, d: int, k: int) -> Vector:
    return decode_vector(aes_256_ctr(key, bytes(16), bytes(4 * d + 8 * k)), d, k)


def add(a: Vector, b: Vector, sign: int = 1) -> Vector:
    ring = [(x + sign * y) % 2**32 for x, y in zip(a[0], b[0], strict=True)]
    return ring, [(x + sign * y) % 2**64 for x, y in zip(a[1], b[1], strict=True)]


def mask(payload: Vector, v: int, recipients: Iterable[int], own: Vector, pairs: dict[int, Vector]) -> Vector:
    """payload + own stream + the streams shared with later recipients − those shared with earlier ones."""
    masked = add(payload, own)
    for w in recipients:
        if w != v:
            masked = add(masked, pairs[w], 1 if w > v else -1)
    return masked


def encode_vector(vector: Vector) -> bytes:
    """d + 2k little-endian u32: of each tail value the low, then the high half, so its u64."""
    return struct.pack(f"<{len(vector[0])}I{len(vector[1])}Q", *vector[0], *vector[1])


def decode_vector(data: bytes, d: int, k: int) -> Vector:
    check(len(data) == 4 * d + 8 * k, "malformed", "length of a vector")
    values = list(struct.unpack(f"<{d}I{k}Q", data))
    return values[:d], values[d:]


# ---- S8, S9. Exchanges 4 and 5 at a site; what it does in all five, in order


def statement(digest: bytes, recipients: bytes, survivors: bytes) -> bytes:
    return domain("survivors") + digest + recipients + survivors


def content_digest(binding: Binding, payload: Vector) -> bytes:
    """What a site knows a payload by. Its own bytes are not said in §S9: here, as a vector travels."""
    model = b"" if binding.purpose == 1 else binding.model_digest
    content = domain("content") + bytes([binding.purpose]) + model + binding.input_digest
    return h(content + encode_vector(payload))


@dataclass
class Memory:
    """What a site never forgets: of a sum its highest attempt and what it signed, of a payload how it was given."""

    attempts: dict[bytes, int] = field(default_factory=dict)
    signed: dict[bytes, bytes] = field(default_factory=dict)
    payloads: dict[bytes, list[Giving]] = field(default_factory=dict)


class Site:
    """One site in one attempt. Each exchange answers once: an identical instruction gets identical bytes again."""

    def __init__(
        self, identity: bytes, binding: Binding, policy: Policy, payload: Vector, random: Random, memory: Memory
    ):
        self.identity, self.id = identity, ed25519_public(identity)
        self.binding, self.payload, self.random, self.memory = binding, payload, random, memory
        self.policy = Policy(policy.active, policy.verified | {self.id}, policy.c, policy.min_sites)
        self.answers: dict[int, tuple[object, bytes]] = {}
        self.sum = binding.encode()[:21]
        self.given = memory.payloads.setdefault(content_digest(binding, payload), [])

    def _answer(self, exchange: int, instruction: object, make: Callable[[], bytes]) -> bytes:
        newest = self.memory.attempts.get(self.sum, 0)
        check(self.binding.attempt >= newest, "out-of-turn", "a higher attempt was answered")
        if exchange in self.answers:
            word = "survivors" if exchange == 4 else "out-of-turn"
            check(self.answers[exchange][0] == instruction, word, "another instruction was answered")
        else:
            check(all(earlier in self.answers for earlier in range(1, exchange)), "out-of-turn", "too early")
            reply = make()
            self.answers[exchange] = instruction, reply
        return self.answers[exchange][1]

    def keys(self) -> bytes:
        return self._answer(1, None, self._keys)

    def _keys(self) -> bytes:
        check(self.sum not in self.memory.signed, "out-of-turn", "signed survivors of this sum")
        check(self.binding.attempt > self.memory.attempts.get(self.sum, 0), "out-of-turn", "attempt was answered")
        self.memory.attempts[self.sum] = self.binding.attempt
        self.secrets = make_secrets(self.random)
        self.advert = make_advert(self.identity, self.binding.encode(), self.policy.min_survivors, self.secrets)
        return self.advert

    def shares(self, t: int, key_list: bytes) -> bytes:
        return self._answer(2, (t, key_list), lambda: self._shares(t, key_list))

    def _shares(self, t: int, key_list: bytes) -> bytes:
        self.adverts = check_key_list(t, key_list, self.advert, self.binding.max_sites, self.policy)
        self.t, self.n, self.digest = t, len(self.adverts), list_digest(t, key_list)
        self.number = 1 + [a.id for a in self.adverts].index(self.id)
        of_seed = share(self.secrets.self_seed, t, self.n, self.random)
        of_key = share(self.secrets.mask_key, t, self.n, self.random)
        self.pairs = {self.number: (of_seed[self.number - 1], of_key[self.number - 1])}
        reply = b""
        for a, seed_value, key_value in zip(self.adverts, of_seed, of_key, strict=True):
            if a.id != self.id:
                key = share_key(self.secrets.encryption_key, a.encryption_key, self.digest, self.id, a.id)
                reply += encrypt_pair(key, self.digest, self.id, a.id, encode_pair(seed_value, key_value))
        return reply

    def masked(self, recipients: bytes, ciphertexts: bytes) -> bytes:
        return self._answer(3, (recipients, ciphertexts), lambda: self._masked(recipients, ciphertexts))

    def _masked(self, recipients: bytes, ciphertexts: bytes) -> bytes:
        members = read_bitmap(recipients, self.n)
        others = [u for u in members if u != self.number]
        check(len(ciphertexts) == len(others) * CIPHERTEXT_BYTES, "malformed", "length of the ciphertexts")
        check(self.number in members, "own-keys")
        check_quorum(members, self.adverts, self.t, self.policy.min_sites, self.policy)
        opened, streams = {}, {}
        for at, u in enumerate(others):
            a, ciphertext = self.adverts[u - 1], ciphertexts[at * CIPHERTEXT_BYTES :][:CIPHERTEXT_BYTES]
            key = share_key(self.secrets.encryption_key, a.encryption_key, self.digest, a.id, self.id)
            opened[u] = decrypt_pair(key, self.digest, a.id, self.id, ciphertext)
            key = pair_key(self.secrets.mask_key, a.mask_key, self.digest, self.id, a.id)
            streams[u] = stream(key, self.binding.d, self.binding.k)
        now = Giving(self.t, frozenset(a.id for a in self.adverts))
        check_quorums_meet(now, self.given, self.policy)
        self.given.append(now)
        self.pairs |= opened
        self.recipients = recipients
        own = stream(self_key(self.secrets.self_seed, self.digest, self.id), self.binding.d, self.binding.k)
        return encode_vector(mask(self.payload, self.number, members, own, streams))

    def consistency(self, survivors: bytes) -> bytes:
        return self._answer(4, survivors, lambda: self._consistency(survivors))

    def _consistency(self, survivors: bytes) -> bytes:
        members = read_bitmap(survivors, self.n)
        recipients = read_bitmap(self.recipients, self.n)
        check(set(members) <= set(recipients), "malformed", "a survivor is no recipient")
        check(self.number in members, "own-keys")
        check_quorum(members, self.adverts, self.t, self.policy.min_sites, self.policy)
        wanted = max(self.adverts[i - 1].min_survivors for i in recipients)
        check(len(members) >= wanted, "threshold", "a recipient wants more survivors")
        said = statement(self.digest, self.recipients, survivors)
        check(self.memory.signed.get(self.sum, said) == said, "survivors")
        ids = frozenset(self.adverts[i - 1].id for i in members)
        check(all(giving.survivors in (None, ids) for giving in self.given), "difference", "other survivors before")
        self.memory.signed[self.sum] = said
        self.given.append(Giving(self.t, frozenset(a.id for a in self.adverts), ids))
        self.said, self.survivors = said, members
        return sign(self.identity, said)

    def unmask(self, signers: bytes, signatures: bytes) -> bytes:
        return self._answer(5, (signers, signatures), lambda: self._unmask(signers, signatures))

    def _unmask(self, signers: bytes, signatures: bytes) -> bytes:
        members = read_bitmap(signers, self.n)
        check(set(members) <= set(self.survivors), "malformed", "a signer is no survivor")
        check(len(signatures) == len(members) * SIGNATURE_BYTES, "malformed", "number of signatures")
        for at, i in enumerate(members):
            check_signature(self.adverts[i - 1].id, signatures[at * SIGNATURE_BYTES :][:SIGNATURE_BYTES], self.said)
        check_quorum(members, self.adverts, self.t, 0, self.policy)
        reply = b""
        for u in read_bitmap(self.recipients, self.n):
            of_seed, of_key = self.pairs[u]
            reply += (of_seed if u in self.survivors else of_key).to_bytes(VALUE_BYTES, "little")
        return reply


# ---- S9. The coordinator's recovery


def find_secret(points: dict[int, int], t: int, fits: Callable[[bytes], bool]) -> tuple[bytes, set[int]]:
    """The secret that t of the shares give, and the members whose share lies off their polynomial."""
    for subset in islice(combinations(points, t), 5000):
        chosen = {i: points[i] for i in subset}
        value = interpolate(chosen)
        if value < 2**256 and fits(value.to_bytes(32, "little")):
            return value.to_bytes(32, "little"), {i for i, y in points.items() if interpolate(chosen, i) != y}
    raise Refused("share", "no t shares give the secret")


def recover(
    t: int, key_list: bytes, recipients: bytes, survivors: bytes, masked: dict[int, bytes], answers: dict[int, bytes]
) -> tuple[Vector, set[tuple[int, int]]]:
    """The sum of the survivors' payloads, and who dealt and who answered with a share that did not fit.

    The specification has no words for the coordinator's failures; those here are the nearest of its tables.
    """
    adverts, digest = read_key_list(key_list), list_digest(t, key_list)
    binding, n = adverts[0].binding, len(adverts)
    d, k = struct.unpack_from("<QI", binding, 25)
    total: Vector = [0] * d, [0] * k
    alive, shared = read_bitmap(survivors, n), read_bitmap(recipients, n)
    for i in alive:
        total = add(total, decode_vector(masked[i], d, k))
    answers = {i: data for i, data in answers.items() if len(data) == VALUE_BYTES * len(shared)}
    check(len(answers) >= t, "threshold", "too few answers")
    misfits: set[tuple[int, int]] = set()
    for at, u in enumerate(shared):
        a = adverts[u - 1]
        points = {i: int.from_bytes(data[at * VALUE_BYTES :][:VALUE_BYTES], "little") for i, data in answers.items()}
        if u in alive:
            seed, off = find_secret(points, t, lambda s, a=a: commitment(s, binding, a.id) == a.commitment)
            total = add(total, stream(self_key(seed, digest, a.id), d, k), -1)
        else:
            key, off = find_secret(points, t, lambda s, a=a: x25519_public(s) == a.mask_key)
            for v in alive:
                other = adverts[v - 1]
                pair = stream(pair_key(key, other.mask_key, digest, a.id, other.id), d, k)
                total = add(total, pair, -1 if u > v else 1)
        misfits |= {(u, i) for i in off}
    return total, misfits


# ---- S10. Fixed point


def limit(max_sites: int) -> int:
    return (2**31 - 1) // max_sites


def scale(range_r: float, max_sites: int) -> float:
    return (limit(max_sites) - 1) / range_r


def rounding(seed: int, site: str, round_index: int, d: int) -> list[int]:
    """The u32 that round a site's update in one round (protocol.md §2, rule 7, for the key)."""
    labels = [f"i{seed}", "srounding", f"s{site}", f"i{round_index}"]
    named = b"".join(len(label.encode()).to_bytes(4, "little") + label.encode() for label in labels)
    key = hashlib.blake2b(b"wardround 1 stream" + named, digest_size=32).digest()
    return stream(key, d, 0)[0]


def quantise(
    x: Sequence[float], w: int, largest_w: int, range_r: float, max_sites: int, r: Sequence[int]
) -> tuple[list[int], int]:
    """The ring values of an update, and how many were clipped; r are the u32 of the rounding stream."""
    check(all(math.isfinite(value) for value in x), "update", "NaN or infinity")
    clipped = [min(max(value, -range_r), range_r) for value in x]
    values = [
        math.floor(value * (w / largest_w) * scale(range_r, max_sites) + u32 / 2**32) % 2**32
        for value, u32 in zip(clipped, r, strict=True)
    ]
    return values, sum(abs(value) > range_r for value in x)


def dequantise(ring: Sequence[int], range_r: float, max_sites: int) -> list[float]:
    return [(value - 2**32 if value >= 2**31 else value) / scale(range_r, max_sites) for value in ring]
