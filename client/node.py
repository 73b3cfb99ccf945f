"""What `wardround client start` runs and how: Flower's SuperNode and our worker, hardened, and nothing else.

Run by the site. Enters: site.toml, the invitation that this site pinned. Leaves: connections to the coordinator's one
address, over TLS, checked against the pinned authority alone; nothing here listens but the Runtime API on loopback.
Private: the SuperNode's key (state/node.pem, mode 0600), the secret by which the worker takes tasks, made at every
start. The passphrase of the site's identity reaches the worker, never the SuperNode.

    state/node.pem          the SuperNode's key, EC P-384, OpenSSH format
    state/consortium.json   the pinned invitation
    state/ca.pem            the authority in it, as the SuperNode reads it
    state/runtime.secret    of this start
    state/flower/           Flower's own folder (FLWR_HOME)
    state/logs/             supernode.log, worker.log
    state/lock, state/status.json   common/supervisor.py
"""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from ..common.bundle import bundle_files
from ..common.config import SiteConfig, load_site
from ..common.enrolment import Invitation
from ..common.errors import ConfigError, VerificationError
from ..common.files import private_folder, write_atomic
from ..common.key_file import PASSPHRASE, read_secret, write_once
from ..common.supervisor import Child, Supervisor, exclusive, holder
from .identity import SiteKeys

WORKER_GRACE_S, NODE_GRACE_S = 75.0, 15.0  # the worker's is longer than what it gives a message
LOOPBACK = "127.0.0.1"
# Of every process that a site starts. Nothing is looked up, reported or fetched anywhere.
ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
}
_NEEDED = (
    "--root-certificates", "--auth-supernode-private-key", "--superexec-auth-secret-file", "--superlink", "--port",
)  # fmt: skip
_REFUSED = ("--insecure", "--allow-runtime-dependency-installation", "--health-server-address")


def fab() -> bytes:
    """The bundle as Flower ships it: what `bundle_files` holds, packed by Flower's own builder."""
    from flwr.cli.build import build_fab_from_files

    return build_fab_from_files(bundle_files())[0]


def bundle_digest() -> bytes:
    """SHA-256 of the bundle, 32 bytes; Flower names it by the same."""
    return hashlib.sha256(fab()).digest()


# ---- the SuperNode's key


def make_node_key(path: Path) -> bool:
    """Makes the SuperNode's key where none is, mode 0600; whether it was made now. It never leaves this machine."""
    if os.path.lexists(path):
        return False
    private_folder(path.parent)
    key = ec.generate_private_key(ec.SECP384R1())
    try:
        write_once(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), 0o600)
    except FileExistsError:
        return False
    return True


def node_key(path: Path) -> str:
    """The public half of the SuperNode's key, one OpenSSH line.

    Raises:
        ConfigError: missing, open to others, not such a key.
    """
    data = read_secret(path, "SuperNode key; `wardround client init` makes it")
    try:
        key = load_ssh_private_key(data, None)
    except ValueError:
        raise ConfigError(f"{path}: not an OpenSSH private key: restore it from a copy") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise ConfigError(f"{path}: expected a key on the curve P-384: restore it from a copy")
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


# ---- a site's part of a deployment


