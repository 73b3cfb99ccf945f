"""The coordinator's commands: what they make, who may read it, what they refuse, in one line, leaving nothing half."""

import json
from pathlib import Path

import pytest
from wardround.common import enrolment
from wardround.common.cli import main
from wardround.common.config import load_run
from wardround.common.enrolment import Application, Invitation
from wardround.common.errors import ConfigError
from wardround.common.identity import Card, Identity, fingerprint
from wardround.common.roster import Roster
from wardround.common.supervisor import exclusive
from wardround.server import control, service
from wardround.server.certificates import check_server, validity
from wardround.server.coordinator import CoordinatorFolder
from wardround.server.deploy_cli import _GRACE_S, _children
from wardround.server.deployment import submit

from ..deployment.coordinator_case import PASSPHRASE, Hospital, hospital

INIT = ("init", "c", "--consortium", "Stroke outcomes", "--address", "coordinator.example.org:9092")
pytestmark = pytest.mark.usefixtures("cheap_scrypt")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WARDROUND_PASSPHRASE", PASSPHRASE)
    monkeypatch.delenv("WARDROUND_COORDINATOR", raising=False)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["server", *map(str, arguments)])
        raise SystemExit(0)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def works(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code, _, err = run(capsys, *arguments)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), (code, err)
    return err


def send(name: str) -> tuple[Path, Hospital]:
    made = hospital(name)
    path = Path(f"{name}.application.json")
    path.write_text(made.application.to_json())
    return path, made


def test_init_makes_a_folder_that_nobody_else_may_enter(here: Path, capsys: pytest.CaptureFixture[str]):
    out = works(capsys, *INIT)
    folder = CoordinatorFolder.open(here / "c")
    assert folder.config.listen_port == 9092 and folder.config.loopback_port == 9093
    assert check_server(folder.tls, "coordinator.example.org").days_left() > 390
    identity = Identity.unlock((folder.path / "coordinator.pem").read_bytes(), PASSPHRASE.encode(), "key")
    assert identity.fingerprint in out
    assert folder.path.stat().st_mode & 0o777 == 0o700 and len(folder.secret()) == 32
    for path in folder.path.rglob("*"):
        mode = path.stat().st_mode & 0o777
        assert mode == (
            0o700 if path.is_dir() else 0o644 if path.suffix == ".pem" and path.stem in ("ca", "server") else 0o600
        ), path


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("c.example.org:9092", ("0.0.0.0", 9092, 9093)),
        ("192.0.2.7:65535", ("0.0.0.0", 65535, 65534)),
        ("127.0.0.1:9092", ("127.0.0.1", 9092, 9093)),
        ("localhost:9092", ("127.0.0.1", 9092, 9093)),
        ("[2001:db8::7]:9092", ("::", 9092, 9093)),
    ],
)
def test_it_listens_where_its_address_can_be_reached(here: Path, capsys, address: str, expected: tuple[str, int, int]):
    works(capsys, *INIT, "--address", address)
    config = CoordinatorFolder.open(here / "c").config
    assert (config.listen_host, config.listen_port, config.loopback_port) == expected
    works(capsys, *INIT[:1], "d", *INIT[2:], "--listen-port", 443, "--loopback-port", 8000)
    config = CoordinatorFolder.open(here / "d").config
    assert (config.listen_port, config.loopback_port) == (443, 8000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--address", "nowhere"), "--address: expected HOST:PORT"),
        (("--address", "no_host:1"), "expected"),
        (("--consortium", "a\nb"), "expected 1 to 100 printable"),
        (("--address", "-a-:9092"), "expected a host name or an IP address"),
        (("--passphrase-file", "nowhere"), "nowhere: no such file"),
    ],
)
def test_an_init_that_is_refused_leaves_nothing(here: Path, capsys, monkeypatch, arguments, message: str):
    if arguments[0] == "--passphrase-file":
        monkeypatch.delenv("WARDROUND_PASSPHRASE")
    assert message in refused(capsys, *INIT, *arguments)
    assert list(here.iterdir()) == []
    (here / "c").mkdir()
    refused(capsys, *INIT, *arguments)
    assert list((here / "c").iterdir()) == []


def test_init_takes_an_empty_folder_and_no_other(here: Path, capsys):
    (here / "c").mkdir()
    works(capsys, *INIT)
    before = sorted((path, path.read_bytes()) for path in (here / "c").rglob("*") if path.is_file())
    assert "is not empty" in refused(capsys, *INIT)
    assert before == sorted((path, path.read_bytes()) for path in (here / "c").rglob("*") if path.is_file())


