"""`wardround client`: a hospital's commands. Heavy imports happen inside the commands.

What these commands print is for the hospital's own screen: `questions` shows records of patients, `check` shows counts,
columns and rows but no patient's value.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .deploy_cli import COMMANDS, check_site
from .identity_cli import card, roster, rotate
from .ledger_cli import ledger
from .policy_cli import policy

if TYPE_CHECKING:
    from rich.console import Console

    from ..common.config import MappingConfig
    from ..common.dictionary import Dictionary
    from .opt_out import OptOut
    from .quality import Quality

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_PATH = click.Path(path_type=Path)
_SITE_HELP = "This hospital's site.toml: its own column names, units and level codes."


@click.group(context_settings=_SETTINGS)
def client() -> None:
    """One hospital: its registry, dictionary and questions; the final model it gets from a run."""


for command in (*COMMANDS, card, roster, rotate, ledger, policy):
    client.add_command(command)


def _mapping(site: Path | None) -> MappingConfig:
    from ..common.config import MappingConfig, load_site

    return MappingConfig() if site is None else load_site(site).mapping


def _opted_out(site: Path | None, dictionary: Dictionary) -> OptOut:
    """Who opted out, by a site.toml's policy; nobody without one."""
    from ..common.config import load_site
    from ..common.errors import RefusedError, UserError
    from .opt_out import NOBODY, opted_out

    if site is None:
        return NOBODY
    try:
        return opted_out(load_site(site), site.resolve().parent, dictionary)
    except RefusedError as error:
        raise UserError(str(error)) from None


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@client.command(
    epilog="Example: wardround client check   ·   wardround client check icu.csv dictionary.toml --site site.toml   "
    "·   DICTIONARY may be the name of a shipped one: support_icu, smart, copenhagen_stroke"
)
@click.argument("table", type=_PATH, required=False)
@click.argument("dictionary", type=_PATH, required=False)
@click.option("--site", type=_PATH, default=None, help=_SITE_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def check(table: Path | None, dictionary: Path | None, site: Path | None, as_json: bool) -> None:
    """Check this hospital's whole setup, or TABLE (CSV, TSV or Parquet) against DICTIONARY.

    Without arguments: registry, policy, keys, ledger, roster, versions, network, clock, disk, GPU and base model of
    site.toml, a line each with what to do; exit 1 where one is wrong.

    With both: the table's data quality. Exit 0 when clean. Direct identifiers, features that look like outcomes, levels
    that the dictionary does not know, missing or constant columns and wrong units end with exit 2 and a line each. No
    patient's value is printed, only columns and rows. With --site, how many patients on its list opted out, and how
    many ids on it are not in TABLE.
    """
    from ..common.config import load_site
    from ..common.dictionary import load_dictionary
    from ..common.errors import ConfigError
    from .opt_out import NOBODY
    from .policy import check_targets
    from .quality import assess
    from .registry import describe_mapping, read_registry

    if table is None:
        check_site(site or Path("site.toml"), as_json)
        return
    if dictionary is None:
        raise ConfigError(f"{table}: expected its DICTIONARY as well, or neither: then this site is checked")
    described, mapping = load_dictionary(dictionary), _mapping(site)
    if site is not None:
        check_targets(load_site(site).policy, described)
    left = _opted_out(site, described)
    quality = assess(table, described, mapping)
    lines = list(describe_mapping(mapping, described))
    opted_out = None
    if left != NOBODY and not quality.errors:
        unknown = left.unknown(read_registry(table, described, mapping))
        opted_out = {"patients": len(left.ids) - unknown, "not_in_table": unknown}
    if as_json:
        content = quality.to_dict() | {
            "mapping": [dict(zip(("entry", "local", "done"), line, strict=True)) for line in lines],
            "opted_out": opted_out,
        }
        click.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _print_quality(table, described, quality, lines)
        if opted_out is not None:
            click.echo(
                f"opted out: {opted_out['patients']} patients of this table are never read (the figures above are with "
                f"them); {opted_out['not_in_table']} more ids on the list are no patient's here"
            )
    for finding in quality.errors:
        click.echo(f"error: {table}: {finding.text}", err=True)
    if quality.errors:
        sys.exit(2)


def _print_quality(table: Path, dictionary: Dictionary, quality: Quality, mapping: list[tuple[str, str, str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = _console()
    console.print(
        f"{escape(str(table))}: {quality.rows} rows, {quality.patients} patients; dictionary '{dictionary.name}'"
    )
    if mapping:
        shown = Table(title="Mapping (site.toml)", title_justify="left")
        for heading in ("dictionary", "this hospital", "what is done"):
            shown.add_column(heading)
        for line in mapping:
            shown.add_row(*map(escape, line))
        console.print(shown)
    if quality.columns:
        shown = Table(title="Data quality", title_justify="left")
        shown.add_column("column")
        shown.add_column("label")
        shown.add_column("kind")
        for heading in ("missing", "sentinel", "out of range", "unknown levels", "distinct"):
            shown.add_column(heading, justify="right")
        for column in quality.columns:
            kind = "outcome" if column.role == "outcome" else column.kind
            shares = [f"{share:.1%}" if share else "·" for share in (column.missing, column.sentinel)]
            counts = [str(n) if n else "·" for n in (column.out_of_range, column.unknown_levels)]
            shown.add_row(escape(column.name), escape(column.label), kind, *shares, *counts, str(column.distinct))
        console.print(shown)
    for finding in quality.findings:
        if finding.level == "note":
            console.print(f"note: {escape(finding.text)}", soft_wrap=True)
    if dictionary.drafted_from:
        console.print("note: a draft (drafted_from): private runs refuse it until the consortium has reviewed it")
    if quality.not_described:
        names = ", ".join(quality.not_described)
        console.print(f"note: not in the dictionary, never read: {escape(names)}", soft_wrap=True)
    console.print("clean" if not quality.errors else f"{len(quality.errors)} error(s)")


@client.command(
    "dictionary",
    epilog="Example: wardround client dictionary icu.csv --out dictionary.toml   ·   "
    "wardround client dictionary export.csv --redcap DataDictionary.csv --out dictionary.toml",
)
@click.argument("table", type=_PATH)
@click.option("--out", type=_PATH, default=None, help="Write here instead of to the screen; must not exist yet.")
@click.option("--redcap", type=_PATH, default=None, help="REDCap data dictionary (18-column CSV) that describes TABLE.")
@click.option("--id", "id_column", default=None, help="The patient id column, where its name does not tell.")
def dictionary_command(table: Path, out: Path | None, redcap: Path | None, id_column: str | None) -> None:
    """Draft a data dictionary for TABLE, or import REDCap's.

    Kinds, levels, decimals and ranges come from the table, rounded outward; lines marked TODO wait for a person. What
    looks like an outcome, or like what follows from one, is set aside and named.
    """
    from ..common.dictionary import dump_dictionary
    from ..common.errors import DictionaryError
    from ..common.files import write_atomic

    if out is not None and out.exists():
        raise DictionaryError(f"{out}: exists already; a draft does not overwrite a dictionary")
    if redcap is not None:
        from .redcap import import_redcap

        drafted = import_redcap(redcap, table)
    else:
        from .drafting import draft

        drafted = draft(table, id_column)
    text = dump_dictionary(drafted.dictionary, drafted.notes)
    if out is None:
        click.echo(text, nl=False)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, text.encode(), mode=0o644)
    click.echo(f"{len(drafted.dictionary.features)} entries, {drafted.n_todo} wait for a person (TODO)", err=True)
    if drafted.set_aside:
        click.echo(drafted.set_aside_line, err=True)


@client.command(epilog="Example: wardround client questions table.parquet support_icu -n 5 --prompt en_short")
@click.argument("table", type=_PATH)
@click.argument("dictionary", type=_PATH)
@click.option("-n", "--number", type=click.IntRange(1), default=5, show_default=True, help="How many questions.")
@click.option(
    "--prompt", default="en", show_default=True, help="Prompt template: en, en_short, en_usual, ko, or a TOML file."
)
@click.option("--features", type=click.IntRange(1), default=None, help="Most features a record shows.")
@click.option("--reasoning", is_flag=True, help="As asked with step-by-step reasoning.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--site", type=_PATH, default=None, help=_SITE_HELP)
def questions(
    table: Path,
    dictionary: Path,
    number: int,
    prompt: str,
    features: int | None,
    reasoning: bool,
    seed: int,
    site: Path | None,
) -> None:
    """Show questions made from TABLE as the model will see them, with the truth marked.

    These are records of this hospital's patients: for its own screen only. Options and hidden features come from this
    table's own counts; in a run they come from all hospitals' summed counts.
    """
    import numpy as np

    from ..common.config import QuestionsConfig
    from ..common.counts import count
    from ..common.dictionary import load_dictionary
    from ..common.errors import RegistryError
    from ..common.question import LETTERS, chat, load_prompt, prefill
    from ..common.schema import derive_schema
    from .questions import QuestionBuilder
    from .registry import read_registry

    described, template = load_dictionary(dictionary), load_prompt(prompt)
    settings = QuestionsConfig() if features is None else QuestionsConfig(features_per_record=features)
    registry = _opted_out(site, described).apply(read_registry(table, described, _mapping(site)))
    schema = derive_schema(count(registry.values, described), described, settings)
    rng = np.random.default_rng(seed)
    # Rows without anything to ask are skipped, so more are offered than are needed.
    rows = rng.permutation(len(registry))[: 20 * number]
    asked = QuestionBuilder(registry, schema, template, settings).build(rows, rng)[:number]
    if not asked:
        raise RegistryError(f"{table}: no row has a value to ask and another to show")
    click.echo(
        f"Options and hidden features come from this table's own counts ({len(registry)} rows); in a run they come "
        "from all hospitals' summed counts.\n"
    )
    for position, question in enumerate(asked, start=1):
        hidden = ", ".join(schema.hidden[question.target]) or "none"
        click.echo(f"── {position} of {len(asked)} · {question.kind} '{question.target}' · {question.section} ──")
        for message in chat(template, question):
            click.echo(f"[{message['role']}]\n{message['content']}")
        click.echo(f"[assistant]\n{prefill(template, reasoning)}")
        letter = LETTERS[question.answer]
        click.echo(f"→ truth: {letter} ({question.options[question.answer]}) · never shown with it: {hidden}\n")
    if len(asked) < number:
        click.echo(f"{len(asked)} of {number}: no more rows have something to ask", err=True)


@client.command(epilog="Example: wardround client merge site.toml 0f9a… --out model")
@click.argument("site_toml", type=_PATH)
@click.argument("run_id")
@click.option("--out", required=True, type=_PATH, help="Folder for the model; must not exist yet.")
@click.option("--base", default=None, help="The base model, where it is not where it was during the run.")
def merge(site_toml: Path, run_id: str, out: Path, base: str | None) -> None:
    """Merge the final adapter of run RUN_ID, as it came to this site, into the base model.

    Its digest is compared with the one that this site confirmed, the base model's with the run's, and the merged model
    with base and adapter. RUN_ID is the name of a folder in the site's state/runs, and stands in the run's run.json.
    """
    from .merge import merge as work

    digest = work(site_toml, run_id, out, base)
    click.echo(f"{out}\nadapter {digest}: the digest in the run's report and model card")
