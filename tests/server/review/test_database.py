"""The review's file: its version, its trail, and what happens to one that was changed."""

import sqlite3
from pathlib import Path

import pytest
from wardround.common.errors import VerificationError
from wardround.server.review import raters
from wardround.server.review.database import FILE, SCHEMA, Database
from wardround.server.review.items import ReviewError
from wardround.server.review.ratings import Rating, next_open, pair_at, progress, rate

from .study_case import MODELS, study


def test_the_trail_cannot_be_changed_and_holds_no_secret(tmp_path: Path) -> None:
    with study(tmp_path, 4) as database:
        token = raters.invite(database, "Kim")
        rate(database, 1, 0, Rating(1, comment="why"))
        for statement in ("UPDATE trail SET action = 'x'", "DELETE FROM trail"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"), database.transaction():
                database.write(statement)
        entries = database.trail()
        assert [(entry.n, entry.rater, entry.action) for entry in entries] == [
            (1, None, "study made"), (2, 1, "invited"), (3, 1, "rated"),
        ]  # fmt: skip
        told = str(entries)
        assert (
            token not in told and database.facts.seed.hex() not in told and not any(model in told for model in MODELS)
        )


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE trail SET time = '2020' WHERE n = 2", "entry 2 of the trail"),
        ("DELETE FROM trail WHERE n = 2", "entry 2 of the trail"),
        ("UPDATE trail SET new = replace(new, '1', '2') WHERE n = 3", "entry 3 of the trail"),
        (
            "UPDATE slots SET preference = -2, detail = replace(detail, '1', '-2') WHERE place = 0",
            "the ratings are not",
        ),
        ("UPDATE slots SET preference = NULL WHERE place = 0", "the ratings are not"),
        ("DELETE FROM trail WHERE n = 3", "the ratings are not"),
    ],
)
def test_whoever_changed_the_file_by_hand_is_found_out(tmp_path: Path, statement: str, words: str) -> None:
    with study(tmp_path, 4) as database:
        raters.invite(database, "Kim")
        rate(database, 1, 0, Rating(1))
    with sqlite3.connect(tmp_path / "study" / FILE) as sql:
        sql.executescript(f"DROP TRIGGER trail_stays; DROP TRIGGER trail_keeps; {statement};")
    with Database.open(tmp_path / "study") as database, pytest.raises(VerificationError, match=words):
        database.trail()


def test_another_version_another_program_and_a_damaged_file_are_refused(tmp_path: Path) -> None:
    study(tmp_path, 2).close()
    path = tmp_path / "study" / FILE
    with sqlite3.connect(path) as sql:
        sql.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(ReviewError, match=f"of schema {SCHEMA + 1}; this wardround reads {SCHEMA}"):
        Database.open(tmp_path / "study")
    other = tmp_path / "other"
    other.mkdir()
    sqlite3.connect(other / FILE).execute("CREATE TABLE t (x)").connection.close()
    with pytest.raises(ReviewError, match="another program's file"):
        Database.open(other)
    (other / FILE).write_bytes(b"not a database at all, but long enough to be one" * 100)
    with pytest.raises(ReviewError, match="cannot be read as a review"):
        Database.open(other)
    with pytest.raises(ReviewError, match="no review is there"):
        Database.open(tmp_path)


def test_a_review_is_made_in_an_empty_folder_only(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.doc").write_text("mine")
    with pytest.raises(ReviewError, match="holds files, and no review"):
        study(tmp_path, 2)
    assert [path.name for path in (tmp_path / "study").iterdir()] == ["thesis.doc"]


def test_a_kill_while_a_study_is_made_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "review.new").write_bytes(b"half")
    with study(tmp_path, 2) as database:
        assert database.facts.items == 2
    assert not (tmp_path / "study" / "review.new").exists()


def test_names_are_checked_and_belong_to_one_rater(tmp_path: Path) -> None:
    with study(tmp_path, 2) as database:
        raters.invite(database, "Dr  Kim")
        for name, words in (
            ("dr kim", "invited already"),
            ("", "1 to 80"),
            ("x" * 81, "1 to 80"),
            ("a\x1bb", "1 to 80"),
        ):
            with pytest.raises(ReviewError, match=words):
                raters.invite(database, name)
        with pytest.raises(ReviewError, match="is not invited"):
            raters.invite_again(database, "Dr Park")
        assert [one.name for one in raters.raters(database)] == ["Dr Kim"]


def test_the_next_open_pair_is_the_one_behind_then_the_first_of_all(tmp_path: Path) -> None:
    with study(tmp_path, 4, share=0.0) as database:
        raters.invite(database, "Kim")
        assert next_open(database, 1) == 0 and progress(database, 1) == (0, 4)
        rate(database, 1, 2, Rating(0))
        assert next_open(database, 1, after=1) == 3 and next_open(database, 1, after=3) == 0
        for place in (0, 1, 3):
            rate(database, 1, place, Rating(0))
        assert next_open(database, 1) is None and progress(database, 1) == (4, 4)
        assert pair_at(database, 1, 4) is None and pair_at(database, 2, 0) is None


def test_what_a_page_asks_of_the_database_scans_no_table(tmp_path: Path) -> None:
    with study(tmp_path, 4) as database:
        raters.invite(database, "Kim")
        asked: list[str] = []
        database._sql.set_trace_callback(asked.append)
        pair_at(database, 1, 1)
        progress(database, 1)
        next_open(database, 1, 1)
        rate(database, 1, 1, Rating(0))
        raters.by_session(database, "x")
        raters.by_token(database, "x")
        database._sql.set_trace_callback(None)
        queries = [one for one in asked if one.startswith(("SELECT", "UPDATE"))]
        assert len(queries) >= 8
        for query in queries:
            plan = [row["detail"] for row in database.all(f"EXPLAIN QUERY PLAN {query}")]
            # The newest entry of the trail is read backwards along its key, one row.
            assert all(step.startswith("SEARCH") or "LIMIT 1" in query for step in plan), (query, plan)
