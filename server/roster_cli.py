"""`wardround server roster`: the coordinator's list of the hospitals that may take part, and the key that signs it.

Mounted by server/cli.py. Enters: cards that hospitals sent. Leaves: rosters, which people send to every hospital.
Private: the coordinator's key, encrypted with a passphrase. In the coordinator's folder:

    coordinator.pem      the key, mode 0600
    roster-<serial>.json every roster that was signed; none is ever written again
    roster.json          a copy of the newest

A serial is signed once: a roster is on disk under its serial before it is anywhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..common.identity import Card, Identity
    from ..common.roster import Roster

_PATH = click.Path(path_type=Path)
KEY_FILE = "coordinator.pem"
_ROSTER = re.compile(r"roster-([1-9][0-9]{0,15})\.json")
_passphrase_file = click.option(
    "--passphrase-file",
    type=_PATH,
    default=None,
    help="A file of mode 0600 with the passphrase; WARDROUND_PASSPHRASE goes first.",
)


@click.group()
def roster() -> None:
    """The hospitals that may take part: a list that this coordinator signs and every hospital pins."""


@contextmanager
def mismatch_is_an_answer() -> Iterator[None]:
    """A wrong signature ends these commands with its line and exit 2: they were asked, they have not failed."""
    from ..common.errors import UserError, VerificationError

    try:
        yield
    except VerificationError as error:
        raise UserError(str(error)) from None


@roster.command(
    epilog="Example: wardround server roster make coordinator north.card.json south.card.json east.card.json "
    '--consortium "Stroke outcomes"'
)
@click.argument("folder", type=_PATH)
@click.argument("cards", type=_PATH, nargs=-1, required=True)
@click.option("--consortium", required=True, help="The consortium's name, as people read it.")
@_passphrase_file
def make(folder: Path, cards: tuple[Path, ...], consortium: str, passphrase_file: Path | None) -> None:
    """Make a consortium's first roster in FOLDER from the CARDS that hospitals sent, three or more.

    Makes the coordinator's key where there is none. Send roster-1.json to every hospital, and tell each by telephone
    the coordinator's fingerprint.
    """
    from ..common.errors import ConfigError, RunFolderError
    from ..common.files import check_writable, private_folder
    from ..common.identity import Identity
    from ..common.key_file import passphrase
    from ..common.roster import Roster
    from ..common.secagg.keys import MIN_MEMBERS

    if serials(folder):
        raise RunFolderError(f"{folder}: has a roster already: call `wardround server roster add` to change it")
    with mismatch_is_an_answer():
        read = _read_cards(cards)
        check_writable(folder)
        # Nothing is written before everything that can be refused was looked at.
        known = os.path.lexists(folder / KEY_FILE)
        coordinator = open_key(folder, passphrase_file) if known else Identity.generate()
        signed = Roster.first(coordinator, consortium, read)
        if len(signed.members) < MIN_MEMBERS:
            raise ConfigError(
                f"{len(signed.members)} card{'s' * (len(signed.members) > 1)}: a sum needs at least {MIN_MEMBERS} "
                "hospitals, so a smaller consortium can train nothing: wait for the others' cards"
            )
        if not known:
            locked = coordinator.lock(passphrase(passphrase_file, os.environ, "--passphrase-file"))
            write_key(private_folder(folder), locked)
        publish(folder, signed)


@roster.command(epilog="Example: wardround server roster add coordinator west.card.json")
@click.argument("folder", type=_PATH)
@click.argument("cards", type=_PATH, nargs=-1, required=True)
@_passphrase_file
def add(folder: Path, cards: tuple[Path, ...], passphrase_file: Path | None) -> None:
    """Sign the next roster of FOLDER with these CARDS: new hospitals, new keys of a rotation or after a revocation.

    The card of a rotation is signed by the old and the new key, and takes the old one's place. Every hospital has to
    pin the new roster, and to verify the new fingerprints.
    """
    with mismatch_is_an_answer():
        read = _read_cards(cards)
        before = newest(folder)
        publish(folder, before.adding(_key(folder, passphrase_file), read), before)


@roster.command(epilog="Example: wardround server roster revoke coordinator west")
@click.argument("folder", type=_PATH)
@click.argument("name")
@_passphrase_file
def revoke(folder: Path, name: str, passphrase_file: Path | None) -> None:
    """Sign the next roster of FOLDER with the hospital NAME revoked.

    It counts at each hospital once that hospital has pinned the new roster: send it to all of them at once.
    """
    with mismatch_is_an_answer():
        before = newest(folder)
        publish(folder, before.revoking(_key(folder, passphrase_file), name), before)
    if _is_deployed(folder):
        from .coordinator import CoordinatorFolder
        from .deployment import tell_nodes

        for line in tell_nodes(CoordinatorFolder.open(folder)):
            click.echo(line)


def _read_cards(paths: tuple[Path, ...]) -> list[Card]:
    from ..common.errors import ConfigError
    from ..common.identity import MAX_CARD_BYTES, Card

    read: list[Card] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                read.append(Card.parse(file.read(MAX_CARD_BYTES + 1), str(path)))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file: a card that a hospital sent") from None
        except IsADirectoryError:
            raise ConfigError(f"{path}: expected a card, got a folder") from None
    return read


def _is_deployed(folder: Path) -> bool:
    """Whether `wardround server init` made this folder: then hospitals get invitations, with the roster in them."""
    return (folder / "coordinator.toml").is_file()


def _key(folder: Path, passphrase_file: Path | None) -> Identity:
    """As `open_key`, with the passphrase file that coordinator.toml names, where there is one."""
    if passphrase_file is None and _is_deployed(folder):
        from .coordinator import CoordinatorFolder

        passphrase_file = CoordinatorFolder.open(folder).passphrase_file
    return open_key(folder, passphrase_file)


def open_key(folder: Path, passphrase_file: Path | None) -> Identity:
    """The coordinator's key."""
    from ..common.key_file import passphrase, read_key

    return read_key(folder / KEY_FILE, passphrase(passphrase_file, os.environ, "--passphrase-file"))


