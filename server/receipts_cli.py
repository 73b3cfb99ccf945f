"""`wardround server receipts`: whether the coordinator's receipts of a run and the hospitals' ledgers agree.

Mounted by server/cli.py. Enters: a run's folder, the roster, ledgers that hospitals gave. Leaves: nothing. Needs no
key: whoever has these files can check.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.group()
def receipts() -> None:
    """What the coordinator signed for, and what the hospitals wrote down."""


@receipts.command(
    epilog="Example: wardround server receipts check run north.jsonl south.jsonl east.jsonl --roster roster-3.json"
    "   ·   a simulated run: wardround server receipts check runs/demo runs/demo/sites/*/state/ledger.jsonl"
)
@click.argument("run_folder", type=_PATH)
@click.argument("ledgers", type=_PATH, nargs=-1, required=True)
@click.option("--roster", type=_PATH, default=None, help="The consortium's roster; a simulated run has its own.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def check(run_folder: Path, ledgers: tuple[Path, ...], roster: Path | None, as_json: bool) -> None:
    """Check that the receipts of the run in RUN_FOLDER and the LEDGERS of its hospitals agree.

    A ledger is a hospital's state/ledger.jsonl as it is; the key that signed it says whose it is. Everything that the
    coordinator received must be recorded, and everything recorded must have been received, but for what may have been
    lost: the last reply, one at every start of the coordinator, and what it noted as lost. Exit 2 where they do not.
    """
    from ..common.errors import ConfigError, UserError, VerificationError
    from ..common.roster import Roster
    from .receipts import check as compare
    from .receipts import describe, read_run

    file = roster or run_folder / "sites" / "roster.json"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file: name the consortium's roster with --roster")
    run_id, found, losses = read_run(run_folder)
    try:
        members = Roster.parse(file.read_bytes(), str(file))
        given = {str(path): _read(path) for path in ledgers}
        agreements = compare(found, run_id, given, members, losses)
    except VerificationError as error:
        raise UserError(str(error)) from None
    if as_json:
        content = [vars(agreement) for agreement in agreements]
        click.echo(json.dumps({"run": run_id, "starts": found.starts, "sites": content}, indent=1))
    else:
        for agreement in agreements:
            click.echo(describe(agreement))
    problems = [f"{agreement.site}: {problem}" for agreement in agreements for problem in agreement.problems]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        if not as_json:
            for problem in problems[1:]:
                click.echo(problem, err=True)
        raise UserError(problems[0] + more)


def _read(path: Path) -> bytes:
    from ..common.errors import ConfigError

    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: ledger: cannot be read: {(error.strerror or '').lower()}") from None
