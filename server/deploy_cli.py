"""`wardround server init, enroll, invite, start, run, status, stop, finalize, renew`: a coordinator for real.

Mounted by server/cli.py. All but `init` work on the folder that it made: --coordinator, else WARDROUND_COORDINATOR,
else the current folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .roster_cli import mismatch_is_an_answer

if TYPE_CHECKING:
    from ..common.supervisor import Child
    from .coordinator import CoordinatorFolder

_PATH = click.Path(path_type=Path)
_GRACE_S, _LINK_GRACE_S, _KEEPER_GRACE_S = 30.0, 15.0, 5.0  # of the ServerApps, the SuperLink, the keeper; in turn
_STOP_S = _GRACE_S + _LINK_GRACE_S + _KEEPER_GRACE_S + 15.0
_WATCH_S = 2.0
_UP_S = 30.0  # how long `run` waits for a SuperLink that was started just now
_folder = click.option(
    "--coordinator",
    "-C",
    "where",
    type=_PATH,
    default=Path(),
    envvar="WARDROUND_COORDINATOR",
    help="The coordinator's folder; WARDROUND_COORDINATOR, else the current one.",
)
_passphrase_file = click.option(
    "--passphrase-file",
    type=_PATH,
    default=None,
    help="A file of mode 0600 with the passphrase of the coordinator's key; WARDROUND_PASSPHRASE goes first.",
)


def _open(where: Path) -> CoordinatorFolder:
    from .coordinator import CoordinatorFolder

    return CoordinatorFolder.open(where)


@click.command(
    epilog='Example: wardround server init coordinator --consortium "Stroke outcomes" '
    "--address coordinator.example.org:9092 --passphrase-file passphrase.txt"
)
@click.argument("folder", type=_PATH)
@click.option("--consortium", required=True, help="The consortium's name, as people read it.")
@click.option("--address", required=True, metavar="HOST:PORT", help="What hospitals dial; it is in the certificate.")
@click.option(
    "--listen-port", type=click.IntRange(1, 65535), default=None, help="Of the public socket; the address's port."
)
@click.option(
    "--loopback-port",
    type=click.IntRange(1, 65535),
    default=None,
    help="On 127.0.0.1, for its own processes; the next.",
)
@_passphrase_file
def init(
    folder: Path,
    consortium: str,
    address: str,
    listen_port: int | None,
    loopback_port: int | None,
    passphrase_file: Path | None,
) -> None:
    """Make a coordinator's FOLDER: its key, a certificate authority, a TLS certificate, settings.

    The passphrase (12 characters or more) encrypts the key. The file that holds it is named in coordinator.toml, so
    that a service can start without a person. Keep a copy of FOLDER and of the passphrase, apart.
    """
    from .deployment import found

    identity = found(
        folder,
        consortium,
        address,
        listen_port=listen_port,
        loopback_port=loopback_port,
        passphrase_file=passphrase_file,
    )
    click.echo(f"{folder}: coordinator of '{consortium}' at {address}")
    click.echo(f"fingerprint  {identity.fingerprint}")
    click.echo("Tell every hospital this fingerprint by telephone. Next: `wardround server enroll APPLICATION …`.")


@click.command(epilog="Example: wardround server enroll north.application.json south.application.json")
@click.argument("applications", type=_PATH, nargs=-1, required=True)
@_folder
@_passphrase_file
def enroll(applications: tuple[Path, ...], where: Path, passphrase_file: Path | None) -> None:
    """Enrol the hospitals that sent these APPLICATIONS: sign the next roster with them, let their nodes connect.

    Compare each fingerprint with that hospital by telephone. A hospital that is enrolled already and made a new node
    key sends a new application: the roster stays as it is.
    """
    from .deployment import enrol, tell_nodes

    folder = _open(where)
    with mismatch_is_an_answer():
        enrolled = enrol(folder, applications, passphrase_file)
        changes = tell_nodes(folder)
    for application in enrolled:
        click.echo(f"{application.card.name}  {application.card.fingerprint}  compare it by telephone")
    for line in changes:
        click.echo(line)
    click.echo(
        "Next: compare, and revoke what differs (`wardround server roster revoke`); then `wardround server invite`, "
        "and send each hospital its invitation."
    )


@click.command(epilog="Example: wardround server invite north   ·   wardround server invite --out mail")
@click.argument("sites", nargs=-1)
@click.option(
    "--out", type=_PATH, default=Path(), help="The folder that SITE.invitation.json goes to; the current one."
)
@_folder
@_passphrase_file
def invite(sites: tuple[str, ...], out: Path, where: Path, passphrase_file: Path | None) -> None:
    """Write SITE.invitation.json for these SITES, or for every enrolled hospital; nothing in it is secret.

    It says where to dial, whom to trust, who takes part and what may run, signed with the coordinator's key.
    """
    from ..common.errors import ConfigError
    from ..common.files import check_writable, write_atomic
    from ..common.identity import fingerprint
    from .deployment import invite as make

    folder = _open(where)
    names = sites or tuple(sorted(folder.node_keys()))
    if not names:
        raise ConfigError(f"{folder.path}: nobody is enrolled yet: call `wardround server enroll APPLICATION` first")
    with mismatch_is_an_answer():
        made = [make(folder, site, passphrase_file) for site in names]
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    for one in made:
        path = out / f"{one.site}.invitation.json"
        write_atomic(path, one.to_json().encode(), mode=0o644)
        click.echo(path)
    click.echo(f"coordinator's fingerprint  {fingerprint(made[0].pinned().coordinator)}  tell it by telephone")


@click.command(epilog="Example: wardround server start   ·   wardround server start --install-service")
@_folder
@_passphrase_file
@click.option("--install-service", is_flag=True, help="Write a systemd unit and say how to enable it; start nothing.")
def start(where: Path, passphrase_file: Path | None, install_service: bool) -> None:
    """Start the coordinator and stay: its SuperLink, what runs its rounds, and what keeps wanted runs going.

    Ctrl-C or SIGTERM ends it in order; a process that dies is started again. One coordinator a folder: a second start
    is refused. Logs are in logs/.
    """
    from ..common.key_file import PASSPHRASE, passphrase
    from ..common.supervisor import Supervisor, exclusive
    from .service import install

    folder = _open(where)
    if install_service:
        path, commands = install(folder, _STOP_S)
        click.echo(f"{path}: enable it with")
        for command in commands:
            click.echo(f"  {command}")
        return
    with exclusive(folder.lock, "the coordinator"):
        secret = passphrase(passphrase_file or folder.passphrase_file, os.environ, "--passphrase-file")
        children = _children(folder, _checked(folder, secret))
        os.environ.pop(PASSPHRASE, None)  # one child gets it, not the one that listens
        os.umask(0o077)
        address = folder.config.address
        click.echo(f"coordinator of '{folder.config.consortium}' at {address}; logs in {folder.logs}", err=True)
        Supervisor(children, folder.logs, folder.status_file, _GRACE_S).run()
    click.echo("stopped", err=True)


def _checked(folder: CoordinatorFolder, secret: bytes) -> str:
    """Looks at all that a start needs, renews the certificate when it ends soon; gives the passphrase as text.

    Raises:
        ConfigError: wrong passphrase, another coordinator's roster, no certificate to show, no Flower.
    """
    from ..common.errors import ConfigError
    from ..common.key_file import read_key
    from .certificates import RENEW_DAYS, check_server, make_server, validity
    from .roster_cli import KEY_FILE

    identity, roster = read_key(folder.path / KEY_FILE, secret), folder.roster()
    if roster is not None and roster.coordinator != identity.id:
        raise ConfigError(f"{folder.path / KEY_FILE}: is not the key that signed roster-{roster.serial}.json")
    folder.node_keys()
    folder.secret()
    if validity(folder.tls / "server.pem").days_left() < RENEW_DAYS and (folder.tls / "ca.key").exists():
        click.echo(f"made a new TLS certificate, until {make_server(folder.tls, folder.host).ends:%Y-%m-%d}", err=True)
    check_server(folder.tls, folder.host)
    if not (_scripts() / "flower-superexec").exists():
        raise ConfigError(
            f"{_scripts()}: no flower-superexec beside this Python: install wardround with its dependencies"
        )
    return secret.decode("utf-8", "surrogateescape")


def _scripts() -> Path:
    return Path(sysconfig.get_path("scripts"))


def _children(folder: CoordinatorFolder, secret: str) -> tuple[Child, ...]:
    """The SuperLink; Flower's executor, which starts a ServerApp for each run; the keeper of runs."""
    from ..common.key_file import PASSPHRASE
    from ..common.supervisor import Child

    environment = folder.environment()
    environment["PATH"] = f"{_scripts()}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # flwr-serverapp is there
    python = (sys.executable, "-m")
    executor = (
        str(_scripts() / "flower-superexec"),
        "--runtime-api-address",
        folder.loopback,
        "--root-certificates",
        str(folder.tls / "ca.pem"),
        "--superexec-auth-secret-file",
        str(folder.path / "secret"),
    )
    return (
        Child(
            "superlink", (*python, "wardround.server.superlink", str(folder.path)), environment, grace_s=_LINK_GRACE_S
        ),
        Child("serverapps", executor, {**environment, PASSPHRASE: secret}),
        Child("runs", (*python, "wardround.server.keeper", str(folder.path)), environment, grace_s=_KEEPER_GRACE_S),
    )


