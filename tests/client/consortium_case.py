"""A hospital's folder as `wardround client init` makes it, and a coordinator that invites it, without any process."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path
from time import time

from wardround.client.enrol import Start, initialise
from wardround.client.node import Node, bundle_digest
from wardround.common.dictionary import dump_dictionary
from wardround.common.enrolment import Invitation
from wardround.common.identity import Card, Identity
from wardround.common.roster import Roster
from wardround.server.certificates import make_authority, make_server
from wardround.simulations.synthetic_registry import make

NAME = "north"
OTHERS = {name: Identity.generate() for name in ("south", "east", "west")}


def write_registry(folder: Path, patients: int = 120) -> tuple[Path, Path]:
    """A table and its dictionary."""
    table, dictionary = make(patients, seed=2)
    table.to_csv(folder / "icu.csv", index=False)
    (folder / "dictionary.toml").write_text(dump_dictionary(dictionary), encoding="utf-8")
    return folder / "icu.csv", folder / "dictionary.toml"


def new_site(folder: Path) -> Node:
    """A site that has joined nothing, in folder/north; its registry beside it."""
    table, dictionary = write_registry(folder)
    return initialise(Start(folder / NAME, NAME, table, str(dictionary), epsilon=8.0, delta=1e-5), {})[0]


@dataclass
class Coordinator:
    """Signs rosters and invitations; its authority and certificate lie in `folder`.

    Attributes:
        folder: with tls/.
        address: that it invites to.
        identity: its key.
    """

    folder: Path
    address: str = "127.0.0.1:9"
    identity: Identity = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.identity = self.identity or Identity.generate()
        self.tls = self.folder / "tls"
        self.tls.mkdir(parents=True)
        make_authority(self.tls, "Stroke")

    def roster(self, node: Node) -> Roster:
        """With the site and three others."""
        cards = [Card.make(node.keys.load(), NAME), *(Card.make(one, name) for name, one in OTHERS.items())]
        return Roster.first(self.identity, "Stroke", cards)

    def invite(self, node: Node, roster: Roster | None = None, **changes: object) -> Path:
        """An invitation's file; `changes` to its fields are signed as well."""
        authority = (self.tls / "ca.pem").read_text(encoding="ascii")
        made = Invitation.make(
            self.identity, roster or self.roster(node), NAME, self.address, authority, bundle_digest()
        )
        if changes:
            made = replace(made, **changes)  # type: ignore[arg-type]
            made = replace(made, signature=self.identity.sign("invitation", made._statement()))
        path = self.folder / f"{NAME}.invitation.json"
        path.write_text(made.to_json(), encoding="utf-8")
        return path


def fingerprints(names: Sequence[str]) -> list[str]:
    """Options that say that these were compared."""
    return [part for name in names for part in ("--verified", OTHERS[name].fingerprint)]


@contextmanager
def listening(coordinator: Coordinator, clock_s: float = 0.0) -> Iterator[None]:
    """Something that answers 404 in TLS on a free port of loopback, with a clock that is off; sets the address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(404)
            self.send_header("Date", formatdate(time() + clock_s, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            return

    make_server(coordinator.tls, "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(coordinator.tls / "server.pem", coordinator.tls / "server.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    coordinator.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with suppress(Exception):
            server.shutdown()
        server.server_close()
