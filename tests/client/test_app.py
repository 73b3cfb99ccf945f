"""A site through its Flower app: what goes in, what comes out, and that nothing else does."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from flwr.app import Context, Message, RecordDict
from wardround.client import gate, update
from wardround.client.app import app, pack, unpack
from wardround.client.folder import Site
from wardround.client.registry import to_registry
from wardround.common.adapter import Manifest
from wardround.common.config import RunConfig
from wardround.common.counts import Counts
from wardround.common.dictionary import Dictionary
from wardround.common.global_model import GlobalModel
from wardround.common.lm import models
from wardround.common.messages import (
    CollectInstruction,
    CollectReply,
    CountInstruction,
    CountReply,
    Failure,
    Instruction,
    Reply,
    SchemaInstruction,
    SchemaReply,
    TrainInstruction,
    WarmupInstruction,
    WarmupReply,
    join,
    split,
)
from wardround.common.question import load_prompt
from wardround.common.schema import Schema, derive_schema
from wardround.simulations.federation import InProcessGrid, write_sites
from wardround.simulations.synthetic_registry import make

RUN = "0123456789abcdef" * 2
SECRET = "patient 4711"


@pytest.fixture(scope="module")
def run(tiny_model_path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "t", "model": {"id": str(tiny_model_path), "device": "cpu", "prompt": "en_short"}}
    )


@pytest.fixture(scope="module")
def round_zero(run: RunConfig) -> GlobalModel:
    lm = models.load(run.model, run.lora, seed=1)
    return GlobalModel(lm.manifest, lm.vector(trainable_only=False))


@pytest.fixture
def folder(tmp_path: Path, run: RunConfig) -> Path:
    table, dictionary = make(200, seed=2)
    registry = to_registry("synthetic", pa.Table.from_pandas(table, preserve_index=False), dictionary)
    write_sites(registry, [np.arange(200)], run, tmp_path / "sites")
    return tmp_path / "sites" / "site-01"


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "site.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def dictionary_of(folder: Path) -> Dictionary:
    return Site.open(folder / "site.toml").dictionary


def head(run: RunConfig, index: int = 0, model: str = "", **changes: Any) -> dict[str, Any]:
    fields = {"run_id": RUN, "config": run.to_json(), "config_digest": run.digest(), "round_index": index}
    return {**fields, "model_digest": model, **changes}


def send(folder: Path, instruction: Instruction, route: str = "") -> Message:
    """One instruction through Flower's own dispatch."""
    InProcessGrid(app, [])  # names the run, which Flower's messages need
    message = Message(pack(*split(instruction)), dst_node_id=7, message_type=route or instruction.ROUTE)
    return app(message, Context(0, 7, {"site": str(folder / "site.toml")}, RecordDict(), {}))


def ask(folder: Path, instruction: Instruction, route: str = "") -> Reply:
    return join(*unpack(send(folder, instruction, route).content), Reply)


def entries(folder: Path) -> list[dict[str, Any]]:
    path = folder / "state" / "ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def log(folder: Path) -> str:
    path = folder / "state" / "site.log"
    return path.read_text() if path.exists() else ""


def count(folder: Path, run: RunConfig, **changes: Any) -> CountInstruction:
    return CountInstruction(**head(run, **changes), dictionary_digest=dictionary_of(folder).digest())


def warm(folder: Path, run: RunConfig, model: GlobalModel, **changes: Any) -> WarmupInstruction:
    fields: Mapping[str, Any] = {
        **head(run, 0, model.digest),
        "manifest": model.manifest.to_json(),
        "dictionary_digest": dictionary_of(folder).digest(),
        "prompt_digest": load_prompt(run.model.prompt).digest(),
        "vector": model.full,
        **changes,
    }
    return WarmupInstruction(**fields)


def set_up(folder: Path, run: RunConfig, model: GlobalModel) -> Schema:
    """Warm-up and schema phases."""
    assert isinstance(ask(folder, warm(folder, run, model)), WarmupReply)
    counted = ask(folder, count(folder, run))
    assert isinstance(counted, CountReply)
    dictionary = dictionary_of(folder)
    schema = derive_schema(Counts.from_vector(counted.counts, dictionary), dictionary, run.questions)
    published = ask(folder, SchemaInstruction(**head(run), schema=schema.to_json()))
    assert isinstance(published, SchemaReply) and published.schema_digest == schema.digest()
    return schema


def test_a_site_confirms_the_model_it_computed_itself(folder: Path, run: RunConfig, round_zero: GlobalModel):
    reply = ask(folder, warm(folder, run, round_zero))
    site = Site.open(folder / "site.toml")
    assert isinstance(reply, WarmupReply)
    assert (reply.site, reply.model_digest) == ("site-01", round_zero.digest)
    assert reply.patients == len(site.splits["train"])


def test_counts_are_of_training_patients_only(folder: Path, run: RunConfig):
    reply = ask(folder, count(folder, run))
    site = Site.open(folder / "site.toml")
    assert isinstance(reply, CountReply)
    assert Counts.from_vector(reply.counts, site.dictionary).rows == len(site.splits["train"]) < len(site.registry)