@click.command(
    epilog="Examples: wardround server run stroke.toml --dictionary dictionary.toml   ·   "
    "wardround server run stroke --resume"
)
@click.argument("config", type=_PATH)
@click.option("--dictionary", type=_PATH, default=None, help="The consortium's dictionary: a path, or a shipped one.")
@click.option("--resume", is_flag=True, help="Continue the run: CONFIG is its name, or the file it began with.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key; `none` unsets it.")
@click.option("--wait", is_flag=True, help="Stay until the run has come to its end, or to a halt (exit code 1).")
@_folder
def run(
    config: Path, dictionary: Path | None, resume: bool, overrides: tuple[str, ...], wait: bool, where: Path
) -> None:
    """Start the run of CONFIG with the enrolled hospitals; the coordinator must be started.

    Config and dictionary are copied into runs/NAME, where everything else of the run goes too. A run that stops before
    its end goes on by itself, from its journal, until `wardround server stop NAME` says otherwise.
    """
    from ..common.config import load_run
    from ..common.errors import ConfigError, RunFolderError
    from . import keeper
    from .control import Control
    from .deployment import end_run, submit

    folder = _open(where)
    if find_spec("torch") is None:
        raise ConfigError("torch is not installed here: the round-0 adapter and the final model of a run need it")
    make: Callable[[], object] | None = None
    if resume:
        if dictionary is not None:
            raise ConfigError("--dictionary: a run keeps the dictionary that it began with: leave it out with --resume")
        name = _known_run(folder, config, overrides)
    else:
        if dictionary is None:
            raise ConfigError("a new run needs the consortium's dictionary: name it with --dictionary")
        settings = load_run(config, overrides)
        name, make = settings.name, partial(submit, folder, settings, dictionary)
    with Control(folder) as control:
        control.wait_until_up(_UP_S if _is_started(folder) else 0.0)
        on = [one for one in folder.runs() if keeper.wanted(folder.run(one)) is not None]
        if on and on != [name]:
            raise RunFolderError(f"run '{on[0]}' is on: stop it first with `wardround server stop {on[0]}`")
        if make is not None:
            make()
        if on:
            click.echo(f"run {name}: is on already", err=True)
        else:
            end_run(folder, control, name)
            keeper.want(folder.run(name), control.start(name, resume=resume))
            done = "continues" if resume else "started"
            click.echo(f"run {name}: {done}; `wardround server status` shows it", err=True)
    if wait:
        _wait(folder, name)


