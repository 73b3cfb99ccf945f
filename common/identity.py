"""Who somebody is: an Ed25519 identity, its fingerprint, and the card by which a site makes itself known.

Used by both roles; docs/secure-sums.md §S1, §S2 is the specification. Pure: files are read in common/key_file.py.
Enters: random bytes, passphrases, cards as people send them by mail. Leaves: cards, fingerprints, signatures (public).
Private: the identity key, which never leaves the site that made it (encrypted at rest), and what is derived from it.

Formal Guarantees:
    A `Card` that the parser returned is signed by the key it names; on the card of a rotation, by both keys. A
    signature over one use's bytes is none over another's. No `repr`, error or pickle holds a private key or passphrase.

Not protected: that a name on a card is the hospital it says. Only comparing fingerprints with that hospital, by
telephone, does that. A weak passphrase falls to whoever has the file and enough time.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Never, Self, cast

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from .config import NAME
from .errors import ConfigError, VerificationError
from .secagg.keys import KEY_BYTES, SIGNATURE_BYTES, digest, domain, hkdf

USE_CARD, USE_FINGERPRINT, USE_STORAGE = "card", "fingerprint", "storage"
CARD_KIND = "wardround-card/1"
MAX_CARD_BYTES = 4096
MIN_PASSPHRASE_BYTES = 12

_FINGERPRINT_BYTES = 20
# PKCS#8 as OpenSSL writes it stretches a passphrase by 2048 rounds of PBKDF2, 0.7 ms a guess. scrypt goes before it:
# 0.15 s and 32 MiB. The header's id finds a damaged file, for the encryption itself is not authenticated.
_SCRYPT = {"n": 2**15, "r": 8, "p": 1}
_HEADER = re.compile(rb"wardround-key/1 scrypt ([0-9a-f]{32}) id ([0-9a-f]{64})\n")
_PEM_START = b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n"
# Curve points of order 1, 2, 4 and 8 by their y (RFC 8032 §5.1): under such a key anybody can sign.
_P = 2**255 - 19
_Y8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
_LOW_ORDER_Y = frozenset({0, 1, _P - 1, _Y8, _P - _Y8})


class Identity:
    """An Ed25519 key pair, of a site or of the coordinator; it cannot be pickled, and its `repr` shows no secret."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.key = key
        self.id = key.public_key().public_bytes_raw()

    @classmethod
    def generate(cls) -> Self:
        """A new one, from the system's generator."""
        return cls.from_seed(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_seed(cls, seed: bytes) -> Self:
        """The one of a private key of RFC 8032, 32 bytes."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, use: str, message: bytes) -> bytes:
        """64 bytes over the use's domain and the message: no signature can be taken for one of another use."""
        return self.key.sign(domain(use) + message)

    @property
    def fingerprint(self) -> str:
        """Of the public key, as people compare it."""
        return fingerprint(self.id)

    def storage_key(self) -> bytes:
        """32 bytes that encrypt the site's own state (§S1)."""
        return hkdf(self.key.private_bytes_raw(), USE_STORAGE)

    def lock(self, passphrase: bytes) -> bytes:
        """The private key as a file: a header line and encrypted PKCS#8 in PEM.

        Raises:
            ConfigError: the passphrase is shorter than `MIN_PASSPHRASE_BYTES`.
        """
        if len(passphrase) < MIN_PASSPHRASE_BYTES:
            raise ConfigError(f"passphrase: expected at least {MIN_PASSPHRASE_BYTES} characters")
        salt = secrets.token_bytes(16)
        encryption = BestAvailableEncryption(_stretch(passphrase, salt))
        pem = self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)
        return f"wardround-key/1 scrypt {salt.hex()} id {self.id.hex()}\n".encode() + pem

    @classmethod
    def unlock(cls, data: bytes, passphrase: bytes, source: str) -> Self:
        """The inverse of `lock`.

        Args:
            data: the file.
            passphrase: it is encrypted with.
            source: what to call the file in an error.

        Raises:
            ConfigError: wrong passphrase, damaged, not encrypted, not such a file.
        """
        header = _HEADER.match(data)
        if header is None or not data[header.end() :].startswith(_PEM_START):
            raise ConfigError(f"{source}: expected an encrypted identity key; restore the file from a copy")
        salt, public = (bytes.fromhex(part.decode()) for part in header.groups())
        try:
            key = load_pem_private_key(data[header.end() :], _stretch(passphrase, salt))
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ConfigError(f"{source}: wrong passphrase, or the file is damaged") from None
        if not isinstance(key, Ed25519PrivateKey) or key.public_key().public_bytes_raw() != public:
            raise ConfigError(f"{source}: damaged: it does not hold the key it names; restore the file from a copy")
        return cls(key)

    @staticmethod
    def public_of(data: bytes, source: str) -> bytes:
        """The id that a file says it holds the key of; needs no passphrase, and proves nothing.

        Raises:
            ConfigError: not such a file.
        """
        header = _HEADER.match(data)
        if header is None:
            raise ConfigError(f"{source}: expected an encrypted identity key; restore the file from a copy")
        return bytes.fromhex(header[2].decode())

    def __repr__(self) -> str:
        return f"Identity({self.fingerprint})"

    def __reduce__(self) -> Never:
        raise TypeError("an identity is not copied or pickled: its private key stays where it is")


