"""What stands between a socket and Flower's SuperLink: who may ask what, how much, how often.

Run by the coordinator, in the SuperLink's process (server/superlink.py). Enters: whatever anybody sends. Leaves: what
passes, to Flower's application; a bare status to everybody else. Private: the control token. Small ASGI applications,
each around the next; none of them imports Flower.

On the public socket, in this order: an address that was refused too often waits (429); any route but the hospitals'
is not there (404); a request without the signature of an enrolled node key ends (401), before a byte of its body is
read; a body that is too large (413) or too slow (408) ends; a few at once go on, the others wait. On the loopback
socket: routes of the coordinator's own processes (404), Control with the coordinator's token (401). Which socket a
request came by is what the kernel says of the connection, never a header.

Not protected: an enrolled hospital may still send much, slowly and for long; it is known by name, and can be revoked.
Connections that never finish their handshake hold a place until a timeout ends them; beyond that a firewall helps.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import socket
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Routes = frozenset[tuple[str, str]]  # (method, path)

_LOG = logging.getLogger("wardround.superlink")
_ADDRESSES = 16_384  # whose failures are remembered; the ones longest ago are forgotten first
_CLOSE = (b"connection", b"close")


@dataclass(frozen=True)
class Sockets:
    """Gives a request to the application of the socket that accepted its connection."""

    public: Application
    loopback: Application
    loopback_port: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # no request: Flower's own start and end
            await self.loopback(scope, receive, send)
            return
        server = scope.get("server")
        inside = server is not None and server[1] == self.loopback_port
        await (self.loopback if inside else self.public)(scope, receive, send)


@dataclass(frozen=True)
class Allowed:
    """Knows these routes and no other; the path as it is, so that no spelling of another one passes."""

    app: Application
    routes: Routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or (
            scope["type"] == "http" and not scope.get("root_path") and (scope["method"], scope["path"]) in self.routes
        ):
            await self.app(scope, receive, send)
        else:
            await answer(scope, send, 404)


@dataclass(frozen=True)
class Token:
    """Asks for a secret in a header, below some path."""

    app: Application
    prefix: str
    header: str
    token: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self.prefix):
            sent = headers_of(scope).get(self.header.encode(), b"")
            if not hmac.compare_digest(sent, self.token.encode()):
                await answer(scope, send, 401)
                return
        await self.app(scope, receive, send)


@dataclass(frozen=True)
class NodeKeys:
    """Asks for the signature of an enrolled node key in the headers; `refuse` says what is wrong with them, or "".

    `refuse` reads a database: it runs in a thread. `open_paths` need no key.
    """

    app: Application
    refuse: Callable[[Mapping[bytes, bytes]], str]
    open_paths: frozenset[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.open_paths:
            reason = await asyncio.to_thread(self.refuse, headers_of(scope))
            if reason:
                await answer(scope, send, 401, reason)
                return
        await self.app(scope, receive, send)


@dataclass(frozen=True)
class Bodies:
    """Reads a request whole before anybody looks at it, up to a size and within a time."""

    app: Application
    most_bytes: int
    timeout_s: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = headers_of(scope).get(b"content-length", b"0")
        if not said.isdigit() or int(said[:20]) > self.most_bytes:
            await answer(scope, send, 413)
            return
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.timeout_s):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return  # it hung up
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self.most_bytes:
                        await answer(scope, send, 413)
                        return
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            await answer(scope, send, 408)
            return
        whole: list[bytes] = [b"".join(parts)]
        parts.clear()

        async def replay() -> Message:
            if whole:
                return {"type": "http.request", "body": whole.pop(), "more_body": False}
            return await receive()

        await self.app(scope, replay, send)


class Turns:
    """Lets so many requests at once into the application; the others wait with their body, of which there is one copy.

    Inside, a piece of 5 MB is there four times: as bytes, parsed, in the database's hands, packed again. A request's
    turn ends when its answer begins, so that nobody waits for a slow line.
    """

    def __init__(self, app: Application, most: int) -> None:
        self.app, self._free = app, asyncio.Semaphore(most)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await self._free.acquire()
        inside = True

        def leave() -> None:
            nonlocal inside
            if inside:
                inside = False
                self._free.release()

        async def answered(message: Message) -> None:
            leave()
            await send(message)

        try:
            await self.app(scope, receive, answered)
        finally:
            leave()


@dataclass(frozen=True)
class Pieces:
    """Sends an answer in pieces, each once the connection has taken the one before: else TLS holds two more copies."""

    app: Application
    piece_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def cut(message: Message) -> None:
            body = message.get("body", b"") if message["type"] == "http.response.body" else b""
            if len(body) <= self.piece_bytes:
                await send(message)
                return
            for start in range(0, len(body), self.piece_bytes):
                end = start + self.piece_bytes
                more = end < len(body) or message.get("more_body", False)
                await send({"type": message["type"], "body": body[start:end], "more_body": more})

        await self.app(scope, receive, cut)


class Later:
    """Says "later" (503) where the application failed (500) and `reason` knows why: something that goes away.

    SuperNodes and Flower's other processes then try again until it works; at a 500 they end, and with them whatever
    they had fetched and not answered.
    """

    def __init__(self, app: Application, reason: Callable[[], str]) -> None:
        self._app, self._reason, self._told = app, reason, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 500 and (line := self._reason()):
                message = {**message, "status": 503}
                if time.monotonic() - self._told > 60:
                    self._told = time.monotonic()
                    _LOG.warning("%s", line)
            await send(message)

        await self._app(scope, receive, watched)


class Failures:
    """Lets an address that was refused too often wait: so many refusals (4xx) a minute, then 429."""

    def __init__(self, app: Application, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._per_minute, self._clock = app, per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # by address: refusals left, when

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        address = network((scope.get("client") or ("",))[0])
        if self._remaining(address) < 1:
            await answer(scope, send, 429)
            return

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and 400 <= message["status"] < 500:
                self._refused(address, message["status"], scope["path"])
            await send(message)

        await self._app(scope, receive, watched)

    def _remaining(self, address: str) -> float:
        left, since = self._left.get(address, (float(self._per_minute), 0.0))
        return min(self._per_minute, left + (self._clock() - since) * self._per_minute / 60)

    def _refused(self, address: str, status: int, path: str) -> None:
        left = self._remaining(address) - 1
        if address not in self._left or left < 1:
            waits = "; it waits now" if left < 1 else ""
            _LOG.warning("refused %s: %d for %.60r%s", address, status, path, waits)
        self._left[address] = (left, self._clock())
        self._left.move_to_end(address)
        if len(self._left) > _ADDRESSES:
            self._left.popitem(last=False)


class LimitedSocket(socket.socket):
    """A listening socket that takes so many connections at a time, in all and from one address; more are hung up on.

    Counted before the TLS handshake, so that handshakes that never end count too.
    """

    def limit(self, connections: int, per_address: int) -> LimitedSocket:
        """Sets the limits; without this there are none."""
        self._most, self._per_address = connections, per_address
        self._open: Counter[str] = Counter()
        self._told = 0.0
        return self

    def accept(self) -> tuple[socket.socket, Any]:
        """As of any socket.

        Raises:
            ConnectionAbortedError: there are too many; the caller asks again when the next one comes.
        """
        plain, peer = super().accept()
        address = network(peer[0])
        if self._open.total() >= self._most or self._open[address] >= self._per_address:
            plain.close()
            if time.monotonic() - self._told > 60:
                self._told = time.monotonic()
                _LOG.warning(
                    "too many connections (%d, %d of %s): hung up", self._open.total(), self._open[address], address
                )
            if self._open[address] == 0:
                del self._open[address]
            raise ConnectionAbortedError
        self._open[address] += 1
        counted = _Counted(plain.family, plain.type, plain.proto, fileno=plain.detach())
        counted.released = weakref.finalize(counted, self._release, address)
        return counted, peer

    @property
    def connections(self) -> int:
        """Open now."""
        return self._open.total()

    def _release(self, address: str) -> None:
        self._open[address] -= 1
        if self._open[address] <= 0:
            del self._open[address]


class _Counted(socket.socket):
    """A connection that is counted until it is closed, or nobody holds it."""

    released: weakref.finalize[Any, Any]

    def close(self) -> None:
        super().close()
        self.released()


def listen(host: str, port: int) -> LimitedSocket:
    """A listening socket, without limits yet.

    Raises:
        OSError: the port is taken, or the host is none of this machine.
    """
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    made = LimitedSocket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setblocking(False)
        made.bind(where)
        made.listen(1024)
    except BaseException:
        made.close()
        raise
    return made.limit(65536, 65536)


def headers_of(scope: Scope) -> dict[bytes, bytes]:
    """A request's headers; of one that is there twice, nothing that anybody could want."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        found[name] = b"" if name in found else value
    return found


def network(address: str) -> str:
    """What counts as one address: an IPv4 address, or the 64 bits that one IPv6 customer has to himself.

    >>> network("192.0.2.7"), network("2001:db8:1:2:3::4"), network("::ffff:192.0.2.7")
    ('192.0.2.7', '2001:db8:1:2::/64', '192.0.2.7')
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((int(parsed), 64), strict=False))
    return str(parsed)


async def answer(scope: Scope, send: Send, status: int, text: str = "") -> None:
    """Ends a request, and its connection: what is left of its body is not read."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = text.encode()
    headers: Iterable[tuple[bytes, bytes]] = [(b"content-length", str(len(body)).encode()), _CLOSE]
    if status == 429:
        headers = [*headers, (b"retry-after", b"60")]
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})
