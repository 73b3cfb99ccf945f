"""Whole runs on one machine with a tiny model: the files, the refusals, and a kill in the middle of a round."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from wardround.client.folder import Site
from wardround.client.identity import read_roster
from wardround.client.registry import read_registry
from wardround.common.adapter import Manifest, TensorSpec
from wardround.common.config import RunConfig, load_run, load_site
from wardround.common.dictionary import load_dictionary
from wardround.common.errors import ConfigError, ModelError, RunFolderError
from wardround.common.files import read_record
from wardround.server.cohort import QuorumError
from wardround.server.journal import open_journal
from wardround.server.receipts import Agreement, check, read_run
from wardround.server.tracking import SilentProgress
from wardround.simulations.federation import divide, load_registry, needed_bytes, simulate, write_sites

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

ROUTES = ("train.local", "evaluate.validate", "query.shares", "query.mask", "query.survivors", "query.unmask")
# One process after another works on one run, and kills itself with signal 9 where it is told to: the n-th message of a
# route and round is on its way (before) or was just carried out (after). All are forked: torch is imported and the base
# model is read once.
RUN = """
import json, os, signal, sys
from pathlib import Path
from wardround.common.cli import quiet_third_parties
quiet_third_parties()
import wardround.client.evaluation, wardround.client.grpo, wardround.server.run, wardround.server.finalize
from wardround.common import identity
from wardround.common.config import load_run
from wardround.common.lm import models
from wardround.simulations import federation

identity._SCRYPT["n"] = 2**4  # what the cheap_scrypt fixture does

class Grid(federation.InProcessGrid):
    def pull_messages(self, message_ids):
        (message_id,) = message_ids
        about = self._waiting[message_id].metadata
        Grid.left -= (about.message_type, about.group_id) == (route, str(round_index))
        if Grid.left == 0 and when == "before":
            os.kill(os.getpid(), signal.Signals[how])
        done = list(super().pull_messages([message_id]))
        if Grid.left == 0:
            os.kill(os.getpid(), signal.Signals[how])
        return iter(done)

federation.InProcessGrid = Grid
config = load_run(Path(sys.argv[1]))
models.shared(config.model, config.lora, config.seed)
for route, round_index, Grid.left, when, how in json.loads(sys.argv[3]):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            federation.simulate(config, Path(sys.argv[2]), resume=True)
        except KeyboardInterrupt:  # ends by the signal, as Python does, which with tabulate beside torch ends with 1
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status), os.WEXITSTATUS(status), flush=True)
"""


def settings(base: Path, **changes: Any) -> RunConfig:
    data: dict[str, Any] = {
        "name": "trial",
        "privacy": {"enabled": False},
        "seed": 3,
        "model": {"id": str(base), "device": "cpu", "prompt": "en_short"},
        "warmup": {"enabled": False},
        "questions": {"features_per_record": 4},
        "grpo": {"local_steps": 2, "patients_per_step": 4, "expectation": "exact", "learning_rate": 0.01},
        "federation": {"rounds": 2, "validation_questions_per_site": 5, "rollback_tolerance": 1.0},
        "evaluation": {"questions_per_site": 10, "bootstrap_samples": 100, "samples": 1, "sample_tokens": 3},
        "simulation": {"registry": "synthetic", "sites": 3},
    }
    return RunConfig.model_validate({**data, **changes})


class Recorder(SilentProgress):
    """Remembers phases and rounds."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int]] = []
        self.rounds: list[int] = []
        self.at_sites: dict[tuple[str, str], list[tuple[str, int, int]]] = {}  # (phase, site) → what, done, total

    def at_site(self, site: str, what: str, done: int, total: int) -> None:
        self.at_sites.setdefault((self.phases[-1][0], site), []).append((what, done, total))

    def begin(self, phase: str, round_index: int, sites: object) -> None:
        self.phases.append((phase, round_index))

    def round_done(self, record: Any, rounds: int) -> None:
        self.rounds.append(record["round"])


Whole = tuple[Path, dict[str, Any], Recorder]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model_path: Path) -> Whole:
    """One run, uninterrupted."""
    out, seen = tmp_path_factory.mktemp("federation") / "run", Recorder()
    return out, simulate(settings(tiny_model_path), out, resume=False, progress=seen), seen


