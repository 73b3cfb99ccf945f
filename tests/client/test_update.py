"""One round's update: checked, stored whole, trained from one input and kept while it may be asked for."""

from pathlib import Path

import numpy as np
import pytest
from wardround.client import update
from wardround.common.errors import RefusedError, VerificationError


def stored(round_index: int = 1, model: str = "m1") -> update.StoredUpdate:
    delta = np.arange(4, dtype=np.float32) * round_index
    return update.StoredUpdate("in", model, "ab" * 32, delta, np.array([3, 0, 2**40, 2]))


def test_the_difference_is_new_minus_old():
    old, new = np.array([1, 2], np.float32), np.array([1.5, 0], np.float32)
    assert update.difference(new, old).tolist() == [0.5, -2.0]


@pytest.mark.parametrize(
    "new", [np.array([np.nan, 0], np.float32), np.array([np.inf, 0], np.float32), np.zeros(3, np.float32), np.zeros(2)]
)
def test_a_diverged_or_misshapen_update_is_refused(new: np.ndarray):
    with pytest.raises(VerificationError, match="update"):
        update.difference(new, np.zeros(2, np.float32))


def test_an_overflowing_difference_is_refused():
    large = np.full(2, 3e38, np.float32)
    with pytest.raises(VerificationError, match="NaN or infinity"), np.errstate(over="ignore"):
        update.difference(large, -large)


def test_a_stored_update_comes_back_bit_for_bit(tmp_path: Path):
    update.store(tmp_path, 1, stored())
    again = update.load(tmp_path, 1)
    assert again is not None
    assert again.delta.tobytes() == stored().delta.tobytes()
    assert (again.input_digest, again.model_digest, again.inputs) == ("in", "m1", "ab" * 32)
    assert (again.tail.dtype, again.tail.tolist()) == (np.int64, [3, 0, 2**40, 2])
    assert update.path_of(tmp_path, 1).stat().st_mode & 0o777 == 0o600


def test_there_is_no_update_of_a_round_that_was_not_trained(tmp_path: Path):
    update.store(tmp_path, 1, stored())
    assert update.load(tmp_path, 2) is None


def test_what_is_read_back_cannot_be_overwritten(tmp_path: Path):
    # Masking happens in place, in a copy (client/payload.py): the stored update must give the same bytes again.
    update.store(tmp_path, 1, stored())
    again = update.load(tmp_path, 1)
    assert again is not None and not again.delta.flags.writeable and not again.tail.flags.writeable


def test_only_this_and_the_previous_round_are_kept(tmp_path: Path):
    for index in (1, 2, 3):
        update.store(tmp_path, index, stored(index))
    assert update.load(tmp_path, 1) is None
    assert [update.load(tmp_path, index) is not None for index in (2, 3)] == [True, True]


def test_a_damaged_file_is_refused(tmp_path: Path):
    update.store(tmp_path, 1, stored())
    path = update.path_of(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationError, match="damaged"):
        update.load(tmp_path, 1)


def test_a_round_is_trained_from_one_input_also_when_its_update_is_gone(tmp_path: Path):
    for index in (1, 2, 3):
        update.claim(tmp_path, index, f"in-{index}")
        update.store(tmp_path, index, stored(index))
    assert update.load(tmp_path, 1) is None
    update.claim(tmp_path, 3, "in-3")  # the same again, after its update was lost
    with pytest.raises(RefusedError, match="round 3: already trained from another"):
        update.claim(tmp_path, 3, "other")
    with pytest.raises(RefusedError, match="round 1: already trained from another"):
        update.claim(tmp_path, 1, "other")


def test_rounds_only_go_forward(tmp_path: Path):
    update.claim(tmp_path, 5, "in-5")
    for index in (1, 4):  # missed while this site was away, or asked again by a coordinator that went back
        with pytest.raises(RefusedError, match="round 5 was trained already"):
            update.claim(tmp_path, index, "in")
    update.claim(tmp_path, 7, "in-7")


def test_a_damaged_note_stops_training(tmp_path: Path):
    update.claim(tmp_path, 1, "in")
    path = tmp_path / "inputs.record"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationError, match="damaged"):
        update.claim(tmp_path, 1, "in")
