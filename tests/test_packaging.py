"""The wheel works away from the checkout: help, and a tiny simulation from end to end."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from .tiny import tiny_model

ROOT = Path(__file__).parents[1]

TINY_RUN = """
name = "tiny"
seed = 3
[model]
id = "{model}"
prompt = "en_short"
[lora]
rank = 4
[questions]
features_per_record = 6
[privacy]
enabled = false
[warmup]
enabled = false
[grpo]
local_steps = 1
patients_per_step = 4.0
[federation]
rounds = 1
validation_questions_per_site = 8
[evaluation]
questions_per_site = 10
bootstrap_samples = 200
samples = 0
[simulation]
registry = "synthetic"
sites = 3
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment that holds the built wheel and sees the dependencies installed here.

    The dependencies come by a path file, in which Python does not read further path files, so the editable install
    that tests normally run on is not seen.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: setuptools would leave build/ in the checkout and pick up what lies there
    leave_out = shutil.ignore_patterns(
        ".git", ".venv", ".typings", "runs", "build", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=leave_out)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("wardround-*.whl")
    venv.create(folder / "env", with_pip=False)
    scheme = {"base": str(folder / "env"), "platbase": str(folder / "env")}
    site_packages = Path(sysconfig.get_path("purelib", vars=scheme))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    python = folder / "env" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed", str(wheel)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return python.parent


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("CI", "PYTHONPATH")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)


def test_the_wheel_holds_no_bare_package(installed: Path, tmp_path: Path) -> None:
    bare = ("client", "server", "common", "simulations")
    code = f"import importlib.util as u; print([name for name in {bare} if u.find_spec(name)])"
    done = run([str(installed / "python"), "-c", code], tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_wheel_holds_every_package_that_the_checkout_has(installed: Path, tmp_path: Path) -> None:
    names = [
        f"wardround.{file.parent.relative_to(ROOT).as_posix().replace('/', '.')}.{file.stem}"
        for folder in ("client", "common", "server", "simulations")
        for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    code = f"import importlib.util as u; print([name for name in {names} if u.find_spec(name) is None])"
    done = run([str(installed / "python"), "-c", code], tmp_path)
    assert "wardround.common.secagg.client_state" in names and done.stdout.strip() == "[]", done.stderr


def test_the_installed_command_shows_its_help_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    done = run([str(installed / "wardround"), "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(group in done.stdout for group in ("client", "evaluate", "server", "simulate"))
    code = "import wardround.common.cli as c; print(c.__file__)"
    assert str(ROOT) not in run([str(installed / "python"), "-c", code], tmp_path).stdout


def test_the_installed_command_runs_a_tiny_simulation(installed: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    (tmp_path / "tiny.toml").write_text(TINY_RUN.format(model=model), encoding="utf-8")
    done = run([str(installed / "wardround"), "simulate", "run", "tiny.toml", "--out", "out", "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["final"]["n"] > 0
    expected = {"config.resolved.toml", "schema.json", "rounds.jsonl", "evaluation.json", "report.html"}
    assert expected <= {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter", "model", "journal"} <= {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
