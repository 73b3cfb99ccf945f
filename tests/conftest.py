"""What every test may use. Set before anything heavy is imported: offline, one thread, its own cache folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from wardround.common import identity
from wardround.common.cli import quiet_third_parties

from .tiny import tiny_model

quiet_third_parties()
# A busy machine makes no property wrong; pytest's own timeout ends what hangs.
hypothesis.settings.register_profile("wardround", deadline=None)
hypothesis.settings.load_profile("wardround")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this test run, so that no test reads or writes the user's.

    `WARDROUND_TEST_CACHE` names a folder to keep between runs (it saves converting the packaged model, seconds).
    """
    kept = os.environ.get("WARDROUND_TEST_CACHE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("cache")
    os.environ["WARDROUND_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Llama with tokenizer and chat template (tests/tiny.py); do not write into it."""
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def cheap_scrypt() -> Iterator[None]:
    """Identities of simulated sites take a millisecond, not a tenth of a second, in this process only.

    Not for a module whose subprocesses make or open the same sites: the cost is no part of a key's file.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(identity._SCRYPT, "n", 2**4)
        yield
