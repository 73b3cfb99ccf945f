"""The coordinator's Flower app: messages over a Flower `Grid`, with deadlines; then the rounds (server/rounds.py).

Run by the coordinator, under Flower's SuperLink or over simulations/federation.py's in-process grid. Enters: replies.
Leaves: instructions, the same one to every site of a phase. Private: nothing of its own; what sites send is read here.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import pull_objects

from ..common.config import RunConfig
from ..common.dictionary import Dictionary
from ..common.errors import ConfigError, ProtocolError, WardroundError
from ..common.identity import Identity, fingerprint
from ..common.key_file import passphrase, read_key
from ..common.messages import HEAD_RECORD, VECTOR_RECORD, Failure, Instruction, Packed, Reply, dtypes_of, join, split
from ..common.roster import Roster
from .aggregation import SecureSums, Sums
from .coordinator import ENVIRONMENT, CoordinatorFolder
from .deployment import submitted
from .journal import Journal, open_journal
from .phases import Answer, Consortium
from .receipts import Receipts
from .roster_cli import KEY_FILE
from .run import run_all
from .run_status import RunStatus, refuse
from .tracking import Progress, SilentProgress

STYPE = "wardround.raw"  # as in client/app.py
_SITE_CODES = frozenset(
    {"site", "bundle"}
)  # all that a site says in place of a reply (client/app.py, client/worker.py)
_POLL_S = (0.05, 3.0)  # shortest and longest pause between looks for replies
_TTL_MARGIN_S = 60.0  # the deadline is ours: where Flower's comes first, a silent site looks like a broken wire
_TIMES = 4  # that one instruction is sent to one node in all
_RETURN_S = 60.0  # for a node that was there when it was asked: so long Flower waits for its heartbeat as well
# Flower's words for an answer that will not come, though nothing says that the site could not give it.
_LOST = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)
_POLL_SHARE = 0.1  # between them, this share of the time since sending: so much later a reply is found at most
_REST_S = (0.05, 1.0)  # shortest and longest pause between looks for the rest of a reply that has begun to arrive

_deadline: ContextVar[float] = ContextVar("deadline", default=math.inf)  # monotonic: of the phase that a reply is for

app = ServerApp()


@dataclass(frozen=True)
class FlowerExchange:
    """Sends one instruction to many nodes and yields their replies, each pulled on its own.

    Pulling one reply at a time keeps one update in memory. Replies come in the order in which they arrive, which in the
    in-process grid of a simulation is that of `nodes`.

    A message that was lost with the process that had it is sent again, as it was, once its node is back: sites answer
    the identical instruction with the identical bytes (docs/secure-sums.md, "Once").
    """

    grid: Grid
    timeout_s: float

    def nodes(self) -> list[int]:
        """Nodes that are connected now."""
        return sorted(self.grid.get_node_ids())

    def ask(self, instructions: Mapping[int, Instruction]) -> Iterator[Answer]:
        """One answer for every node: its reply, its failure, or silence when the deadline has passed."""
        here, sent = set(self.grid.get_node_ids()), time.monotonic()
        pending, sizes = self._send(instructions)
        times = dict.fromkeys(instructions, 1)
        away: dict[int, float] = {}  # since when
        while pending or away:
            for node, message_id in list(pending.items()):
                for message in self._pull(message_id, sent + self.timeout_s):
                    del pending[node]
                    if _is_lost(message) and time.monotonic() - sent >= self.timeout_s:
                        yield Answer(node, None, "silent", 0, sizes[node])  # it was on its way
                    elif _is_lost(message) and node in here and times[node] < _TIMES:
                        away[node] = time.monotonic()
                    else:
                        yield _answer(node, message, sizes[node])
            waited = time.monotonic() - sent
            late = waited >= self.timeout_s
            if late:
                for node in pending:
                    yield Answer(node, None, "silent", 0, sizes[node])
                pending.clear()
            back = away.keys() & set(self.grid.get_node_ids()) if away and not late else set[int]()
            for node in [node for node in away if node not in back]:
                if late or sent + waited - away[node] >= _RETURN_S:
                    del away[node]
                    yield Answer(node, None, "transport", 0, sizes[node])
            if back:
                pending |= self._send({node: instructions[node] for node in sorted(back)})[0]
                for node in back:
                    del away[node]
                    times[node] += 1
            if pending or away:
                time.sleep(min(max(_POLL_S[0], _POLL_SHARE * waited), _POLL_S[1]))

    def _pull(self, message_id: str, deadline: float) -> list[Message]:
        """The reply, whole; an error where it has begun to arrive and the rest does not come before the deadline."""
        before = _deadline.set(deadline)
        try:
            return list(self.grid.pull_messages([message_id]))
        finally:
            _deadline.reset(before)

    def _send(self, instructions: Mapping[int, Instruction]) -> tuple[dict[int, str], dict[int, int]]:
        """Every node's message number and its size in bytes."""
        sizes: dict[int, int] = {}
        # One instruction for all is packed once; of several that differ in their receipt, the vectors are.
        packed: dict[int, tuple[RecordDict, int]] = {}
        vectors: Packed = {}
        messages: list[Message] = []
        for node, instruction in instructions.items():
            if id(instruction) not in packed:
                packed[id(instruction)] = _pack(instruction, vectors)
            content, sizes[node] = packed[id(instruction)]
            messages.append(
                Message(
                    content,
                    dst_node_id=node,
                    message_type=instruction.ROUTE,
                    group_id=str(instruction.round_index),
                    ttl=self.timeout_s + _TTL_MARGIN_S,
                )
            )
        return dict(zip(instructions, self.grid.push_messages(messages), strict=True)), sizes


