"""A coordinator as a person starts it, over TLS on loopback: what listens, who gets in, what comes back by itself."""

import json
import os
import signal
import socket
import sqlite3
import ssl
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from wardround.server.certificates import make_authority
from wardround.server.control import Control
from wardround.server.coordinator import CONTROL_HEADER, CoordinatorFolder

from ..server.superlink_case import missing
from .coordinator_case import (
    PASSPHRASE,
    Hospital,
    Running,
    applications,
    hospital,
    make_coordinator,
    started,
    trusting,
    up,
    wardround,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=f"Flower's commands are not beside this Python: {missing()}"),
]
SITES = ("north", "south", "east")


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of TCP sockets that a process tree listens on, from /proc; UDP must have none."""
    own: set[str] = set()
    for process in tree(pid):
        for link in Path(f"/proc/{process}/fd").iterdir():
            try:
                target = str(link.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                own.add(target[8:-1])
    found: set[tuple[str, int]] = set()
    for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state and fields[9] in own:
                address, port = fields[1].split(":")
                packed = bytes.fromhex(address)
                name = socket.inet_ntop(socket.AF_INET, packed[::-1]) if len(packed) == 4 else address
                found.add((f"udp {name}" if table.startswith("udp") else name, int(port, 16)))
    return found


def tree(pid: int) -> list[int]:
    """A process and all that came from it, by parent."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for process in found:
        found += [child for child, parent in parents.items() if parent == process]
    return found


PROTOBUF = {
    "content-type": "application/protobuf",
    **dict(RuntimeVersionMetadata.from_local_component("test").as_metadata()),
}


def ask(
    folder: CoordinatorFolder, port: int, path: str, headers: dict[str, str] | None = None, body: bytes = b""
) -> int:
    with httpx.Client(verify=trusting(folder), trust_env=False, timeout=20) as client:
        url = f"https://127.0.0.1:{port}{path}"
        return client.post(url, headers=PROTOBUF | (headers or {}), content=body).status_code


def activate(folder: CoordinatorFolder, one: Hospital) -> int:
    """The answer to a hospital's SuperNode that says it is there."""
    public = one.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    body = ActivateNodeRequest(public_key=public, heartbeat_interval=30).SerializeToString()
    return ask(folder, folder.config.listen_port, "/v1/fleet/activate-node", signed(one), body)


