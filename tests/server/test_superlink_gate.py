"""Flower's real application behind the gate, every route it has, over both sockets, with and without keys."""

import asyncio
import hashlib
import logging
from base64 import b64encode
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.common.constant import NOOP_FLWR_AID
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.fab import Fab
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from wardround.common.config import CoordinatorConfig
from wardround.common.identity import Identity
from wardround.common.roster import Roster
from wardround.server import control, superlink
from wardround.server.coordinator import CONTROL_HEADER, CoordinatorFolder, create
from wardround.server.superlink import check_database, gated, loopback_routes, make_app, public_routes, routes_of

from ..deployment.coordinator_case import Hospital, hospital

PUBLIC, INSIDE = 9092, 9093
REFUSED = {401, 403, 404}
PROTOBUF = {
    "content-type": "application/protobuf",
    **dict(RuntimeVersionMetadata.from_local_component("test").as_metadata()),
}


def enrol(folder: CoordinatorFolder, hospitals: list[Hospital], coordinator: Identity, serial: int = 1) -> None:
    cards = [one.application.card for one in hospitals]
    roster = Roster.first(coordinator, "Trial", cards)
    if serial > 1:
        roster = roster.revoking(coordinator, cards[-1].name)
    (folder.path / f"roster-{roster.serial}.json").write_text(roster.to_json())
    for one in hospitals:
        folder.keep(one.application)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A coordinator's folder with two enrolled hospitals, and the gated application."""
    path = tmp_path_factory.mktemp("coordinator")
    config = CoordinatorConfig(consortium="Trial", address=f"127.0.0.1:{PUBLIC}", max_failures_per_minute=100_000)
    text = f'consortium = "Trial"\naddress = "127.0.0.1:{PUBLIC}"\nmax_failures_per_minute = 100000\n'
    create(path / "c", config, text)
    folder = CoordinatorFolder.open(path / "c")
    hospitals = [hospital("north"), hospital("south")]
    enrol(folder, hospitals, Identity.generate())
    app = make_app(folder)
    yield {"folder": folder, "app": app, "gate": gated(app, folder), "north": hospitals[0], "south": hospitals[1]}


def call(
    world: dict[str, Any], port: int, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b""
) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(world["gate"], raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"https://127.0.0.1:{port}") as client:
            return await client.request(method, path, headers=headers, content=body)

    return asyncio.run(ask())


def signed(one: Hospital, at: datetime | None = None) -> dict[str, str]:
    """The headers of a SuperNode, made as its own class makes them."""
    said = (at or datetime.now(UTC)).isoformat()
    public = one.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signature = sign_message(one.key, said.encode())
    return PROTOBUF | {
        "flwr-public-key": b64encode(public).decode(),
        "flwr-signature": b64encode(signature).decode(),
        "flwr-timestamp": said,
    }


def test_flower_has_the_routes_that_we_think_it_has(world: dict[str, Any]) -> None:
    routes = routes_of(world["app"])
    kinds = {path.split("/")[2] for _, path in routes if path.startswith("/v1/")}
    assert kinds == {"fleet", "control", "runtime"}  # another kind would need a decision
    assert {path for _, path in routes if not path.startswith("/v1/")} == {
        "/health", "/docs", "/docs/oauth2-redirect", "/openapi.json",
    }  # fmt: skip
    assert len(routes) > 70
    fleet = {path.removeprefix("/v1/fleet/") for _, path in public_routes(routes)} - {"/health"}
    assert fleet == {
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages", "get-run",
        "get-fab", "push-object", "pull-object", "confirm-message-received",
    }  # fmt: skip
    inside = {path for _, path in loopback_routes(routes)}
    assert not any(path.startswith("/v1/fleet/") for path in inside)
    assert sum(path.startswith("/v1/control/") for path in inside) == 6


def test_every_route_of_flower_is_refused_without_credentials_on_both_sockets(world: dict[str, Any]) -> None:
    for method, path in sorted(routes_of(world["app"])):
        for port in (PUBLIC, INSIDE):
            status = call(world, port, method, path, PROTOBUF).status_code
            assert status == 200 if path == "/health" else status in REFUSED, (port, method, path, status)


