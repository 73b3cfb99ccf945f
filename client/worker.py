"""The process that answers a hospital's messages, one after another, and stays: `python -m wardround.client.worker`.

Run by `wardround client start`, beside Flower's SuperNode, in the place of Flower's own executor, which would start a
process for every message and put the bundle that came with it first on `sys.path`. Enters: tasks from the SuperNode's
Runtime API on loopback (a secret says who may take them). Leaves, through client/app.py and the gate behind it: its
replies. Private: what the gate keeps; nothing of a patient or of an exception is in this process's own log.

For every message: the bundle's SHA-256 is compared with the pinned one before anything of it is used, and nothing of it
is ever installed, unpacked or imported: the code is what is installed here. A message with another bundle is not looked
at; "bundle" is answered, and the ledger has a refusal. Then `client.app.app` runs in this process, so that a base model
of 28 GB is loaded once, not once a round.

A message under way is kept in `state/worker.message` with the task's token (mode 0600; instructions hold nothing of a
patient). A worker that was killed is started again, finds it, and goes on with the same message while the SuperNode
still waits for the answer (a minute); local training goes on from its last step (client/checkpoint.py). Of a message
that ended the process twice the coordinator hears "site".

The process ends with 0, to be started again, when another run begins and when its memory has grown: a fresh one has no
leftovers. SIGTERM lets the message under way finish, for a bounded time. Every use of flwr's own members is listed,
with what is relied on, in tests/client/test_flwr_contract.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..common.cli import quiet_third_parties
from ..common.errors import ConfigError, UserError, WardroundError

quiet_third_parties()  # before flwr is imported: it reads its environment once

import httpx  # noqa: E402
from flwr.app import Context, Error, Message  # noqa: E402
from flwr.common.constant import SubStatus  # noqa: E402
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto  # noqa: E402
from flwr.proto.message_pb2 import Context as ContextProto  # noqa: E402
from flwr.proto.message_pb2 import Message as MessageProto  # noqa: E402
from flwr.proto.node_pb2 import Node  # noqa: E402
from flwr.proto.runtime_pb2 import (  # noqa: E402
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType  # noqa: E402
from flwr.supercore.heartbeat import HeartbeatSender  # noqa: E402
from flwr.supercore.inflatable.inflatable_protobuf_utils import (  # noqa: E402
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree  # noqa: E402
from flwr.supercore.interceptors import (  # noqa: E402
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential  # noqa: E402
from flwr.supercore.runtime import RuntimeHttpClient  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402
from flwr.supernode.runtime.run_clientapp import push_message, push_task_output  # noqa: E402

from ..common.files import write_atomic  # noqa: E402
from ..common.key_file import read_secret  # noqa: E402
from . import gate, site  # noqa: E402
from .app import app  # noqa: E402

POLL_S = (0.1, 0.5)  # between looks for a task: while a sum is under way, and after a while without any
_IDLE_SHARE = 0.02  # between them, this share of the time without a task: so much later one is found at most
PULL_S = (0.02, 0.5)  # between looks for a message that is still on its way to the SuperNode
DRAIN_S = 60.0  # for the message under way, after SIGTERM
SEND_S = 3.0  # the SuperNode looks for replies every half second; it is stopped after this process
MAX_TRIES = 2  # of one message, over processes
GROWTH_BYTES = 1 << 30  # more than after the first message of every phase so far, and more than half of that again
_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_RETRY_S = 120.0  # a SuperNode that does not answer for so long is not coming back for this task
_NAMELESS_S = 10.0  # a SuperNode stores a message's name right after it has made the task
_PROGRESS_S = 1.0
_KNOWN_PHASES = frozenset(kind.ROUTE for kind in gate.WORK)
_MOST_KEPT = 1 << 31  # protobuf takes no more


@dataclass(frozen=True)
class Settings:
    """What a worker is started with.

    Attributes:
        site: this hospital's site.toml.
        runtime: of the SuperNode's Runtime API, "127.0.0.1:port".
        secret: who may take tasks.
        bundle: SHA-256 of the only bundle that is taken, hexadecimal.
        folder: for `worker.message` and `worker.json`; mode 0700.
        drain_s: for the message under way, after SIGTERM.
        growth_bytes: of memory, after which the process is recycled.
    """

    site: Path
    runtime: str
    secret: bytes
    bundle: str
    folder: Path
    drain_s: float = DRAIN_S
    growth_bytes: int = GROWTH_BYTES


@dataclass(frozen=True)
class Kept:
    """A message under way, as it lies on disk.

    Attributes:
        token: of the SuperNode's task.
        tries: how often a process has begun it, this one included.
        message: the instruction.
        context: Flower's, as it came.
        reply: once there is one. A SuperNode that got half of a reply waits for the other half, of this very one.
    """

    token: str
    tries: int
    message: Message
    context: Context
    reply: Message | None = None

    def write(self, path: Path) -> None:
        """All of it or nothing; not durable: after a power cut the SuperNode has forgotten the task as well."""
        parts = [context_to_proto(self.context).SerializeToString(), message_to_proto(self.message).SerializeToString()]
        if self.reply is not None:
            parts.append(message_to_proto(self.reply).SerializeToString())
        head = {"token": self.token, "tries": self.tries, "sizes": [len(part) for part in parts]}
        temporary = path.with_name(f".{path.name}.tmp")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            for part in parts:
                file.write(part)
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Kept | None:
        """What `write` left; None: nothing, or nothing that can be read."""
        try:
            with path.open("rb") as file:
                head = json.loads(file.readline(4096))
                first, *sizes = head["sizes"]
                context, messages = ContextProto(), [MessageProto() for _ in sizes]
                context.ParseFromString(file.read(first))
                for size, message in zip(sizes, messages, strict=True):
                    message.ParseFromString(file.read(size))
            token, tries = str(head["token"]), int(head["tries"])
            message, *reply = map(message_from_proto, messages)
            return cls(token, tries, message, context_from_proto(context), *reply)
        except Exception:  # noqa: BLE001  a damaged file is no message: the coordinator asks again
            return None


class Worker:
    """Takes tasks until it is told to stop or wants a fresh process; `run` once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stopping = threading.Event()
        self.began = time.time()
        self.run_id: int | None = None  # Flower's number of the first message's run
        # Memory after the first message of each phase: the first training loads a model, and libraries for gigabytes.
        self.settled: dict[str, int] = {}
        self.now: dict[str, Any] = {}
        self.last: dict[str, Any] = {}
        self.answered = self.refused = 0
        self._noted = 0.0

    @property
    def path(self) -> Path:
        """Of the message under way."""
        return self.settings.folder / "worker.message"

    def run(self) -> int:
        """Exit code: 0, to be started again unless it was told to stop.

        Raises:
            ConfigError: the SuperNode refuses the secret.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        site.on_work = self._progress
        self._note()
        auth = SuperExecAuthHttpInterceptor(master_secret=self.settings.secret, protected_methods=[_ACQUIRE])
        client = self._client(auth)
        say("ready")
        try:
            self._go_on()
            unreachable, idle_since = False, time.monotonic()
            while not self.stopping.is_set():
                if why := self._stale():
                    say(f"ends, to be started again: {why}")
                    return 0
                try:
                    token = self._acquire(client)
                except httpx.TransportError:
                    if not unreachable:
                        say("the SuperNode does not answer; waiting for it")
                    unreachable = True
                    self.stopping.wait(1.0)
                    continue
                if unreachable:
                    say("the SuperNode answers")
                    unreachable = False
                if token is None:
                    idle = time.monotonic() - idle_since
                    self.stopping.wait(min(max(POLL_S[0], _IDLE_SHARE * idle), POLL_S[1]))
                else:
                    self._serve(token)
                    idle_since = time.monotonic()
        finally:
            client.close()
        if self.answered or self.refused:
            time.sleep(SEND_S)
        say("stopped")
        return 0

    def _stop(self, _number: int, _frame: Any) -> None:
        if self.stopping.is_set():
            return
        self.stopping.set()
        if self.now:
            say(f"stopping; the message under way has {self.settings.drain_s:.0f} s to finish")
        timer = threading.Timer(self.settings.drain_s, _end_now)
        timer.daemon = True
        timer.start()

    # ---- tasks

    def _client(self, *interceptors: Any, retry: RetryInvoker | None = None) -> RuntimeHttpClient:
        return RuntimeHttpClient.from_server_address(
            server_address=self.settings.runtime,
            insecure=True,  # loopback only; `main` refuses anything else
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *interceptors],
            retry_invoker=retry,
        )

    def _task_client(self, token: str) -> RuntimeHttpClient:
        # Not flwr's own invoker: on a token that has expired it sends this process SIGINT.
        retry = RetryInvoker(
            lambda: exponential(max_delay=5),
            httpx.TransportError,
            max_tries=None,
            max_time=_RETRY_S,
        )
        return self._client(RuntimeTokenHttpInterceptor(token), retry=retry)

    def _acquire(self, client: RuntimeHttpClient) -> str | None:
        """The token of a task, or None: there is none."""
        try:
            found = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP]))
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (401, 403):
                raise ConfigError(
                    f"{self.settings.runtime}: the Runtime API refuses this worker's secret: another SuperNode "
                    "listens there; end it, or start again on another port"
                ) from None
            self.stopping.wait(1.0)
            return None
        return found.token if found.HasField("task") and found.token else None

    def _serve(self, token: str) -> None:
        """One task, from its input to its output; whatever goes wrong stays here."""
        client = self._task_client(token)
        beat = HeartbeatSender(lambda: _heartbeat(client))
        try:
            beat.start()
            message, context, found = pull_input(client)
            if self.run_id is None:
                self.run_id = context.run_id
            kept = Kept(token, 1, message, context)
            if found != self.settings.bundle:
                self._begin(message, context.run_id)
                reply = self._refused(message, found)
            else:
                self._keep(kept)  # first of all: the SuperNode has just forgotten what the message held
                self._begin(message, context.run_id)
                reply = self._answered(message, context)
            self._deliver(client, replace(kept, reply=reply))
        except Exception as error:  # noqa: BLE001  its kind is enough for this log
            # No output is pushed: a SuperNode waits for ever for the reply of a task that ended without one. So the
            # task's token expires, the SuperNode answers for it, and the coordinator asks again.
            say(f"a task was lost: {_kind(error)}")
        finally:
            self._end_task(client, beat)

    def _go_on(self) -> None:
        """Goes on with the message that a killed process left, if the SuperNode still waits for its answer."""
        kept = Kept.read(self.path)
        if kept is None:
            self.path.unlink(missing_ok=True)
            return
        client = self._task_client(kept.token)
        beat = HeartbeatSender(lambda: _heartbeat(client))
        try:
            if not _waits(client):
                self.path.unlink(missing_ok=True)
                return
            beat.start()
            self.run_id = kept.context.run_id
            self._begin(kept.message, kept.context.run_id)
            if kept.reply is not None:
                say(f"{self._what()}: answered before this process was ended; sending that")
            elif kept.tries >= MAX_TRIES:
                say(f"{self._what()}: ended this process {kept.tries} times; it is not tried again")
                kept = replace(kept, reply=Message(Error(code=0, reason="site"), reply_to=kept.message))
            else:
                say(f"{self._what()}: going on after this process was ended")
                kept = replace(kept, tries=kept.tries + 1)
                self._keep(kept)
                kept = replace(kept, reply=self._answered(kept.message, kept.context))
            self._deliver(client, kept)
        except Exception as error:  # noqa: BLE001  as in `_serve`
            say(f"a task was lost: {_kind(error)}")
        finally:
            self._end_task(client, beat)

    def _keep(self, kept: Kept) -> None:
        try:
            kept.write(self.path)
        except (OSError, ValueError) as error:  # a full disk: work goes on, only a killed worker then starts anew
            for path in (self.path, self.path.with_name(f".{self.path.name}.tmp")):
                path.unlink(missing_ok=True)
            say(f"the message under way cannot be kept: {_kind(error)}")

    def _answered(self, message: Message, context: Context) -> Message:
        """The app's reply. No text of an exception leaves: client/gate.py writes it to the site's own log."""
        here = Context(
            context.run_id, context.node_id, {"site": str(self.settings.site)}, context.state, context.run_config
        )
        try:
            return app(message, here)
        except Exception as error:  # noqa: BLE001  a route that the app does not have
            say(f"{self._what()}: {_kind(error)}")
            return Message(Error(code=0, reason="site"), reply_to=message)

    def _refused(self, message: Message, found: str) -> Message:
        """ "bundle", once the ledger has the refusal; where it cannot have it, that."""
        self.refused += 1
        say(f"{self._what()}: refused: its bundle {found[:12]}… is not the pinned {self.settings.bundle[:12]}…")
        try:
            gate.refuse_bundle(self.settings.site, message.metadata.message_type, found)
        except (OSError, WardroundError):
            return Message(Error(code=0, reason="site"), reply_to=message)
        return Message(Error(code=0, reason=gate.BUNDLE), reply_to=message)

    def _deliver(self, client: RuntimeHttpClient, kept: Kept) -> None:
        reply = kept.reply
        assert reply is not None
        reply.metadata.__dict__["_message_id"] = reply.object_id  # as `push_message` does: what is kept is what is sent
        self._keep(kept)
        try:
            push_message(client, reply, kept.context)
        except httpx.HTTPError as error:
            say(f"{self._what()}: the SuperNode no longer takes the reply ({_kind(error)}); it stays on record here")
            return
        push_task_output(client, kept.context, SubStatus.COMPLETED, "")
        self.answered += 1
        say(f"{self._what()}: answered in {time.time() - self.now['since']:.1f} s")

    def _end_task(self, client: RuntimeHttpClient, beat: HeartbeatSender) -> None:
        if beat.is_running:
            beat.stop()
        client.close()
        self.path.unlink(missing_ok=True)
        if self.now:
            self.last = {**self.now, "until": time.time()}
            self.last.pop("work", None)
            self.settled.setdefault(self.now["phase"], memory_bytes())
        self.now = {}
        self._note()

    def _stale(self) -> str:
        """Why a fresh process should go on; "": it need not."""
        if self.last and self.last["run"] != self.run_id:
            return "another run began"
        settled, found = max(self.settled.values(), default=0), memory_bytes()
        if settled and found > settled + max(self.settings.growth_bytes, settled // 2):
            return f"its memory grew from {settled >> 20} to {found >> 20} MB"
        return ""

    # ---- what people see

    def _begin(self, message: Message, run_id: int) -> None:
        about = message.metadata  # what the coordinator wrote: nothing of it reaches a log as it is
        phase = about.message_type if about.message_type in _KNOWN_PHASES else "unknown"
        index = int(about.group_id) if about.group_id.isdecimal() and len(about.group_id) < 10 else None
        self.now = {"phase": phase, "round": index, "run": run_id, "since": time.time()}
        self._note()

    def _what(self) -> str:
        return f"{self.now['phase']}, round {'–' if self.now['round'] is None else self.now['round']}"

    def _progress(self, _name: str, what: str, done: int, total: int) -> None:
        self.now["work"] = [what, done, total]
        if time.monotonic() - self._noted > _PROGRESS_S:
            self._note()

    def _note(self) -> None:
        """worker.json, for `wardround client status`; a full disk must not end the worker."""
        self._noted = time.monotonic()
        content = {
            "pid": os.getpid(),
            "since": self.began,
            "now": self.now or None,
            "last": self.last or None,
            "answered": self.answered,
            "refused": self.refused,
            "memory_bytes": memory_bytes(),
        }
        with suppress(OSError):
            write_atomic(self.settings.folder / "worker.json", json.dumps(content).encode() + b"\n")


def pull_input(client: RuntimeHttpClient) -> tuple[Message, Context, str]:
    """A task's message and context, and the SHA-256 of the bundle that came with it, hexadecimal.

    As flwr's `pull_task_input`, which a process calls that took seconds to start. A SuperNode has the task before it
    has the message, and this process is there at once: flwr would fail where the message has no name yet, and pause 1,
    2, 4 … s where its bytes are still coming.

    Raises:
        RuntimeError, ObjectPullError: the SuperNode did not get the message.
    """
    given = client.PullTaskInput(PullTaskInputRequest())
    context, node = context_from_proto(given.context), Node(node_id=given.context.node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = given.task_id, given.run.run_id, node.node_id
    began = time.monotonic()
    while not (found := client.PullMessages(PullAppMessagesRequest())).messages_list:
        if time.monotonic() - began > _NAMELESS_S:
            raise RuntimeError("a task without a message")
        time.sleep(PULL_S[0])
    tree = found.message_object_trees[0]
    message = pull_and_inflate_object_from_tree(
        tree,
        make_pull_object_fn_protobuf(client.PullObject, node, context.run_id),
        make_confirm_message_received_fn_protobuf(client.ConfirmMessageReceived, node, context.run_id),
        return_type=Message,
        max_tries_per_object=None,  # as many as there is time for
        initial_backoff=PULL_S[0],
        backoff_cap=PULL_S[1],
    )
    message.metadata.__dict__["_message_id"] = tree.object_id  # as `pull_task_input` does
    return message, context, hashlib.sha256(given.fab.content).hexdigest()


def _heartbeat(client: RuntimeHttpClient) -> bool:
    """True unless it is to be tried again. flwr's own sends this process SIGINT when the task is gone."""
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.TransportError:
        return False
    except (httpx.HTTPError, RuntimeError, ValueError):
        return True  # gone, or the client was closed: the reply will say so
    return True