def write_key(folder: Path, locked: bytes) -> None:
    """Writes a new key, encrypted; one that is there is never replaced."""
    from ..common.errors import ConfigError
    from ..common.key_file import write_once

    path = folder / KEY_FILE
    try:
        write_once(path, locked, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: another process is making it; call the same command again") from None
    click.echo(f"made the coordinator's key: {path}", err=True)


def serials(folder: Path) -> dict[int, Path]:
    """Every signed roster by its serial."""
    if not folder.is_dir():
        return {}
    found = ((_ROSTER.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def newest(folder: Path) -> Roster:
    """The roster that the next one follows."""
    from ..common.errors import RunFolderError
    from ..common.roster import Roster

    signed = serials(folder)
    if not signed:
        raise RunFolderError(f"{folder}: no roster here: call `wardround server roster make` first")
    path = signed[max(signed)]
    found = Roster.parse(path.read_bytes(), str(path))
    if found.serial != max(signed):
        raise RunFolderError(f"{path}: holds serial {found.serial}: put back the file that was written there")
    return found


def publish(folder: Path, signed: Roster, before: Roster | None = None) -> None:
    """Writes a signed roster under its serial and as the newest, and prints it.

    Raises:
        RunFolderError: another process signed this serial just now.
    """
    from ..common.errors import RunFolderError
    from ..common.files import write_atomic
    from ..common.key_file import write_once
    from ..common.roster import describe
    from ..common.secagg.keys import MIN_MEMBERS

    path, content = folder / f"roster-{signed.serial}.json", signed.to_json().encode()
    try:
        write_once(path, content, 0o644)
    except FileExistsError:
        raise RunFolderError(
            f"{path}: another process signed this serial just now; look at it, then call the same command again"
        ) from None
    write_atomic(folder / "roster.json", content, mode=0o644)
    for line in describe(signed):
        click.echo(line)
    if before is not None:
        click.echo(f"\nChanges from serial {before.serial}:")
        for line in signed.changes_from(before):
            click.echo(f"  {line}")
    active = sum(1 for item in signed.members if item.active)
    if active < MIN_MEMBERS:
        click.echo(
            f"warning: {active} active member{'s' * (active != 1)}: a sum needs at least {MIN_MEMBERS}, so nothing can "
            "be trained until others are added",
            err=True,
        )
    if _is_deployed(folder):
        click.echo(f"\n{path}: every hospital needs its new invitation: call `wardround server invite`, send them.")
    else:
        click.echo(f"\n{path}: send it to every hospital; each pins it with `wardround client roster pin`.")