def test_everything_that_leaves_is_in_the_ledger_with_its_size_and_digest(
    folder: Path, run: RunConfig, round_zero: GlobalModel
):
    replies = [
        send(folder, warm(folder, run, round_zero)),
        send(folder, count(folder, run)),
        send(folder, count(folder, run, run_id="../../etc")),
    ]
    assert len(entries(folder)) == 3
    for reply, entry in zip(replies, entries(folder), strict=True):
        sent_head, vectors = unpack(reply.content)
        data = sent_head + b"".join(vectors.values())
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(sent_head).hexdigest())
    assert [entry["kind"] for entry in entries(folder)] == ["egress", "egress", "refusal"]
    assert [entry["phase"] for entry in entries(folder)] == ["query.warmup", "query.count", "query.count"]
    assert Site.open(folder / "site.toml").ledger.verify() == 3


def test_what_a_kill_left_half_written_is_gone_after_the_next_roll_call(
    folder: Path, run: RunConfig, round_zero: GlobalModel
):
    ask(folder, warm(folder, run, round_zero))
    left = folder / "state" / "runs" / RUN / ".update-00001.record.4711.tmp"
    left.write_bytes(b"half")
    ask(folder, warm(folder, run, round_zero))
    assert not left.exists()


def test_state_is_for_the_site_only(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    assert (folder / "state").stat().st_mode & 0o777 == 0o700
    assert all(not path.stat().st_mode & 0o077 for path in (folder / "state").rglob("*.*"))


@pytest.mark.parametrize(
    ("old", "new"),
    [("simulated = true", "simulated = false"), ('table = "', 'table = "missing-')],
    ids=["real", "table"],
)
def test_a_failure_is_a_code_and_its_text_stays_in_the_site(folder: Path, run: RunConfig, old: str, new: str):
    edit(folder, old, new)
    message = send(folder, count(folder, run))
    reply = join(*unpack(message.content), Failure)
    assert reply.code == {"simulated = true": "refused"}.get(old, "registry")
    assert len(unpack(message.content)[0]) < 250
    assert "missing-registry.parquet" in log(folder) or "unmasked" in log(folder)


def test_a_real_site_refuses_before_it_reads_a_patient(folder: Path, run: RunConfig):
    edit(folder, "simulated = true", "simulated = false")
    (folder / "registry.parquet").unlink()
    reply = ask(folder, count(folder, run))
    assert isinstance(reply, Failure) and reply.code == "refused"
    assert entries(folder)[0]["code"] == "refused"


def test_an_unexpected_exception_leaves_as_a_code(folder: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch):
    def broken(site: Site, instruction: CountInstruction) -> CountReply:
        raise KeyError(SECRET)

    monkeypatch.setitem(gate.WORK, CountInstruction, broken)
    message = send(folder, count(folder, run))
    sent_head, vectors = unpack(message.content)
    assert join(sent_head, vectors, Failure).code == "failure"
    assert SECRET.encode() not in sent_head and SECRET not in repr(message)
    assert SECRET in log(folder)


def test_nothing_leaves_when_the_ledger_cannot_be_written(folder: Path, run: RunConfig):
    (folder / "state").mkdir()
    (folder / "state" / "ledger.jsonl").mkdir()
    message = send(folder, count(folder, run))
    assert not message.has_content()
    assert (message.error.code, message.error.reason) == (0, "site")


def test_a_damaged_ledger_stops_the_site(folder: Path, run: RunConfig):
    (folder / "state").mkdir()
    (folder / "state" / "ledger.jsonl").write_text("hello\n")
    assert send(folder, count(folder, run)).has_error()


def test_a_message_on_the_wrong_route_is_refused(folder: Path, run: RunConfig):
    reply = ask(folder, count(folder, run), route="query.collect")
    assert isinstance(reply, Failure) and reply.code == "protocol"


@pytest.mark.parametrize("run_id", ["", "../../../etc/passwd", "0" * 31, "A" * 32, "0" * 33])
def test_a_run_id_that_could_be_a_path_is_refused(folder: Path, run: RunConfig, run_id: str):
    reply = ask(folder, count(folder, run, run_id=run_id))
    assert isinstance(reply, Failure) and reply.code == "protocol"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"config_digest": "0" * 64}, "verification"),
        ({"config": "{}"}, "config"),
        ({"config": "{"}, "protocol"),
        ({"config": '{"name": "t", "federation": {"secure_aggregation": "off"}}'}, "config"),
        ({"round_index": 3}, "refused"),
    ],
)
def test_a_config_that_is_not_what_it_says_is_refused(folder: Path, run: RunConfig, changes: dict, code: str):
    fields = {**head(run), **changes}
    reply = ask(folder, CountInstruction(**fields, dictionary_digest=dictionary_of(folder).digest()))
    assert isinstance(reply, Failure) and reply.code == code


