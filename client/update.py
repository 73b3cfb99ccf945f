"""One round's update at a site: new − old, checked, kept on the site's disk until it is collected.

Run by the site. Enters: the trainable vectors before and after local training. Leaves, under masks and through
policy and ledger: the difference (client/payload.py). Private: the difference says things about patients; the file that
holds it is in the state folder, mode 0700, and is removed when the round after the next one is stored.

Training and sending are two phases, so that a dead connection or a coordinator that resumes costs no second training,
and so that a repeated instruction gets the identical update: two different answers for one round would let a
coordinator subtract them. What each round was trained from is remembered for the whole run (`claim`), also when its
update is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common.errors import RefusedError, VerificationError
from ..common.files import read_record, write_record

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StoredUpdate:
    """What one local round left behind.

    Attributes:
        input_digest: of everything the training depended on (run, round, config, model, schema).
        model_digest: the global model that training started from.
        inputs: hexadecimal, `sums.input_digest` of what else it started from.
        delta: float32 (trainable,), new − old.
        tail: int64, in the order of `sums.UPDATE_TAIL` and then the histogram of rewards.
    """

    input_digest: str
    model_digest: str
    inputs: str
    delta: Float32
    tail: NDArray[np.int64]


def difference(new: Float32, old: Float32) -> Float32:
    """new − old, float32.

    Raises:
        VerificationError: other lengths, or a value is NaN or infinite.
    """
    if new.shape != old.shape or new.dtype != np.float32 or old.dtype != np.float32:
        raise VerificationError(f"update: expected float32 of {old.shape}, got {new.dtype} of {new.shape}")
    delta = new - old
    if not np.isfinite(delta).all():
        raise VerificationError("update: holds NaN or infinity; local training diverged, nothing is sent")
    return delta


def claim(run_folder: Path, round_index: int, input_digest: str) -> None:
    """Notes what a round is trained from, before it is; rounds only go forward, and each has one input.

    Raises:
        RefusedError: the round was trained from something else, or a later one was trained already.
        VerificationError: the note is damaged.
    """
    path = run_folder / "inputs.record"
    known: dict[str, str] = dict(read_record(path).values) if path.exists() else {}
    newest = max(map(int, known), default=0)
    if known.get(str(round_index), input_digest) != input_digest:
        raise RefusedError(f"round {round_index}: already trained from another model, config or schema")
    if round_index < newest:
        raise RefusedError(f"round {round_index}: round {newest} was trained already, and rounds only go forward")
    if str(round_index) not in known:
        write_record(path, {**known, str(round_index): input_digest})


def path_of(run_folder: Path, round_index: int) -> Path:
    """Where the update of a round lies in a run's state folder."""
    return run_folder / f"update-{round_index:05d}.record"


def store(run_folder: Path, round_index: int, update: StoredUpdate) -> None:
    """Keeps the update, atomically, and removes those of rounds before the previous one."""
    write_record(
        path_of(run_folder, round_index),
        {
            "input_digest": update.input_digest,
            "model_digest": update.model_digest,
            "inputs": update.inputs,
        },
        {"delta": update.delta, "tail": update.tail},
    )
    for old in run_folder.glob("update-*.record"):
        # A coordinator that was killed before it wrote down the previous round may still collect that one.
        if old.name < path_of(run_folder, round_index - 1).name:
            old.unlink()


def load(run_folder: Path, round_index: int) -> StoredUpdate | None:
    """The stored update of a round, or None.

    Raises:
        VerificationError: the file is damaged.
    """
    path = path_of(run_folder, round_index)
    if not path.exists():
        return None
    record = read_record(path)
    return StoredUpdate(
        record.values["input_digest"],
        record.values["model_digest"],
        record.values["inputs"],
        record.vectors["delta"],
        record.vectors["tail"],
    )
