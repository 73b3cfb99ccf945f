"""A rater's way through the pairs: what is shown at a place, what was said of it, what is still open.

Runs at the coordinator. Enters: a rater, a place, a rating. Leaves: the pair as it is shown, without any model's name;
for export and statistics every rating with the models' names put back. Private: which answer is whose.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from .database import Database, now
from .items import Answer, Item, ReviewError

# What the form's values mean: below 0 the first answer is the better one.
PREFERENCES = {
    "first-much": (-2, "First much better"),
    "first-slightly": (-1, "First slightly better"),
    "equal": (0, "About equal"),
    "second-slightly": (1, "Second slightly better"),
    "second-much": (2, "Second much better"),
}
REASONS = {
    "record": "Uses the record correctly",
    "reasoning": "Sounder reasoning",
    "safety": "Safer for the patient",
    "invention": "Invents less",
    "completeness": "Misses less",
    "clarity": "Clearer",
}
MAX_COMMENT = 2000
_WORD = {value: word for word, (value, _) in PREFERENCES.items()}


@dataclass(frozen=True)
class Rating:
    """What a rater says of a pair.

    Attributes:
        preference: −2 to 2; below 0: the first answer is better.
        reasons: keys of REASONS, in that order.
        unacceptable: whether the first, whether the second answer could harm or is plainly wrong.
        comment: free text.
    """

    preference: int
    reasons: tuple[str, ...] = ()
    unacceptable: tuple[bool, bool] = (False, False)
    comment: str = ""

    @classmethod
    def of(cls, preference: str, reasons: Sequence[str], unacceptable: Sequence[str], comment: str) -> Rating:
        """A rating from a form's or a file's words.

        Raises:
            ReviewError: no preference, an unknown word, a comment that is too long; the text is for the rater.
        """
        if preference not in PREFERENCES:
            raise ReviewError("Choose which answer is better, or that they are about equal.")
        if set(reasons) - REASONS.keys() or set(unacceptable) - {"first", "second"}:
            raise ReviewError("A reason that this page does not offer.")
        comment = comment.replace("\r\n", "\n").replace("\0", "").strip()
        if len(comment) > MAX_COMMENT:
            raise ReviewError(f"The comment has {len(comment):,} characters; {MAX_COMMENT:,} are kept. Shorten it.")
        chosen = tuple(reason for reason in REASONS if reason in reasons)
        return cls(PREFERENCES[preference][0], chosen, ("first" in unacceptable, "second" in unacceptable), comment)

    @property
    def word(self) -> str:
        """The form's value of the preference."""
        return _WORD[self.preference]

    def to_json(self) -> str:
        """As it is kept, and as the trail tells of it."""
        return json.dumps(
            {
                "preference": self.preference,
                "reasons": self.reasons,
                "unacceptable": self.unacceptable,
                "comment": self.comment,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Rating:
        """The inverse of `to_json`."""
        said = json.loads(text)
        first, second = said["unacceptable"]
        return cls(said["preference"], tuple(said["reasons"]), (first, second), said["comment"])


@dataclass(frozen=True)
class Pair:
    """What is shown at a place: the item, its answers in the order drawn, and what the rater said before."""

    place: int
    item: Item
    answers: tuple[Answer, Answer]
    rating: Rating | None


def pair_at(database: Database, rater: int, place: int) -> Pair | None:
    """The pair at a place of a rater's sequence; None: there is no such place."""
    row = database.one("SELECT * FROM slots WHERE rater = ? AND place = ?", rater, place)
    if row is None:
        return None
    item, models = database.item(row["item"]), database.facts.models
    first, second = (item.answers[models[index]] for index in (row["first_model"], 1 - row["first_model"]))
    return Pair(place, item, (first, second), Rating.from_json(row["detail"]) if row["detail"] else None)


def rate(database: Database, rater: int, place: int, rating: Rating) -> bool:
    """Keeps a rating, with the one before in the trail; whether anything changed.

    Raises:
        ReviewError: no such place.
    """
    new = rating.to_json()
    with database.transaction():
        row = database.one("SELECT item, detail FROM slots WHERE rater = ? AND place = ?", rater, place)
        if row is None:
            raise ReviewError(f"no pair {place + 1} is there")
        if row["detail"] == new:
            return False
        database.write(
            "UPDATE slots SET preference = ?, detail = ?, rated_at = ? WHERE rater = ? AND place = ?",
            rating.preference, new, now(), rater, place,
        )  # fmt: skip
        action = "changed" if row["detail"] else "rated"
        database.note(rater, action, place=place, item=row["item"], old=row["detail"], new=new)
    return True


def next_open(database: Database, rater: int, after: int = -1) -> int | None:
    """The first place without a rating behind `after`, else the first of all; None: all are rated."""
    query = "SELECT place FROM slots WHERE rater = ? AND preference IS NULL AND place > ? ORDER BY place LIMIT 1"
    row = database.one(query, rater, after) or database.one(query, rater, -1)
    return None if row is None else row["place"]


def progress(database: Database, rater: int) -> tuple[int, int]:
    """How many places are rated, and how many there are."""
    last = database.one("SELECT place FROM slots WHERE rater = ? ORDER BY place DESC LIMIT 1", rater)
    total = last["place"] + 1 if last else 0
    row = database.one("SELECT COUNT(*) AS n FROM slots WHERE rater = ? AND preference IS NULL", rater)
    return total - (row["n"] if row else 0), total


@dataclass(frozen=True)
class Unblinded:
    """One rating with the models put back.

    Attributes:
        value: −2 to 2; above 0: the second of the study's models is better.
        unacceptable: of the first, of the second of the study's models.
        first_model: 0 or 1: whose answer was shown first.
        repeats: place of the slot that this one repeats, or None.
    """

    rater: int
    place: int
    item: int
    item_id: str
    section: str
    target: str
    value: int
    reasons: tuple[str, ...]
    unacceptable: tuple[bool, bool]
    comment: str
    first_model: int
    repeats: int | None
    rated_at: str


def unblinded(database: Database) -> list[Unblinded]:
    """Every rating there is, by rater and place."""
    rows = database.all(
        "SELECT slots.*, items.id, items.section, items.target FROM slots JOIN items ON items.number = slots.item "
        "WHERE preference IS NOT NULL ORDER BY rater, place"
    )
    found: list[Unblinded] = []
    for row in rows:
        rating, turned = Rating.from_json(row["detail"]), row["first_model"] == 1
        found.append(
            Unblinded(
                row["rater"], row["place"], row["item"], row["id"], row["section"], row["target"],
                -rating.preference if turned else rating.preference,
                rating.reasons,
                (rating.unacceptable[1], rating.unacceptable[0]) if turned else rating.unacceptable,
                rating.comment, row["first_model"], row["repeats"], row["rated_at"],
            )
        )  # fmt: skip
    return found
