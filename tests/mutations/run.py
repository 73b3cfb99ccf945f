"""Breaks the privacy code on purpose, one patch at a time, and says which test noticed: `make mutants`.

Each `tests/mutations/*.patch` begins with what it breaks and the tests that must fail:

    Breaks: the signature of an advert is not checked
    Tests: tests/common/secagg/test_attacks.py
    (a unified diff, paths from the project's root)

A patch is applied to a copy of the tree; its tests must then fail, as they pass on the copy without it. A patch that
does not apply, or whose tests still pass (it survived), ends the command with 1.

    python -m tests.mutations.run [NAME ...] [--jobs 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).resolve().parent
COPIED = (".typings", "client", "common", "configs", "server", "simulations", "tests", "pyproject.toml")
TIMEOUT_S = 900


@dataclass(frozen=True)
class Mutant:
    """One patch: its name, what it breaks, and the tests that must notice."""

    name: str
    breaks: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: "killed", "survived", "does not apply", "tests fail without it"; by which test."""

    name: str
    breaks: str
    result: str
    by: str
    seconds: float


def read(path: Path) -> Mutant:
    """A patch's head.

    Raises:
        SystemExit: a patch without its two lines.
    """
    about = dict(line.split(": ", 1) for line in path.read_text(encoding="utf-8").splitlines()[:2] if ": " in line)
    if set(about) != {"Breaks", "Tests"}:
        raise SystemExit(f"{path.name}: expected the lines 'Breaks: …' and 'Tests: …' first")
    return Mutant(path.stem, about["Breaks"], tuple(about["Tests"].split()))


def copy_tree(to: Path) -> None:
    """The part of the project that tests of the privacy code need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / name)


def run_tests(tree: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit status of the tests in a tree, and the first that failed."""
    environment = {**os.environ, "PYTHONPATH": str(tree / ".typings"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return 1, f"no end within {TIMEOUT_S} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, failed[0].split(" - ")[0].split(" ", 1)[1] if failed else ""


def attempt(mutant: Mutant) -> Outcome:
    """Applies one patch to a copy and runs its tests."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        patch = ["patch", "-p1", "--no-backup-if-mismatch", "-i", str(FOLDER / f"{mutant.name}.patch")]
        if subprocess.run(patch, cwd=tree, capture_output=True, check=False).returncode:
            return Outcome(mutant.name, mutant.breaks, "does not apply", "", 0.0)
        status, by = run_tests(tree, mutant.tests)
    # 1: tests failed; 2: could not be collected, as when a mutant breaks an import, which is no kill.
    result = {0: "survived", 1: "killed"}.get(status, f"pytest ended with {status}")
    return Outcome(mutant.name, mutant.breaks, result, by, round(time.monotonic() - started, 1))


def main() -> None:
    """Runs the mutants and prints the table."""
    parser = argparse.ArgumentParser(description="Mutation patches of the privacy code.")
    parser.add_argument("names", nargs="*", help="patches without .patch; all when none is given")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    mutants = [read(path) for path in sorted(FOLDER.glob("*.patch")) if not options.names or path.stem in options.names]
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    print(f"{len(mutants)} mutants; first the {len(tests)} test files without any", flush=True)
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_tree(Path(folder))
        status, by = run_tests(Path(folder), tests)
    if status:
        raise SystemExit(f"the tests fail without a mutant ({by or status}): nothing can be said")
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(attempt, mutants):
            outcomes.append(outcome)
            print(f"{outcome.result:10s} {outcome.name:34s} {outcome.breaks}\n{'':10s} {outcome.by}", flush=True)
    killed = sum(outcome.result == "killed" for outcome in outcomes)
    print(f"{killed} of {len(outcomes)} killed")
    if options.json:
        text = json.dumps([asdict(outcome) for outcome in outcomes], indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(killed != len(outcomes))


if __name__ == "__main__":
    main()
