"""`wardround simulate audit`. What is heavy is imported inside the command."""

from __future__ import annotations

import json
from pathlib import Path

import click

_PARTS = ("one-run", "membership", "inversion")


@click.command(
    epilog="Examples: wardround simulate audit --out runs/audit   ·   wardround simulate audit demo-private "
    "--out runs/audit-smollm2 --part one-run --epsilon 4"
)
@click.argument("config", type=click.Path(path_type=Path), default=Path("audit"))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The audit's folder.")
@click.option("--epsilon", "epsilons", default="1,2,4", show_default=True, help="The ε that are claimed.")
@click.option("--canaries", default=4000, show_default=True, type=click.IntRange(100), help="Of the one-run bound.")
@click.option(
    "--members", default=300, show_default=True, type=click.IntRange(20), help="Canary patients that are trained on."
)
@click.option("--part", "parts", multiple=True, type=click.Choice(_PARTS), help="Only this part; may be repeated.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key; `none` unsets it.")
@click.option("--json", "as_json", is_flag=True, help="Print audit.json instead of the table; no progress.")
def audit(
    config: Path,
    out: Path,
    epsilons: str,
    canaries: int,
    members: int,
    parts: tuple[str, ...],
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Attack what a private run lets out, and compare with the ε that it claims.

    CONFIG (a TOML file, or the name of a shipped one) is the run whose plan and model are audited. Three parts: a lower
    bound on ε from canary gradients in one run; membership inference with privacy off and on; reading a record from one
    hospital's update. Writes audit.json and audit.html. Ends with 1 when something was seen that the claimed ε rules
    out. Interrupted, the same command continues.
    """
    from ...common import config as configs
    from ...common.cli import limit_threads
    from ...common.errors import ConfigError

    settings = configs.load_run(config, overrides)
    try:
        claimed = tuple(float(epsilon) for epsilon in epsilons.split(","))
    except ValueError:
        claimed = ()
    if not claimed or not all(0 < epsilon <= 20 for epsilon in claimed):
        raise ConfigError(f"--epsilon: expected numbers up to 20 with commas between them, got '{epsilons}'")
    limit_threads(settings.speed.threads)  # before torch is imported
    from . import run

    chosen = run.Settings(
        epsilons=claimed,
        canaries=canaries,
        canary_members=members,
        parts=tuple(part for part in _PARTS if part in parts or not parts),
    )
    try:
        if as_json:
            result = run.audit(settings, out, chosen)
            click.echo(json.dumps(result, sort_keys=True))
        else:
            result = run.audit(settings, out, chosen, lambda text: click.echo(text, err=True))
            _print(result)
            click.echo(f"report: {out / 'audit.html'}")
    except KeyboardInterrupt:
        raise click.exceptions.Abort("The same command continues the audit.") from None
    if not result["passed"]:
        raise SystemExit(1)


def _print(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    if "one_run" in result:
        table = Table("one run", "claimed ε", "refuted below", "right", "could refute up to")
        for run in result["one_run"]:
            right = f"{run['right']} of {run['guesses']}"
            numbers = (f"{run[key]:.2f}" for key in ("claimed", "bound_epsilon", "most"))
            claimed, bound, most = numbers
            table.add_row(run["looks"], claimed, bound, right, most)
        console.print(table)
    if "membership" in result:
        table = Table("membership", "patients", "best attack", "AUC", "95 %", "permitted")
        for run in result["membership"]:
            for kind, group in run["groups"].items():
                attack, found = strongest(group)
                low, high = found["auc_ci95"]
                permitted = "–" if run["permitted_auc"] is None else f"{run['permitted_auc']:.3f}"
                claim = "off" if run["claimed"] is None else f"ε = {run['claimed']:.2f}"
                table.add_row(claim, kind, attack, f"{found['auc']:.3f}", f"{low:.3f} to {high:.3f}", permitted)
        console.print(table)
    if "inversion" in result:
        table = Table("one update", "values read", "of", "by chance", "answers read", "of", "by chance")
        for run in result["inversion"]:
            seen = run["seen"] if run["epsilon"] is None else f"{run['seen']}, ε = {run['epsilon']:g}"
            cells = [
                text
                for part in (run["values"], run["answers"])
                for text in (str(part["right"]), str(part["n"]), f"{part['chance'] * part['n']:.0f}")
            ]
            table.add_row(seen, *cells)
        console.print(table)
    for sentence in result["contradictions"]:
        click.echo(sentence)
    click.echo("No claim was contradicted." if result["passed"] else "A claim was contradicted.")


def strongest(group: dict) -> tuple[str, dict]:
    """The attack with the highest AUC on a group of patients, and what it found."""
    found = {name: values for name, values in group.items() if isinstance(values, dict)}
    name = max(found, key=lambda attack: found[attack]["auc"])
    return name, found[name]
