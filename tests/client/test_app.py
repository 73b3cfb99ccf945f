"""A site through its Flower app: what goes in, what comes out, and that nothing else does."""

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from flwr.app import Context, Message, RecordDict
from wardround.client import gate, payload, update
from wardround.client import identity as client_identity
from wardround.client.app import app, pack, unpack
from wardround.client.folder import Site
from wardround.client.registry import to_registry, write_registry
from wardround.common import sums
from wardround.common.adapter import Manifest
from wardround.common.config import RunConfig
from wardround.common.counts import Counts
from wardround.common.dictionary import Dictionary
from wardround.common.global_model import GlobalModel
from wardround.common.lm import models
from wardround.common.messages import (
    CountInstruction,
    Failure,
    Instruction,
    KeysReply,
    MaskedReply,
    MaskInstruction,
    Reply,
    SchemaInstruction,
    SchemaReply,
    SharesInstruction,
    SumInstruction,
    SurvivorsInstruction,
    TrainInstruction,
    UnmaskInstruction,
    WarmupInstruction,
    WarmupReply,
    join,
    split,
)
from wardround.common.question import load_prompt
from wardround.common.schema import Schema, derive_schema
from wardround.common.secagg.keys import COUNTS, UPDATE, Advert
from wardround.simulations.federation import InProcessGrid, write_sites
from wardround.simulations.synthetic_registry import make

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

RUN = "0123456789abcdef" * 2
SECRET = "patient 4711"


@pytest.fixture(scope="module")
def run(tiny_model_path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "privacy": {"enabled": False},
            "model": {"id": str(tiny_model_path), "device": "cpu", "prompt": "en_short"},
        }
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


def count(folder: Path, run: RunConfig, model: str = "", attempt: int = 1, **changes: Any) -> CountInstruction:
    fields = head(run, 0, model, **changes)
    return CountInstruction(**fields, attempt=attempt, dictionary_digest=dictionary_of(folder).digest())


def train(run: RunConfig, model: GlobalModel, index: int = 1, attempt: int = 1, schema: str = "s") -> TrainInstruction:
    fields = head(run, index, model.digest)
    return TrainInstruction(**fields, attempt=attempt, schema_digest=schema, vector=model.trainable)


def advert_of(reply: Reply) -> Advert:
    assert isinstance(reply, KeysReply), reply
    advert = Advert.from_bytes(reply.advert.tobytes())
    advert.verify()
    return advert


def given(folder: Path, purpose: int, index: int = 0) -> payload.Payload:
    return payload.require(folder / "state" / "runs" / RUN, index, purpose)


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
    assert isinstance(ask(folder, count(folder, run, model.digest)), KeysReply)
    dictionary = dictionary_of(folder)
    counts = Counts.from_vector(given(folder, COUNTS).ring.astype(np.int64), dictionary)
    schema = derive_schema(counts, dictionary, run.questions)
    published = ask(folder, SchemaInstruction(**head(run), schema=schema.to_json()))
    assert isinstance(published, SchemaReply) and published.schema_digest == schema.digest()
    return schema


def test_a_site_confirms_the_model_it_computed_itself(folder: Path, run: RunConfig, round_zero: GlobalModel):
    reply = ask(folder, warm(folder, run, round_zero))
    assert isinstance(reply, WarmupReply)
    assert (reply.site, reply.model_digest) == ("site-01", round_zero.digest)
    assert reply.dictionary_digest == dictionary_of(folder).digest()


def test_a_site_without_a_training_patient_says_so_at_the_roll_call(
    folder: Path, run: RunConfig, round_zero: GlobalModel
):
    site = Site.open(folder / "site.toml")
    write_registry(site.registry.take(site.splits["test"]), folder / "registry.parquet")
    reply = ask(folder, warm(folder, run, round_zero))
    assert isinstance(reply, Failure) and reply.code == "registry"
    assert "no training patient" in log(folder)


