"""The gate before the SuperLink: which socket, which route, whose key, how much, how often, how many."""

import asyncio
import socket
from collections.abc import Mapping
from typing import Any

import pytest
from wardround.server import gate
from wardround.server.gate import Allowed, Bodies, Failures, NodeKeys, Pieces, Sockets, Token, Turns, listen, network

ROUTES = frozenset({("POST", "/v1/fleet/pull-messages"), ("GET", "/health")})


class Inner:
    """What is behind the gate: notes what came, answers with `status`."""

    def __init__(self, status: int = 200) -> None:
        self.status, self.bodies, self.kinds = status, [], []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.kinds.append(scope["type"])
        if scope["type"] == "http":
            self.bodies.append((await receive()).get("body"))
            await send({"type": "http.response.start", "status": self.status, "headers": []})
            await send({"type": "http.response.body", "body": b""})


def ask(
    app: Any,
    path: str = "/v1/fleet/pull-messages",
    method: str = "POST",
    *,
    body: tuple[bytes, ...] = (b"",),
    headers: Mapping[str, str] | None = None,
    client: str = "192.0.2.1",
    **more: Any,
) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body of an answer."""
    sent: list[Any] = []
    given = [{"type": "http.request", "body": part, "more_body": i + 1 < len(body)} for i, part in enumerate(body)]

    async def receive() -> Any:
        if given:
            return given.pop(0)
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": raw, "client": (client, 1)}
    asyncio.run(app(scope | {"server": ("127.0.0.1", 9092)} | more, receive, send))
    start = sent[0]
    return start["status"], dict(start["headers"]), b"".join(one.get("body", b"") for one in sent[1:])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/runtime/acquire-task"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/v1/fleet/pull-messages"),
        ("POST", "/v1/fleet/pull-messages/"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "//v1/fleet/pull-messages"),
        ("POST", "/V1/fleet/pull-messages"),
        ("OPTIONS", "/health"),
    ],
)
def test_a_route_that_is_not_allowed_is_not_there(method: str, path: str) -> None:
    inner = Inner()
    status, headers, body = ask(Allowed(inner, ROUTES), path, method)
    assert (status, body) == (404, b"") and headers[b"connection"] == b"close"
    assert inner.kinds == []


def test_an_allowed_route_passes_and_a_root_path_does_not() -> None:
    inner = Inner()
    assert ask(Allowed(inner, ROUTES))[0] == 200
    assert ask(Allowed(inner, ROUTES), root_path="/v1/control")[0] == 404
    assert inner.kinds == ["http"]


def test_a_websocket_is_closed_and_never_passes() -> None:
    inner, sent = Inner(), []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/fleet/pull-messages", "headers": []}
    asyncio.run(Allowed(inner, ROUTES)(scope, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}] and inner.kinds == []


@pytest.mark.parametrize(
    ("server", "expected"),
    [(("127.0.0.1", 9093), 201), (("127.0.0.1", 9092), 200), (("10.0.0.1", 9092), 200), (None, 200)],
)
def test_the_socket_that_took_the_connection_decides(server: Any, expected: int) -> None:
    app = Sockets(Inner(200), Inner(201), 9093)
    lies = {"host": "127.0.0.1:9093", "x-forwarded-for": "127.0.0.1", "x-forwarded-port": "9093"}
    assert ask(app, server=server, headers=lies)[0] == expected


def test_the_start_and_end_of_flower_pass() -> None:
    public, inside = Inner(), Inner()
    app = Sockets(Failures(Allowed(public, ROUTES), 1), Allowed(inside, ROUTES), 9093)
    asyncio.run(app({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert (public.kinds, inside.kinds) == ([], ["lifespan"])


@pytest.mark.parametrize(
    ("path", "sent", "expected"),
    [
        ("/v1/control/start-run", {}, 401),
        ("/v1/control/start-run", {"x-token": "wrong"}, 401),
        ("/v1/control/start-run", {"x-token": ""}, 401),
        ("/v1/control/start-run", {"x-token": "right"}, 200),
        ("/v1/runtime/acquire-task", {}, 200),
    ],
)
def test_control_asks_for_its_token(path: str, sent: dict[str, str], expected: int) -> None:
    assert ask(Token(Inner(), "/v1/control/", "x-token", "right"), path, headers=sent)[0] == expected


def test_a_header_that_is_there_twice_is_none() -> None:
    scope = {"headers": [(b"x-token", b"right"), (b"x-token", b"right")]}
    assert gate.headers_of(scope) == {b"x-token": b""}


def test_without_a_node_key_no_byte_of_the_body_is_read() -> None:
    inner = Inner()
    app = NodeKeys(Bodies(inner, 100, 1.0), lambda headers: headers.get(b"key", b"no key").decode(), frozenset({"/h"}))

    async def receive() -> Any:
        raise AssertionError("the body was read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [], "client": ("192.0.2.1", 1)}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 401 and (b"connection", b"close") in sent[0]["headers"]
    assert sent[1]["body"] == b"no key" and inner.kinds == []
    assert ask(app, "/h")[0] == 200  # the health probe needs none
    assert ask(app, "/x", headers={"key": ""})[0] == 200


@pytest.mark.parametrize(
    ("parts", "length", "expected"),
    [
        ((b"x" * 100,), "100", 200),
        ((b"x" * 101,), "101", 413),
        ((b"",), "1073741824", 413),  # said so: nothing is read
        ((b"x" * 60, b"x" * 60), None, 413),  # in pieces, without saying how many
        ((b"x" * 60, b"x" * 40), None, 200),
        ((b"x" * 60, b"x" * 60), "3", 413),
        ((b"",), "-1", 413),
        ((b"",), "9" * 400, 413),
    ],
)
def test_a_body_has_a_size(parts: tuple[bytes, ...], length: str | None, expected: int) -> None:
    inner = Inner()
    headers = {} if length is None else {"content-length": length}
    assert ask(Bodies(inner, 100, 1.0), body=parts, headers=headers)[0] == expected
    assert inner.bodies == ([b"".join(parts)] if expected == 200 else [])


def test_a_body_that_does_not_come_ends() -> None:
    inner, sent = Inner(), []

    async def receive() -> Any:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(Bodies(inner, 10**6, 0.05)(scope, receive, send))
    assert sent[0]["status"] == 408 and inner.kinds == []


def test_an_address_that_is_refused_too_often_waits_and_no_other_does() -> None:
    now = 1000.0
    inner = Inner(401)
    app = Failures(inner, 3, clock=lambda: now)
    assert [ask(app)[0] for _ in range(5)] == [401, 401, 401, 429, 429]
    assert ask(app, client="192.0.2.2")[0] == 401
    assert len(inner.kinds) == 4  # those that wait are not looked at
    now += 20.0  # a third of a minute: one more
    assert [ask(app)[0] for _ in range(2)] == [401, 429]
    now += 3600.0
    assert [ask(app)[0] for _ in range(4)] == [401, 401, 401, 429]


def test_answers_and_faults_of_our_own_cost_an_address_nothing() -> None:
    for status in (200, 500, 503):
        app = Failures(Inner(status), 1)
        assert {ask(app)[0] for _ in range(5)} == {status}


def test_what_is_remembered_of_addresses_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "_ADDRESSES", 3)
    app = Failures(Inner(401), 1, clock=lambda: 1000.0)
    for last in range(5):
        ask(app, client=f"192.0.2.{last}")
    assert len(app._left) == 3
    assert ask(app, client="192.0.2.4")[0] == 429 and ask(app, client="192.0.2.0")[0] == 401


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
def test_what_counts_as_one_address(one: str, other: str, same: bool) -> None:
    assert (network(one) == network(other)) is same


def connect(port: int, number: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(number)]


def test_connections_are_counted_until_they_end() -> None:
    server = listen("127.0.0.1", 0).limit(5, 3)
    server.setblocking(True)
    port = server.getsockname()[1]
    clients = connect(port, 4)
    taken = [server.accept()[0] for _ in range(3)]
    with pytest.raises(ConnectionAbortedError):
        server.accept()
    assert clients[3].recv(1) == b"" and server.connections == 3  # hung up on
    taken.pop().close()
    assert server.connections == 2
    clients += connect(port, 1)
    taken.append(server.accept()[0])
    taken[-1].close()
    taken[-1].close()  # twice is once
    assert server.connections == 2
    del taken[:]  # nobody holds them any more
    assert server.connections == 0 and not server._open
    server.limit(0, 3)
    clients += connect(port, 1)
    with pytest.raises(ConnectionAbortedError):
        server.accept()
    assert not server._open
    for one in [*clients, server]:
        one.close()


def test_an_event_loop_goes_on_accepting_after_too_many() -> None:
    """asyncio must take the refusal for what it is: more connections come, and those that end make room."""

    async def scenario() -> int:
        seen: list[asyncio.StreamWriter] = []
        server = listen("127.0.0.1", 0).limit(2, 2)
        port = server.getsockname()[1]
        running = await asyncio.start_server(lambda _reader, writer: seen.append(writer), sock=server)
        clients = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        assert await clients[2][0].read() == b""  # one too many
        assert len(seen) == 2
        seen[0].close()
        await seen[0].wait_closed()
        clients.append(await asyncio.open_connection("127.0.0.1", port))
        while len(seen) < 3:
            await asyncio.sleep(0.01)
        for writer in [writer for _, writer in clients] + seen:
            writer.close()
        running.close()
        await asyncio.sleep(0.05)
        return server.connections

    assert asyncio.run(scenario()) == 0


def test_examples_in_the_docstrings_hold() -> None:
    import doctest

    from wardround.server import coordinator

    for module in (gate, coordinator):
        done = doctest.testmod(module)
        assert done.failed == 0 and done.attempted > 0


def test_so_many_at_once_are_let_in_and_a_turn_ends_when_the_answer_begins():
    inside, most, slow = 0, 0, asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def main() -> None:
        turns, waiting = Turns(app, 2), 0

        async def send(message: Any) -> None:
            nonlocal waiting
            if message["type"] == "http.response.body":  # a line so slow that it takes nothing
                waiting += 1
                if waiting == 9:
                    slow.set()
                await slow.wait()

        scope = {"type": "http"}
        await asyncio.wait_for(asyncio.gather(*(turns(scope, asyncio.sleep, send) for _ in range(9))), 30)

    asyncio.run(main())
    assert most == 2 and slow.is_set()


def test_a_turn_ends_with_an_application_that_fails():
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise OSError

    async def main() -> None:
        turns = Turns(app, 1)
        for _ in range(3):
            with pytest.raises(OSError):
                await asyncio.wait_for(turns({"type": "http"}, asyncio.sleep, asyncio.sleep), 30)

    asyncio.run(main())


def test_an_answer_leaves_in_pieces_and_whole():
    body, sent = bytes(range(256)) * 5, []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b"end"})

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Pieces(app, 500)({"type": "http"}, asyncio.sleep, send))
    assert [len(one.get("body", b"")) for one in sent] == [0, 500, 500, 280, 3]
    assert b"".join(one.get("body", b"") for one in sent) == body + b"end"
    assert [one.get("more_body", False) for one in sent[1:]] == [True, True, True, False]
