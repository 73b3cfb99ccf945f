"""What a site gives to a secure sum: kept on its disk, and masked when the sum asks for it (docs/secure-sums.md §S10).

Run by the site. Enters: counts, an update, right answers; keys of masks. Leaves, through client/sharing.py: the masked
vector. Private: everything else here; a payload never leaves, and this module has no way of writing one unmasked into
a message. Payloads are in the run's folder, mode 0700, so that a retry adds up exactly what the first try would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..common import sums
from ..common.config import RunConfig
from ..common.errors import ProtocolError
from ..common.files import read_record, write_record
from ..common.fixedpoint import check_tail, rounding_key
from ..common.secagg import masking
from ..common.secagg.client_state import MaskKeys
from ..common.secagg.keys import PURPOSES, UPDATE
from . import update


@dataclass(frozen=True, eq=False)
class Payload:
    """One site's vector for one sum.

    Attributes:
        model_digest: the model that it was made with, hexadecimal.
        inputs: what else it was made from, `sums.input_digest`.
        ring: uint32 (d,), added modulo 2^32; for an update float32 (d,), quantised when it is masked.
        tail: int64 (k,), from 0; added modulo 2^64.
    """

    model_digest: str
    inputs: bytes
    ring: NDArray[np.uint32] | NDArray[np.float32]
    tail: NDArray[np.int64]

    def content_digest(self, purpose: int) -> str:
        """What the site remembers of it, to refuse it to a sum with other survivors."""
        # Of the memory itself: a copy of an update of 56 million values is 224 MB.
        parts = (np.ascontiguousarray(part).view(np.uint8).data for part in (self.ring, self.tail))
        return sums.content_digest(purpose, self.model_digest, self.inputs, *parts)

    def masked(self, config: RunConfig, site: str, round_index: int, keys: MaskKeys) -> NDArray[np.uint32]:
        """The vector that may leave: uint32 (d + 2k,), the ring and the halves of the tail under the masks.

        Args:
            config: the run's.
            site: its name, for the stream that rounds an update.
            round_index: of the sum.
            keys: of the masks.

        Raises:
            VerificationError: an update that holds NaN or infinity, or a tail value above 2^40.
            ConfigError: its weight is out of range.
            ValueError: no key to add: a payload never leaves without its self mask.
        """
        if not keys.plus:
            raise ValueError("keys: expected at least the self key")
        d = len(self.ring)
        out = np.empty(d + 2 * len(self.tail), np.uint32)
        ring, tail = out[:d], out[d:].view(np.uint64)
        tail[:] = self.tail.astype(np.uint64)
        if self.ring.dtype == np.float32:
            values = ring.view(np.float32)
            values[:] = self.ring
            masking.quantise_and_mask(
                values,
                tail,
                sums.fixed_point(config),
                float(self.tail[0]),
                rounding_key(config.seed, site, round_index),
                keys.plus,
                keys.minus,
                clipped_slot=sums.CLIPPED,
            )
        else:
            check_tail(tail)
            ring[:] = self.ring
            masking.apply(ring, tail, keys.plus, keys.minus)
        return out


def path_of(run_folder: Path, round_index: int, purpose: int) -> Path:
    """Where a payload lies in a run's state folder; an update lies where client/update.py keeps it."""
    return run_folder / f"{PURPOSES[purpose]}-{round_index:05d}.record"


def store(run_folder: Path, round_index: int, purpose: int, payload: Payload) -> None:
    """Keeps a payload of integers, atomically."""
    values = {"model_digest": payload.model_digest, "inputs": payload.inputs.hex()}
    write_record(path_of(run_folder, round_index, purpose), values, {"ring": payload.ring, "tail": payload.tail})


def of_update(stored: update.StoredUpdate) -> Payload:
    """The payload of a stored update."""
    return Payload(stored.model_digest, bytes.fromhex(stored.inputs), stored.delta, stored.tail)


def load(run_folder: Path, round_index: int, purpose: int) -> Payload | None:
    """The stored payload of a sum, or None.

    Raises:
        VerificationError: the file is damaged.
    """
    if purpose == UPDATE:
        stored = update.load(run_folder, round_index)
        return stored and of_update(stored)
    path = path_of(run_folder, round_index, purpose)
    if not path.exists():
        return None
    record = read_record(path)
    inputs = bytes.fromhex(record.values["inputs"])
    return Payload(record.values["model_digest"], inputs, record.vectors["ring"], record.vectors["tail"])


def require(run_folder: Path, round_index: int, purpose: int) -> Payload:
    """The stored payload of a sum.

    Raises:
        ProtocolError: there is none, or no such purpose.
        VerificationError: the file is damaged.
    """
    if purpose not in PURPOSES:
        raise ProtocolError(f"purpose: expected one of {sorted(PURPOSES)}, got {purpose}")
    payload = load(run_folder, round_index, purpose)
    if payload is None:
        raise ProtocolError(f"this site has nothing to add to the sum of {PURPOSES[purpose]} in round {round_index}")
    return payload
