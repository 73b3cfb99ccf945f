"""`wardround client card`, `roster` and `rotate`: a hospital's identity, and whom it takes part with.

Mounted by client/cli.py. What these commands print is public: names, fingerprints, digests. None of them writes
site.toml: it is the hospital's own file, with its comments, and what is in it is what the hospital decided. They print
the lines to put there and where, as the file is now, and keep every roster under its serial, so that a pin takes effect
when a person sets it, all at once, and can be taken back.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

if TYPE_CHECKING:
    from ..common.identity import Card, Identity
    from ..common.roster import Roster

_PATH = click.Path(path_type=Path)
_site = click.option(
    "--site", type=_PATH, default=Path("site.toml"), show_default=True, help="This hospital's site.toml."
)


@contextmanager
def mismatch_is_an_answer() -> Iterator[None]:
    """A wrong signature or digest ends these commands with its line and exit 2: they were asked, they did not fail."""
    from ..common.errors import UserError, VerificationError

    try:
        yield
    except VerificationError as error:
        raise UserError(str(error)) from None


@click.command(
    epilog="Example: export WARDROUND_PASSPHRASE; wardround client card   ·   "
    "wardround client card --site /srv/wardround/site.toml --out north.card.json"
)
@_site
@click.option("--out", type=_PATH, default=None, help="Where the card goes; NAME.card.json beside site.toml.")
def card(site: Path, out: Path | None) -> None:
    """Write this hospital's card, the file that the coordinator needs, and print its fingerprint.

    The first call makes the identity: a key in state/identity.pem, encrypted with the passphrase (12 characters or
    more) in WARDROUND_PASSPHRASE or in the file that identity.passphrase_file in site.toml names. Keep a copy of key
    and passphrase, apart: without them this hospital needs a new card. The card holds nothing secret. The other
    hospitals compare the fingerprint with you by telephone.
    """
    from ..common.identity import Card
    from .identity import SiteKeys

    keys = SiteKeys.open(site)
    out = out or keys.folder / f"{keys.config.name}.card.json"
    _check_out(out, keys.path)
    identity, made = keys.load_or_create()
    made_card = Card.make(identity, keys.config.name)
    _write_card(out, made_card)
    if made:
        click.echo(f"made this site's identity: {keys.path}", err=True)
    click.echo(f"{made_card.name}\n{made_card.fingerprint}\n{out}")


def _check_out(out: Path, key: Path) -> None:
    """Refuses what `_write_card` would, as far as it can be told before the key in `key` is made."""
    from ..common.errors import ConfigError, WardroundError
    from ..common.identity import Card

    if not out.exists():
        return
    if out.is_dir():
        raise ConfigError(f"--out {out}: expected a file, got a folder")
    try:
        Card.parse(out.read_bytes(), str(out))
    except WardroundError:
        raise ConfigError(f"--out {out}: exists and is not a site card; it is not overwritten") from None
    if not os.path.lexists(key):
        _refuse_other_card(out)


def _write_card(out: Path, made: Card) -> None:
    """Writes a card where none is; the same one again is nothing new, another one is not overwritten."""
    from ..common.files import write_atomic

    content = made.to_json().encode()
    if out.exists() and out.read_bytes() != content:
        _refuse_other_card(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, content, mode=0o644)


def _refuse_other_card(out: Path) -> NoReturn:
    from ..common.errors import ConfigError

    raise ConfigError(f"{out}: is another card, and is not overwritten: move it away, or name another file with --out")


@click.command(epilog="Example: wardround client rotate   ·   wardround client rotate --finish")
@_site
@click.option("--out", type=_PATH, default=None, help="Where the card goes; NAME.next.card.json beside site.toml.")
@click.option("--finish", is_flag=True, help="Use the new key from now on; the pinned roster must hold it.")
def rotate(site: Path, out: Path | None, finish: bool) -> None:
    """Change this hospital's key: make a new one, and write a card of it that the old and the new key sign.

    Until the coordinator's next roster holds the new key the old one stays in use. Then pin that roster and call this
    with --finish. The other hospitals must verify the new fingerprint. A key that somebody else may have is not
    rotated: ask the coordinator to revoke it, and the other hospitals to pin the roster that says so.
    """
    from ..common.errors import ConfigError
    from ..common.identity import Card
    from .identity import SiteKeys

    keys = SiteKeys.open(site)
    if finish:
        if out is not None:
            raise ConfigError("--out: expected only without --finish, which writes no card")
        with mismatch_is_an_answer():
            now = keys.finish_rotation()
        click.echo(f"{keys.config.name}\n{now.fingerprint}\nin use from now on: {keys.path}")
        return
    out = out or keys.folder / f"{keys.config.name}.next.card.json"
    _check_out(out, keys.next_path)
    following, made = keys.load_or_prepare_next()
    made_card = Card.make(following, keys.config.name, previous=keys.load())
    _write_card(out, made_card)
    if made:
        click.echo(f"made the next key: {keys.next_path}", err=True)
    click.echo(f"{made_card.name}\n{made_card.fingerprint}\n{out}")


@click.group()
def roster() -> None:
    """The hospitals that may take part: pin the coordinator's list, verify hospitals on it."""


