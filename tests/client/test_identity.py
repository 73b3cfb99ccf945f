"""A site's keys on its disk: who may read them, what opens them, how one follows another; the roster it pinned."""

import os
from pathlib import Path

import pytest
from wardround.client import identity as site_identity
from wardround.client.identity import SiteKeys
from wardround.common import identity as module
from wardround.common.errors import ConfigError, VerificationError
from wardround.common.identity import Card, Identity
from wardround.common.roster import Roster

PASSPHRASE = "correct horse battery"
COORDINATOR = Identity.generate()
OTHERS = {name: Identity.generate() for name in ("south", "east")}
CARDS = [Card.make(key, name) for name, key in OTHERS.items()]


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._SCRYPT, "n", 2**4)


def write_site(folder: Path, lines: str = "", name: str = "north") -> Path:
    path = folder / "site.toml"
    path.write_text(f'name = "{name}"\ntable = "t.csv"\ndictionary = "support_icu"\n[identity]\n{lines}')
    return path


def keys_of(folder: Path, lines: str = "", name: str = "north", passphrase: str | None = PASSPHRASE) -> SiteKeys:
    made = SiteKeys.open(write_site(folder, lines, name))
    environment = {} if passphrase is None else {"WARDROUND_PASSPHRASE": passphrase}
    return SiteKeys(made.folder, made.config, environment)


def pin(folder: Path, roster: Roster, verified: str = "") -> SiteKeys:
    (folder / "roster.json").write_text(roster.to_json())
    return keys_of(folder, f'roster_digest = "{roster.digest.hex()}"\nverified = [{verified}]\n')


def roster_with(own: Identity, name: str = "north") -> Roster:
    return Roster.first(COORDINATOR, "Stroke", [Card.make(own, name), *CARDS])


def test_an_identity_is_made_once_encrypted_and_private(tmp_path: Path):
    keys = keys_of(tmp_path)
    made, new = keys.load_or_create()
    assert new and keys.path == tmp_path / "state" / "identity.pem"
    assert keys.path.stat().st_mode & 0o777 == 0o600 and keys.path.parent.stat().st_mode & 0o777 == 0o700
    assert b"ENCRYPTED PRIVATE KEY" in keys.path.read_bytes()
    again, new = keys.load_or_create()
    assert not new and again.id == made.id == keys.load().id
    assert PASSPHRASE not in repr(keys)


def test_an_identity_that_is_not_there_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"identity\.pem: no such file: .*`wardround client card`"):
        keys_of(tmp_path).load()


def test_a_wrong_passphrase_opens_nothing_and_makes_no_second_key(tmp_path: Path):
    keys_of(tmp_path).load_or_create()
    before = (tmp_path / "state" / "identity.pem").read_bytes()
    wrong = keys_of(tmp_path, passphrase="another passphrase")
    for use in (wrong.load, wrong.load_or_create, wrong.load_or_prepare_next):
        with pytest.raises(ConfigError, match=r"identity\.pem: wrong passphrase") as caught:
            use()
        assert "another passphrase" not in str(caught.value)
    assert (tmp_path / "state" / "identity.pem").read_bytes() == before
    assert not wrong.next_path.exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int):
    keys = keys_of(tmp_path)
    keys.load_or_create()
    keys.path.chmod(mode)
    for use in (keys.load, keys.load_or_create):
        with pytest.raises(ConfigError, match=f"identity key: others may use it .mode {mode:04o}.: call `chmod 600"):
            use()


def test_a_key_that_is_no_file_or_a_dangling_link_is_refused_and_not_made_anew(tmp_path: Path):
    keys = keys_of(tmp_path)
    keys.path.mkdir(parents=True)
    with pytest.raises(ConfigError, match="identity key: expected a file"):
        keys.load_or_create()
    keys.path.rmdir()
    keys.path.symlink_to(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match="no such file: identity key"):
        keys.load_or_create()
    assert keys.path.is_symlink()


def test_the_passphrase_comes_from_the_environment_first_then_from_the_file(tmp_path: Path):
    secret = tmp_path / "passphrase"
    secret.write_text(PASSPHRASE + "\r\n")
    secret.chmod(0o600)
    line = 'passphrase_file = "passphrase"\n'
    made, _ = keys_of(tmp_path, line, passphrase=None).load_or_create()
    assert keys_of(tmp_path).load().id == made.id
    with pytest.raises(ConfigError, match="wrong passphrase"):
        keys_of(tmp_path, line, passphrase="not that one").load()


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (None, 0o600, "passphrase: no such file: passphrase file"),
        (PASSPHRASE, 0o644, "passphrase file: others may use it .mode 0644.: call `chmod 600"),
        ("\n", 0o600, "expected a passphrase, it is empty"),
        ("", 0o600, "expected a passphrase, it is empty"),
        (f"{PASSPHRASE}\nsecond\n", 0o600, "expected one line"),
    ],
)
def test_a_passphrase_file_that_is_missing_open_empty_or_long_is_refused(tmp_path: Path, content, mode, why):
    if content is not None:
        (tmp_path / "passphrase").write_text(content)
        (tmp_path / "passphrase").chmod(mode)
    with pytest.raises(ConfigError, match=why) as caught:
        keys_of(tmp_path, 'passphrase_file = "passphrase"\n', passphrase=None).load_or_create()
    assert PASSPHRASE not in str(caught.value) and not (tmp_path / "state").exists()


