"""What is different here of Flower's Fleet API, by which hospitals' SuperNodes are served: three answers of flwr 1.41.

Run by the coordinator, in the SuperLink's process (server/superlink.py), once before its application is made. Enters:
Flower's handlers. Leaves: the same, each around the one before. Private: nothing; messages are not looked at. What is
relied on of flwr's own is listed in tests/server/test_flwr_contract.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

_LOG = logging.getLogger("wardround.superlink")
# A SuperNode with nothing to do asks every three seconds, and says so much more while it fetches or sends.
SILENT_S = 8.0
CLEAR_S = 20.0  # a node that owed nothing is not looked up for so long
_OF_A_NODE = (
    "pull_messages", "push_messages", "get_run", "get_fab", "pull_object", "push_object", "confirm_message_received",
    "send_node_heartbeat",
)  # fmt: skip
_MARK = "_wardround"

Handler = Callable[..., Any]


def install(clock: Callable[[], float] = time.monotonic) -> None:
    """Changes the handlers of this process; a second call changes nothing.

    Args:
        clock: seconds, for what was heard of a node and when.
    """
    from flwr.superlink.servicer.fleet import fleet_handlers

    if getattr(fleet_handlers.activate_node, _MARK, False):
        return
    heard = LastHeard(clock)
    for name in ("pull_object", "confirm_message_received"):
        _replace(fleet_handlers, name, _gently(name, getattr(fleet_handlers, name)))
    _replace(fleet_handlers, "pull_messages", _anew(fleet_handlers.pull_messages, clock))
    for name in _OF_A_NODE:
        _replace(fleet_handlers, name, heard.noting(getattr(fleet_handlers, name)))
    _replace(fleet_handlers, "activate_node", heard.letting_in(fleet_handlers.activate_node))


def _replace(module: Any, name: str, handler: Handler) -> None:
    setattr(handler, _MARK, True)
    setattr(module, name, handler)


def _gently(name: str, handler: Handler) -> Handler:
    """Answers a node that is fetching a message of a run that ended as of a message that is gone.

    Flower refuses it with the run's status, which its SuperNode takes as a reason to drop what it is doing: half of
    the message stays in the SuperNode, its executor waits for the other half for ever, and the hospital answers nobody
    until it is started again. What is gone, it cleans up after.
    """
    from flwr.proto.message_pb2 import ConfirmMessageReceivedResponse, PullObjectResponse
    from flwr.supercore.error import ApiErrorCode, FlowerError

    def otherwise() -> Any:
        if name == "pull_object":
            return PullObjectResponse(object_found=False, object_available=False)
        return ConfirmMessageReceivedResponse()

    def answered(*arguments: Any, **named: Any) -> Any:
        try:
            return handler(*arguments, **named)
        except FlowerError as error:
            if error.code != ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
                raise
            return otherwise()

    return answered


def _anew(handler: Handler, clock: Callable[[], float]) -> Handler:
    """Hands out the next message to a node, after what it had and never answered was given up.

    A SuperNode asks for a message when it is done with the one before, and never has two. What it still owes then is
    lost: the network broke while the message was handed over, or while its pieces or its answer's were on their way,
    after which a SuperNode drops both. Flower takes the message for delivered, and the coordinator's phase would wait
    for it until its deadline.
    """

    # Most requests are of nodes that owe nothing, every three seconds, and need no look. Now and then one all the same:
    # a request that a broken network held back may be served beside a later one, and take a message to nobody.
    clear: dict[int, float] = {}  # until when

    def handed_out(request: Any, state: Any, *arguments: Any, **named: Any) -> Any:
        node, now = request.node.node_id, clock()
        if look := now >= clear.get(node, now):
            _give_up(state, node, "a node asks for more; %d of its messages were lost on the way")
        response = handler(request, state, *arguments, **named)
        if response.messages_list:
            clear.pop(node, None)
        elif look:
            clear[node] = now + CLEAR_S
        return response

    return handed_out


def _give_up(state: Any, node: int, line: str) -> None:
    """Whoever waits for an answer of what a node had hears that it is gone (server/app.py asks again), not nothing.

    The pieces of an answer of which some have arrived go too: the coordinator may be waiting for the others already,
    and Flower would let it wait for three minutes after the last that came.
    """
    if lost := owed(state, node):
        _LOG.info(line + ": asked again", len(lost))
        state.delete_messages(message_ins_ids=set(lost))
        for answer in lost.values():
            if answer is not None:
                state.object_store.delete(answer)


class LastHeard:
    """When each node was last heard of, and what follows from it when one wants to be let in.

    Flower lets a node in only if it left in order, or its heartbeat ran out: a minute after a `kill -9`. Its messages
    are lost with it, for a SuperNode keeps them in memory; the coordinator's round would wait for them until its
    deadline. Here a node that was not heard for eight seconds makes room for the next process with its key. A copy of a
    hospital's folder that is started while the first one is at work is refused as before.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._heard: dict[int, float] = {}

    def noting(self, handler: Handler) -> Handler:
        """A handler of requests with a node in them, after which that node has been heard."""

        def noted(request: Any, *arguments: Any, **named: Any) -> Any:
            self._heard[request.node.node_id] = self._clock()
            try:
                return handler(request, *arguments, **named)
            finally:
                self._heard[request.node.node_id] = self._clock()

        return noted

    def letting_in(self, handler: Handler) -> Handler:
        """Flower's `activate_node`, after the node's forerunner was seen off, with the messages it had taken."""

        def let_in(request: Any, state: Any) -> Any:
            node = state.get_node_id_by_public_key(request.public_key)
            if node is not None and self._clock() - self._heard.get(node, self._began) >= SILENT_S:
                state.deactivate_node(node)  # False: it was not online
            reply = handler(request, state)
            self._heard[reply.node_id] = self._clock()
            _give_up(state, reply.node_id, "a node is back; %d of its messages were lost with its process")
            return reply

        return let_in


def owed(state: Any, node: int) -> dict[str, str | None]:
    """Messages that a node has fetched, and not answered or not with all of its answer; and of each what has begun."""
    from flwr.supercore.state.schema.linkstate_models import MessageIns, MessageRes
    from flwr.supercore.utils import uint64_to_int64
    from sqlalchemy import select

    of_node = (MessageIns.dst_node_id == uint64_to_int64(node), MessageIns.delivered_at != "")
    with state.session() as session:
        fetched = set(session.scalars(select(MessageIns.message_id).where(*of_node)))
        replies = select(MessageRes.reply_to_message_id, MessageRes.message_id)
        answers = dict(
            tuple(row) for row in session.execute(replies.where(MessageRes.reply_to_message_id.in_(fetched)))
        )
    whole = {question for question, answer in answers.items() if _is_whole(state.object_store, answer)}
    return {question: answers.get(question) for question in fetched - whole}


def _is_whole(store: Any, message: str) -> bool:
    """Whether every piece of a message has arrived: one that has not is there, and empty."""
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.object_store import NoObjectInStoreError

    try:
        return all(store.get(part.object_id) for part in iterate_object_tree(store.get_object_tree(message)))
    except NoObjectInStoreError:
        return False
