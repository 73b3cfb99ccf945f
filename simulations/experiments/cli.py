"""`wardround simulate experiment`: what was measured, to be measured again. Commands import what is heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

_OUT = click.option("--out", required=True, type=click.Path(path_type=Path), help="The experiment's folder.")
_SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON; no progress.")


@click.group()
def experiment() -> None:
    """Experiments over open registries; each continues where it was interrupted."""


@experiment.command(epilog="Example: wardround simulate experiment sanity --out runs/sanity")
@click.argument("config", type=click.Path(path_type=Path), default=Path("sanity"))
@_OUT
@_SET
@_JSON
def sanity(config: Path, out: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train on a synthetic registry with a known graph and compare with the best possible answers.

    CONFIG is a TOML file or a shipped one's name. Ends with 1 when a feature falls short.
    """
    from ...common import config as configs
    from ...common.cli import limit_threads

    settings = configs.load_run(config, overrides)
    limit_threads(settings.speed.threads)
    from ..progress import TerminalProgress
    from . import sanity as experiment

    if as_json:
        result = experiment.run(settings, out, resume=True)
        click.echo(json.dumps(result, sort_keys=True))
    else:
        with TerminalProgress(settings.federation.rounds) as progress:
            result = experiment.run(settings, out, resume=True, progress=progress)
        _print_sanity(result)
    if not result["passed"]:
        raise SystemExit(1)


def _print_sanity(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("feature", "n", "before", "final, %", "95 %", "chance", "best", "of the way", "", padding=(0, 0))
    for name, f in result["features"].items():
        low, high = f["ci95"]
        share = "–" if f["share"] is None else f"{f['share']:.2f}"
        numbers = (f"{100 * value:.1f}" for value in (f["warmup"], f["accuracy"]))
        verdict = "ok" if f["passed"] else "short"
        bounds = f"{100 * low:.1f} to {100 * high:.1f}", f"{100 * f['chance']:.1f}", f"{100 * f['best']:.1f}"
        table.add_row(name, str(f["n"]), *numbers, *bounds, share, verdict)
    Console(soft_wrap=True).print(table)
    click.echo(
        f"of the way: from chance to the best answer; {result['needed_share']:g} is asked. –: depends on nothing"
    )


@experiment.command(
    epilog="Example: wardround simulate experiment federated --out runs/federated --seeds 1,2,3   ·   "
    "wardround simulate experiment federated --out runs/f --seeds 1 --arms federated,centralised"
)
@click.argument("config", type=click.Path(path_type=Path), default=Path("learn"))
@_OUT
@click.option("--seeds", default="1,2,3", show_default=True, help="Of splits, partitions and draws.")
@click.option("--arms", default="federated,skewed,centralised,local", show_default=True, help="Which to train.")
@click.option("--beside", default="base,warmup,majority,ceiling", show_default=True, help="Which to compare with.")
@click.option("--questions", "per_patient", default=1, show_default=True, help="Questions of each held-out patient.")
@click.option(
    "--split",
    default="test",
    show_default=True,
    type=click.Choice(["test", "validation"]),
    help="Who is asked; settings are searched on validation patients.",
)
@click.option(
    "--jobs",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Arms at a time. On one GPU set speed.tokens_per_backward, which otherwise takes most of its memory.",
)
@_SET
@_JSON
def federated(
    config: Path,
    out: Path,
    seeds: str,
    arms: str,
    beside: str,
    per_patient: int,
    split: str,
    jobs: int,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Federated, skewed, centralised and local training on one registry, the same test questions for all.

    CONFIG is the federated arm's: a TOML file or a shipped one's name. Beside the arms stand the base and warmed-up
    model, the majority option, and gradient boosting on the same masked inputs.
    """
    from ...common import config as configs
    from ...common.cli import limit_threads
    from ...common.errors import ConfigError

    settings = configs.load_run(config, overrides)
    limit_threads(settings.speed.threads)
    from ..progress import TerminalProgress
    from . import federated as experiment

    def some(option: str, text: str, of: tuple[str, ...]) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = sorted(set(names) - set(of))
        if unknown:
            raise ConfigError(f"{option}: expected some of {', '.join(of)}, got '{unknown[0]}'")
        return names

    if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
        raise ConfigError(f"--seeds: expected whole numbers with commas between them, got '{seeds}'")
    numbers = [int(seed) for seed in seeds.split(",")]
    chosen = {
        "seeds": numbers,
        "arms": some("--arms", arms, experiment.ARMS),
        "references": some("--beside", beside, experiment.REFERENCES),
        "per_patient": per_patient,
        "split": split,
        "jobs": jobs,
    }
    if as_json:
        click.echo(json.dumps(experiment.run(settings, out, **chosen), sort_keys=True))
        return
    with TerminalProgress(settings.federation.rounds) as progress:
        result = experiment.run(settings, out, **chosen, progress=progress, say=progress.note)
    _print_federated(result)
    click.echo(f"single outcomes: {out / 'outcomes.json.gz'}   picture: {out / 'federated.svg'}")


def _print_federated(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def row(name: str, entry: Mapping[str, Any]) -> tuple[str, ...]:
        low, high = entry["ci95"]
        seeds = ", ".join(f"{100 * value:.1f}" for value in entry["by_seed"])
        return name, f"{100 * entry['mean']:.1f}", f"{100 * low:.1f} to {100 * high:.1f}", seeds

    console = Console(soft_wrap=True)
    arms = Table(
        "arm",
        "accuracy, %",
        "95 %",
        "by seed",
        title=f"{result['n']} {result['split']} questions, seeds {result['seeds']}",
    )
    for name, entry in result["arms"].items():
        arms.add_row(*row(name, entry))
    arms.add_row("chance", f"{100 * result['chance']:.1f}", "", "")
    console.print(arms)
    differences = Table("difference", "points", "95 %", "by seed")
    for name, entry in result["comparisons"].items():
        differences.add_row(*row(name, entry))
    console.print(differences)
