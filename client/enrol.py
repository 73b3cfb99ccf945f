"""How a hospital gets from nothing to taking part: its folder, its keys, its application; the consortium that it pins.

Run by the site; called by client/deploy_cli.py, which asks people and prints. Enters: names, paths, the invitation that
the coordinator sent. Leaves: the application, which people send (public). Private: keys and passphrase, which stay in
the folder that `initialise` makes, mode 0700.

site.toml stays the hospital's own file, with its comments. `pin` changes three lines of its [identity] and nothing
else, and only where the file then says exactly that.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.config import SiteConfig, parse, plain_fingerprint, read_toml
from ..common.dictionary import load_dictionary
from ..common.enrolment import Application, Invitation
from ..common.errors import ConfigError, VerificationError
from ..common.files import private_folder, write_atomic
from ..common.identity import Card, check_name
from ..common.key_file import PASSPHRASE, write_once
from ..common.roster import Roster
from .identity import SiteKeys, check_name_on
from .node import Node, check_bundle, make_node_key, node_key

PASSPHRASE_FILE = "passphrase.txt"
_TEMPLATE = """\
# This hospital in wardround. Relative paths are relative to this file. `wardround client check` looks at all of it,
# `wardround client policy explain` says every limit in a sentence.
name = {name}
table = {table}
dictionary = {dictionary}

[identity]
{passphrase}# `wardround client join` sets roster, roster_digest and verified below this line.

[policy]
# What a patient's privacy may lose over all runs together, for good. Without it no private run is accepted.
{epsilon}
{delta}
# Runs without differential privacy are refused. false is this hospital's own decision:
{require_privacy}
# The fewest hospitals, verified by this one, whose sum it takes part in, and how many of them may collude with the
# coordinator.
min_sites = 3
colluders = 1
"""


@dataclass(frozen=True)
class Start:
    """What `initialise` is told.

    Attributes:
        folder: of the site; made.
        name: of the hospital.
        table: its registry.
        dictionary: a file, or the name of a shipped one.
        passphrase_file: mode 0600; None: WARDROUND_PASSPHRASE where it is set, else one is made.
        epsilon, delta: this hospital's budget; None: to be set in site.toml.
        without_privacy: whether runs without differential privacy are accepted.
    """

    folder: Path
    name: str
    table: Path
    dictionary: str
    passphrase_file: Path | None = None
    epsilon: float | None = None
    delta: float | None = None
    without_privacy: bool = False


def initialise(start: Start, environment: Mapping[str, str] = os.environ) -> tuple[Node, Application, bool]:
    """Makes a site's folder with site.toml, identity key, SuperNode key and application.

    site.toml comes last: a call that was interrupted is repeated, and finds the keys it made.

    Returns:
        The site, its application, and whether a passphrase was made.

    Raises:
        ConfigError: the folder holds a site; not a name, table, dictionary, budget or passphrase.
    """
    check_name(start.name, "--name")
    site_toml = start.folder / "site.toml"
    if site_toml.exists():
        raise ConfigError(
            f"{site_toml}: exists already: this hospital is set up; choose another folder for another one"
        )
    if start.folder.exists() and not start.folder.is_dir():
        raise ConfigError(f"{start.folder}: expected a folder, got a file")
    if not start.table.is_file():
        raise ConfigError(
            f"--table {start.table}: no such file: expected this hospital's registry, CSV, TSV or Parquet"
        )
    dictionary = Path(start.dictionary)
    load_dictionary(dictionary)
    if start.passphrase_file is not None and not start.passphrase_file.is_file():
        raise ConfigError(f"--passphrase-file {start.passphrase_file}: no such file")
    makes = start.passphrase_file is None and not environment.get(PASSPHRASE)
    named = PASSPHRASE_FILE if makes else start.passphrase_file and _stored(start.folder, start.passphrase_file)
    text = _TEMPLATE.format(
        name=_toml(start.name),
        table=_toml(_stored(start.folder, start.table)),
        dictionary=_toml(_stored(start.folder, dictionary) if dictionary.is_file() else start.dictionary),
        passphrase="" if named is None else f"passphrase_file = {_toml(named)}\n",
        epsilon="# epsilon = 8.0" if start.epsilon is None else f"epsilon = {start.epsilon!r}",
        delta="# delta = 1e-5" if start.delta is None else f"delta = {start.delta!r}",
        require_privacy=f"{'' if start.without_privacy else '# '}require_privacy = false",
    )
    config = parse(SiteConfig, tomllib.loads(text), "the settings given")
    private_folder(start.folder)
    if makes:
        try:
            write_once(start.folder / PASSPHRASE_FILE, secrets.token_hex(24).encode() + b"\n", 0o600)
        except FileExistsError:
            makes = False  # of a call that was interrupted
    node = Node(site_toml.resolve(), config)
    keys = SiteKeys(node.folder, config, environment)
    identity, _ = keys.load_or_create()
    make_node_key(node.key_path)
    application = Application.make(identity, Card.make(identity, start.name), node_key(node.key_path))
    write_application(node, application)
    write_atomic(node.site_toml, text.encode())
    return node, application, makes


def apply_again(node: Node, *, new_node_key: bool) -> Application:
    """The application of a site that is set up, written anew: with its next key where it is changing that.

    Args:
        node: the site.
        new_node_key: whether the SuperNode's key is made anew; one that is lost is in any case.

    Raises:
        ConfigError: no identity; a wrong passphrase.
    """
    own, following = node.keys.load(), node.keys.next()
    name = node.config.name
    card = Card.make(own, name) if following is None else Card.make(following, name, previous=own)
    if new_node_key:
        node.key_path.unlink(missing_ok=True)
    make_node_key(node.key_path)
    application = Application.make(following or own, card, node_key(node.key_path))
    write_application(node, application)
    return application


def application_path(node: Node) -> Path:
    """Where a site's application lies."""
    return node.folder / f"{node.config.name}.application.json"


