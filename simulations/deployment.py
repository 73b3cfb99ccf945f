"""A consortium as it is really deployed, on this one machine: a coordinator and hospitals, each by its own commands.

Run by anyone (`wardround simulate deploy`) and by tests/deployment. Enters: a run's config, an open registry. Leaves: a
folder with everybody's folder in it. Every step is a `wardround server` or `wardround client` command in a process of
its own, over TLS on loopback: nothing is called that a person at a hospital could not type. What people do by telephone
and mail is done here by reading what the commands print. Some of the hospitals may run Flower's own SuperNode and
executor in the place of `wardround client start`. Private: nothing; registries are open or synthetic.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..client.node import ENVIRONMENT
from ..client.registry import write_registry
from ..common.config import RunConfig, to_toml
from ..common.dictionary import dump_dictionary
from ..common.errors import RunFolderError, WardroundError
from ..common.files import private_folder, write_atomic
from ..common.supervisor import end_with_parent, read_status
from . import small_model
from .federation import divide, load_registry
from .partition import site_names

WARDROUND = Path(sysconfig.get_path("scripts")) / "wardround"
NODE = "supernode"  # the process of a hospital that talks to the coordinator
_FINGERPRINT = re.compile(r"\b[A-Z2-7]{4}(?: [A-Z2-7]{4}){7}\b")
# What docs/deployment-site.md says to set for Flower's own programs: nothing is reported, looked up or installed.
STOCK_ENVIRONMENT = {**ENVIRONMENT, "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
_PATIENCE_S = 180.0  # for a process to come up, on a busy machine
_STOP_S = 90.0


class DeploymentError(WardroundError):
    """A command of the deployment failed; the message has its last lines."""

    code = "deployment"


@dataclass(eq=False)
class Party:
    """A coordinator or a hospital: its folder, and the process of its `start` command while that runs.

    A stock one has no such command: its process is Flower's SuperNode, and `executor` Flower's executor.
    """

    name: str
    folder: Path
    state: Path  # where its logs and status.json are
    fingerprint: str = ""
    process: subprocess.Popen[bytes] | None = None
    seen: int = 0  # how much of its node's log was there before this start
    stock: bool = False
    executor: subprocess.Popen[bytes] | None = None

    def pid(self, child: str) -> int | None:
        """The process number of one of its processes, or None: it does not run now."""
        status = read_status(self.state / "status.json") or {}
        return status.get("processes", {}).get(child, {}).get("pid")

    def log(self, child: str) -> str:
        """What one of its processes has written."""
        path = self.state / "logs" / f"{child}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


@dataclass(eq=False)
class Deployment:
    """Folders and processes of a consortium on this machine.

    Attributes:
        out: its folder: coordinator/, hospitals/NAME/, data/, mail/.
        config: the run that it is for.
        tell: called with every command before it is run.
        environment: of every process beside this one's own.
        stock: how many of the hospitals, the last ones, run Flower's own programs.
    """

    out: Path
    config: RunConfig
    tell: Callable[[str], None] = lambda _: None
    environment: dict[str, str] = field(default_factory=dict[str, str])
    stock: int = 0
    coordinator: Party = field(init=False)
    port: int = field(init=False, default=0)
    hospitals: dict[str, Party] = field(init=False, default_factory=dict[str, Party])

    def __post_init__(self) -> None:
        folder = self.out / "coordinator"
        self.coordinator = Party("coordinator", folder, folder)

    @property
    def dictionary(self) -> Path:
        """The consortium's dictionary."""
        return self.out / "data" / "dictionary.toml"

    @property
    def run_folder(self) -> Path:
        """Of the run, at the coordinator."""
        return self.coordinator.folder / "runs" / self.config.name

    def call(
        self, *command: str | Path, check: bool = True, timeout_s: float = 600.0
    ) -> subprocess.CompletedProcess[str]:
        """One `wardround` command, to its end.

        Raises:
            DeploymentError: it failed, and `check`.
        """
        self.tell("wardround " + shlex.join(map(str, command)))
        done = subprocess.run(
            [str(WARDROUND), *map(str, command)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **self.environment},
        )
        if check and done.returncode != 0:
            lines = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
            raise DeploymentError(f"wardround {' '.join(map(str, command[:2]))}: exit code {done.returncode}: {lines}")
        return done

    def found(self) -> None:
        """Coordinator and hospitals set up and enrolled, from nothing: init, enroll, invite, join.

        Raises:
            RunFolderError: the folder is not empty.
            DeploymentError: a command failed.
        """
        if self.out.exists() and any(self.out.iterdir()):
            raise RunFolderError(f"{self.out}: expected a new or empty folder")
        private_folder(self.out)
        mail = self.out / "mail"
        mail.mkdir()
        tables = self._write_tables()
        secret = self.out / "coordinator.passphrase"
        write_atomic(secret, secrets.token_hex(16).encode())
        self.port = free_port()
        said = self.call(
            "server", "init", self.coordinator.folder, "--consortium", f"{self.config.name} on one machine",
            "--address", f"127.0.0.1:{self.port}", "--passphrase-file", secret,
        ).stdout  # fmt: skip
        self.coordinator.fingerprint = _fingerprint(said)
        for name, table in tables.items():
            self.hospitals[name] = self._init(name, table)
        for name in [*tables][len(tables) - self.stock :]:
            self.hospitals[name].stock = True
        self.enroll(*self.hospitals)
        for name in self.hospitals:
            self.join(name)

    def _write_tables(self) -> dict[str, Path]:
        """One table a hospital, and the dictionary."""
        registry = load_registry(self.config)
        parts = divide(registry, self.config)
        (self.out / "data").mkdir()
        text = dump_dictionary(registry.dictionary)
        self.dictionary.write_text(text, encoding="utf-8")
        if self.config.model.id == small_model.SMALL:
            folder = small_model.make(self.out / "data" / small_model.SMALL, text.splitlines(), seed=self.config.seed)
            model = self.config.model.model_copy(update={"id": str(folder)})
            self.config = self.config.model_copy(update={"model": model})
        tables: dict[str, Path] = {}
        for name, rows in zip(site_names(len(parts)), parts, strict=True):
            tables[name] = self.out / "data" / f"{name}.parquet"
            write_registry(registry.take(rows), tables[name])
        return tables

    def _init(self, name: str, table: Path) -> Party:
        folder, privacy = self.out / "hospitals" / name, self.config.privacy
        budget = (
            ("--epsilon", str(privacy.epsilon), "--delta", str(privacy.delta))
            if privacy.enabled
            else ("--without-privacy",)
        )
        said = self.call(
            "client", "init", folder, "--name", name, "--table", table, "--dictionary", self.dictionary, *budget
        ).stdout
        return Party(name, folder, folder / "state", _fingerprint(said))

    def enroll(self, *names: str) -> None:
        """Takes hospitals in, and writes everybody's invitation anew: the roster is another one."""
        applications = [self.hospitals[name].folder / f"{name}.application.json" for name in names]
        self.call("server", "enroll", *applications, "-C", self.coordinator.folder)
        self.call("server", "invite", "-C", self.coordinator.folder, "--out", self.out / "mail")

    def join(self, name: str) -> None:
        """A hospital pins its invitation; it has compared everybody's fingerprint by telephone."""
        verified = [part for other in self.hospitals.values() for part in ("--verified", other.fingerprint)]
        self.call(
            "client", "join", self.out / "mail" / f"{name}.invitation.json", "--site", self.site_toml(name),
            "--coordinator", self.coordinator.fingerprint, *verified,
        )  # fmt: skip

    def site_toml(self, name: str) -> Path:
        """A hospital's settings."""
        return self.hospitals[name].folder / "site.toml"

    def start(self, *names: str) -> None:
        """Starts parties, "coordinator" or hospitals, and waits until each is connected; all without names.

        Raises:
            DeploymentError: one ended, or did not come up in time.
        """
        chosen = [self._party(name) for name in names or ("coordinator", *self.hospitals)]
        for party in chosen:
            party.seen = len(party.log(NODE))
            if party.stock:
                self._start_stock(party)
                continue
            command = (
                ("server", "start", "-C", str(party.folder))
                if party is self.coordinator
                else ("client", "start", "--site", str(party.folder / "site.toml"))
            )
            party.process = self._popen([str(WARDROUND), *command], self.out / f"{party.name}.log")
        for party in chosen:
            self.wait_for(party)

    def _start_stock(self, party: Party) -> None:
        """Flower's SuperNode and executor with the options of docs/deployment-site.md, and nothing of ours before."""
        state, port = party.state, free_port()
        private_folder(state / "logs")
        secret = state / "stock.secret"
        write_atomic(secret, secrets.token_hex(32).encode())
        # The executor looks for flwr-clientapp there, as in an environment that was activated.
        path = os.pathsep.join([str(WARDROUND.parent), os.environ.get("PATH", os.defpath)])
        environment = {**STOCK_ENVIRONMENT, "FLWR_HOME": str(state / "flower"), "PATH": path}
        party.process = self._popen(
            [
                str(WARDROUND.with_name("flower-supernode")),
                "--superlink", f"127.0.0.1:{self.port}",
                "--root-certificates", str(state / "ca.pem"),
                "--auth-supernode-private-key", str(state / "node.pem"),
                "--isolation", "process",
                "--superexec-auth-secret-file", str(secret),
                "--host", "127.0.0.1",
                "--port", str(port),
                "--node-config", f'site="{self.site_toml(party.name)}"',
            ],
            state / "logs" / f"{NODE}.log",
            environment,
        )  # fmt: skip
        party.executor = self._popen(
            [
                str(WARDROUND.with_name("flower-superexec")), "--insecure",
                "--superexec-auth-secret-file", str(secret),
                "--runtime-api-address", f"127.0.0.1:{port}",
            ],
            state / "logs" / "superexec.log",
            environment,
        )  # fmt: skip

    def _popen(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        self.tell(f"{Path(command[0]).name} {shlex.join(command[1:])} &")
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment, **(environment or {})},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def wait_for(self, party: Party, timeout_s: float = _PATIENCE_S) -> None:
        """Waits until a party is up: the coordinator takes connections, a hospital's node has its number from it.

        Raises:
            DeploymentError: its process ended, or it is not up in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if party.process is not None and (code := party.process.poll()) is not None:
                own = self.out / f"{party.name}.log"
                said = party.log(NODE) if party.stock else own.read_text("utf-8", "replace")
                last = " ".join(said.strip().splitlines()[-3:])
                raise DeploymentError(f"{party.name}: ended with exit code {code}: {last}")
            if self._is_up(party):
                return
            time.sleep(0.3)
        child = "superlink" if party is self.coordinator else NODE
        raise DeploymentError(f"{party.name}: not up in {timeout_s:.0f} s: {party.log(child)[-600:]}")

    def _is_up(self, party: Party) -> bool:
        if party is self.coordinator:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5):
                return True
            return False
        return "SuperNode ID:" in party.log(NODE)[party.seen :]

    def stop(self, *names: str) -> None:
        """Ends parties as Ctrl-C would, all at once, each in its own order; all without names."""
        chosen = [self._party(name) for name in names or (*self.hospitals, "coordinator")]
        running = [one for party in chosen for one in (party.executor, party.process) if one is not None]
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in running:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for party in chosen:
            party.process = party.executor = None

    def kill(self, name: str, child: str) -> int:
        """kill -9 of one process of a party; gives its number.

        Raises:
            DeploymentError: it does not run.
        """
        pid = self._party(name).pid(child)
        if pid is None:
            raise DeploymentError(f"{name}: no process '{child}' to kill")
        os.kill(pid, signal.SIGKILL)
        return pid

    def submit(self) -> None:
        """Starts the run, and leaves it to the coordinator."""
        self.call(*self._run_command())

    def run(self, follow: Callable[[str], None] | None = None) -> None:
        """The whole run, from its config to its end.

        Args:
            follow: called with every line that the command writes while it waits.

        Raises:
            DeploymentError: it did not come to its end.
        """
        command = [str(WARDROUND), *map(str, self._run_command()), "--wait"]
        self.tell(shlex.join(["wardround", *command[1:]]))
        last = ""
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment},
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                last = line.strip() or last
                if follow is not None:
                    follow(line.rstrip())
        if process.returncode != 0:
            raise DeploymentError(f"wardround server run: exit code {process.returncode}: {last}")

    def _run_command(self) -> tuple[str | Path, ...]:
        file = self.out / "run.toml"
        file.write_text(to_toml(self.config), encoding="utf-8")
        return "server", "run", file, "--dictionary", self.dictionary, "-C", self.coordinator.folder

    def status(self) -> dict[str, Any]:
        """`wardround server status --json`."""
        return json.loads(self.call("server", "status", "--json", "-C", self.coordinator.folder).stdout)

    def _party(self, name: str) -> Party:
        return self.coordinator if name == self.coordinator.name else self.hospitals[name]


@contextmanager
def deployment(
    out: Path, config: RunConfig, tell: Callable[[str], None] = lambda _: None, stock: int = 0, **environment: str
) -> Iterator[Deployment]:
    """A founded and started consortium; everything ends with the block. Arguments as of `Deployment`.

    Raises:
        RunFolderError: the folder is not empty.
        DeploymentError: a command failed.
    """
    made = Deployment(out.resolve(), config, tell, dict(environment), stock)
    # An unhandled SIGTERM would end this process alone, in whatever it was at.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        made.found()
        made.start()
        yield made
    finally:
        made.stop()
        signal.signal(signal.SIGTERM, before)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _fingerprint(said: str) -> str:
    found = _FINGERPRINT.search(said)
    if found is None:
        raise DeploymentError(f"expected a fingerprint, got: {said[-200:]}")
    return found.group()


def where(made: Deployment) -> Sequence[tuple[str, Path]]:
    """What a person looks for after a run, and where it is."""
    run = made.run_folder
    return (
        ("report", run / "report.html"),
        ("final model", run / "model"),
        ("what was evaluated", run / "evaluation.json"),
        ("what privacy it had", run / "privacy.json"),
        ("the coordinator", made.coordinator.folder),
        ("the hospitals, each with ledger and log", made.out / "hospitals"),
    )
