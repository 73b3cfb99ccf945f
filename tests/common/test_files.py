"""Records: what is read is what was written, or it is known to be damaged."""

import os
from pathlib import Path

import numpy as np
import pytest
from wardround.common.errors import RunFolderError, VerificationError
from wardround.common.files import check_writable, private_folder, read_record, sweep, write_atomic, write_record

VECTORS = {
    "z": np.array([7, 8, 9]),
    "a": np.arange(5, dtype=np.float32),
    "b": np.array([], np.int64),
    "c": np.array([1e300, -0.0]),
    "d": np.frombuffer(b"xyz", np.uint8),
    "e": np.array([0, 2**32 - 1], np.uint32),
}


def test_a_record_gives_back_values_and_vectors_bit_for_bit(tmp_path: Path):
    write_record(tmp_path / "r", {"text": "é", "list": [1, None]}, VECTORS)
    record = read_record(tmp_path / "r")
    assert record.values == {"text": "é", "list": [1, None]}
    assert {name: (v.dtype, v.tobytes()) for name, v in record.vectors.items()} == {
        name: (v.dtype, v.tobytes()) for name, v in VECTORS.items()
    }


def test_every_changed_byte_and_every_cut_is_found(tmp_path: Path):
    write_record(tmp_path / "r", {"n": 1}, {"a": VECTORS["a"]})
    good = (tmp_path / "r").read_bytes()
    damaged = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    damaged += [good[:i] for i in range(len(good))] + [good + b"\0"]
    for data in damaged:
        (tmp_path / "r").write_bytes(data)
        with pytest.raises(VerificationError, match="damaged"):
            read_record(tmp_path / "r")


def test_the_bytes_of_a_record_are_little_endian_whatever_they_came_from(tmp_path: Path):
    write_record(tmp_path / "little", {}, {"v": np.array([1, 2**31], "<u4")})
    write_record(tmp_path / "big", {}, {"v": np.array([1, 2**31], ">u4")})
    assert (tmp_path / "little").read_bytes() == (tmp_path / "big").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    write_atomic(tmp_path / "f", b"old")
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "f", b"new", "not bytes")  # type: ignore[arg-type]
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_state_is_for_its_owner_only(tmp_path: Path):
    folder = private_folder(tmp_path / "a" / "state")
    write_atomic(folder / "f", b"x")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "f").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("vector", [np.zeros((2, 2), np.float32), np.zeros(2, np.int32), np.zeros(2, object)])
def test_vectors_of_other_kinds_are_refused(tmp_path: Path, vector: np.ndarray):
    with pytest.raises(ValueError, match="record vector 'v'"):
        write_record(tmp_path / "r", {}, {"v": vector})
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_is_swept_away_and_nothing_else(tmp_path: Path):
    (tmp_path / f".r.{os.getpid()}.tmp").write_bytes(b"half")
    (tmp_path / "r").write_bytes(b"whole")
    (tmp_path / ".hidden").write_bytes(b"someone's")
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "r"]


@pytest.mark.parametrize("place", ["file", "file/run", "file/a/b"])
def test_a_folder_below_a_file_is_refused_with_the_file(tmp_path: Path, place: str):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunFolderError, match=r"expected a folder, got a file at .*/file$"):
        check_writable(tmp_path / place)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nothing can be made, not even by root")
def test_a_folder_that_cannot_be_written_is_refused_and_one_that_can_is_left_as_it_is(tmp_path: Path):
    with pytest.raises(RunFolderError, match=r"/proc/run: cannot be written: /proc: "):
        check_writable(Path("/proc/run"))
    check_writable(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