def write_application(node: Node, application: Application) -> None:
    """Writes what people send to the coordinator; everybody may read it."""
    write_atomic(application_path(node), application.to_json().encode(), mode=0o644)


def _stored(folder: Path, path: Path) -> str:
    """A path as site.toml has it: relative where it is within the folder."""
    absolute, home = path.resolve(), folder.resolve()
    return str(absolute.relative_to(home)) if absolute.is_relative_to(home) else str(absolute)


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# ---- joining


@dataclass(frozen=True)
class Offer:
    """An invitation that this site could join by, checked as far as files go.

    Attributes:
        invitation: as it came.
        roster: in it.
        own: this site's id on it.
        before: the invitation that is pinned now.
    """

    invitation: Invitation
    roster: Roster
    own: bytes
    before: Invitation | None

    @property
    def known(self) -> bool:
        """Whether the coordinator's key is that of the pinned invitation: nobody has to compare it again."""
        return self.before is not None and self.before.pinned().coordinator == self.roster.coordinator


def examine(node: Node, data: bytes, source: str, *, replace: bool) -> Offer:
    """Checks an invitation against this site and what it pinned.

    Args:
        node: this site.
        data: the file.
        source: what to call it in an error.
        replace: whether another consortium's pin may be replaced.

    Raises:
        ConfigError: not an invitation, of other versions or another bundle, or of another consortium.
        VerificationError: a wrong signature, another hospital's, an older roster.
    """
    invitation = Invitation.parse(data, source)
    invitation.check_versions()
    check_bundle(invitation)
    roster, keys = invitation.pinned(), node.keys
    own, following = keys.load(), keys.next()
    ids = {one.id for one in (own, following) if one is not None}
    if invitation.site_id not in ids:
        raise VerificationError(
            f"{source}: it invites '{invitation.site}' by another key than this site's ({own.fingerprint}): ask the "
            f"coordinator to enrol {application_path(node).name}"
        )
    check_name_on(roster, invitation.site_id, node.config.name)
    before = node.invitation if node.invitation_path.exists() else None
    if before is not None and not replace:
        pinned = before.pinned()
        if pinned.coordinator != roster.coordinator:
            raise ConfigError(
                f"{source}: of consortium '{roster.consortium}' and another coordinator than that of "
                f"'{pinned.consortium}', which this site has joined: leave that first, or repeat with --replace"
            )
        roster.check_follows(pinned)
    return Offer(invitation, roster, invitation.site_id, before)


