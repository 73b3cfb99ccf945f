"""The coordinator over a Flower grid: replies as they come, silence at the deadline, what is no message; the app."""

import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import http_grid
from wardround.client.app import app as client
from wardround.client.app import pack
from wardround.common.config import CoordinatorConfig, RunConfig, packaged, to_toml
from wardround.common.errors import ConfigError, RunFolderError
from wardround.common.messages import Failure, MaskedReply, MaskInstruction, Reply, split
from wardround.server import app as server
from wardround.server import run_status
from wardround.server.app import FlowerExchange
from wardround.server.coordinator import ENVIRONMENT, CoordinatorFolder, create
from wardround.server.deployment import merge_again, submit, submitted
from wardround.server.phases import Answer
from wardround.simulations.federation import InProcessGrid, divide, load_registry, write_sites

from .superlink_case import write_coordinator

MASKED = np.array([1, 2**32 - 1], np.uint32)


def asked(ciphertexts: bytes = b"sealed") -> MaskInstruction:
    head = {"run_id": "0" * 32, "config": "{}", "config_digest": "", "round_index": 1, "model_digest": ""}
    recipients, sealed = np.array([7], np.uint8), np.frombuffer(ciphertexts, np.uint8)
    return MaskInstruction(**head, purpose=2, attempt=1, recipients=recipients, ciphertexts=sealed)


ASKED = asked()


def reply_of(node: int) -> MaskedReply:
    return MaskedReply(run_id="0" * 32, site=f"site-{node:02d}", round_index=1, masked=MASKED)


class Grid(InProcessGrid):
    """Nodes 2, 3, … whose reply (content or error) is given, each after so many looks."""

    def __init__(self, answers: dict[int, RecordDict | Error], looks: dict[int, int] | None = None) -> None:
        super().__init__(client, [])
        self.answers, self.looks = answers, looks or {}
        self.sent: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.answers, reverse=True)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self.sent = list(messages)
        return [str(message.metadata.dst_node_id) for message in self.sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        (node,) = (int(message_id) for message_id in message_ids)
        self.looks[node] = self.looks.get(node, 0) - 1
        if self.looks[node] >= 0:
            return []
        (question,) = (message for message in self.sent if message.metadata.dst_node_id == node)
        # Flower sets a message's id when it sends it; a reply needs the id of what it answers.
        question.metadata.__dict__["_message_id"] = str(node)
        return [Message(self.answers[node], reply_to=question)]


def good(node: int) -> RecordDict:
    return pack(*split(reply_of(node)))


def answers(grid: Grid, timeout_s: float = 60) -> list[Answer]:
    return list(FlowerExchange(grid, timeout_s).ask(dict.fromkeys(sorted(grid.answers), ASKED)))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_POLL_S", (0.0, 0.0))


def test_every_node_is_answered_for_with_its_bytes():
    grid = Grid({2: good(2), 3: good(3)})
    found = answers(grid)
    assert [answer.node for answer in found] == [2, 3]
    assert all(answer.code == "" and answer.reply == reply_of(answer.node) for answer in found)
    head, vectors = split(reply_of(2))
    assert found[0].bytes_up == len(head) + len(vectors["masked"])
    assert found[0].bytes_down == len(split(ASKED)[0]) + 1 + len(b"sealed")
    assert FlowerExchange(grid, 60).nodes() == [2, 3]


def test_every_node_is_asked_what_is_meant_for_it():
    grid = Grid({3: good(3), 2: good(2)})
    each = {3: asked(b"for node 3"), 2: asked(b"for 2")}
    found = {answer.node: answer for answer in FlowerExchange(grid, 60).ask(each)}
    for message in grid.sent:
        arrays, node = message.content.array_records["wardround.vectors"], message.metadata.dst_node_id
        assert arrays["ciphertexts"].data == each[node].ciphertexts.tobytes()
        assert found[node].bytes_down == len(split(each[node])[0]) + 1 + len(arrays["ciphertexts"].data)


def test_replies_come_in_the_order_in_which_they_arrive():
    grid = Grid({2: good(2), 3: good(3), 4: good(4)}, looks={2: 3, 3: 1})
    assert [answer.node for answer in answers(grid)] == [4, 3, 2]


def test_silence_at_the_deadline_is_an_answer_and_does_not_hold_up_the_others():
    grid = Grid({2: good(2), 3: good(3)}, looks={2: 10**9})
    found = {answer.node: answer for answer in answers(grid, timeout_s=0.05)}
    assert found[3].code == ""
    assert (found[2].code, found[2].reply, found[2].bytes_up) == ("silent", None, 0)


@pytest.mark.parametrize(
    ("reason", "code"), [("site", "site"), ("bundle", "bundle"), ("Traceback: patient 4711", "transport")]
)
def test_flowers_own_errors_become_codes_and_their_text_goes_nowhere(reason: str, code: str):
    (answer,) = answers(Grid({2: Error(code=0, reason=reason)}))
    assert (answer.code, answer.reply) == (code, None)
    assert "4711" not in repr(answer)


class Lossy(Grid):
    """Loses the first messages to a node, each with the next of the codes given; `gone` at the looks given."""

    def __init__(self, codes: dict[int, list[int]], gone: dict[int, range] | None = None) -> None:
        super().__init__({node: good(node) for node in codes})
        self.codes, self.gone, self.look = codes, gone or {}, 0
        self.received: list[tuple[int, RecordDict]] = []

    def get_node_ids(self) -> Iterable[int]:
        self.look += 1
        return [node for node in self.answers if self.look - 1 not in self.gone.get(node, ())]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        asked = list(messages)
        self.received += [(one.metadata.dst_node_id, one.content) for one in asked]
        before = [one for one in self.sent if one.metadata.dst_node_id not in {n.metadata.dst_node_id for n in asked}]
        names = list(super().push_messages(asked))
        self.sent = before + asked
        for node in map(int, names):
            code = self.codes[node].pop(0) if self.codes[node] else None
            self.answers[node] = good(node) if code is None else Error(code=code, reason="Flower's words")
        return names


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    ],
)  # fmt: skip
def test_what_was_lost_on_its_way_is_sent_again_as_it_was_to_that_node_alone(code: int):
    grid = Lossy({2: [code, code], 3: []})
    found = {answer.node: answer for answer in answers(grid)}
    assert found[2].reply == reply_of(2) and found[3].reply == reply_of(3)
    assert [node for node, _ in grid.received] == [2, 3, 2, 2]
    first, _, *again = [sent for _, sent in grid.received]
    assert all(sent == first for sent in again)


