"""The coordinator's SuperLink: Flower's own application, behind a gate, on two sockets of one process.

    python -m wardround.server.superlink COORDINATOR

Run by the coordinator, as a child of `wardround server start`. Enters: what hospitals' SuperNodes send, and the calls
of this coordinator's own processes. Leaves: instructions and the bundle, to enrolled nodes. Private: the TLS key, the
secret of its own processes, the database (mode 0600).

Flower serves Fleet (for SuperNodes), Control (for people) and Runtime (for ServerApps) on one port, and its Control has
no authentication of its own. Here the public socket knows Fleet and a health probe alone, and asks for the signature of
an enrolled node key before it reads a body; the other socket listens on 127.0.0.1, knows Control and Runtime alone, and
asks for the coordinator's token at Control (server/gate.py). Always on: TLS, SuperNode authentication, the SuperExec
secret, the database; always off: telemetry, documentation pages, dependency installation, proxy headers.

Node keys are in the database before the sockets open: those of active members of the newest roster. A database that is
damaged is put aside and made anew: it holds messages on their way, which both sides send again, and node keys, which
applications/ has.
"""

from __future__ import annotations

import binascii
import ctypes
import logging
import os
import resource
import sqlite3
import sys
import time
from base64 import b64decode
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import ConfigError, WardroundError
from . import fleet
from .certificates import check_server
from .coordinator import CONTROL_HEADER, CoordinatorFolder
from .disk import full
from .gate import Allowed, Application, Bodies, Failures, Later, NodeKeys, Pieces, Routes, Sockets, Token, Turns, listen

if TYPE_CHECKING:
    from fastapi import FastAPI

_LOG = logging.getLogger("wardround.superlink")
FLEET, CONTROL, RUNTIME, HEALTH = "/v1/fleet/", "/v1/control/", "/v1/runtime/", "/health"
# With SuperNode authentication Flower refuses both to everybody.
_CLOSED = frozenset({"/v1/fleet/register-node", "/v1/fleet/unregister-node", "/v1/runtime/responses"})
# What server/control.py calls; everything else of the Control API (accounts, federations, a hub) has no use here.
_CONTROL_CALLS = frozenset({"register-node", "unregister-node", "list-nodes", "start-run", "stop-run", "list-runs"})
_IDLE_S = 15.0  # a connection without a whole request for so long is closed, however slowly it drips
_AT_ONCE = 8  # requests that Flower works on: with more, memory grows with the hospitals, and nothing is faster
_PIECE_BYTES = 1 << 18
_FRESH_BYTES = 1 << 18  # what is as large as this is given back to the system once it is free
_DRAIN_S = 10  # for requests under way when it stops
# How long a connection may rest between two requests. Flower's clients (httpx) use one again for five seconds, which is
# also uvicorn's default: a request that set out as the connection was closed came back as an error.
IDLE_S = 15
_PUBLIC_KEY, _SIGNATURE, _TIMESTAMP = b"flwr-public-key", b"flwr-signature", b"flwr-timestamp"
_OURS = (
    "FLWR_TELEMETRY_ENABLED",
    "FLWR_DISABLE_UPDATE_CHECK",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
    "FLWR_HOME",
)


class BusyError(WardroundError):
    """Something is in the way that goes away by itself; the supervisor starts this process again."""

    code = "busy"


def routes_of(app: FastAPI) -> Routes:
    """Every (method, path) that an application knows."""
    from fastapi.routing import iter_route_contexts

    return frozenset(
        (method, str(getattr(route, "path", "")))
        for context in iter_route_contexts(app.routes)
        for route in (context.route,)
        for method in getattr(route, "methods", None) or ()
    )


def public_routes(routes: Routes) -> Routes:
    """Those that hospitals' SuperNodes use, and the health probe."""
    return frozenset(
        (method, path)
        for method, path in routes
        if (method == "POST" and path.startswith(FLEET) and path not in _CLOSED) or path == HEALTH
    )


def loopback_routes(routes: Routes) -> Routes:
    """Those that this coordinator's own processes use, and the health probe."""
    control = {CONTROL + call for call in _CONTROL_CALLS}
    return frozenset(
        (method, path)
        for method, path in routes
        if (method == "POST" and (path in control or (path.startswith(RUNTIME) and path not in _CLOSED)))
        or path == HEALTH
    )


