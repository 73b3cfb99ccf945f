"""`wardround server review`: experts compare two models' answers on pages of their own. Mounted by server/cli.py.

Enters: a file of items (server/review/items.py). Leaves: pages while it is started; tables and figures afterwards.
Tokens are printed once, on standard output, and kept nowhere.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .database import Database

_PATH = click.Path(path_type=Path)
_LISTEN = "127.0.0.1:8421"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@click.group()
def review() -> None:
    """Experts' blinded preference between two models' answers: pages, ratings, statistics."""


@review.command(
    epilog='Examples: wardround server review start study --items pairs.jsonl --data open --rater "Dr Kim" --rater "Dr '
    'Lee"   ·   go on: wardround server review start study'
)
@click.argument("folder", type=_PATH)
@click.option("--items", type=_PATH, default=None, help="The pairs, a JSON line each (docs/review.md); of a new study.")
@click.option(
    "--data", default=None, metavar="KIND", help="synthetic, consented or open; else the file's header says it."
)
@click.option("--title", default=None, help="As raters read it; it must not name a model.")
@click.option(
    "--twice", type=click.FloatRange(0.0, 0.5), default=None, help="Share of pairs that come a second time; 0.1."
)
@click.option("--rater", "--raters", "names", multiple=True, metavar="NAME", help="Invite this person; more than once.")
@click.option("--listen", default=_LISTEN, show_default=True, metavar="HOST:PORT", help="Others need a certificate.")
@click.option("--certificate", type=_PATH, default=None, help="TLS certificate, with its chain, PEM.")
@click.option("--key", type=_PATH, default=None, help="Its private key, PEM, not encrypted.")
def start(
    folder: Path,
    items: Path | None,
    data: str | None,
    title: str | None,
    twice: float | None,
    names: tuple[str, ...],
    listen: str,
    certificate: Path | None,
    key: Path | None,
) -> None:
    """Make the study in FOLDER, if --items says so, invite raters, and serve its pages until Ctrl-C.

    Each rater's token is printed once: hand it to that person only. A study keeps its items; everything that raters
    saved is there after a restart.
    """
    from .serve import address, serve

    where = address(listen, certificate, key)
    with _study(folder, items, data, title, twice) as database, _only_one(folder):
        _invite(database, names, again=False, known_is_fine=True)

        def ready(_server: object) -> None:
            facts = database.facts
            click.echo(f"{folder}: {facts.items} pairs, {facts.data} records; {where.url}  Ctrl-C ends", err=True)

        serve(database, where, ready)
    click.echo("stopped; `wardround server review start` goes on", err=True)


@contextmanager
def _study(
    folder: Path, items: Path | None, data: str | None, title: str | None, twice: float | None
) -> Iterator[Database]:
    """The study that is in FOLDER, or a new one."""
    from .database import FILE, Database
    from .items import ReviewError, read_study

    if items is None:
        if any(option is not None for option in (data, title, twice)):
            raise ReviewError("--data, --title and --twice belong to a new study: name its --items, or leave them out")
        with Database.open(folder) as database:
            yield database
        return
    study = read_study(items, data, title)
    if (folder / FILE).exists():
        with Database.open(folder) as database:
            facts, share = database.facts, database.facts.share if twice is None else twice
            same = (study.digest, study.data, share) == (facts.digest, facts.data, facts.share)
            if not same or title not in (None, facts.title):
                raise ReviewError(f"{folder}: holds a study of other items or settings; choose a new folder")
            yield database
        return
    if told := study.named_in_answers():
        what = f"in {told} of {len(study.items)} pairs an answer holds a model's name as a word, which raters will read"
        click.echo(f"warning: {what}; take it out, or rename the models in {items}", err=True)
    with Database.create(folder, study, 0.1 if twice is None else twice) as database:
        yield database


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    from ...common.supervisor import exclusive

    with exclusive(folder / "review.lock", "a review"):
        yield


def _invite(database: Database, names: Sequence[str], *, again: bool, known_is_fine: bool = False) -> None:
    """Prints a token for each name."""
    from . import raters

    known = {one.name.casefold() for one in raters.raters(database)}
    for name in names:
        if known_is_fine and name.casefold() in known:
            click.echo(
                f"{name}: has a token already; `wardround server review invite --again` makes a new one", err=True
            )
            continue
        token = raters.invite_again(database, name) if again else raters.invite(database, name)
        click.echo(f"{name}\t{token}")


@review.command(
    epilog='Example: wardround server review invite study "Dr Park"   ·   a lost token: … --again "Dr Park"'
)
@click.argument("folder", type=_PATH)
@click.argument("names", nargs=-1, required=True)
@click.option("--again", is_flag=True, help="A new token in the place of one that was lost; ratings stay.")
def invite(folder: Path, names: tuple[str, ...], again: bool) -> None:
    """Print a token for each of NAMES, once; also while the pages are served."""
    from .database import Database

    with Database.open(folder) as database:
        _invite(database, names, again=again)


@review.command(
    epilog="Examples: wardround server review judge study prometheus --pairs pairs.jsonl   ·   then: wardround server "
    "review judge study prometheus --ratings ratings.jsonl"
)
@click.argument("folder", type=_PATH)
@click.argument("name")
@click.option("--pairs", type=_PATH, default=None, help="Write here what the judge is to compare, blinded; a new file.")
@click.option("--ratings", type=_PATH, default=None, help="Read the judge's ratings from here.")
def judge(folder: Path, name: str, pairs: Path | None, ratings: Path | None) -> None:
    """Let a program rate, such as a local language model: NAME's pairs go out as JSON lines and come back rated.

    A judge has a sequence of its own, blinded as people's are. Its ratings are never counted with people's.
    """
    from . import judges
    from .database import Database
    from .items import ReviewError

    if (pairs is None) == (ratings is None):
        raise ReviewError("expected --pairs FILE, to write what is to be rated, or --ratings FILE, to read it back")
    with Database.open(folder) as database:
        if pairs is not None:
            text = judges.pairs(database, judges.judge(database, name))
            _write(pairs, text, f"{text.count(chr(10))} pairs")
        elif ratings is not None:
            count = judges.take(database, judges.known(database, name), ratings)
            click.echo(f"{ratings}: {count} ratings kept", err=True)


@review.command(
    epilog="Examples: wardround server review export study --out ratings.csv   ·   wardround server review export "
    "study --trail --format jsonl --out trail.jsonl"
)
@click.argument("folder", type=_PATH)
@click.option("--out", type=_PATH, default=None, help="Write here instead of to the screen; must not exist yet.")
@click.option("--format", "kind", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True)
@click.option("--names", is_flag=True, help="Raters' names in place of rater-1, rater-2, …")
@click.option("--trail", is_flag=True, help="The audit trail instead: who saved, changed, logged in and looked when.")
def export(folder: Path, out: Path | None, kind: str, names: bool, trail: bool) -> None:
    """Write every rating with the models' names put back, by item; the trail notes that you looked.

    In CSV, a text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    from . import results
    from .database import Database, Entry
    from .items import ReviewError
    from .raters import raters

    if out is not None and out.exists():
        raise ReviewError(f"{out}: exists already; an export does not overwrite a file")
    with Database.open(folder) as database, _damage_is_an_answer():
        entries = database.trail()
        if trail:
            who = {one.number: one.name if names else f"rater-{one.number}" for one in raters(database)}
            columns: Sequence[str] = tuple(Entry.__dataclass_fields__)
            table = [{**vars(one), "rater": None if one.rater is None else who[one.rater]} for one in entries]
            table = [{**row, "place": None if row["place"] is None else row["place"] + 1} for row in table]
        else:
            columns, table = results.COLUMNS, results.rows(database, names)
        text = (
            _csv(columns, table)
            if kind == "csv"
            else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table)
        )
        _look(database, "trail exported" if trail else "ratings exported")
    _write(out, text, f"{len(table)} {'entries' if trail else 'ratings'}")