def test_on_the_public_socket_an_enrolled_key_opens_fleet_and_nothing_else(world: dict[str, Any]) -> None:
    token = {CONTROL_HEADER: world["folder"].control_token()}
    for method, path in sorted(routes_of(world["app"])):
        status = call(world, PUBLIC, method, path, signed(world["north"]) | token).status_code
        if (method, path) in public_routes(routes_of(world["app"])):
            assert status != 404, path  # it reached Flower, which looks at what is asked
        else:
            assert status == 404, (method, path, status)


def activate(world: dict[str, Any], one: Hospital, signer: Hospital | None = None) -> httpx.Response:
    public = one.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    body = ActivateNodeRequest(public_key=public, heartbeat_interval=30).SerializeToString()
    return call(world, PUBLIC, "POST", "/v1/fleet/activate-node", signed(signer or one), body)


def test_an_enrolled_node_activates_and_nobody_else_in_its_name(world: dict[str, Any]) -> None:
    reply = activate(world, world["north"])
    assert reply.status_code == 200 and ActivateNodeResponse.FromString(reply.content).node_id > 0
    assert activate(world, world["north"], signer=hospital("west")).status_code == 401
    assert activate(world, world["north"], signer=world["south"]).status_code == 401  # Flower's own check


def test_a_node_that_fetches_a_message_of_a_run_that_ended_is_told_that_it_is_gone(world: dict[str, Any]) -> None:
    """A refusal makes Flower's SuperNode forget half a message, and its executor wait for the rest for ever."""
    state = world["app"].state.linkstate_factory.state()
    (node,) = [info.node_id for info in state.get_node_info() if info.name == "north"]
    fab = control.bundle()
    digest = state.store_fab(Fab(hashlib.sha256(fab).hexdigest(), fab, {}))
    run = state.create_run(
        "wardround/x", "1.0.0", digest, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp"
    )
    for ended in (False, True):
        if ended:
            assert state.stop_run(run)
        who, what = {"node": Node(node_id=node), "run_id": run}, hashlib.sha256(b"object").hexdigest()
        request = PullObjectRequest(**who, object_id=what).SerializeToString()
        reply = call(world, PUBLIC, "POST", "/v1/fleet/pull-object", signed(world["north"]), request)
        assert (reply.status_code, PullObjectResponse.FromString(reply.content).object_found) == (200, False)
        request = ConfirmMessageReceivedRequest(**who, message_object_id=what).SerializeToString()
        confirm = "/v1/fleet/confirm-message-received"
        assert call(world, PUBLIC, "POST", confirm, signed(world["north"]), request).status_code == 200


@pytest.mark.parametrize("change", ["flwr-public-key", "flwr-signature", "flwr-timestamp"])
def test_a_node_needs_all_three_headers_and_each_as_it_was_signed(world: dict[str, Any], change: str) -> None:
    good = signed(world["north"])
    other = signed(world["north"], datetime.now(UTC) - timedelta(seconds=3))
    stranger = signed(hospital("west"))
    wrong = [stranger[change], "", "bm90aGluZw==", "not base64!"]
    wrong += [other[change]] if change != "flwr-public-key" else []
    for value in wrong:
        assert call(world, PUBLIC, "POST", "/v1/fleet/get-run", good | {change: value}).status_code == 401
    missing = {key: value for key, value in good.items() if key != change}
    assert call(world, PUBLIC, "POST", "/v1/fleet/get-run", missing).status_code == 401