def make_app(folder: CoordinatorFolder) -> FastAPI:
    """Flower's application, with its database open and the node keys in it."""
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    fleet.install()
    tls = folder.tls
    config = SuperLinkLifespanConfig(
        control_address="",  # of gRPC, which is off
        health_server_address=None,
        host="127.0.0.1",
        port=folder.config.loopback_port,
        insecure=False,
        certificates=None,  # of gRPC; ours are given to the sockets
        superexec_auth_secret=folder.secret(),
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(tls / "ca.pem"),
        ssl_certfile=str(tls / "server.pem"),
        ssl_keyfile=str(tls / "server.key"),
        database=str(folder.database),
        isolation="process",
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    _enrol(app.state.linkstate_factory.state(), folder.node_keys())
    return app


def gated(app: FastAPI, folder: CoordinatorFolder) -> Application:
    """The application as both sockets see it."""
    settings, routes = folder.config, routes_of(app)
    inner: Application = Later(_flower(app), lambda: full(folder.path))
    inner = Turns(Pieces(inner, _PIECE_BYTES), _AT_ONCE)
    bodies = Bodies(inner, settings.max_body_bytes, settings.request_timeout_s)
    signed = NodeKeys(bodies, node_keys(app.state.linkstate_factory.state()), frozenset({HEALTH}))
    public = Failures(Allowed(signed, public_routes(routes)), settings.max_failures_per_minute)
    token = Token(bodies, CONTROL, CONTROL_HEADER, folder.control_token())
    return Sockets(public, Allowed(token, loopback_routes(routes)), settings.loopback_port)


def _flower(app: FastAPI) -> Application:
    async def call(scope: Any, receive: Any, send: Any) -> None:
        await app(scope, receive, send)

    return call


def node_keys(state: Any) -> Callable[[Mapping[bytes, bytes]], str]:
    """What is wrong with a request's headers, or "": Flower's check of a node's signature, before a body is read.

    Flower checks it again with the body: that the request speaks for the node whose key it is. A signature is over the
    time, so a clock that is off makes an enrolled node fail; it is told so, and named in the log, once in ten minutes.
    """
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

    told: dict[int, float] = {}

    def refuse(headers: Mapping[bytes, bytes]) -> str:
        try:
            public = b64decode(headers[_PUBLIC_KEY], validate=True)
            signature = b64decode(headers[_SIGNATURE], validate=True)
            said = headers[_TIMESTAMP].decode("ascii")
            node = state.get_node_id_by_public_key(public)
            if node is None or not verify_signature(bytes_to_public_key(public), said.encode("ascii"), signature):
                return "no enrolled node key"
            age = (datetime.now(UTC) - datetime.fromisoformat(said)).total_seconds()
        except (KeyError, ValueError, TypeError, binascii.Error):
            return "no enrolled node key"
        if -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
            return ""
        if time.monotonic() - told.get(node, -1e9) > 600:
            told[node] = time.monotonic()
            name = next((info.name for info in state.get_node_info(node_ids=[node])), str(node))
            _LOG.warning(
                "%s: its clock is %.0f s %s ours: refused until one is set",
                name,
                abs(age),
                "behind" if age > 0 else "before",
            )
        return f"clock: off by {-age:+.0f} s from the coordinator's"

    return refuse


def _enrol(state: Any, wanted: Mapping[str, bytes]) -> None:
    """Brings the database's node keys to what roster and applications say."""
    from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, NOOP_ACCOUNT_NAME, NOOP_FLWR_AID

    known = {info.public_key: info for info in state.get_node_info(owner_aids=[NOOP_FLWR_AID])}
    for name, key in wanted.items():
        if key not in known:
            state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_DEFAULT_INTERVAL, name=name)
        elif known[key].status == "unregistered":
            _LOG.warning(
                "%s: its node key was taken out, and Flower takes none twice: it has to apply with a new one", name
            )
    for key, info in known.items():
        if key not in wanted.values() and info.status != "unregistered":
            state.delete_node(NOOP_FLWR_AID, info.node_id)
            _LOG.warning(
                "%s: no active member with this node key: it may not connect any more", info.name or info.node_id
            )


