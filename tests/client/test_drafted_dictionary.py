"""A dictionary drafted from local data: no private run over it at a site, at the coordinator, in a simulation."""

import hashlib
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from wardround.client.folder import Site
from wardround.common.cli import main
from wardround.common.config import CoordinatorConfig, RunConfig, read_toml, to_toml
from wardround.common.dictionary import (
    Dictionary,
    check_reviewed,
    dump_dictionary,
    load_dictionary,
    parse_dictionary,
)
from wardround.common.errors import DictionaryError
from wardround.common.global_model import GlobalModel
from wardround.common.lm import models
from wardround.common.messages import CountInstruction, Failure, KeysReply, Reply, WarmupInstruction, WarmupReply
from wardround.server import app as server
from wardround.server.coordinator import ENVIRONMENT, CoordinatorFolder, create
from wardround.server.deployment import submit
from wardround.simulations.federation import simulate, write_sites
from wardround.simulations.synthetic_registry import make

from .test_policy_demands import DICTIONARY, HOSPITAL, PATIENTS, PRIVATE, REGISTRY, ROUNDS, World

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

DRAFT = DICTIONARY.model_copy(update={"drafted_from": "table"})
SAID = "a draft made from a hospital's table"


def run_of(model: Path, privacy: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "t",
            "privacy": privacy,
            "model": {"id": str(model), "device": "cpu", "prompt": "en_short"},
            "warmup": {"enabled": False},
            "grpo": {"local_steps": 8},
            "federation": ROUNDS,
        }
    )


def world(folder: Path, model: Path, privacy: dict[str, Any], **policy: Any) -> World:
    config = run_of(model, privacy)
    write_sites(REGISTRY, [np.arange(PATIENTS)], config, folder / "sites")
    site = folder / "sites" / "site-01"
    written = read_toml(site / "site.toml")
    written["policy"] = policy or HOSPITAL
    (site / "site.toml").write_text(tomli_w.dumps(written))
    lm = models.load(config.model, config.lora, seed=1)
    return World(site, config, GlobalModel(lm.manifest, lm.vector(trainable_only=False)))


def describe(here: World, dictionary: Dictionary) -> None:
    (here.folder / "dictionary.toml").write_text(dump_dictionary(dictionary))


def warmed_up(here: World, dictionary: Dictionary) -> Reply:
    instruction = here.warmup()
    assert isinstance(instruction, WarmupInstruction)
    return here.sent(replace(instruction, dictionary_digest=dictionary.digest()))


def counted(here: World, dictionary: Dictionary) -> Reply:
    instruction = here.counts()
    assert isinstance(instruction, CountInstruction)
    return here.sent(replace(instruction, dictionary_digest=dictionary.digest()))


def test_the_mark_survives_loading_and_dumping_and_is_part_of_the_digest():
    again = parse_dictionary(tomllib.loads(dump_dictionary(DRAFT)), "again")
    assert again == DRAFT and again.drafted_from == "table"
    assert again.digest() == DRAFT.digest() != DICTIONARY.digest()
    assert 'drafted_from = "table"' in dump_dictionary(DRAFT)
    assert "drafted_from" not in dump_dictionary(DICTIONARY)


def test_a_reviewed_dictionary_has_the_digest_that_it_had_before_there_was_a_mark():
    content = DICTIONARY.model_dump(mode="json")
    del content["drafted_from"]
    for feature in content["features"]:
        feature["levels"] = list(feature["levels"].items())
        del feature["not_outcome"]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert DICTIONARY.digest() == hashlib.sha256(canonical.encode()).hexdigest()


def test_a_mark_that_nobody_writes_is_refused():
    with pytest.raises(DictionaryError, match="'drafted_from'"):
        parse_dictionary(tomllib.loads(dump_dictionary(DRAFT).replace('"table"', '"reviewed"')), "d")


def test_a_site_does_no_private_work_over_a_draft_even_where_the_coordinator_has_the_same(
    tmp_path: Path, tiny_model_path: Path
):
    here = world(tmp_path, tiny_model_path, PRIVATE)
    describe(here, DRAFT)
    reply = warmed_up(here, DRAFT)
    assert isinstance(reply, Failure) and reply.code == "dictionary"
    assert SAID in here.log() and "remove the line drafted_from" in here.log()
    site = Site.open(here.folder / "site.toml")
    assert not site.ledger.spent() and not list(site.state.rglob("*.record"))
    assert site.registry_read == ""


