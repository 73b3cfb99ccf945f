"""`wardround client ledger`: the record of everything that left this hospital. Mounted by client/cli.py.

Enters: site.toml, and for `verify` receipts that the coordinator gave. Leaves: nothing; text and files for the
hospital's own people. No command needs the passphrase: public keys are enough to check signatures.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..common.config import SiteConfig
    from .ledger import Ledger

_PATH = click.Path(path_type=Path)
COLUMNS = (
    "n", "time", "kind", "run", "round", "phase", "purpose", "bytes", "total", "sha256", "code", "registry",
    "event", "orders", "receipt", "dropped_torn_bytes", "previous", "signature",
)  # fmt: skip


@click.group()
def ledger() -> None:
    """The record of everything that left this hospital, and of the privacy budget it spent."""


@ledger.command(epilog="Example: wardround client ledger show site.toml")
@click.argument("site_toml", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print every entry as a line of JSON.")
def show(site_toml: Path, as_json: bool) -> None:
    """Print what left this site, what it refused and what it spent, oldest first."""
    record, _ = _ledger_of(site_toml)
    with _damage_is_an_answer():
        entries = list(record.entries())
    if as_json:
        for entry in entries:
            click.echo(json.dumps(entry, sort_keys=True))
        return
    click.echo(f"{record.path}: {len(entries)} entries" + (", times in UTC" if entries else ""))
    rows = [("n", "time", "run", "round", "phase", "bytes", "in all", "what")] if entries else []
    for entry in entries:
        moment = entry["time"][:19].replace("T", " ")  # written in UTC
        sizes = f"{entry['bytes']:,}", f"{entry['total']:,}"
        about = (str(entry["round"]), entry["phase"] or "–", *sizes, _what(entry))
        rows.append((str(entry["n"]), moment, entry["run"][:8], *about))
    # Lines as long as they are: a table would cut columns to fit a narrow terminal, which breaks a line at its end.
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:{'>' if i in (0, 3, 5, 6) else '<'}{widths[i]}}" for i, cell in enumerate(row)]
        click.echo("  ".join(cells).rstrip())


def _what(entry: Mapping[str, Any]) -> str:
    if entry["kind"] != "spend":
        return f"{entry['kind']}: {entry['code'] or entry['purpose']}"
    numbers = ", ".join(f"{key} {value}" for key, value in sorted(entry["event"].items()) if key != "kind")
    return f"spend: {entry['event']['kind']} ({numbers}), {entry['purpose']}"


@ledger.command(
    epilog="Example: wardround client ledger verify site.toml   ·   with receipts that the coordinator sent: "
    "wardround client ledger verify site.toml --receipts receipts.jsonl"
)
@click.argument("site_toml", type=_PATH)
@click.option(
    "--receipts", type=_PATH, default=None, help="The coordinator's journal/receipts.jsonl, or its last line."
)
def verify(site_toml: Path, receipts: Path | None) -> None:
    """Check that no entry was changed, removed, inserted or moved, every signature, and the receipts in it.

    Exit 2 with the first line that is not what was written. A ledger that was cut at its end is whole by itself: that
    is found where an entry that spent privacy budget is missing, and where the coordinator has a receipt for a reply
    that is not there (--receipts). What came after both, this command cannot miss.
    """
    from ..common.identity import fingerprint

    record, config = _ledger_of(site_toml)
    with _damage_is_an_answer():
        checked = record.verified()
        count = len(checked.entries)
        lines = [f"{record.path}: {count} entr{'y' if count == 1 else 'ies'}, each as it was written"]
        if checked.signer:
            lines.append(f"signed by {fingerprint(checked.signer)}")
        if count:
            lines.append(_confirmed(site_toml, config, checked.entries))
        if receipts is not None:
            lines.append(_compare(receipts, config, record))
        elif count:
            lines.append(
                f"whether entries after line {count} were cut off, this ledger cannot show: the coordinator's receipts "
                "can (--receipts), up to its newest"
            )
    for line in lines:
        click.echo(line)


def _confirmed(site_toml: Path, config: SiteConfig, entries: list[dict[str, Any]]) -> str:
    """A sentence on the receipts in the ledger, each of which is checked."""
    from ..common.errors import ConfigError, VerificationError
    from ..common.receipt import Receipt
    from .identity import SiteKeys

    held = [(entry["n"], entry["receipt"]) for entry in entries if "receipt" in entry]
    if not held:
        return "no receipt of the coordinator is in it"
    try:
        coordinator = SiteKeys(site_toml.resolve().parent, config).roster().coordinator
    except (ConfigError, VerificationError) as error:
        return f"{len(held)} receipts in it were not checked: {error}"
    good: list[int] = []
    for line, one in held:
        if not 1 <= one["n"] < line:
            raise VerificationError(f"line {line}: its receipt is for line {one['n']}, which is not before it")
        told = entries[one["n"] - 1]
        about = (told["run"], told["round"], told["phase"], config.name, told["bytes"], told["sha256"])
        with suppress(VerificationError):
            Receipt(one["number"], *about, bytes.fromhex(one["signature"])).verify(coordinator)
            good.append(one["n"])
    wrong, replies = len(held) - len(good), "reply" if len(good) == 1 else "replies"
    text = f"the coordinator confirmed {len(good)} {replies}" + (f", the last of them line {max(good)}" if good else "")
    return text + (f"; {wrong} more are signed by another key than the pinned roster's" if wrong else "")


def _compare(path: Path, config: SiteConfig, record: Ledger) -> str:
    """Looks up every receipt for this site in a file."""
    from ..common.errors import ConfigError, LedgerBehindError, ProtocolError, VerificationError
    from ..common.receipt import Receipt

    try:
        texts = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"--receipts {path}: expected a file of receipts from the coordinator") from None
    found = 0
    coordinator = None
    for number, text in enumerate(texts, start=1):
        if text.startswith('{"start":') or not text:
            continue
        try:
            receipt = Receipt.parse(text)
        except ProtocolError:
            raise ConfigError(f"--receipts {path}: line {number} is not a receipt") from None
        if receipt.site != config.name:
            continue
        if coordinator is None:
            from .identity import SiteKeys

            coordinator = SiteKeys(record.head.parent, config).roster().coordinator
        receipt.verify(coordinator)
        try:
            record.confirm(receipt)
        except LedgerBehindError as error:
            raise VerificationError(str(error)) from None
        found += 1
    return f"{path}: {found} receipts for {config.name}, each for a reply that is in the ledger"


@ledger.command(
    epilog="Example: wardround client ledger export site.toml --out ledger.csv   ·   "
    "one run, as JSON lines: wardround client ledger export site.toml --run 0f9a --format jsonl"
)
@click.argument("site_toml", type=_PATH)
@click.option("--out", type=_PATH, default=None, help="Write here instead of to the screen; must not exist yet.")
@click.option("--format", "kind", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True)
@click.option("--run", "run_id", default=None, help="Only this run's entries; the beginning of its id is enough.")
def export(site_toml: Path, out: Path | None, kind: str, run_id: str | None) -> None:
    """Write the ledger, checked, as a table or as JSON lines for whoever audits this hospital.

    Nothing in it says anything of a patient. The exported file is a copy: what proves something is the ledger itself.
    """
    from ..common.errors import ConfigError
    from ..common.files import write_atomic

    if out is not None and out.exists():
        raise ConfigError(f"{out}: exists already; an export does not overwrite a file")
    record, _ = _ledger_of(site_toml)
    with _damage_is_an_answer():
        entries = [entry for entry in record.entries() if run_id is None or entry["run"].startswith(run_id)]
    text = _csv(entries) if kind == "csv" else "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in entries)
    if out is None:
        click.echo(text, nl=False)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text.encode())
    click.echo(f"{out}: {len(entries)} entries", err=True)


def _csv(entries: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in entries:
        values = (entry.get(column, "") for column in COLUMNS)
        writer.writerow([json.dumps(value, sort_keys=True) if isinstance(value, dict) else value for value in values])
    return file.getvalue()


def _ledger_of(site_toml: Path) -> tuple[Ledger, SiteConfig]:
    """The ledger of a site; nothing is made."""
    from ..common.config import load_site
    from .folder import Site

    config = load_site(site_toml)
    return Site(site_toml.resolve().parent, config).ledger, config


@contextmanager
def _damage_is_an_answer() -> Iterator[None]:
    """A damaged ledger ends these commands with its line and exit 2: they were asked, they have not failed."""
    from ..common.errors import UserError, VerificationError

    try:
        yield
    except VerificationError as error:
        raise UserError(str(error)) from None