def check_database(path: Path) -> Path | None:
    """Puts a damaged database aside; returns where it is then, or None: it is sound, or there is none.

    Raises:
        ConfigError: it cannot be opened: no file, or not ours.
        BusyError: another process has it locked.
    """
    if not path.exists():
        return None
    try:
        with closing(sqlite3.connect(path, timeout=10)) as connection:
            if connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
                return None
    except sqlite3.OperationalError as error:
        if line := full(path.parent):  # whatever SQLite makes of that: nothing is wrong with the file
            raise BusyError(line) from None
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise BusyError(f"{path}: another process has it locked; trying again") from None
        if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_IOERR:  # such as a file that was cut
            raise ConfigError(f"{path}: cannot be opened: {error}") from None
    except sqlite3.DatabaseError:
        pass
    aside = path.with_name(f"{path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S}")
    path.replace(aside)
    for suffix in ("-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return aside


def serve(folder: CoordinatorFolder) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        ConfigError: a socket is taken; no certificate to show; no secret.
    """
    check_server(folder.tls, folder.host)
    settings = folder.config
    sockets = [_socket(settings.listen_host, settings.listen_port), _socket("127.0.0.1", settings.loopback_port)]
    sockets[0].limit(settings.max_connections, settings.max_connections_per_address)
    wanted = 2 * settings.max_connections + 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(hard, wanted), hard)
        )
    if (aside := check_database(folder.database)) is not None:
        _LOG.warning(
            "superlink.db was damaged: it is %s now, and a new one is made; runs go on from their journal", aside.name
        )
    import uvicorn
    from sqlalchemy.exc import OperationalError

    try:
        app = gated(make_app(folder), folder)
    except OperationalError as error:  # locked, or the disk is full
        raise BusyError(full(folder.path) or f"{folder.database}: {error.orig}; trying again") from None
    folder.database.chmod(0o600)

    config = uvicorn.Config(
        app,  # pyright: ignore[reportArgumentType]
        loop="asyncio",  # uvloop accepts connections on its own, past the limit
        http=_protocol(),
        ws="none",
        lifespan="on",
        proxy_headers=False,  # a header says nothing about who connected
        server_header=False,
        access_log=False,  # refusals are logged, each address once
        log_level="info",  # says when it is up
        ssl_certfile=str(folder.tls / "server.pem"),
        ssl_keyfile=str(folder.tls / "server.key"),
        timeout_graceful_shutdown=_DRAIN_S,
        timeout_keep_alive=IDLE_S,
    )
    public, inside = f"{settings.listen_host}:{settings.listen_port}", folder.loopback
    _LOG.info("listening: %s for hospitals, %s for this coordinator", public, inside)
    uvicorn.Server(config).run(sockets=list(sockets))
    _LOG.info("stopped")


def keep_little() -> None:
    """Lets this process give back what it no longer needs, where the C library is glibc.

    By itself that keeps what was once freed in large pieces, in as many heaps as there are threads: after an exchange
    with many hospitals a few hundred MB, for good.
    """
    mmap_threshold, arena_max = -3, -8  # malloc.h
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(mmap_threshold, _FRESH_BYTES)
        library.mallopt(arena_max, 2)


def _socket(host: str, port: int) -> Any:
    try:
        return listen(host, port)
    except OSError as error:
        raise ConfigError(f"{host}:{port}: cannot listen there: {(error.strerror or str(error)).lower()}") from None


def _protocol() -> type:
    """uvicorn's, with a limit on how long a connection may be without a whole request."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class Patient(base):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._seen: object = self  # of no request
            self._timer: Any = None
            self._look()

        def _look(self) -> None:
            if self.transport.is_closing():
                return
            cycle = self.cycle
            if (cycle is None or cycle.response_complete) and cycle is self._seen:
                self.transport.abort()
                return
            self._seen = cycle
            self._timer = self.loop.call_later(_IDLE_S, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

    return Patient


def _log_to_stderr() -> None:
    """Our lines, and Flower's warnings: at its own level it writes every poll of every hospital."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    _LOG.addHandler(handler)
    _LOG.setLevel(logging.INFO)
    _LOG.propagate = False
    import flwr.common.logger  # noqa: F401  # sets its own level when it is first imported

    logging.getLogger("flwr").setLevel(logging.WARNING)


def main(arguments: list[str]) -> int:
    """Entry of the process: 0 stopped in order, 2 a mistake that a person has to mend (its line comes last)."""
    # Flower reads a good many FLWR_ variables; some open more sockets. None counts that is not set here.
    for name in [name for name in os.environ if name.startswith("FLWR_") and name not in _OURS]:
        del os.environ[name]
    os.umask(0o077)
    _log_to_stderr()
    try:
        folder = CoordinatorFolder.open(Path(arguments[0]))
        os.environ.update(folder.environment())
        keep_little()
        serve(folder)
    except WardroundError as error:
        print(error, file=sys.stderr)
        return 1 if isinstance(error, BusyError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