def test_a_node_that_loses_all_it_is_sent_has_failed():
    grid = Lossy({2: [ErrorCode.NODE_UNAVAILABLE] * 100})
    (answer,) = answers(grid)
    assert answer.code == "transport" and len(grid.received) == server._TIMES


def test_a_node_that_goes_away_is_waited_for_and_asked_again_when_it_is_back():
    grid = Lossy({2: [ErrorCode.NODE_UNAVAILABLE]}, gone={2: range(1, 30)})
    (answer,) = answers(grid)
    assert answer.code == "" and grid.look >= 30 and len(grid.received) == 2


def test_a_node_that_was_not_there_when_it_was_asked_is_not_waited_for():
    grid = Lossy({2: [ErrorCode.NODE_UNAVAILABLE], 3: []}, gone={2: range(10**9)})
    found = {answer.node: answer.code for answer in answers(grid)}
    assert found == {2: "transport", 3: ""} and len(grid.received) == 2


@pytest.mark.parametrize(("timeout_s", "patience_s"), [(60.0, 0.05), (0.05, 60.0)])
def test_a_node_that_stays_away_has_failed_after_its_time_or_at_the_deadline(
    timeout_s: float, patience_s: float, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server, "_RETURN_S", patience_s)
    grid = Lossy({2: [ErrorCode.NODE_UNAVAILABLE]}, gone={2: range(1, 10**9)})
    (answer,) = answers(grid, timeout_s)
    assert (answer.code, answer.reply) == ("transport", None) and len(grid.received) == 1