def pin(node: Node, offer: Offer, roster_file: Path, verified: Sequence[str]) -> None:
    """Pins an invitation: site.toml says which roster and whom this site verified, then the invitation is kept.

    Args:
        node: this site.
        offer: what `examine` gave.
        roster_file: the roster, beside site.toml.
        verified: plain fingerprints of members that this site compared itself, those of before included.

    Raises:
        ConfigError: site.toml is written in a way that its lines cannot be set safely.
    """
    set_identity(
        node.site_toml,
        {
            "roster": roster_file.name,
            "roster_digest": offer.roster.digest.hex(),
            "verified": [spaced(one) for one in verified],
        },
    )
    write_atomic(node.invitation_path, offer.invitation.to_json().encode())
    node.write_authority(offer.invitation)


def unpin(node: Node) -> None:
    """Forgets roster, verified members and invitation; keys, ledger and everything else stay."""
    set_identity(node.site_toml, {"roster": None, "roster_digest": None, "verified": None})
    for name in ("consortium.json", "ca.pem", "runtime.secret"):
        (node.state / name).unlink(missing_ok=True)


def set_identity(site_toml: Path, settings: Mapping[str, str | list[str] | None]) -> None:
    """Sets keys of [identity] in site.toml, or with None takes them out; the rest stays as it is, byte for byte.

    Raises:
        ConfigError: the file would then not say exactly that; it stays as it was.
    """
    before = read_toml(site_toml)
    wanted: dict[str, Any] = {**before, "identity": {**before.get("identity", {})}}
    for key, value in settings.items():
        if value is None:
            wanted["identity"].pop(key, None)
        else:
            wanted["identity"][key] = value
    text = _with_identity(site_toml.read_text(encoding="utf-8"), settings)
    try:
        found: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        found = None
    if found != wanted:
        lines = "; ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items() if value is not None)
        raise ConfigError(f"{site_toml}: cannot be changed safely as it is written; set below [identity]: {lines}")
    write_atomic(site_toml, text.encode(), mode=site_toml.stat().st_mode & 0o777)


def _with_identity(text: str, settings: Mapping[str, str | list[str] | None]) -> str:
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if re.match(r"\s*\[", line) and "=" not in line.split("]")[0]]
    begin = next((n for n in heads if re.fullmatch(r"\s*\[\s*identity\s*\]\s*(#.*)?", lines[n])), None)
    if begin is None:
        lines += ["", "[identity]"]
        begin, end = len(lines) - 1, len(lines)
    else:
        end = min((n for n in heads if n > begin), default=len(lines))
    section, index = lines[begin + 1 : end], 0
    kept: list[str] = []
    while index < len(section):
        found = re.match(r"\s*([A-Za-z_]+)\s*=\s*(.*)", section[index])
        if found is None or found[1] not in settings:
            kept.append(section[index])
        elif found[2].startswith("[") and "]" not in found[2].split("#")[0]:
            while index + 1 < len(section) and not re.match(r"\s*\]", section[index]):
                index += 1
        index += 1
    blank = len(kept) - len([*_without_end(kept)])
    body, rest = kept[: len(kept) - blank], kept[len(kept) - blank :]
    for key, value in settings.items():
        if isinstance(value, list):
            body += [f"{key} = [", *(f"  {_toml(one)}," for one in value), "]"]
        elif value is not None:
            body.append(f"{key} = {_toml(value)}")
    return "\n".join([*lines[: begin + 1], *body, *rest, *lines[end:]]) + "\n"


def _without_end(lines: Sequence[str]) -> Sequence[str]:
    """Lines without the blank ones at their end."""
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    return lines[: last + 1]


def spaced(plain: str) -> str:
    """A fingerprint as people read it.

    Raises:
        ValueError: not a fingerprint.
    """
    text = plain_fingerprint(plain)
    return " ".join(text[i : i + 4] for i in range(0, len(text), 4))
