"""`wardround client init`, `check`, `join`, `status`, `leave`, `model import` as a hospital runs them."""

from __future__ import annotations

import json
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from wardround.client import checks
from wardround.client.enrol import set_identity
from wardround.client.node import Node, bundle_digest, check_hardened, fab, node_key, supernode_command
from wardround.common.cli import main
from wardround.common.config import load_site, read_toml
from wardround.common.enrolment import Application
from wardround.common.errors import ConfigError, VerificationError
from wardround.common.identity import Card, Identity
from wardround.common.lm.packaged import base_digest, find_imported, import_model, resolve
from wardround.common.messages import PROTOCOL_VERSION
from wardround.common.roster import Roster
from wardround.common.supervisor import exclusive

from .consortium_case import NAME, OTHERS, Coordinator, fingerprints, listening, new_site, write_registry

pytestmark = pytest.mark.usefixtures("cheap_scrypt")


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    try:
        main([str(arg) for arg in args])
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line of a command that ends with exit code 2."""
    code, _, err = run(capsys, *args)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (code, err)
    return err


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WARDROUND_PASSPHRASE", raising=False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def coordinator(tmp_path: Path) -> Coordinator:
    return Coordinator(tmp_path / "coordinator")


def join(node: Node, coordinator: Coordinator, invitation: Path | None = None, *more: object) -> list[object]:
    told = ["--coordinator", coordinator.identity.fingerprint]
    file = invitation or coordinator.invite(node)
    return ["client", "join", file, "--site", node.site_toml, *told, *fingerprints(["south", "east"]), *more]


def lines(capsys: pytest.CaptureFixture[str], node: Node) -> tuple[int, dict[str, dict[str, str]]]:
    code, out, _ = run(capsys, "client", "check", "--site", node.site_toml, "--json")
    return code, {line["name"]: line for line in json.loads(out)}


# ---- init


def test_init_makes_keys_on_site_and_an_application_that_the_coordinator_can_check(tmp_path: Path, capsys):
    table, dictionary = write_registry(tmp_path)
    code, out, err = run(
        capsys, "client", "init", tmp_path / NAME, "--name", NAME, "--table", table, "--dictionary", dictionary,
        "--epsilon", "8", "--delta", "1e-5",
    )  # fmt: skip
    assert code == 0 and "telephone" in err
    folder = tmp_path / NAME
    application = Application.parse((folder / f"{NAME}.application.json").read_bytes(), "application")
    assert out.splitlines() == [NAME, application.card.fingerprint, str(folder / f"{NAME}.application.json")]
    node = Node.open(folder / "site.toml")
    assert application.node_key == node_key(node.key_path) and application.card.id == node.keys.load().id
    assert (node.config.table, node.config.policy.epsilon) == (str(table), 8.0)
    for path in (node.key_path, folder / "state" / "identity.pem", folder / "passphrase.txt"):
        assert mode(path) == 0o600
    assert mode(folder) == mode(folder / "state") == 0o700
    secrets = [(folder / "passphrase.txt").read_text().strip(), "PRIVATE KEY"]
    assert not any(secret in text for secret in secrets for text in (out, err, application.to_json()))


def test_init_does_not_touch_a_site_that_is_there(tmp_path: Path, capsys):
    node = new_site(tmp_path)
    before = {path: path.read_bytes() for path in node.folder.rglob("*") if path.is_file()}
    line = refused(
        capsys, "client", "init", node.folder, "--name", "south", "--table", tmp_path / "icu.csv", "--dictionary",
        tmp_path / "dictionary.toml",
    )  # fmt: skip
    assert "exists already" in line
    assert before == {path: path.read_bytes() for path in node.folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--table", "nothing.csv", "no such file"),
        ("--dictionary", "nothing.toml", "nothing.toml"),
        ("--name", "a/b", "letters, digits"),
        ("--delta", "2", "policy.delta"),
        ("--passphrase-file", "nothing.txt", "no such file"),
    ],
)
def test_a_wrong_setting_of_init_is_one_line_and_leaves_nothing(tmp_path: Path, capsys, option, value, words):
    table, dictionary = write_registry(tmp_path)
    given = {"--name": NAME, "--table": table, "--dictionary": dictionary, "--epsilon": 8, "--delta": 1e-5}
    line = refused(
        capsys, "client", "init", tmp_path / NAME, *[one for pair in (given | {option: value}).items() for one in pair]
    )
    assert words in line and not (tmp_path / NAME).exists()


def test_an_interrupted_init_is_repeated_with_the_keys_it_made(tmp_path: Path):
    node = new_site(tmp_path)
    keys = {path: path.read_bytes() for path in (node.key_path, node.keys.path, node.folder / "passphrase.txt")}
    node.site_toml.unlink()
    again = new_site(tmp_path)
    assert keys == {path: path.read_bytes() for path in keys} and again.config == node.config


# ---- join


def test_join_pins_roster_bundle_and_authority_and_nothing_else_of_site_toml(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    before = node.site_toml.read_text()
    code, out, told = run(capsys, *join(node, coordinator))
    assert code == 0 and "joined 'Stroke'" in out and "3 hospitals verified, this one included" in out
    assert "Next: wardround client check --site" in told
    assert all(identity.fingerprint in out for identity in OTHERS.values())
    joined = Node.open(node.site_toml)
    members = joined.keys.members(joined.keys.load().id)
    assert {members.name(one) for one in members.verified} == {NAME, "south", "east"}
    assert joined.invitation.bundle_digest == bundle_digest()
    joined.check()
    written = joined.site_toml.read_text()
    kept = [line for line in written.splitlines() if line in before.splitlines()]
    assert kept == before.splitlines() and mode(joined.site_toml) == mode(node.site_toml)


def test_nothing_is_pinned_before_the_coordinators_fingerprint_was_compared(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    before, invitation = node.site_toml.read_bytes(), coordinator.invite(node)
    told = refused(capsys, "client", "join", invitation, "--site", node.site_toml)
    assert "--coordinator" in told
    other = Identity.generate().fingerprint
    assert "not by the coordinator you named" in refused(
        capsys, "client", "join", invitation, "--site", node.site_toml, "--coordinator", other
    )
    assert "--verified: roster 1: no member has this" in refused(capsys, *join(node, coordinator), "--verified", other)
    assert "--verified: fingerprint: expected 8" in refused(capsys, *join(node, coordinator), "--verified", "ABCD")
    assert node.site_toml.read_bytes() == before and not node.invitation_path.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": PROTOCOL_VERSION + 1}, f"protocol {PROTOCOL_VERSION + 1}"),
        ({"wardround": "99.0"}, "wardround 99.0"),
        ({"bundle_digest": bytes(32)}, "bundle 000000000000"),
    ],
)
def test_another_version_or_bundle_is_refused_with_both_named(tmp_path: Path, coordinator, capsys, change, words):
    node = new_site(tmp_path)
    line = refused(capsys, *join(node, coordinator, coordinator.invite(node, **change)))
    assert words in line and "install" in line and not node.invitation_path.exists()


def test_an_invitation_that_was_changed_is_refused(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    invitation = coordinator.invite(node)
    invitation.write_text(invitation.read_text().replace("127.0.0.1:9", "127.0.0.2:9"))
    assert "wrong signature" in refused(capsys, *join(node, coordinator, invitation))


def test_another_hospitals_invitation_is_refused(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    (tmp_path / "other").mkdir()
    other = new_site(tmp_path / "other")
    line = refused(capsys, *join(node, coordinator, coordinator.invite(other)))
    assert "another key than this site's" in line and "application.json" in line


def test_another_consortium_is_joined_only_when_asked_to_replace(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    assert run(capsys, *join(node, coordinator))[0] == 0
    pinned = node.invitation_path.read_bytes()
    usurper = Coordinator(tmp_path / "usurper")
    assert "--replace" in refused(capsys, *join(node, usurper)) and node.invitation_path.read_bytes() == pinned
    node = Node.open(node.site_toml)
    (node.folder / "roster-1.json").rename(node.folder / "roster-old.json")  # serials of two consortia
    assert run(capsys, *join(node, usurper, None, "--replace"))[0] == 0
    assert Node.open(node.site_toml).invitation.pinned().coordinator == usurper.identity.id


def test_a_newer_roster_is_joined_without_comparing_the_coordinator_again_and_an_older_one_is_refused(
    tmp_path: Path, coordinator, capsys
):
    node = new_site(tmp_path)
    first = coordinator.roster(node)
    newer = first.adding(coordinator.identity, [Card.make(Identity.generate(), "far")])
    old = coordinator.invite(node, first).read_bytes()
    assert run(capsys, *join(node, coordinator, coordinator.invite(node, first)))[0] == 0
    code, out, _ = run(capsys, "client", "join", coordinator.invite(node, newer), "--site", node.site_toml)
    assert code == 0 and "3 hospitals verified" in out  # those of before stay verified
    (tmp_path / "old.json").write_bytes(old)
    line = refused(capsys, "client", "join", tmp_path / "old.json", "--site", node.site_toml)
    assert "the pinned one has serial 2" in line


def test_a_site_that_runs_is_restarted_for_another_address_and_not_for_a_roster(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    with exclusive(node.lock_path, "site"):
        assert "stop and start it" in run(capsys, *join(node, coordinator))[2]
        told = run(capsys, *join(node, coordinator))[2]
        assert "takes the roster with its next message" in told and "stop and start" not in told
        coordinator.address = "127.0.0.1:10"
        told = run(capsys, *join(node, coordinator))[2]
        assert "stop and start it" in told and "Next:" not in told


def test_leaving_forgets_the_consortium_and_keeps_keys_and_ledger(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    before = node.site_toml.read_bytes()
    assert run(capsys, *join(node, coordinator))[0] == 0
    (node.state / "ledger.jsonl").write_bytes(b"")
    code, out, _ = run(capsys, "client", "leave", "--site", node.site_toml)
    assert code == 0 and "revoke 'north'" in out
    assert node.site_toml.read_bytes() == before and not node.invitation_path.exists()
    assert node.keys.path.exists() and node.key_path.exists() and (node.state / "ledger.jsonl").exists()
    assert "joined no consortium" in refused(capsys, "client", "start", "--site", node.site_toml)


@pytest.mark.parametrize(
    "text",
    [
        'name = "n"\ntable = "t"\ndictionary = "d"\n',
        'name = "n"\ntable = "t"\ndictionary = "d"\n[identity]\nroster = "old.json"  # of 2025\n'
        'verified = [\n  "AAAABBBBCCCCDDDDEEEEFFFFGGGGHHHH",  # ] north\n]\n\n[policy]\nmin_sites = 4\n',
        'name = "n"\ntable = "t"\ndictionary = "d"\n[identity]\nverified = ["AAAABBBBCCCCDDDDEEEEFFFFGGGGHHHH"]\n'
        "[mapping.levels.sex]\n1 = 'male'\n",
    ],
)
def test_lines_of_identity_are_set_and_all_else_stays(tmp_path: Path, text: str):
    path = tmp_path / "site.toml"
    path.write_text(text)
    before = read_toml(path)
    settings = {"roster": "r.json", "roster_digest": "ab" * 32, "verified": ["BBBB" * 8]}
    set_identity(path, settings)
    assert read_toml(path) == before | {"identity": before.get("identity", {}) | settings}
    assert load_site(path).identity.roster == "r.json"


def test_a_site_toml_whose_lines_cannot_be_told_apart_is_left_alone(tmp_path: Path):
    path = tmp_path / "site.toml"
    path.write_text('name = "n"\ntable = "t"\ndictionary = "d"\nidentity = { roster = "x.json" }\n')
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="cannot be changed safely"):
        set_identity(path, {"roster": "r.json"})
    assert path.read_bytes() == before


# ---- check


def test_check_is_green_where_everything_is_right(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    with listening(coordinator):
        assert run(capsys, *join(node, coordinator))[0] == 0
        code, found = lines(capsys, node)
    assert code == 0, found
    assert {name for name, line in found.items() if line["state"] == "ok"} >= {
        "registry", "policy", "identity", "ledger", "SuperNode key", "consortium", "versions", "roster", "network",
        "clock", "disk",
    }  # fmt: skip


def test_a_site_that_joined_nothing_is_told_to_join(tmp_path: Path, capsys):
    code, found = lines(capsys, new_site(tmp_path))
    wrong = {name: line for name, line in found.items() if line["state"] == "error"}
    assert code == 1 and list(wrong) == ["consortium"] and "wardround client join" in wrong["consortium"]["fix"]
    code, out, _ = run(capsys, "client", "check", "--site", tmp_path / NAME / "site.toml")
    assert code == 1 and "wrong" in out and "1 to be mended" in out


def test_every_red_line_says_what_to_do(tmp_path: Path, coordinator, capsys, monkeypatch: pytest.MonkeyPatch):
    node = new_site(tmp_path)
    monkeypatch.setattr(checks, "MIN_FREE_BYTES", 1 << 60)
    with listening(coordinator, clock_s=900.0):
        assert run(capsys, *join(node, coordinator))[0] == 0
        (tmp_path / "icu.csv").write_text("pid\n1\n")
        (node.state / "ledger.jsonl").write_text("{}\n")
        node.key_path.chmod(0o644)
        text = node.site_toml.read_text().replace("epsilon = 8.0", "").replace("delta = 1e-05", "")
        node.site_toml.write_text(text.replace("min_sites = 3", "min_sites = 4"))
        code, found = lines(capsys, node)
    wrong = {name for name, line in found.items() if line["state"] == "error"}
    assert code == 1 and wrong == {"registry", "policy", "ledger", "SuperNode key", "roster", "clock", "disk"}
    assert all(found[name]["fix"] for name in wrong)
    assert "900 s behind" in found["clock"]["text"] or "899 s behind" in found["clock"]["text"]


def test_a_coordinator_of_another_authority_or_none_at_all_is_a_red_line(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    stranger = Coordinator(tmp_path / "stranger")
    with listening(stranger):
        coordinator.address = stranger.address
        assert run(capsys, *join(node, coordinator))[0] == 0
        _, found = lines(capsys, node)
    assert "pinned authority" in found["network"]["text"] and found["network"]["state"] == "error"
    _, found = lines(capsys, node)  # nobody listens there now
    assert found["network"]["state"] == "error" and "refused" in found["network"]["text"] + found["network"]["fix"]


def test_check_with_a_table_wants_its_dictionary(tmp_path: Path, capsys):
    assert "DICTIONARY" in refused(capsys, "client", "check", tmp_path / "icu.csv")


# ---- start and status


def test_status_of_a_site_that_never_ran_is_whole(tmp_path: Path, capsys):
    node = new_site(tmp_path)
    code, out, _ = run(capsys, "client", "status", "--site", node.site_toml, "--json")
    found = json.loads(out)
    assert code == 0 and (found["site"], found["running"], found["consortium"]) == (NAME, False, None)
    assert found["privacy"] == {"events": 0, "epsilon": 0.0, "budget": 8.0, "delta": 1e-5}
    code, out, _ = run(capsys, "client", "status", "--site", node.site_toml)
    assert code == 0 and "none joined" in out


def test_the_bundle_is_the_same_bytes_every_time_and_holds_no_code(tmp_path: Path):
    import io
    import zipfile

    names = zipfile.ZipFile(io.BytesIO(fab())).namelist()
    assert fab() == fab() and names == ["pyproject.toml", ".info/CONTENT"]


def test_the_supernode_is_started_with_every_protection_or_not_at_all(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    assert run(capsys, *join(node, coordinator))[0] == 0
    supernode, worker = Node.open(node.site_toml).children(4321)
    assert supernode.environment["WARDROUND_PASSPHRASE"] == "" and "WARDROUND_PASSPHRASE" not in worker.environment
    secret = (node.state / "runtime.secret").read_text()
    assert mode(node.state / "runtime.secret") == 0o600
    assert not any(secret in part for part in (*supernode.command, *worker.command))
    command, environment = list(supernode.command), dict(supernode.environment)
    check_hardened(command, environment)
    for name in ("--root-certificates", "--auth-supernode-private-key", "--superexec-auth-secret-file", "--isolation",
                 "--host", "--superlink", "--port"):  # fmt: skip
        place = command.index(name)
        with pytest.raises(ConfigError, match=name):
            check_hardened(command[:place] + command[place + 2 :], environment)
    for place, value in ((command.index("--isolation"), "subprocess"), (command.index("--host"), "0.0.0.0")):
        changed = [*command[: place + 1], value, *command[place + 2 :]]
        with pytest.raises(ConfigError, match="not started without"):
            check_hardened(changed, environment)
    for flag in ("--insecure", "--allow-runtime-dependency-installation"):
        with pytest.raises(ConfigError, match=flag):
            check_hardened([*command, flag], environment)
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY",
                 "FLWR_HOME"):  # fmt: skip
        with pytest.raises(ConfigError, match=name):
            check_hardened(command, {key: value for key, value in environment.items() if key != name})


def test_a_site_whose_roster_is_another_coordinators_does_not_start(tmp_path: Path, coordinator, capsys):
    node = new_site(tmp_path)
    assert run(capsys, *join(node, coordinator))[0] == 0
    usurper = Identity.generate()
    other = replace(coordinator, folder=tmp_path / "u", identity=usurper).roster(node)
    (node.folder / "other.json").write_text(other.to_json())
    set_identity(node.site_toml, {"roster": "other.json", "roster_digest": other.digest.hex()})
    with pytest.raises(VerificationError, match="another coordinator"):
        Node.open(node.site_toml).check()
    assert "another coordinator" in refused(capsys, "client", "start", "--site", node.site_toml).split("\n")[0]


def test_a_service_is_written_where_it_could_open_the_identity(tmp_path: Path, capsys, monkeypatch):
    node = new_site(tmp_path)
    code, out, _ = run(capsys, "client", "start", "--install-service", "--site", node.site_toml)
    unit = node.folder / f"wardround-{NAME}.service"
    assert code == 0 and str(unit) in out and "systemctl enable --now" in out
    text = unit.read_text()
    assert f'--site "{node.site_toml}"' in text and "RestartPreventExitStatus=2" in text and "NoNewPrivileges" in text
    assert (node.folder / "passphrase.txt").read_text().strip() not in text
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy.example:3128")
    code, out, told = run(capsys, "client", "start", "--install-service", "--site", node.site_toml)
    assert code == 0 and unit.read_text() == text and "secret" not in out + told
    assert "HTTPS_PROXY is set here; a service does not see it" in told and f"edit {unit.name}`" in told
    set_identity(node.site_toml, {"passphrase_file": None})
    line = refused(capsys, "client", "start", "--install-service", "--site", node.site_toml)
    assert "passphrase_file" in line


def test_the_supernode_program_is_the_one_beside_this_python():
    command = supernode_command(address="a:1", port=1, authority=Path("c"), key=Path("k"), secret=Path("s"))
    assert Path(command[0]).is_file()


# ---- base models


def test_an_imported_model_is_found_by_its_digest_whatever_a_run_calls_it(
    tmp_path: Path, tiny_model_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WARDROUND_CACHE", str(tmp_path / "cache"))
    code, out, _ = run(capsys, "client", "model", "import", tiny_model_path, "--json")
    found = json.loads(out)
    assert code == 0 and found["digest"] == base_digest(tiny_model_path)
    assert resolve("somebody/unknown", digest=found["digest"]) == Path(found["folder"])
    assert base_digest(Path(found["folder"])) == found["digest"]
    assert run(capsys, "client", "model", "import", tiny_model_path)[0] == 0  # again: nothing new
    assert find_imported("../" * 5 + "etc") is None


def test_a_model_that_the_policy_allows_must_be_here(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from wardround.common.lm import packaged

    monkeypatch.setenv("WARDROUND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "PACKAGED", {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    node = new_site(tmp_path)
    digest = base_digest(tiny_model_path)
    node.site_toml.write_text(node.site_toml.read_text() + f'allowed_models = ["{digest}"]\n')
    line = checks._base_model(Node.open(node.site_toml))
    assert line.state == "error" and "model import" in line.fix
    shutil.copytree(tiny_model_path, tmp_path / "hub" / "models--some--tiny" / "snapshots" / "abc")
    line = checks._base_model(Node.open(node.site_toml))
    assert line.state == "ok" and "some/tiny" in line.text
    shutil.rmtree(tmp_path / "hub")
    import_model(tiny_model_path)
    line = checks._base_model(Node.open(node.site_toml))
    assert line.state == "ok" and "imported" in line.text


def test_a_model_that_cannot_be_whole_is_not_imported(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WARDROUND_CACHE", str(tmp_path / "cache"))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    assert "has no tokenizer.json" in refused(capsys, "client", "model", "import", tmp_path / "half")
    assert "expected the folder" in refused(capsys, "client", "model", "import", tmp_path / "none")
    assert not (tmp_path / "cache" / "imported").exists()


def test_code_and_pickles_of_a_model_folder_are_not_copied(tmp_path: Path, tiny_model_path: Path):
    source = tmp_path / "source"
    shutil.copytree(tiny_model_path, source)
    (source / "modeling.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    _, target = import_model(source, tmp_path / "cache")
    assert not {"modeling.py", "pytorch_model.bin"} & {path.name for path in target.iterdir()}


# ---- apply


def test_an_application_is_written_again_with_the_keys_there_are(tmp_path: Path, capsys):
    node = new_site(tmp_path)
    path = node.folder / f"{NAME}.application.json"
    first = Application.parse(path.read_bytes(), "first")
    path.unlink()
    code, out, told = run(capsys, "client", "apply", "--site", node.site_toml)
    assert code == 0 and str(path) in out and first.card.fingerprint in out and "server enroll" in told
    again = Application.parse(path.read_bytes(), "again")
    assert (again.card.id, again.node_key) == (first.card.id, first.node_key)


@pytest.mark.parametrize("lost", [False, True])
def test_a_new_node_key_takes_the_place_of_one_that_was_lost_or_leaked(tmp_path: Path, capsys, lost: bool):
    node = new_site(tmp_path)
    before = node_key(node.key_path)
    if lost:
        node.key_path.unlink()
    code, *_ = run(capsys, "client", "apply", "--site", node.site_toml, *(() if lost else ("--new-node-key",)))
    made = Application.parse((node.folder / f"{NAME}.application.json").read_bytes(), "made")
    assert code == 0 and made.node_key == node_key(node.key_path) != before
    assert made.card.id == node.keys.load().id and mode(node.key_path) == 0o600


def test_an_application_in_a_rotation_is_of_the_next_key_and_both_sign_it(tmp_path: Path, capsys):
    node = new_site(tmp_path)
    own = node.keys.load()
    assert run(capsys, "client", "rotate", "--site", node.site_toml)[0] == 0
    code, out, _ = run(capsys, "client", "apply", "--site", node.site_toml)
    made = Application.parse((node.folder / f"{NAME}.application.json").read_bytes(), "made")
    following = node.keys.next()
    assert code == 0 and following is not None and made.card.id == following.id and following.fingerprint in out
    coordinator = Identity.generate()
    cards = [Card.make(own, NAME), *(Card.make(one, name) for name, one in OTHERS.items())]
    changed = Roster.first(coordinator, "Stroke", cards).adding(coordinator, [made.card])
    (now,) = [member for member in changed.members if member.name == NAME and member.active]
    assert now.id == following.id
