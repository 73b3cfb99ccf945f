"""A real Flower deployment on one machine: a SuperLink, a SuperNode a site, each with the process that starts its apps.

What tests/server/test_superlink.py and benchmarks/superlink.py run in. Flower's own commands do everything, in
`--isolation process` as in a deployment; TLS and SuperNode authentication are left out, so nothing listens but on
loopback. Each party has its own Flower folder. Every process is the first of a session of its own, so that whatever it
started ends with it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
from wardround.common import bundle
from wardround.common.config import CoordinatorConfig, RunConfig
from wardround.common.roster import Roster
from wardround.server.coordinator import ENVIRONMENT, CoordinatorFolder, create
from wardround.server.deployment import submit
from wardround.server.roster_cli import KEY_FILE
from wardround.simulations.federation import COORDINATOR, PASSPHRASE, ROSTER

BIN = Path(sysconfig.get_path("scripts"))
COMMANDS = ("flower-superlink", "flower-supernode", "flower-superexec", "flwr-serverapp", "flwr-clientapp", "flwr")
_START_S = 180.0
_NODE = re.compile(r"SuperNode ID: (\d+)")


def missing() -> list[str]:
    """Flower's commands that are not beside this Python."""
    return [name for name in COMMANDS if not (BIN / name).exists()]


def free_ports(number: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def write_bundle(folder: Path, serverapp: str = bundle.COMPONENTS["serverapp"]) -> Path:
    """The product's own bundle, or with another app of the coordinator."""
    bundle.write_bundle(folder)
    file = folder / "pyproject.toml"
    file.write_text(file.read_text().replace(bundle.COMPONENTS["serverapp"], serverapp))
    return folder


def write_coordinator(path: Path, config: RunConfig, sites: Path) -> CoordinatorFolder:
    """A coordinator's folder with the key and roster of simulated sites, and one run that was submitted.

    Args:
        path: new.
        config: the run's.
        sites: as simulations/federation.py wrote it.
    """
    settings = {"consortium": "simulated", "address": "127.0.0.1:9092", "passphrase_file": str(sites / PASSPHRASE)}
    create(path, CoordinatorConfig.model_validate(settings), tomli_w.dumps(settings))
    folder = CoordinatorFolder.open(path)
    roster = Roster.parse((sites / ROSTER).read_bytes(), ROSTER)
    shutil.copy(sites / ROSTER, path / f"roster-{roster.serial}.json")
    shutil.copy(sites / COORDINATOR, path / KEY_FILE)
    submit(folder, config, next(sites.glob("*/dictionary.toml")))
    return folder


@dataclass(eq=False)
class Deployment:
    """Running processes.

    Attributes:
        folder: logs, and each party's Flower folder.
        address: of the SuperLink.
        environment: of every process, but for FLWR_HOME.
        processes: by name; their output is in NAME.log.
    """

    folder: Path
    address: str
    environment: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, home: str, *command: str) -> None:
        """Starts one of Flower's commands, first of its own session."""
        (self.folder / home).mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("wb") as output:
            self.processes[name] = subprocess.Popen(
                [str(BIN / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self.environment, "FLWR_HOME": str(self.folder / home)},
                cwd=self.folder / home,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ends everything, with what it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes.values():
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:
                    continue
            for process in self.processes.values():
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    continue

    def log(self, name: str) -> str:
        """What a process has written so far."""
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")

    def logs(self) -> str:
        """The end of every process's output, for the message of a failed test."""
        return "\n".join(f"== {name}\n{self.log(name)[-3000:]}" for name in self.processes)

    def wait_for(self, name: str, text: re.Pattern[str]) -> str:
        """The first group of what a process is expected to write.

        Raises:
            RuntimeError: it ended, or did not write it in three minutes.
        """
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if found := text.search(self.log(name)):
                return found.group(1) if found.groups() else found.group()
            if self.processes[name].poll() is not None:
                raise RuntimeError(f"{name} ended: {self.log(name)[-2000:]}")
            time.sleep(0.2)
        raise RuntimeError(f"{name}: expected {text.pattern}, got {self.log(name)[-2000:]}")

    def flwr(self, *arguments: str, timeout_s: float = 180) -> subprocess.CompletedProcess[str]:
        """Flower's own command line, as the coordinator uses it."""
        return subprocess.run(
            [str(BIN / "flwr"), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**self.environment, "FLWR_HOME": str(self.folder / "coordinator")},
            cwd=self.folder / "coordinator",
        )

    def submit(self, bundle: Path, settings: Mapping[str, str | bool]) -> str:
        """Starts a run and gives its number.

        Raises:
            RuntimeError: Flower refused it.
        """
        file = self.folder / "run_config.toml"
        file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()), encoding="utf-8")
        done = self.flwr("run", str(bundle), "here", "--run-config", str(file), "--format", "json")
        try:
            return str(json.loads(done.stdout)["run-id"])
        except (ValueError, KeyError):
            raise RuntimeError(f"flwr run: {done.stdout}{done.stderr}") from None

    def wait_for_run(self, run: str, timeout_s: float) -> str:
        """Waits for a run's end and gives its last status, as "finished:completed".

        Raises:
            RuntimeError: it did not end in time.
        """
        try:  # one process that waits; asking again and again takes seconds of a core each time
            self.flwr("log", run, "here", "--stream", timeout_s=timeout_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"run {run} is not over after {timeout_s} s") from None
        shown = self.flwr("ls", "here", "--run-id", run, "--format", "json")
        return str(json.loads(shown.stdout)["runs"][0]["status"])