def test_no_empty_and_short_passphrases_are_refused(tmp_path: Path):
    for passphrase, why in (
        (None, "no passphrase: set WARDROUND_PASSPHRASE, or name a file of mode 0600 with identity.passphrase_file"),
        ("", "WARDROUND_PASSPHRASE: expected a passphrase, it is empty"),
        ("eleven byte", "passphrase: expected at least 12 characters"),
    ):
        keys = keys_of(tmp_path, passphrase=passphrase)
        with pytest.raises(ConfigError, match=why):
            keys.load_or_create()
        assert not keys.path.exists()


def test_a_key_that_another_process_made_meanwhile_is_the_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys, write = keys_of(tmp_path), site_identity.write_key
    other = Identity.generate()

    def after_another(path: Path, identity: Identity, secret: bytes) -> None:
        write(path, other, secret)
        write(path, identity, secret)

    monkeypatch.setattr(site_identity, "write_key", after_another)
    made, new = keys.load_or_create()
    assert made.id == other.id and not new


# ---- the pinned roster


def test_the_pinned_roster_is_read_with_the_verified_members(tmp_path: Path):
    own, _ = keys_of(tmp_path).load_or_create()
    keys = pin(tmp_path, roster_with(own), f'"{OTHERS["south"].fingerprint.lower()}"')
    members = keys.members(own.id)
    assert members.verified == {own.id, OTHERS["south"].id} and len(members.active) == 3


def test_a_roster_that_was_replaced_on_disk_is_refused(tmp_path: Path):
    own, _ = keys_of(tmp_path).load_or_create()
    first = roster_with(own)
    keys = pin(tmp_path, first)
    (tmp_path / "roster.json").write_text(first.revoking(COORDINATOR, "east").to_json())
    for use in (keys.roster, lambda: keys.members(own.id)):
        with pytest.raises(VerificationError, match=r"is not the pinned .* `wardround client roster pin FILE`"):
            use()
    (tmp_path / "roster.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"roster\.json: expected 'wardround-roster/1'"):
        keys.roster()
    (tmp_path / "roster.json").unlink()
    with pytest.raises(ConfigError, match=r"roster\.json: no such file"):
        keys.roster()
    (tmp_path / "roster.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: is a directory"):
        keys.roster()


def test_nothing_pinned_is_refused_even_when_a_roster_lies_there(tmp_path: Path):
    own, _ = keys_of(tmp_path).load_or_create()
    (tmp_path / "roster.json").write_text(roster_with(own).to_json())
    with pytest.raises(ConfigError, match="no roster is pinned"):
        keys_of(tmp_path).members(own.id)


def test_a_roster_that_gives_this_site_another_name_is_refused(tmp_path: Path):
    own, _ = keys_of(tmp_path).load_or_create()
    with pytest.raises(VerificationError, match=r"this site is 'nord' there and 'north' in site\.toml"):
        pin(tmp_path, roster_with(own, "nord")).members(own.id)


# ---- rotation


def test_a_rotation_ends_only_when_the_pinned_roster_holds_the_new_key(tmp_path: Path):
    old, _ = keys_of(tmp_path).load_or_create()
    first = roster_with(old)
    keys = pin(tmp_path, first)
    with pytest.raises(ConfigError, match="no rotation was begun"):
        keys.finish_rotation()
    assert keys.next() is None
    following, new = keys.load_or_prepare_next()
    assert new and following.id != old.id and keys.next_path.stat().st_mode & 0o777 == 0o600
    again, new = keys.load_or_prepare_next()
    assert not new and again.id == following.id
    with pytest.raises(VerificationError, match="is not on the pinned roster"):
        keys.finish_rotation()
    assert keys.load().id == old.id  # still in use

    keys = pin(tmp_path, first.adding(COORDINATOR, [Card.make(following, "north", previous=old)]))
    with pytest.raises(VerificationError, match="wardround client rotate --finish"):
        keys.members(keys.load().id)
    assert keys.finish_rotation().id == following.id == keys.load().id
    assert keys.next() is None and not keys.next_path.exists()
    assert [item.storage_key() for item in keys.retired()] == [old.storage_key()]
    assert keys.members(keys.load().id).own == following.id


def test_a_rotation_that_is_killed_on_the_way_loses_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old, _ = keys_of(tmp_path).load_or_create()
    following, _ = keys_of(tmp_path).load_or_prepare_next()
    keys = pin(tmp_path, roster_with(following))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            keys.finish_rotation()
    assert keys.load().id == old.id
    assert keys.finish_rotation().id == following.id
    assert {item.id for item in keys.retired()} == {old.id}


def test_a_lost_key_of_a_site_that_had_one_is_not_silently_made_anew(tmp_path: Path):
    keys = keys_of(tmp_path)
    keys.load_or_create()
    keys.load_or_prepare_next()
    keys.path.unlink()
    with pytest.raises(ConfigError, match="missing, though this site has had keys"):
        keys.load_or_create()


def test_retired_keys_are_latest_first_beyond_nine(tmp_path: Path):
    keys = keys_of(tmp_path)
    made = keys.load_or_create()[0]
    for n in (1, 2, 9, 10):
        os.link(keys.path, keys.path.with_name(f"identity.retired-{n}.pem"))
    assert [path.name.split("-")[1] for path in keys._retired_paths()] == ["1.pem", "2.pem", "9.pem", "10.pem"]
    assert {item.id for item in keys.retired()} == {made.id}