def test_another_model_dictionary_or_prompt_than_promised_is_refused(
    folder: Path, run: RunConfig, round_zero: GlobalModel
):
    other = round_zero.full.copy()
    other[0] += 1  # a value of the frozen A
    foreign = Manifest(round_zero.manifest.specs, "another base", "ffa")
    for changes in (
        {"vector": other},
        {"dictionary_digest": "0" * 64},
        {"prompt_digest": load_prompt("ko").digest()},
        {"manifest": foreign.to_json(), "model_digest": GlobalModel(foreign, round_zero.full).digest},
    ):
        reply = ask(folder, warm(folder, run, round_zero, **changes))
        assert isinstance(reply, Failure) and reply.code == "verification"
    assert not list((folder / "state").rglob("round-0.record"))
    assert "prompt 'en_short': the run's is" in log(folder)


def test_training_needs_the_phases_before_it(folder: Path, run: RunConfig, round_zero: GlobalModel):
    instruction = TrainInstruction(
        **head(run, 1, round_zero.digest), schema_digest="0" * 64, vector=round_zero.trainable
    )
    reply = ask(folder, instruction)
    assert isinstance(reply, Failure) and reply.code == "protocol"


def test_a_model_other_than_its_digest_is_not_trained_on(folder: Path, run: RunConfig, round_zero: GlobalModel):
    schema = set_up(folder, run, round_zero)
    moved = round_zero.trainable + np.float32(1)
    instruction = TrainInstruction(**head(run, 1, round_zero.digest), schema_digest=schema.digest(), vector=moved)
    reply = ask(folder, instruction)
    assert isinstance(reply, Failure) and reply.code == "verification"


def stored(folder: Path, run: RunConfig, model: GlobalModel, index: int) -> update.StoredUpdate:
    """An update in the state folder, as a round that was trained before a restart left it."""
    instruction = TrainInstruction(**head(run, index, model.digest), schema_digest="s", vector=model.trainable)
    digest = hashlib.sha256(
        json.dumps([RUN, str(index), run.digest(), model.digest, "s"]).encode()
    ).hexdigest()  # fmt: skip
    statistics = {"steps": 1, "questions": 2, "completions": 4, "reward_sum": 1.5, "boxed": 4, "completion_tokens": 4}
    left = update.StoredUpdate(
        digest,
        model.digest,
        1,
        np.ones(model.manifest.size, np.float32),
        {**statistics, "seconds": 0.25},
        np.array([1, 1]),
    )
    update.store(folder / "state" / "runs" / RUN, index, left)
    assert instruction.round_index == index
    return left


def test_a_repeated_instruction_is_answered_from_disk_without_training(
    folder: Path, run: RunConfig, round_zero: GlobalModel
):
    ask(folder, warm(folder, run, round_zero))
    stored(folder, run, round_zero, 1)
    instruction = TrainInstruction(**head(run, 1, round_zero.digest), schema_digest="s", vector=round_zero.trainable)
    first, second = send(folder, instruction), send(folder, instruction)
    assert unpack(first.content) == unpack(second.content)
    collected = ask(folder, CollectInstruction(**head(run, 1, round_zero.digest)))
    assert isinstance(collected, CollectReply)
    assert collected.delta.tolist() == [1.0] * round_zero.manifest.size


def test_one_round_is_never_trained_from_two_models(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    stored(folder, run, round_zero, 1)
    moved = round_zero.moved(round_zero.trainable + np.float32(1))
    reply = ask(folder, TrainInstruction(**head(run, 1, moved.digest), schema_digest="s", vector=moved.trainable))
    assert isinstance(reply, Failure) and reply.code == "refused"


def test_a_round_whose_update_is_gone_is_not_trained_again_from_another_model(
    folder: Path, run: RunConfig, round_zero: GlobalModel
):
    schema = set_up(folder, run, round_zero)
    update.claim(folder / "state" / "runs" / RUN, 1, "what round 1 was trained from")
    for index in (1, 2):
        update.claim(folder / "state" / "runs" / RUN, 2, "what round 2 was trained from")
        instruction = TrainInstruction(
            **head(run, index, round_zero.digest), schema_digest=schema.digest(), vector=round_zero.trainable
        )
        reply = ask(folder, instruction)
        assert isinstance(reply, Failure) and reply.code == "refused"
    assert "round 1: already trained from another model" in log(folder)


def test_an_update_is_collected_for_its_own_model_and_round_only(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    stored(folder, run, round_zero, 1)
    for index, model in ((2, round_zero.digest), (1, "0" * 64)):
        reply = ask(folder, CollectInstruction(**head(run, index, model)))
        assert isinstance(reply, Failure) and reply.code == "protocol"


def test_counting_loads_no_torch(folder: Path, run: RunConfig):
    code = """
import sys
from pathlib import Path
from wardround.client.gate import respond
from wardround.common.messages import CountInstruction
import wardround.client.app
head, vectors = respond(Path(sys.argv[1]), CountInstruction, bytes.fromhex(sys.argv[2]), {})
heavy = {"torch", "transformers", "trl", "peft"}
print(len(head) > 100, len(vectors["counts"]) > 100, sorted(heavy & set(sys.modules)))
"""
    sent = split(count(folder, run))[0].hex()
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "site.toml"), sent], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True True []"
