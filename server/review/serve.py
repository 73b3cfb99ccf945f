"""Serves the pages of a review until it is told to stop.

Runs at the coordinator. Enters: an open database, an address, a certificate if others than this machine connect.
Leaves: nothing. Private: records and tokens cross a network only under TLS; without it only 127.0.0.1 is listened on.
"""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..gate import listen
from .app import make_app
from .database import Database
from .items import ReviewError

DEFAULT = "127.0.0.1:8421"
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_CONNECTIONS, _PER_ADDRESS = 512, 64
_DRAIN_S, _IDLE_S = 5, 15


@dataclass(frozen=True)
class Address:
    """Where to listen, and with which certificate. `certificate` and `key`: both or neither."""

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def url(self) -> str:
        """What raters open."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificate else 'http'}://{host}:{self.port}/"


def address(listen_on: str, certificate: Path | None, key: Path | None) -> Address:
    """The address of HOST:PORT, if it may be listened on.

    Raises:
        ReviewError: not an address; others may connect and there is no certificate; one that cannot be used.
    """
    host, colon, port = listen_on.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ReviewError(f"--listen {listen_on}: expected HOST:PORT, such as {DEFAULT}")
    if (certificate is None) != (key is None):
        raise ReviewError("--certificate and --key: name both or neither")
    found = Address(host, int(port), certificate, key)
    if certificate is None and not found.loopback:
        raise ReviewError(
            f"--listen {listen_on}: others than this machine can connect there, and records and tokens must not cross "
            "a network in the clear: name --certificate and --key, or listen on 127.0.0.1"
        )
    if certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise ReviewError(f"{certificate} and {key}: cannot be used for TLS: {str(why).lower()}") from None
    return found


def _no_password() -> str:
    raise ValueError("the key is encrypted; give one that is not")


def serve(database: Database, where: Address, ready: Callable[[Any], None]) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        database: open, and used by nobody else in this process.
        where: from `address`.
        ready: called once connections are accepted, with the uvicorn server.

    Raises:
        ReviewError: it cannot be listened there.
    """
    import uvicorn

    try:
        socket = listen(where.host, where.port)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise ReviewError(f"{where.host}:{where.port}: cannot listen there: {why}") from None
    socket.limit(_CONNECTIONS, _PER_ADDRESS)
    hosts = None if where.certificate else _LOOPBACK_NAMES | {where.host}
    config = uvicorn.Config(
        make_app(database, tls=where.certificate is not None, hosts=hosts),
        loop="asyncio",  # uvloop accepts connections on its own, past the limit
        ws="none",
        lifespan="off",
        proxy_headers=False,  # a header says nothing about who connected
        server_header=False,
        access_log=False,  # who looked at which pair when is nobody's business
        log_level="warning",
        ssl_certfile=where.certificate,
        ssl_keyfile=where.key,
        timeout_graceful_shutdown=_DRAIN_S,
        timeout_keep_alive=_IDLE_S,
    )
    server = uvicorn.Server(config)
    ready(server)
    with suppress(KeyboardInterrupt):  # uvicorn raises it again after an orderly end
        server.run(sockets=[socket])