def test_progress_tells_the_steps_and_questions_of_every_site(whole: Whole):
    told, evaluation = whole[2].at_sites, whole[1]
    assert {phase for phase, _ in told} == {"train", "validate", "evaluate"}
    for (phase, _), calls in told.items():
        done = [done for _, done, _ in calls]
        assert {what for what, _, _ in calls} == {"step" if phase == "train" else "question"}
        assert len({total for _, _, total in calls}) == 1
        if phase == "train":
            assert done == [1, 2] * 2  # of two rounds
        else:
            assert done[-1] == calls[0][2]
    asked = sum(calls[0][2] for (phase, _), calls in told.items() if phase == "evaluate")
    assert asked in (2 * evaluation["final"]["n"], 3 * evaluation["final"]["n"])  # base, warmed up, final if another


def final_digest(out: Path) -> str:
    return read_record(out / "journal" / "finalize.record").values["model_digest"]


def rounds(out: Path, *, traffic: bool = False) -> list[dict[str, Any]]:
    """rounds.jsonl without times, and without bytes: a process counts those that it saw."""
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    dropped = ("seconds", "seconds_train", *(() if traffic else ("bytes_up", "bytes_down")))
    return [{key: value for key, value in line.items() if key not in dropped} for line in lines]


def sites_of(out: Path) -> list[Path]:
    """The sites' folders; the roster lies beside them."""
    return sorted(path.parent for path in (out / "sites").glob("*/site.toml"))


def summed(phase: str, round_index: int) -> list[tuple[str, int]]:
    """The five exchanges of one sum."""
    exchanges = ("", ": shares", ": masked", ": consistency", ": unmask")
    return [(f"{phase}{exchange}", round_index) for exchange in exchanges]


def test_a_run_goes_through_every_phase_in_order(whole: Whole):
    assert whole[2].phases == [
        ("warm-up", 0), *summed("counts", 0), ("schema", 0), *summed("validate", 0),
        *summed("train", 1), *summed("validate", 1),
        *summed("train", 2), *summed("validate", 2),
        *summed("evaluate", 2), ("finalize", 2),
    ]  # fmt: skip
    assert whole[2].rounds == [1, 2]


def test_a_run_leaves_the_files_that_others_rely_on(whole: Whole):
    out, evaluation, _ = whole
    for name in ("config.resolved.toml", "schema.json", "rounds.jsonl", "evaluation.json", "run.json", "report.html"):
        assert (out / name).stat().st_size > 0
    for name in ("adapter", "model", "journal", "sites", "tensorboard"):
        assert (out / name).is_dir()
    assert json.loads((out / "evaluation.json").read_text()) == evaluation
    assert (
        load_run(out / "config.resolved.toml").digest() == json.loads((out / "run.json").read_text())["config_digest"]
    )
    assert {"base", "warmup", "final", "majority", "chance", "by_feature", "mcnemar_p"} <= set(evaluation)
    assert evaluation["final"]["n"] == 30
    first = json.loads((out / "rounds.jsonl").read_text().splitlines()[0])
    assert {"round", "site_count", "reward_mean", "seconds", "bytes_up"} <= set(first)
    assert all(line["site_count"] == 3 for line in rounds(out))


def test_training_moves_the_adapter_and_every_site_gets_the_final_one(whole: Whole):
    out = whole[0]
    summary = json.loads((out / "run.json").read_text())
    assert rounds(out)[0]["update_norm_l2"] > 0
    assert len({summary["warmup_digest"], rounds(out)[0]["model_digest"], rounds(out)[1]["model_digest"]}) == 3
    for site in sites_of(out):
        (adapter,) = (site / "state" / "runs").glob("*/adapter")
        assert (adapter / "digest.txt").read_text().strip() == final_digest(out) == summary["final_digest"]
        assert (adapter / "adapter_model.safetensors").is_file()
        assert Site.open(site / "site.toml").ledger.verify() == 3 + 7 * 5  # one reply a phase, five a sum


def test_the_coordinators_bytes_are_those_of_the_ledgers(whole: Whole):
    out = whole[0]
    for text in (out / "rounds.jsonl").read_text().splitlines():
        line, sent = json.loads(text), 0
        for site in sites_of(out):
            entries = [json.loads(text) for text in (site / "state" / "ledger.jsonl").read_text().splitlines()]
            tested = [entry["phase"] for entry in entries].index("evaluate.test")  # its exchanges are of round 2, too
            mine = [entry for entry in entries[:tested] if entry["round"] == line["round"]]
            sent += sum(entry["bytes"] for entry in mine if entry["phase"] in ROUTES)
        assert sent == line["bytes_up"]


