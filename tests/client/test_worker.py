"""The process that stays: real workers take tasks from flwr's own Runtime API; what they answer, refuse and survive."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from wardround.client import worker as worker_module
from wardround.client.app import unpack
from wardround.client.folder import Site
from wardround.client.registry import to_registry
from wardround.client.worker import MAX_TRIES, Kept, Settings, Worker, parse, pull_input
from wardround.common.config import NO_PRIVACY, RunConfig
from wardround.common.counts import count
from wardround.common.errors import ConfigError
from wardround.common.messages import Reply, SchemaInstruction, SchemaReply, join, split
from wardround.common.schema import derive_schema
from wardround.simulations.federation import write_sites
from wardround.simulations.synthetic_registry import make

from .runtime_case import NODE, Runtime, ended

RUN = RunConfig(name="t", privacy=NO_PRIVACY)
TABLE, DICTIONARY = make(60, seed=2)
REGISTRY = to_registry("synthetic", pa.Table.from_pandas(TABLE, preserve_index=False), DICTIONARY)
SCHEMA = derive_schema(count(REGISTRY.values, DICTIONARY), DICTIONARY, RUN.questions).to_json()


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worker") / "sites"
    write_sites(REGISTRY, [np.arange(60)], RUN, folder)
    return folder


@pytest.fixture
def site(sites: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(sites, tmp_path / "sites")
    return tmp_path / "sites" / "site-01" / "site.toml"


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Runtime]:
    with Runtime(tmp_path).serving() as running:
        yield running


def schema(number: int = 1) -> SchemaInstruction:
    return SchemaInstruction(
        run_id=f"{number:032x}", config=RUN.to_json(), config_digest=RUN.digest(), round_index=0, model_digest="",
        schema=SCHEMA,
    )  # fmt: skip


def decoded(message: Message) -> Reply:
    return join(*unpack(message.content), Reply)


def gone(path: Path) -> bool:
    """Whether a file goes away: a moment after the reply left."""
    deadline = time.monotonic() + 20
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not path.exists()


def claimed(runtime: Runtime) -> tuple[str, Message, Context]:
    """A task as a worker has it that is then killed: its token, message and context."""
    auth = SuperExecAuthHttpInterceptor(
        master_secret=runtime.secret, protected_methods=["/flwr.proto.Runtime/AcquireTask"]
    )
    about = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
    client = RuntimeHttpClient(f"http://127.0.0.1:{runtime.port}", interceptors=[about, auth])
    while not (token := client.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])).token):
        time.sleep(0.01)
    settings = Settings(Path(), f"127.0.0.1:{runtime.port}", b"", "", Path())
    message, context, _ = pull_input(Worker(settings)._task_client(token))
    return token, message, context


def test_one_process_answers_message_after_message(site: Path, runtime: Runtime):
    worker = runtime.worker(site)
    for _ in range(3):
        runtime.send(schema())
        assert isinstance(decoded(runtime.reply()), SchemaReply)
    assert worker.poll() is None and len(runtime.processes) == 1
    assert [entry["kind"] for entry in Site.open(site).ledger.entries()] == ["egress"] * 3
    state = site.parent / "state"
    told = json.loads((state / "worker.json").read_text())
    assert told["pid"] == worker.pid and told["last"]["phase"] == schema().ROUTE
    assert gone(state / "worker.message")


def test_a_message_is_waited_for_that_is_still_on_its_way_and_not_in_whole_seconds(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
):
    """A SuperNode has the task first, then the message's name, then its bytes."""
    pauses: list[float] = []
    pull = worker_module.pull_and_inflate_object_from_tree
    monkeypatch.setattr(
        worker_module,
        "pull_and_inflate_object_from_tree",
        lambda *given, **named: (
            pauses.extend((named["initial_backoff"], named["backoff_cap"])) or pull(*given, **named)
        ),
    )
    sending = threading.Thread(target=lambda: runtime.send(schema(), name_after_s=0.3, rest_after_s=0.3))
    sending.start()
    _, message, _ = claimed(runtime)
    sending.join()
    assert message.metadata.message_type == schema().ROUTE and unpack(message.content)[0] == split(schema())[0]
    assert max(pauses) < 1.0


def test_a_task_without_a_message_is_given_up(runtime: Runtime, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker_module, "_NAMELESS_S", 0.1)
    sending = threading.Thread(target=lambda: runtime.send(schema(), name_after_s=2.0))
    sending.start()
    with pytest.raises(RuntimeError, match="a task without a message"):
        claimed(runtime)
    sending.join()


