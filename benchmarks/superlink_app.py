"""The coordinator's app of benchmarks/superlink.py: a run as it is, each exchange timed, over after its first update.

Loaded by Flower's ServerApp process, so a module of its own. Writes a JSON line an exchange to OUT/exchanges.jsonl.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from wardround.common.config import load_run
from wardround.common.dictionary import load_dictionary
from wardround.common.messages import EvaluateInstruction, Instruction
from wardround.common.roster import Roster
from wardround.server.aggregation import SecureSums
from wardround.server.app import FlowerExchange, read_coordinator
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
    paths = {name: Path(str(context.run_config[name])) for name in ("config", "dictionary", "roster", "out")}
    config, dictionary = load_run(paths["config"]), load_dictionary(paths["dictionary"])
    roster = Roster.parse(paths["roster"].read_bytes(), "roster")
    identity = read_coordinator(context.run_config, roster)
    with open_journal(paths["out"], config, resume=False) as journal, Receipts.open(journal, identity) as receipts:
        exchange = TimedExchange(grid, config.federation.phase_timeout_s, paths["out"].parent / "exchanges.jsonl")
        try:
            run_all(
                exchange,
                config,
                dictionary,
                paths["out"],
                journal,
                make_sums=lambda consortium: SecureSums(consortium, roster),
                split_key=None,
                progress=SilentProgress(),
                receipts=receipts,
            )
        except EnoughError:
            return
