"""The one way out of a site: limits over all runs, what is written down of an instruction that is none."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from wardround.client import gate
from wardround.client.folder import Site
from wardround.client.registry import to_registry
from wardround.common.config import NO_PRIVACY, RunConfig
from wardround.common.counts import count
from wardround.common.errors import SumError
from wardround.common.messages import Failure, KeysReply, Reply, SchemaInstruction, SchemaReply, join, split
from wardround.common.schema import derive_schema
from wardround.simulations.federation import write_sites
from wardround.simulations.synthetic_registry import make

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

RUN = RunConfig(name="t", privacy=NO_PRIVACY)
TABLE, DICTIONARY = make(120, seed=2)
REGISTRY = to_registry("synthetic", pa.Table.from_pandas(TABLE, preserve_index=False), DICTIONARY)
SCHEMA = derive_schema(count(REGISTRY.values, DICTIONARY), DICTIONARY, RUN.questions).to_json()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sites(REGISTRY, [np.arange(120)], RUN, tmp_path / "sites")
    return tmp_path / "sites" / "site-01"


def edit(folder: Path, pattern: str, new: str) -> None:
    path = folder / "site.toml"
    text, n = re.subn(pattern, new, path.read_text())
    assert n == 1
    path.write_text(text)


def ask(folder: Path, run_id: str) -> tuple[Reply, int]:
    """The reply to a schema instruction of this run, and its size in bytes."""
    instruction = SchemaInstruction(
        run_id=run_id, config=RUN.to_json(), config_digest=RUN.digest(), round_index=0, model_digest="", schema=SCHEMA
    )
    head, vectors = gate.respond(folder / "site.toml", SchemaInstruction, *split(instruction))
    return join(head, vectors, Reply), len(head) + sum(map(len, vectors.values()))


def run_id(number: int) -> str:
    return f"{number:032x}"


def test_the_upload_limit_holds_over_runs_that_a_coordinator_names(folder: Path):
    _, size = ask(folder, run_id(0))
    edit(folder, r"max_upload_bytes = \d+", f"max_upload_bytes = {2 * size}")
    assert isinstance(ask(folder, run_id(1))[0], SchemaReply)
    for number in (0, 1, 2):
        reply, _ = ask(folder, run_id(number))
        assert isinstance(reply, Failure) and reply.code == "refused"
    assert Site.open(folder / "site.toml").ledger.sent_bytes() == 2 * size


def test_the_number_of_runs_is_limited_and_known_runs_go_on(folder: Path):
    edit(folder, r"max_runs = \d+", "max_runs = 2")
    for number in (0, 1, 0):
        assert isinstance(ask(folder, run_id(number))[0], SchemaReply)
    reply, _ = ask(folder, run_id(2))
    assert isinstance(reply, Failure) and reply.code == "refused"
    assert sorted(path.name for path in (folder / "state" / "runs").iterdir()) == [run_id(0), run_id(1)]
    assert isinstance(ask(folder, run_id(1))[0], SchemaReply)


def test_what_comes_in_place_of_a_run_id_is_neither_kept_nor_sent_back(folder: Path):
    reply, size = ask(folder, "x" * 1_000_000)
    assert isinstance(reply, Failure) and reply.code == "protocol" and reply.run_id == "" and size < 1000
    site = Site.open(folder / "site.toml")
    assert [entry["run"] for entry in site.ledger.entries()] == ["invalid"]
    assert site.ledger.path.stat().st_size < 1000 and not (folder / "state" / "runs").exists()


def test_a_policy_that_names_no_feature_stops_the_site(folder: Path):
    edit(folder, r"targets_never_asked = \[\]", 'targets_never_asked = ["no_such_feature"]')
    reply, _ = ask(folder, run_id(0))
    assert isinstance(reply, Failure) and reply.code == "config"
    assert "dictionary 'synthetic' has no entry 'no_such_feature'" in (folder / "state" / "site.log").read_text()


def test_an_error_with_half_a_character_in_its_text_is_still_a_code(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(site: Site, instruction: SchemaInstruction) -> SchemaReply:
        raise ValueError("caf\udce9")

    monkeypatch.setitem(gate.WORK, SchemaInstruction, broken)
    reply, _ = ask(folder, run_id(0))
    assert isinstance(reply, Failure) and reply.code == "failure"
    assert "caf\\udce9" in (folder / "state" / "site.log").read_text()


def test_a_dictionary_is_the_one_that_is_named_whatever_was_read_before(folder: Path):
    names = []
    for name in ("support_icu", "dictionary.toml", "smart", "support_icu"):
        edit(folder, r'dictionary = "[\w.]+"', f'dictionary = "{name}"')
        names.append(Site.open(folder / "site.toml").dictionary.name)
    assert names == ["support_icu", "synthetic", "smart", "support_icu"]


@pytest.mark.parametrize("word", sorted(SumError.WORDS))
def test_a_failed_check_of_a_secure_sum_leaves_as_its_word_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, word: str
):
    def broken(site: Site, instruction: SchemaInstruction) -> SchemaReply:
        raise SumError(word, "member 3 of the stroke unit")

    monkeypatch.setitem(gate.WORK, SchemaInstruction, broken)
    reply, size = ask(folder, run_id(0))
    assert isinstance(reply, Failure) and reply.code == word and size < 300
    assert "member 3 of the stroke unit" in (folder / "state" / "site.log").read_text()
    assert [entry["code"] for entry in Site.open(folder / "site.toml").ledger.entries()] == [word]


def test_a_reply_of_a_kind_that_the_protocol_does_not_have_never_leaves(folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Count(KeysReply):
        """A kind of somebody's own."""

    def broken(site: Site, instruction: SchemaInstruction) -> KeysReply:
        return Count(run_id=instruction.run_id, site="s", round_index=0, advert=np.zeros(1, np.uint8))

    monkeypatch.setitem(gate.WORK, SchemaInstruction, broken)
    reply, _ = ask(folder, run_id(0))
    assert isinstance(reply, Failure) and reply.code == "protocol"
    assert [entry["kind"] for entry in Site.open(folder / "site.toml").ledger.entries()] == ["refusal"]
