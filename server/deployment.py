"""What the coordinator's commands do: found a consortium, enrol hospitals, invite them, submit a run, end it.

Run by the coordinator; server/deploy_cli.py is the commands. Enters: applications that hospitals sent, run configs,
dictionaries. Leaves: invitations, which people send. Private: the coordinator's key and its passphrase.

Nothing is written before everything that can be refused was looked at, and each step can be called again after a kill:
a roster is signed before an application is kept, an application is kept before its node may connect.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tomli_w

from ..common import plan
from ..common.bundle import wardround_version
from ..common.config import CoordinatorConfig, RunConfig, load_run, packaged, parse, to_toml
from ..common.dictionary import Dictionary, check_reviewed, load_dictionary
from ..common.enrolment import Application, Invitation, check_address
from ..common.errors import ConfigError, RunFolderError
from ..common.files import check_writable, private_folder, write_atomic
from ..common.identity import Card, Identity
from ..common.key_file import passphrase, write_once
from ..common.messages import PROTOCOL_VERSION
from ..common.roster import Roster
from ..common.schema import Schema
from ..common.supervisor import holder
from . import run_status
from .certificates import make_authority, make_server
from .coordinator import CoordinatorFolder, create, node_key_pem
from .journal import INPUTS, open_journal
from .roster_cli import KEY_FILE, open_key, publish

if TYPE_CHECKING:
    from ..common.messages import Instruction
    from .aggregation import Total, Work
    from .control import Control
    from .phases import Answer

_MAX_APPLICATION_BYTES = 20_000
RUN_FILE, DICTIONARY_FILE = INPUTS


@dataclass(frozen=True)
class Submitted:
    """A run's inputs, as they lie in its folder."""

    config: RunConfig
    dictionary: Dictionary
    out: Path


# ---- founding


def found(
    path: Path,
    consortium: str,
    address: str,
    *,
    listen_port: int | None,
    loopback_port: int | None,
    passphrase_file: Path | None,
) -> Identity:
    """Makes a coordinator's folder: settings, key, authority, certificate, secret.

    Args:
        path: new or empty.
        consortium: its name.
        address: "host:port" that hospitals dial.
        listen_port: of the public socket; None: the port of `address`.
        loopback_port: of the other one; None: the next.
        passphrase_file: of the key; None: WARDROUND_PASSPHRASE has it, and `start` needs it there too.

    Raises:
        ConfigError, RunFolderError: nothing is left behind.
    """
    host, port = check_address(address, "--address")
    listen = port if listen_port is None else listen_port
    settings: dict[str, str | int] = {
        "consortium": consortium,
        "address": address,
        "listen_port": listen,
        "loopback_port": loopback_port or (listen + 1 if listen < 65535 else listen - 1),
    }
    if (only := _listen_host(host)) is not None:
        settings["listen_host"] = only
    if passphrase_file is not None:
        settings["passphrase_file"] = str(passphrase_file.resolve())
    config = parse(CoordinatorConfig, settings, "coordinator.toml")
    identity = Identity.generate()
    Roster.first(identity, consortium, [Card.make(Identity.generate(), "any")])  # takes the name, or says why not
    locked = identity.lock(passphrase(passphrase_file, os.environ, "--passphrase-file"))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunFolderError(f"{path}: is not empty: choose a new folder")
    check_writable(path)
    fresh = not path.exists()
    try:
        create(path, config, _HEAD + tomli_w.dumps(settings))
        make_authority(path / "tls", consortium)
        make_server(path / "tls", host)
        write_once(path / KEY_FILE, locked, 0o600)
    except BaseException:
        for left in path.iterdir() if path.is_dir() else ():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if fresh and path.is_dir():
            path.rmdir()
        raise
    return identity


def _listen_host(host: str) -> str | None:
    """Where to listen, for an address that says so: loopback for a trial on one machine, any IPv6 address for IPv6."""
    if host == "localhost":
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return host if address.is_loopback else "::" if address.version == 6 else None


_HEAD = "# This coordinator's settings; configs/coordinator.example.toml has every key and what it means.\n"


# ---- enrolling


def read_applications(paths: Sequence[Path]) -> list[Application]:
    """Applications from the files that hospitals sent, signatures and versions checked.

    Raises:
        ConfigError, VerificationError: one is none; another version of wardround or of the protocol; a node key twice.
    """
    read: list[Application] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                read.append(Application.parse(file.read(_MAX_APPLICATION_BYTES), str(path)))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file: an application that a hospital sent") from None
        except IsADirectoryError:
            raise ConfigError(f"{path}: expected an application, got a folder") from None
        check_versions(read[-1], str(path))
        node_key_pem(read[-1])
    return read


