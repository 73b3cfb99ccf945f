"""Identity, card, roster: what is accepted, and every change that is not. RFC vectors for the use of the primitives."""

import base64
import copy
import hashlib
import hmac
import json
import os
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from wardround.common import identity as module
from wardround.common import key_file
from wardround.common.config import IdentityConfig, PolicyConfig, parse, plain_fingerprint
from wardround.common.errors import ConfigError, VerificationError, WardroundError
from wardround.common.identity import Card, Identity, fingerprint, verify
from wardround.common.roster import MAX_SERIAL, Member, Members, Roster, describe
from wardround.common.secagg.keys import domain, hkdf

PASSPHRASE = b"correct horse battery staple"
NAMES = ("north", "south", "east", "west")


def identity(n: int) -> Identity:
    return Identity.from_seed(hashlib.sha256(bytes([n])).digest())


COORDINATOR = identity(100)
SITES = {name: identity(n) for n, name in enumerate(NAMES)}
CARDS = [Card.make(key, name) for name, key in SITES.items()]
ROSTER = Roster.first(COORDINATOR, "Stroke outcomes · 뇌졸중", CARDS)
EVERYBODY = tuple(key.fingerprint for key in SITES.values())


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._SCRYPT, "n", 2**4)


def forged(roster: Roster, by: Identity = COORDINATOR, **changes: object) -> Roster:
    """A roster with something changed, signed again."""
    return replace(roster, **changes)._signed(by)


def in_order(*members: Member) -> tuple[Member, ...]:
    return tuple(sorted(members, key=lambda member: member.id))


def pinned(roster: Roster = ROSTER, digest: Roster = ROSTER, own: str = "north", verified=EVERYBODY) -> Members:
    return Members.pinned(roster, digest.digest.hex(), SITES[own].id, verified)


# ---- primitives

# RFC 8032 §7.1, tests 1 to 3: private key, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]
P, Q = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
BASE = (15112221349535400772501151409588531511454012693041857206046113283949847762202, 4 * pow(5, P - 2, P) % P)


def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    """Affine addition on edwards25519, as in RFC 8032 §5.1.4: slow and plain."""
    k = D * a[0] * b[0] * a[1] * b[1]
    x = (a[0] * b[1] + a[1] * b[0]) * pow(1 + k, P - 2, P)
    return x % P, (a[1] * b[1] + a[0] * b[0]) * pow(1 - k, P - 2, P) % P


def times(k: int, point: tuple[int, int]) -> tuple[int, int]:
    result = (0, 1)
    while k:
        result = add(result, point) if k & 1 else result
        point, k = add(point, point), k >> 1
    return result


def compress(point: tuple[int, int]) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def sign_by_the_book(seed: bytes, message: bytes) -> bytes:
    """RFC 8032 §5.1.6."""
    h = hashlib.sha512(seed).digest()
    a = int.from_bytes(h[:32], "little") & (2**254 - 8) | 2**254
    r = int.from_bytes(hashlib.sha512(h[32:] + message).digest(), "little") % Q
    head = compress(times(r, BASE))
    k = int.from_bytes(hashlib.sha512(head + compress(times(a, BASE)) + message).digest(), "little") % Q
    return head + ((r + k * a) % Q).to_bytes(32, "little")


@pytest.mark.parametrize(("seed", "public", "message", "signature"), RFC_8032)
def test_identity_is_ed25519_as_rfc_8032_says_over_the_domain_and_the_message(seed, public, message, signature):
    key, said = bytes.fromhex(seed), bytes.fromhex(message)
    assert sign_by_the_book(key, said).hex() == signature  # the oracle itself
    made = Identity.from_seed(key)
    assert made.id.hex() == public
    assert made.key.sign(said).hex() == signature
    assert made.sign("card", said) == sign_by_the_book(key, b"wardround/secagg/1/card\0" + said)