@pytest.mark.parametrize(("seconds", "word"), [(-600, "-600"), (600, "+600")])
def test_a_node_whose_clock_is_off_is_told_and_named(
    world: dict[str, Any],
    seconds: int,
    word: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = logging.getLogger("wardround.superlink")
    # Flower's migrations and this process's own entry configure loggers, in whichever test came first.
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "disabled", False)
    caplog.set_level(logging.WARNING, logger=log.name)
    world["gate"] = gated(world["app"], world["folder"])  # which has told nobody yet
    headers = signed(world["north"], datetime.now(UTC) + timedelta(seconds=seconds))
    for _ in range(2):
        reply = call(world, PUBLIC, "POST", "/v1/fleet/get-run", headers)
        assert reply.status_code == 401 and reply.text == f"clock: off by {word} s from the coordinator's"
    told = [record.getMessage() for record in caplog.records if "clock" in record.getMessage()]
    assert len(told) == 1 and told[0].startswith("north: its clock is 600 s ")


def test_control_answers_with_the_coordinators_token_on_loopback(world: dict[str, Any]) -> None:
    from flwr.proto.control_pb2 import ListNodesResponse

    token = {CONTROL_HEADER: world["folder"].control_token()}
    reply = call(world, INSIDE, "POST", "/v1/control/list-nodes", PROTOBUF | token)
    assert reply.status_code == 200
    assert {node.name for node in ListNodesResponse.FromString(reply.content).nodes_info} == {"north", "south"}
    for path in ("/v1/control/start-automation", "/v1/control/begin-connector-oauth", "/v1/fleet/get-run"):
        assert call(world, INSIDE, "POST", path, PROTOBUF | token).status_code == 404


def test_a_body_of_a_gigabyte_is_refused_by_what_it_says(world: dict[str, Any]) -> None:
    headers = signed(world["north"]) | {"content-length": str(2**30)}
    assert call(world, PUBLIC, "POST", "/v1/fleet/push-object", headers).status_code == 413


def test_a_revoked_hospital_and_a_stranger_are_refused_after_the_next_start(tmp_path: Path) -> None:
    config = CoordinatorConfig(consortium="Trial", address=f"127.0.0.1:{PUBLIC}")
    create(tmp_path / "c", config, f'consortium = "Trial"\naddress = "127.0.0.1:{PUBLIC}"\n')
    folder = CoordinatorFolder.open(tmp_path / "c")
    hospitals, coordinator = [hospital("north"), hospital("south")], Identity.generate()
    enrol(folder, hospitals, coordinator)
    make_app(folder)
    enrol(folder, hospitals, coordinator, serial=2)  # south is revoked
    app = make_app(folder)
    world = {"gate": gated(app, folder)}
    assert [activate(world, one).status_code for one in hospitals] == [200, 401]
    state = app.state.linkstate_factory.state()
    assert {info.name: info.status for info in state.get_node_info()} == {
        "north": "online",
        "south": "unregistered",
    }
    assert superlink.node_keys(state)({}) == "no enrolled node key"


@pytest.mark.parametrize("damage", ["cut", "overwritten", "text"])
def test_a_damaged_database_is_put_aside_and_the_hospitals_are_in_the_new_one(tmp_path: Path, damage: str) -> None:
    config = CoordinatorConfig(consortium="Trial", address=f"127.0.0.1:{PUBLIC}")
    create(tmp_path / "c", config, f'consortium = "Trial"\naddress = "127.0.0.1:{PUBLIC}"\n')
    folder = CoordinatorFolder.open(tmp_path / "c")
    enrol(folder, [hospital("north")], Identity.generate())
    app = make_app(folder)
    app.state.linkstate_factory.state()._engine.dispose()
    assert check_database(folder.database) is None
    content = folder.database.read_bytes()
    changed = {
        "cut": content[: len(content) // 2],
        "overwritten": content[:4096] + bytes(4096) + content[8192:],
        "text": b"nothing",
    }
    folder.database.write_bytes(changed[damage])
    for suffix in ("-wal", "-shm"):
        folder.database.with_name(folder.database.name + suffix).unlink(missing_ok=True)
    aside = check_database(folder.database)
    assert aside is not None and aside.read_bytes() == changed[damage] and not folder.database.exists()
    state = make_app(folder).state.linkstate_factory.state()
    assert [info.name for info in state.get_node_info()] == ["north"]
