"""What is different of Flower's Fleet API: a killed node is let in again, and what it had taken counts as lost."""

import hashlib
import inspect
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.superlink.servicer.fleet import fleet_handlers
from wardround.common.config import CoordinatorConfig
from wardround.common.identity import Identity
from wardround.server import control, fleet
from wardround.server.coordinator import CoordinatorFolder, create
from wardround.server.fleet import CLEAR_S, SILENT_S, LastHeard, owed
from wardround.server.superlink import make_app

from ..deployment.coordinator_case import hospital
from .test_superlink_gate import enrol


@dataclass
class World:
    """A SuperLink's state with one enrolled hospital and a run, and what time it is."""

    state: Any
    key: bytes
    node: int
    run: int
    now: float = 100.0

    def __post_init__(self) -> None:
        self.heard = LastHeard(lambda: self.now)

    def activate(self) -> int:
        request = ActivateNodeRequest(public_key=self.key, heartbeat_interval=30)
        return self.heard.letting_in(fleet_handlers.activate_node)(request, self.state).node_id

    def asks(self) -> list[Any]:
        """The node asks for its next message."""
        request = PullMessagesRequest(node=Node(node_id=self.node))
        answered = self.heard.noting(fleet_handlers.pull_messages)(request, self.state, self.state.object_store)
        return list(answered.messages_list)

    def send(self, message: Message, pieces: int | None = None) -> str:
        """Puts a message into the state, with so many of its pieces."""
        message.metadata.__dict__["_message_id"] = message.object_id
        session = self.state.start_session(self.run)
        stored, wanted = self.state.store_message_and_object_tree(message, get_object_tree(message), session)
        assert stored
        for name, part in list(get_all_nested_objects(message).items())[:pieces]:
            if name in wanted:
                self.state.store_object(self.run, session, name, part.deflate())
        return message.metadata.message_id

    def question(self) -> str:
        return self.send(self._message("asked", SUPERLINK_NODE_ID, self.node))

    def answer(self, question: str, pieces: int | None = None) -> str:
        return self.send(self._message("answered", self.node, SUPERLINK_NODE_ID, question), pieces)

    def _message(self, word: str, source: int, destination: int, question: str = "") -> Message:
        about = Metadata(
            run_id=self.run,
            message_id="",
            src_node_id=source,
            dst_node_id=destination,
            reply_to_message_id=question,
            group_id="1",
            created_at=time.time(),
            ttl=100.0 if question else 600.0,
            message_type="query.shares",
        )
        return make_message(metadata=about, content=content(word + secrets.token_hex(4)))

    def outcome(self, question: str) -> int | None:
        """What the coordinator hears of a question: an error's code, 0 for an answer, None for nothing yet."""
        found = self.state.get_message_res({question}, self.run)
        return None if not found else found[0].error.code if found[0].has_error() else 0


