"""The coordinator's folder: what is in it, who is enrolled, what its processes are started with.

Run by the coordinator; every `wardround server` command about a deployment opens it. Enters: the folder. Leaves:
nothing. Private: all of it but tls/ca.pem and the rosters; the folder has mode 0700, files with a secret 0600.

    coordinator.toml     settings (common/config.py, CoordinatorConfig)
    coordinator.pem      the coordinator's key, encrypted; roster-<serial>.json, roster.json (server/roster_cli.py)
    tls/                 certificates (server/certificates.py)
    secret               what its own processes know one another by, 32 random bytes
    superlink.db         Flower's: messages on their way, node keys; made anew from applications/ where it is lost
    applications/        NAME.json of every hospital that was enrolled
    runs/NAME/           a run: run.toml and dictionary.toml as submitted, then server/run.py's files
    flower/, logs/       Flower's folder; the output of every process
    lock, status.json    who has it started (common/supervisor.py)
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from ..common.config import NAME, CoordinatorConfig, load_coordinator
from ..common.enrolment import Application, check_address
from ..common.errors import ConfigError, RunFolderError
from ..common.files import private_folder, write_atomic
from ..common.key_file import read_secret, write_once
from ..common.roster import Roster
from .roster_cli import newest, serials

ENVIRONMENT = "WARDROUND_COORDINATOR"  # where a ServerApp finds this folder: no path of it travels in a run's config
CONTROL_HEADER = "x-wardround-control"
_CONTROL_USE = b"wardround/1 control token"
_SECRET_BYTES = 32
# Always: no telemetry, no look for updates, no model hub; and no proxy on the way to this machine.
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
}
_HERE = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class CoordinatorFolder:
    """An opened coordinator's folder."""

    path: Path
    config: CoordinatorConfig

    @classmethod
    def open(cls, path: Path) -> CoordinatorFolder:
        """Opens a folder that `wardround server init` made.

        Raises:
            ConfigError: there is none, its settings are wrong, or others may look into it.
        """
        file = path / "coordinator.toml"
        if not file.is_file():
            raise ConfigError(
                f"{path}: no coordinator.toml here: name the coordinator's folder with --coordinator, or make one with "
                "`wardround server init`"
            )
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: others may look into it: call `chmod 700 {path}`")
        config = load_coordinator(file)
        check_address(config.address, f"{file}: address")
        return cls(path.resolve(), config)

    @property
    def host(self) -> str:
        """What hospitals dial, without the port."""
        return check_address(self.config.address, "address")[0]

    @property
    def tls(self) -> Path:
        """Certificates and their keys."""
        return self.path / "tls"

    @property
    def database(self) -> Path:
        """Flower's."""
        return self.path / "superlink.db"

    @property
    def logs(self) -> Path:
        """The output of every process."""
        return self.path / "logs"

    @property
    def lock(self) -> Path:
        """Held while the coordinator is started."""
        return self.path / "lock"

    @property
    def status_file(self) -> Path:
        """What the supervisor wrote."""
        return self.path / "status.json"

    @property
    def loopback(self) -> str:
        """The address of the socket for this coordinator's own processes."""
        return f"127.0.0.1:{self.config.loopback_port}"

    @property
    def passphrase_file(self) -> Path | None:
        """As coordinator.toml names it."""
        named = self.config.passphrase_file
        return None if named is None else self.path / named

    def run(self, name: str) -> Path:
        """A run's folder, whether or not it is there.

        Raises:
            ConfigError: not a run's name.
        """
        if re.fullmatch(NAME, name) is None or name in (".", ".."):
            raise ConfigError(f"run: expected 1 to 64 of letters, digits, '.', '_', '-', got {name!r:.70}")
        return self.path / "runs" / name

    def runs(self) -> list[str]:
        """Names of the runs that were submitted."""
        return sorted(file.parent.name for file in (self.path / "runs").glob("*/run.toml"))

    def secret(self) -> bytes:
        """What this coordinator's processes know one another by.

        Raises:
            ConfigError: missing, readable by others, or not 32 bytes.
        """
        found = read_secret(self.path / "secret", "secret of the coordinator's processes")
        if len(found) != _SECRET_BYTES:
            raise ConfigError(f"{self.path / 'secret'}: expected {_SECRET_BYTES} bytes, got {len(found)}")
        return found

    def control_token(self) -> str:
        """What a call of the Control API has to carry in `CONTROL_HEADER`: whoever can read the secret."""
        return hmac.new(self.secret(), _CONTROL_USE, hashlib.sha256).hexdigest()

    def roster(self) -> Roster | None:
        """The newest roster, signature checked; None before the first."""
        return newest(self.path) if serials(self.path) else None

    def applications(self) -> dict[str, Application]:
        """Every hospital's application that was enrolled, by its name, signatures checked."""
        files = sorted((self.path / "applications").glob("*.json"))
        read = (Application.parse(file.read_bytes(), str(file)) for file in files)
        return {application.card.name: application for application in read}

    def keep(self, application: Application) -> Path:
        """Keeps an application, in the place of this hospital's last one."""
        path = private_folder(self.path / "applications") / f"{application.card.name}.json"
        write_atomic(path, application.to_json().encode())
        return path

    def node_keys(self) -> dict[str, bytes]:
        """Who may connect: active members of the newest roster that applied with the key on it; name → PEM."""
        roster = self.roster()
        if roster is None:
            return {}
        active = {member.id: member.name for member in roster.members if member.active}
        return {
            active[application.card.id]: node_key_pem(application)
            for application in self.applications().values()
            if application.card.id in active
        }

    def environment(self) -> dict[str, str]:
        """Of all its processes."""
        return {**OFFLINE, **no_proxy(os.environ), "FLWR_HOME": str(self.path / "flower"), ENVIRONMENT: str(self.path)}


def create(path: Path, config: CoordinatorConfig, text: str) -> None:
    """Makes the folder, its settings and its secret; certificates and the key are the caller's.

    Raises:
        RunFolderError: there is something in it.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunFolderError(f"{path}: is not empty: choose a new folder")
    check_address(config.address, "--address")
    private_folder(path)
    for name in ("applications", "runs", "flower", "logs"):
        private_folder(path / name)
    write_once(path / "secret", secrets.token_bytes(_SECRET_BYTES), 0o600)
    write_atomic(path / "coordinator.toml", text.encode())


def node_key_pem(application: Application) -> bytes:
    """A hospital's node key as Flower keeps it.

    Raises:
        ConfigError: not a key that Flower takes.
    """
    try:
        key = load_ssh_public_key(application.node_key.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            f"application of {application.card.name}: node_key: expected a key of kind ecdsa-sha2-nistp384"
        )
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def no_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """NO_PROXY with this machine in it, beside what is there.

    >>> no_proxy({"no_proxy": "intranet"})["NO_PROXY"]
    'intranet,127.0.0.1,localhost'
    """
    there = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    hosts = [host for host in there.split(",") if host.strip()]
    value = ",".join([*hosts, *(host for host in _HERE if host not in hosts)])
    return {"NO_PROXY": value, "no_proxy": value}
