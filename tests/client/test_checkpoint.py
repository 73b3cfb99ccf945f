"""Local training that a kill interrupts goes on: to the same bits, without paying or drawing again what is done."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from wardround.client import checkpoint as module
from wardround.client import site as site_module
from wardround.client import update
from wardround.client.checkpoint import Checkpoint
from wardround.client.grpo import train_local_round
from wardround.client.private_optimizer import PrivateSteps
from wardround.client.randomness import SecureRandom
from wardround.client.reward import LocalResult
from wardround.common.config import RunConfig
from wardround.common.files import read_record
from wardround.common.messages import KeysReply, split

from .test_grpo import TEMPLATE, Source, configured, model
from .test_private_site import REGISTRY, RUN, Hospital

STEPS, SEED = 5, 11
SETTINGS = [
    {"reasoning": 0, "expectation": "exact"},
    {"reasoning": 0, "expectation": "sampled"},
    {"reasoning": 4, "beta": 0.1},
    {"reasoning": 0, "expectation": "exact", "strategy": "fedit"},
]


class Killed(BaseException):
    """Ends training as a kill does: nothing of it is caught."""


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.0)
    monkeypatch.setattr(module, "SHARE", 0)


def config_of(**settings) -> RunConfig:
    return configured(local_steps=STEPS, patients_per_step=2, learning_rate=0.01, **settings)


def train(
    path: Path, config: RunConfig, kept: Checkpoint | None, *, kill_at: int = 0, private: PrivateSteps | None = None
) -> LocalResult:
    """A round in a fresh model, as a new process has it; killed in the middle of step `kill_at`."""
    strategy = config.lora.strategy

    def tell(done: int, _steps: int, _reward: float) -> None:
        if done == kill_at:
            raise Killed  # after the step's backward pass, before its optimizer's

    return train_local_round(
        model(path, strategy), Source(), TEMPLATE, config, seed=SEED, private=private, on_step=tell, checkpoint=kept
    )


def kept_in(folder: Path, key: str = "k", private: bool = False) -> Checkpoint:
    return Checkpoint(folder / "training.record", key, private)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kills", [(2,), (3, 5)], ids=str)
def test_a_round_that_was_killed_ends_in_the_bits_of_one_that_was_not(
    tiny_model_path: Path, tmp_path: Path, settings: dict, kills: tuple[int, ...]
):
    config = config_of(**settings)
    whole = train(tiny_model_path, config, None)
    for kill in kills:
        with pytest.raises(Killed):
            train(tiny_model_path, config, kept_in(tmp_path), kill_at=kill)
        found = kept_in(tmp_path).load()
        assert found is not None and found.steps == kill - 1
    again = train(tiny_model_path, config, kept_in(tmp_path))
    assert np.array_equal(again.vector.view(np.uint32), whole.vector.view(np.uint32))
    assert again.steps == whole.steps == STEPS
    for name in ("questions", "completions", "reward_sum", "boxed", "completion_tokens", "empty_draws"):
        assert getattr(again, name) == getattr(whole, name), name
    assert again.reward_histogram.tolist() == whole.reward_histogram.tolist()


def test_a_round_that_was_not_killed_is_the_same_with_a_checkpoint(tiny_model_path: Path, tmp_path: Path):
    config = config_of(reasoning=0, expectation="exact")
    assert train(tiny_model_path, config, None).vector.tobytes() == (
        train(tiny_model_path, config, kept_in(tmp_path)).vector.tobytes()
    )


def test_progress_of_another_round_or_a_damaged_file_is_none(tiny_model_path: Path, tmp_path: Path):
    config = config_of(reasoning=0, expectation="exact")
    for spoil in ("key", "private", "bytes"):
        with pytest.raises(Killed):
            train(tiny_model_path, config, kept_in(tmp_path), kill_at=3)
        path = tmp_path / "training.record"
        if spoil == "bytes":
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        other = kept_in(tmp_path, "other" if spoil == "key" else "k", spoil == "private")
        assert other.load() is None and not path.exists()


def test_a_disk_that_is_full_ends_no_training(tiny_model_path: Path, tmp_path: Path):
    config = config_of(reasoning=0, expectation="exact")
    nowhere = Checkpoint(tmp_path / "no such folder" / "training.record", "k", False)
    assert (
        train(tiny_model_path, config, nowhere).vector.tobytes()
        == train(tiny_model_path, config, None).vector.tobytes()
    )


class Counting(SecureRandom):
    """Counts what is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = self.noises = 0

    def uniform(self, count: int):
        self.draws += count == Source().n_patients
        return super().uniform(count)

    def gaussian(self, count: int, std: float):
        self.noises += 1
        return super().gaussian(count, std)


def test_a_private_round_goes_on_with_a_fresh_secret_and_repeats_no_step_that_is_kept(
    tiny_model_path: Path, tmp_path: Path
):
    config = config_of(reasoning=0, expectation="exact")
    tensors = len(model(tiny_model_path).trainable())

    def steps() -> PrivateSteps:
        return PrivateSteps(1.0, 0.5, 0.5, expected_patients=2.0, random=Counting())

    first, second = steps(), steps()
    with pytest.raises(Killed):
        train(tiny_model_path, config, kept_in(tmp_path, private=True), kill_at=3, private=first)
    kept = kept_in(tmp_path, private=True).load()
    assert kept is not None and kept.steps == 2
    # Neither the secret's streams nor who was drawn is on disk.
    assert kept.draws is None and kept.sampler.size == 0 and kept.counts == {}
    result = train(tiny_model_path, config, kept_in(tmp_path, private=True), private=second)
    assert result.steps == STEPS
    assert isinstance(first.random, Counting) and isinstance(second.random, Counting)
    assert first.random.noises == 2 * tensors and second.random.noises == 3 * tensors
    assert second.random.draws >= 3  # noise of a tensor may be as many numbers as there are patients