def content(word: str) -> RecordDict:
    return RecordDict({"x": ConfigRecord({"word": word}), "y": ConfigRecord({"more": word * 3})})


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    config = 'consortium = "Trial"\naddress = "127.0.0.1:9092"\n'
    create(tmp_path / "c", CoordinatorConfig(consortium="Trial", address="127.0.0.1:9092"), config)
    folder, north = CoordinatorFolder.open(tmp_path / "c"), hospital("north")
    enrol(folder, [north], Identity.generate())
    state = make_app(folder).state.linkstate_factory.state()
    (node,) = [info.node_id for info in state.get_node_info()]
    bundle = control.bundle()
    digest = state.store_fab(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
    run = state.create_run(
        "wardround/x", "1.0.0", digest, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, "flwr-serverapp"
    )
    key = north.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    made = World(state, key, node, run)
    made.activate()
    yield made


def test_a_node_that_was_killed_is_let_in_again_after_eight_seconds_of_silence(world: World):
    world.asks()
    world.now += SILENT_S - 0.1
    with pytest.raises(FlowerError):
        world.activate()
    world.now += 0.2
    assert world.activate() == world.node


def test_a_copy_of_a_node_that_is_at_work_is_refused_however_often_it_tries(world: World):
    for _ in range(30):
        world.now += 3.0  # as a SuperNode with nothing to do
        world.asks()
        world.now += 1.0
        with pytest.raises(FlowerError):
            world.activate()


def test_a_request_that_takes_long_is_no_silence(world: World):
    def slow(request: Any) -> None:
        world.now += 3 * SILENT_S

    world.heard.noting(slow)(PullMessagesRequest(node=Node(node_id=world.node)))
    with pytest.raises(FlowerError):
        world.activate()


def test_after_a_restart_of_the_superlink_a_node_has_its_time_to_be_heard(world: World):
    """What was heard before is gone with the process; the database still has the node as online."""
    world.now += 1000
    world.heard = LastHeard(lambda: world.now)
    world.now += SILENT_S - 0.1
    with pytest.raises(FlowerError):
        world.activate()
    world.now += 0.2
    assert world.activate() == world.node


def test_of_what_a_killed_node_had_taken_the_coordinator_hears_at_once_that_it_is_lost(world: World):
    had, waiting = world.question(), world.question()
    assert len(world.asks()) == 1  # one of both, in any order
    (first,) = owed(world.state, world.node)
    (other,) = {had, waiting} - {first}
    assert world.outcome(first) is None
    world.now += SILENT_S
    world.activate()
    assert world.outcome(first) == ErrorCode.MESSAGE_UNAVAILABLE
    assert world.outcome(other) is None and not owed(world.state, world.node)
    assert [message.metadata.message_id for message in world.asks()] == [other]


def test_an_answer_that_had_arrived_counts_and_half_of_one_does_not(world: World):
    whole, half = world.question(), world.question()
    answers = {whole: None, half: 1}  # pieces
    for _ in answers:
        (message,) = world.asks()
        world.answer(message.metadata.message_id, answers[message.metadata.message_id])
    assert set(owed(world.state, world.node)) == {half}
    world.now += SILENT_S
    world.activate()
    assert world.outcome(whole) == 0
    assert world.outcome(half) == ErrorCode.MESSAGE_UNAVAILABLE


def test_whoever_waits_for_the_rest_of_an_answer_hears_that_it_will_not_come(world: World):
    """The coordinator has seen the answer and pulls its pieces, when the hospital is killed before the last is sent."""
    question = world.question()
    world.asks()
    answer = world.answer(question, pieces=1)
    assert world.outcome(question) == 0  # Flower hands it out: its pieces are asked for one by one
    tree = [part.object_id for part in iterate_object_tree(world.state.object_store.get_object_tree(answer))]
    assert world.state.get_object(world.run, tree[-1]) == b""  # known, and not here yet
    world.now += SILENT_S
    world.activate()
    assert {world.state.get_object(world.run, part) for part in tree} == {None}


@pytest.mark.parametrize("arrived", [0, 1])
def test_what_a_node_still_owes_when_it_asks_for_more_is_lost(world: World, arrived: int):
    """The network broke while the message was handed over, or when a piece of its answer had arrived."""
    question = world.question()
    assert len(world.asks()) == 1
    if arrived:
        world.answer(question, pieces=arrived)
    assert world.asks() == []
    assert world.outcome(question) == ErrorCode.MESSAGE_UNAVAILABLE


def test_what_a_node_has_not_taken_or_has_answered_is_not_lost_when_it_asks_for_more(world: World):
    first, second = world.question(), world.question()
    handed = [message.metadata.message_id for message in world.asks()]
    world.answer(*handed)
    handed += [message.metadata.message_id for message in world.asks()]
    assert {first, second} == set(handed)
    assert [world.outcome(question) for question in handed] == [0, None]


def test_what_a_request_took_to_nobody_is_found_within_twenty_seconds(world: World):
    """A broken network held the request back; it was served beside a later one, to a connection that was gone."""
    ask = fleet._anew(lambda *_: PullMessagesResponse(), lambda: world.now)
    request = PullMessagesRequest(node=Node(node_id=world.node))
    ask(request, world.state)
    question = world.question()
    assert len(world.state.get_message_ins(world.node, 1)) == 1
    ask(request, world.state)
    assert world.outcome(question) is None
    world.now += CLEAR_S
    ask(request, world.state)
    assert world.outcome(question) == ErrorCode.MESSAGE_UNAVAILABLE


def test_the_handlers_are_changed_once_and_all_that_name_a_node_are(world: World):
    before = {name: getattr(fleet_handlers, name) for name in dir(fleet_handlers)}
    fleet.install()
    assert {name: getattr(fleet_handlers, name) for name in dir(fleet_handlers)} == before
    changed = {name for name, one in before.items() if hasattr(one, "_wardround")}
    assert changed == {
        "activate_node", "pull_messages", "push_messages", "get_run", "get_fab", "pull_object", "push_object",
        "confirm_message_received", "send_node_heartbeat",
    }  # fmt: skip
    # Leaving in order, and what Flower closes to authenticated nodes, need nothing.
    own = fleet_handlers.__name__
    handlers = {name for name, one in before.items() if inspect.isfunction(one) and one.__module__ == own}
    assert {name for name in handlers if not name.startswith("_")} == {
        "deactivate_node", "register_node", "unregister_node",
    }  # fmt: skip