def test_a_short_passphrase_is_refused(here: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WARDROUND_PASSPHRASE", "short")
    assert "at least 12 characters" in refused(capsys, *INIT)
    assert list(here.iterdir()) == []


def test_hospitals_are_enrolled_and_invited(here: Path, capsys):
    works(capsys, *INIT)
    sent = [send(name) for name in ("north", "south", "east")]
    out = works(capsys, "enroll", *(path for path, _ in sent), "-C", "c")
    folder = CoordinatorFolder.open(here / "c")
    roster = folder.roster()
    assert roster is not None and (roster.serial, len(roster.members)) == (1, 3)
    for _, made in sent:
        assert fingerprint(made.identity.id) in out
    assert set(folder.node_keys()) == {"north", "south", "east"}
    out = works(capsys, "invite", "-C", "c", "--out", "mail")
    assert fingerprint(roster.coordinator) in out
    for _, made in sent:
        name = made.application.card.name
        invitation = Invitation.parse((here / "mail" / f"{name}.invitation.json").read_bytes(), name)
        assert (invitation.site, invitation.site_id) == (name, made.identity.id)
        assert invitation.pinned().digest == roster.digest and invitation.address == "coordinator.example.org:9092"
        assert invitation.ca_certificate == (folder.tls / "ca.pem").read_text()
        assert invitation.bundle_digest == control.bundle_digest()
    # A later one: the next serial, the others stay.
    late, _ = send("west")
    works(capsys, "enroll", late, "-C", "c")
    later = folder.roster()
    assert later is not None and later.serial == 2 and len(folder.node_keys()) == 4
    # A revoked one may not connect, and is invited no more.
    works(capsys, "roster", "revoke", "c", "west")
    assert set(folder.node_keys()) == {"north", "south", "east"}
    assert "'west': expected an active member" in refused(capsys, "invite", "west", "-C", "c")


def test_a_hospital_that_lost_its_node_key_applies_again_and_the_roster_stays(here: Path, capsys):
    works(capsys, *INIT)
    path, made = send("north")
    works(capsys, "enroll", path, "-C", "c")
    folder = CoordinatorFolder.open(here / "c")
    before = folder.node_keys()["north"]
    again = Application.make(made.identity, Card.make(made.identity, "north"), hospital("x").application.node_key)
    path.write_text(again.to_json())
    works(capsys, "enroll", path, "-C", "c")
    roster = folder.roster()
    assert roster is not None and roster.serial == 1 and folder.node_keys()["north"] != before


def test_a_hospital_that_changes_its_identity_key_keeps_its_place_and_its_node(here: Path, capsys):
    works(capsys, *INIT)
    sent = {name: send(name) for name in ("north", "south", "east")}
    works(capsys, "enroll", *(path for path, _ in sent.values()), "-C", "c")
    folder, (path, old) = CoordinatorFolder.open(here / "c"), sent["north"]
    before, following = folder.node_keys()["north"], Identity.generate()
    card = Card.make(following, "north", previous=old.identity)
    path.write_text(Application.make(following, card, old.application.node_key).to_json())
    works(capsys, "enroll", path, "-C", "c")
    roster = folder.roster()
    assert roster is not None and roster.serial == 2
    assert {member.id for member in roster.members if member.active and member.name == "north"} == {following.id}
    assert folder.node_keys()["north"] == before
    works(capsys, "invite", "north", "-C", "c")
    invitation = Invitation.parse(Path("north.invitation.json").read_bytes(), "invitation")
    assert invitation.site_id == following.id


def test_applications_that_cannot_be_taken_change_nothing(here: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    works(capsys, *INIT)
    good, made = send("north")
    works(capsys, "enroll", good, "-C", "c")
    folder = CoordinatorFolder.open(here / "c")
    state = sorted(path.name for path in folder.path.rglob("*"))
    south, _ = send("south")
    assert "no such file" in refused(capsys, "enroll", south, "gone.json", "-C", "c")
    assert "got a folder" in refused(capsys, "enroll", south, "c", "-C", "c")
    Path("text.json").write_text("{}")
    assert "expected 'wardround-application/1'" in refused(capsys, "enroll", south, "text.json", "-C", "c")
    changed = json.loads(south.read_text()) | {"node_key": made.application.node_key}
    Path("changed.json").write_text(json.dumps(changed))
    assert "wrong signature" in refused(capsys, "enroll", "changed.json", "-C", "c")
    identity = Identity.generate()
    stolen = Application.make(identity, Card.make(identity, "thief"), made.application.node_key)
    Path("stolen.json").write_text(stolen.to_json())
    assert "thief: its node key is that of north" in refused(capsys, "enroll", "stolen.json", "-C", "c")
    renamed = Application.make(made.identity, Card.make(made.identity, "norte"), made.application.node_key)
    Path("renamed.json").write_text(renamed.to_json())
    assert "this key is on the roster as north" in refused(capsys, "enroll", "renamed.json", "-C", "c")
    monkeypatch.setattr(enrolment, "wardround_version", lambda: "0.0.9")
    old, _ = send("old")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setenv("WARDROUND_PASSPHRASE", PASSPHRASE)
    line = refused(capsys, "enroll", old, "-C", "c")
    assert "old runs wardround 0.0.9" in line and "install the same version at both" in line
    monkeypatch.setenv("WARDROUND_PASSPHRASE", "another passphrase")
    assert "wrong passphrase" in refused(capsys, "enroll", south, "-C", "c")
    assert sorted(path.name for path in folder.path.rglob("*")) == state


def test_a_folder_that_is_none_or_that_others_may_enter_is_refused(here: Path, capsys):
    assert "no coordinator.toml here: name the coordinator's folder with --coordinator" in refused(capsys, "status")
    works(capsys, *INIT)
    (here / "c").chmod(0o755)
    for command in (("status",), ("start",), ("renew",), ("stop",), ("invite", "north")):
        assert "chmod 700" in refused(capsys, *command, "-C", "c")


def test_the_folder_may_be_named_by_the_environment(here: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    works(capsys, *INIT)
    monkeypatch.setenv("WARDROUND_COORDINATOR", str(here / "c"))
    shown = json.loads(works(capsys, "status", "--json"))
    assert shown["consortium"] == "Stroke outcomes" and shown["running"] is False and shown["sites"] == []
    assert shown["certificate"]["days_left"] > 390


def test_status_names_the_hospitals_of_a_coordinator_that_is_not_running(here: Path, capsys):
    works(capsys, *INIT)
    works(capsys, "enroll", send("north")[0], send("south")[0], "-C", "c")
    works(capsys, "roster", "revoke", "c", "south")
    out = works(capsys, "status", "-C", "c")
    assert "not running: call `wardround server start`" in out and "no run yet" in out
    (north,) = [line for line in out.splitlines() if line.startswith("north")]
    (south,) = [line for line in out.splitlines() if line.startswith("south")]
    assert "0.1.0" in north and "revoked" in south


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "stroke", "--resume"), "no run 'stroke' was submitted"),
        (("run", "demo"), "name it with --dictionary"),
        (("run", "demo", "--dictionary", "support_icu"), "nothing answers at 127.0.0.1:"),
        (("run", "demo", "--resume", "--dictionary", "support_icu"), "a run keeps the dictionary"),
        (("run", "nowhere.toml", "--dictionary", "support_icu"), "nowhere.toml: no such file"),
        (("stop",), "the coordinator is not running"),
        (("stop", "stroke"), "no run 'stroke' was submitted"),
        (("finalize", "stroke"), "no run 'stroke' was submitted"),
        (("finalize", "../x"), "got '../x'"),
        (("invite",), "nobody is enrolled yet"),
        (("invite", "north"), "nobody is enrolled yet"),
        (("status", "--json", "--watch"), "choose one"),
        (("start", "--install-service"), "nobody who sets WARDROUND_PASSPHRASE"),
    ],
)
def test_what_cannot_be_done_is_one_line(here: Path, capsys, arguments: tuple[str, ...], message: str):
    works(capsys, *INIT)
    assert message in refused(capsys, *arguments, "-C", "c")
    assert not list((here / "c" / "runs").iterdir())


