"""One round's update at a site: new − old, checked, kept on the site's disk until it is collected.

Run by the site. Enters: the trainable vectors before and after local training. Leaves (in the reply to `collect`, and
only through policy and ledger): the difference. Private: the difference says things about patients; the file that holds
it is in the state folder, mode 0700, and is removed when the round after the next one is stored.

Training and sending are two phases, so that a dead connection or a coordinator that resumes costs no second training,
and so that a repeated instruction gets the identical update: two different answers for one round would let a
coordinator subtract them. What each round was trained from is remembered for the whole run (`claim`), also when its
update is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.errors import ProtocolError, RefusedError, VerificationError
from ..common.files import read_record, write_record

Float32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class StoredUpdate:
    """What one local round left behind.

    Attributes:
        input_digest: of everything the training depended on (run, round, config, model, schema).
        model_digest: the global model that training started from.
        weight: of this site in the mean; 1, or the declared patients.
        delta: float32 (trainable,), new − old.
        statistics: the training reply's scalar fields.
        histogram: int64 (group_size + 1,), the training reply's reward histogram.
    """

    input_digest: str
    model_digest: str
    weight: int
    delta: Float32
    statistics: dict[str, Any]
    histogram: NDArray[np.int64]


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
            "weight": update.weight,
            "statistics": update.statistics,
        },
        {"delta": update.delta, "histogram": update.histogram},
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
        record.values["weight"],
        record.vectors["delta"],
        record.values["statistics"],
        record.vectors["histogram"],
    )


def load_for(run_folder: Path, round_index: int, model_digest: str) -> StoredUpdate:
    """The stored update of a round that started from this model.

    Raises:
        ProtocolError: nothing was trained in this round, or from another model.
        VerificationError: the file is damaged.
    """
    update = load(run_folder, round_index)
    if update is None:
        raise ProtocolError(f"collect: this site holds no update of round {round_index}")
    if update.model_digest != model_digest:
        raise ProtocolError(
            f"collect: expected the update from model {model_digest[:12]}…, got {update.model_digest[:12]}…"
        )
    return update