def test_counts_are_of_training_patients_and_stay_in_the_site(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    message = send(folder, count(folder, run, round_zero.digest))
    site, kept = Site.open(folder / "site.toml"), given(folder, COUNTS)
    counts = Counts.from_vector(kept.ring.astype(np.int64), site.dictionary)
    assert counts.rows == len(site.splits["train"]) < len(site.registry)
    assert kept.tail.tolist() == [len(site.patients_of("train"))]
    sent, vectors = unpack(message.content)
    about = advert_of(join(sent, vectors, Reply)).binding
    assert (about.ring_values, about.tail_values, about.purpose) == (len(kept.ring), 1, COUNTS)
    assert set(vectors) == {"advert"} and len(vectors["advert"]) == Advert.BYTES
    assert kept.ring.tobytes() not in sent + vectors["advert"]


def test_counts_are_made_once_and_every_attempt_has_fresh_keys(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    first = ask(folder, count(folder, run, round_zero.digest))
    (folder / "registry.parquet").unlink()  # what the second attempt adds up is what the first would have
    assert ask(folder, count(folder, run, round_zero.digest)) == first
    second = advert_of(ask(folder, count(folder, run, round_zero.digest, attempt=2)))
    one = advert_of(first)
    assert second.id == one.id and second.binding.attempt == 2
    assert not {one.encryption_key, one.mask_key, one.commitment} & {
        second.encryption_key, second.mask_key, second.commitment,
    }  # fmt: skip
    closed = ask(folder, count(folder, run, round_zero.digest))
    assert isinstance(closed, Failure) and closed.code == "out-of-turn"


def test_counts_too_large_for_a_sum_are_refused(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "count_limit", lambda config: 50)
        reply = ask(folder, count(folder, run, round_zero.digest))
    assert isinstance(reply, Failure) and reply.code == "registry"
    assert "more than 50 patients in a bin: lower federation.max_sites" in log(folder)


def test_counts_belong_to_the_round_0_adapter(folder: Path, run: RunConfig, round_zero: GlobalModel):
    early = ask(folder, count(folder, run, round_zero.digest))
    assert isinstance(early, Failure) and early.code == "protocol"
    ask(folder, warm(folder, run, round_zero))
    other = ask(folder, count(folder, run, "ab" * 32))
    assert isinstance(other, Failure) and other.code == "verification"
    dictionary = CountInstruction(**head(run, 0, round_zero.digest), attempt=1, dictionary_digest="0" * 64)
    foreign = ask(folder, dictionary)
    assert isinstance(foreign, Failure) and foreign.code == "verification"


def test_everything_that_leaves_is_in_the_ledger_with_its_size_and_digest(
    folder: Path, run: RunConfig, round_zero: GlobalModel
):
    replies = [
        send(folder, warm(folder, run, round_zero)),
        send(folder, count(folder, run, round_zero.digest)),
        send(folder, count(folder, run, run_id="../../etc")),
    ]
    assert len(entries(folder)) == 3
    for reply, entry in zip(replies, entries(folder), strict=True):
        sent_head, vectors = unpack(reply.content)
        data = sent_head + b"".join(vectors.values())
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(sent_head).hexdigest())
    assert [entry["kind"] for entry in entries(folder)] == ["egress", "egress", "refusal"]
    assert [entry["phase"] for entry in entries(folder)] == ["query.warmup", "query.count", "query.count"]
    registry = Site.open(folder / "site.toml").registry_digest
    assert [entry["registry"] for entry in entries(folder)] == [registry, registry, ""]
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


def test_a_failure_is_a_code_and_its_text_stays_in_the_site(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    edit(folder, 'table = "', 'table = "missing-')
    message = send(folder, count(folder, run, round_zero.digest))
    assert join(*unpack(message.content), Failure).code == "registry"
    assert len(unpack(message.content)[0]) < 250
    assert "missing-registry.parquet" in log(folder)


def in_the_clear(run: RunConfig) -> RunConfig:
    return run.model_copy(
        update={"federation": run.federation.model_copy(update={"secure_aggregation": "none"})},
    )


def test_a_real_site_refuses_sums_in_the_clear_before_it_reads_a_patient(
    folder: Path, run: RunConfig, round_zero: GlobalModel
):
    edit(folder, "simulated = true", "simulated = false")
    (folder / "registry.parquet").unlink()
    plain = in_the_clear(run)
    for instruction in (warm(folder, plain, round_zero), count(folder, plain), train(plain, round_zero)):
        reply = ask(folder, instruction)
        assert isinstance(reply, Failure) and reply.code == "refused"
    assert {entry["code"] for entry in entries(folder)} == {"refused"}
    assert not (folder / "state" / "runs").exists() and "in the clear" in log(folder)


def test_a_real_site_takes_part_in_secure_sums(folder: Path, run: RunConfig, round_zero: GlobalModel):
    edit(folder, "simulated = true", "simulated = false\nrequire_privacy = false")
    assert isinstance(ask(folder, warm(folder, run, round_zero)), WarmupReply)
    assert isinstance(ask(folder, count(folder, run, round_zero.digest)), KeysReply)


def test_a_simulated_site_sends_no_count_in_the_clear_either(folder: Path, run: RunConfig, round_zero: GlobalModel):
    plain = in_the_clear(run)
    ask(folder, warm(folder, plain, round_zero))
    reply = ask(folder, count(folder, plain, round_zero.digest))
    assert isinstance(reply, KeysReply) and reply.advert.size == 0


@pytest.mark.parametrize(
    ("pattern", "new", "code"),
    [
        (r'roster_digest = "\w+"', f'roster_digest = "{"0" * 64}"', "verification"),
        (r'roster_digest = "\w+"', "", "config"),
        (r'name = "site-01"', 'name = "site-9"', "verification"),
    ],
    ids=["another-roster", "no-roster", "another-name"],
)
def test_a_site_whose_identity_or_roster_is_not_usable_gives_no_keys(
    folder: Path, run: RunConfig, round_zero: GlobalModel, pattern: str, new: str, code: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.delenv("WARDROUND_PASSPHRASE", raising=False)
    ask(folder, warm(folder, run, round_zero))
    path = folder / "site.toml"
    text, n = re.subn(pattern, new, path.read_text())
    assert n == 1
    path.write_text(text)
    client_identity._loaded.clear()
    reply = ask(folder, count(folder, run, round_zero.digest))
    assert isinstance(reply, Failure) and reply.code == code


@pytest.mark.parametrize("lost", ["passphrase", "key"])
def test_a_site_that_cannot_sign_its_ledger_answers_nothing(
    folder: Path, run: RunConfig, round_zero: GlobalModel, lost: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("WARDROUND_PASSPHRASE", raising=False)
    ask(folder, warm(folder, run, round_zero))
    before = (folder / "state" / "ledger.jsonl").read_bytes()
    (folder / ("passphrase.txt" if lost == "passphrase" else "state/identity.pem")).unlink()
    client_identity._loaded.clear()
    message = send(folder, count(folder, run, round_zero.digest))
    assert not message.has_content() and message.error.reason == "site"
    assert (folder / "state" / "ledger.jsonl").read_bytes() == before
    assert "nothing leaves: ConfigError: " in log(folder)


def test_an_unexpected_exception_leaves_as_a_code(folder: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch):
    def broken(site: Site, instruction: CountInstruction) -> KeysReply:
        raise KeyError(SECRET)

    monkeypatch.setitem(gate.WORK, CountInstruction, broken)
    message = send(folder, count(folder, run))
    sent_head, vectors = unpack(message.content)
    assert join(sent_head, vectors, Failure).code == "failure"
    assert SECRET.encode() not in sent_head and SECRET not in repr(message)
    assert SECRET in log(folder)


def test_nothing_leaves_when_the_ledger_cannot_be_written(folder: Path, run: RunConfig):
    (folder / "state" / "ledger.jsonl").mkdir()
    message = send(folder, count(folder, run))
    assert not message.has_content()
    assert (message.error.code, message.error.reason) == (0, "site")


def test_a_damaged_ledger_stops_the_site(folder: Path, run: RunConfig):
    (folder / "state" / "ledger.jsonl").write_text("hello\n")
    assert send(folder, count(folder, run)).has_error()


def test_a_message_on_the_wrong_route_is_refused(folder: Path, run: RunConfig):
    for route in ("query.mask", "train.local", "evaluate.test"):
        reply = ask(folder, count(folder, run), route=route)
        assert isinstance(reply, Failure) and reply.code == "protocol"


def test_exchanges_of_a_sum_that_was_not_begun_are_out_of_turn(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    about = {**head(run, 0, round_zero.digest), "purpose": COUNTS, "attempt": 1}
    some = np.zeros(3, np.uint8)
    later: list[SumInstruction] = [
        MaskInstruction(**about, recipients=some, ciphertexts=some),
        SurvivorsInstruction(**about, survivors=some),
        UnmaskInstruction(**about, signers=some, signatures=some),
    ]
    shares = SharesInstruction(**about, threshold=3, key_list=some)
    codes = [ask(folder, instruction) for instruction in (shares, *later)]
    # A site that has nothing to add says that first.
    assert [reply.code for reply in codes if isinstance(reply, Failure)] == [
        "out-of-turn", "protocol", "out-of-turn", "out-of-turn",
    ]  # fmt: skip
    ask(folder, count(folder, run, round_zero.digest))
    codes = [ask(folder, instruction) for instruction in (*later, shares)]
    assert [reply.code for reply in codes if isinstance(reply, Failure)] == [*["out-of-turn"] * 3, "malformed"]
    for purpose in (0, 5, -1):  # no such sum
        for instruction in (shares, *later):
            reply = ask(folder, replace(instruction, purpose=purpose))
            assert isinstance(reply, Failure) and reply.code == "protocol"


def test_a_masked_vector_travels_as_an_array_that_flower_cuts_into_pieces():
    reply = MaskedReply(run_id=RUN, site="s", round_index=1, masked=np.arange(7, dtype=np.uint32))
    content = pack(*split(reply))
    (array,) = content.array_records["wardround.vectors"].values()
    assert (array.dtype, array.shape, array.stype) == ("uint32", (7,), "wardround.raw")
    assert array.data == np.arange(7, dtype="<u4").tobytes()
    assert join(*unpack(content), Reply) == reply


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
        (
            {"config": '{"name": "t", "privacy": {"enabled": false}, "federation": {"secure_aggregation": "off"}}'},
            "config",
        ),
        ({"round_index": 3}, "refused"),
    ],
)
def test_a_config_that_is_not_what_it_says_is_refused(folder: Path, run: RunConfig, changes: dict, code: str):
    fields = {**head(run), **changes}
    reply = ask(folder, CountInstruction(**fields, attempt=1, dictionary_digest=dictionary_of(folder).digest()))
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
    reply = ask(folder, train(run, round_zero, schema="0" * 64))
    assert isinstance(reply, Failure) and reply.code == "protocol"


def test_a_model_other_than_its_digest_is_not_trained_on(folder: Path, run: RunConfig, round_zero: GlobalModel):
    schema = set_up(folder, run, round_zero)
    moved = round_zero.trainable + np.float32(1)
    reply = ask(folder, replace(train(run, round_zero, schema=schema.digest()), vector=moved))
    assert isinstance(reply, Failure) and reply.code == "verification"


def stored(folder: Path, run: RunConfig, model: GlobalModel, index: int) -> update.StoredUpdate:
    """An update in the state folder, as a round that was trained before a restart left it."""
    digest = hashlib.sha256(
        json.dumps([RUN, str(index), run.digest(), model.digest, "s"]).encode()
    ).hexdigest()  # fmt: skip
    left = update.StoredUpdate(
        digest,
        model.digest,
        sums.input_digest("s").hex(),
        np.ones(model.manifest.size, np.float32),
        np.arange(1, sums.update_tail(run) + 1),
    )
    update.store(folder / "state" / "runs" / RUN, index, left)
    return left


def test_a_repeated_instruction_is_answered_from_disk_without_training(
    folder: Path, run: RunConfig, round_zero: GlobalModel
):
    ask(folder, warm(folder, run, round_zero))
    left = stored(folder, run, round_zero, 1)
    first, second = send(folder, train(run, round_zero)), send(folder, train(run, round_zero))
    assert unpack(first.content) == unpack(second.content)
    about = advert_of(join(*unpack(first.content), Reply)).binding
    assert (about.purpose, about.round_index, about.ring_values) == (UPDATE, 1, round_zero.manifest.size)
    assert about.tail_values == sums.update_tail(run)
    assert (about.model.hex(), about.config.hex()) == (round_zero.digest, run.digest())
    kept = given(folder, UPDATE, 1)
    assert kept.ring.tobytes() == left.delta.tobytes() and kept.tail.tolist() == left.tail.tolist()


def test_a_retry_gets_fresh_keys_for_the_same_update(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    stored(folder, run, round_zero, 1)
    before = given(folder, UPDATE, 1).content_digest(UPDATE)
    first, second = (advert_of(ask(folder, train(run, round_zero, attempt=n))) for n in (1, 2))
    assert first.mask_key != second.mask_key and first.commitment != second.commitment
    assert given(folder, UPDATE, 1).content_digest(UPDATE) == before


def test_sums_of_rounds_before_the_newest_are_over(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    for index in (1, 2):
        stored(folder, run, round_zero, index)
        assert isinstance(ask(folder, train(run, round_zero, index)), KeysReply)
    reply = ask(folder, train(run, round_zero, 1, attempt=2))
    assert isinstance(reply, Failure) and reply.code == "out-of-turn"


def test_one_round_is_never_trained_from_two_models(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    stored(folder, run, round_zero, 1)
    moved = round_zero.moved(round_zero.trainable + np.float32(1))
    reply = ask(folder, train(run, moved))
    assert isinstance(reply, Failure) and reply.code == "refused"


def test_a_round_whose_update_is_gone_is_not_trained_again_from_another_model(
    folder: Path, run: RunConfig, round_zero: GlobalModel
):
    schema = set_up(folder, run, round_zero)
    update.claim(folder / "state" / "runs" / RUN, 1, "what round 1 was trained from")
    for index in (1, 2):
        update.claim(folder / "state" / "runs" / RUN, 2, "what round 2 was trained from")
        reply = ask(folder, train(run, round_zero, index, schema=schema.digest()))
        assert isinstance(reply, Failure) and reply.code == "refused"
    assert "round 1: already trained from another model" in log(folder)


def test_counting_and_its_secure_sum_load_no_torch(folder: Path, run: RunConfig, round_zero: GlobalModel):
    ask(folder, warm(folder, run, round_zero))
    code = """
import sys
from pathlib import Path
from wardround.client.gate import respond
from wardround.common import identity
from wardround.common.messages import CountInstruction
import wardround.client.app
identity._SCRYPT["n"] = 2**4  # as this site was made
head, vectors = respond(Path(sys.argv[1]), CountInstruction, bytes.fromhex(sys.argv[2]), {})
heavy = {"torch", "transformers", "trl", "peft"}
print(len(head) > 100, len(vectors["advert"]) == 375, sorted(heavy & set(sys.modules)))
"""
    sent = split(count(folder, run, round_zero.digest))[0].hex()
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "site.toml"), sent], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True True []"