def _waits(client: RuntimeHttpClient) -> bool:
    """Whether the SuperNode still waits for the task of this client's token."""
    try:
        return bool(client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success)
    except (httpx.HTTPError, ValueError):
        return False


def memory_bytes() -> int:
    """Of this process, resident; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def say(line: str) -> None:
    """One line to the log that the supervisor keeps."""
    with suppress(OSError):  # a full disk must not end the worker
        print(f"{datetime.now(UTC).isoformat(timespec='seconds')} {line}", flush=True)


def _kind(error: BaseException) -> str:
    """What may be in this log of an exception: its kind, and the status of an answer that was none."""
    status = f" {error.response.status_code}" if isinstance(error, httpx.HTTPStatusError) else ""
    return type(error).__name__ + status


def _end_now() -> None:
    say("the message under way did not finish in time; it comes again")
    os._exit(0)


def parse(arguments: Sequence[str] | None) -> Settings:
    """The command line.

    Raises:
        ConfigError: an address that is not loopback, not a digest, a secret that others can read.
    """
    parser = argparse.ArgumentParser(prog="python -m wardround.client.worker", description=(__doc__ or "")[:90])
    parser.add_argument("--site", type=Path, required=True, help="this hospital's site.toml")
    parser.add_argument("--runtime", required=True, metavar="127.0.0.1:PORT", help="the SuperNode's Runtime API")
    parser.add_argument("--secret", type=Path, required=True, help="file of mode 0600 that says who may take tasks")
    parser.add_argument("--bundle", required=True, metavar="SHA256", help="the only bundle that is taken")
    parser.add_argument("--drain", type=float, default=DRAIN_S, help="seconds for the message under way on SIGTERM")
    given = parser.parse_args(arguments)
    from ..common.config import load_site

    host, _, port = given.runtime.rpartition(":")
    if host not in ("127.0.0.1", "[::1]") or not port.isdecimal():
        raise ConfigError(f"--runtime: expected 127.0.0.1:PORT, got {given.runtime!r:.60}")
    if len(given.bundle) != 64 or set(given.bundle) - set("0123456789abcdef"):
        raise ConfigError(f"--bundle: expected 64 hexadecimal digits, got {given.bundle!r:.70}")
    secret = read_secret(given.secret, "Runtime API secret")
    if not secret:
        raise ConfigError(f"{given.secret}: expected a secret, it is empty")
    file = given.site.resolve()
    folder = file.parent / load_site(file).state
    return Settings(file, given.runtime, secret, given.bundle, folder, drain_s=given.drain)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry. Exit codes: 0 stopped or wants a fresh process, 2 a mistake that only a person can mend."""
    try:
        sys.exit(Worker(parse(arguments)).run())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