def test_a_private_round_that_was_killed_ends_where_one_that_was_not_does(tiny_model_path: Path, tmp_path: Path):
    """Without noise and with everybody drawn a private round is deterministic: what is kept is all that counts."""
    config = config_of(reasoning=0, expectation="exact")

    def steps() -> PrivateSteps:
        return PrivateSteps(0.0, 0.5, 1.0, expected_patients=4.0)

    whole = train(tiny_model_path, config, None, private=steps())
    with pytest.raises(Killed):
        train(tiny_model_path, config, kept_in(tmp_path, private=True), kill_at=4, private=steps())
    again = train(tiny_model_path, config, kept_in(tmp_path, private=True), private=steps())
    assert again.vector.tobytes() == whole.vector.tobytes()


# ---- a site's whole round


def killed_at(hospital: Hospital, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first round's instruction, to a site that is killed in the middle of a step."""

    def tell(_name: str, _what: str, done: int, _steps: int) -> None:
        if done == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(site_module, "on_work", tell)
        with pytest.raises(Killed):
            hospital.ask(hospital.train(1))


def stored(hospital: Hospital) -> update.StoredUpdate:
    found = update.load(hospital.site.run_folder(RUN), 1)
    assert found is not None
    return found


def kept_of(hospital: Hospital) -> Path:
    return hospital.site.run_folder(RUN) / site_module.CHECKPOINT


@pytest.mark.usefixtures("cheap_scrypt")
def test_a_killed_site_gives_the_update_of_one_that_was_not_killed(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, killed = (Hospital(tmp_path / name, tiny_model_path, enabled=False) for name in ("whole", "killed"))
    for hospital in (whole, killed):
        hospital.set_up()
    assert isinstance(whole.ask(whole.train(1)), KeysReply), whole.log()
    killed_at(killed, 2, monkeypatch)
    assert kept_of(killed).exists() and update.load(killed.site.run_folder(RUN), 1) is None
    assert isinstance(killed.ask(killed.train(1)), KeysReply), killed.log()
    assert stored(killed).delta.tobytes() == stored(whole).delta.tobytes()
    assert stored(killed).tail.tolist() == stored(whole).tail.tolist()
    assert not kept_of(killed).exists() and not kept_of(whole).exists()


# A process of its own: the first round's instruction, from a file; killed in the middle of a step.
PROCESS = """
import json, os, signal, sys
from pathlib import Path
from wardround.client import checkpoint, gate, site
from wardround.common import identity, messages
identity._SCRYPT["n"] = 2**4  # as this site was made
checkpoint.EVERY_S, checkpoint.SHARE = 0.0, 0
site.on_work = lambda _name, _what, done, _steps: done == int(sys.argv[3]) and os.kill(os.getpid(), signal.SIGKILL)
head, vectors = json.loads(Path(sys.argv[2]).read_text())
vectors = {name: bytes.fromhex(vector) for name, vector in vectors.items()}
answer = gate.respond(Path(sys.argv[1]), messages.TrainInstruction, bytes.fromhex(head), vectors)
print(type(messages.join(*answer, messages.Reply)).__name__)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("cheap_scrypt")
def test_a_process_that_was_killed_with_signal_9_is_gone_on_from_by_the_next(tmp_path: Path, tiny_model_path: Path):
    whole, killed = (Hospital(tmp_path / name, tiny_model_path, enabled=False) for name in ("whole", "killed"))
    for hospital in (whole, killed):
        hospital.set_up()
    assert isinstance(whole.ask(whole.train(1)), KeysReply), whole.log()
    head, vectors = split(killed.train(1))
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([head.hex(), {name: bytes(vector).hex() for name, vector in vectors.items()}]))

    def answer(step: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROCESS, str(killed.site_toml), str(asked), str(step)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert answer(2).returncode == -9
    assert read_record(kept_of(killed)).values["steps"] == 1
    done = answer(0)
    assert done.stdout.split() == ["KeysReply"], done.stderr
    assert stored(killed).delta.tobytes() == stored(whole).delta.tobytes()
    assert stored(killed).tail.tolist() == stored(whole).tail.tolist()


@pytest.mark.usefixtures("cheap_scrypt")
def test_a_killed_private_site_pays_once_and_goes_on(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hospital = Hospital(tmp_path, tiny_model_path)
    hospital.set_up()
    killed_at(hospital, 2, monkeypatch)
    assert kept_of(hospital).exists()
    seen: list[int] = []
    monkeypatch.setattr(site_module, "on_work", lambda _name, _what, done, _steps: seen.append(done))
    assert isinstance(hospital.ask(hospital.train(1)), KeysReply), hospital.log()
    assert seen == [2] and hospital.kinds() == ["schema", "rounds"]  # the first step is not drawn again
    assert stored(hospital).tail.any() and not kept_of(hospital).exists()


@pytest.mark.usefixtures("cheap_scrypt")
def test_what_was_trained_before_a_patient_opted_out_is_not_gone_on_from(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hospital = Hospital(tmp_path, tiny_model_path, enabled=False)
    hospital.set_up()
    killed_at(hospital, 2, monkeypatch)
    (hospital.site_toml.parent / "opt-out.txt").write_text(str(REGISTRY.patients[0]) + "\n")
    hospital.limit(opt_out="opt-out.txt")
    seen: list[int] = []
    monkeypatch.setattr(site_module, "on_work", lambda _name, _what, done, _steps: seen.append(done))
    assert isinstance(hospital.ask(hospital.train(1)), KeysReply), hospital.log()
    assert seen == [1, 2]
