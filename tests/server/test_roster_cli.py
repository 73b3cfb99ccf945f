"""`wardround server roster` as a coordinator runs it: output, exit codes, files."""

import json
from pathlib import Path

import pytest
from wardround.common import identity as module
from wardround.common.cli import main
from wardround.common.identity import Card, Identity
from wardround.common.roster import Roster

PASSPHRASE = "correct horse battery"
SITES = {name: Identity.generate() for name in ("north", "south", "east", "west")}


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one `wardround server roster` command."""
    try:
        main(["server", "roster", *(str(arg) for arg in args)])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert PASSPHRASE not in out + err
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line of a command that ends with exit code 2."""
    code, out, err = run(capsys, *args)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
    return err


@pytest.fixture
def mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four cards, which is the working folder."""
    monkeypatch.setitem(module._SCRYPT, "n", 2**4)
    monkeypatch.setenv("WARDROUND_PASSPHRASE", PASSPHRASE)
    monkeypatch.chdir(tmp_path)
    for name, key in SITES.items():
        (tmp_path / f"{name}.json").write_text(Card.make(key, name).to_json())
    return tmp_path


MAKE = ("make", "coordinator", "north.json", "south.json", "east.json", "--consortium", "Stroke")


def newest(mail: Path) -> Roster:
    return Roster.parse((mail / "coordinator" / "roster.json").read_bytes(), "roster")


def test_make_signs_the_first_roster_with_a_key_of_its_own(mail: Path, capsys):
    code, out, err = run(capsys, *MAKE)
    assert code == 0 and "made the coordinator's key" in err
    signed = newest(mail)
    assert signed.serial == 1 and {item.name for item in signed.members} == {"north", "south", "east"}
    assert signed.digest.hex() in out and SITES["north"].fingerprint in out and "coordinator/roster-1.json" in out
    key = mail / "coordinator" / "coordinator.pem"
    assert key.stat().st_mode & 0o777 == 0o600 and b"ENCRYPTED" in key.read_bytes()
    assert "has a roster already" in refused(capsys, *MAKE)


@pytest.mark.parametrize(
    ("cards", "consortium", "why"),
    [
        (("north.json", "south.json"), "Stroke", "2 cards: a sum needs at least 3 hospitals"),
        (
            ("north.json",),
            "Stroke",
            "1 card: a sum needs at least 3 hospitals, so a smaller consortium can train nothing",
        ),
        (("north.json", "north.json", "east.json"), "Stroke", "north is on the roster already"),
        (("north.json", "south.json", "east.json"), "a\nb", "expected 1 to 100 printable characters"),
    ],
)
def test_a_first_roster_that_is_refused_leaves_nothing(mail: Path, capsys, cards, consortium: str, why: str):
    assert why in refused(capsys, "make", "coordinator", *cards, "--consortium", consortium)
    assert not (mail / "coordinator").exists()


def test_a_first_roster_without_a_passphrase_that_is_long_enough_leaves_nothing(mail: Path, capsys, monkeypatch):
    monkeypatch.setenv("WARDROUND_PASSPHRASE", "short")
    assert "at least 12 characters" in refused(capsys, *MAKE)
    monkeypatch.delenv("WARDROUND_PASSPHRASE")
    assert "no passphrase: set WARDROUND_PASSPHRASE" in refused(capsys, *MAKE)
    assert not (mail / "coordinator").exists()


def test_a_roster_that_shrinks_below_three_says_so(mail: Path, capsys):
    run(capsys, *MAKE)
    code, _, err = run(capsys, "revoke", "coordinator", "east")
    assert code == 0 and err == (
        "warning: 2 active members: a sum needs at least 3, so nothing can be trained until others are added\n"
    )
    assert run(capsys, "add", "coordinator", "west.json")[2] == ""


def test_add_and_revoke_sign_the_next_serials_and_keep_every_one(mail: Path, capsys):
    run(capsys, *MAKE)
    code, out, err = run(capsys, "add", "coordinator", "west.json")
    assert (code, err) == (0, "") and "Changes from serial 1:\n  west: new, active\n" in out
    code, out, _ = run(capsys, "revoke", "coordinator", "west")
    assert code == 0 and "west: was active, is revoked" in out and newest(mail).serial == 3
    names = sorted(path.name for path in (mail / "coordinator").iterdir())
    assert names == ["coordinator.pem", "roster-1.json", "roster-2.json", "roster-3.json", "roster.json"]
    assert (mail / "coordinator" / "roster-3.json").read_bytes() == (mail / "coordinator" / "roster.json").read_bytes()


def test_a_rotation_takes_the_old_keys_place_and_a_plain_card_does_not(mail: Path, capsys):
    run(capsys, *MAKE)
    new = Identity.generate()
    (mail / "plain.json").write_text(Card.make(new, "north").to_json())
    assert "expected a card of `wardround client rotate`" in refused(capsys, "add", "coordinator", "plain.json")
    card = Card.make(new, "north", previous=SITES["north"])
    one = json.loads(card.to_json()) | {"previous_signature": card.signature.hex()}
    (mail / "one.json").write_text(json.dumps(one))
    assert "previous key: wrong signature" in refused(capsys, "add", "coordinator", "one.json")
    assert newest(mail).serial == 1
    (mail / "both.json").write_text(card.to_json())
    assert "north: another key" in run(capsys, "add", "coordinator", "both.json")[1]
    assert newest(mail).member_named("north").id == new.id


def test_cards_that_cannot_be_taken_are_refused_and_sign_nothing(mail: Path, capsys):
    run(capsys, *MAKE)
    (mail / "again.json").write_text(Card.make(Identity.generate(), "NORTH").to_json())
    (mail / "tampered.json").write_text((mail / "west.json").read_text().replace("west", "vest"))
    (mail / "empty.json").write_text("")
    for card, why in (
        ("north.json", "north is on the roster already"),
        ("again.json", "north is on the roster with another key"),
        ("tampered.json", "card of vest: wrong signature"),
        ("empty.json", "empty.json: expected JSON"),
        ("none.json", "none.json: no such file"),
        ("coordinator", "expected a card, got a folder"),
        ("coordinator/roster.json", "got 'wardround-roster/1'"),
    ):
        assert why in refused(capsys, "add", "coordinator", card)
    for name, why in (("vest", "no member is named 'vest'"), ("", "no member is named ''")):
        assert why in refused(capsys, "revoke", "coordinator", name)
    assert newest(mail).serial == 1


def test_a_folder_without_roster_key_or_the_right_passphrase_is_refused(mail: Path, capsys, monkeypatch):
    assert "no roster here: call `wardround server roster make`" in refused(capsys, "add", "nowhere", "west.json")
    assert "no roster here" in refused(capsys, "revoke", "nowhere", "west")
    run(capsys, *MAKE)
    monkeypatch.setenv("WARDROUND_PASSPHRASE", "another passphrase")
    assert "wrong passphrase" in refused(capsys, "add", "coordinator", "west.json")
    monkeypatch.delenv("WARDROUND_PASSPHRASE")
    assert "no passphrase: set WARDROUND_PASSPHRASE" in refused(capsys, "revoke", "coordinator", "east")
    (mail / "secret").write_text(PASSPHRASE + "\n")
    (mail / "secret").chmod(0o644)
    add = ("add", "coordinator", "west.json", "--passphrase-file", "secret")
    assert "call `chmod 600 secret`" in refused(capsys, *add)
    (mail / "secret").chmod(0o600)
    assert run(capsys, *add)[0] == 0


def test_another_coordinators_key_in_the_folder_signs_nothing(mail: Path, capsys):
    run(capsys, *MAKE)
    (mail / "coordinator" / "coordinator.pem").write_bytes(Identity.generate().lock(PASSPHRASE.encode()))
    assert "not the key of the coordinator that signed it" in refused(capsys, "add", "coordinator", "west.json")


def test_a_serial_is_never_signed_twice(mail: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    run(capsys, *MAKE)
    run(capsys, "add", "coordinator", "west.json")
    second = (mail / "coordinator" / "roster-2.json").read_bytes()
    # As after a kill between the two writes: the copy is older than the newest serial.
    (mail / "coordinator" / "roster.json").write_bytes((mail / "coordinator" / "roster-1.json").read_bytes())
    assert run(capsys, "revoke", "coordinator", "east")[0] == 0 and newest(mail).serial == 3
    assert (mail / "coordinator" / "roster-2.json").read_bytes() == second
    # As when two people do it at once: both saw serial 3.
    from wardround.server import roster_cli

    third = newest(mail)
    run(capsys, "revoke", "coordinator", "west")
    monkeypatch.setattr(roster_cli, "newest", lambda _: third)
    assert "another process signed this serial just now" in refused(capsys, "revoke", "coordinator", "south")


def test_a_roster_file_that_is_not_what_was_written_is_not_built_on(mail: Path, capsys):
    run(capsys, *MAKE)
    first = mail / "coordinator" / "roster-1.json"
    (mail / "coordinator" / "roster-7.json").write_bytes(first.read_bytes())
    assert "roster-7.json: holds serial 1" in refused(capsys, "revoke", "coordinator", "east")
    (mail / "coordinator" / "roster-7.json").unlink()
    first.write_text(first.read_text().replace("Stroke", "Strike"))
    assert "wrong signature" in refused(capsys, "revoke", "coordinator", "east")


def test_a_roster_needs_a_name_and_cards(mail: Path, capsys):
    code, _, err = run(capsys, "make", "coordinator", "--consortium", "Stroke")
    assert code == 2 and "Missing argument 'CARDS...'" in err
    code, _, err = run(capsys, "make", "coordinator", "north.json")
    assert code == 2 and "Missing option '--consortium'" in err
    bad = ("make", "coordinator", "north.json", "--consortium", "a\nb")
    code, _, err = run(capsys, *bad)
    assert code == 2 and "consortium: expected 1 to 100 printable characters" in err
    assert not (mail / "coordinator" / "roster.json").exists()


@pytest.mark.parametrize("command", [[], ["make"], ["add"], ["revoke"]])
def test_every_command_has_help(capsys, command: list[str]):
    code, out, err = run(capsys, *command, "--help")
    assert (code, err) == (0, "") and "Usage: wardround server roster" in out and ("Example:" in out or not command)
