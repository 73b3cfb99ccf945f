"""The one file of a review: study, items, raters, slots with their ratings, and a trail of all that happened.

Runs at the coordinator. Enters: a checked `Study`. Leaves: rows, to this package. Private: all of it: records, the
secret seed, which answer is whose; the folder has mode 0700. Tokens and sessions are not in it, only their digests.

SQLite in WAL mode, written by `wardround server review` commands, at most one of which serves pages. A transaction is
on the disk when it ends. The trail can only be appended to (triggers), and each entry holds the SHA-256 of the one
before with itself: that finds damage and a line changed by hand, not somebody who writes the whole chain anew, for no
key is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from ...common.errors import VerificationError
from ...common.files import check_writable, private_folder
from .items import Item, ReviewError, Study

SCHEMA = 1
FILE = "review.db"
_APPLICATION = 0x77647276  # "wdrv": another program's SQLite file is told apart
_TABLES = """
CREATE TABLE study (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE items (
  number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, section TEXT NOT NULL, target TEXT NOT NULL, body TEXT NOT NULL
);
CREATE TABLE raters (
  number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE COLLATE NOCASE,
  kind TEXT NOT NULL CHECK (kind IN ('person', 'judge')),
  token BLOB UNIQUE, session BLOB UNIQUE, seen REAL NOT NULL DEFAULT 0, shortcuts INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE slots (
  rater INTEGER NOT NULL REFERENCES raters, place INTEGER NOT NULL, item INTEGER NOT NULL REFERENCES items,
  first_model INTEGER NOT NULL CHECK (first_model IN (0, 1)), repeats INTEGER,
  preference INTEGER CHECK (preference BETWEEN -2 AND 2), detail TEXT, rated_at TEXT,
  PRIMARY KEY (rater, place)
) WITHOUT ROWID;
CREATE INDEX open_slots ON slots (rater, place) WHERE preference IS NULL;
CREATE TABLE trail (
  n INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, rater INTEGER, action TEXT NOT NULL, place INTEGER,
  item INTEGER, old TEXT, new TEXT, chain BLOB NOT NULL
);
CREATE TRIGGER trail_stays BEFORE UPDATE ON trail BEGIN SELECT RAISE(ABORT, 'the trail is append-only'); END;
CREATE TRIGGER trail_keeps BEFORE DELETE ON trail BEGIN SELECT RAISE(ABORT, 'the trail is append-only'); END;
"""


@dataclass(frozen=True)
class Facts:
    """What a study is, without its items.

    Attributes:
        models: the two names; index 0 and 1 in slots.
        share: of the items, planted a second time.
        items: how many.
        digest: SHA-256 of the file that they came from, hex.
        seed: 32 secret bytes; all orders follow from it.
    """

    title: str
    data: str
    language: str
    models: tuple[str, str]
    share: float
    items: int
    digest: str
    seed: bytes


@dataclass(frozen=True)
class Entry:
    """One entry of the trail. `old` and `new` are JSON, or None."""

    n: int
    time: str
    rater: int | None
    action: str
    place: int | None
    item: int | None
    old: str | None
    new: str | None


class Database:
    """An open review. Not for several threads at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._sql = sqlite3.connect(path, isolation_level=None, timeout=10, check_same_thread=False)
            self._sql.row_factory = sqlite3.Row
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "trusted_schema = OFF"):
                self._sql.execute(f"PRAGMA {pragma}")
            self._check()
        except sqlite3.DatabaseError as error:
            raise ReviewError(f"{path}: cannot be read as a review: {error}; restore a copy") from None

    @classmethod
    def create(cls, folder: Path, study: Study, share: float) -> Self:
        """Makes a review's folder with the study in it; a kill leaves no half of it.

        Raises:
            ReviewError: something else is in the folder.
            RunFolderError: it cannot be written.
        """
        check_writable(folder)
        path = folder / FILE
        new = path.with_suffix(".new")  # what a kill may have left
        if folder.exists() and any(item != new for item in folder.iterdir()):
            raise ReviewError(f"{folder}: holds files, and no review; choose a new folder")
        private_folder(folder)
        new.unlink(missing_ok=True)
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        try:
            sql = sqlite3.connect(new, isolation_level=None)
            try:
                sql.executescript(f"BEGIN; {_TABLES} PRAGMA application_id = {_APPLICATION}; COMMIT;")
                sql.execute("BEGIN")
                facts = {
                    "title": study.title, "data": study.data, "language": study.language, "share": share,
                    "models": study.models, "items": len(study.items), "digest": study.digest,
                    "seed": secrets.token_hex(32),
                }  # fmt: skip
                sql.executemany("INSERT INTO study VALUES (?, ?)", ((key, json.dumps(facts[key])) for key in facts))
                sql.executemany(
                    "INSERT INTO items VALUES (?, ?, ?, ?, ?)",
                    (
                        (number, item.id, item.section, item.target, item.model_dump_json())
                        for number, item in enumerate(study.items)
                    ),
                )
                sql.execute(f"PRAGMA user_version = {SCHEMA}")
                sql.execute("COMMIT")
            finally:
                sql.close()
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        made = cls(path)
        with made.transaction():
            public = {"data": study.data, "items": len(study.items), "digest": study.digest, "planted_twice": share}
            made.note(None, "study made", new=json.dumps(public, sort_keys=True))
        return made

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Opens the review in a folder.

        Raises:
            ReviewError: there is none, it is damaged, or of another version.
        """
        path = folder / FILE
        if not path.is_file():
            raise ReviewError(
                f"{folder}: no review is there; make one with `wardround server review start --items FILE`"
            )
        return cls(path)

    def _check(self) -> None:
        (application,) = self._sql.execute("PRAGMA application_id").fetchone()
        (version,) = self._sql.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            raise ReviewError(f"{self.path}: expected a review of wardround, got another program's file")
        if version != SCHEMA:
            raise ReviewError(
                f"{self.path}: of schema {version}; this wardround reads {SCHEMA}: use the one that made it"
            )
        said = {row["key"]: json.loads(row["value"]) for row in self._sql.execute("SELECT key, value FROM study")}
        first, second = said.pop("models")
        self.facts = Facts(models=(first, second), seed=bytes.fromhex(said.pop("seed")), **said)

    def close(self) -> None:
        """Lets go of the file."""
        self._sql.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What the block writes is written whole or not at all."""
        self._sql.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._sql.execute("ROLLBACK")
            raise
        self._sql.execute("COMMIT")

    def all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """Every row of a query."""
        return self._sql.execute(query, values).fetchall()

    def one(self, query: str, *values: Any) -> sqlite3.Row | None:
        """The first row, or None."""
        row: sqlite3.Row | None = self._sql.execute(query, values).fetchone()
        return row

    def write(self, query: str, *values: Any) -> None:
        """One statement that writes; within a transaction."""
        self._sql.execute(query, values)

    def write_many(self, query: str, rows: Iterator[tuple[Any, ...]]) -> None:
        """One statement for many rows; within a transaction."""
        self._sql.executemany(query, rows)

    def item(self, number: int) -> Item:
        """One item of the study."""
        row = self.one("SELECT body FROM items WHERE number = ?", number)
        if row is None:
            raise ReviewError(f"{self.path}: damaged: item {number} is missing; restore a copy")
        return Item.model_validate_json(row["body"])

    def note(
        self,
        rater: int | None,
        action: str,
        *,
        place: int | None = None,
        item: int | None = None,
        old: str | None = None,
        new: str | None = None,
    ) -> None:
        """Appends to the trail; within a transaction."""
        last = self.one("SELECT n, chain FROM trail ORDER BY n DESC LIMIT 1")
        n, before = (last["n"] + 1, last["chain"]) if last else (1, b"")
        entry = Entry(n, now(), rater, action, place, item, old, new)
        self.write(
            "INSERT INTO trail VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", *vars(entry).values(), _linked(before, entry)
        )

    def trail(self) -> list[Entry]:
        """The whole trail, oldest first, checked.

        Raises:
            VerificationError: an entry was changed, removed or inserted, or a rating is another than the last one that
                the trail tells of.
        """
        before, entries, last = b"", list[Entry](), dict[tuple[Any, Any], str | None]()
        for number, row in enumerate(self.all("SELECT * FROM trail ORDER BY n"), start=1):
            entry = Entry(*tuple(row)[:-1])
            if entry.n != number or _linked(before, entry) != row["chain"]:
                raise VerificationError(f"{self.path}: entry {number} of the trail is not what was written")
            before = row["chain"]
            entries.append(entry)
            if entry.action in ("rated", "changed"):
                last[entry.rater, entry.place] = entry.new
        rated = self.all("SELECT rater, place, detail FROM slots WHERE preference IS NOT NULL")
        if {(row["rater"], row["place"]): row["detail"] for row in rated} != last:
            raise VerificationError(f"{self.path}: the ratings are not those that the trail tells of")
        return entries


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _linked(before: bytes, entry: Entry) -> bytes:
    return hashlib.sha256(before + json.dumps(list(vars(entry).values())).encode()).digest()
