"""A site's side of a secure sum: what it answers to each exchange, and what it must not forget in between.

Run by the site, called by client/sharing.py, which keeps the state on disk between messages (docs/secure-sums.md
§S5–§S9). Pure: a state and a request give a new state and a reply, or a `SumError` and nothing. Enters: adverts,
ciphertexts, bitmaps, signatures. Leaves: the same kinds of bytes. Private: `ClientSum` holds keys and shares; its
`repr` shows none.

Each exchange is answered once an attempt: the identical request gets the identical reply, another one is refused. No
member's self seed and mask key are both given away; that and the survivors' signature are what a coordinator that lies
cannot get around.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import ProtocolError, SumError
from . import shamir
from .keys import (
    SIGNATURE_BYTES,
    USE_PAIR_MASK,
    USE_SELF_MASK,
    USE_SHARE,
    USE_SHARE_KEY,
    USE_SURVIVORS,
    Advert,
    AttemptKeys,
    Binding,
    Giving,
    KeyList,
    Random,
    agree,
    domain,
    hkdf,
    members_of,
    pieces,
    quorums_meet,
    verify,
)

SHARE_PAIR_BYTES = 2 * shamir.VALUE_BYTES
CIPHERTEXT_BYTES = SHARE_PAIR_BYTES + 16  # with GCM's tag
_NONCE = bytes(12)  # a share key encrypts one message

IDLE, KEYS, SHARES, MASKED, SIGNED, UNMASKED = range(6)  # the last exchange that was answered


@dataclass(frozen=True)
class Membership:
    """Whom this site deals with, from its pinned roster and its policy.

    Attributes:
        active: ids of active members.
        verified: ids whose fingerprint this hospital compared with that one, and its own.
        colluders: c.
        min_sites: fewest verified survivors.
    """

    active: frozenset[bytes]
    verified: frozenset[bytes]
    colluders: int
    min_sites: int

    @property
    def min_survivors(self) -> int:
        """What everybody who signs must respect: as if all unverified members were among the survivors."""
        return self.min_sites + len(self.active - self.verified)


@dataclass(frozen=True)
class ClientSum:
    """What a site keeps of one sum: the newest attempt's stage and secrets. Empty before the first attempt.

    Attributes:
        stage: the last exchange answered in the newest attempt; from SIGNED on there is no other attempt.
        advert: this site's, as sent.
        secrets: keys of the attempt; None before it and after UNMASKED.
        threshold, key_list: of exchange 2.
        own_shares: this site's own share pair of its own secrets.
        recipients: bitmap.
        shares: the share pairs that the recipients made for this site, in order; its own among them.
        survivors: bitmap.
        content: digest of the payload that was masked (§S9), set by the caller, who masks it.
        requests, replies: of exchanges 2 (shares), 4 (consistency) and 5 (unmask): SHA-256 and the bytes given. Of
            exchange 3 only the request: its reply is computed again from the stored payload.
    """

    stage: int = IDLE
    advert: bytes = b""
    secrets: AttemptKeys | None = field(default=None, repr=False)
    threshold: int = 0
    key_list: bytes = field(default=b"", repr=False)
    own_shares: bytes = field(default=b"", repr=False)
    recipients: bytes = b""
    shares: tuple[bytes, ...] = field(default=(), repr=False)
    survivors: bytes = b""
    content: bytes = b""
    requests: Mapping[int, bytes] = field(default_factory=dict[int, bytes])
    replies: Mapping[int, bytes] = field(default_factory=dict[int, bytes], repr=False)

    @property
    def attempt(self) -> int:
        """The newest attempt, 0 before the first."""
        return Advert.from_bytes(self.advert).binding.attempt if self.advert else 0

    @property
    def list(self) -> KeyList:
        """The key list of the attempt, once exchange 2 was answered."""
        return KeyList.from_bytes(self.threshold, self.key_list)

    @property
    def survivor_ids(self) -> tuple[bytes, ...]:
        """Ids of the survivors that were signed."""
        key_list = self.list
        return tuple(key_list.ids[member] for member in members_of(self.survivors, key_list.n))

    def to_json(self) -> str:
        """Everything, as text: to be encrypted before it touches a disk."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        return json.dumps(_plain(values), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ClientSum:
        """The inverse of `to_json`."""
        values = json.loads(text)
        secrets = values["secrets"]
        return cls(
            stage=values["stage"],
            threshold=values["threshold"],
            secrets=None if secrets is None else AttemptKeys(*(_raw(secrets[key]) for key in _SECRETS)),
            shares=tuple(_raw(item) for item in values["shares"]),
            requests={int(key): _raw(item) for key, item in values["requests"].items()},
            replies={int(key): _raw(item) for key, item in values["replies"].items()},
            **{
                key: _raw(values[key])
                for key in ("advert", "key_list", "own_shares", "recipients", "survivors", "content")
            },
        )