@dataclass(frozen=True, eq=False)
class Node:
    """One hospital's folder, as the processes that take part for it see it.

    Attributes:
        site_toml: absolute.
        config: site.toml.
    """

    site_toml: Path
    config: SiteConfig

    @classmethod
    def open(cls, site_toml: Path) -> Node:
        """Of a `site.toml`.

        Raises:
            ConfigError: missing or malformed.
        """
        return cls(site_toml.resolve(), load_site(site_toml))

    @property
    def folder(self) -> Path:
        """Of site.toml."""
        return self.site_toml.parent

    @property
    def state(self) -> Path:
        """What must last, mode 0700."""
        return self.folder / self.config.state

    @property
    def key_path(self) -> Path:
        """Of the SuperNode's key."""
        return self.state / "node.pem"

    @property
    def invitation_path(self) -> Path:
        """Of the pinned invitation."""
        return self.state / "consortium.json"

    @property
    def lock_path(self) -> Path:
        """Held while this site runs."""
        return self.state / "lock"

    @property
    def status_path(self) -> Path:
        """What the supervisor writes."""
        return self.state / "status.json"

    @property
    def keys(self) -> SiteKeys:
        """This site's identity and roster."""
        return SiteKeys(self.folder, self.config)

    @cached_property
    def invitation(self) -> Invitation:
        """The pinned invitation, signatures checked.

        Raises:
            ConfigError: this site joined no consortium; the file is none.
            VerificationError: a wrong signature.
        """
        try:
            data = self.invitation_path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(
                f"{self.folder}: this site has joined no consortium: call `wardround client join INVITATION` with the "
                "file that the coordinator sent"
            ) from None
        return Invitation.parse(data, str(self.invitation_path))

    def write_authority(self, invitation: Invitation) -> Path:
        """The authority of an invitation, as a SuperNode reads it."""
        path = self.state / "ca.pem"
        write_atomic(path, invitation.ca_certificate.encode("ascii"))
        return path

    def running(self) -> int | None:
        """The process that runs this site, or None."""
        return holder(self.lock_path)

    def check(self) -> None:
        """Refuses to start what could not take part: keys, passphrase, roster, versions, bundle.

        Raises:
            ConfigError, VerificationError: the first thing that is wrong.
        """
        invitation, keys = self.invitation, self.keys
        invitation.check_versions()
        check_bundle(invitation)
        own = keys.load()
        if keys.roster().coordinator != invitation.pinned().coordinator:
            raise VerificationError(
                f"{self.site_toml}: the pinned roster is another coordinator's than that of the invitation that this "
                "site joined by: call `wardround client join` with a new invitation"
            )
        keys.members(own.id)
        node_key(self.key_path)

    def environment(self) -> dict[str, str]:
        """Of every process of this site, beside what it inherits."""
        private_folder(self.state / "flower")
        # Hospitals reach the world through a proxy; the way to loopback must not lead there.
        around = [one for one in (os.environ.get("NO_PROXY"), LOOPBACK, "localhost") if one]
        without = ",".join(around)
        return {**ENVIRONMENT, "FLWR_HOME": str(self.state / "flower"), "NO_PROXY": without, "no_proxy": without}

    def children(self, port: int) -> tuple[Child, Child]:
        """The SuperNode and the worker; writes what they read. `port`: of the Runtime API, on loopback.

        Raises:
            ConfigError: Flower is not installed, or a way of hardening is missing.
        """
        invitation, environment = self.invitation, self.environment()
        authority, secret = self.write_authority(invitation), self.state / "runtime.secret"
        write_atomic(secret, secrets.token_hex(32).encode("ascii"))
        command = supernode_command(
            address=invitation.address, port=port, authority=authority, key=self.key_path, secret=secret
        )
        check_hardened(command, environment)
        node = Child("supernode", command, {**environment, PASSPHRASE: ""}, grace_s=NODE_GRACE_S)
        worker = Child(
            "worker",
            (
                sys.executable, "-m", "wardround.client.worker",
                "--site", str(self.site_toml),
                "--runtime", f"{LOOPBACK}:{port}",
                "--secret", str(secret),
                "--bundle", invitation.bundle_digest.hex(),
            ),
            environment,
            grace_s=WORKER_GRACE_S,
        )  # fmt: skip
        return node, worker

    def start(self, port: int | None = None, *, tell: Callable[[], None] = lambda: None) -> int:
        """Runs this site until SIGTERM or SIGINT; 0.

        Args:
            port: of the Runtime API on loopback; None: one that is free.
            tell: called once everything was checked.

        Raises:
            RunFolderError: it runs already.
            ConfigError, VerificationError: as `check`, before anything starts.
            ChildError: a process ended with a mistake that only a person can mend.
        """
        private_folder(self.state)
        with exclusive(self.lock_path, f"site '{self.config.name}'"):
            self.check()
            children = self.children(free_port() if port is None else port)
            tell()
            return Supervisor(children, self.state / "logs", self.status_path).run()


def check_bundle(invitation: Invitation) -> None:
    """Refuses an invitation to runs of another bundle than the one that this installation has.

    Raises:
        ConfigError: says both digests.
    """
    own = bundle_digest()
    if invitation.bundle_digest != own:
        raise ConfigError(
            f"invitation: runs are started with bundle {invitation.bundle_digest.hex()[:12]}…, this installation's is "
            f"{own.hex()[:12]}…: another build of wardround or of Flower is installed at one of both: install the same"
        )


def supernode_command(*, address: str, port: int, authority: Path, key: Path, secret: Path) -> tuple[str, ...]:
    """Flower's own SuperNode, with everything on that protects a site.

    Raises:
        ConfigError: its command is not beside this Python.
    """
    program = Path(sysconfig.get_path("scripts")) / "flower-supernode"
    if not program.exists():
        raise ConfigError(f"{program}: no such file: install wardround with its dependencies (flwr) once more")
    return (
        str(program),
        "--superlink", address,
        "--root-certificates", str(authority),
        "--auth-supernode-private-key", str(key),
        "--isolation", "process",
        "--superexec-auth-secret-file", str(secret),
        "--host", LOOPBACK,
        "--port", str(port),
    )  # fmt: skip


def check_hardened(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Refuses a SuperNode that would run without one of the protections; the last look before it starts.

    Raises:
        ConfigError: names what is missing or must not be there.
    """
    options = dict(zip(command[1::2], command[2::2], strict=False))
    missing = [name for name in _NEEDED if not options.get(name)]
    missing += [f"{name} {value}" for name, value in (("--isolation", "process"), ("--host", LOOPBACK))
                if options.get(name) != value]  # fmt: skip
    missing += [f"{name}={value}" for name, value in ENVIRONMENT.items() if environment.get(name) != value]
    if "FLWR_HOME" not in environment:
        missing.append("FLWR_HOME")
    if missing:
        raise ConfigError(f"the SuperNode is not started without {missing[0]}")
    if unsafe := [name for name in _REFUSED if name in command]:
        raise ConfigError(f"the SuperNode is not started with {unsafe[0]}")


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as one:
        one.bind((LOOPBACK, 0))
        address: Any = one.getsockname()
        return int(address[1])