def test_receipts_and_ledgers_of_a_run_agree(whole: Whole):
    for agreement in compared(whole[0]):
        assert agreement.problems == [] and agreement.unconfirmed == []
        assert agreement.replies == agreement.received == 3 + 7 * 5
    for site in sites_of(whole[0]):
        entries = list(Site.open(site / "site.toml").ledger.entries())
        # A receipt comes with the next instruction, so the first entry has none; the registry is the one that was read.
        assert [entry.get("receipt", {"n": 0})["n"] for entry in entries] == list(range(len(entries)))
        assert {entry["registry"] for entry in entries} == {Site.open(site / "site.toml").registry_digest}


def compared(out: Path) -> list[Agreement]:
    run_id, found, losses = read_run(out)
    ledgers = {str(site): (site / "state" / "ledger.jsonl").read_bytes() for site in sites_of(out)}
    return check(found, run_id, ledgers, read_roster(out / "sites" / "roster.json"), losses)


def test_a_simulated_run_writes_down_how_its_patients_were_divided(whole: Whole):
    facts = [json.loads((whole[0] / name / "provenance.json").read_text()) for name in ("model", "adapter")]
    assert facts[0]["split_key"] == facts[1]["split_key"]
    assert facts[0]["sites"] == 3
    for site in sites_of(whole[0]):
        assert load_site(site / "site.toml").split_key == facts[0]["split_key"]
        assert load_dictionary(site / "dictionary.toml").digest() == facts[0]["dictionary_digest"]


def test_files_of_the_final_model_can_be_read_by_everybody_and_a_sites_report_by_its_owner(whole: Whole):
    for name in ("model", "adapter"):
        assert {path.stat().st_mode & 0o777 for path in (whole[0] / name).iterdir()} == {0o644}
    for site in sites_of(whole[0]):
        (report,) = (site / "state" / "runs").glob("*/report.html")
        assert report.stat().st_mode & 0o777 == 0o600
        assert f"{site.name}: own test patients" in report.read_text()


def test_resuming_a_finished_run_mends_what_was_deleted(whole: Whole, tmp_path: Path, tiny_model_path: Path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    name = "model/model.safetensors"
    shutil.rmtree(out / "model")
    (out / "report.html").unlink()
    simulate(settings(tiny_model_path), out, resume=True)
    assert (out / name).read_bytes() == (whole[0] / name).read_bytes()
    assert (out / "report.html").read_bytes() == (whole[0] / "report.html").read_bytes()
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "sites")
    (out / "sites").mkdir()
    simulate(settings(tiny_model_path), out, resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole[0] / name).read_bytes()
    shutil.rmtree(out / "sites" / "site-02")
    with pytest.raises(RunFolderError, match=r"expected 3 sites with their site\.toml, found 2; remove"):
        simulate(settings(tiny_model_path), out, resume=True)


def allow_steps(out: Path, steps: int) -> None:
    """A hospital's own decision in the middle of a run that needs two local steps."""
    path = out / "sites" / "site-02" / "site.toml"
    path.write_text(re.sub(r"max_local_steps = \d", f"max_local_steps = {steps}", path.read_text()))


def test_too_few_sites_at_the_end_do_not_cost_the_report(tmp_path: Path, tiny_model_path: Path):
    out, config = tmp_path / "run", settings(tiny_model_path, federation={"rounds": 1, "min_sites": 3})

    class Withdraw(SilentProgress):
        def begin(self, phase: str, round_index: int, sites: object) -> None:
            if phase == "finalize":
                allow_steps(out, 1)

    with pytest.raises(QuorumError, match=r"finalize: .* 2 finished; site-02 \(refused\)"):
        simulate(config, out, resume=False, progress=Withdraw())
    assert "The final model answers" in (out / "report.html").read_text()
    allow_steps(out, 2)
    simulate(config, out, resume=True)
    summary = json.loads((out / "run.json").read_text())
    assert all(site["has_final"] and site["rounds"] == 1 for site in summary["sites"].values())
    assert summary["losses"] == [{"phase": "finalize", "round": 1, "site": "site-02", "code": "refused"}]
    assert "site-02 finalize (refused)" in (out / "report.html").read_text()


def test_sites_hold_the_registry_between_them_and_nothing_twice(whole: Whole, tiny_model_path: Path):
    registry = load_registry(settings(tiny_model_path))
    patients: list[str] = []
    for site in sites_of(whole[0]):
        part = read_registry(site / "registry.parquet", load_dictionary(site / "dictionary.toml"))
        patients += part.patients.tolist()
    assert sorted(patients) == sorted(registry.patients.tolist())


