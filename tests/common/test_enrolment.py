"""Applications and invitations: signed over everything, refused with one line when anything is off."""

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from wardround.common import bundle
from wardround.common.enrolment import Application, Invitation, check_address
from wardround.common.errors import ConfigError, VerificationError
from wardround.common.identity import Card, Identity, fingerprint
from wardround.common.messages import PROTOCOL_VERSION
from wardround.common.roster import Roster

NORTH, SOUTH, COORDINATOR = (Identity.from_seed(bytes([i]) * 32) for i in (1, 2, 3))
CERTIFICATE = "-----BEGIN CERTIFICATE-----\n" + "QUJD" * 40 + "\n-----END CERTIFICATE-----\n"
ROSTER = Roster.first(COORDINATOR, "four hospitals", [Card.make(NORTH, "north"), Card.make(SOUTH, "south")])


def node_key() -> str:
    public = ec.derive_private_key(7, ec.SECP384R1()).public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def application() -> Application:
    return Application.make(NORTH, Card.make(NORTH, "north"), node_key())


def invitation(roster: Roster = ROSTER) -> Invitation:
    return Invitation.make(COORDINATOR, roster, "north", "coordinator.example.org:9092", CERTIFICATE, bytes(32))


@pytest.mark.parametrize("made", [application(), invitation()], ids=["application", "invitation"])
def test_a_file_is_read_back_and_any_change_in_it_is_refused(made: Application | Invitation):
    kind, text = type(made), made.to_json()
    assert kind.parse(text.encode(), "file") == made
    content = json.loads(text)
    for key, value in content.items():
        changed = {**content, key: value + 1 if isinstance(value, int) else None if isinstance(value, dict) else "x"}
        with pytest.raises((ConfigError, VerificationError)):
            kind.parse(json.dumps(changed).encode(), "file")
        with pytest.raises(ConfigError, match="expected"):
            kind.parse(json.dumps({name: one for name, one in content.items() if name != key}).encode(), "file")
    with pytest.raises(ConfigError, match="wrong: 'more'"):
        kind.parse(json.dumps({**content, "more": 1}).encode(), "file")


def test_every_byte_of_the_signed_fields_counts():
    text = invitation().to_json()
    for old, new in (("9092", "9093"), ("QUJD", "QUJE"), ('"wardround": "', '"wardround": "1'), ("00", "01")):
        with pytest.raises((ConfigError, VerificationError)):
            Invitation.parse(text.replace(old, new, 1).encode(), "file")
    with pytest.raises((ConfigError, VerificationError)):
        Application.parse(application().to_json().replace('"north"', '"norte"').encode(), "file")


def test_an_application_with_somebody_elses_card_is_refused():
    with pytest.raises(VerificationError, match="of another key than the one that signs"):
        Application.make(SOUTH, Card.make(NORTH, "north"), node_key())
    stolen = replace(application(), card=Card.make(SOUTH, "south"))
    with pytest.raises(VerificationError, match="application of south"):
        stolen.verify()


def test_only_flowers_kind_of_node_key_is_taken():
    for key in ("ssh-ed25519 AAAA", node_key() + "\nsecond line", node_key() + " comment", ""):
        with pytest.raises(ConfigError, match="node_key: expected an OpenSSH public key"):
            Application.make(NORTH, Card.make(NORTH, "north"), key)


def test_an_invitation_is_of_an_active_member_and_of_the_rosters_own_coordinator():
    with pytest.raises(ConfigError, match=r"'west': expected an active member of roster 1: "):
        Invitation.make(COORDINATOR, ROSTER, "west", "here:1", CERTIFICATE, bytes(32))
    with pytest.raises(ConfigError, match="expected an active member of roster 2: south"):
        invitation(ROSTER.revoking(COORDINATOR, "north"))
    with pytest.raises(VerificationError, match="another coordinator's"):
        Invitation.make(SOUTH, ROSTER, "north", "here:1", CERTIFICATE, bytes(32))
    other = Roster.first(SOUTH, "another", [Card.make(NORTH, "north")])
    with pytest.raises(VerificationError):
        replace(invitation(), roster=other.to_json()).verify()
    assert invitation().coordinator_fingerprint == fingerprint(COORDINATOR.id)
    assert invitation().pinned() == ROSTER


def test_another_protocol_or_version_is_refused_with_both_in_the_line():
    made = invitation()
    made.check_versions()
    with pytest.raises(ConfigError, match=f"protocol {PROTOCOL_VERSION + 1} .* this site protocol {PROTOCOL_VERSION}"):
        replace(made, protocol=PROTOCOL_VERSION + 1).check_versions()
    with pytest.raises(ConfigError, match=r"runs wardround 99\.0, this site "):
        replace(made, wardround="99.0").check_versions()


@pytest.mark.parametrize("text", ["host", "host:0", "host:65536", "a b:1", ":1", "host:1x", "http://host:1", 5])
def test_an_address_is_a_host_and_a_port(text: object):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        check_address(text, "address")
    assert check_address("[::1]:9092", "address") == ("::1", 9092)


def test_the_bundle_holds_no_code_and_names_what_is_installed(tmp_path):
    (path,) = bundle.write_bundle(tmp_path / "bundle").iterdir()
    assert path.name == "pyproject.toml" and list(bundle.bundle_files()) == ["pyproject.toml"]
    text = path.read_text()
    assert bundle.wardround_version() in text and f"protocol {PROTOCOL_VERSION}" in text
    assert all(component in text for component in bundle.COMPONENTS.values())
