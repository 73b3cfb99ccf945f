"""How a hospital joins a consortium: its signed application, and the coordinator's signed invitation.

Used by both roles: the hospital writes an application (`wardround client init`), the coordinator reads it (`wardround
server enroll`) and answers with an invitation (`wardround server invite`), which the hospital pins (`wardround client
join`). Pure. Enters and leaves: small JSON files that people send by mail; nothing in them is secret. Private: nothing.

Formal Guarantees:
    A parsed `Application` is signed by the id on its card, over the card, the node key and the versions. A parsed
    `Invitation` is signed by the coordinator that it and its roster name; its roster has that coordinator's signature
    and shows the invited site's id as an active member.

Not protected: who the coordinator is. People compare its fingerprint by telephone, once, as with a roster
(docs/secure-sums.md §S2).
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any, Self

from .bundle import wardround_version
from .errors import ConfigError, VerificationError
from .identity import Card, Identity, check_id, check_keys, check_name, fingerprint, hex_bytes, json_object, verify
from .messages import PROTOCOL_VERSION
from .roster import MAX_ROSTER_BYTES, Roster
from .secagg.keys import KEY_BYTES, SIGNATURE_BYTES

USE_APPLICATION, USE_INVITATION = "application", "invitation"
APPLICATION_KIND, INVITATION_KIND = "wardround-application/1", "wardround-invitation/1"
DIGEST_BYTES = 32
_MAX_APPLICATION_BYTES = 16_384
_MAX_INVITATION_BYTES = 2 * MAX_ROSTER_BYTES
# The key by which a SuperNode proves to the SuperLink who it is: Flower takes OpenSSH lines of this one kind.
_NODE_KEY = re.compile(r"ecdsa-sha2-nistp(256|384|521) [A-Za-z0-9+/=]{80,400}")
_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9.-]{1,253}|\[[0-9a-fA-F:]{2,45}\]):(?P<port>[0-9]{1,5})")
_VERSION = re.compile(r"[0-9A-Za-z.+!-]{1,40}")
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----\n[A-Za-z0-9+/=\n]{100,20000}-----END CERTIFICATE-----\n")


def check_address(text: object, source: str) -> tuple[str, int]:
    """Host and port of "host:port"; an IPv6 host is in brackets.

    >>> check_address("coordinator.example.org:9092", "address")
    ('coordinator.example.org', 9092)

    Raises:
        ConfigError: neither.
    """
    found = _ADDRESS.fullmatch(text) if isinstance(text, str) else None
    if found is None or not 1 <= int(found["port"]) <= 65535:
        raise ConfigError(f"{source}: expected HOST:PORT, got {text!r:.80}")
    return found["host"].strip("[]"), int(found["port"])


@dataclass(frozen=True)
class Application:
    """What a hospital sends to take part.

    Attributes:
        card: its site card.
        node_key: its SuperNode's public key, one OpenSSH line without a comment.
        wardround: the version installed there.
        protocol: the protocol version of that.
        signature: of the card's id, over all of it.
    """

    card: Card
    node_key: str
    wardround: str
    protocol: int
    signature: bytes = b""

    def __post_init__(self) -> None:
        what = f"application of {self.card.name}"
        if _NODE_KEY.fullmatch(self.node_key) is None:
            raise ConfigError(f"{what}: node_key: expected an OpenSSH public key of kind ecdsa-sha2-nistp384")
        _check_versions(self.wardround, self.protocol, what)

    @classmethod
    def make(cls, identity: Identity, card: Card, node_key: str) -> Self:
        """A site's application, signed.

        Raises:
            ConfigError: not a node's public key.
            VerificationError: another site's card.
        """
        if card.id != identity.id:
            raise VerificationError(f"application of {card.name}: the card is of another key than the one that signs")
        made = cls(card, node_key, wardround_version(), PROTOCOL_VERSION)
        return replace(made, signature=identity.sign(USE_APPLICATION, made._statement()))

    def verify(self) -> None:
        """Checks the card's signature and the application's.

        Raises:
            VerificationError: one is wrong.
        """
        self.card.verify()
        verify(self.card.id, USE_APPLICATION, self._statement(), self.signature, f"application of {self.card.name}")

    def to_json(self) -> str:
        """The file."""
        return json.dumps({**self._content(), "signature": self.signature.hex()}, indent=1) + "\n"

    @classmethod
    def parse(cls, data: bytes, source: str) -> Self:
        """An application from its file, signatures checked.

        Raises:
            ConfigError: not an application.
            VerificationError: a wrong signature.
        """
        content = json_object(data, source, APPLICATION_KIND, _MAX_APPLICATION_BYTES)
        check_keys(content, {"kind", "card", "node_key", "wardround", "protocol", "signature"}, source)
        _check_kinds(content, {"card": dict, "node_key": str, "wardround": str, "protocol": int}, source)
        made = cls(
            Card.parse(json.dumps(content["card"]).encode(), f"{source}: card"),
            content["node_key"],
            content["wardround"],
            content["protocol"],
            hex_bytes(content["signature"], SIGNATURE_BYTES, f"{source}: signature"),
        )
        made.verify()
        return made

    def _content(self) -> dict[str, Any]:
        return {
            "kind": APPLICATION_KIND,
            "card": json.loads(self.card.to_json()),
            "node_key": self.node_key,
            "wardround": self.wardround,
            "protocol": self.protocol,
        }

    def _statement(self) -> bytes:
        return _canonical(self._content())


@dataclass(frozen=True)
class Invitation:
    """What the coordinator sends to a hospital that it enrolled.

    Attributes:
        site: the hospital's name on the roster.
        site_id: its id there.
        address: of the SuperLink, "host:port".
        ca_certificate: PEM, the only authority by which a site trusts that address.
        roster: the roster as a file's text; its digest is what the site pins.
        bundle_digest: SHA-256 of the bundle that runs are started with.
        wardround: the coordinator's version.
        protocol: the protocol version of that.
        signature: of the coordinator, over all of it.
    """

    site: str
    site_id: bytes
    address: str
    ca_certificate: str
    roster: str
    bundle_digest: bytes
    wardround: str
    protocol: int
    signature: bytes = b""

    def __post_init__(self) -> None:
        what = "invitation"
        check_name(self.site, f"{what}: site")
        check_id(self.site_id, f"{what}: site_id")
        check_address(self.address, f"{what}: address")
        if _CERTIFICATE.fullmatch(self.ca_certificate) is None:
            raise ConfigError(f"{what}: ca_certificate: expected one certificate in PEM")
        if len(self.bundle_digest) != DIGEST_BYTES:
            raise ConfigError(f"{what}: bundle_digest: expected {DIGEST_BYTES} bytes, got {len(self.bundle_digest)}")
        _check_versions(self.wardround, self.protocol, what)

    @classmethod
    def make(
        cls, identity: Identity, roster: Roster, site: str, address: str, ca_certificate: str, bundle_digest: bytes
    ) -> Self:
        """The invitation of an active member, signed by the roster's coordinator.

        Raises:
            ConfigError: no active member of that name; an address or a certificate that is none.
            VerificationError: another coordinator's roster.
        """
        if identity.id != roster.coordinator:
            raise VerificationError("invitation: the roster is another coordinator's")
        member = next((member for member in roster.members if member.name == site and member.active), None)
        if member is None:
            known = ", ".join(member.name for member in roster.members if member.active)
            raise ConfigError(f"invitation: '{site}': expected an active member of roster {roster.serial}: {known}")
        made = cls(
            site,
            member.id,
            address,
            ca_certificate,
            roster.to_json(),
            bundle_digest,
            wardround_version(),
            PROTOCOL_VERSION,
        )
        return replace(made, signature=identity.sign(USE_INVITATION, made._statement()))

    def pinned(self) -> Roster:
        """The roster, signature checked.

        Raises:
            ConfigError, VerificationError: not a roster, or not its coordinator's.
        """
        return Roster.parse(self.roster.encode(), "invitation: roster")

    def verify(self) -> None:
        """Checks the roster, that the site is on it, and the signature of the roster's coordinator.

        Raises:
            ConfigError: the roster is none.
            VerificationError: a wrong signature; the site is no active member under its id.
        """
        roster = self.pinned()
        verify(roster.coordinator, USE_INVITATION, self._statement(), self.signature, f"invitation of {self.site}")
        if not any(one.name == self.site and one.id == self.site_id and one.active for one in roster.members):
            raise VerificationError(f"invitation of {self.site}: the roster in it does not show this site as active")

    @property
    def coordinator_fingerprint(self) -> str:
        """As people compare it by telephone."""
        return fingerprint(self.pinned().coordinator)

    def check_versions(self) -> None:
        """Refuses what this installation cannot talk to, with both versions in the line.

        Raises:
            ConfigError: another protocol, or another wardround: the bundle that is pinned names one of each.
        """
        if self.protocol != PROTOCOL_VERSION:
            raise ConfigError(
                f"invitation: the coordinator speaks protocol {self.protocol} (wardround {self.wardround}), this site "
                f"protocol {PROTOCOL_VERSION} (wardround {wardround_version()}): install the coordinator's version"
            )
        if self.wardround != wardround_version():
            raise ConfigError(
                f"invitation: the coordinator runs wardround {self.wardround}, this site {wardround_version()}: "
                "install the same version at both, or ask for a new invitation"
            )

    def to_json(self) -> str:
        """The file."""
        return json.dumps({**self._content(), "signature": self.signature.hex()}, indent=1) + "\n"

    @classmethod
    def parse(cls, data: bytes, source: str) -> Self:
        """An invitation from its file, signatures checked.

        Raises:
            ConfigError: not an invitation.
            VerificationError: a wrong signature, or not for a member of its roster.
        """
        content = json_object(data, source, INVITATION_KIND, _MAX_INVITATION_BYTES)
        fields = {field.name for field in dataclass_fields(cls)}
        check_keys(content, {"kind", *fields}, source)
        texts = dict.fromkeys(("site", "address", "ca_certificate", "roster", "wardround"), str)
        _check_kinds(content, {**texts, "protocol": int}, source)
        sizes = {"site_id": KEY_BYTES, "bundle_digest": DIGEST_BYTES, "signature": SIGNATURE_BYTES}
        raw = {key: hex_bytes(content[key], size, f"{source}: {key}") for key, size in sizes.items()}
        values: dict[str, Any] = {key: raw.get(key, content[key]) for key in fields}
        made = cls(**values)
        made.verify()
        return made

    def _content(self) -> dict[str, Any]:
        content = {**asdict(self), "site_id": self.site_id.hex(), "bundle_digest": self.bundle_digest.hex()}
        del content["signature"]
        return {"kind": INVITATION_KIND, **content}

    def _statement(self) -> bytes:
        return _canonical(self._content())


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _check_kinds(content: dict[str, Any], kinds: dict[str, type], source: str) -> None:
    for key, kind in kinds.items():
        if type(content[key]) is not kind:
            raise ConfigError(f"{source}: {key}: expected {kind.__name__}, got {type(content[key]).__name__}")


def _check_versions(wardround: str, protocol: int, what: str) -> None:
    if _VERSION.fullmatch(wardround) is None:
        raise ConfigError(f"{what}: wardround: expected a version, got {wardround!r:.50}")
    if not 1 <= protocol <= 10_000:
        raise ConfigError(f"{what}: protocol: expected a protocol version, got {protocol!r:.20}")
