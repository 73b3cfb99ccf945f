"""A plain Flower app that sends as many bytes as a secure sum does: what benchmarks/deployed_round.py compares with.

Its bundle holds this file, as Flower's own apps do. The coordinator's part reads what is to be sent from
WARDROUND_TIMES/plan.json and writes seconds to plain.jsonl beside it. The sites' part answers with fresh random bytes,
as masked vectors are: nothing is known already to anybody who stores by digest.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client, server = ClientApp(), ServerApp()


@client.query("echo")
def echo(message: Message, context: Context) -> Message:
    """As many bytes as were asked for."""
    wanted = message.content.config_records["plain"]["up"]
    assert isinstance(wanted, int)
    return Message(_content(wanted, 0), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Every exchange of the plan, as often as it says."""
    folder = Path(os.environ["WARDROUND_TIMES"])
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    if plan["polls"] == "ours":
        from wardround.server.app import pull_by_our_clock

        pull_by_our_clock()
    nodes = sorted(grid.get_node_ids())
    while len(nodes) < plan["sites"]:
        time.sleep(1)
        nodes = sorted(grid.get_node_ids())
    for _ in range(plan["times"]):
        for line in plan["exchanges"]:
            began = time.time()
            one = _content(line["down"], line["up"])
            each = {node: one if line["shared"] else _content(line["down"], line["up"]) for node in nodes}
            messages = [Message(each[node], dst_node_id=node, message_type="query.echo") for node in nodes]
            replies = _by_turns(grid, messages) if plan["polls"] == "ours" else list(grid.send_and_receive(messages))
            seconds = time.time() - began
            failed = sum(reply.has_error() for reply in replies)
            with (folder / "plain.jsonl").open("a", encoding="utf-8") as file:
                said = {"peer": plan["peer"], "exchange": line["exchange"], "seconds": seconds, "failed": failed}
                file.write(json.dumps(said) + "\n")


def _by_turns(grid: Grid, messages: list[Message]) -> list[Message]:
    """Replies as `wardround.server.app.FlowerExchange` looks for them, with its pauses and nothing else of it."""
    from wardround.server.app import _POLL_S, _POLL_SHARE

    sent, found = time.monotonic(), list[Message]()
    pending = set(grid.push_messages(messages))
    while pending:
        for message_id in list(pending):
            for message in grid.pull_messages([message_id]):
                pending.discard(message_id)
                found.append(message)
        if pending:
            time.sleep(min(max(_POLL_S[0], _POLL_SHARE * (time.monotonic() - sent)), _POLL_S[1]))
    return found


def _content(size: int, up: int) -> RecordDict:
    array = Array(dtype="uint8", shape=(size,), stype="raw", data=os.urandom(size))
    return RecordDict({"plain": ConfigRecord({"up": up}), "plain.array": ArrayRecord({"data": array})})
