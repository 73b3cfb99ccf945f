"""The adapter that all sites share at one point of a run: a manifest and a full vector, and the digest of both.

Used by both roles: the coordinator moves it round by round; a site rebuilds it from the round-0 adapter on its disk and
the trainable vector of an instruction, and compares digests before it trains. Nothing private until patients shaped it;
from round 1 on it says what the mean of the updates says.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .adapter import Float32Array, Manifest, check_vector, vector_digest
from .errors import VerificationError


@dataclass(frozen=True, eq=False)
class GlobalModel:
    """A full adapter vector with its manifest. `full`: float32 (manifest.total_size,), not to be written to."""

    manifest: Manifest
    full: Float32Array

    @cached_property
    def digest(self) -> str:
        """SHA-256 hex over manifest and full vector.

        Raises:
            VerificationError: the vector is not the manifest's, or holds NaN or infinity.
        """
        return vector_digest(self.manifest, self.full)

    @cached_property
    def trainable(self) -> Float32Array:
        """The trainable part, float32 (manifest.size,); the full vector itself when everything is trained."""
        check_vector(self.full, self.manifest, trainable_only=False)
        if self.manifest.size == self.manifest.total_size:
            return self.full
        return np.concatenate([self.full[start:stop] for start, stop in self._spans()])

    def moved(self, trainable: Float32Array) -> GlobalModel:
        """The model with this trainable part and everything else as it is.

        Raises:
            VerificationError: wrong size or dtype, NaN or infinity.
        """
        check_vector(trainable, self.manifest, trainable_only=True)
        if self.manifest.size == self.manifest.total_size:
            return GlobalModel(self.manifest, trainable)
        full, offset = self.full.copy(), 0
        for start, stop in self._spans():
            full[start:stop] = trainable[offset : offset + stop - start]
            offset += stop - start
        return GlobalModel(self.manifest, full)

    def verify(self, expected: str) -> None:
        """Raises VerificationError unless the digest is `expected`."""
        if self.digest != expected:
            raise VerificationError(f"global model: expected digest {expected[:12]}…, got {self.digest[:12]}…")

    def _spans(self) -> list[tuple[int, int]]:
        """Where the trainable tensors lie in the full vector."""
        spans: list[tuple[int, int]] = []
        offset = 0
        for spec in self.manifest.specs:
            if spec.trainable:
                spans.append((offset, offset + spec.size))
            offset += spec.size
        return spans
