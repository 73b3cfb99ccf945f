"""The adapter shared by all sites: its trainable part moves, the rest stays, the digest covers both."""

import numpy as np
import pytest
from wardround.common.adapter import Manifest, TensorSpec, vector_digest
from wardround.common.errors import VerificationError
from wardround.common.global_model import GlobalModel

SPECS = (
    TensorSpec("a", (2,), False),
    TensorSpec("b", (3,), True),
    TensorSpec("c", (1,), False),
    TensorSpec("d", (2,), True),
)
MANIFEST = Manifest(SPECS, "base", "ffa")
FULL = np.arange(8, dtype=np.float32)


def test_moving_replaces_the_trainable_part_only():
    moved = GlobalModel(MANIFEST, FULL).moved(np.full(5, 9, np.float32))
    assert moved.full.tolist() == [0, 1, 9, 9, 9, 5, 9, 9]
    assert moved.trainable.tolist() == [9] * 5
    assert FULL.tolist() == list(range(8))


def test_a_model_moved_to_its_own_trainable_part_is_itself():
    model = GlobalModel(MANIFEST, FULL)
    assert model.trainable.tolist() == [2, 3, 4, 6, 7]
    assert model.moved(model.trainable).digest == model.digest == vector_digest(MANIFEST, FULL)


@pytest.mark.parametrize("position", range(8))
def test_every_value_frozen_or_not_is_in_the_digest(position: int):
    other = FULL.copy()
    other[position] += 1
    with pytest.raises(VerificationError, match="expected digest"):
        GlobalModel(MANIFEST, other).verify(GlobalModel(MANIFEST, FULL).digest)


@pytest.mark.parametrize("bad", [np.zeros(4, np.float32), np.zeros(5), np.full(5, np.nan, np.float32)])
def test_a_vector_that_cannot_be_the_trainable_part_is_refused(bad: np.ndarray):
    with pytest.raises(VerificationError):
        GlobalModel(MANIFEST, FULL).moved(bad)


def test_when_everything_is_trained_nothing_is_copied():
    manifest = Manifest((TensorSpec("a", (8,), True),), "base", "full")
    model = GlobalModel(manifest, FULL)
    assert model.trainable is FULL and model.moved(FULL).full is FULL