def test_whether_a_patient_is_held_out_does_not_depend_on_the_partition(
    whole: Whole, tmp_path: Path, tiny_model_path: Path
):
    def test_patients(folder: Path) -> set[str]:
        sites = [Site.open(path) for path in folder.glob("*/site.toml")]
        return {patient for site in sites for patient in site.registry.patients[site.splits["test"]].tolist()}

    config = settings(tiny_model_path, simulation={"registry": "synthetic", "sites": 7})
    registry = load_registry(config)
    write_sites(registry, divide(registry, config), config, tmp_path / "sites")
    assert test_patients(tmp_path / "sites") == test_patients(whole[0] / "sites")


def test_a_finished_run_is_shown_again_and_asks_the_model_nothing(whole: Whole, tiny_model_path: Path):
    out, evaluation, _ = whole
    seen = Recorder()
    assert simulate(settings(tiny_model_path), out, resume=True, progress=seen) == evaluation
    assert seen.phases == [("warm-up", 0), ("schema", 0)]
    assert seen.rounds == [1, 2]


def test_the_same_run_in_another_folder_gives_the_same_adapter(whole: Whole, tmp_path: Path, tiny_model_path: Path):
    simulate(settings(tiny_model_path), tmp_path / "run", resume=False)
    assert final_digest(tmp_path / "run") == final_digest(whole[0])
    assert rounds(tmp_path / "run", traffic=True) == rounds(whole[0], traffic=True)


# Where processes end, one after another, in every exchange and every sum; the messages are those that a process sends.
KILLS = [
    ("query.shares", 0, 2, "before", "SIGKILL"),
    ("query.unmask", 0, 1, "after", "SIGKILL"),
    ("train.local", 1, 2, "before", "SIGKILL"),
    ("query.shares", 1, 2, "after", "SIGKILL"),
    ("query.mask", 1, 2, "after", "SIGKILL"),
    ("query.survivors", 1, 1, "before", "SIGKILL"),
    ("query.survivors", 1, 3, "after", "SIGKILL"),
    ("query.unmask", 1, 2, "after", "SIGKILL"),
    ("query.mask", 1, 2, "before", "SIGKILL"),
    ("train.local", 2, 1, "after", "SIGKILL"),
    ("query.mask", 2, 3, "after", "SIGINT"),
    ("evaluate.test", 2, 2, "after", "SIGKILL"),
    ("query.unmask", 2, 2, "before", "SIGKILL"),
    ("query.finalize", 2, 2, "before", "SIGKILL"),
    ("none", 0, -1, "after", "SIGKILL"),  # the last ends by itself
]


