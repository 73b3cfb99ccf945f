"""`wardround`: one console command; its groups are found by entry point and imported only when used.

Anyone may add a group by declaring an entry point in `wardround.commands`. Listing the groups (`wardround --help`)
imports none of them: their one-line help lives here for ours and is the entry point's name for others, because
importing torch for a help page would cost seconds.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version

import click

from .errors import WardroundError

ENTRY_POINT_GROUP = "wardround.commands"
_SHORT_HELP = {
    "client": "One hospital: its registry, dictionary and questions; the final model it gets from a run.",
    "ask": "Ask a model one question about one record.",
    "evaluate": "What a model is worth: all tasks over open registries, or one registry's held-out patients.",
    "server": "The coordinator: public warm-up, rounds, final model, report.",
    "simulate": "Hospitals and coordinator on this one machine.",
}


class LazyGroup(click.Group):
    """A click group whose subcommands are entry points, loaded on first use."""

    def _found(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._found())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        point = self._found().get(cmd_name)
        if point is None:
            return None
        command: click.Command = point.load()
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _SHORT_HELP.get(name, "")) for name in self.list_commands(ctx)])


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Example: wardround simulate run demo --out runs/demo",
)
@click.version_option(version("wardround"), prog_name="wardround")
def wardround() -> None:
    """Hospitals train one clinical-reasoning language model together; patient records never leave them."""


def quiet_third_parties() -> None:
    """Offline, no telemetry, and no third-party chatter unless something is wrong.

    Set before any heavy import: the libraries read these once. Every trl trainer otherwise contacts the model hub.
    """
    for name, value in {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("flwr", "transformers", "accelerate", "datasets", "peft", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)


def limit_threads(threads: int) -> None:
    """`speed.threads`, for libraries that read it when they are imported; 0: as they choose."""
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def main(args: Sequence[str] | None = None) -> None:
    """Console entry point. Exit codes: 0 done, 1 failure, 2 a user's mistake, 130 interrupted."""
    quiet_third_parties()
    try:
        wardround.main(args=args, prog_name="wardround", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.exceptions.Abort, KeyboardInterrupt) as stop:
        # A command that can be continued raises Abort with what to do; others have nothing to say.
        click.echo(" ".join(["interrupted; nothing half-written.", *map(str, stop.args)]), err=True)
        sys.exit(130)
    except WardroundError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" at {error.filename}" if error.filename else ""
            click.echo(f"error: the disk is full{where}; free some space and call the same command again", err=True)
            sys.exit(1)
        if error.filename is None or error.strerror is None:
            raise
        click.echo(f"error: {error.filename}: {error.strerror.lower()}; check the path and who may use it", err=True)
        sys.exit(2)
