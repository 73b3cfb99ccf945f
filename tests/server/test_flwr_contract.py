"""What server/fleet.py and server/app.py rely on of flwr's own members: each was read, and is still what was read."""

import inspect
from collections.abc import Callable
from typing import Any

import flwr
import httpx
import pytest
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import OBJECT_PUSH_SESSION_TTL_SECONDS
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.protobuf import client
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.supernode import start_client_internal
from wardround.server.superlink import IDLE_S

from ..client.test_flwr_contract import digest

# Member → digest of its source, and what of it is relied on.
READ_IN_FLWR_1_41: dict[Callable[..., Any], tuple[str, str]] = {
    start_client_internal.start_client_internal: (
        "9e89a6eb68fbec68",
        "a SuperNode asks for a message when it is done with the one before; with nothing to do every three seconds",
    ),
    SqlLinkState.activate_node: ("a06be1bac7e13f41", "refuses a node that is online"),
    SqlLinkState.deactivate_node: ("c3ad2ab2beb46a78", "False, and nothing else, for one that is not"),
    SqlLinkState.delete_messages: ("d4e4907ef5ac5a74", "takes the replies with them"),
    SqlLinkState.get_message_res: ("5c1b460981b4e8d0", "of a message that is gone it says so, at once"),
    SqlObjectStore.delete: ("ac6c8a3fdb636a2a", "takes the pieces of a message that nothing else has with it"),
    SqlCoreState.get_object: (
        "6fca12d9ec588533",
        "None of what is gone, which ends whoever pulls it; nothing of what is still to come",
    ),
    HttpGrid.pull_messages: (
        "67a5266a5a2ed515",
        "calls `pull_objects` by that name in its module; a reply whose pieces never come is an error",
    ),
}


@pytest.mark.parametrize("member", READ_IN_FLWR_1_41, ids=lambda member: member.__qualname__)
def test_what_the_coordinator_builds_on_has_not_changed(member: Callable[..., Any]):
    expected, reliance = READ_IN_FLWR_1_41[member]
    assert digest(member) == expected, (
        f"{member.__module__}.{member.__qualname__} differs from the one read in flwr 1.41.0 (installed: "
        f"{flwr.__version__}). Read it again, and server/fleet.py and server/app.py, which rely on it: {reliance}. "
        "When they agree, run tests/deployment and put the new digest here."
    )


def test_a_connection_is_not_closed_while_a_client_of_flower_may_use_it_again() -> None:
    assert (httpx.Limits().keepalive_expiry or 0) + 5 <= IDLE_S
    assert "limits=" not in inspect.getsource(client)


def test_flower_drops_a_reply_three_minutes_after_the_last_piece_that_came() -> None:
    assert OBJECT_PUSH_SESSION_TTL_SECONDS == 180