def _known_run(folder: CoordinatorFolder, config: Path, overrides: tuple[str, ...]) -> str:
    """The name of a run that was submitted, given that name or the config that it began with.

    Raises:
        ConfigError: no such run; another config.
    """
    from ..common.config import load_run
    from ..common.errors import ConfigError
    from .deployment import submitted

    if str(config) in folder.runs():
        if overrides:
            raise ConfigError("--set: a run keeps the config that it began with: leave it out with --resume")
        return submitted(folder, str(config)).config.name
    if not config.exists() and config.suffix == "":
        return submitted(folder, str(config)).config.name  # which says that there is none
    settings = load_run(config, overrides)
    if settings.digest() != submitted(folder, settings.name).config.digest():
        raise ConfigError(f"{config}: is not the config that run '{settings.name}' began with; a run keeps its config")
    return settings.name


def _is_started(folder: CoordinatorFolder) -> bool:
    from ..common.supervisor import holder

    return holder(folder.lock) is not None


def _wait(folder: CoordinatorFolder, name: str) -> None:
    """Shows a line for each phase, until nobody wants the run any more."""
    from ..common.errors import WardroundError
    from . import keeper, run_status

    out, shown = folder.run(name), ""
    while keeper.wanted(out) is not None:
        said = run_status.read(out)
        line = f"{said.get('phase', 'starting')} (round {said.get('round', 0)} of {said.get('rounds', '?')})"
        if line != shown:
            click.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)
            shown = line
        time.sleep(0.5)
    ended = run_status.read(out).get("ended") or {}
    if ended.get("code") != "":
        raise WardroundError(f"run {name}: {ended.get('message') or 'was stopped'}")
    click.echo(f"run {name}: finished: {out}", err=True)


