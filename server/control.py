"""Calls of this coordinator's own SuperLink: who may connect, which runs are on.

Run by the coordinator, on the machine where its SuperLink runs, over the loopback socket (server/superlink.py). Enters:
the folder. Leaves: nothing; the address is 127.0.0.1. Private: the control token, a header of every call. Flower's own
client does the talking.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from ..common.bundle import bundle_files
from ..common.errors import RunFolderError, WardroundError
from .coordinator import CONTROL_HEADER, CoordinatorFolder, no_proxy

_POLL_S = 0.2
# Flower's words for a run: a status, and for one that is over how it ended.
OVER, COMPLETED = "finished", "finished:completed"


class ControlError(WardroundError):
    """The SuperLink refused a call, or failed at it; the message is Flower's."""

    code = "control"


class NotRunningError(RunFolderError):
    """No SuperLink answers at the loopback address."""

    code = "not-running"


@dataclass(frozen=True)
class Node:
    """A node as the SuperLink knows it.

    Attributes:
        id: Flower's.
        name: the site's.
        status: "registered" (never seen), "online", "offline" or "unregistered".
        last_seen: seconds since 1970 of its last heartbeat, as near as Flower keeps it; None: never.
        public_key: PEM.
    """

    id: int
    name: str
    status: str
    last_seen: float | None
    public_key: bytes


@dataclass(frozen=True)
class FlowerRun:
    """A run as Flower knows it; `name` and `resume` are of its config, `status` as "running" or "finished:failed"."""

    id: int
    name: str
    resume: bool
    status: str
    details: str
    pending_at: float

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status.startswith(OVER)


def bundle() -> bytes:
    """The bundle that every run is started with, as Flower packs it; the same bytes wherever this version is."""
    return build_fab_from_files(bundle_files())[0]


def bundle_digest() -> bytes:
    """What sites pin: SHA-256 of `bundle`."""
    return hashlib.sha256(bundle()).digest()


class _Token:
    """Adds the control token to every call."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[CONTROL_HEADER] = self._token
        return call_next(context)


class Control:
    """An open client; use it as a context manager."""

    def __init__(self, folder: CoordinatorFolder) -> None:
        os.environ.update(no_proxy(os.environ))
        self._folder = folder
        self._client = ControlHttpClient.from_server_address(
            server_address=folder.loopback,
            insecure=False,
            root_certificates=(folder.tls / "ca.pem").read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="wardround"), _Token(folder.control_token())],
        )

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def nodes(self) -> list[Node]:
        """Every node that was ever registered, by name.

        Raises:
            NotRunningError, ControlError: as every call.
        """
        with self._called("list nodes"):
            reply = self._client.ListNodes(ListNodesRequest())
        found = [
            Node(
                info.node_id,
                info.name or str(info.node_id),
                info.status,
                (info.online_until - HEARTBEAT_PATIENCE * info.heartbeat_interval)
                if info.status == "online"
                else _seconds(info.last_deactivated_at),
                info.public_key,
            )
            for info in reply.nodes_info
        ]
        return sorted(found, key=lambda node: (node.name, node.id))

    def register(self, name: str, public_key: bytes) -> int:
        """Lets a node with this key (PEM) connect; gives its id, also when it was registered before.

        Raises:
            ControlError: a key that was taken out: Flower takes none twice.
        """
        known = next((node for node in self.nodes() if node.public_key == public_key), None)
        if known is not None and known.status != "unregistered":
            return known.id
        with self._called(f"register the node of {name}"):
            return int(self._client.RegisterNode(RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def unregister(self, node: int) -> None:
        """Takes a node out, for good."""
        with self._called(f"take node {node} out"):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def start(self, name: str, *, resume: bool) -> int:
        """Starts a run of this coordinator's folder and gives Flower's number of it.

        Args:
            name: of COORDINATOR/runs/NAME.
            resume: whether it continues from its journal.
        """
        content = bundle()
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        config = user_config_to_proto({"run": name, "resume": resume})
        with self._called(f"start run {name}"):
            reply = self._client.StartRun(StartRunRequest(fab=fab_to_proto(fab), override_config=config))
        if not reply.HasField("run_id"):
            raise ControlError(f"start run {name}: Flower gave it no number; its log says why")
        return int(reply.run_id)

    def stop(self, run: int) -> None:
        """Ends a run that is on; its ServerApp is ended by Flower."""
        with self._called(f"stop run {run}"):
            self._client.StopRun(StopRunRequest(run_id=run))

    def runs(self, limit: int = 100) -> list[FlowerRun]:
        """The newest runs, newest first."""
        with self._called("list runs"):
            reply = self._client.ListRuns(ListRunsRequest(limit=limit))
        found = [
            FlowerRun(
                run.run_id,
                run.override_config["run"].string if "run" in run.override_config else "",
                run.override_config["resume"].bool if "resume" in run.override_config else False,
                f"{run.status.status}:{run.status.sub_status}" if run.status.sub_status else run.status.status,
                run.status.details,
                _seconds(run.pending_at) or 0.0,
            )
            for run in reply.run_dict.values()
        ]
        return sorted(found, key=lambda run: run.pending_at, reverse=True)

    def run_named(self, name: str) -> FlowerRun | None:
        """The newest run of a name."""
        return next((run for run in self.runs() if run.name == name), None)

    def wait_until_up(self, timeout_s: float) -> None:
        """Waits until the SuperLink answers.

        Raises:
            NotRunningError: it did not, in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.nodes()
                return
            except NotRunningError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    @contextmanager
    def _called(self, what: str) -> Iterator[None]:
        try:
            yield
        except httpx.HTTPStatusError as error:
            said = FlowerError.from_json(error.response.text)
            text = said.message if said is not None else f"answered {error.response.status_code}"
            raise ControlError(f"{what}: {text}") from None
        except httpx.ConnectError as error:
            if "CERTIFICATE" in str(error):
                raise ControlError(
                    f"{what}: whoever listens at {self._folder.loopback} shows a certificate of another authority"
                ) from None
            raise NotRunningError(
                f"{self._folder.path}: nothing answers at {self._folder.loopback}: call `wardround server start` first"
            ) from None
        except httpx.HTTPError as error:
            raise ControlError(f"{what}: {type(error).__name__} at {self._folder.loopback}") from None


def _seconds(text: str) -> float | None:
    return datetime.fromisoformat(text).timestamp() if text else None