class Runtime:
    """The Runtime API with one reply, each of whose pieces is there when it has been asked for so many times."""

    def __init__(self, tries: float) -> None:
        self.sent = Message(content(b"head", masked=b"1234"), dst_node_id=1, message_type="query.mask")
        self.sent.metadata.__dict__["_message_id"] = self.sent.object_id
        self.parts = {name: part.deflate() for name, part in get_all_nested_objects(self.sent).items()}
        self.left = dict.fromkeys(self.parts, tries)

    def PullMessages(self, _: Any) -> PullAppMessagesResponse:  # noqa: N802
        about = message_to_proto(remove_content_from_message(self.sent))
        return PullAppMessagesResponse(messages_list=[about], message_object_trees=[get_object_tree(self.sent)])

    def PullObject(self, asked: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        self.left[asked.object_id] -= 1
        if self.left[asked.object_id] >= 0:
            return PullObjectResponse(object_found=True, object_available=False)
        found = self.parts[asked.object_id]
        return PullObjectResponse(object_found=True, object_available=True, object_content=found)

    def ConfirmMessageReceived(self, _: Any) -> None: ...  # noqa: N802


def pulled(runtime: Runtime, seconds: float) -> Message:
    """The reply through Flower's own grid, its pieces for at most so long."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, 1, 2
    grid = http_grid.HttpGrid(token="any")
    grid._client = runtime  # pyright: ignore[reportAttributeAccessIssue]
    grid.set_run(Run.create_empty(1))
    (found,) = FlowerExchange(grid, seconds)._pull("any", time.monotonic() + seconds)
    return found


def test_flowers_grid_looks_for_the_rest_of_a_reply_in_tenths_of_a_second(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_grid, "pull_objects", http_grid.pull_objects)  # puts it back afterwards
    pauses: list[float] = []

    def pull(*given: Any, **named: Any) -> dict[str, bytes]:
        pauses.extend((named["initial_backoff"], named["backoff_cap"]))
        return pull_objects(*given, **named)

    monkeypatch.setattr(server, "pull_objects", pull)
    server.pull_by_our_clock()
    found = pulled(Runtime(tries=1), 60.0)
    assert found.content.array_records["wardround.vectors"]["masked"].data == b"1234"
    assert max(pauses) <= 1.0


def test_a_reply_whose_rest_does_not_come_is_lost_at_the_deadline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_grid, "pull_objects", http_grid.pull_objects)
    server.pull_by_our_clock()
    began = time.monotonic()
    found = pulled(Runtime(tries=float("inf")), 0.2)
    assert found.has_error() and server._is_lost(found)
    assert time.monotonic() - began < 30


class Cut(Grid):
    """Node 2 begins its reply, and the deadline comes before the rest."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        if found[0].has_error():
            time.sleep(0.1)
        return found


def test_who_was_still_sending_at_the_deadline_is_silent_and_what_others_sent_counts():
    grid = Cut({2: Error(code=ErrorCode.MESSAGE_UNAVAILABLE, reason="not whole"), 3: good(3)})
    assert [(answer.node, answer.code) for answer in answers(grid, timeout_s=0.05)] == [(2, "silent"), (3, "")]


def content(head: Any, **vectors: bytes) -> RecordDict:
    arrays = {name: Array("uint8", (len(data),), server.STYPE, data) for name, data in vectors.items()}
    return RecordDict({"wardround": ConfigRecord({"head": head}), "wardround.vectors": ArrayRecord(arrays)})


@pytest.mark.parametrize(
    "malformed",
    [
        RecordDict({}),
        content("text"),
        content(b""),
        content(b"WARD"),
        content(split(reply_of(2))[0]),
        content(split(reply_of(2))[0], masked=b"12345678"),
        content(split(reply_of(2))[0] + b" ", masked=MASKED.tobytes()),
        content(split(ASKED)[0]),
    ],
    ids=["nothing", "text", "empty", "short", "no-vector", "other-vector", "longer", "instruction"],
)
def test_what_is_no_reply_of_ours_is_a_failure_of_its_node_alone(malformed: RecordDict):
    bad, fine = answers(Grid({2: malformed, 3: good(3)}))
    assert (bad.code, bad.reply) == ("protocol", None)
    assert fine.reply == reply_of(3)


def test_a_sites_own_failure_keeps_its_code():
    failure = Failure(run_id="0" * 32, site="site-02", round_index=1, code="refused")
    (answer,) = answers(Grid({2: pack(*split(failure))}))
    assert answer.code == "refused" and isinstance(answer.reply, Reply)


def context(**settings: Any) -> Context:
    return Context(0, 1, {}, RecordDict(), settings)


def test_the_app_runs_from_its_folder_continues_with_resume_and_its_model_is_merged_again(
    tmp_path: Path, tiny_model_path: Path, cheap_scrypt: None, monkeypatch: pytest.MonkeyPatch
):
    config = RunConfig.model_validate(
        {
            "name": "trial",
            "privacy": {"enabled": False},
            "model": {"id": str(tiny_model_path), "device": "cpu", "prompt": "en_short"},
            "warmup": {"enabled": False},
            "grpo": {"local_steps": 1, "patients_per_step": 2, "expectation": "exact"},
            "federation": {"rounds": 1, "validation_questions_per_site": 4},
            "evaluation": {"questions_per_site": 4, "bootstrap_samples": 100, "samples": 0},
            "simulation": {"registry": "synthetic", "sites": 3},
        }
    )
    registry = load_registry(config)
    write_sites(registry, divide(registry, config), config, tmp_path / "sites")
    sites = sorted((tmp_path / "sites").glob("*/site.toml"))
    folder = write_coordinator(tmp_path / "coordinator", config, tmp_path / "sites")
    monkeypatch.setenv(ENVIRONMENT, str(folder.path))
    out = folder.run("trial")
    server.main(InProcessGrid(client, sites), context(run="trial"))
    provenance = (out / "model" / "provenance.json").read_text()
    # Nobody told the app that its sites are simulated, so they are not: their key is theirs.
    assert "split_key" not in provenance and '"simulated": false' in provenance
    said = run_status.read(out)
    assert (said["phase"], said["rounds_done"], said["ended"]["code"]) == ("finished", 1, "")
    assert {name: site["rounds"] for name, site in said["sites"].items()} == dict.fromkeys(
        ("site-01", "site-02", "site-03"), 1
    )
    assert all(site["code"] == "" and site["epsilon"] is None for site in said["sites"].values())
    report = (out / "report.html").read_bytes()
    with pytest.raises(RunFolderError, match="--resume continues it"):
        server.main(InProcessGrid(client, sites), context(run="trial"))
    assert run_status.read(out) == said  # a start that was refused leaves what is known of a finished run
    server.main(InProcessGrid(client, sites), context(run="trial", resume=True))
    assert (out / "report.html").read_bytes() == report

    model = (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    assert merge_again(submitted(folder, "trial")) == [out / "adapter", out / "model"]
    assert (out / "model" / "model.safetensors").read_bytes() == model


def test_a_run_that_would_add_up_in_the_clear_is_not_submitted(tmp_path: Path):
    config = RunConfig.model_validate(
        {"name": "t", "privacy": {"enabled": False}, "federation": {"secure_aggregation": "none"}}
    )
    folder = empty_coordinator(tmp_path / "coordinator")
    with pytest.raises(ConfigError, match="only a simulation adds up in the clear"):
        submit(folder, config, packaged("registries", "support_icu.toml"))
    assert not folder.run("t").exists()
    # Nor does the app take one that somebody put there.
    folder.run("t").mkdir(parents=True)
    (folder.run("t") / "run.toml").write_text(to_toml(config))
    (folder.run("t") / "dictionary.toml").write_bytes(packaged("registries", "support_icu.toml").read_bytes())
    with pytest.raises(ConfigError, match="only a simulation adds up in the clear"):
        submitted(folder, "t")


def empty_coordinator(path: Path) -> CoordinatorFolder:
    text = "consortium = 'c'\naddress = '127.0.0.1:9092'\n"
    create(path, CoordinatorConfig(consortium="c", address="127.0.0.1:9092"), text)
    return CoordinatorFolder.open(path)


def test_what_the_app_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(ConfigError, match="expected 'run', the name of a run"):
        server.main(Grid({}), context(run=3))
    with pytest.raises(ConfigError, match=f"{ENVIRONMENT} is not set"):
        server.main(Grid({}), context(run="t"))
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(ConfigError, match=r"no coordinator\.toml here"):
        server.main(Grid({}), context(run="t"))
    folder = empty_coordinator(tmp_path / "coordinator")
    monkeypatch.setenv(ENVIRONMENT, str(folder.path))
    with pytest.raises(ConfigError, match="no run 't' was submitted; there are: none"):
        server.main(Grid({}), context(run="t"))
    with pytest.raises(ConfigError, match=r"got '\.\./t'"):
        server.main(Grid({}), context(run="../t"))
