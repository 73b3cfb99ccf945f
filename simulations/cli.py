"""`wardround simulate`: hospitals and coordinator on this one machine. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .audit.cli import audit
from .experiments.cli import experiment

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=_SETTINGS)
def simulate() -> None:
    """Hospitals and coordinator on this one machine."""


simulate.add_command(audit)
simulate.add_command(experiment)


@simulate.command(
    epilog="Examples: wardround simulate run demo --out runs/demo   ·   "
    "wardround simulate run configs/demo.toml --out runs/large --set simulation.sites=8 --set warmup.adapter=none"
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The run's folder.")
@click.option("--resume", is_flag=True, help="Continue the run in --out; a finished one is shown again.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key; `none` unsets it.")
@click.option("--json", "as_json", is_flag=True, help="Print evaluation.json instead of the table; no progress.")
def run(config: Path, out: Path, resume: bool, overrides: tuple[str, ...], as_json: bool) -> None:
    """Run CONFIG (a TOML file, or the name of a shipped one) from registry to report.

    Writes config.resolved.toml, schema.json, rounds.jsonl, adapter/, model/, evaluation.json, report.html and
    journal/ to --out. Ctrl-C or a crash loses at most the phase under way: the same command with --resume continues.
    """
    from ..common import config as configs
    from ..common.cli import limit_threads

    settings = configs.load_run(config, overrides)
    limit_threads(settings.speed.threads)  # before torch is imported
    from ..server.evaluate import baselines, table, verdict, without_warmup
    from .federation import simulate
    from .progress import TerminalProgress

    try:
        if as_json:
            click.echo(json.dumps(simulate(settings, out, resume=resume), sort_keys=True))
            return
        with TerminalProgress(settings.federation.rounds) as progress:
            evaluation = simulate(settings, out, resume=resume, progress=progress, on_step=progress.stepped)
    except KeyboardInterrupt:
        raise click.exceptions.Abort("The same command with --resume continues the run.") from None
    if not settings.warmup.enabled:
        evaluation = without_warmup(evaluation)
    from rich.console import Console

    Console(soft_wrap=True).print(table(evaluation))
    click.echo(verdict(evaluation))
    click.echo(baselines(evaluation))
    click.echo(f"report: {out / 'report.html'}")


@simulate.command(epilog="Example: wardround simulate registry support_icu --out data")
@click.argument("name")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the table and its dictionary.")
def registry(name: str, out: Path) -> None:
    """Build an open registry from installed packages: table.parquet and dictionary.toml in --out.

    NAME: support_icu, smart or copenhagen_stroke.
    """
    from . import registries

    for path in registries.write(name, out):
        click.echo(path)
