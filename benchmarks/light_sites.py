"""Many hospitals in one process, each a thread with a node key of its own: the sites of benchmarks/many_sites.py.

    python benchmarks/light_sites.py ADDRESS CA_PEM SITE_TOML …

Each speaks the Fleet API as a SuperNode does, with flwr's own connection: it is let in by its key, asks every three
seconds, fetches a message piece by piece, confirms it, sends its reply and then the pieces. What answers is the
product's ClientApp over that hospital's real folder: identity, registry, ledger, masks. Only what a SuperNode and a
worker are beside that is left out, two processes a hospital; and hospitals of a process work one after another.
"""

from __future__ import annotations

import sys
import threading
import time
from functools import partial
from pathlib import Path

from wardround.common.cli import quiet_third_parties

quiet_third_parties()

from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from cryptography.hazmat.primitives.serialization import load_ssh_private_key  # noqa: E402
from flwr.app import Context, Message, RecordDict  # noqa: E402
from flwr.supercore.inflatable.inflatable_object import (  # noqa: E402
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (  # noqa: E402
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supernode.fleet_http_connection import http_request_response  # noqa: E402
from wardround.client.app import app  # noqa: E402

IDLE_S = 3.0  # as a SuperNode
_ONE = threading.Lock()  # torch and a process's caches are shared: one hospital works at a time


def take_part(site_toml: Path, address: str, authority: bytes) -> None:
    """One hospital, for as long as the process lives."""
    key = load_ssh_private_key((site_toml.parent / "state" / "node.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    with http_request_response(address, False, authority, (key, key.public_key())) as connection:
        node, receive, send, get_run, get_fab, pull_object, push_object, confirm = connection
        print(f"{site_toml.parent.name} is node {node}", flush=True)
        known: set[int] = set()
        while True:
            if (received := receive()) is None:
                time.sleep(IDLE_S)
                continue
            about, tree = received
            run, message_id = about.metadata.run_id, about.metadata.message_id
            if run not in known:
                get_fab(get_run(run).fab_hash, run)
                known.add(run)
            names = [part.object_id for part in iterate_object_tree(tree)]
            contents = pull_objects(names, partial(pull_object, run))
            confirm(run, message_id)
            message = inflate_object_from_contents(message_id, contents)
            assert isinstance(message, Message)
            message.metadata.__dict__["_message_id"] = message_id
            began = time.time()
            with _ONE:
                reply = app(message, Context(run, node, {"site": str(site_toml)}, RecordDict(), {}))
            del message, contents
            with no_object_id_recompute():
                reply.metadata.__dict__["_message_id"] = reply.object_id
                wanted, session = send(reply, get_object_tree(reply), time.time() - began)
                push_objects(
                    get_all_nested_objects(reply), partial(push_object, run, session), object_ids_to_push=wanted
                )


def main(address: str, authority: str, sites: list[str]) -> None:
    """All of them; ends with the first that fails, or with the process."""
    failed = threading.Event()

    def run(site: str) -> None:
        try:
            take_part(Path(site), address, Path(authority).read_bytes())
        finally:
            failed.set()

    for site in sites:
        threading.Thread(target=run, args=(site,), daemon=True).start()
    failed.wait()
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