def test_a_start_is_refused_before_anything_runs(here: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    works(capsys, *INIT)
    folder = CoordinatorFolder.open(here / "c")
    monkeypatch.setenv("WARDROUND_PASSPHRASE", "another passphrase")
    assert "wrong passphrase" in refused(capsys, "start", "-C", "c")
    monkeypatch.setenv("WARDROUND_PASSPHRASE", PASSPHRASE)
    (folder.path / "secret").chmod(0o644)
    assert "secret: secret of the coordinator's processes: others may use it" in refused(capsys, "start", "-C", "c")
    (folder.path / "secret").chmod(0o600)
    settings = folder.path / "coordinator.toml"
    settings.write_text(settings.read_text().replace("coordinator.example.org", "other.example.org"))
    assert "hospitals dial other.example.org: call `wardround server renew`" in refused(capsys, "start", "-C", "c")
    stranger = Roster.first(Identity.generate(), "Another", [hospital("north").application.card])
    (folder.path / "roster-1.json").write_text(stranger.to_json())
    assert "is not the key that signed roster-1.json" in refused(capsys, "start", "-C", "c")
    with exclusive(folder.lock, "the coordinator"):
        assert "the coordinator is running already" in refused(capsys, "start", "-C", "c")
    assert not (folder.path / "superlink.db").exists() and list(folder.logs.iterdir()) == []


def test_renew_makes_a_certificate_for_the_address_as_it_is_now(here: Path, capsys):
    works(capsys, *INIT)
    settings = here / "c" / "coordinator.toml"
    settings.write_text(settings.read_text().replace("coordinator.example.org", "other.example.org"))
    assert "other.example.org" in works(capsys, "renew", "-C", "c")
    assert "other.example.org" in validity(here / "c" / "tls" / "server.pem").hosts


def test_a_new_authority_takes_the_place_of_one_whose_key_is_lost(here: Path, capsys):
    works(capsys, *INIT)
    folder = CoordinatorFolder.open(here / "c")
    before = (folder.tls / "ca.pem").read_text()
    with exclusive(folder.lock, "the coordinator"):
        assert "stop the coordinator first" in refused(capsys, "renew", "--new-authority", "-C", "c")
    (folder.tls / "ca.key").unlink()
    assert "call `wardround server invite`" in works(capsys, "renew", "--new-authority", "-C", "c")
    assert (folder.tls / "ca.pem.old").read_text() == before != (folder.tls / "ca.pem").read_text()
    assert check_server(folder.tls, "coordinator.example.org").days_left() > 390
    assert (folder.tls / "ca.key").stat().st_mode & 0o777 == 0o600


def test_the_passphrase_reaches_one_process_and_no_command_line(here: Path, capsys):
    works(capsys, *INIT)
    folder = CoordinatorFolder.open(here / "c")
    children = {child.name: child for child in _children(folder, PASSPHRASE)}
    assert [name for name, child in children.items() if PASSPHRASE in child.environment.values()] == ["serverapps"]
    for child in children.values():
        assert PASSPHRASE not in " ".join(child.command)
        assert folder.secret().hex() not in " ".join(child.command) and folder.control_token() not in child.command
        for name in ("FLWR_TELEMETRY_ENABLED", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "FLWR_HOME", "NO_PROXY"):
            assert child.environment[name]
        assert child.environment["FLWR_TELEMETRY_ENABLED"] == "0"


def test_a_service_unit_starts_this_coordinator(here: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WARDROUND_CACHE", str(here / "cache"))
    (here / "phrase").write_text(PASSPHRASE + "\n")
    (here / "phrase").chmod(0o600)
    works(capsys, *INIT, "--passphrase-file", "phrase")
    out = works(capsys, "start", "--install-service", "-C", "c")
    assert "sudo systemctl enable --now wardround-coordinator.service" in out
    unit = (here / "c" / service.NAME).read_text()
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    program = Path(line.split('"')[1])
    assert program.is_file() and line.endswith(f'server start --coordinator "{here / "c"}"')
    assert "RestartPreventExitStatus=2" in unit and PASSPHRASE not in unit
    assert (here / "cache").is_dir() and f'Environment=WARDROUND_CACHE="{here / "cache"}"' in unit
    assert f'ReadWritePaths="{here / "c"}" "{here / "cache"}"' in unit
    grace = sum(child.grace_s or _GRACE_S for child in _children(CoordinatorFolder.open(here / "c"), PASSPHRASE))
    assert f"TimeoutStopSec={grace + 15:.0f}" in unit, "systemd must not kill what may still take its time"


def test_a_revocation_opens_the_key_as_coordinator_toml_says_and_asks_for_new_invitations(
    here: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    (here / "phrase").write_text(PASSPHRASE + "\n")
    (here / "phrase").chmod(0o600)
    works(capsys, *INIT, "--passphrase-file", "phrase")
    monkeypatch.delenv("WARDROUND_PASSPHRASE")
    out = works(capsys, "enroll", *(send(name)[0] for name in ("north", "south", "east", "west")), "-C", "c")
    assert "call `wardround server invite`, send them" in out and "roster pin" not in out
    assert "`wardround server roster revoke`" in out
    out = works(capsys, "roster", "revoke", "c", "west")
    assert "is revoked" in out and "call `wardround server invite`, send them" in out and "roster pin" not in out


def test_a_run_whose_plan_costs_more_than_its_epsilon_is_refused_before_anybody_is_asked(
    here: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    works(capsys, *INIT)
    works(capsys, "enroll", *(send(name)[0] for name in ("north", "south", "east")), "-C", "c")
    folder = CoordinatorFolder.open(here / "c")
    settings = load_run(Path("soak"), ("privacy.epsilon=3.0",))
    with pytest.raises(ConfigError, match=r"epsilon = 3\.0 at delta = 1e-05: what is spent without the rounds costs"):
        submit(folder, settings, Path("support_icu"))
    assert folder.runs() == []
    assert submit(folder, load_run(Path("soak"), ()), Path("support_icu")).config.name == "soak"


@pytest.mark.parametrize("command", ["init", "enroll", "invite", "start", "run", "status", "stop", "finalize", "renew"])
def test_every_command_has_help_with_an_example(capsys, command: str):
    out = works(capsys, command, "--help")
    assert "Example" in out and "wardround server" in out