@roster.command(
    epilog="Example: wardround client roster pin roster-3.json   ·   the first one, or after the coordinator's key "
    'changed: wardround client roster pin roster-1.json --coordinator "ABCD EFGH …"'
)
@click.argument("file", type=_PATH)
@_site
@click.option(
    "--coordinator", default=None, metavar="FINGERPRINT", help="The coordinator's, as it told you by telephone."
)
def pin(file: Path, site: Path, coordinator: str | None) -> None:
    """Show what FILE, a roster from the coordinator, says and changes, and the lines that pin it.

    It is kept beside site.toml under its serial. Nothing changes for this site until you put the lines into site.toml;
    from then on every other roster is refused. An older serial, another coordinator's key, and a roster without this
    hospital are not taken.
    """
    from ..common.errors import ConfigError, VerificationError
    from .identity import SiteKeys, check_name_on, read_roster

    keys = SiteKeys.open(site)
    settings = keys.config.identity
    with mismatch_is_an_answer():
        offered = read_roster(file)
        if coordinator is not None:
            check_coordinator(offered, coordinator)
        own, following = keys.load(), keys.next()
        mine = _own_member(offered, own, following)
        check_name_on(offered, mine, keys.config.name)
        before = None
        if settings.roster_digest is not None:
            try:
                before = keys.roster()
            except (ConfigError, VerificationError):
                raise ConfigError(
                    f"{keys.roster_path} is not the pinned roster, so what changed cannot be shown: put that file "
                    "back, or take roster_digest out of site.toml to start from nothing"
                ) from None
            offered.check_follows(before, coordinator)
    kept = keep_roster(keys.folder, offered)
    for line in roster_lines(offered, mine, settings.verified):
        click.echo(line)
    if before is None:
        told = "is the one you named" if coordinator is not None else "is to be compared by telephone"
        click.echo(f"\nNothing was pinned before: the coordinator's fingerprint {told}.")
    elif before.digest != offered.digest:
        click.echo(f"\nChanges from the pinned roster, serial {before.serial}:")
        for line in offered.changes_from(before) or ["none but the serial"]:
            click.echo(f"  {line}")
    if mine != own.id:
        click.echo("\nIt holds this site's next key: once it is pinned, call `wardround client rotate --finish`.")
    if before is not None and before.digest == offered.digest:
        click.echo("\nPinned already.")
        return
    lines = {"roster": f'"{kept.name}"', "roster_digest": f'"{offered.digest.hex()}"'}
    _print_settings("\nIf that is right,", site, lines)


def _print_settings(intro: str, site: Path, settings: Mapping[str, str]) -> None:
    """Lines for [identity] in site.toml, and where they go in it as it is: TOML takes no table and no key twice."""
    from ..common.config import read_toml

    there = read_toml(site).get("identity")
    if there is None:
        click.echo(f"{intro} add at the end of {site}:\n\n[identity]")
    else:
        old = [key for key in settings if key in there]
        instead = f", in the place of its {' and '.join(old)}" if old else ""
        click.echo(f"{intro} set in {site}, below its line [identity]{instead}:\n")
    for key, value in settings.items():
        click.echo(f"{key} = {value}")


def check_coordinator(offered: Roster, expected: str) -> None:
    from ..common.config import plain_fingerprint
    from ..common.errors import ConfigError, VerificationError
    from ..common.identity import fingerprint

    try:
        wanted = plain_fingerprint(expected)
    except ValueError as error:
        raise ConfigError(f"--coordinator: {error}") from None
    found = fingerprint(offered.coordinator)
    if plain_fingerprint(found) != wanted:
        raise VerificationError(f"roster {offered.serial}: signed by {found}, not by the coordinator you named")


def _own_member(offered: Roster, own: Identity, following: Identity | None) -> bytes:
    """This site's id on a roster: the one in use, or in a rotation the next."""
    from ..common.errors import VerificationError

    for identity in (own, following):
        member = None if identity is None else offered.member(identity.id)
        if member is not None and member.active:
            return member.id
    raise VerificationError(
        f"roster {offered.serial}: this site's key ({own.fingerprint}) is not active on it: send the coordinator the "
        "card that `wardround client card` writes"
    )


