"""The coordinator's app of benchmarks/superlink.py: a run as it is, each exchange timed, over after its first update.

Loaded by Flower's ServerApp process, so a module of its own. Writes a JSON line an exchange to exchanges.jsonl in the
run's folder.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from wardround.common.messages import EvaluateInstruction, Instruction
from wardround.server.aggregation import SecureSums
from wardround.server.app import FlowerExchange, read_coordinator
from wardround.server.coordinator import ENVIRONMENT, CoordinatorFolder
from wardround.server.deployment import submitted
from wardround.server.journal import open_journal
from wardround.server.phases import Answer
from wardround.server.receipts import Receipts
from wardround.server.run import run_all
from wardround.server.tracking import SilentProgress

app = ServerApp()


class EnoughError(Exception):
    """The update is summed and applied: what was to be measured is."""


@dataclass(frozen=True)
class TimedExchange(FlowerExchange):
    """As it is in a run, with a line in `file` for each exchange."""

    file: Path

    def ask(self, instructions: Mapping[int, Instruction]) -> Iterator[Answer]:
        """As `FlowerExchange.ask`; raises EnoughError when the update is behind us."""
        first = next(iter(instructions.values()))
        if isinstance(first, EvaluateInstruction):
            raise EnoughError
        began, answers = time.time(), []
        for answer in super().ask(instructions):
            answers.append((answer.code, answer.bytes_up, answer.bytes_down))
            yield answer
        line = {
            "route": first.ROUTE,
            "round": first.round_index,
            "began": began,
            "seconds": time.time() - began,  # with what the coordinator did with each reply
            "codes": [code for code, _, _ in answers],
            "bytes_up": sum(up for _, up, _ in answers),
            "bytes_down": sum(down for _, _, down in answers),
        }
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """As wardround.server.app.main."""
    folder = CoordinatorFolder.open(Path(os.environ[ENVIRONMENT]))
    inputs, roster = submitted(folder, str(context.run_config["run"])), folder.roster()
    assert roster is not None
    config, out, identity = inputs.config, inputs.out, read_coordinator(folder, roster)
    with open_journal(out, config, resume=False) as journal, Receipts.open(journal, identity) as receipts:
        exchange = TimedExchange(grid, config.federation.phase_timeout_s, out / "exchanges.jsonl")
        try:
            run_all(
                exchange,
                config,
                inputs.dictionary,
                out,
                journal,
                make_sums=lambda consortium: SecureSums(consortium, roster),
                split_key=None,
                progress=SilentProgress(),
                receipts=receipts,
            )
        except EnoughError:
            return
