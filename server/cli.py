"""`wardround server`: the coordinator's commands. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .deploy_cli import COMMANDS
from .receipts_cli import receipts
from .review.cli import review
from .roster_cli import roster

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=_SETTINGS)
def server() -> None:
    """The coordinator: enrolment, rounds over the network, final model, report."""


for command in (*COMMANDS, roster, receipts, review):
    server.add_command(command)


@server.command(epilog="Example: wardround server warmup demo --out adapters --set warmup.steps=160")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for NAME.safetensors and NAME.json."
)
@click.option("--name", default=None, help="Name of the released adapter; the model's id when absent.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key; `none` unsets it.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def warmup(config: Path, out: Path, name: str | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Train the public warm-up adapter of CONFIG on synthetic questions (no patient data) and save it.

    It teaches a small model the answer format and to bind letters to options. The saved pair is what
    `warmup.adapter` in a run config names.
    """
    from ..common import config as configs
    from ..common.cli import limit_threads
    from ..common.files import check_writable
    from ..common.progress import progress_bar

    run = configs.load_run(config, overrides)
    check_writable(out)
    limit_threads(run.speed.threads)  # before torch is imported
    from ..common.lm import models
    from . import warmup as step

    lm = models.load(run.model, run.lora, seed=run.warmup.seed)
    with progress_bar("public warm-up", run.warmup.steps, quiet=as_json) as advance:
        result = step.warm_up(lm, run, on_step=lambda done, _total, loss: advance(done, f"loss {loss:.3f}"))
    step.save_released(result, out, name or Path(run.model.id).name)
    if as_json:
        click.echo(json.dumps(result.report, sort_keys=True))
    else:
        for key, value in result.report.items():
            click.echo(f"{key}: {value}")


@server.command(epilog="Example: wardround server report runs/demo")
@click.argument("run_folder", type=click.Path(path_type=Path))
def report(run_folder: Path) -> None:
    """Write report.html of a finished run again, from the files in its folder."""
    from . import report as step

    click.echo(step.rewrite(run_folder))
