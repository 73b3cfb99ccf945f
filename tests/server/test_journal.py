"""The journal: a folder belongs to one run and one config; what was written is found again or known to be damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
from wardround.common.config import RunConfig, packaged
from wardround.common.errors import ConfigError, RunFolderError
from wardround.common.files import read_record, write_record
from wardround.server.journal import check_disk, check_folder, open_journal, write_rounds


def config(**changes: object) -> RunConfig:
    return RunConfig.model_validate({"name": "trial", "privacy": {"enabled": False}, **changes})


def test_a_phase_is_complete_once_it_was_written(tmp_path: Path):
    journal = open_journal(tmp_path / "run", config(), resume=False)
    assert not journal.has("apply")
    journal.write("apply", {"n": 1}, {"v": np.arange(3.0)})
    assert journal.has("apply")
    assert journal.read("apply").vectors["v"].tolist() == [0, 1, 2]
    journal.drop("apply")
    assert not journal.has("apply")
    journal.drop("apply")


def test_resuming_finds_the_same_run(tmp_path: Path):
    first = open_journal(tmp_path, config(), resume=False)
    first.write("warmup", {"n": 1})
    first.close()
    again = open_journal(tmp_path, config(speed={"micro_batch": 3}), resume=True)
    assert again.run_id == first.run_id
    assert (first.resumed, again.resumed) == (False, True)
    assert again.has("warmup")


def test_resuming_nothing_starts_a_run(tmp_path: Path):
    assert not open_journal(tmp_path / "new", config(), resume=True).resumed


def test_a_kill_before_the_first_write_leaves_nobodys_folder(tmp_path: Path):
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "lock").touch()
    assert not check_folder(tmp_path, config(), resume=False)


def test_a_folder_with_a_run_is_refused_without_resume(tmp_path: Path):
    open_journal(tmp_path, config(), resume=False).close()
    with pytest.raises(RunFolderError, match="holds run 'trial'; --resume continues it"):
        open_journal(tmp_path, config(), resume=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 4}, "'seed' was 0 when the run began, now 4"),
        ({"grpo": {"local_steps": 9}}, "'grpo.local_steps' was 4 when the run began, now 9"),
        ({"name": "other"}, "'name' was 'trial'"),
    ],
)
def test_resuming_with_another_config_names_the_key(tmp_path: Path, changes: dict, said: str):
    open_journal(tmp_path, config(), resume=False).close()
    with pytest.raises(RunFolderError, match=said):
        open_journal(tmp_path, config(**changes), resume=True)


@pytest.mark.parametrize(("removed", "whose"), [("keep", "whose"), ("rounds_by_moon", "this one's")])
def test_resuming_a_run_of_another_version_says_so(tmp_path: Path, removed: str, whose: str):
    open_journal(tmp_path, config(), resume=False).close()
    path = tmp_path / "journal" / "run.record"
    values = dict(read_record(path).values)
    before = json.loads(values["config"])
    if whose == "whose":
        del before["federation"][removed]
    else:
        before["federation"][removed] = 1
    write_record(path, {**values, "config": json.dumps(before), "config_digest": "0" * 64})
    with pytest.raises(RunFolderError, match=f"another version .*{whose} config has no 'federation.{removed}'"):
        open_journal(tmp_path, config(), resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path, resume: bool):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(RunFolderError, match=r"holds 'thesis\.txt' and no run"):
        open_journal(tmp_path, config(), resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunFolderError, match="expected a folder, got a file"):
        open_journal(tmp_path / "run", config(), resume=False)


def test_two_processes_cannot_work_on_one_run(tmp_path: Path):
    first = open_journal(tmp_path, config(), resume=False)
    with pytest.raises(RunFolderError, match="another process"):
        open_journal(tmp_path, config(), resume=True)
    first.close()
    open_journal(tmp_path, config(), resume=True).close()


def test_a_damaged_phase_says_what_to_do(tmp_path: Path):
    journal = open_journal(tmp_path, config(), resume=False)
    journal.write("warmup", {"n": 1})
    path = tmp_path / "journal" / "warmup.record"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(RunFolderError, match=r"damaged.*delete it to repeat that phase"):
        journal.read("warmup")
    with pytest.raises(RunFolderError, match="missing"):
        journal.read("baseline")


@pytest.mark.parametrize(
    "phase",
    ["schema", "baseline", "round-00002-apply", "round-00001-validate", "evaluate", "counts-attempt", "counts-sum"],
)
def test_nobody_is_told_to_repeat_a_sum_that_sites_signed(tmp_path: Path, phase: str):
    with open_journal(tmp_path, config(), resume=False) as journal:
        journal.write(phase, {"n": 1})
        path = tmp_path / "journal" / f"{phase}.record"
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(RunFolderError, match=r"damaged.*put a copy of the file back, or start a new run$"):
            journal.read(phase)


def test_resuming_with_an_edited_prompt_is_refused(tmp_path: Path):
    prompt = tmp_path / "own.toml"
    prompt.write_bytes(packaged("prompts", "en.toml").read_bytes())
    own = config(model={"prompt": str(prompt)})
    open_journal(tmp_path / "run", own, resume=False).close()
    open_journal(tmp_path / "run", own, resume=True).close()
    prompt.write_text(prompt.read_text().replace("an experienced", "a tired"))
    with pytest.raises(RunFolderError, match=r"prompt '.*own\.toml' was edited since the run began"):
        open_journal(tmp_path / "run", own, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_prompt_that_does_not_exist_leaves_no_folder(tmp_path: Path, resume: bool):
    with pytest.raises(ConfigError, match="no such template"):
        open_journal(tmp_path / "run", config(model={"prompt": "nosuch"}), resume)
    assert not (tmp_path / "run").exists()


def test_a_folder_below_a_file_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match="expected a folder, got a file at"):
        open_journal(tmp_path / "file" / "run", config(), resume=False)


def test_what_a_kill_left_half_written_is_gone_when_the_folder_is_opened_again(tmp_path: Path):
    open_journal(tmp_path, config(), resume=False).close()
    for place in (tmp_path, tmp_path / "journal"):
        (place / ".x.record.4711.tmp").write_bytes(b"half")
    open_journal(tmp_path, config(), resume=True).close()
    assert list(tmp_path.rglob(".*.tmp")) == []


def test_losses_are_kept_over_processes_and_once_each(tmp_path: Path):
    with open_journal(tmp_path, config(), resume=False) as journal:
        assert journal.losses() == []
        journal.add_losses("train", 1, {"b": "silent", "a": "refused"})
    with open_journal(tmp_path, config(), resume=True) as journal:
        journal.add_losses("train", 1, {"b": "silent"})
        journal.add_losses("train", 2, {"b": "silent"})
        found = [(loss["phase"], loss["round"], loss["site"], loss["code"]) for loss in journal.losses()]
        assert found == [("train", 1, "b", "silent"), ("train", 1, "a", "refused"), ("train", 2, "b", "silent")]


def test_a_full_disk_is_noticed_before_the_start(tmp_path: Path):
    check_disk(tmp_path / "not" / "yet", 1000)
    with pytest.raises(RunFolderError, match="not enough disk"):
        check_disk(tmp_path / "not" / "yet", 10**18)
    assert not list(tmp_path.iterdir())


def test_rounds_are_written_whole(tmp_path: Path):
    write_rounds(tmp_path, [{"round": 1}, {"round": 2}])
    write_rounds(tmp_path, [{"round": 1}])
    assert (tmp_path / "rounds.jsonl").read_text() == '{"round": 1}\n'
