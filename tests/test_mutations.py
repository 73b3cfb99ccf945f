"""The patches of `make mutants` fit the code: one that does not would go unnoticed until somebody runs them all."""

import shutil
import subprocess

import pytest

from .mutations.run import FOLDER, ROOT


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program 'patch'")
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("*.patch")))
def test_every_mutation_applies_to_the_code_as_it_is(name: str) -> None:
    command = ["patch", "-p1", "--dry-run", "--force", "--silent", "-i", str(FOLDER / name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
