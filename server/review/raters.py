"""Who may rate: invitation, token, session. One token is one rater's, and one browser at a time is logged in with it.

Runs at the coordinator. Enters: names. Leaves: a token, once, to be handed to that person. Private: tokens and session
secrets: the database has their SHA-256 only, which is enough for 256 random bits.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import time
import unicodedata
from dataclasses import dataclass
from typing import Literal

from .blinding import sequence
from .database import Database
from .items import ReviewError

PREFIX = "wr-"
SESSION_S = 12 * 3600.0  # without a request; then the token is asked for again
_SEEN_EVERY_S = 60.0
MAX_NAME = 80

Kind = Literal["person", "judge"]


@dataclass(frozen=True)
class Rater:
    """One who rates. `kind`: a "judge" is a program, never counted with people; `seen`: last request, Unix time."""

    number: int
    name: str
    kind: str
    session: bytes | None
    seen: float
    shortcuts: bool

    @property
    def busy(self) -> bool:
        """Whether some browser is logged in."""
        return self.session is not None and time.time() - self.seen < SESSION_S


def invite(database: Database, name: str, kind: Kind = "person") -> str:
    """Adds a rater with a sequence of slots; returns the token, "" for a judge, who does not log in.

    Raises:
        ReviewError: not a name; somebody has it.
    """
    name = " ".join(name.split())
    if not 1 <= len(name) <= MAX_NAME or any(unicodedata.category(mark).startswith("C") for mark in name):
        raise ReviewError(f"rater '{name}': expected a name of 1 to {MAX_NAME} characters")
    facts, token = database.facts, PREFIX + secrets.token_urlsafe(32) if kind == "person" else ""
    with database.transaction():
        if database.one("SELECT 1 FROM raters WHERE name = ?", name) is not None:
            raise ReviewError(f"rater '{name}': is invited already; `review invite --again` makes a new token")
        database.write(
            "INSERT INTO raters (name, kind, token) VALUES (?, ?, ?)", name, kind, digest(token) if token else None
        )
        row = database.one("SELECT number FROM raters WHERE name = ?", name)
        assert row is not None
        number = row["number"]
        slots = sequence(facts.seed, number, facts.items, facts.share)
        database.write_many(
            "INSERT INTO slots (rater, place, item, first_model, repeats) VALUES (?, ?, ?, ?, ?)",
            ((number, place, slot.item, slot.first_model, slot.repeats) for place, slot in enumerate(slots)),
        )
        database.note(number, "invited", new=kind)
    return token


def invite_again(database: Database, name: str) -> str:
    """A new token for a rater who lost the old one, which ends with every session; ratings stay.

    Raises:
        ReviewError: nobody of that name rates on the pages.
    """
    token = PREFIX + secrets.token_urlsafe(32)
    with database.transaction():
        row = database.one("SELECT number FROM raters WHERE name = ? AND kind = 'person'", " ".join(name.split()))
        if row is None:
            raise ReviewError(f"rater '{name}': is not invited; leave --again out")
        database.write("UPDATE raters SET token = ?, session = NULL WHERE number = ?", digest(token), row["number"])
        database.note(row["number"], "token replaced")
    return token


def raters(database: Database) -> list[Rater]:
    """Everybody, by number."""
    return [_rater(row) for row in database.all("SELECT * FROM raters ORDER BY number")]


def by_token(database: Database, token: str) -> Rater | None:
    """Whose token it is."""
    row = database.one("SELECT * FROM raters WHERE token = ?", digest(token.strip()))
    return _rater(row) if row else None


def by_number(database: Database, number: int) -> Rater | None:
    """The rater of a number."""
    row = database.one("SELECT * FROM raters WHERE number = ?", number)
    return _rater(row) if row else None


def by_session(database: Database, session: str) -> Rater | None:
    """Who is logged in with a session's secret; notes, once a minute, that they are there."""
    row = database.one("SELECT * FROM raters WHERE session = ?", digest(session)) if session else None
    rater = _rater(row) if row else None
    if rater is None or not rater.busy:
        return None
    if (moment := time.time()) - rater.seen > _SEEN_EVERY_S:
        with database.transaction():
            database.write("UPDATE raters SET seen = ? WHERE number = ?", moment, rater.number)
    return rater


def log_in(database: Database, rater: Rater) -> str:
    """Begins a session in the place of any other; returns its secret, for a cookie."""
    session = secrets.token_urlsafe(32)
    with database.transaction():
        known = by_number(database, rater.number)
        database.write(
            "UPDATE raters SET session = ?, seen = ? WHERE number = ?", digest(session), time.time(), rater.number
        )
        database.note(rater.number, "taken over" if known is not None and known.busy else "logged in")
    return session


def log_out(database: Database, rater: Rater) -> None:
    """Ends the session."""
    with database.transaction():
        database.write("UPDATE raters SET session = NULL WHERE number = ?", rater.number)
        database.note(rater.number, "logged out")


def set_shortcuts(database: Database, rater: Rater, on: bool) -> None:
    """Turns keyboard shortcuts on or off for one rater."""
    with database.transaction():
        database.write("UPDATE raters SET shortcuts = ? WHERE number = ?", int(on), rater.number)


def digest(secret: str) -> bytes:
    """What is kept of a token or session."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def _rater(row: sqlite3.Row) -> Rater:
    return Rater(row["number"], row["name"], row["kind"], row["session"], row["seen"], bool(row["shortcuts"]))
