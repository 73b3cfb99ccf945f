"""`wardround client card`, `roster`, `rotate` as a hospital runs them: output, exit codes, files."""

import json
import re
from pathlib import Path

import pytest
from wardround.common import identity as module
from wardround.common.cli import main
from wardround.common.identity import Card, Identity
from wardround.common.roster import Roster

PASSPHRASE = "correct horse battery"
COORDINATOR, USURPER = Identity.generate(), Identity.generate()
OTHERS = {name: Identity.generate() for name in ("south", "east")}
CARDS = [Card.make(key, name) for name, key in OTHERS.items()]
SITE = '# ours\nname = "north"   # us\ntable = "t.csv"\ndictionary = "support_icu"\n'


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    try:
        main([str(arg) for arg in args])
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
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(module._SCRYPT, "n", 2**4)
    monkeypatch.setenv("WARDROUND_PASSPHRASE", PASSPHRASE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.toml").write_text(SITE)
    return tmp_path


@pytest.fixture
def member(site: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Roster]:
    """A site with a card, and a roster that it has not pinned yet, in `mail`."""
    assert run(capsys, "client", "card")[0] == 0
    (site / "mail").mkdir()
    return site, send(site, Roster.first(COORDINATOR, "Stroke", [own_card(site), *CARDS]))


def own_card(site: Path, name: str = "north.card.json") -> Card:
    return Card.parse((site / name).read_bytes(), "card")


def send(site: Path, roster: Roster, name: str = "roster.json") -> Roster:
    (site / "mail" / name).write_text(roster.to_json())
    return roster


def put(site: Path, out: str) -> None:
    """What a person does who follows to the letter what a command prints."""
    path = site / "site.toml"
    text = path.read_text()
    said = re.search(r"set in \S+, below its line \[identity\](?:, in the place of its (.*))?:\n\n", out)
    if said is None:
        path.write_text(text + out.partition(", add at the end of site.toml:\n\n")[2])
        return
    for key in said[1].split(" and ") if said[1] else ():
        text, times = re.subn(rf"(?m)^{key} = (\[[^]]*\]|.*).*\n", "", text)
        assert times == 1
    assert text.count("[identity]\n") == 1
    path.write_text(text.replace("[identity]\n", "[identity]\n" + out[said.end() :]))


# ---- card


def test_card_makes_the_identity_once_and_prints_name_and_fingerprint(site: Path, capsys):
    code, out, err = run(capsys, "client", "card")
    card = own_card(site)
    assert (code, out) == (0, f"north\n{card.fingerprint}\n{site / 'north.card.json'}\n")
    assert err == f"made this site's identity: {site / 'state' / 'identity.pem'}\n"
    assert run(capsys, "client", "card") == (0, out, "")
    assert run(capsys, "client", "card", "--out", "x/card.json")[0] == 0
    assert (site / "x" / "card.json").read_bytes() == (site / "north.card.json").read_bytes()
    assert (site / "site.toml").read_text() == SITE


def test_card_refuses_what_it_cannot_use_and_leaves_nothing(site: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    assert "site.toml: exists and is not a site card" in refused(capsys, "client", "card", "--out", "site.toml")
    assert "expected a file, got a folder" in refused(capsys, "client", "card", "--out", ".")
    assert "none.toml: no such file" in refused(capsys, "client", "card", "--site", "none.toml")
    monkeypatch.setenv("WARDROUND_PASSPHRASE", "short")
    assert "at least 12 characters" in refused(capsys, "client", "card")
    monkeypatch.delenv("WARDROUND_PASSPHRASE")
    assert "no passphrase: set WARDROUND_PASSPHRASE" in refused(capsys, "client", "card")
    assert not (site / "north.card.json").exists() and not (site / "state" / "identity.pem").exists()


def test_a_card_is_never_overwritten_by_another_one(site: Path, capsys):
    (site / "north.card.json").write_text(CARDS[0].to_json())
    said = "is another card, and is not overwritten: move it away, or name another file with --out"
    assert f"north.card.json: {said}" in refused(capsys, "client", "card")
    assert not (site / "state" / "identity.pem").exists()  # nothing is made before
    (site / "north.card.json").unlink()
    run(capsys, "client", "card")
    before = (site / "north.card.json").read_bytes()
    assert said in refused(capsys, "client", "rotate", "--out", "north.card.json")
    assert not (site / "state" / "identity.next.pem").exists()
    run(capsys, "client", "rotate")
    assert said in refused(capsys, "client", "rotate", "--out", "north.card.json")
    assert said in refused(capsys, "client", "card", "--out", "north.next.card.json")
    assert (site / "north.card.json").read_bytes() == before and own_card(site, "north.next.card.json").previous


def test_card_refuses_a_wrong_passphrase_and_an_open_key(site: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    run(capsys, "client", "card")
    (site / "state" / "identity.pem").chmod(0o644)
    assert "call `chmod 600" in refused(capsys, "client", "card")
    (site / "state" / "identity.pem").chmod(0o600)
    monkeypatch.setenv("WARDROUND_PASSPHRASE", "another passphrase")
    assert "wrong passphrase" in refused(capsys, "client", "card")


# ---- pin


def test_the_first_pin_shows_everybody_and_the_lines_and_never_writes_site_toml(member, capsys):
    site, roster = member
    code, out, err = run(capsys, "client", "roster", "pin", "mail/roster.json")
    assert (code, err) == (0, "")
    assert "'Stroke', serial 1, 3 members" in out and COORDINATOR.fingerprint in out
    for name, key in OTHERS.items():
        assert re.search(rf"{name} +active +{key.fingerprint}  not verified", out)
    assert re.search(r"north +active .* this site", out)
    assert "Nothing was pinned before: the coordinator's fingerprint is to be compared by telephone" in out
    assert out.endswith(f'[identity]\nroster = "roster-1.json"\nroster_digest = "{roster.digest.hex()}"\n')
    assert (site / "site.toml").read_text() == SITE
    assert "no roster is pinned" in refused(capsys, "client", "roster", "show")

    put(site, out)
    code, out, _ = run(capsys, "client", "roster", "show")
    assert code == 0 and "1 of 3 active members verified; this site's policy wants 3 in a sum" in out
    assert run(capsys, "client", "roster", "pin", "mail/roster.json")[1].endswith("\nPinned already.\n")


def test_a_pin_shows_what_changed_and_takes_effect_when_the_lines_are_put(member, capsys):
    site, roster = member
    put(site, run(capsys, "client", "roster", "pin", "mail/roster.json")[1])
    second = send(site, roster.revoking(COORDINATOR, "east").adding(COORDINATOR, [Card.make(Identity.generate(), "w")]))
    code, out, _ = run(capsys, "client", "roster", "pin", "mail/roster.json")
    assert code == 0 and "Changes from the pinned roster, serial 1:" in out
    assert "  east: was active, is revoked\n" in out and "  w: new, active\n" in out
    assert "serial 1, 3 members" in run(capsys, "client", "roster", "show")[1]  # the old one, still pinned
    put(site, out)
    assert f'roster = "roster-{second.serial}.json"' in out
    assert "serial 3, 4 members" in run(capsys, "client", "roster", "show")[1]


def test_a_roster_that_changed_without_being_pinned_again_is_refused_with_what_to_do(member, capsys):
    site, roster = member
    put(site, run(capsys, "client", "roster", "pin", "mail/roster.json")[1])
    (site / "roster-1.json").write_text(roster.revoking(COORDINATOR, "east").to_json())
    assert "is not the pinned" in refused(capsys, "client", "roster", "show")
    assert "`wardround client roster pin FILE`" in refused(capsys, "client", "roster", "verify", CARDS[0].fingerprint)
    said = refused(capsys, "client", "roster", "pin", "mail/roster.json")
    assert "is not the pinned roster, so what changed cannot be shown: put that file back" in said


def test_pin_refuses_what_is_no_step_forward(member, capsys):
    site, roster = member
    pin = ("client", "roster", "pin", "mail/next.json")
    second = roster.revoking(COORDINATOR, "east")
    (site / "mail" / "roster.json").write_text(second.to_json())
    put(site, run(capsys, "client", "roster", "pin", "mail/roster.json")[1])
    send(site, roster, "next.json")
    assert "a newer one has a higher serial" in refused(capsys, *pin)
    third = Roster.first(USURPER, "Stroke", [own_card(site), *CARDS])
    send(site, third.revoking(USURPER, "east").revoking(USURPER, "south"), "next.json")
    assert "signed by another coordinator" in refused(capsys, *pin)
    named = refused(capsys, *pin, "--coordinator", COORDINATOR.fingerprint)
    assert f"signed by {USURPER.fingerprint}, not by the coordinator you named" in named
    assert "expected 8 groups of 4" in refused(capsys, *pin, "--coordinator", "x")
    code, out, _ = run(capsys, *pin, "--coordinator", USURPER.fingerprint.lower())
    assert code == 0 and f"coordinator: another key, {USURPER.fingerprint}" in out


def test_pin_refuses_two_rosters_of_one_serial(member, capsys):
    site, _ = member
    run(capsys, "client", "roster", "pin", "mail/roster.json")
    send(site, Roster.first(COORDINATOR, "Stroke", [own_card(site), CARDS[0]]))
    assert "a coordinator signs a serial once" in refused(capsys, "client", "roster", "pin", "mail/roster.json")
    (site / "roster-1.json").write_text("mine")
    assert "exists and is not a roster" in refused(capsys, "client", "roster", "pin", "mail/roster.json")
    assert (site / "roster-1.json").read_text() == "mine"


def test_pin_refuses_a_roster_without_this_site_or_with_another_name_for_it(member, capsys):
    site, roster = member
    pin = ("client", "roster", "pin", "mail/roster.json")
    send(site, Roster.first(COORDINATOR, "Stroke", CARDS))
    assert "is not active on it: send the coordinator the card" in refused(capsys, *pin)
    send(site, roster.revoking(COORDINATOR, "north"))
    assert "is not active on it" in refused(capsys, *pin)
    (site / "site.toml").write_text(SITE.replace('"north"', '"nord"'))
    send(site, roster)
    assert "this site is 'north' there and 'nord' in site.toml" in refused(capsys, *pin)
    assert not list(site.glob("roster-*.json"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "no such file"),
        ("not JSON", "expected JSON"),
        ("{}", "expected 'wardround-roster/1', got None"),
        ("tampered", "wrong signature"),
        ("card", "got 'wardround-card/1'"),
    ],
)
def test_pin_refuses_what_is_no_roster(member, capsys, content: str | None, why: str):
    site, roster = member
    text = {"tampered": roster.to_json().replace("south", "sauth"), "card": own_card(site).to_json()}
    path = site / "mail" / "roster.json"
    path.unlink()
    if content is not None:
        path.write_text(text.get(content, content))
    assert why in refused(capsys, "client", "roster", "pin", "mail/roster.json")


# ---- verify, show


def test_verify_prints_the_line_that_verifies_and_it_does(member, capsys):
    site, _ = member
    put(site, run(capsys, "client", "roster", "pin", "mail/roster.json")[1])
    south, east = (OTHERS[name].fingerprint for name in ("south", "east"))
    code, out, _ = run(capsys, "client", "roster", "verify", *south.lower().split())
    assert code == 0 and out.startswith("south\n") and f'"{south}",  # south\n' in out
    put(site, out)
    assert run(capsys, "client", "roster", "verify", south)[1] == "south: verified already\n"
    out = run(capsys, "client", "roster", "verify", east.replace(" ", ""))[1]
    assert f'"{south}",  # south\n  "{east}",  # east\n]' in out  # those before stay
    put(site, out)
    shown = json.loads(run(capsys, "client", "roster", "show", "--json")[1])
    assert all(item["verified"] for item in shown["members"]) and len(shown["members"]) == 3
    assert "3 of 3 active members verified" in run(capsys, "client", "roster", "show")[1]


@pytest.mark.parametrize(
    "identity",
    [
        "",
        "[identity]\npassphrase_file = 'p'\n[policy]\nmin_sites = 3\n",
        '[identity]\nroster = "roster.json"\nverified = []\n',
    ],
    ids=["none", "others", "the example's"],
)
def test_what_pin_and_verify_print_can_be_put_one_after_the_other(member, capsys, identity: str):
    site, roster = member
    (site / "site.toml").write_text(SITE + identity)
    put(site, run(capsys, "client", "roster", "pin", "mail/roster.json")[1])
    for key in OTHERS.values():
        put(site, run(capsys, "client", "roster", "verify", key.fingerprint)[1])
    send(site, roster.adding(COORDINATOR, [Card.make(Identity.generate(), "w")]))
    put(site, run(capsys, "client", "roster", "pin", "mail/roster.json")[1])
    assert "3 of 4 active members verified" in run(capsys, "client", "roster", "show")[1]
    assert (site / "site.toml").read_text().count("[identity]") == 1


def test_verify_refuses_fingerprints_of_nobody_of_the_revoked_and_what_is_none(member, capsys):
    site, roster = member
    send(site, roster.revoking(COORDINATOR, "east"))
    put(site, run(capsys, "client", "roster", "pin", "mail/roster.json")[1])
    verify = ("client", "roster", "verify")
    assert "no member has this fingerprint" in refused(capsys, *verify, Identity.generate().fingerprint)
    assert "east: this key is revoked" in refused(capsys, *verify, OTHERS["east"].fingerprint)
    assert "expected 8 groups of 4" in refused(capsys, *verify, "ABCD", "EFGH")
    assert "this site; its own key is always verified" in run(capsys, *verify, own_card(site).fingerprint)[1]


def test_verified_fingerprints_of_nobody_active_are_pointed_out(member, capsys):
    site, roster = member
    put(
        site, run(capsys, "client", "roster", "pin", "mail/roster.json")[1] + f'verified = ["{CARDS[1].fingerprint}"]\n'
    )
    send(site, roster.revoking(COORDINATOR, "east"))
    out = run(capsys, "client", "roster", "pin", "mail/roster.json")[1]
    assert f"of no active member, to be taken out of identity.verified:\n  {CARDS[1].fingerprint}\n" in out


# ---- rotate


def test_rotate_writes_a_card_of_both_keys_and_finishes_once_the_roster_has_it(member, capsys):
    site, roster = member
    put(site, run(capsys, "client", "roster", "pin", "mail/roster.json")[1])
    old = own_card(site)
    code, out, err = run(capsys, "client", "rotate")
    new = own_card(site, "north.next.card.json")
    assert own_card(site) == old  # the card of the key in use stays
    assert code == 0 and new.previous == old.id and out.startswith(f"north\n{new.fingerprint}\n")
    assert err == f"made the next key: {site / 'state' / 'identity.next.pem'}\n"
    assert run(capsys, "client", "rotate") == (0, out, "")  # again: the same key, the same card
    assert "is not on the pinned roster" in refused(capsys, "client", "rotate", "--finish")

    send(site, roster.adding(COORDINATOR, [new]))
    code, out, _ = run(capsys, "client", "roster", "pin", "mail/roster.json")
    assert code == 0 and f"north: another key, {new.fingerprint}" in out and "rotate --finish" in out
    put(site, out)
    assert "rotate --finish" in refused(capsys, "client", "roster", "show")
    assert run(capsys, "client", "rotate", "--finish")[:2] == (
        0,
        f"north\n{new.fingerprint}\nin use from now on: {site / 'state' / 'identity.pem'}\n",
    )
    assert run(capsys, "client", "roster", "show")[0] == 0
    assert "no rotation was begun" in refused(capsys, "client", "rotate", "--finish")


def test_rotate_refuses_what_it_cannot_do(site: Path, capsys):
    assert "make this site's identity with `wardround client card`" in refused(capsys, "client", "rotate")
    assert "no rotation was begun" in refused(capsys, "client", "rotate", "--finish")
    assert "--out: expected only without" in refused(capsys, "client", "rotate", "--finish", "--out", "x")


@pytest.mark.parametrize(
    "command", [["card"], ["rotate"], ["roster"], *(["roster", c] for c in ("pin", "verify", "show"))]
)
def test_every_command_has_help(capsys, command: list[str]):
    code, out, err = run(capsys, "client", *command, "--help")
    assert (code, err) == (0, "") and "Usage: wardround client" in out and ("Example:" in out or command == ["roster"])
