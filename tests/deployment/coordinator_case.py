"""A coordinator for real: its folder, hospitals' applications, and `wardround server start` as a process of its own.

What tests/deployment runs in, on free ports of loopback, over TLS. `Running` is a process tree that ends with its
block; nothing of the product is replaced.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from wardround.common.enrolment import Application
from wardround.common.identity import Card, Identity
from wardround.common.supervisor import read_status
from wardround.server.coordinator import CoordinatorFolder

from ..server.superlink_case import free_ports

WARDROUND = Path(sysconfig.get_path("scripts")) / "wardround"
PASSPHRASE = "correct horse battery"
START_S = 90.0  # on a busy machine
Value = TypeVar("Value")


@dataclass(frozen=True)
class Hospital:
    """A hospital as the coordinator meets it: an application, and the keys behind it."""

    identity: Identity
    key: ec.EllipticCurvePrivateKey
    application: Application


def hospital(name: str) -> Hospital:
    """A new one."""
    identity, key = Identity.generate(), ec.generate_private_key(ec.SECP384R1())
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    return Hospital(identity, key, Application.make(identity, Card.make(identity, name), line))


def applications(folder: Path, names: Sequence[str]) -> list[Path]:
    """Files that hospitals of these names sent."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.application.json" for name in names]
    for path, name in zip(paths, names, strict=True):
        path.write_text(hospital(name).application.to_json())
    return paths


def environment(**more: str) -> dict[str, str]:
    """Of a process that a person starts; with `CI` unset, for some libraries phone home only then."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CI", "WARDROUND_COORDINATOR")}
    return {**kept, "WARDROUND_PASSPHRASE": PASSPHRASE, "OMP_NUM_THREADS": "1", **more}


def wardround(*arguments: object, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    """A command, as a process.

    Raises:
        AssertionError: it failed, and `check` is on.
    """
    command = [str(WARDROUND), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment(**more))
    assert done.returncode == 0 or not check, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def make_coordinator(path: Path, *more: object) -> CoordinatorFolder:
    """`wardround server init` with free ports."""
    public, inside = free_ports(2)
    ports = ("--address", f"127.0.0.1:{public}", "--loopback-port", inside)
    wardround("server", "init", path, "--consortium", "Trial", *ports, *more)
    return CoordinatorFolder.open(path)


@dataclass(eq=False)
class Running:
    """A started coordinator."""

    folder: CoordinatorFolder
    process: subprocess.Popen[str]

    def processes(self) -> dict[str, int]:
        """What the supervisor runs now, by name."""
        found = read_status(self.folder.status_file) or {"processes": {}}
        return {name: one["pid"] for name, one in found["processes"].items() if one["pid"]}

    def status(self) -> dict[str, Any]:
        """`wardround server status --json`."""
        return json.loads(wardround("server", "status", "-C", self.folder.path, "--json").stdout)

    def logs(self) -> str:
        """The end of every log."""
        parts = [f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.logs.glob("*.log"))]
        return "\n".join(parts)

    def until(self, what: str, look: Callable[[], Value | None], timeout_s: float = START_S) -> Value:
        """What `look` gives once it gives something.

        Raises:
            AssertionError: it never did; the coordinator ended.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the coordinator ended\n{self.logs()}"
            if (found := look()) is not None and found is not False:
                return found
            time.sleep(0.1)
        raise AssertionError(f"{what}: not in {timeout_s} s\n{self.logs()}")

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def started(folder: CoordinatorFolder, **more: str) -> Iterator[Running]:
    """`wardround server start`, with its SuperLink answering."""
    command = [str(WARDROUND), "server", "start", "-C", str(folder.path)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(**more),
    )  # fmt: skip
    running = Running(folder, process)
    try:
        running.until("the SuperLink answers", lambda: up(folder))
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()


def trusting(folder: CoordinatorFolder) -> ssl.SSLContext:
    """As a hospital trusts this coordinator: its authority, and no other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder.tls / "ca.pem")
    return context


def up(folder: CoordinatorFolder) -> bool:
    """Whether the SuperLink answers on both sockets."""
    import httpx

    try:
        with httpx.Client(verify=trusting(folder), trust_env=False, timeout=5) as client:
            ports = folder.config.listen_port, folder.config.loopback_port
            return all(client.get(f"https://127.0.0.1:{port}/health").status_code == 200 for port in ports)
    except httpx.HTTPError:
        return False


if sys.platform != "linux":
    raise RuntimeError("these tests read /proc")