def keep_roster(folder: Path, offered: Roster) -> Path:
    """The roster under its serial, which is never given to another one."""
    from ..common.errors import UserError, WardroundError
    from ..common.key_file import write_once
    from .identity import read_roster

    path = folder / f"roster-{offered.serial}.json"
    try:
        write_once(path, offered.to_json().encode(), 0o644)
    except FileExistsError:
        try:
            same = read_roster(path).digest == offered.digest
        except WardroundError:
            raise UserError(f"{path}: exists and is not a roster; move it away") from None
        if not same:
            raise UserError(
                f"{path}: another roster with serial {offered.serial} came before: a coordinator signs a serial once; "
                "ask it why there are two"
            ) from None
    return path


def roster_lines(shown: Roster, own: bytes, verified: tuple[str, ...]) -> list[str]:
    """A roster with what this site knows of each member, and what in its list of fingerprints is of no use."""
    from ..common.config import plain_fingerprint
    from ..common.roster import describe

    notes, left = {}, set(verified)
    for member in shown.members:
        plain = plain_fingerprint(member.fingerprint)
        if member.active:
            notes[member.id] = "verified" if plain in left else "not verified"
            left.discard(plain)
    if own in notes:
        notes[own] = "this site"
    unused = [f"  {_spaced(plain)}" for plain in sorted(left)]
    return describe(shown, notes) + (
        ["of no active member, to be taken out of identity.verified:", *unused] if unused else []
    )


def _spaced(plain: str) -> str:
    return " ".join(plain[i : i + 4] for i in range(0, len(plain), 4))


@roster.command(
    "verify",
    epilog="Example: wardround client roster verify U2PO NJP6 VNFL FDBD 2DTH 5X6P LCSE MIS7   ·   case ignored",
)
@click.argument("fingerprint", nargs=-1, required=True)
@_site
def verify_command(fingerprint: tuple[str, ...], site: Path) -> None:
    """Look up FINGERPRINT, as a hospital read it to you, on the pinned roster, and print the lines that verify it.

    Only hospitals whose fingerprint you compared with them yourself, by a telephone number that did not come from the
    coordinator, count as honest for this site.
    """
    from ..common.config import plain_fingerprint
    from ..common.errors import ConfigError
    from .identity import SiteKeys

    keys = SiteKeys.open(site)
    with mismatch_is_an_answer():
        pinned = keys.roster()
        found = pinned.with_fingerprint(" ".join(fingerprint))
        own = keys.load().id
    if found.id == own:
        click.echo(f"{found.name}: this site; its own key is always verified")
        return
    if not found.active:
        raise ConfigError(f"{found.name}: this key is revoked; it is not verified")
    verified = keys.config.identity.verified
    if plain_fingerprint(found.fingerprint) in verified:
        click.echo(f"{found.name}: verified already")
        return
    names = {plain_fingerprint(item.fingerprint): item.name for item in pinned.members if item.active}
    listed = [plain for plain in (*verified, plain_fingerprint(found.fingerprint)) if plain in names]
    lines = ["[", *(f'  "{_spaced(plain)}",  # {names[plain]}' for plain in listed), "]"]
    intro = f"{found.name}\n\nIf {found.name} read you this fingerprint itself,"
    _print_settings(intro, site, {"verified": "\n".join(lines)})


@roster.command("show", epilog="Example: wardround client roster show --site site.toml")
@_site
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def show_roster(site: Path, as_json: bool) -> None:
    """Print the pinned roster, and which hospitals on it this one has verified."""
    from .identity import SiteKeys

    keys = SiteKeys.open(site)
    with mismatch_is_an_answer():
        members = keys.members(keys.load().id)
    if not as_json:
        policy = keys.config.policy
        for line in roster_lines(members.roster, members.own, keys.config.identity.verified):
            click.echo(line)
        click.echo(
            f"{len(members.verified)} of {len(members.active)} active members verified; this site's policy wants "
            f"{policy.min_sites} in a sum, and withstands {policy.colluders} colluding"
        )
        return
    shown = members.roster
    listed = [
        {
            "name": item.name,
            "id": item.id.hex(),
            "fingerprint": item.fingerprint,
            "status": item.status,
            "verified": item.id in members.verified,
            "this_site": item.id == members.own,
        }
        for item in shown.members
    ]
    head = {"consortium": shown.consortium, "serial": shown.serial, "digest": shown.digest.hex()}
    click.echo(json.dumps(head | {"members": listed}, indent=2, ensure_ascii=False))
