"""`wardround simulate` as a person calls it: what it says on the way, Ctrl-C, and a mistake that can be corrected."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wardround.simulations.progress import TerminalProgress

WARDROUND = [sys.executable, "-c", "from wardround.common.cli import main; main()"]
RUN = """
name = "tiny"
seed = 3
[model]
id = "{model}"
prompt = "en_short"
device = "cpu"
[lora]
rank = 4
[questions]
features_per_record = 4
[warmup]
enabled = false
[grpo]
local_steps = 1
patients_per_step = 3.0
[privacy]
enabled = false
[federation]
rounds = 1
validation_questions_per_site = 3
[evaluation]
questions_per_site = 4
bootstrap_samples = 100
samples = 0
[simulation]
registry = "synthetic"
sites = 3
"""


def command(*args: str) -> list[str]:
    return [*WARDROUND, "simulate", "run", "run.toml", "--out", "out", *args]


def call(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*args), cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def folder(tmp_path: Path, tiny_model_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(RUN.format(model=tiny_model_path))
    return tmp_path


def test_ctrl_c_is_one_line_and_the_same_command_with_resume_finishes(folder: Path):
    process = subprocess.Popen(
        command("--json"), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 240
        while not list((folder / "out" / "journal").glob("round-00001-apply*")):  # in the first update or its sum
            assert process.poll() is None, "the run ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "interrupted; nothing half-written. The same command with --resume continues the run.\n"
    assert out == "" and not (folder / "out" / "report.html").exists()
    done = call(folder, "--json", "--resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["final"]["n"] == 12
    assert (folder / "out" / "report.html").exists()


def test_a_mistake_can_be_corrected_in_the_same_folder(folder: Path):
    wrong = call(folder, "--set", "model.prompt=nosuch")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: prompt 'nosuch': no such template") and wrong.stderr.count("\n") == 1
    assert not (folder / "out").exists()
    right = call(folder)
    assert right.returncode == 0, right.stderr
    # Without a warm-up nothing is called warmed up, neither in the table nor in the sentence below it.
    assert "warmed" not in right.stdout and "base model" in right.stdout and "report: out/report.html" in right.stdout
    assert "round 1 of 1 · train: 3 sites" in right.stderr and "left out" not in right.stderr


def test_a_folder_that_cannot_be_is_one_line(folder: Path):
    (folder / "out").write_text("a file")
    done = call(folder)
    assert done.returncode == 2 and done.stderr == "error: out: expected a folder, got a file\n"


class Record(dict[str, object]):
    def __init__(self, index: int, seconds: float) -> None:
        super().__init__(
            round=index, site_count=4, questions=9, reward_mean=0.25, validation_accuracy=0.5, seconds=seconds
        )


def test_progress_says_which_round_of_how_many_and_how_long_it_will_be(capsys: pytest.CaptureFixture[str]):
    with TerminalProgress(4) as progress:
        progress.begin("validate", 0, ["a"])
        progress.begin("train", 1, ["a", "b"])
        progress.at_site("a", "step", 1, 4)
        progress.begin("train: shares", 1, ["a", "b"])  # the exchanges of a sum take moments, and have no line
        progress.round_done(Record(1, 30.0), 4)
        progress.begin("train", 2, ["a", "b"])
        progress.round_done(Record(2, 50.0), 4)
        progress.round_done(Record(3, 40.0), 4)
        progress.round_done(Record(4, 40.0), 4)
        progress.begin("evaluate", 4, ["a", "b"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        "validate: 1 site",
        "round 1 of 4 · train: 2 sites",
        "round 1 of 4 · train · a step 1 of 4",
    ]
    assert "reward 0.250 · validation accuracy 0.500 · seconds 30 · about 2 min left in rounds" in lines[3]
    assert lines[5].endswith("about 80 s left in rounds")  # two rounds of 40 s
    assert "left in rounds" not in lines[7] and lines[8] == "evaluate: 2 sites"


def test_threads_of_the_config_reach_the_libraries(folder: Path):
    code = "import os; from wardround.common.cli import limit_threads as f; f({}); print(os.environ.get('{}'))"
    for threads, seen in ((0, "None"), (3, "3")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        program = code.format(threads, "OMP_NUM_THREADS")
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == seen