def hkdf_by_the_book(secret: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """RFC 5869 §2, on hmac alone."""
    key = hmac.digest(salt or bytes(32), secret, "sha256")
    out, block = b"", b""
    while len(out) < size:
        block = hmac.digest(key, block + info + bytes([len(out) // 32 + 1]), "sha256")
        out += block
    return out[:size]


def test_storage_key_is_hkdf_as_rfc_5869_says_of_the_private_key():
    for salt, info, expected in (  # RFC 5869, appendices A.1 and A.3
        (
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (b"", b"", "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"),
    ):
        assert hkdf_by_the_book(b"\x0b" * 22, salt, info, 42).hex() == expected  # the oracle itself
    seed = bytes.fromhex(RFC_8032[0][0])
    info = b"wardround/secagg/1/storage\0"
    assert Identity.from_seed(seed).storage_key() == hkdf_by_the_book(seed, b"", info, 32)
    assert hkdf(seed, "storage", b"x") == hkdf_by_the_book(seed, b"", info + b"x", 32)


def test_a_signature_of_one_use_is_none_of_another():
    made = identity(1)
    signature = made.sign("card", b"said")
    verify(made.id, "card", b"said", signature, "it")
    for use, message, key in (("advert", b"said", made), ("card", b"sais", made), ("card", b"said", identity(2))):
        with pytest.raises(VerificationError, match="it: wrong signature"):
            verify(key.id, use, message, signature, "it")


def test_keys_under_which_anybody_can_sign_and_second_spellings_of_a_key_are_refused():
    low = {0, 1, P - 1}
    y8 = next(point[1] for y in range(2, 50) if (point := _of_order_eight(y)) is not None)
    low |= {y8, P - y8}
    assert low == module._LOW_ORDER_Y
    for y in [*low, P, P + 1, 2**255 - 1]:
        for sign in (0, 1 << 255):
            public = (y | sign).to_bytes(32, "little")
            with pytest.raises(ConfigError, match="not an Ed25519 key"):
                Member("north", public)
            with pytest.raises(ConfigError, match="not an Ed25519 key"):
                Card("north", public, bytes(64))


def _of_order_eight(y: int) -> tuple[int, int] | None:
    """The part of order 8 of the point with this y, where there is one."""
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if (x * x - square) % P == 0 else x * pow(2, (P - 1) // 4, P) % P
    if (x * x - square) % P:
        return None
    point = times(Q, (x, y))
    return point if times(4, point) == (0, P - 1) else None


# ---- the key at rest


def test_a_locked_key_opens_with_its_passphrase_and_holds_the_same_key():
    made = Identity.generate()
    opened = Identity.unlock(made.lock(PASSPHRASE), PASSPHRASE, "key")
    assert opened.id == made.id and opened.storage_key() == made.storage_key()
    assert made.lock(PASSPHRASE) != made.lock(PASSPHRASE)  # a fresh salt
    assert Identity.generate().id != made.id


def test_a_locked_key_is_encrypted_pkcs8_whose_passphrase_went_through_scrypt():
    seed = identity(1).key.private_bytes_raw()
    head, _, pem = identity(1).lock(PASSPHRASE).partition(b"\n")
    assert pem.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    assert seed not in base64.b64decode(b"".join(pem.split(b"\n")[1:-2]))
    with pytest.raises(ValueError, match="Incorrect password"):  # the passphrase itself opens nothing
        load_pem_private_key(pem, PASSPHRASE)
    salt = bytes.fromhex(head.split(b" ")[2].decode())
    stretched = hashlib.scrypt(PASSPHRASE, salt=salt, dklen=32, **module._SCRYPT).hex().encode()
    opened = load_pem_private_key(pem, stretched)
    assert isinstance(opened, Ed25519PrivateKey) and opened.private_bytes_raw() == seed


def test_scrypt_is_as_expensive_as_documented(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert module._SCRYPT == {"n": 2**15, "r": 8, "p": 1}


def test_wrong_damaged_or_foreign_key_files_are_refused_without_saying_what_they_hold():
    data = identity(1).lock(PASSPHRASE)
    other = rsa.generate_private_key(65537, 2048)
    stretched = module._stretch(PASSPHRASE, bytes(16))
    foreign = f"wardround-key/1 scrypt {bytes(16).hex()} id {identity(1).id.hex()}\n".encode() + other.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(stretched)
    )
    body = data.index(b"KEY-----\n") + len(b"KEY-----\n")
    der = bytearray(base64.b64decode(data[body:].split(b"-----")[0]))
    der[-49] ^= 1  # of CBC's second last block: opens, and would be another key
    flipped = data[:body] + base64.encodebytes(bytes(der)).replace(b"\n", b"") + b"\n" + b"-----END ENCRYPTED "
    swapped = identity(2).lock(PASSPHRASE).partition(b"\n")
    for bad, passphrase, why in (
        (data, b"another passphrase", "wrong passphrase"),
        (data, b"", "wrong passphrase"),
        (data[:-40], PASSPHRASE, "wrong passphrase"),
        (flipped + b"PRIVATE KEY-----\n", PASSPHRASE, "damaged"),
        (foreign, PASSPHRASE, "does not hold the key it names"),
        (data.replace(identity(1).id.hex().encode(), identity(2).id.hex().encode()), PASSPHRASE, "it names"),
        (data.partition(b"\n")[0] + b"\n" + swapped[2], PASSPHRASE, "wrong passphrase"),
        (b"", PASSPHRASE, "expected an encrypted identity key"),
        (data.replace(b"ENCRYPTED ", b""), PASSPHRASE, "expected an encrypted identity key"),
        (data.partition(b"\n")[2], PASSPHRASE, "expected an encrypted identity key"),
    ):
        with pytest.raises(ConfigError, match=why) as caught:
            Identity.unlock(bad, passphrase, "key")
        said = str(caught.value)
        assert "\n" not in said and said.startswith("key: ") and (not passphrase or passphrase.decode() not in said)
        # No library's text, which may quote what it was given, is shown with it.
        assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize("short", [b"", b"eleven byte"])
def test_a_short_passphrase_locks_nothing(short: bytes):
    with pytest.raises(ConfigError, match="at least 12") as caught:
        identity(1).lock(short)
    assert not short or short.decode() not in str(caught.value)


def test_no_repr_copy_or_pickle_of_an_identity_holds_its_key():
    made = identity(1)
    assert repr(made) == str(made) == f"Identity({made.fingerprint})"
    assert made.key.private_bytes_raw().hex() not in repr(vars(made))
    for take in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not copied or pickled"):
            take(made)


# ---- fingerprints


def test_a_fingerprint_is_twenty_bytes_of_the_hash_in_base32():
    public = SITES["north"].id
    hashed = hashlib.sha256(b"wardround/secagg/1/fingerprint\0" + public).digest()[:20]
    assert fingerprint(public).replace(" ", "") == base64.b32encode(hashed).decode()
    assert [len(group) for group in fingerprint(public).split(" ")] == [4] * 8


@pytest.mark.parametrize("spelled", [str, str.lower, lambda s: s.replace(" ", ""), lambda s: f"  {s.lower()}\t\n"])
def test_a_fingerprint_is_found_however_it_is_spelled(spelled):
    text = spelled(SITES["south"].fingerprint)
    assert ROSTER.with_fingerprint(text).name == "south"
    assert SITES["south"].id in pinned(verified=[text]).verified
    assert IdentityConfig(verified=(text,)).verified == (plain_fingerprint(SITES["south"].fingerprint),)


@pytest.mark.parametrize("wrong", ["", "ABCD", "A" * 31, "A" * 33, "1" * 32, "A" * 31 + "É", "ABCD-" * 8])
def test_what_is_no_fingerprint_is_refused(wrong: str):
    for use in (ROSTER.with_fingerprint, lambda text: pinned(verified=[text])):
        with pytest.raises(ConfigError, match="expected 8 groups of 4"):
            use(wrong)
    with pytest.raises(ConfigError, match=r"site\.toml: 'verified\.0': fingerprint: expected 8 groups"):
        parse(IdentityConfig, {"verified": [wrong]}, "site.toml")


def test_a_fingerprint_of_nobody_on_the_roster_is_not_found():
    with pytest.raises(ConfigError, match="no member has this fingerprint"):
        ROSTER.with_fingerprint(identity(9).fingerprint)


def test_a_policy_wants_three_sites_and_withstands_one_colluding_unless_it_says_more():
    assert (PolicyConfig().min_sites, PolicyConfig().colluders) == (3, 1)
    for key, low in (("min_sites", 2), ("colluders", 0)):
        with pytest.raises(ConfigError, match=key):
            parse(PolicyConfig, {key: low}, "site.toml")
    for digest in ("ab", "AB" * 32, "ab" * 32 + "\n"):
        with pytest.raises(ConfigError, match="roster_digest"):
            parse(IdentityConfig, {"roster_digest": digest}, "site.toml")


# ---- card


@pytest.mark.parametrize("previous", [None, identity(50)])
def test_a_card_survives_the_mail(previous: Identity | None):
    card = Card.make(SITES["north"], "north", previous)
    assert Card.parse(card.to_json().encode(), "card") == card
    assert Card.parse(card.to_json().replace("\n", "\r\n").encode(), "card") == card
    said = b"wardround/secagg/1/card\0" + hashlib.sha256(b"north").digest() + SITES["north"].id
    assert card.signature == SITES["north"].key.sign(said)
    assert previous is None or card.previous_signature == previous.key.sign(said)


def test_every_change_of_a_card_is_refused():
    content = json.loads(Card.make(SITES["north"], "north", identity(50)).to_json())
    other = json.loads(Card.make(identity(60), "north", identity(61)).to_json())
    changed = [content | {key: other[key]} for key in ("id", "signature", "previous", "previous_signature")]
    for bad in [*changed, content | {"name": "North"}, content | {"previous": content["id"]}]:
        with pytest.raises((VerificationError, ConfigError)):
            Card.parse(json.dumps(bad).encode(), "card")


def test_a_rotation_signed_by_only_one_key_is_refused():
    old, new = SITES["north"], identity(50)
    card = Card.make(new, "north", previous=old)
    plain = Card.make(new, "north")
    for bad in (
        replace(card, previous_signature=card.signature),  # only the new one
        replace(card, signature=card.previous_signature),  # only the old one
        replace(card, previous_signature=bytes(64)),
        replace(card, previous_signature=b""),
        replace(card, previous=b""),
        replace(plain, previous=old.id, previous_signature=identity(51).sign("card", b"")),
    ):
        with pytest.raises(VerificationError, match="wrong signature"):
            bad.verify()
        with pytest.raises(VerificationError, match="wrong signature"):
            ROSTER.adding(COORDINATOR, [bad])
    for missing in ("previous", "previous_signature", "signature"):
        content = json.loads(card.to_json())
        del content[missing]
        with pytest.raises(ConfigError, match=f"wrong: '{missing}'"):
            Card.parse(json.dumps(content).encode(), "card")
    with pytest.raises(ConfigError, match="north is on the roster with another key"):
        ROSTER.adding(COORDINATOR, [plain])


@pytest.mark.parametrize("name", ["", "a b", "a/b", "é", "x" * 65, "north\n", "[red]"])
def test_a_name_that_is_no_sites_name_makes_no_card(name: str):
    with pytest.raises(ConfigError, match="name: expected"):
        Card.make(SITES["north"], name)


# ---- roster


def test_a_roster_survives_the_mail_and_is_in_order_of_ids():
    assert Roster.parse(ROSTER.to_json().encode(), "roster") == ROSTER
    assert all(a.id < b.id for a, b in pairwise(ROSTER.members))
    assert Roster.first(COORDINATOR, ROSTER.consortium, CARDS[::-1]) == ROSTER


def test_the_digest_is_over_canonical_json_without_the_signature():
    content = json.loads(ROSTER.to_json())
    del content["signature"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    assert ROSTER.canonical() == text and text.isascii()
    assert ROSTER.digest == hashlib.sha256(b"wardround/secagg/1/roster\0" + text).digest()
    assert ROSTER.signature == COORDINATOR.key.sign(domain("roster") + text)
    assert replace(ROSTER, signature=bytes(64)).digest == ROSTER.digest


CHANGED = {
    "an extra member": ROSTER.adding(COORDINATOR, [Card.make(identity(9), "ghost")]),
    "a missing member": forged(ROSTER, members=ROSTER.members[1:], serial=2),
    "another key under a known name": forged(
        ROSTER, members=in_order(Member("east", identity(9).id), *(m for m in ROSTER.members if m.name != "east"))
    ),
    "a revoked member": ROSTER.revoking(COORDINATOR, "east"),
    "another name": forged(ROSTER, members=(replace(ROSTER.members[0], name="other"), *ROSTER.members[1:])),
    "another serial": forged(ROSTER, serial=2),
    "another consortium": forged(ROSTER, consortium="Stroke"),
    "another coordinator": forged(ROSTER, by=identity(101), coordinator=identity(101).id),
}


@pytest.mark.parametrize("changed", CHANGED.values(), ids=CHANGED.keys())
def test_a_roster_that_changed_is_refused_until_it_is_pinned_again(changed: Roster):
    assert Roster.parse(changed.to_json().encode(), "roster") == changed  # well formed, and signed by somebody
    with pytest.raises(VerificationError, match="wardround client roster pin") as caught:
        pinned(changed)
    assert "\n" not in str(caught.value) and "is not the pinned" in str(caught.value)
    own = "north" if changed.member(SITES["north"].id) else "south"
    assert pinned(changed, digest=changed, own=own).roster == changed


def test_nothing_pinned_is_refused():
    with pytest.raises(ConfigError, match="no roster is pinned: call `wardround client roster pin"):
        Members.pinned(ROSTER, None, SITES["north"].id, ())


@pytest.mark.parametrize("key", ["serial", "consortium", "coordinator", "members", "signature"])
def test_a_tampered_roster_or_signature_is_refused(key: str):
    content = json.loads(ROSTER.to_json())
    other = json.loads(CHANGED["another coordinator"].to_json()) | {"serial": 7, "consortium": "x"}
    other["members"] = content["members"][:-1]
    with pytest.raises(VerificationError, match="wrong signature"):
        Roster.parse(json.dumps(content | {key: other[key]}).encode(), "roster")
    with pytest.raises(VerificationError, match="wrong signature"):
        pinned(replace(ROSTER, signature=bytes(64)))


@pytest.mark.parametrize("key", ["name", "id", "status"])
def test_a_tampered_member_is_refused(key: str):
    content = json.loads(ROSTER.to_json())
    content["members"][-1][key] = {"name": "n", "id": "fe" * 31 + "7e", "status": "revoked"}[key]
    content["members"].sort(key=lambda member: member["id"])
    with pytest.raises(VerificationError, match="wrong signature"):
        Roster.parse(json.dumps(content).encode(), "roster")


def test_two_members_with_one_name_or_id_make_a_roster_invalid():
    for more, what in (
        (Member("NORTH", identity(9).id), "name"),
        (Member("second", SITES["north"].id), "id"),
        (Member("coordinator", COORDINATOR.id), "id"),
    ):
        with pytest.raises(ConfigError, match=f"two members with one {what}"):
            replace(ROSTER, members=tuple(sorted((*ROSTER.members, more), key=lambda member: member.id)))


def test_two_members_with_one_fingerprint_make_a_roster_invalid(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Member, "fingerprint", "AAAA")
    members = tuple(Member(item.name, item.id) for item in ROSTER.members)  # none has computed its own yet
    with pytest.raises(ConfigError, match="two members with one fingerprint"):
        replace(ROSTER, members=members)


def test_a_roster_out_of_order_or_out_of_bounds_is_invalid():
    for changes, why in (
        ({"members": ROSTER.members[::-1]}, "ascending"),
        ({"members": ()}, "1 to 1024 members"),
        ({"serial": 0}, "serial"),
        ({"serial": MAX_SERIAL + 1}, "serial"),
        ({"consortium": ""}, "consortium"),
        ({"consortium": "a\x1b[31m"}, "consortium"),
        ({"consortium": "a‮b"}, "consortium"),
        ({"consortium": "a" * 101}, "consortium"),
        ({"coordinator": bytes(32)}, "coordinator"),
    ):
        with pytest.raises(ConfigError, match=why):
            replace(ROSTER, **changes)


def test_cards_that_are_taken_are_not_added():
    for cards, why in (
        ([CARDS[0]], "north is on the roster already"),
        ([Card.make(identity(9), "North")], "is on the roster with another key"),
        ([Card.make(identity(9), "new"), Card.make(identity(9), "newer")], "already"),
        ([Card.make(identity(9), "new"), Card.make(identity(10), "new")], "with another key"),
        ([Card.make(identity(9), "new", previous=identity(10))], "no active member of this name"),
        ([Card.make(identity(9), "south", previous=SITES["north"])], "no active member of this name"),
    ):
        with pytest.raises(ConfigError, match=why):
            ROSTER.adding(COORDINATOR, cards)


def test_only_the_coordinators_key_signs_the_next_roster():
    for sign in (
        lambda key: ROSTER.adding(key, [Card.make(identity(9), "new")]),
        lambda key: ROSTER.revoking(key, "east"),
    ):
        assert sign(COORDINATOR).serial == 2
        with pytest.raises(VerificationError, match="not the key of the coordinator"):
            sign(identity(101))


def test_a_rotation_puts_the_new_id_in_the_old_ones_place_and_has_to_be_verified_again():
    new = identity(50)
    after = ROSTER.adding(COORDINATOR, [Card.make(new, "east", previous=SITES["east"])])
    assert after.serial == 2 and after.member_named("east").id == new.id and after.member(SITES["east"].id) is None
    view = pinned(after, digest=after)
    assert new.id in view.active and new.id not in view.verified
    assert new.id in pinned(after, digest=after, verified=[new.fingerprint]).verified
    assert after.changes_from(ROSTER) == [f"east: another key, {new.fingerprint}, active; verify it again"]
    with pytest.raises(VerificationError, match=r"is not on the pinned roster 2: .*rotate --finish"):
        pinned(after, digest=after, own="east")


def test_a_revoked_member_takes_part_in_nothing_and_comes_back_only_with_a_new_key():
    after = ROSTER.revoking(COORDINATOR, "east")
    view = pinned(after, digest=after)
    gone = SITES["east"].id
    assert gone not in view.active and gone not in view.verified and view.name(gone) == "east"
    with pytest.raises(VerificationError, match="is revoked on the pinned roster 2"):
        pinned(after, digest=after, own="east")
    with pytest.raises(ConfigError, match="revoked already"):
        after.revoking(COORDINATOR, "east")
    with pytest.raises(ConfigError, match="needs a new one"):
        after.adding(COORDINATOR, [CARDS[NAMES.index("east")]])
    with pytest.raises(ConfigError, match="no active member of this name"):  # the lost key cannot name its heir
        after.adding(COORDINATOR, [Card.make(identity(9), "east", previous=SITES["east"])])
    back = after.adding(COORDINATOR, [Card.make(identity(9), "east")])
    assert back.member_named("east") == Member("east", identity(9).id)
    with pytest.raises(ConfigError, match="no member is named 'eats'"):
        ROSTER.revoking(COORDINATOR, "eats")


# ---- a site's view


def test_only_listed_active_members_and_the_site_itself_are_verified():
    nobody = pinned(verified=())
    assert nobody.verified == {SITES["north"].id} and nobody.active == {key.id for key in SITES.values()}
    some = pinned(verified=[SITES["south"].fingerprint, identity(9).fingerprint])
    assert some.verified == {SITES["north"].id, SITES["south"].id}
    assert pinned().verified == nobody.active


def test_names_and_ids_are_found_both_ways():
    view = pinned()
    assert all(view.id(name) == key.id and view.name(key.id) == name for name, key in SITES.items())
    with pytest.raises(VerificationError, match="no member with key"):
        view.name(identity(9).id)
    with pytest.raises(VerificationError, match="no member is named"):
        view.id("ghost")


def test_a_site_that_is_not_on_the_roster_has_no_view_of_it():
    with pytest.raises(VerificationError, match="is not on the pinned roster"):
        Members.pinned(ROSTER, ROSTER.digest.hex(), identity(9).id, EVERYBODY)


def test_a_roster_is_followed_only_by_a_higher_serial_of_the_same_coordinator():
    second = ROSTER.revoking(COORDINATOR, "east")
    second.check_follows(ROSTER)
    ROSTER.check_follows(ROSTER)
    for offered in (ROSTER, forged(ROSTER, serial=2, consortium="x")):  # a step back; a second one of that serial
        with pytest.raises(VerificationError, match="a newer one has a higher serial"):
            offered.check_follows(second)
    swapped = forged(ROSTER, by=identity(101), coordinator=identity(101).id, serial=3)
    with pytest.raises(VerificationError, match="signed by another coordinator"):
        swapped.check_follows(second)
    swapped.check_follows(second, coordinator=identity(101).fingerprint)
    assert f"coordinator: another key, {identity(101).fingerprint}" in swapped.changes_from(second)


def test_changes_name_everything_that_differs():
    a, b, c, d = ROSTER.members
    after = forged(
        ROSTER,
        consortium="New",
        members=tuple(
            sorted(
                (replace(a, name=b.name), replace(c, status="revoked"), d, Member("fifth", identity(9).id)),
                key=lambda member: member.id,
            )
        ),
    )
    assert sorted(after.changes_from(ROSTER)) == sorted(
        [
            f"consortium: was '{ROSTER.consortium}', is 'New'",
            f"{b.name}: was named {a.name}",
            f"{c.name}: was active, is revoked",
            "fifth: new, active",
            f"{b.name}: no longer on it",
        ]
    )
    assert ROSTER.changes_from(ROSTER) == []
    assert any("east" in line and "mine" in line for line in describe(ROSTER, {SITES["east"].id: "mine"}))


# ---- decoders

CARD_BYTES, ROSTER_BYTES = (
    Card.make(SITES["north"], "north", identity(50)).to_json().encode(),
    ROSTER.to_json().encode(),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def only_our_errors(data: bytes) -> None:
    for kind in (Card, Roster):
        try:
            found = kind.parse(data, "file")
        except WardroundError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
        else:
            found.verify()
            assert kind.parse(found.to_json().encode(), "file") == found


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | JSON.map(lambda x: json.dumps(x).encode()))
def test_any_bytes_give_only_our_errors(data: bytes):
    only_our_errors(data)


@settings(max_examples=2000, deadline=None)
@given(st.sampled_from([CARD_BYTES, ROSTER_BYTES]), st.data())
def test_any_cut_or_changed_file_gives_only_our_errors(good: bytes, data: st.DataObject):
    start = data.draw(st.integers(0, len(good)))
    end = data.draw(st.integers(start, min(len(good), start + 80)))
    only_our_errors(good[:start] + data.draw(st.binary(max_size=4)) + good[end:])


@settings(max_examples=1000, deadline=None)
@given(st.data())
def test_any_value_at_any_place_gives_only_our_errors(data: st.DataObject):
    content = json.loads(data.draw(st.sampled_from([CARD_BYTES, ROSTER_BYTES])))
    node = content
    if "members" in node and data.draw(st.booleans()):
        node = data.draw(st.sampled_from(node["members"]))
    key = data.draw(st.sampled_from(sorted(node)) | st.text(max_size=8))
    node[key] = data.draw(JSON | st.text("0123456789abcdef", min_size=64, max_size=64))
    only_our_errors(json.dumps(content).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"kind":' * 5000,
        b'{"serial":' + b"9" * 10_000 + b"}",
        b"\xff\xfe",
        b"\xef\xbb\xbf" + CARD_BYTES,
        CARD_BYTES.decode().encode("utf-16"),
        CARD_BYTES + b" " * 5000,
        b" " * (1 << 20) + ROSTER_BYTES,
        CARD_BYTES.replace(b'"name"', b'"name": "south", "name"'),
        ROSTER_BYTES.replace(b'"status"', b'"status": "revoked", "status"', 1),
        ROSTER_BYTES.replace(b'"serial": 1', b'"serial": true'),
        ROSTER_BYTES.replace(b'"serial": 1', b'"serial": 1.0'),
        ROSTER_BYTES.replace(b'"serial": 1', b'"serial": NaN'),
        ROSTER_BYTES.replace(b'"active"', b'["active"]', 1),
        ROSTER_BYTES.replace(b"Stroke", b"\\ud800"),
        CARD_BYTES.replace(SITES["north"].id.hex().encode(), SITES["north"].id.hex().upper().encode()),
    ],
    ids=range(16),
)
def test_odd_files_are_refused(data: bytes):
    for kind in (Card, Roster):
        with pytest.raises(ConfigError):
            kind.parse(data, "file")


def test_a_card_is_no_roster_and_a_roster_no_card():
    with pytest.raises(ConfigError, match="expected 'wardround-roster/1', got 'wardround-card/1'"):
        Roster.parse(CARD_BYTES, "file")
    with pytest.raises(ConfigError, match="expected 'wardround-card/1', got 'wardround-roster/1'"):
        Card.parse(ROSTER.to_json().encode()[: module.MAX_CARD_BYTES], "file")


# ---- files


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path):
    path = tmp_path / "identity.pem"
    key_file.write_key(path, identity(1), PASSPHRASE)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        key_file.write_key(path, identity(2), PASSPHRASE)
    assert key_file.read_key(path, PASSPHRASE).id == identity(1).id
    assert [item.name for item in tmp_path.iterdir()] == ["identity.pem"]  # no temporary file stays


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o666])
def test_a_secret_that_others_may_use_is_refused(tmp_path: Path, mode: int):
    path = tmp_path / "secret"
    path.write_bytes(b"hidden words")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"others may use it \\(mode {mode:04o}\\): call `chmod 600") as caught:
        key_file.read_secret(path, "key")
    assert "hidden" not in str(caught.value)


def test_a_secret_that_is_missing_a_folder_too_large_or_anothers_is_refused(tmp_path: Path, monkeypatch):
    with pytest.raises(ConfigError, match="no such file: key"):
        key_file.read_secret(tmp_path / "none", "key")
    with pytest.raises(ConfigError, match="key: expected a file"):
        key_file.read_secret(tmp_path, "key")
    large = tmp_path / "large"
    large.touch(mode=0o600)
    large.write_bytes(bytes(4097))
    with pytest.raises(ConfigError, match="at most 4096 bytes"):
        key_file.read_secret(large, "key")
    if os.geteuid() == 0:
        os.chown(large, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        key_file.read_secret(large, "key")


def test_a_secret_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: object, flags: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(key_file.os, "open", refuse)  # root reads everything, so no mode shows it
    with pytest.raises(ConfigError, match="key: cannot be read: permission denied"):
        key_file.read_secret(tmp_path / "x", "key")
