"""The roster that the coordinator signs and every site pins, and a pinned roster as one site sees it.

Used by both roles; docs/secure-sums.md §S2 is the specification. Pure: files are read in client/identity.py and
server/roster_cli.py. Enters: cards, rosters as files that people send by mail, the fingerprints that a site verified.
Leaves: rosters (public). Private: nothing; signing takes the coordinator's identity as an argument.

Formal Guarantees:
    A `Roster` that the parser returned is signed by the coordinator it names, and every name, id and status in it is
    covered by the signature and the digest. `Members` exists only for a roster with the digest that the site pinned, on
    which the site's own id is active; an id is in `verified` only if it is active there and is the site's own or has a
    fingerprint that the site listed.

Not protected: a coordinator can put anybody on its roster, and show two sites two rosters. The first is why only
verified members count; the second ends in `other-roster` before anything is shared (§S6).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self, cast

from .config import plain_fingerprint
from .errors import ConfigError, VerificationError
from .identity import (
    Card,
    Identity,
    check_id,
    check_keys,
    check_name,
    fingerprint,
    hex_bytes,
    json_object,
    verify,
)
from .secagg.keys import KEY_BYTES, MAX_MEMBERS, SIGNATURE_BYTES, digest

USE_ROSTER = "roster"
ROSTER_KIND = "wardround-roster/1"
ACTIVE, REVOKED = "active", "revoked"
MAX_ROSTER_BYTES = 1 << 20
MAX_SERIAL = 2**53 - 1  # what every JSON reader keeps exactly


@dataclass(frozen=True)
class Member:
    """A site on a roster; `status` is "active" or "revoked"."""

    name: str
    id: bytes
    status: str = ACTIVE

    def __post_init__(self) -> None:
        check_name(self.name, "roster: member: name")
        check_id(self.id, f"roster: {self.name}: id")
        if self.status not in (ACTIVE, REVOKED):
            raise ConfigError(f"roster: {self.name}: expected status active or revoked, got {self.status!r:.40}")

    @property
    def active(self) -> bool:
        """Whether it may take part."""
        return self.status == ACTIVE

    @cached_property
    def fingerprint(self) -> str:
        """As people compare it."""
        return fingerprint(self.id)


@dataclass(frozen=True)
class Roster:
    """Who may take part (§S2), signed by the coordinator.

    Attributes:
        serial: 1, then one more for every change.
        consortium: its name, for people.
        coordinator: Ed25519 public key, 32 bytes.
        members: in ascending order of their ids; names, ids and fingerprints all different.
        signature: of the coordinator's key, over what `digest` covers.
    """

    serial: int
    consortium: str
    coordinator: bytes
    members: tuple[Member, ...]
    signature: bytes = field(default=bytes(SIGNATURE_BYTES))
    _verified: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.serial <= MAX_SERIAL:
            raise ConfigError(f"roster: serial: expected 1 to {MAX_SERIAL}, got {self.serial!r:.40}")
        text = self.consortium
        if not (1 <= len(text) <= 100 and text.isprintable() and text == text.strip()):
            raise ConfigError("roster: consortium: expected 1 to 100 printable characters")
        check_id(self.coordinator, "roster: coordinator")
        if not 1 <= len(self.members) <= MAX_MEMBERS:
            raise ConfigError(f"roster: expected 1 to {MAX_MEMBERS} members, got {len(self.members)}")
        if any(first.id > second.id for first, second in itertools.pairwise(self.members)):
            raise ConfigError("roster: expected members in ascending order of their ids")
        # Names that differ in case only are one to a person; two keys of one fingerprint are verified by one call.
        for what, values in {
            "id": [member.id.hex() for member in self.members] + [self.coordinator.hex()],
            "name": [member.name.casefold() for member in self.members],
            "fingerprint": [member.fingerprint for member in self.members],
        }.items():
            if repeated := [value for value, times in Counter(values).items() if times > 1]:
                raise ConfigError(f"roster: two members with one {what}: {repeated[0]}")

    @classmethod
    def first(cls, coordinator: Identity, consortium: str, cards: Sequence[Card]) -> Self:
        """A consortium's first roster.

        Raises:
            ConfigError: no cards, two with one name or id, a rotation's card, a consortium name that cannot be shown.
            VerificationError: a card's signature is wrong.
        """
        members = _admitted((), cards)
        return cls(1, consortium, coordinator.id, members)._signed(coordinator)

    def adding(self, coordinator: Identity, cards: Sequence[Card]) -> Self:
        """The next serial, with these sites: new ones, and rotations, whose new id takes the old one's place.

        A site whose key was revoked comes back with a new key.

        Raises:
            ConfigError: a name or id that is taken, a rotation of no active member.
            VerificationError: a card's signature is wrong; not this roster's coordinator.
        """
        return replace(self, serial=self.serial + 1, members=_admitted(self.members, cards))._signed(coordinator)

    def revoking(self, coordinator: Identity, name: str) -> Self:
        """The next serial, with this member revoked.

        Raises:
            ConfigError: no active member has this name.
            VerificationError: not this roster's coordinator.
        """
        found = self.member_named(name)
        if not found.active:
            raise ConfigError(f"{name}: revoked already")
        members = tuple(replace(item, status=REVOKED) if item is found else item for item in self.members)
        return replace(self, serial=self.serial + 1, members=members)._signed(coordinator)

    def _signed(self, coordinator: Identity) -> Self:
        if coordinator.id != self.coordinator:
            raise VerificationError("roster: this is not the key of the coordinator that signed it")
        return replace(self, signature=coordinator.sign(USE_ROSTER, self.canonical()))

    def _content(self) -> dict[str, Any]:
        return {
            "kind": ROSTER_KIND,
            "serial": self.serial,
            "consortium": self.consortium,
            "coordinator": self.coordinator.hex(),
            "members": [{"name": item.name, "id": item.id.hex(), "status": item.status} for item in self.members],
        }

    def canonical(self) -> bytes:
        """Canonical JSON without the signature (sorted keys, no spaces, ASCII): what digest and signature cover."""
        return json.dumps(self._content(), sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    @cached_property
    def digest(self) -> bytes:
        """32 bytes: what a site pins."""
        return digest(USE_ROSTER, self.canonical())

    def verify(self) -> None:
        """Checks the coordinator's signature; that it is the right coordinator's, only the pinned digest says.

        Raises:
            VerificationError: it is wrong.
        """
        if not self._verified:
            verify(self.coordinator, USE_ROSTER, self.canonical(), self.signature, f"roster {self.serial}")
            object.__setattr__(self, "_verified", True)

    def to_json(self) -> str:
        """The file."""
        return json.dumps(self._content() | {"signature": self.signature.hex()}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def parse(cls, data: bytes, source: str) -> Self:
        """A roster from its file, signature checked.

        Args:
            data: the file.
            source: what to call it in an error.

        Raises:
            ConfigError: not a roster.
            VerificationError: a wrong signature.
        """
        content = json_object(data, source, ROSTER_KIND, MAX_ROSTER_BYTES)
        check_keys(content, {"kind", "serial", "consortium", "coordinator", "members", "signature"}, source)
        serial, consortium, listed = content["serial"], content["consortium"], content["members"]
        if type(serial) is not int or type(consortium) is not str or type(listed) is not list:
            raise ConfigError(f"{source}: expected a number, a text and a list as serial, consortium and members")
        members: list[Member] = []
        for item in cast("list[Any]", listed):
            if not isinstance(item, dict):
                raise ConfigError(f"{source}: expected every member to be an object")
            entry = cast("dict[str, Any]", item)
            check_keys(entry, {"name", "id", "status"}, f"{source}: member")
            name = check_name(entry["name"], f"{source}: name")
            public = hex_bytes(entry["id"], KEY_BYTES, f"{source}: id")
            members.append(Member(name, public, entry["status"]))
        roster = cls(
            serial=serial,
            consortium=consortium,
            coordinator=hex_bytes(content["coordinator"], KEY_BYTES, f"{source}: coordinator"),
            members=tuple(members),
            signature=hex_bytes(content["signature"], SIGNATURE_BYTES, f"{source}: signature"),
        )
        roster.verify()
        return roster

    def member(self, public: bytes) -> Member | None:
        """The member with an id."""
        return next((item for item in self.members if item.id == public), None)

    def member_named(self, name: str) -> Member:
        """The member with a name.

        Raises:
            ConfigError: nobody has it.
        """
        found = next((item for item in self.members if item.name == name), None)
        if found is None:
            raise ConfigError(f"roster {self.serial}: no member is named {name!r:.70}")
        return found

    def with_fingerprint(self, text: str) -> Member:
        """The member with a fingerprint, spelled with any spaces and case.

        Raises:
            ConfigError: not a fingerprint; nobody has it.
        """
        try:
            plain = plain_fingerprint(text)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        found = next((item for item in self.members if plain_fingerprint(item.fingerprint) == plain), None)
        if found is None:
            raise ConfigError(f"roster {self.serial}: no member has this fingerprint: compare it once more")
        return found

    def changes_from(self, old: Roster) -> list[str]:
        """What is different from an older roster, a line each, for a person to decide on."""
        lines: list[str] = []
        if self.consortium != old.consortium:
            lines.append(f"consortium: was '{old.consortium}', is '{self.consortium}'")
        if self.coordinator != old.coordinator:
            lines.append(f"coordinator: another key, {fingerprint(self.coordinator)}")
        gone = {item.name.casefold(): item for item in old.members if self.member(item.id) is None}
        for item in self.members:
            before = old.member(item.id)
            if before is None and gone.pop(item.name.casefold(), None) is not None:
                lines.append(f"{item.name}: another key, {item.fingerprint}, {item.status}; verify it again")
            elif before is None:
                lines.append(f"{item.name}: new, {item.status}")
            else:
                if before.name != item.name:
                    lines.append(f"{item.name}: was named {before.name}")
                if before.status != item.status:
                    lines.append(f"{item.name}: was {before.status}, is {item.status}")
        return lines + [f"{item.name}: no longer on it" for item in gone.values()]

    def check_follows(self, old: Roster, coordinator: str | None = None) -> None:
        """Refuses to take this roster in the place of an older one, where that is no step forward.

        Args:
            old: the one that is pinned.
            coordinator: fingerprint of a new coordinator that a person has verified; None: the old one.

        Raises:
            VerificationError: serial not higher, another coordinator's key.
        """
        if self.digest == old.digest:
            return
        if self.serial <= old.serial:
            raise VerificationError(
                f"roster {self.serial}: the pinned one has serial {old.serial}, a newer one has a higher serial: "
                "ask the coordinator for its newest"
            )
        if coordinator is None and self.coordinator != old.coordinator:
            raise VerificationError(
                f"roster {self.serial}: signed by another coordinator than the pinned one: compare fingerprints with "
                "the coordinator by telephone, then name its new one with --coordinator"
            )


def _admitted(members: tuple[Member, ...], cards: Iterable[Card]) -> tuple[Member, ...]:
    """Members after these cards, in order of ids."""
    listed = {item.id: item for item in members}
    for card in cards:
        card.verify()
        if (known := listed.get(card.id)) is not None:
            why = "is on the roster already" if known.active else "was revoked with this key and needs a new one"
            raise ConfigError(f"card of {card.name}: {known.name} {why}")
        namesake = next((item for item in listed.values() if item.name.casefold() == card.name.casefold()), None)
        if card.previous:
            before = listed.get(card.previous)
            if before is None or not before.active or before.name != card.name:
                raise ConfigError(f"card of {card.name}: no active member of this name has its previous key")
            del listed[before.id]
        elif namesake is not None and namesake.active:
            raise ConfigError(
                f"card of {card.name}: {namesake.name} is on the roster with another key: expected a card of "
                "`wardround client rotate`, signed by both keys, or revoke the old key first"
            )
        elif namesake is not None:
            del listed[namesake.id]
        listed[card.id] = Member(card.name, card.id)
    return tuple(sorted(listed.values(), key=lambda item: item.id))


# ---- a site's view


@dataclass(frozen=True)
class Members:
    """The roster as one site sees it: the one it pinned, and whom on it it has verified itself.

    Attributes:
        roster: with the pinned digest.
        own: this site's id; active on it.
        verified: ids of active members that may count as honest; always with `own`.
    """

    roster: Roster
    own: bytes
    verified: frozenset[bytes]

    @classmethod
    def pinned(cls, roster: Roster, roster_digest: str | None, own: bytes, verified: Iterable[str]) -> Self:
        """The view of a site.

        Args:
            roster: as read.
            roster_digest: hexadecimal, as this site pinned it; None: it pinned none.
            own: this site's id.
            verified: fingerprints that this site compared with those hospitals, any spelling.

        Raises:
            VerificationError: another digest than the pinned one; this site is no active member.
            ConfigError: nothing is pinned; not a fingerprint.
        """
        check_pinned(roster, roster_digest)
        roster.verify()
        member = roster.member(own)
        if member is None or not member.active:
            found = "is not on" if member is None else "is revoked on"
            raise VerificationError(
                f"this site's key ({fingerprint(own)}) {found} the pinned roster {roster.serial}: send its card to the "
                "coordinator and pin the roster that comes back; in a rotation then `wardround client rotate --finish`"
            )
        try:
            listed = {plain_fingerprint(text) for text in verified}
        except ValueError as error:
            raise ConfigError(f"verified: {error}") from None
        known = {item.id for item in roster.members if item.active and plain_fingerprint(item.fingerprint) in listed}
        return cls(roster, own, frozenset(known | {own}))

    @cached_property
    def active(self) -> frozenset[bytes]:
        """Ids that may take part."""
        return frozenset(item.id for item in self.roster.members if item.active)

    def name(self, public: bytes) -> str:
        """An id's name, revoked or not.

        Raises:
            VerificationError: no member has this id.
        """
        found = self.roster.member(public)
        if found is None:
            raise VerificationError(f"the pinned roster has no member with key {fingerprint(public)}")
        return found.name

    def id(self, name: str) -> bytes:
        """A name's id, revoked or not.

        Raises:
            VerificationError: no member has this name.
        """
        try:
            return self.roster.member_named(name).id
        except ConfigError as error:
            raise VerificationError(str(error)) from None


def check_pinned(roster: Roster, roster_digest: str | None) -> None:
    """Refuses a roster that is not the pinned one.

    Raises:
        VerificationError: another digest than the pinned one.
        ConfigError: nothing is pinned.
    """
    if roster_digest is None:
        raise ConfigError("no roster is pinned: call `wardround client roster pin FILE` and set what it prints")
    if roster.digest.hex() != roster_digest:
        raise VerificationError(
            f"roster {roster.serial}: digest {roster.digest.hex()[:12]}… is not the pinned {roster_digest[:12]}…: look "
            "at what changed with `wardround client roster pin FILE`, then pin it, or put the pinned file back"
        )


def describe(roster: Roster, notes: Mapping[bytes, str] | None = None) -> list[str]:
    """A roster as lines for a person: head, coordinator, and a line a member with its note."""
    width = max(len(item.name) for item in roster.members)
    lines = [
        f"'{roster.consortium}', serial {roster.serial}, {len(roster.members)} members",
        f"digest       {roster.digest.hex()}",
        f"coordinator  {fingerprint(roster.coordinator)}",
    ]
    for item in sorted(roster.members, key=lambda item: item.name.casefold()):
        note = (notes or {}).get(item.id, "")
        lines.append(f"  {item.name:<{width}}  {item.status:<7}  {item.fingerprint}  {note}".rstrip())
    return lines
