"""What client/worker.py and client/node.py rely on in flwr is what was read when they were written.

A failure here does not say that anything is wrong: it says what to read again, in the new version, before the digest
below is replaced. `python -m tests.client.test_flwr_contract` prints the present digests.
"""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import flwr
import pytest
from flwr.cli.build import build_fab_from_files
from flwr.clientapp import ClientApp
from flwr.supercore.corestate.in_memory_corestate import InMemoryCoreState
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.runtime import run_clientapp
from flwr.supernode.servicer.runtime import runtime_handlers

# Member → digest of its source, and what of it is relied on.
READ_IN_FLWR_1_41: dict[Callable[..., Any], tuple[str, str]] = {
    run_clientapp.pull_task_input: ("5607a23e1673ee87", "`pull_input` does the same, with other pauses"),
    inflatable_utils.pull_and_inflate_object_from_tree: ("139811483a15e4a6", "its arguments"),
    inflatable_utils.pull_objects: ("31bb2de46b450e6a", "what is not there yet is asked for again, after a pause"),
    run_clientapp.push_message: (
        "07cb512c93e065a9",
        "sets the message id as `_deliver` does; the same reply again is the same objects",
    ),
    run_clientapp.push_task_output: ("9206407456e79e17", "swallows HTTP errors; `details` is empty here"),
    run_clientapp.run_clientapp: (
        "6ce09559f3a2f5dc",
        "the order: heartbeat, input, app, reply, output; the installing is left out",
    ),
    ProtobufClient.from_server_address: ("786f4a7b7492e7e3", "insecure, no certificate: http; the arguments"),
    ProtobufClient._unary_unary: ("31d392e70f90d1a7", "raises httpx.HTTPStatusError and httpx.TransportError"),
    RuntimeHttpClient.AcquireTask: ("f21b3440bebc1206", "the method that the secret signs"),
    RuntimeHttpClient.SendTaskHeartbeat: ("9b42f4b0161d13ee", "`success` is false once the task is gone"),
    SuperExecAuthHttpInterceptor.__init__: ("1879970d5dda7f82", "its arguments"),
    RuntimeTokenHttpInterceptor.__init__: ("d4eb650efb25e3f6", "its argument"),
    RuntimeVersionHttpInterceptor.__init__: ("19aa8d8c4d11c840", "its argument"),
    RetryInvoker.__init__: ("a6b3929ccf2aca9b", "its arguments"),
    exponential: ("f3b566f7b0b16c42", "its arguments"),
    HeartbeatSender._run: ("b176ff96c68dbee2", "a beat every 18 to 22 s; False is tried again"),
    ClientApp.__call__: ("9ac8d938c6eef73d", "raises ValueError for a route that is not there"),
    runtime_handlers.pull_task_input: ("035e6c69a7cffcad", "a task that runs must be heard of every minute"),
    runtime_handlers.pull_messages: (
        "49089949d9fd1246",
        "no message where it has no name yet, and then it can be asked again",
    ),
    runtime_handlers.push_messages: ("f0b01d8d3c43d44a", "takes the same reply again"),
    InMemoryCoreState.finish_task: (
        "74802c12902fb68b",
        "a failed task without a reply is never answered: `_serve` pushes none",
    ),
    InMemoryCoreState.acknowledge_task_heartbeat: ("e00234bd219b7afa", "a beat extends the task by a minute"),
    InMemoryNodeState.store_message: ("8d38cc83c3fb7d5a", "a message that is there is not stored twice"),
    InMemoryNodeState._store_error_replies: ("3af03090bfae3ea7", "answers for a task whose heartbeat stopped"),
    start_client_internal._pull_and_store_message: ("eaf5d0e36dc34e4c", "first the task, then the name, then the rest"),
    start_client_internal._push_messages: (
        "00bb86faffdec114",
        "waits for ever for objects of a reply that it has the name of",
    ),
    build_fab_from_files: ("4c576876bcbbcf6a", "a fixed date, sorted files: the same bytes every time"),
}


def digest(member: Callable[..., Any]) -> str:
    return hashlib.sha256(inspect.getsource(inspect.unwrap(member)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("member", READ_IN_FLWR_1_41, ids=lambda member: member.__qualname__)
def test_what_the_worker_builds_on_has_not_changed(member):
    expected, reliance = READ_IN_FLWR_1_41[member]
    assert digest(member) == expected, (
        f"{member.__module__}.{member.__qualname__} differs from the one read in flwr 1.41.0 (installed: "
        f"{flwr.__version__}). Read it again, and client/worker.py and client/node.py, which rely on it: {reliance}. "
        "When they agree, run tests/deployment and put the new digest here."
    )


def test_flwr_is_the_minor_version_that_was_read():
    assert flwr.__version__.startswith("1.41."), f"client/worker.py was written against 1.41, got {flwr.__version__}"


if __name__ == "__main__":
    for listed in READ_IN_FLWR_1_41:
        print(digest(listed), listed.__qualname__)
