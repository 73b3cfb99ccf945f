"""`wardround client init`, `apply`, `join`, `start`, `status`, `leave`, `model`: taking part. Mounted by client/cli.py.

From nothing to training: init, check (client/checks.py), join, start. What these commands print is for the hospital's
own screen: names, fingerprints, counts of patients, never a patient's value. Heavy imports happen inside the commands.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..common.roster import Roster
    from .checks import Line
    from .enrol import Offer
    from .node import Node

_PATH = click.Path(path_type=Path)
_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_LEAVE_S = 150.0  # what `start` takes to stop, at most
_site = click.option(
    "--site", type=_PATH, default=Path("site.toml"), show_default=True, help="This hospital's site.toml."
)


@click.command(
    epilog="Example: wardround client init /srv/wardround --name north --table icu.csv --dictionary support_icu "
    "--epsilon 8 --delta 1e-5"
)
@click.argument("folder", type=_PATH)
@click.option("--name", required=True, help="Of this hospital, as the others will see it: letters, digits, . _ -")
@click.option("--table", type=_PATH, required=True, help="Its registry: CSV, TSV or Parquet. It stays where it is.")
@click.option("--dictionary", required=True, help="The consortium's data dictionary: a file, or a shipped one's name.")
@click.option(
    "--passphrase-file", type=_PATH, default=None, help="Mode 0600; else WARDROUND_PASSPHRASE, else one is made."
)
@click.option("--epsilon", type=float, default=None, help="This hospital's privacy budget over all runs, for good.")
@click.option("--delta", type=float, default=None, help="At which --epsilon is.")
@click.option("--without-privacy", is_flag=True, help="Accept runs without differential privacy.")
def init(
    folder: Path,
    name: str,
    table: Path,
    dictionary: str,
    passphrase_file: Path | None,
    epsilon: float | None,
    delta: float | None,
    without_privacy: bool,
) -> None:
    """Set this hospital up in FOLDER: site.toml, its keys, and the application for the coordinator.

    Keys are made here and never leave. NAME.application.json is public: send it to the coordinator, and tell it the
    fingerprint by telephone. Keep a copy of the folder's state/identity.pem, state/node.pem and of the passphrase.
    """
    from .enrol import Start, application_path, initialise

    node, application, made = initialise(
        Start(folder, name, table, dictionary, passphrase_file, epsilon, delta, without_privacy)
    )
    if made:
        click.echo(
            f"made {node.folder / 'passphrase.txt'} (mode 0600): it opens this site's identity. Keep a copy of it and "
            "of state/identity.pem, apart from each other",
            err=True,
        )
    click.echo(f"{name}\n{application.card.fingerprint}\n{application_path(node)}")
    click.echo(
        f"\nSend {application_path(node).name} to the coordinator, and read it this fingerprint by telephone. Look at "
        f"{node.site_toml}, then: wardround client check --site {node.site_toml}",
        err=True,
    )


@click.command(epilog="Example: wardround client apply   ·   wardround client apply --new-node-key")
@_site
@click.option("--new-node-key", is_flag=True, help="Make the connection's key anew: it is lost, or somebody has it.")
def apply(site: Path, new_node_key: bool) -> None:
    """Write NAME.application.json anew: the file was lost, or a key of this hospital is another one.

    After `wardround client rotate` it holds the next identity key, signed by both. With --new-node-key, or where
    state/node.pem is lost, it holds a new node key: this hospital cannot connect before the coordinator has enrolled
    it, and the old key cannot connect after that.
    """
    from .enrol import application_path, apply_again
    from .node import Node

    node = Node.open(site)
    application = apply_again(node, new_node_key=new_node_key)
    click.echo(f"{node.config.name}\n{application.card.fingerprint}\n{application_path(node)}")
    click.echo(
        f"\nSend {application_path(node).name} to the coordinator, who calls `wardround server enroll`.", err=True
    )
    if node.running() is not None:
        click.echo("this site runs: once it is enrolled, stop and start it, so that it takes the new key", err=True)


@click.command(
    epilog='Example: wardround client join north.invitation.json --coordinator "ABCD EFGH …"   ·   hospitals whose '
    'fingerprint you compared by telephone: --verified "U2PO NJP6 …" --verified "…"'
)
@click.argument("invitation", type=_PATH)
@_site
@click.option(
    "--coordinator", default=None, metavar="FINGERPRINT", help="The coordinator's, as it told you by telephone."
)
@click.option(
    "--verified", multiple=True, metavar="FINGERPRINT", help="A hospital's, as it read it to you; may be repeated."
)
@click.option("--replace", is_flag=True, help="Leave the consortium that is pinned for this one.")
def join(invitation: Path, site: Path, coordinator: str | None, verified: tuple[str, ...], replace: bool) -> None:
    """Pin INVITATION: the coordinator, its roster, its certificate authority, and the one bundle that runs here.

    Shows every hospital's fingerprint. Only those that you compared with that hospital yourself, by a telephone number
    that did not come from the coordinator, count as honest for this site. Nothing is pinned before the coordinator's
    fingerprint was compared.
    """
    from ..common.errors import ConfigError
    from .enrol import examine, pin
    from .identity_cli import check_coordinator, keep_roster, mismatch_is_an_answer, roster_lines
    from .node import Node

    node = Node.open(site)
    try:
        data = invitation.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"{invitation}: no such file: expected the invitation that the coordinator sent") from None
    with mismatch_is_an_answer():
        offer = examine(node, data, str(invitation), replace=replace)
        if coordinator is not None:
            check_coordinator(offer.roster, coordinator)
        known = _compared(node, offer, verified)
        for line in roster_lines(offer.roster, offer.own, tuple(known)):
            click.echo(line)
        if coordinator is None and not offer.known:
            check_coordinator(offer.roster, _ask_coordinator(invitation))
        if not verified and sys.stdin.isatty():
            known = _ask_members(offer.roster, offer.own, known)
        pin(node, offer, keep_roster(node.folder, offer.roster), known)
    members = node.open(site).keys.members(offer.own)
    wanted, count = node.config.policy.min_sites, len(members.verified)
    joined = f"joined '{offer.roster.consortium}' at {offer.invitation.address}"
    click.echo(f"\n{joined}; {count} hospitals verified, this one included")
    running = node.running() is not None
    if count >= wanted and not running:
        click.echo(f"Next: wardround client check --site {site}; then wardround client start --site {site}", err=True)
    if count < wanted:
        click.echo(
            f"policy.min_sites is {wanted}: compare fingerprints by telephone, then call this command again with "
            "--verified, or `wardround client roster verify FINGERPRINT`",
            err=True,
        )
    if offer.own != node.keys.load().id:
        click.echo("it holds this site's next key: now call `wardround client rotate --finish`", err=True)
    if running and _dials_anew(offer):
        click.echo("this site runs: stop and start it, so that it takes the new address and authority", err=True)
    elif running:
        click.echo("this site runs, and takes the roster with its next message", err=True)


def _dials_anew(offer: Offer) -> bool:
    before, now = offer.before, offer.invitation
    return before is None or (before.address, before.ca_certificate) != (now.address, now.ca_certificate)


def _compared(node: Node, offer: Offer, verified: Sequence[str]) -> list[str]:
    """Plain fingerprints that this site compared: those in site.toml that are still on the roster, and these."""
    from ..common.config import plain_fingerprint
    from ..common.errors import ConfigError

    active = {plain_fingerprint(member.fingerprint) for member in offer.roster.members if member.active}
    known = [one for one in node.config.identity.verified if one in active]
    for text in verified:
        try:
            member = offer.roster.with_fingerprint(text)
        except ConfigError as error:
            raise ConfigError(f"--verified: {error}") from None
        if not member.active:
            raise ConfigError(f"--verified {text}: {member.name}'s key is revoked")
        if (plain := plain_fingerprint(member.fingerprint)) not in known:
            known.append(plain)
    return known


def _ask_coordinator(invitation: Path) -> str:
    from ..common.errors import ConfigError

    if not sys.stdin.isatty():
        raise ConfigError(
            f"{invitation}: nothing is pinned before the coordinator's fingerprint was compared: ask it by telephone, "
            'and name it with --coordinator "ABCD EFGH …"'
        )
    return click.prompt("\nThe coordinator's fingerprint, as it tells you by telephone", err=True)


def _ask_members(roster: Roster, own: bytes, known: Sequence[str]) -> list[str]:
    from ..common.config import plain_fingerprint

    result = list(known)
    for member in roster.members:
        plain = plain_fingerprint(member.fingerprint)
        question = f"{member.name}: did {member.name} itself read you {member.fingerprint}?"
        asked = member.active and member.id != own and plain not in result
        if asked and click.confirm(question, err=True):
            result.append(plain)
    return result


@click.command(epilog="Example: wardround client start   ·   as a service: wardround client start --install-service")
@_site
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=None,
    help="Of loopback, for this site's own processes; a free one.",
)
@click.option("--install-service", is_flag=True, help="Write a systemd unit instead, and say how to enable it.")
def start(site: Path, port: int | None, install_service: bool) -> None:
    """Take part until told to stop: connects out to the coordinator, restarts what fails, finishes on SIGTERM.

    Nothing here listens but on loopback. Ctrl-C or SIGTERM lets the message under way finish; local training that does
    not goes on at the next start. What happens is in state/logs and in `wardround client status`.
    """
    from ..common.errors import UserError, VerificationError
    from .node import Node

    node = Node.open(site)
    if install_service:
        from .service import install

        path, commands = install(node)
        click.echo(f"{path}\n\nTo enable it:\n" + "\n".join(f"  {line}" for line in commands))
        if proxy := next((name for name in _PROXIES if os.environ.get(name)), None):
            click.echo(
                f"{proxy} is set here; a service does not see it, and it may hold a password that a unit is no place "
                f"for: set it with `sudo systemctl edit {path.name}`",
                err=True,
            )
        return

    def tell() -> None:
        consortium, address = node.invitation.pinned().consortium, node.invitation.address
        where = node.state / "logs"
        click.echo(f"{node.config.name}: taking part in '{consortium}' at {address}; logs in {where}", err=True)

    try:
        node.start(port, tell=tell)
    except VerificationError as error:
        raise UserError(str(error)) from None
    click.echo(f"{node.config.name}: stopped", err=True)


@click.command(epilog="Example: wardround client status   ·   wardround client status --json")
@_site
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(site: Path, as_json: bool) -> None:
    """Whether this site runs and since when, its last message, its rounds, and the privacy budget it has spent."""
    from .node import Node

    found = describe(Node.open(site))
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for name, text in _sentences(found):
        click.echo(f"{name:<12} {text}")


def describe(node: Node) -> dict[str, Any]:
    """What `status` says, as JSON values; times in UTC.

    Raises:
        VerificationError: the ledger is not what was written.
    """
    from ..common.errors import UserError, VerificationError
    from ..common.supervisor import read_status
    from .folder import Site

    running = node.running()
    watched = (read_status(node.status_path) or {}) if running else {}
    worker = _read(node.state / "worker.json")
    alive = running is not None and worker.get("pid") == watched.get("processes", {}).get("worker", {}).get("pid")
    ledger = Site(node.folder, node.config).ledger
    try:
        entries = list(ledger.entries()) if ledger.path.exists() else []
    except VerificationError as error:
        raise UserError(str(error)) from None
    trained = {(entry["run"], entry["round"]) for entry in entries if entry["phase"] == "train.local"}
    trained = {one for one in trained if any(
        (entry["run"], entry["round"], entry["kind"]) == (*one, "egress") for entry in entries)}  # fmt: skip
    consortium = None
    if node.invitation_path.exists():
        invitation = node.invitation
        consortium = {"name": invitation.pinned().consortium, "address": invitation.address}
    last = entries[-1] if entries else None
    return {
        "site": node.config.name,
        "consortium": consortium,
        "running": running is not None,
        "pid": running,
        "since": _time(watched.get("since")),
        "processes": {
            name: {**one, "since": _time(one["since"])}
            for name, one in watched.get("processes", {}).items()
        },
        "now": _message(worker.get("now")) if alive else None,
        "last_message": _message(worker.get("last")),
        "ledger": {
            "entries": len(entries),
            "last": last and {"time": last["time"], "kind": last["kind"], "phase": last["phase"], "code": last["code"]},
            "bytes_sent": last["total"] if last else 0,
        },
        "rounds_trained": len(trained),
        "runs": len({run for run, _ in trained}),
        "privacy": _spent(node),
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        content = json.loads(path.read_bytes())
        if isinstance(content, dict):
            return content
    return {}


def _time(seconds: Any) -> str | None:
    return (
        datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds") if isinstance(seconds, int | float) else None
    )


def _message(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found:
        return None
    times = {key: _time(found[key]) for key in ("since", "until") if key in found}
    return {key: found[key] for key in ("phase", "round", "work") if found.get(key) is not None} | times


def _spent(node: Node) -> dict[str, Any]:
    """ε that the ledger's budget events cost, by the filter that refuses (docs/privacy.md §P4)."""
    from .folder import Site

    limits = node.config.policy
    history = Site(node.folder, node.config).ledger.history()
    spent: dict[str, Any] = {"events": len(history), "epsilon": 0.0, "budget": limits.epsilon, "delta": limits.delta}
    if not history:
        return spent
    from ..common.privacy import Event, Filter, epsilon_rdp

    events = [Event.from_json(one.event) for one in history]
    orders = [one.orders["total"] for one in history if "total" in one.orders]
    if limits.epsilon is not None and limits.delta is not None and orders:
        return spent | {"epsilon": Filter(limits.epsilon, limits.delta, orders[0]).spent(events)}
    delta = limits.delta or 1e-5
    return spent | {"epsilon": epsilon_rdp(events, delta).epsilon, "delta": delta}