def _stretch(passphrase: bytes, salt: bytes) -> bytes:
    return Scrypt(salt=salt, length=KEY_BYTES, **_SCRYPT).derive(passphrase).hex().encode()


def verify(public: bytes, use: str, message: bytes, signature: bytes, what: str) -> None:
    """Checks a signature that `Identity.sign` made.

    Raises:
        VerificationError: it is none of this key over this.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, domain(use) + message)
    except (InvalidSignature, ValueError):
        raise VerificationError(f"{what}: wrong signature: it was changed, or signed by another key") from None


def fingerprint(public: bytes) -> str:
    """The fingerprint of a public key as people compare it by telephone (§S2).

    >>> fingerprint(bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"))
    'U2PO NJP6 VNFL FDBD 2DTH 5X6P LCSE MIS7'
    """
    plain = base64.b32encode(digest(USE_FINGERPRINT, public)[:_FINGERPRINT_BYTES]).decode()
    return " ".join(plain[i : i + 4] for i in range(0, len(plain), 4))


# ---- site card


@dataclass(frozen=True)
class Card:
    """A site's card (§S2): its name and id, signed with its identity key.

    Attributes:
        name: for people, as in site.toml.
        id: Ed25519 public key, 32 bytes.
        signature: of `id`'s key.
        previous: the id that a rotated site had until now; empty on an ordinary card.
        previous_signature: of that key, over the same.
    """

    name: str
    id: bytes
    signature: bytes
    previous: bytes = b""
    previous_signature: bytes = b""

    def __post_init__(self) -> None:
        check_name(self.name, "card: name")
        check_id(self.id, f"card of {self.name}: id")
        if self.previous:
            check_id(self.previous, f"card of {self.name}: previous")
            if self.previous == self.id:
                raise ConfigError(f"card of {self.name}: previous: expected another key than the new one")

    @classmethod
    def make(cls, identity: Identity, name: str, previous: Identity | None = None) -> Self:
        """A site's card; with the identity it had until now, the card of a rotation, signed by both.

        Raises:
            ConfigError: not a site's name.
        """
        check_name(name, "card: name")
        said = _card_statement(name, identity.id)
        card = cls(name, identity.id, identity.sign(USE_CARD, said))
        if previous is None:
            return card
        return replace(card, previous=previous.id, previous_signature=previous.sign(USE_CARD, said))

    @property
    def fingerprint(self) -> str:
        """As people compare it."""
        return fingerprint(self.id)

    def verify(self) -> None:
        """Checks the signature, on a rotation's card both.

        Raises:
            VerificationError: one is wrong.
        """
        said = _card_statement(self.name, self.id)
        verify(self.id, USE_CARD, said, self.signature, f"card of {self.name}")
        if self.previous or self.previous_signature:
            verify(self.previous, USE_CARD, said, self.previous_signature, f"card of {self.name}, previous key")

    def to_json(self) -> str:
        """The file."""
        content = {"kind": CARD_KIND, "name": self.name, "id": self.id.hex(), "signature": self.signature.hex()}
        if self.previous:
            content |= {"previous": self.previous.hex(), "previous_signature": self.previous_signature.hex()}
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def parse(cls, data: bytes, source: str) -> Self:
        """A card from its file, signatures checked.

        Args:
            data: the file.
            source: what to call it in an error.

        Raises:
            ConfigError: not a card.
            VerificationError: a wrong signature.
        """
        content = json_object(data, source, CARD_KIND, MAX_CARD_BYTES)
        keys, rotation = {"kind", "name", "id", "signature"}, {"previous", "previous_signature"}
        rotated = not rotation.isdisjoint(content)
        check_keys(content, keys | rotation if rotated else keys, source)
        sizes = {"id": KEY_BYTES, "signature": SIGNATURE_BYTES}
        if rotated:
            sizes |= {"previous": KEY_BYTES, "previous_signature": SIGNATURE_BYTES}
        fields = {key: hex_bytes(content[key], size, f"{source}: {key}") for key, size in sizes.items()}
        card = cls(check_name(content["name"], f"{source}: name"), **fields)
        card.verify()
        return card


def _card_statement(name: str, public: bytes) -> bytes:
    return hashlib.sha256(name.encode()).digest() + public


# ---- checks of what comes in


def check_name(value: object, source: str) -> str:
    if not isinstance(value, str) or re.fullmatch(NAME, value) is None:
        raise ConfigError(f"{source}: expected 1 to 64 of letters, digits, '.', '_', '-', got {value!r:.70}")
    return value


def check_id(public: bytes, what: str) -> None:
    """A key in its one canonical encoding that is not of low order; whether somebody holds it, signatures show."""
    if len(public) != KEY_BYTES:
        raise ConfigError(f"{what}: expected {KEY_BYTES} bytes, got {len(public)}")
    y = int.from_bytes(public, "little") & (2**255 - 1)
    if y >= _P or y in _LOW_ORDER_Y:
        raise ConfigError(f"{what}: not an Ed25519 key that anybody can hold alone")


def hex_bytes(value: object, size: int, what: str) -> bytes:
    if not isinstance(value, str) or re.fullmatch(f"[0-9a-f]{{{2 * size}}}", value) is None:
        raise ConfigError(f"{what}: expected {2 * size} hexadecimal digits, got {value!r:.70}")
    return bytes.fromhex(value)


def check_keys(content: Mapping[str, Any], expected: set[str], source: str) -> None:
    if wrong := sorted(set(content) ^ expected):
        raise ConfigError(f"{source}: expected the keys {', '.join(sorted(expected))}; wrong: {wrong[0]!r:.40}")


def json_object(data: bytes, source: str, kind: str, most: int) -> dict[str, Any]:
    """A small JSON object of a kind, in which no key is there twice (readers differ in which of the two they take)."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise ValueError("a key is there twice")
        return content

    if len(data) > most:
        raise ConfigError(f"{source}: expected at most {most} bytes, got {len(data)}")
    try:
        content: Any = json.loads(data.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise ConfigError(f"{source}: expected JSON ({kind}), as it was sent") from None
    got: Any = cast("dict[str, Any]", content).get("kind") if isinstance(content, dict) else None
    if got != kind:
        raise ConfigError(f"{source}: expected '{kind}', got {got!r:.60}")
    return cast("dict[str, Any]", content)