_SECRETS = tuple(item.name for item in fields(AttemptKeys))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, AttemptKeys):
        return {key: _plain(getattr(value, key)) for key in _SECRETS}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
    if isinstance(value, tuple):
        return [_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def _raw(text: str) -> bytes:
    return base64.b64decode(text)


@dataclass(frozen=True)
class MaskKeys:
    """Keys of the streams that hide this site's payload: `plus` are added, `minus` subtracted."""

    plus: tuple[bytes, ...] = field(repr=False)
    minus: tuple[bytes, ...] = field(repr=False)


def advertise(
    state: ClientSum, members: Membership, binding: Binding, identity: Ed25519PrivateKey, random: Random
) -> tuple[ClientSum, bytes]:
    """Exchange 1 (§S5): fresh keys for a new attempt, and the advert of them.

    Raises:
        SumError: "out-of-turn": not newer than the last attempt, or survivors were signed for this sum already.
    """
    if state.advert:
        last = Advert.from_bytes(state.advert).binding
        if last == binding:
            return state, state.advert
        if binding.attempt <= last.attempt:
            raise SumError("out-of-turn", f"attempt {binding.attempt}: attempt {last.attempt} was answered already")
        if state.stage >= SIGNED:
            raise SumError("out-of-turn", f"attempt {binding.attempt}: survivors were signed for this sum already")
    secrets = AttemptKeys.fresh(random)
    advert = Advert.make(binding, members.min_survivors, secrets, identity).to_bytes()
    return ClientSum(stage=KEYS, advert=advert, secrets=secrets), advert


def share(
    state: ClientSum, members: Membership, threshold: int, key_list: bytes, random: Random
) -> tuple[ClientSum, bytes]:
    """Exchange 2 (§S6): checks everybody's keys, then shares this site's secrets with them.

    Returns:
        The new state; n − 1 ciphertexts in order of recipients.

    Raises:
        SumError: the first check of §S6 that does not hold; "out-of-turn".
    """
    request = _request(struct.pack("<q", threshold), key_list)
    if (reply := _repeated(state, SHARES, request)) is not None:
        return state, reply
    own, secrets = Advert.from_bytes(state.advert), _secrets(state)
    keys = KeyList.from_bytes(threshold, key_list, own.binding.max_sites)
    keys.check(own, members.active, members.verified, members.colluders, members.min_sites)
    me, n = keys.index(own.id), keys.n
    columns = [
        shamir.share(int.from_bytes(secret, "little"), threshold, n, random)
        for secret in (secrets.self_seed, secrets.mask_key)
    ]
    pairs = [b"".join(shamir.to_bytes(column[member]) for column in columns) for member in range(n)]
    sealed = b"".join(
        AESGCM(_share_key(keys, secrets, me, member, sending=True)).encrypt(
            _NONCE, pairs[member], _share_data(keys, me, member)
        )
        for member in range(n)
        if member != me
    )
    after = replace(state, stage=SHARES, threshold=threshold, key_list=key_list, own_shares=pairs[me])
    return _answered(after, SHARES, request, sealed), sealed


def mask(
    state: ClientSum,
    members: Membership,
    recipients: bytes,
    ciphertexts: bytes,
    given: Sequence[Giving] = (),
) -> tuple[ClientSum, MaskKeys]:
    """Exchange 3 (§S7): opens the others' shares; the keys of the masks. The caller masks the stored payload with them.

    Args:
        state: with exchange 2 answered.
        members: whom this site deals with.
        recipients: bitmap.
        ciphertexts: of the other recipients, in order.
        given: how this very payload was given before, in other attempts and other sums.

    Raises:
        SumError: "malformed", "own-keys", "threshold", "share", "difference", "out-of-turn".
    """
    request = _request(recipients, ciphertexts)
    if state.stage in (MASKED, SIGNED) and state.requests.get(MASKED) == request:
        return state, _mask_keys(state)
    if state.stage != SHARES:
        raise SumError("out-of-turn", "masked vector: not the exchange that comes next, or another request than before")
    keys, secrets = state.list, _secrets(state)
    me = keys.index(Advert.from_bytes(state.advert).id)
    taking = members_of(recipients, keys.n)
    others = [member for member in taking if member != me]
    received = pieces(ciphertexts, len(others), CIPHERTEXT_BYTES, "shares")
    if me not in taking:
        raise SumError("own-keys", "recipients: this site is not among them")
    _enough(keys, members, taking, "recipients")
    opened: dict[int, bytes] = {me: state.own_shares}
    for member, sealed in zip(others, received, strict=True):
        try:
            pair = AESGCM(_share_key(keys, secrets, me, member, sending=False)).decrypt(
                _NONCE, sealed, _share_data(keys, member, me)
            )
            for value in pieces(pair, 2, shamir.VALUE_BYTES, "share pair"):
                shamir.from_bytes(value)
        except (InvalidTag, ProtocolError, SumError):
            raise SumError("share", f"the share of member {member + 1} was not made for this attempt") from None
        opened[member] = pair
    now = Giving(keys.threshold, frozenset(keys.ids))
    if not all(quorums_meet(before, now, members.verified, members.colluders) for before in given):
        raise SumError("difference", "the same vector was given under another key list, and both sums could be had")
    after = replace(
        state,
        stage=MASKED,
        recipients=recipients,
        shares=tuple(opened[member] for member in taking),
        requests={**state.requests, MASKED: request},
    )
    return after, _mask_keys(after)


def sign(
    state: ClientSum,
    members: Membership,
    survivors: bytes,
    identity: Ed25519PrivateKey,
    given: Sequence[Giving] = (),
) -> tuple[ClientSum, bytes]:
    """Exchange 4 (§S8): agrees to one set of survivors, once and for all for this sum.

    Args:
        state: with exchange 3 answered.
        members: whom this site deals with.
        survivors: bitmap.
        identity: signs.
        given: how this very payload was given before, in other attempts and other sums.

    Raises:
        SumError: "malformed", "own-keys", "threshold", "survivors", "difference", "out-of-turn".
    """
    request = _request(survivors)
    if (reply := _repeated(state, SIGNED, request)) is not None:
        return state, reply
    keys = state.list
    me, taking = keys.index(Advert.from_bytes(state.advert).id), members_of(state.recipients, keys.n)
    alive = members_of(survivors, keys.n)
    if not set(alive) <= set(taking):
        raise SumError("malformed", "survivors: not all of them are recipients")
    if me not in alive:
        raise SumError("own-keys", "survivors: this site is not among them")
    _enough(keys, members, alive, "survivors")
    wanted = max(keys.adverts[member].min_survivors for member in taking)
    if len(alive) < wanted:
        raise SumError("threshold", f"survivors: {len(alive)}, and a recipient wants at least {wanted}")
    ids = tuple(keys.ids[member] for member in alive)
    if any(before.survivors not in ((), ids) for before in given):
        raise SumError("difference", "survivors: the same vector was added up with others before")
    signature = identity.sign(statement(keys, state.recipients, survivors))
    after = replace(state, stage=SIGNED, survivors=survivors)
    return _answered(after, SIGNED, request, signature), signature


def unmask(state: ClientSum, members: Membership, signers: bytes, signatures: bytes) -> tuple[ClientSum, bytes]:
    """Exchange 5 (§S9): a share of each survivor's self seed and of each other recipient's mask key; then forgets.

    Raises:
        SumError: "malformed", "signature", "threshold", "out-of-turn".
    """
    request = _request(signers, signatures)
    if (reply := _repeated(state, UNMASKED, request)) is not None:
        return state, reply
    keys = state.list
    alive, signing = members_of(state.survivors, keys.n), members_of(signers, keys.n)
    if not set(signing) <= set(alive):
        raise SumError("malformed", "signers: not all of them are survivors")
    signed = statement(keys, state.recipients, state.survivors)
    for member, signature in zip(signing, pieces(signatures, len(signing), SIGNATURE_BYTES, "signatures"), strict=True):
        verify(keys.ids[member], signature, signed, f"survivors' statement of member {member + 1}")
    trusted = sum(keys.ids[member] in members.verified for member in signing)
    if trusted < keys.threshold:
        raise SumError("threshold", f"{trusted} verified signers, expected at least {keys.threshold}")
    answer = b"".join(
        pair[: shamir.VALUE_BYTES] if member in alive else pair[shamir.VALUE_BYTES :]
        for member, pair in zip(members_of(state.recipients, keys.n), state.shares, strict=True)
    )
    forgotten = replace(state, stage=UNMASKED, secrets=None, own_shares=b"", shares=())
    return _answered(forgotten, UNMASKED, request, answer), answer


def statement(keys: KeyList, recipients: bytes, survivors: bytes) -> bytes:
    """What survivors sign (§S8)."""
    return domain(USE_SURVIVORS) + keys.digest + recipients + survivors


def self_key(keys: KeyList, self_seed: bytes, member: int) -> bytes:
    """Key of the stream that hides one member's payload until its seed is reconstructed (§S7)."""
    return hkdf(self_seed, USE_SELF_MASK, keys.digest + keys.ids[member])


def pair_key(keys: KeyList, mask_key: bytes, owner: int, other: int) -> bytes:
    """Key of the stream that the lower of two members adds and the higher subtracts (§S7)."""
    return hkdf(agree(mask_key, keys.adverts[other].mask_key), USE_PAIR_MASK, keys.pair(owner, other))


def _mask_keys(state: ClientSum) -> MaskKeys:
    keys, secrets = state.list, _secrets(state)
    me = keys.index(Advert.from_bytes(state.advert).id)
    others = [member for member in members_of(state.recipients, keys.n) if member != me]
    pairs = {member: pair_key(keys, secrets.mask_key, me, member) for member in others}
    plus = (self_key(keys, secrets.self_seed, me), *(pairs[member] for member in others if member > me))
    return MaskKeys(plus, tuple(pairs[member] for member in others if member < me))


def _share_key(keys: KeyList, secrets: AttemptKeys, me: int, other: int, *, sending: bool) -> bytes:
    ends = (keys.ids[me], keys.ids[other]) if sending else (keys.ids[other], keys.ids[me])
    shared = agree(secrets.encryption_key, keys.adverts[other].encryption_key)
    return hkdf(shared, USE_SHARE_KEY, keys.digest + b"".join(ends))


def _share_data(keys: KeyList, sender: int, recipient: int) -> bytes:
    return domain(USE_SHARE) + keys.digest + keys.ids[sender] + keys.ids[recipient]


def _enough(keys: KeyList, members: Membership, chosen: Collection[int], what: str) -> None:
    verified = sum(keys.ids[member] in members.verified for member in chosen)
    least = max(keys.threshold, members.min_sites)
    if verified < least:
        raise SumError("threshold", f"{what}: {verified} of {len(chosen)} are verified, expected at least {least}")


def _secrets(state: ClientSum) -> AttemptKeys:
    if state.secrets is None:
        raise SumError("out-of-turn", "the keys of this attempt are forgotten, or there were none yet")
    return state.secrets


def _request(*parts: bytes) -> bytes:
    state = hashlib.sha256()
    for part in parts:
        state.update(struct.pack("<Q", len(part)) + part)
    return state.digest()


def _repeated(state: ClientSum, exchange: int, request: bytes) -> bytes | None:
    """The reply that this request got before; None when the exchange is the next one."""
    if state.requests.get(exchange) == request:
        return state.replies[exchange]
    if state.stage == exchange - 1:
        return None
    # Survivors are the one request whose second version is an attack by itself, so it has a word of its own.
    word = "survivors" if exchange == SIGNED and SIGNED in state.requests else "out-of-turn"
    raise SumError(word, "not the exchange that comes next, or another request than the one that was answered")


def _answered(state: ClientSum, exchange: int, request: bytes, reply: bytes) -> ClientSum:
    return replace(state, requests={**state.requests, exchange: request}, replies={**state.replies, exchange: reply})
