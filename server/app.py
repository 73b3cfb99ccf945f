"""The coordinator's Flower app: messages over a Flower `Grid`, with deadlines; then the rounds (server/rounds.py).

Run by the coordinator, under Flower's SuperLink or over simulations/federation.py's in-process grid. Enters: replies.
Leaves: instructions, the same one to every site of a phase. Private: nothing of its own; what sites send is read here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from ..common.config import RunConfig, load_run
from ..common.dictionary import Dictionary, load_dictionary
from ..common.errors import ConfigError, ProtocolError
from ..common.messages import HEAD_RECORD, VECTOR_RECORD, Failure, Instruction, Reply, join, split
from .journal import Journal, open_journal
from .phases import Answer
from .run import run_all
from .tracking import Progress, SilentProgress

STYPE = "wardround.raw"  # as in client/app.py
_POLL_S = (0.05, 3.0)  # first and longest pause between looks for replies

app = ServerApp()


@dataclass(frozen=True)
class FlowerExchange:
    """Sends one instruction to many nodes and yields their replies, each pulled on its own.

    Pulling one reply at a time keeps one update in memory. Replies come in the order in which they arrive, which in the
    in-process grid of a simulation is that of `nodes`.
    """

    grid: Grid
    timeout_s: float

    def nodes(self) -> list[int]:
        """Nodes that are connected now."""
        return sorted(self.grid.get_node_ids())

    def ask(self, nodes: Sequence[int], instruction: Instruction) -> Iterator[Answer]:
        """One answer for every node: its reply, its failure, or silence when the deadline has passed."""
        head, vectors = split(instruction)
        size = len(head) + sum(len(data) for data in vectors.values())
        arrays = {
            name: Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data) for name, data in vectors.items()
        }
        content = RecordDict({HEAD_RECORD: ConfigRecord({"head": head}), VECTOR_RECORD: ArrayRecord(arrays)})
        group, route = str(instruction.round_index), instruction.ROUTE
        messages = [
            Message(content, dst_node_id=node, message_type=route, group_id=group, ttl=self.timeout_s) for node in nodes
        ]
        pending = dict(zip(nodes, self.grid.push_messages(messages), strict=True))
        del messages, content, arrays, vectors
        deadline, pause = time.monotonic() + self.timeout_s, _POLL_S[0]
        while pending:
            for node, message_id in list(pending.items()):
                for message in self.grid.pull_messages([message_id]):
                    del pending[node]
                    yield _answer(node, message, size)
            if pending and time.monotonic() >= deadline:
                for node in pending:
                    yield Answer(node, None, "silent", 0, size)
                return
            if pending:
                time.sleep(pause)
                pause = min(2 * pause, _POLL_S[1])


def _answer(node: int, message: Message, bytes_down: int) -> Answer:
    """A Flower reply as an answer; anything but a well-formed message of ours is a failure with a code of ours."""
    if message.has_error():
        return Answer(node, None, "site" if message.error.reason == "site" else "transport", 0, bytes_down)
    config = message.content.config_records.get(HEAD_RECORD, {})
    arrays = message.content.array_records.get(VECTOR_RECORD, {})
    head, vectors = config.get("head", b""), {name: array.data for name, array in arrays.items()}
    if not isinstance(head, bytes):
        return Answer(node, None, ProtocolError.code, 0, bytes_down)
    size = len(head) + sum(len(data) for data in vectors.values())
    try:
        reply = join(head, vectors, Reply)
    except ProtocolError:
        return Answer(node, None, ProtocolError.code, size, bytes_down)
    if isinstance(reply, Failure):
        return Answer(node, reply, reply.code or "failure", size, bytes_down)
    return Answer(node, reply, "", size, bytes_down)


def run(
    grid: Grid,
    config: RunConfig,
    dictionary: Dictionary,
    out: Path,
    journal: Journal,
    *,
    split_key: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A whole run over a Flower grid: `run_all`, which see."""
    exchange = FlowerExchange(grid, config.federation.phase_timeout_s)
    return run_all(
        exchange, config, dictionary, out, journal, split_key=split_key, progress=progress or SilentProgress()
    )


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry under Flower: `run_config` names the config, the dictionary and the run folder on this machine."""
    settings = context.run_config
    for key in ("config", "dictionary", "out"):
        if not isinstance(settings.get(key), str):
            raise ConfigError(f"run config: expected '{key}', a path")
    config, out = load_run(Path(str(settings["config"]))), Path(str(settings["out"]))
    dictionary = load_dictionary(Path(str(settings["dictionary"])))
    with open_journal(out, config, resume=bool(settings.get("resume", False))) as journal:
        run(grid, config, dictionary, out, journal)
