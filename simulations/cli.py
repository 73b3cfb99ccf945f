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
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="A finished run without differential privacy: the report says what privacy cost beside it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print evaluation.json instead of the table; no progress.")
def run(
    config: Path, out: Path, resume: bool, overrides: tuple[str, ...], reference: Path | None, as_json: bool
) -> None:
    """Run CONFIG (a TOML file, or the name of a shipped one) from registry to report.

    Writes config.resolved.toml, schema.json, rounds.jsonl, adapter/, model/, evaluation.json, report.html and
    journal/ to --out. Ctrl-C or a crash loses at most the phase under way: the same command with --resume continues.
    """
    from ..common import config as configs
    from ..common.cli import limit_threads
    from ..common.errors import ConfigError

    settings = configs.load_run(config, overrides)
    limit_threads(settings.speed.threads)  # before torch is imported
    from ..server.evaluate import baselines, table, verdict, without_warmup
    from ..server.report import check_reference, refer
    from ..server.task_tables import lines
    from .federation import simulate
    from .progress import TerminalProgress

    if reference is not None:
        if not settings.privacy.enabled:
            raise ConfigError("--reference: only of use to a run with differential privacy; this config has it off")
        check_reference(reference)
    try:
        if as_json:
            evaluation = simulate(settings, out, resume=resume)
            if reference is not None:
                refer(out, reference)
            click.echo(json.dumps(evaluation, sort_keys=True))
            return
        with TerminalProgress(settings.federation.rounds) as progress:
            evaluation = simulate(settings, out, resume=resume, progress=progress)
    except KeyboardInterrupt:
        raise click.exceptions.Abort("The same command with --resume continues the run.") from None
    if reference is not None:
        refer(out, reference)
    if not settings.warmup.enabled:
        evaluation = without_warmup(evaluation)
    from rich.console import Console

    Console(soft_wrap=True).print(table(evaluation))
    click.echo(verdict(evaluation))
    click.echo(baselines(evaluation))
    for line in lines(evaluation):
        click.echo(line)
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


@simulate.command(
    epilog="Examples: wardround simulate deploy --out runs/deploy   ·   "
    "wardround simulate deploy my-run.toml --out runs/deploy --keep   ·   "
    "wardround simulate deploy --set simulation.sites=5 --stock 1 --out runs/deploy"
)
@click.argument("config", type=click.Path(path_type=Path), default=Path("deploy-demo"))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder for everybody's folders.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key; `none` unsets it.")
@click.option(
    "--stock", type=click.IntRange(0), default=0, show_default=True, metavar="N",
    help="So many of the hospitals run Flower's own flower-supernode and flower-superexec, not `client start`.",
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave coordinator and hospitals running afterwards, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print evaluation.json instead of the table; no progress.")
def deploy(config: Path, out: Path, overrides: tuple[str, ...], stock: int, keep: bool, as_json: bool) -> None:
    """Deploy a consortium for real on this machine, from nothing, and run CONFIG on it.

    A coordinator and hospitals as processes of their own over TLS on loopback, set up, enrolled, started and run by the
    very commands that docs/deployment.md gives to people; each is shown. CONFIG is a TOML file or the name of a shipped
    one; its [simulation] says how many hospitals, and whose patients.
    """
    import signal

    from ..common import config as configs
    from ..common.errors import ConfigError
    from ..server.evaluate import baselines, table, verdict, without_warmup
    from . import deployment

    settings = configs.load_run(config, overrides)
    if stock > settings.simulation.sites:
        raise ConfigError(f"--stock: expected at most simulation.sites = {settings.simulation.sites}, got {stock}")
    tell = (lambda line: click.echo(f"$ {line}", err=True)) if not as_json else (lambda _line: None)
    with deployment.deployment(out, settings, tell, stock) as made:
        made.run(follow=None if as_json else lambda line: click.echo(f"    {line}", err=True))
        evaluation = json.loads((made.run_folder / "evaluation.json").read_bytes())
        if as_json:
            click.echo(json.dumps(evaluation, sort_keys=True))
        else:
            shown = evaluation if settings.warmup.enabled else without_warmup(evaluation)
            from rich.console import Console

            Console(soft_wrap=True).print(table(shown))
            click.echo(verdict(shown))
            click.echo(baselines(shown))
            for what, path in deployment.where(made):
                click.echo(f"{what:<42} {path}")
        if keep:
            click.echo("running until Ctrl-C", err=True)
            try:
                signal.pause()
            except KeyboardInterrupt:
                click.echo("", err=True)


@simulate.command(epilog="Example: wardround simulate soak --out runs/soak --seed 3")
@click.argument("config", type=click.Path(path_type=Path), default=Path("soak"))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder for everybody's folders.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of who is killed, and when.")
@click.option(
    "--minutes", type=click.FloatRange(1, 600), default=30.0, show_default=True, help="It has to be over by then."
)
@click.option("--kills", type=click.IntRange(0), default=None, help="At most so many; as many as come.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key; `none` unsets it.")
def soak(config: Path, out: Path, seed: int, minutes: float, kills: int | None, overrides: tuple[str, ...]) -> None:
    """Deploy a consortium on this machine and kill its processes at random while it runs CONFIG.

    Ends with 1 when a round is not accounted for, a ledger does not verify or differs from the receipts, or memory
    grows. Writes soak.json.
    """
    from ..common import config as configs
    from . import faults

    settings = configs.load_run(config, overrides)
    result = faults.soak(
        settings, out, seed=seed, minutes=minutes, kills=kills, tell=lambda line: click.echo(line, err=True)
    )
    rounds = len(result["rounds"])
    click.echo(f"{len(result['kills'])} kills, {rounds} rounds in {result['seconds']:.0f} s; {out / 'soak.json'}")
    for defect in result["defects"]:
        click.echo(f"defect: {defect}")
    if result["defects"]:
        raise SystemExit(1)