def test_a_killed_run_that_is_resumed_gives_the_same_adapter_bit_for_bit(whole: Whole, tmp_path: Path):
    out = tmp_path / "run"
    (tmp_path / "run.toml").write_text((whole[0] / "config.resolved.toml").read_text())
    command = [sys.executable, "-c", RUN, str(tmp_path / "run.toml"), str(out), json.dumps(KILLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=500)
    ends = [line.split() for line in done.stdout.splitlines()]
    signals = [{"SIGKILL": "9", "SIGINT": "2"}[how] for *_, how in KILLS[:-1]]
    assert ends == [[number, "0"] for number in (*signals, "0")], done.stderr
    assert final_digest(out) == final_digest(whole[0])
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors", "evaluation.json"):
        assert (out / name).read_bytes() == (whole[0] / name).read_bytes()
    assert rounds(out) == rounds(whole[0])
    assert (
        json.loads((out / "run.json").read_text())["samples"]
        == json.loads((whole[0] / "run.json").read_text())["samples"]
    )
    assert not [path for part in ("sum", "signed", "attempt") for path in (out / "journal").glob(f"*-{part}.record")]
    assert [agreement.problems for agreement in compared(out)] == [[], [], []]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"simulation": {"registry": "nowhere"}}, ConfigError, "expected one of synthetic, support_icu"),
        ({"model": {"id": "no-such-model"}}, ModelError, "no-such-model"),
        (
            {"simulation": {"registry": "synthetic", "partition": "column", "partition_feature": "none"}},
            ConfigError,
            "partition_feature",
        ),
        ({"model": {"prompt": "nosuch"}}, ConfigError, "prompt 'nosuch': no such template; shipped are en,"),
        ({"federation": {"min_sites": 4}}, ConfigError, "sites = 3: expected at least federation.min_sites = 4"),
        (
            {"simulation": {"registry": "synthetic", "sites": 2}, "federation": {"min_sites": 3}},
            ConfigError,
            "sites = 2: expected at least federation.min_sites = 3",
        ),
        (
            {
                "simulation": {"registry": "synthetic", "sites": 1000},
                "federation": {"min_sites": 1000, "max_sites": 1000},
            },
            ConfigError,
            "have a training patient, expected at least federation.min_sites = 1000; use fewer sites",
        ),
        (
            {"simulation": {"registry": "synthetic", "sites": 65}},
            ConfigError,
            "sites = 65: expected at most federation.max_sites = 64",
        ),
        ({"warmup": {"adapter": "smollm2-135m"}}, ModelError, "was made for base model"),
        ({"warmup": {"adapter": "nosuch"}}, ModelError, "nosuch.safetensors does not exist"),
        ({"lora": {"targets": ["no_such_layer"]}}, ModelError, "lora.targets"),
    ],
)
def test_a_users_mistake_leaves_no_folder(
    tmp_path: Path, tiny_model_path: Path, changes: dict, error: type[Exception], said: str
):
    changes = {"model": {"id": str(tiny_model_path), "device": "cpu"} | changes.pop("model", {}), **changes}
    with pytest.raises(error, match=said):
        simulate(settings(tiny_model_path, **changes), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


class Mistaken(SilentProgress):
    """Stands for a mistake of a person's that shows only when a phase begins."""

    def __init__(self, phase: str, round_index: int = 0) -> None:
        self.where = phase, round_index

    def begin(self, phase: str, round_index: int, sites: object) -> None:
        if (phase, round_index) == self.where:
            raise ConfigError("a mistake")


@pytest.mark.parametrize("was_there", [False, True])
def test_a_users_mistake_in_a_new_run_takes_back_what_it_wrote(tmp_path: Path, tiny_model_path: Path, was_there: bool):
    out = tmp_path / "run"
    if was_there:
        out.mkdir()
    with pytest.raises(ConfigError, match="a mistake"):
        simulate(settings(tiny_model_path), out, resume=True, progress=Mistaken("counts"))
    assert out.exists() == was_there and list(tmp_path.rglob("run/*")) == []


def test_a_mistake_after_training_or_in_a_resumed_run_takes_nothing_back(tmp_path: Path, tiny_model_path: Path):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="a mistake"):
        simulate(settings(tiny_model_path), out, resume=False, progress=Mistaken("validate", 1))
    assert (out / "journal" / "round-00001-apply.record").exists()
    (out / "journal" / "round-00001-apply.record").unlink()
    before = {path for name in ("journal", "sites") for path in (out / name).rglob("*")}
    with pytest.raises(ConfigError, match="a mistake"):
        simulate(settings(tiny_model_path), out, resume=True, progress=Mistaken("train", 1))
    assert before <= set(out.rglob("*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_named_before_anything_is_made(tmp_path: Path, tiny_model_path: Path):
    config = settings(tiny_model_path, model={"id": str(tiny_model_path), "device": "cuda"})
    with pytest.raises(ModelError, match="torch sees no GPU"):
        simulate(config, tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_only_one_process_makes_the_sites_of_a_run(tmp_path: Path, tiny_model_path: Path):
    config = settings(tiny_model_path)
    with (
        open_journal(tmp_path / "run", config, resume=False),
        pytest.raises(RunFolderError, match="another process is working on this run"),
    ):
        simulate(config, tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "sites").exists()


def test_the_sites_limits_are_those_that_the_run_needs(tmp_path: Path, tiny_model_path: Path):
    config = settings(
        tiny_model_path,
        federation={"rounds": 5000, "colluders": 2, "min_sites": 4},
        grpo={"local_steps": 20_000},
    )
    registry = load_registry(config)
    write_sites(registry, divide(registry, config), config, tmp_path / "sites")
    for path in (tmp_path / "sites").glob("*/site.toml"):
        limits = Site.open(path).config.policy
        assert (limits.max_rounds, limits.max_local_steps, limits.simulated) == (5000, 20_000, True)
        assert (limits.colluders, limits.min_sites) == (2, 3)


def test_the_disk_estimate_follows_the_adapter_and_the_sites(tiny_model_path: Path):
    few = settings(tiny_model_path)
    small, large = (
        Manifest((TensorSpec("a", (n, 4), False), TensorSpec("b", (n, 4), True)), "base", "ffa") for n in (10**4, 10**6)
    )
    many = settings(tiny_model_path, simulation={"registry": "synthetic", "sites": 30})
    estimates = [needed_bytes(few, 10**9, small), needed_bytes(few, 10**9, large), needed_bytes(many, 10**9, large)]
    assert 10**9 < estimates[0] < 1.1 * 10**9
    # A site holds round 0 and the final adapter, 32 MB each, and at most three updates of 16 MB.
    assert estimates[2] - estimates[1] == 27 * (2 * 32 + 3 * 16) * 10**6


def test_a_private_registry_is_not_simulated(tmp_path: Path, tiny_model_path: Path, whole: Whole):
    site = whole[0] / "sites" / "site-01"
    text = (site / "dictionary.toml").read_text()
    (tmp_path / "dictionary.toml").write_text(text.replace("public = true", "public = false"))
    own = {"registry": str(site / "registry.parquet"), "dictionary": str(tmp_path / "dictionary.toml")}
    with pytest.raises(ConfigError, match="public = false"):
        simulate(settings(tiny_model_path, simulation=own), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_refused_and_left_alone(whole: Whole, tiny_model_path: Path):
    before = {path: path.stat().st_mtime_ns for path in whole[0].rglob("*") if path.is_file()}
    with pytest.raises(RunFolderError, match="holds run 'trial'"):
        simulate(settings(tiny_model_path), whole[0], resume=False)
    with pytest.raises(RunFolderError, match="'seed' was 3 when the run began, now 4"):
        simulate(settings(tiny_model_path, seed=4), whole[0], resume=True)
    assert {path: path.stat().st_mtime_ns for path in whole[0].rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("adding", "before", "after", "said"),
    [
        (
            "bonawitz",
            "max_local_steps = 2",
            "max_local_steps = 1",
            "this hospital allows 1, the coordinator asks for 2",
        ),
        (
            "none",
            "simulated = true",
            "simulated = false",
            "adds updates and counts up in the clear: only a simulated site",
        ),
    ],
)
def test_sites_that_refuse_are_named_and_the_run_stops(
    tmp_path: Path, tiny_model_path: Path, adding: str, before: str, after: str, said: str
):
    config = settings(tiny_model_path, federation={"rounds": 1, "min_sites": 3, "secure_aggregation": adding})

    class Tamper(SilentProgress):
        def begin(self, phase: str, round_index: int, sites: object) -> None:
            if phase == "train":  # the hospital's own decision, in the middle of a run
                path = tmp_path / "run" / "sites" / "site-02" / "site.toml"
                path.write_text(path.read_text().replace(before, after))

    with pytest.raises(QuorumError, match=r"train: expected at least 3 sites .* finished; site-02 \(refused\)"):
        simulate(config, tmp_path / "run", resume=False, progress=Tamper())
    log = (tmp_path / "run" / "sites" / "site-02" / "state" / "site.log").read_text()
    assert said in log


def test_a_site_that_loses_its_identity_is_left_out_where_enough_are_left(tmp_path: Path, tiny_model_path: Path):
    config = settings(
        tiny_model_path,
        federation={"rounds": 1, "validation_questions_per_site": 0},
        simulation={"registry": "synthetic", "sites": 4},
    )

    class Stolen(SilentProgress):
        def begin(self, phase: str, round_index: int, sites: object) -> None:
            if phase == "train":
                (tmp_path / "run" / "sites" / "site-02" / "state" / "identity.pem").unlink()

    simulate(config, tmp_path / "run", resume=False, progress=Stolen())
    (line,) = rounds(tmp_path / "run")
    assert line["sites"] == ["site-01", "site-03", "site-04"]
    assert line["failures"] == {"site-02": "site"}  # it cannot sign its ledger: not even a code leaves


def test_reasoning_questions_run_through_sampled_rollouts(tmp_path: Path, tiny_model_path: Path):
    config = settings(
        tiny_model_path,
        questions={"features_per_record": 4, "reasoning_tokens": 4},
        grpo={"local_steps": 1, "patients_per_step": 3, "group_size": 3},
        federation={"rounds": 1, "server_optimizer": "fedadam", "server_learning_rate": 0.001, "weighting": "patients"},
        lora={"strategy": "fedit", "rank": 4, "alpha": 8},
    )
    evaluation = simulate(config, tmp_path / "run", resume=False)
    (line,) = rounds(tmp_path / "run")
    assert line["completions"] == 3 * line["questions"]
    assert 0 <= line["reward_mean"] <= 1
    assert np.isfinite(evaluation["final"]["accuracy"])