def test_a_site_counts_nothing_when_its_dictionary_became_a_draft_after_the_warm_up(
    tmp_path: Path, tiny_model_path: Path
):
    here = world(tmp_path, tiny_model_path, PRIVATE)
    assert isinstance(warmed_up(here, DICTIONARY), WarmupReply)
    describe(here, DRAFT)
    reply = counted(here, DRAFT)
    assert isinstance(reply, Failure) and reply.code == "dictionary"
    assert not Site.open(here.folder / "site.toml").ledger.spent()
    describe(here, DICTIONARY)
    assert isinstance(counted(here, DICTIONARY), KeysReply)


def test_a_hospital_that_still_has_the_draft_takes_no_part_in_a_run_over_the_reviewed_file(
    tmp_path: Path, tiny_model_path: Path
):
    here = world(tmp_path, tiny_model_path, {"enabled": False}, require_privacy=False)
    describe(here, DRAFT)
    reply = warmed_up(here, DICTIONARY)
    assert isinstance(reply, Failure) and reply.code == "verification"


def test_a_run_without_privacy_may_be_over_a_draft(tmp_path: Path, tiny_model_path: Path):
    here = world(tmp_path, tiny_model_path, {"enabled": False}, require_privacy=False)
    describe(here, DRAFT)
    assert isinstance(warmed_up(here, DRAFT), WarmupReply)
    assert isinstance(counted(here, DRAFT), KeysReply)


class NoGrid(Grid):
    """Nobody is reached."""

    run = property(lambda self: None)  # type: ignore[assignment]

    def _none(self, *args: object, **kwargs: object) -> Any:
        raise AssertionError("a site was asked")

    set_run = create_message = get_node_ids = push_messages = pull_messages = send_and_receive = _none


def test_the_coordinator_refuses_a_draft_before_it_asks_anybody(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = run_of(tiny_model_path, PRIVATE)
    text = "consortium = 'c'\naddress = '127.0.0.1:9092'\n"
    create(tmp_path / "c", CoordinatorConfig(consortium="c", address="127.0.0.1:9092"), text)
    folder = CoordinatorFolder.open(tmp_path / "c")
    (tmp_path / "draft.toml").write_text(dump_dictionary(DRAFT))
    with pytest.raises(DictionaryError, match=SAID):
        submit(folder, config, tmp_path / "draft.toml")
    out = folder.run(config.name)
    assert not out.exists()
    out.mkdir(parents=True)  # as if somebody had put it there
    (out / "run.toml").write_text(to_toml(config))
    (out / "dictionary.toml").write_text(dump_dictionary(DRAFT))
    monkeypatch.setenv(ENVIRONMENT, str(folder.path))
    with pytest.raises(DictionaryError, match=SAID):
        server.main(NoGrid(), Context(0, 1, {}, RecordDict(), {"run": config.name}))
    assert not (out / "journal").exists()


def exit_code(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_a_private_simulation_over_a_draft_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
):
    """The whole way: a table, its draft as the command writes it, a private run, the review."""
    table, _ = make(300, seed=1)
    table.to_csv(tmp_path / "ward.csv", index=False)
    draft = tmp_path / "draft.toml"
    assert exit_code("client", "dictionary", tmp_path / "ward.csv", "--out", draft) == 0
    draft.write_text(draft.read_text().replace('title = "TODO', 'public = true\ntitle = "'))
    content = run_of(tiny_model_path, PRIVATE).model_dump()
    content["simulation"] |= {"registry": str(tmp_path / "ward.csv"), "dictionary": str(draft), "sites": 3}
    (tmp_path / "run.toml").write_text(to_toml(RunConfig.model_validate(content)))
    capsys.readouterr()
    assert exit_code("simulate", "run", tmp_path / "run.toml", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: dictionary 'ward': " + SAID) and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    with pytest.raises(DictionaryError, match=SAID):
        simulate(RunConfig.model_validate(content), tmp_path / "run", resume=False)
    reviewed = draft.read_text().replace('drafted_from = "table"\n', "")
    draft.write_text(reviewed)
    check_reviewed(load_dictionary(draft))


def test_check_says_that_a_dictionary_is_a_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    table, dictionary = make(300, seed=1)
    table.to_csv(tmp_path / "ward.csv", index=False)
    for name, described in (("draft", dictionary.model_copy(update={"drafted_from": "redcap"})), ("done", dictionary)):
        (tmp_path / f"{name}.toml").write_text(dump_dictionary(described))
        assert exit_code("client", "check", tmp_path / "ward.csv", tmp_path / f"{name}.toml") == 0
        assert ("private runs refuse it" in capsys.readouterr().out) == (name == "draft")
