"""Where a site keeps its identity, and the roster that it pinned.

Run by the site. Enters: site.toml, a passphrase, the roster's file. Leaves: nothing; the card that people send is
written by client/identity_cli.py. Private: the identity keys, in files of mode 0600, encrypted with the passphrase:

    state/identity.pem              the key in use
    state/identity.next.pem         during a rotation: the key that the coordinator's next roster is to hold
    state/identity.retired-<n>.pem  keys of the past: what they encrypted here can still be read

The passphrase is never written: it comes with every process, from WARDROUND_PASSPHRASE or from the file that
`identity.passphrase_file` names. Whoever has both files and passphrase is this site.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..common.config import SiteConfig, load_site
from ..common.errors import ConfigError, VerificationError
from ..common.files import private_folder, sync_folder
from ..common.identity import Identity
from ..common.key_file import passphrase, read_key, read_secret, write_key
from ..common.roster import MAX_ROSTER_BYTES, Members, Roster, check_pinned


@dataclass(frozen=True, eq=False)
class SiteKeys:
    """A site's identity as its folder says; nothing secret is held here.

    Attributes:
        folder: of site.toml.
        config: site.toml.
        environment: where the passphrase is looked for first; the process's own.
    """

    folder: Path
    config: SiteConfig
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)

    @classmethod
    def open(cls, site_toml: Path) -> SiteKeys:
        """Of a `site.toml`.

        Raises:
            ConfigError: missing or malformed.
        """
        return cls(site_toml.resolve().parent, load_site(site_toml))

    @property
    def path(self) -> Path:
        """The key in use."""
        return self.folder / self.config.state / "identity.pem"

    @property
    def next_path(self) -> Path:
        """The key that a rotation prepared."""
        return self.path.with_name("identity.next.pem")

    @property
    def roster_path(self) -> Path:
        """The roster that `identity.roster` names."""
        return self.folder / self.config.identity.roster

    def _passphrase(self) -> bytes:
        named = self.config.identity.passphrase_file
        file = None if named is None else self.folder / named
        return passphrase(file, self.environment, "identity.passphrase_file in site.toml")

    def load(self) -> Identity:
        """The identity in use.

        Raises:
            ConfigError: none was made; its file or the passphrase's is missing or open to others; wrong passphrase.
        """
        if not os.path.lexists(self.path):
            raise ConfigError(f"{self.path}: no such file: make this site's identity with `wardround client card`")
        return read_key(self.path, self._passphrase())

    def identity(self) -> Identity:
        """The identity in use, as `load`, once a process: deriving the key from a passphrase takes a tenth of a second.

        Raises:
            ConfigError: as `load`.
        """
        if not self.path.is_file():
            return self.load()  # which says what to do
        file = self.path.read_bytes()
        if file not in _loaded:
            if len(_loaded) >= 64:  # more sites than one process has, but for a large simulation
                _loaded.clear()
            _loaded[file] = self.load()
        return _loaded[file]

    def ids(self) -> list[bytes]:
        """Public keys of this site, the one in use last; needs no passphrase.

        Raises:
            ConfigError: a file is not one of a key, or open to others.
        """
        found = [*self._retired_paths(), *([self.path] if os.path.lexists(self.path) else [])]
        ids = [Identity.public_of(read_secret(path, "identity key"), str(path)) for path in found]
        return list(dict.fromkeys(ids))  # while a rotation is finished, one file has two names

    def load_or_create(self) -> tuple[Identity, bool]:
        """The identity in use, and whether it was made now. A key that is there is never replaced.

        Raises:
            ConfigError: as `load`; the passphrase is too short; retired keys are there without one in use.
        """
        return self._make(self.path)

    def load_or_prepare_next(self) -> tuple[Identity, bool]:
        """The identity that this site rotates to, and whether it was made now.

        Raises:
            ConfigError: as `load`.
        """
        self.load()
        return self._make(self.next_path)

    def _make(self, path: Path) -> tuple[Identity, bool]:
        secret = self._passphrase()
        if not os.path.lexists(path):
            private_folder(path.parent)
            if path == self.path and (self._retired_paths() or os.path.lexists(self.next_path)):
                raise ConfigError(f"{path}: missing, though this site has had keys: restore it from a copy")
            identity = Identity.generate()
            try:
                write_key(path, identity, secret)
            except FileExistsError:
                pass  # another process was faster: its key is the one
            else:
                return identity, True
        return read_key(path, secret), False

    def next(self) -> Identity | None:
        """The identity that this site rotates to; None outside a rotation.

        Raises:
            ConfigError: as `load`.
        """
        return read_key(self.next_path, self._passphrase()) if os.path.lexists(self.next_path) else None

    def finish_rotation(self) -> Identity:
        """Puts the next key in the place of the one in use, which is retired; only once the pinned roster holds it.

        Returns:
            The identity in use from now on.

        Raises:
            ConfigError: no rotation was begun; as `load`.
            VerificationError: the pinned roster does not hold the new key, or is another one.
        """
        following = self.next()
        if following is None:
            raise ConfigError("no rotation was begun: call `wardround client rotate`")
        self.members(following.id)
        retired = self.path.with_name(f"identity.retired-{len(self._retired_paths()) + 1}.pem")
        os.link(self.path, retired)  # both names until the next line: a kill in between leaves a key in use
        self.next_path.replace(self.path)
        sync_folder(self.path.parent)
        return following

    def retired(self) -> list[Identity]:
        """Identities of the past, latest first: what their storage keys encrypted can still be read.

        Raises:
            ConfigError: as `load`.
        """
        return [read_key(path, self._passphrase()) for path in reversed(self._retired_paths())]

    def _retired_paths(self) -> list[Path]:
        found = self.path.parent.glob("identity.retired-*.pem")
        return sorted(found, key=lambda path: (len(path.name), path.name))

    def roster(self) -> Roster:
        """The pinned roster.

        Raises:
            ConfigError: none is pinned, no such file, not a roster.
            VerificationError: wrong signature; not the one that is pinned.
        """
        wanted = self.config.identity.roster_digest
        if wanted is None:
            raise ConfigError("no roster is pinned: call `wardround client roster pin FILE` and set what it prints")
        roster = read_roster(self.roster_path)
        check_pinned(roster, wanted)
        return roster

    def members(self, own: bytes) -> Members:
        """The pinned roster as this site sees it.

        Args:
            own: this site's id.

        Raises:
            ConfigError: as `roster`.
            VerificationError: as `roster`; this site is no active member, or has another name there.
        """
        settings = self.config.identity
        members = Members.pinned(self.roster(), settings.roster_digest, own, settings.verified)
        check_name_on(members.roster, own, self.config.name)
        return members


_loaded: dict[bytes, Identity] = {}  # by the key's encrypted file
_parsed: dict[bytes, Roster] = {}  # by the file's bytes; one at most: simulated sites share one roster


def read_roster(path: Path) -> Roster:
    """A roster's file, its signature checked; whether it is the pinned one is another question.

    Raises:
        ConfigError: no such file, not a roster.
        VerificationError: wrong signature.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_ROSTER_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file: the roster that the coordinator sent") from None
    except OSError as error:
        raise ConfigError(f"{path}: roster: cannot be read: {(error.strerror or '').lower()}") from None
    if data not in _parsed:
        roster = Roster.parse(data, str(path))
        _parsed.clear()
        _parsed[data] = roster
    return _parsed[data]


def check_name_on(roster: Roster, own: bytes, name: str) -> None:
    """Refuses a roster on which this site has another name than in site.toml.

    Raises:
        VerificationError: names both.
    """
    member = roster.member(own)
    if member is not None and member.name != name:
        raise VerificationError(
            f"roster {roster.serial}: this site is '{member.name}' there and '{name}' in site.toml: they must be one"
        )