def _is_lost(message: Message) -> bool:
    """Whether Flower says that a message or its answer went with the process that had it."""
    return message.has_error() and message.error.code in _LOST


def _pack(instruction: Instruction, packed: Packed) -> tuple[RecordDict, int]:
    """An instruction as a Flower message's content, and its size in bytes."""
    head, vectors = split(instruction, packed)
    arrays = {
        name: Array(dtype=str(dtype), shape=(len(data) // dtype.itemsize,), stype=STYPE, data=data)
        for (name, data), dtype in zip(vectors.items(), dtypes_of(type(instruction)).values(), strict=True)
    }
    content = RecordDict({HEAD_RECORD: ConfigRecord({"head": head}), VECTOR_RECORD: ArrayRecord(arrays)})
    return content, len(head) + sum(len(data) for data in vectors.values())


def _answer(node: int, message: Message, bytes_down: int) -> Answer:
    """A Flower reply as an answer; anything but a well-formed message of ours is a failure with a code of ours."""
    if message.has_error():
        reason = message.error.reason
        return Answer(node, None, reason if reason in _SITE_CODES else "transport", 0, bytes_down)
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
    code = (reply.code or "failure") if isinstance(reply, Failure) else ""
    return Answer(node, reply, code, size, bytes_down, hashlib.sha256(head).hexdigest())


def run(
    grid: Grid,
    config: RunConfig,
    dictionary: Dictionary,
    out: Path,
    journal: Journal,
    *,
    make_sums: Callable[[Consortium], Sums],
    identity: Identity,
    split_key: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A whole run over a Flower grid: `run_all`, which see. `identity`: the coordinator's, which signs receipts."""
    exchange = FlowerExchange(grid, config.federation.phase_timeout_s)
    with Receipts.open(journal, identity) as receipts:
        return run_all(
            exchange,
            config,
            dictionary,
            out,
            journal,
            make_sums=make_sums,
            split_key=split_key,
            progress=progress or SilentProgress(),
            receipts=receipts,
        )


def pull_by_our_clock() -> None:
    """Makes Flower's grid pull the pieces of a reply as often and as long as a phase can use them.

    A reply is found by its name, while its bytes still come. By itself Flower then pauses 1, 2, 4 … 10 s, and goes on
    for two hours. Here it looks again in tenths of a second, and gives up at the phase's deadline. A hospital that
    stops in the middle keeps the coordinator from the others' replies for three minutes at most: so long after the last
    piece Flower drops what it has of the reply, and says so. Of this process only, and of nobody's who imports it:
    `main` calls it.
    """
    from flwr.superlink.grid import http_grid

    def pull(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        return pull_objects(
            object_ids,
            pull_object_fn,
            max_time=max(_deadline.get() - time.monotonic(), 0.0),
            initial_backoff=_REST_S[0],
            backoff_cap=_REST_S[1],
            # Not by a number of looks: a slow line is slow.
            max_tries_per_object=None,
        )

    http_grid.pull_objects = pull  # pyright: ignore[reportPrivateImportUsage]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Entry under Flower: run config names a run of the coordinator's folder, which WARDROUND_COORDINATOR names.

    Nothing else is in it, for Flower shows it to every site. Config and dictionary are in the run's folder (`wardround
    server run` puts them there), roster and key in the coordinator's. The key's passphrase is in WARDROUND_PASSPHRASE,
    or in the file that `passphrase_file` in coordinator.toml names.
    """
    pull_by_our_clock()
    name = context.run_config.get("run")
    if not isinstance(name, str):
        raise ConfigError("run config: expected 'run', the name of a run of this coordinator")
    where = os.environ.get(ENVIRONMENT)
    if not where:
        raise ConfigError(f"{ENVIRONMENT} is not set: a run is started with `wardround server run`")
    folder = CoordinatorFolder.open(Path(where))
    resume = bool(context.run_config.get("resume", False))
    try:
        inputs = submitted(folder, name)
        config, out = inputs.config, inputs.out
        roster = folder.roster()
        if roster is None:
            raise ConfigError(f"{folder.path}: nobody is enrolled yet")
        identity = read_coordinator(folder, roster)
        opened = open_journal(out, config, resume=resume)
    except WardroundError as error:
        if folder.run(name).is_dir():
            refuse(folder.run(name), context.run_id, error)
        raise
    with opened as journal:
        # From here on it is this process that works on the run: what it says of it counts.
        status = RunStatus(out, config, context.run_id)
        try:
            run(
                grid,
                config,
                inputs.dictionary,
                out,
                journal,
                make_sums=lambda consortium: SecureSums(consortium, roster),
                identity=identity,
                progress=status,
            )
        except BaseException as error:
            status.end(error)
            raise
        status.end(None)


def read_coordinator(folder: CoordinatorFolder, roster: Roster) -> Identity:
    """The coordinator's identity.

    Args:
        folder: with coordinator.pem, as `wardround server init` wrote it.
        roster: which it must have signed, else no site would take its receipts.

    Raises:
        ConfigError: the key cannot be opened; it is another coordinator's.
    """
    path = folder.path / KEY_FILE
    identity = read_key(path, passphrase(folder.passphrase_file, os.environ, "passphrase_file"))
    if identity.id != roster.coordinator:
        raise ConfigError(
            f"{path}: the key of {identity.fingerprint}, and the roster is signed by "
            f"{fingerprint(roster.coordinator)}: expected its key"
        )
    return identity