@contextmanager
def deployment(
    folder: Path, sites: Sequence[Path], coordinator: CoordinatorFolder, **environment: str
) -> Iterator[Deployment]:
    """A SuperLink with one SuperNode for every site, connected; all of it ends with the block.

    Args:
        folder: new; logs and Flower's folders.
        sites: each one's site.toml.
        coordinator: whose runs are started.
        environment: more of it, for every process.

    Raises:
        RuntimeError: a process did not start.
    """
    folder.mkdir(parents=True)
    port, *own = free_ports(1 + len(sites))
    offline = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "127.0.0.1",
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONUNBUFFERED": "1",
        ENVIRONMENT: str(coordinator.path),
    }
    running = Deployment(folder, f"127.0.0.1:{port}", {**os.environ, **offline, **environment})
    secret = folder / "secret"
    secret.write_bytes(secrets.token_bytes(32))
    secret.chmod(0o600)
    auth = ("--superexec-auth-secret-file", str(secret))
    home = folder / "coordinator"
    home.mkdir()
    connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{running.address}"\ninsecure = true\n'
    (home / "config.toml").write_text(connection, encoding="utf-8")
    # An unhandled SIGTERM would end this process alone and leave the others.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    common = ("--insecure", "--isolation", "process", "--host", "127.0.0.1", *auth)
    try:
        running.start(
            "superlink", "coordinator", "flower-superlink", *common, "--port", str(port),
            "--database", str(home / "superlink.db"), "--disable-runtime-dependency-installation",
        )  # fmt: skip
        running.wait_for("superlink", re.compile(r"Uvicorn running|startup complete"))
        running.start(
            "serverapps", "coordinator", "flower-superexec", "--insecure", *auth,
            "--runtime-api-address", running.address,
        )  # fmt: skip
        for site, node_port in zip(sites, own, strict=True):
            name = site.parent.name
            running.start(
                name, f"{name}-flower", "flower-supernode", *common, "--port", str(node_port),
                "--superlink", running.address, "--node-config", f"site={json.dumps(str(site))}",
            )  # fmt: skip
            running.start(
                f"{name}-apps", f"{name}-flower", "flower-superexec", "--insecure", *auth,
                "--runtime-api-address", f"127.0.0.1:{node_port}",
            )  # fmt: skip
        for site in sites:
            running.wait_for(site.parent.name, _NODE)
        yield running
    finally:
        running.stop()
        signal.signal(signal.SIGTERM, before)
