"""Hospitals for real: folders made by `wardround client init` and `join`, and `wardround client start` as a process."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from wardround.client.node import Node
from wardround.common.dictionary import dump_dictionary
from wardround.common.identity import fingerprint
from wardround.common.supervisor import read_status
from wardround.server.coordinator import CoordinatorFolder
from wardround.simulations.synthetic_registry import make

from .coordinator_case import WARDROUND, environment, wardround

PATIENTS = 60
START_S = 90.0
Value = TypeVar("Value")


def at_home(**more: str) -> dict[str, str]:
    """A hospital's environment: its passphrase is in a file, not in the environment."""
    found = environment(**more)
    del found["WARDROUND_PASSPHRASE"]
    return found


def client(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`wardround client …`.

    Raises:
        AssertionError: it failed, and `check` is on.
    """
    command = [str(WARDROUND), "client", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=at_home())
    assert done.returncode == 0 or not check, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def new_hospital(folder: Path, name: str, *more: object, patients: int = PATIENTS) -> Node:
    """`wardround client init`, with a registry of its own in the folder's folder."""
    own = folder / f"{name}-data"
    own.mkdir(parents=True)
    table, dictionary = make(patients, seed=sum(name.encode()))
    table.to_csv(own / "icu.csv", index=False)
    (own / "dictionary.toml").write_text(dump_dictionary(dictionary), encoding="utf-8")
    settings = more or ("--without-privacy",)
    client(
        "init", folder / name, "--name", name, "--table", own / "icu.csv", "--dictionary", own / "dictionary.toml",
        *settings,
    )  # fmt: skip
    return Node.open(folder / name / "site.toml")


def enrolled(coordinator: CoordinatorFolder, nodes: Sequence[Node], mail: Path) -> None:
    """All of them apply, are enrolled and invited, compare fingerprints, and join."""
    applications = [node.folder / f"{node.config.name}.application.json" for node in nodes]
    wardround("server", "enroll", "-C", coordinator.path, *applications)
    mail.mkdir()
    wardround("server", "invite", "-C", coordinator.path, "--out", mail)
    prints = {node.config.name: node.keys.load().fingerprint for node in nodes}
    for node in nodes:
        verified = [part for other, one in prints.items() if other != node.config.name for part in ("--verified", one)]
        invitation = mail / f"{node.config.name}.invitation.json"
        told = fingerprint(bytes.fromhex(json.loads(json.loads(invitation.read_text())["roster"])["coordinator"]))
        client("join", invitation, "--site", node.site_toml, "--coordinator", told, *verified)


@dataclass(eq=False)
class Site:
    """A hospital that runs."""

    node: Node
    process: subprocess.Popen[bytes]

    def processes(self) -> dict[str, int]:
        """What its supervisor runs now, by name."""
        found = read_status(self.node.status_path) or {"processes": {}}
        return {name: one["pid"] for name, one in found["processes"].items() if one["pid"]}

    def status(self) -> dict[str, Any]:
        """`wardround client status --json`."""
        return json.loads(client("status", "--site", self.node.site_toml, "--json").stdout)

    def worker(self) -> dict[str, Any]:
        """worker.json, or nothing."""
        try:
            return json.loads((self.node.state / "worker.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def log(self, name: str) -> str:
        """What a process wrote."""
        path = self.node.state / "logs" / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def logs(self) -> str:
        """The end of every log."""
        own = self.node.state / "site.log"
        parts = [f"== {self.node.config.name} {name}\n{self.log(name)[-2000:]}" for name in ("supernode", "worker")]
        return "\n".join([*parts, own.read_text()[-2000:] if own.exists() else ""])

    def until(self, what: str, look: Callable[[], Value | None], timeout_s: float = START_S) -> Value:
        """What `look` gives once it gives something.

        Raises:
            AssertionError: it never did; the site ended.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"{self.node.config.name} ended\n{self.logs()}"
            if found := look():
                return found
            time.sleep(0.05)
        raise AssertionError(f"{what}: not in {timeout_s} s\n{self.logs()}")

    def connected(self) -> bool:
        """Whether the SuperLink took its SuperNode, and the worker waits for tasks."""
        return "SuperNode ID: " in self.log("supernode") and " ready" in self.log("worker")

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


@contextmanager
def running(node: Node, **more: str) -> Iterator[Site]:
    """`wardround client start`; ends with the block."""
    output = (node.folder / "start.log").open("ab")
    process = subprocess.Popen(
        [str(WARDROUND), "client", "start", "--site", str(node.site_toml)],
        stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=at_home(**more),
    )  # fmt: skip
    try:
        yield Site(node, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
        output.close()


def descendants(pid: int) -> set[int]:
    """A process and everything below it."""
    found = {pid}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            chain, current = [], int(entry.name)
            while current > 1 and current not in found and current not in chain:
                chain.append(current)
                try:
                    current = int((Path("/proc") / str(current) / "stat").read_text().rsplit(")", 1)[1].split()[1])
                except (OSError, IndexError):
                    current = 0
            if current in found:
                found.update(chain)
    return found


def sockets(pids: set[int]) -> list[tuple[str, str, str]]:
    """(state, local address, remote address) of these processes' TCP sockets, as "listen" or "other", "ip:port"."""
    inodes: set[str] = set()
    for pid in pids:
        try:
            for link in (Path("/proc") / str(pid) / "fd").iterdir():
                try:
                    target = str(link.readlink())
                except OSError:
                    continue
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
        except OSError:
            continue
    result: list[tuple[str, str, str]] = []
    for table, width in (("tcp", 8), ("tcp6", 32)):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            parts = line.split()
            if parts[9] in inodes:
                result.append(
                    ("listen" if parts[3] == "0A" else "other", *(_address(one, width) for one in parts[1:3]))
                )
    return result


def _address(text: str, width: int) -> str:
    raw, port = text.split(":")
    if width == 8:
        host = ".".join(str(one) for one in reversed(bytes.fromhex(raw)))
    else:
        words = b"".join(bytes.fromhex(raw[i : i + 8])[::-1] for i in range(0, 32, 8))
        host = f"[{words.hex()}]"
    return f"{host}:{int(port, 16)}"
