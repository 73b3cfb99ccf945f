"""A SuperNode's Runtime API with messages that a test wrote, in this process; real workers take tasks from it.

It is flwr's own app and state, as `flower-supernode` serves them: what is left out is the connection to a SuperLink.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvicorn
from flwr.app import Context, Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory
from wardround.client.app import pack
from wardround.client.node import ENVIRONMENT, fab, free_port
from wardround.common.messages import Instruction, split

NODE = 7
_PATIENCE_S = 60.0


class Runtime:
    """The API on a port of loopback, and what a SuperNode does with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.secret = secrets.token_hex(32).encode()
        self.secret_file = folder / "secret"
        self.secret_file.write_bytes(self.secret)
        self.secret_file.chmod(0o600)
        self.factory = NodeStateFactory(ObjectStoreFactory())
        self.state = self.factory.state()
        self.state.set_node_id(NODE)
        self.store = self.state.object_store
        self.processes: list[subprocess.Popen[str]] = []

    @contextmanager
    def serving(self) -> Iterator[Runtime]:
        """While the block runs; workers that were started end with it."""
        app = create_app(self.factory, superexec_auth_secret=self.secret)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.02)
            yield self
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
            server.should_exit = True
            thread.join(10)

    def send(
        self,
        instruction: Instruction,
        *,
        run: int = 1,
        bundle: bytes | None = None,
        route: str = "",
        name_after_s: float = 0.0,
        rest_after_s: float = 0.0,
    ) -> Message:
        """A message for a task, as the SuperNode stores one that it is pulling: task, name, then the rest."""
        content = fab() if bundle is None else bundle
        digest = hashlib.sha256(content).hexdigest()
        if self.state.get_run(run) is None:
            made = replace(Run.create_empty(run), fab_id="wardround/bundle", fab_hash=digest, series_id=run)
            self.state.set_run_series_context(run, Context(run, NODE, {}, RecordDict(), {}, series_id=run))
            self.state.store_run(made)
            self.state.store_fab(Fab(digest, content, {}))
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, run, 1
        message = Message(
            pack(*split(instruction)), dst_node_id=NODE, message_type=route or instruction.ROUTE,
            group_id=str(instruction.round_index),
        )  # fmt: skip
        assert self.state.create_task(task_type=TaskType.CLIENT_APP, run_id=run, fab_hash=digest) is not None
        time.sleep(name_after_s)
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            self.store.preregister(run, get_object_tree(message))
            self.state.store_message(message)
            time.sleep(rest_after_s)
            for name, part in get_all_nested_objects(message).items():
                self.store.put(name, part.deflate())
        return message

    def reply(self) -> Message:
        """The next reply, whole.

        Raises:
            AssertionError: none came.
        """
        deadline = time.monotonic() + _PATIENCE_S
        while not (found := self.state.get_messages_legacy(is_reply=True, limit=1)):
            assert time.monotonic() < deadline, f"no reply: {self.logs()}"
            time.sleep(0.02)
        about = found[0].metadata
        contents: dict[str, bytes] = {}
        for tree in iterate_object_tree(self.store.get_object_tree(about.message_id)):
            while not (content := self.store.get(tree.object_id)):
                assert time.monotonic() < deadline, f"half a reply: {self.logs()}"
                time.sleep(0.02)
            contents[tree.object_id] = content
        whole = inflate_object_from_contents(about.message_id, contents)
        assert isinstance(whole, Message)
        self.state.delete_messages(message_ids=[about.message_id, about.reply_to_message_id])
        return whole

    def command(self, site_toml: Path, bundle: str = "") -> list[str]:
        """How a worker for this API is started."""
        return [
            sys.executable, "-m", "wardround.client.worker", "--site", str(site_toml),
            "--runtime", f"127.0.0.1:{self.port}", "--secret", str(self.secret_file),
            "--bundle", bundle or hashlib.sha256(fab()).hexdigest(),
        ]  # fmt: skip

    def worker(self, site_toml: Path, **environment: str) -> subprocess.Popen[str]:
        """Starts a worker; its output is in worker-N.log."""
        path = self.folder / f"worker-{len(self.processes)}.log"
        with path.open("w") as output:
            process = subprocess.Popen(
                self.command(site_toml),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                cwd=self.folder,
                env={**os.environ, **ENVIRONMENT, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1", **environment},
            )
        self.processes.append(process)
        return process

    def logs(self) -> str:
        """What all workers wrote."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("worker-*.log")))


def ended(process: subprocess.Popen[str], number: int | None = signal.SIGTERM) -> int:
    """The exit code of a process, after a signal."""
    if number is not None:
        process.send_signal(number)
    return process.wait(_PATIENCE_S)