def signed(one: Hospital) -> dict[str, str]:
    said = datetime.now(UTC).isoformat()
    public = one.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    values = {"flwr-public-key": public, "flwr-signature": sign_message(one.key, said.encode())}
    return {name: b64encode(value).decode() for name, value in values.items()} | {"flwr-timestamp": said}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A started coordinator with three enrolled hospitals."""
    base = tmp_path_factory.mktemp("deployment")
    folder = make_coordinator(base / "coordinator")
    wardround("server", "enroll", *applications(base / "mail", SITES), "-C", folder.path)
    with started(folder) as coordinator:
        yield coordinator


def test_status_shows_processes_hospitals_and_certificate(running: Running) -> None:
    running.until("all processes run", lambda: len(running.processes()) == 3)
    shown = running.status()
    assert shown["running"] and shown["problem"] == "" and shown["run"] is None
    assert {name for name, one in shown["processes"].items() if one["pid"]} == {"superlink", "serverapps", "runs"}
    assert {site["name"]: site["node"] for site in shown["sites"]} == dict.fromkeys(SITES, "registered")
    assert all(site["last_seen"] is None and site["version"] for site in shown["sites"])
    assert shown["certificate"]["days_left"] > 390
    text = wardround("server", "status", "-C", running.folder.path).stdout
    assert "running" in text and "certificate until" in text


def test_exactly_the_documented_sockets_listen(running: Running) -> None:
    config = running.folder.config
    expected = {("127.0.0.1", config.listen_port), ("127.0.0.1", config.loopback_port)}
    running.until("all processes run", lambda: len(running.processes()) == 3)
    assert listening(running.process.pid) == expected


def test_the_public_socket_answers_nobody_but_enrolled_hospitals(running: Running) -> None:
    folder, public = running.folder, running.folder.config.listen_port
    token = {CONTROL_HEADER: folder.control_token()}
    for path in (
        "/v1/control/list-nodes",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
    ):
        assert ask(folder, public, path, token) == 404
    assert ask(folder, public, "/v1/fleet/pull-messages") == 401
    assert activate(folder, hospital("stranger")) == 401


def test_the_loopback_socket_wants_the_token_and_the_secret(running: Running) -> None:
    folder, inside = running.folder, running.folder.config.loopback_port
    assert ask(folder, inside, "/v1/control/list-nodes") == 401
    assert ask(folder, inside, "/v1/control/list-nodes", {CONTROL_HEADER: folder.control_token()}) == 200
    assert ask(folder, inside, "/v1/runtime/acquire-task") in (401, 403)
    assert ask(folder, inside, "/v1/fleet/pull-messages") == 404


def test_who_trusts_another_authority_does_not_connect(running: Running, tmp_path: Path) -> None:
    make_authority(tmp_path, "another")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(tmp_path / "ca.pem")
    address = ("127.0.0.1", running.folder.config.listen_port)
    with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection(address, timeout=20) as plain:
        context.wrap_socket(plain, server_hostname="127.0.0.1")
    with socket.create_connection(address, timeout=20) as plain:  # and without TLS nobody does
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        plain.settimeout(20)
        with suppress(ConnectionResetError):
            assert b"HTTP/1.1 200" not in plain.recv(1000)


def test_a_second_start_is_refused_in_one_line(running: Running) -> None:
    done = wardround("server", "start", "-C", running.folder.path, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"the coordinator is running already (process {running.process.pid})" in done.stderr
    assert up(running.folder)


def test_a_hospital_enrolled_while_it_runs_may_connect_at_once_and_a_revoked_one_no_more(
    running: Running, tmp_path: Path
) -> None:
    folder, west = running.folder, hospital("west")
    path = tmp_path / "west.application.json"
    path.write_text(west.application.to_json())
    assert activate(folder, west) == 401
    assert "west: its node may connect" in wardround("server", "enroll", path, "-C", folder.path).stdout
    assert activate(folder, west) == 200
    (shown,) = [site for site in running.status()["sites"] if site["name"] == "west"]
    assert shown["node"] == "online" and abs(shown["last_seen"] - datetime.now(UTC).timestamp()) < 60
    done = wardround("server", "roster", "revoke", folder.path, "west")
    assert "west: its node may not connect any more" in done.stdout
    assert activate(folder, west) == 401


def test_a_superlink_that_is_killed_is_there_again_with_its_hospitals(running: Running) -> None:
    folder = running.folder
    with Control(folder) as control:
        before = {(node.name, node.id) for node in control.nodes()}
    killed = running.processes()["superlink"]
    os.kill(killed, signal.SIGKILL)
    running.until("another process", lambda: running.processes().get("superlink", killed) != killed)
    running.until("it answers", lambda: up(folder))
    with Control(folder) as control:
        assert {(node.name, node.id) for node in control.nodes()} == before
    assert running.status()["processes"]["superlink"]["restarts"] >= 1


def test_no_secret_is_on_a_command_line_or_in_a_log_and_files_are_private(running: Running) -> None:
    folder = running.folder
    secrets = [PASSPHRASE, folder.control_token(), folder.secret().hex()]
    for pid in tree(running.process.pid):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
        assert not [secret for secret in secrets if secret in line]
    logs = running.logs()
    assert logs and not [secret for secret in secrets if secret in logs]
    children = running.processes()
    told = [name for name, pid in children.items() if PASSPHRASE.encode() in Path(f"/proc/{pid}/environ").read_bytes()]
    assert told == ["serverapps"]
    for path in folder.path.rglob("*"):
        if path.parent.name in ("tls",) or path.name.startswith("roster"):
            continue
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_thousand_connections_without_a_word_leave_room_for_others(running: Running) -> None:
    folder, address = running.folder, ("127.0.0.1", running.folder.config.listen_port)
    idle: list[socket.socket] = []
    try:
        for _ in range(1000):
            idle.append(socket.create_connection(address, timeout=20))
        # The coordinator's own processes are not touched, whatever stands at the public door.
        assert ask(folder, folder.config.loopback_port, "/v1/control/list-nodes") == 401
        hung_up = 0
        for one in idle:
            one.settimeout(0.01)
            try:
                hung_up += one.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionResetError:
                hung_up += 1
        assert hung_up >= 1000 - folder.config.max_connections_per_address
    finally:
        for one in idle:
            one.close()
    running.until("room again", lambda: up(folder))


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_database_that_is_lost_between_two_starts_is_made_anew(tmp_path: Path, damage: str) -> None:
    folder = make_coordinator(tmp_path / "coordinator")
    wardround("server", "enroll", *applications(tmp_path / "mail", SITES), "-C", folder.path)
    with started(folder) as running:
        assert running.stop() == 0
    with closing(sqlite3.connect(folder.database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # what is beside the file could mend it
    content = folder.database.read_bytes()
    for path in folder.path.glob("superlink.db*"):
        path.unlink()
    if damage == "cut":
        folder.database.write_bytes(content[: len(content) // 3])
    with started(folder) as running:
        assert {site["node"] for site in running.status()["sites"]} == {"registered"}
        aside = list(folder.path.glob("superlink.db.damaged-*"))
        assert len(aside) == (damage == "cut")
        assert running.stop() == 0
    assert json.loads(folder.status_file.read_text())["supervisor"] is None


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    folder = make_coordinator(tmp_path / "coordinator")
    with socket.create_server(("127.0.0.1", folder.config.listen_port)):
        done = wardround("server", "start", "-C", folder.path, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"error: 127.0.0.1:{folder.config.listen_port}: cannot listen there: address already in use"
    )
    wardround("server", "renew", "-C", folder.path)
    with started(folder) as running:
        done = wardround("server", "stop", "-C", folder.path)
        assert "the coordinator stopped" in done.stderr and running.process.wait(10) == 0