def check_versions(application: Application, source: str) -> None:
    """Refuses a hospital whose installation cannot take part in this coordinator's runs.

    Raises:
        ConfigError: says both versions.
    """
    ours = wardround_version(), PROTOCOL_VERSION
    if (application.wardround, application.protocol) != ours:
        raise ConfigError(
            f"{source}: {application.card.name} runs wardround {application.wardround} (protocol "
            f"{application.protocol}), this coordinator {ours[0]} (protocol {ours[1]}): install the same version at "
            "both, and let the hospital send a new application"
        )


def enrol(folder: CoordinatorFolder, paths: Sequence[Path], passphrase_file: Path | None) -> list[Application]:
    """Puts hospitals on the roster, keeps their applications, and lets their nodes connect.

    Prints the new roster. A hospital that is on it already gets its new node key taken, if it has one.

    Raises:
        ConfigError, VerificationError: an application that cannot be taken; nothing was written.
        RunFolderError: another process signed a roster just now.
    """
    applications = read_applications(paths)
    before, kept = folder.roster(), folder.applications()
    members = {} if before is None else {member.id: member for member in before.members if member.active}
    new = [application.card for application in applications if application.card.id not in members]
    for application in applications:
        if (member := members.get(application.card.id)) is not None and member.name != application.card.name:
            raise ConfigError(f"{application.card.name}: this key is on the roster as {member.name}")
    taken = {application.node_key: name for name, application in kept.items()}
    for application in applications:
        name = application.card.name
        if taken.setdefault(application.node_key, name) != name:
            raise ConfigError(f"{name}: its node key is that of {taken[application.node_key]}: it has to make its own")
    if new:
        key = open_key(folder.path, passphrase_file or folder.passphrase_file)
        if before is None:
            publish(folder.path, Roster.first(key, folder.config.consortium, new))
        else:
            publish(folder.path, before.adding(key, new), before)
    for application in applications:
        folder.keep(application)
    return applications


def tell_nodes(folder: CoordinatorFolder) -> list[str]:
    """Brings a running SuperLink's node keys to what roster and applications say; one that is started later reads them.

    Returns:
        A line for each change.
    """
    if holder(folder.lock) is None:
        return []
    from .control import Control

    with Control(folder) as control:
        return sync_nodes(folder, control)


def sync_nodes(folder: CoordinatorFolder, control: Control) -> list[str]:
    """As `tell_nodes`, with an open client.

    Raises:
        ControlError: a node key that was taken out before; Flower takes none twice.
    """
    wanted, lines = folder.node_keys(), []
    known = {node.public_key: node for node in control.nodes() if node.status != "unregistered"}
    for key, node in known.items():
        if key not in wanted.values():
            control.unregister(node.id)
            lines.append(f"{node.name}: its node may not connect any more")
    for name, key in wanted.items():
        if key not in known:
            control.register(name, key)
            lines.append(f"{name}: its node may connect")
    return lines


def invite(folder: CoordinatorFolder, site: str, passphrase_file: Path | None) -> Invitation:
    """The signed invitation of an active member.

    Raises:
        ConfigError: no roster yet; no such member; it never sent an application.
    """
    from .control import bundle_digest

    roster = folder.roster()
    if roster is None:
        raise ConfigError(f"{folder.path}: nobody is enrolled yet: call `wardround server enroll APPLICATION` first")
    key = open_key(folder.path, passphrase_file or folder.passphrase_file)
    authority = (folder.tls / "ca.pem").read_text("ascii")
    made = Invitation.make(key, roster, site, folder.config.address, authority, bundle_digest())
    if site not in folder.node_keys():
        raise ConfigError(
            f"{site}: is on the roster, and its node could not connect: expected its application: call `wardround "
            "server enroll APPLICATION`"
        )
    return made


# ---- runs


def submit(folder: CoordinatorFolder, config: RunConfig, dictionary_file: Path) -> Submitted:
    """Puts a run's config and dictionary into its folder, where the ServerApp finds them.

    Raises:
        ConfigError: it could not begin: no secure sums, a draft dictionary, an ε that its plan cannot keep, too few
            hospitals.
        RunFolderError: a run of this name is there.
    """
    out = folder.run(config.name)
    if (out / RUN_FILE).exists():
        raise RunFolderError(
            f"{out}: run '{config.name}' is there: `wardround server run {config.name} --resume` continues it; for a "
            "new one set another name: --set name=NAME"
        )
    dictionary = load_dictionary(dictionary_file)
    check_run(config, dictionary)
    if config.privacy.enabled:
        with suppress(ImportError):  # without the accountants; every hospital computes it for itself in any case
            plan.noise_multiplier(config)
    roster = folder.roster()
    active = 0 if roster is None else sum(member.active for member in roster.members)
    if active < config.federation.min_sites:
        raise ConfigError(
            f"federation.min_sites = {config.federation.min_sites}: the roster has {active} active hospitals: enrol "
            "more"
        )
    private_folder(out)
    write_atomic(out / DICTIONARY_FILE, dictionary_text(dictionary_file))
    write_atomic(out / RUN_FILE, to_toml(config).encode())  # last: it says that the run is there
    return Submitted(config, dictionary, out)