@click.command(epilog="Examples: wardround server status --watch   ·   wardround server status --json")
@_folder
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@click.option("--watch", is_flag=True, help="Show it again every two seconds, until Ctrl-C.")
def status(where: Path, as_json: bool, watch: bool) -> None:
    """Show the hospitals, the run, the processes and the certificate; changes nothing.

    ε is what the run has cost a patient of that hospital so far by the run's plan; what a hospital has spent in all is
    in its own ledger.
    """
    from ..common.errors import ConfigError
    from .status import gather, show

    if as_json and watch:
        raise ConfigError("--json and --watch: choose one")
    folder = _open(where)
    if as_json:
        click.echo(json.dumps(gather(folder), indent=1))
        return
    from rich.console import Console
    from rich.live import Live

    console = Console()
    if not watch:
        console.print(show(gather(folder)), soft_wrap=True)
        return
    with Live(show(gather(folder)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_WATCH_S)
            live.update(show(gather(folder)), refresh=True)


@click.command(epilog="Example: wardround server stop   ·   wardround server stop stroke")
@click.argument("run", required=False)
@_folder
def stop(run: str | None, where: Path) -> None:
    """Stop the run RUN, which `wardround server run RUN --resume` continues; without RUN, the coordinator.

    A run that was on when the coordinator stopped goes on at its next start.
    """
    from ..common.errors import RunFolderError
    from ..common.supervisor import holder
    from . import keeper
    from .control import Control
    from .deployment import end_run, submitted

    folder = _open(where)
    if run is not None:
        submitted(folder, run)
        keeper.unwant(folder.run(run))
        if _is_started(folder):
            with Control(folder) as control:
                end_run(folder, control, run)
        click.echo(f"run {run}: stopped; `wardround server run {run} --resume` continues it", err=True)
        return
    process = holder(folder.lock)
    if process is None:
        raise RunFolderError(f"{folder.path}: the coordinator is not running")
    os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + 3 * _GRACE_S
    while holder(folder.lock) == process:
        if time.monotonic() > deadline:
            raise RunFolderError(f"{folder.path}: process {process} did not stop in {3 * _GRACE_S:.0f} s; look into it")
        time.sleep(0.1)
    click.echo("the coordinator stopped", err=True)


@click.command(epilog="Example: wardround server finalize stroke")
@click.argument("run")
@_folder
def finalize(run: str, where: Path) -> None:
    """Merge the final model of RUN again, where its folder has lost it; no hospital is asked.

    Needs the base model on this machine, and a run that has come to its evaluation.
    """
    from .deployment import merge_again, submitted

    folder = _open(where)
    for path in merge_again(submitted(folder, run)):
        click.echo(path)


@click.command(epilog="Examples: wardround server renew   ·   wardround server renew --new-authority")
@click.option("--new-authority", is_flag=True, help="Of a new authority: its key is lost, or somebody has it.")
@_folder
def renew(where: Path, new_authority: bool) -> None:
    """Make a new TLS certificate and key for the SuperLink, of the same authority; shown from its next start.

    Hospitals trust the authority, so they need nothing new. `wardround server start` does this by itself when the
    certificate has less than two months left. After --new-authority no hospital connects before it has joined with a
    new invitation and started again.
    """
    from ..common.errors import RunFolderError
    from .certificates import make_server, replace_authority

    folder = _open(where)
    if new_authority:
        if _is_started(folder):
            raise RunFolderError(f"{folder.path}: its processes trust the old authority: stop the coordinator first")
        replace_authority(folder.tls, folder.config.consortium)
        click.echo("a new authority: call `wardround server invite`, and send every hospital its invitation")
    made = make_server(folder.tls, folder.host)
    click.echo(f"{folder.tls / 'server.pem'}: until {made.ends:%Y-%m-%d}, for {', '.join(made.hosts)}")


COMMANDS: tuple[click.Command, ...] = (init, enroll, invite, start, run, status, stop, finalize, renew)