def _sentences(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    joined, privacy, ledger = found["consortium"], found["privacy"], found["ledger"]
    lines = [
        ("site", found["site"]),
        ("consortium", f"'{joined['name']}' at {joined['address']}" if joined else "none joined"),
        ("running", f"since {found['since']}, process {found['pid']}" if found["running"] else "no"),
    ]
    for name, one in found["processes"].items():
        state = f"since {one['since']}" if one["pid"] else "being started"
        lines.append((f"  {name}", f"{state}, {one['restarts']} restarts"))
    for name, key in (("now", "now"), ("last message", "last_message")):
        if (one := found[key]) is not None:
            work = ", {} {} of {}".format(*one["work"]) if "work" in one else ""
            lines.append(
                (name, f"{one['phase']}, round {one.get('round', '–')}{work}, {one.get('until', one['since'])}")
            )
    lines.append(("rounds", f"{found['rounds_trained']} trained, in {found['runs']} runs"))
    budget = f" of {privacy['budget']:g}" if privacy["budget"] is not None else ""
    at = f" at δ = {privacy['delta']:g}" if privacy["delta"] is not None else ""
    lines.append(("ε spent", f"{privacy['epsilon']:.3g}{budget}{at}, {privacy['events']} events"))
    lines.append(("ledger", f"{ledger['entries']} entries, {ledger['bytes_sent']:,} bytes sent"))
    return lines


@click.command(epilog="Example: wardround client leave")
@_site
def leave(site: Path) -> None:
    """Stop, and forget the consortium: roster, coordinator, authority. Keys, ledger and results stay.

    What this hospital sent stays in the sums that it was in. The ledger must be kept: it is what knows the privacy
    budget that was spent.
    """
    from .enrol import unpin
    from .node import Node

    node = Node.open(site)
    invitation = node.invitation
    consortium, name = invitation.pinned().consortium, node.config.name
    if (running := node.running()) is not None:
        click.echo(f"stopping process {running}; the message under way may finish", err=True)
        with suppress(ProcessLookupError):
            os.kill(running, signal.SIGTERM)
        deadline = time.monotonic() + _LEAVE_S
        while node.running() is not None:
            if time.monotonic() > deadline:
                from ..common.errors import UserError

                raise UserError(f"process {running} did not stop in {_LEAVE_S:.0f} s; end it, then call this again")
            time.sleep(0.2)
    unpin(node)
    click.echo(
        f"{name} has left '{consortium}'. Tell the coordinator to revoke '{name}' on its roster: until then it counts "
        f"on this site. Keys and ledger are kept in {node.state}; where a service was installed, disable it: sudo "
        f"systemctl disable --now wardround-{name}.service"
    )


@click.group()
def model() -> None:
    """Base models on this machine."""


@model.command("import", epilog="Example: wardround client model import /media/usb/phi-4")
@click.argument("folder", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print digest and folder as JSON.")
def import_command(folder: Path, as_json: bool) -> None:
    """Copy the base model in FOLDER into this machine's cache, under its digest; no network is used.

    A run names its base model by digest as well: whatever the run calls it, this copy is found. Compare the digest with
    the one that the coordinator published, and allow only it with policy.allowed_models.
    """
    from ..common.lm.packaged import import_model
    from ..common.progress import progress_bar

    with progress_bar("copying", 100, quiet=as_json) as advance:
        digest, target = import_model(
            folder, tell=lambda done, total: advance(100 * done // max(total, 1), f"{done >> 20} of {total >> 20} MB")
        )
    click.echo(json.dumps({"digest": digest, "folder": str(target)}) if as_json else f"{digest}\n{target}")


def check_site(site: Path, as_json: bool) -> None:
    """`wardround client check` without a table: all of a site. Exit 1 where a line is red."""
    from .checks import run_checks

    lines = run_checks(site)
    if as_json:
        click.echo(json.dumps([vars(line) for line in lines], indent=2, ensure_ascii=False))
    else:
        _print_lines(site, lines)
    if any(line.state == "error" for line in lines):
        sys.exit(1)


def _print_lines(site: Path, lines: Sequence[Line]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=str(site), title_justify="left")
    for heading in ("", "check", "found", "what to do"):
        shown.add_column(heading, overflow="fold")
    looks = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "error": "[red]wrong[/red]"}
    for line in lines:
        shown.add_row(looks[line.state], *map(escape, (line.name, line.text, line.fix)))
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(shown)
    wrong = sum(line.state == "error" for line in lines)
    click.echo(f"{wrong} to be mended" if wrong else "ready")


COMMANDS = (init, apply, join, start, status, leave, model)