def test_a_message_with_another_bundle_is_not_looked_at(site: Path, runtime: Runtime, tmp_path: Path):
    import io
    import zipfile

    evil = io.BytesIO()
    with zipfile.ZipFile(evil, "w") as packed:
        packed.writestr("wardround.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
        packed.writestr("pyproject.toml", "[project]\nname = 'x'\nversion = '1'\n")
    runtime.worker(site)
    runtime.send(schema(), bundle=evil.getvalue())
    reply = runtime.reply()
    assert reply.has_error() and (reply.error.code, reply.error.reason) == (0, "bundle")
    (entry,) = Site.open(site).ledger.entries()
    assert (entry["kind"], entry["code"], entry["bytes"], entry["phase"]) == ("refusal", "bundle", 0, schema().ROUTE)
    import hashlib

    assert entry["sha256"] == hashlib.sha256(evil.getvalue()).hexdigest()
    assert not (site.parent / "state" / "runs").exists() and not (tmp_path / "ran").exists()
    unpacked = [path for path in tmp_path.rglob("*") if path.name in ("wardround.py", "pyproject.toml")]
    assert unpacked == []


@pytest.mark.slow
def test_where_the_ledger_cannot_be_written_a_refusal_says_only_that(site: Path, runtime: Runtime):
    (site.parent / "state" / "ledger.jsonl").write_text("not what was written\n")
    runtime.worker(site)
    runtime.send(schema(), bundle=b"another")
    assert runtime.reply().error.reason == "site"


@pytest.mark.slow
def test_a_route_that_there_is_not_is_answered_without_the_text_of_an_exception(site: Path, runtime: Runtime):
    runtime.worker(site)
    runtime.send(schema(), route="query.nothing_of_the_kind")
    reply = runtime.reply()
    assert (reply.error.code, reply.error.reason) == (0, "site")
    assert "nothing_of_the_kind" not in runtime.logs()


@pytest.mark.slow
def test_a_fresh_process_goes_on_with_another_run(site: Path, runtime: Runtime):
    first = runtime.worker(site)
    runtime.send(schema(1), run=1)
    assert isinstance(decoded(runtime.reply()), SchemaReply)
    runtime.send(schema(2), run=2)
    assert isinstance(decoded(runtime.reply()), SchemaReply)  # answered first
    assert ended(first, None) == 0 and "another run began" in runtime.logs()
    second = runtime.worker(site)
    runtime.send(schema(2), run=2)
    assert isinstance(decoded(runtime.reply()), SchemaReply)
    assert second.poll() is None


def test_a_process_that_grew_wants_a_fresh_one_and_one_that_loaded_its_model_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = Settings(tmp_path / "site.toml", "127.0.0.1:1", b"", "", tmp_path)
    worker = Worker(settings)
    worker.run_id = 1

    def answered(phase: str, gigabytes: float) -> str:
        monkeypatch.setattr(worker_module, "memory_bytes", lambda: int(gigabytes * 2**30))
        worker.now = {"phase": phase, "round": 1, "run": 1, "since": 0.0}
        worker._end_task(worker._client(), HeartbeatSender(lambda: True))
        return worker._stale()

    # What a phase needs the first time, it keeps: libraries at the counts, the model at the first training.
    for phase, gigabytes in (("query.count", 0.5), ("train.local", 30.0), ("evaluate.test", 46.0)):
        assert answered(phase, gigabytes) == ""
    assert answered("train.local", 60.0) == "" and "its memory grew from" in answered("train.local", 70.0)


def test_a_message_whose_worker_was_killed_is_answered_by_the_next(site: Path, runtime: Runtime):
    runtime.send(schema())
    token, message, context = claimed(runtime)
    state = site.parent / "state"
    Kept(token, 1, message, context).write(state / "worker.message")
    assert stat.S_IMODE((state / "worker.message").stat().st_mode) == 0o600
    runtime.worker(site)
    assert isinstance(decoded(runtime.reply()), SchemaReply) and "going on" in runtime.logs()
    assert gone(state / "worker.message")


@pytest.mark.slow
def test_a_message_that_ends_the_process_again_and_again_is_answered_with_a_code(site: Path, runtime: Runtime):
    runtime.send(schema())
    token, message, context = claimed(runtime)
    Kept(token, MAX_TRIES, message, context).write(site.parent / "state" / "worker.message")
    runtime.worker(site)
    assert runtime.reply().error.reason == "site"
    assert not (site.parent / "state" / "ledger.jsonl").exists()  # nothing was done


@pytest.mark.slow
def test_a_reply_that_was_half_sent_is_sent_whole(site: Path, runtime: Runtime):
    runtime.send(schema())
    token, message, context = claimed(runtime)
    from wardround.client.app import app

    reply = app(message, Context(1, NODE, {"site": str(site)}, RecordDict(), {}))
    reply.metadata.__dict__["_message_id"] = reply.object_id
    Kept(token, 1, message, context, reply).write(site.parent / "state" / "worker.message")
    worker = runtime.worker(site)
    found = runtime.reply()
    assert found.metadata.message_id in ("", reply.object_id) and isinstance(decoded(found), SchemaReply)
    assert "sending that" in runtime.logs() and worker.poll() is None
    assert len(list(Site.open(site).ledger.entries())) == 1  # it was not made again


@pytest.mark.slow
def test_a_message_that_the_supernode_forgot_or_a_file_that_is_none_is_dropped(site: Path, runtime: Runtime):
    path = site.parent / "state" / "worker.message"
    runtime.send(schema())
    _, message, context = claimed(runtime)
    Kept("0" * 64, 1, message, context).write(path)
    runtime.worker(site)
    runtime.send(schema())
    assert isinstance(decoded(runtime.reply()), SchemaReply) and gone(path)
    ended(runtime.processes[0])
    path.write_bytes(b"\x00" * 100)
    runtime.worker(site)
    runtime.send(schema())
    assert isinstance(decoded(runtime.reply()), SchemaReply) and gone(path)


def test_another_secret_ends_the_worker_with_one_line(site: Path, runtime: Runtime, tmp_path: Path):
    runtime.secret_file.write_bytes(b"another")
    done = subprocess.run(
        runtime.command(site), capture_output=True, text=True, timeout=60, check=False, env={**os.environ}
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "another SuperNode" in done.stderr and "Traceback" not in done.stdout + done.stderr


def test_nothing_of_the_api_is_given_without_secret_or_token(runtime: Runtime):
    runtime.send(schema())
    paths = list(httpx.get(f"http://127.0.0.1:{runtime.port}/openapi.json").json()["paths"])
    tried = 0
    for path in paths:
        if path.startswith("/v1/"):
            answer = httpx.post(
                f"http://127.0.0.1:{runtime.port}{path}",
                content=b"",
                headers={"content-type": "application/x-protobuf"},
            )
            assert answer.status_code >= 400, path
            tried += 1
    assert tried > 15


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--runtime", "10.0.0.1:80", "127.0.0.1:PORT"),
        ("--runtime", "127.0.0.1", "127.0.0.1:PORT"),
        ("--bundle", "ab", "64 hexadecimal"),
        ("--secret", "none", "no such file"),
        ("--site", "none.toml", "no such file"),
    ],
)
def test_a_worker_is_started_with_what_it_needs_or_not_at_all(site: Path, runtime: Runtime, option, value, words):
    command = runtime.command(site)[3:]
    command[command.index(option) + 1] = value
    with pytest.raises(ConfigError, match=words):
        parse(command)


@pytest.mark.slow
def test_sigterm_lets_the_message_under_way_finish(site: Path, runtime: Runtime, tmp_path: Path):
    slow = tmp_path / "sitecustomize.py"  # an answer that takes its time
    slow.write_text(
        "import time\n"
        "def slow():\n"
        "    from wardround.client import gate, site\n"
        "    from wardround.common.messages import SchemaInstruction\n"
        "    def wait(*about):\n"
        "        time.sleep(2)\n"
        "        return site.take_schema(*about)\n"
        "    gate.WORK[SchemaInstruction] = wait\n"
        "import sys, importlib.abc\n"
        "class Once(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'wardround.client.app':\n"
        "            sys.meta_path.remove(self); slow()\n"
        "sys.meta_path.insert(0, Once())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    worker = runtime.worker(site, PYTHONPATH=path)
    runtime.send(schema())
    state = site.parent / "state" / "worker.message"
    deadline = time.monotonic() + 60
    while not state.exists():
        assert time.monotonic() < deadline, runtime.logs()
        time.sleep(0.02)
    worker.send_signal(signal.SIGTERM)
    assert isinstance(decoded(runtime.reply()), SchemaReply)
    assert ended(worker, None) == 0 and "stopping" in runtime.logs()