def submitted(folder: CoordinatorFolder, name: str) -> Submitted:
    """A run's inputs again.

    Raises:
        ConfigError: no such run; its inputs are wrong.
    """
    out = folder.run(name)
    if not (out / RUN_FILE).is_file():
        known = ", ".join(folder.runs()) or "none"
        raise ConfigError(f"{out}: no run '{name}' was submitted; there are: {known}")
    config, dictionary = load_run(out / RUN_FILE), load_dictionary(out / DICTIONARY_FILE)
    if config.name != name:
        raise ConfigError(f"{out / RUN_FILE}: expected name '{name}', got '{config.name}'; put the file back")
    check_run(config, dictionary)
    return Submitted(config, dictionary, out)


def end_run(folder: CoordinatorFolder, control: Control, name: str) -> None:
    """Ends what works on a run, and what Flower still takes for it; the journal has every phase that was complete."""
    before = control.run_named(name)
    if before is not None and not before.over:
        control.stop(before.id)
    said = run_status.read(folder.run(name))
    for number, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        if not run_status.alive(said):
            return
        with suppress(ProcessLookupError):
            os.kill(said["pid"], number)
        deadline = time.monotonic() + patience
        while run_status.alive(said) and time.monotonic() < deadline:
            time.sleep(0.05)


def merge_again(run: Submitted) -> list[Path]:
    """The final model of a run, merged again from its journal where it is missing; no site is asked.

    Returns:
        The two folders.

    Raises:
        RunFolderError: the run has not come so far; another process is working on it; not enough disk.
    """
    from .phases import Consortium
    from .rounds import Rounds
    from .run import Coordinator
    from .tracking import SilentProgress

    if not (run.out / "journal" / "run.record").exists():
        raise RunFolderError(f"{run.out}: the run has not begun")
    with open_journal(run.out, run.config, resume=True) as journal:
        if not journal.has("evaluate"):
            raise RunFolderError(f"{run.out}: the run has not come to its evaluation: --resume continues it")
        consortium = Consortium(_Nobody(), run.config, journal, SilentProgress())
        adding = _NoSums()
        coordinator = Coordinator(run.config, run.dictionary, run.out, journal, consortium, adding)
        round_zero, _ = coordinator.round_zero()
        schema = Schema.from_json(journal.read("schema").values["schema"])
        rounds = Rounds(run.config, consortium, journal, adding, schema.digest(), round_zero)
        state, _ = rounds.restored()
        evaluation = coordinator.evaluate(schema, round_zero, state.kept_model, run.config.federation.rounds)
        coordinator.finalize(state.kept_model, schema, rounds, state, evaluation)
    return [run.out / "adapter", run.out / "model"]


class _Nobody:
    """An exchange that reaches no site."""

    def nodes(self) -> list[int]:
        return []

    def ask(self, instructions: Mapping[int, Instruction]) -> Iterator[Answer]:
        raise RunFolderError("the run has not come to its end: --resume continues it")


class _NoSums:
    """Adds nothing up: every sum is in the journal."""

    def total(self, work: Work) -> Total:
        raise RunFolderError(f"{work.phase}: its sum is not in the journal: --resume continues the run")

    def forget(self, name: str) -> None: ...


def check_run(config: RunConfig, dictionary: Dictionary) -> None:
    """Refuses a run that real hospitals may not take part in.

    Raises:
        ConfigError: it would add up in the clear.
        DictionaryError: privacy is on and the dictionary is a draft.
    """
    if config.federation.secure_aggregation != "bonawitz":
        raise ConfigError("federation.secure_aggregation = 'none': only a simulation adds up in the clear")
    if config.privacy.enabled:
        check_reviewed(dictionary)


def dictionary_text(path: Path) -> bytes:
    """The bytes of a dictionary, given by path or by the name of a shipped one."""
    if not path.is_file() and path.suffix == "":
        path = packaged("registries", f"{path.name}.toml")
    return path.read_bytes()