@review.command(epilog="Example: wardround server review stats study   ·   wardround server review stats study --json")
@click.argument("folder", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print all figures as JSON.")
def stats(folder: Path, as_json: bool) -> None:
    """Print who was preferred, how sure that is, how far raters agree with each other and with themselves.

    The trail notes that you looked: a study that ends when its figures please says nothing.
    """
    from .database import Database
    from .results import statistics
    from .summary import describe

    with Database.open(folder) as database, _damage_is_an_answer():
        database.trail()
        found = statistics(database)
        _look(database, "statistics computed")
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    for line in describe(found):
        click.echo(line)


def _look(database: Database, action: str) -> None:
    with database.transaction():
        database.note(None, action)


def _csv(columns: Sequence[str], table: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    for row in table:
        writer.writerow([_cell(row[column]) for column in columns])
    return file.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        value = "; ".join(map(str, value))
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _write(out: Path | None, text: str, what: str) -> None:
    from ...common.files import write_atomic
    from .items import ReviewError

    if out is None:
        click.echo(text, nl=False)
        return
    if out.exists():
        raise ReviewError(f"{out}: exists already; it is not overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text.encode())
    click.echo(f"{out}: {what}", err=True)


@contextmanager
def _damage_is_an_answer() -> Iterator[None]:
    """A damaged trail ends these commands with its line and exit 2."""
    from ...common.errors import UserError, VerificationError

    try:
        yield
    except VerificationError as error:
        raise UserError(str(error)) from None
