"""The trained tensors as one flat float32 vector, and the manifest that says what is where.

Used by both roles. A vector means nothing without its manifest: names, shapes and order of the tensors, which of them
are trained, the base model they belong to. Both ends compare the manifest's digest before a vector is sent. Nothing
here is private by itself; a site's own vector is (it was trained on its patients), and this module neither stores nor
logs one.

Two spaces: the **full** vector holds every tensor of the adapter (under `ffa`: frozen A and trained B; it is what
travels once, with round 0) and the **trainable** vector only those that change between rounds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import VerificationError

Float32Array = npt.NDArray[np.float32]

_USAGE_MANIFEST = b"wardround adapter manifest 1\0"
_USAGE_VECTOR = b"wardround adapter vector 1\0"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its name in the model, its shape, and whether the rounds train it."""

    name: str
    shape: tuple[int, ...]
    trainable: bool

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


@dataclass(frozen=True)
class Manifest:
    """The tensors of an adapter in vector order (by name), the base model's digest and the LoRA strategy."""

    specs: tuple[TensorSpec, ...]
    base_digest: str
    strategy: str

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.specs]
        if not names or names != sorted(set(names)):
            raise VerificationError("adapter manifest: tensor names must be present, unique and in order")

    @cached_property
    def size(self) -> int:
        """Values in the trainable vector."""
        return sum(spec.size for spec in self.specs if spec.trainable)

    @cached_property
    def total_size(self) -> int:
        """Values in the full vector."""
        return sum(spec.size for spec in self.specs)

    def kept(self, trainable_only: bool) -> tuple[TensorSpec, ...]:
        """The tensors of the trainable or of the full vector, in vector order."""
        return tuple(spec for spec in self.specs if spec.trainable or not trainable_only)

    def to_json(self) -> str:
        """Canonical JSON: what travels and what the digest covers."""
        data = {
            "base_digest": self.base_digest,
            "specs": [[spec.name, list(spec.shape), spec.trainable] for spec in self.specs],
            "strategy": self.strategy,
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """The manifest that `to_json` wrote.

        Raises:
            VerificationError: not JSON, a missing key, a value of another type, names out of order.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            specs = tuple(
                TensorSpec(str(name), tuple(int(length) for length in shape), bool(trainable))
                for name, shape, trainable in data["specs"]
            )
            return cls(specs, str(data["base_digest"]), str(data["strategy"]))
        except (ValueError, KeyError, TypeError) as error:
            raise VerificationError(f"adapter manifest: malformed ({type(error).__name__})") from None

    def digest(self) -> str:
        """SHA-256 hex of the canonical JSON."""
        return hashlib.sha256(_USAGE_MANIFEST + self.to_json().encode()).hexdigest()


def flatten(tensors: Mapping[str, npt.NDArray[Any]], manifest: Manifest, trainable_only: bool) -> Float32Array:
    """Named tensors as one vector in manifest order.

    Args:
        tensors: name → array; exactly the tensors of the trainable or of the full vector.
        manifest: their order and shapes.
        trainable_only: the trainable vector, else the full one.

    Returns:
        float32, shape (manifest.size,) or (manifest.total_size,).

    Raises:
        VerificationError: a tensor is missing, unknown, of another shape, or holds NaN or infinity.

    >>> spec = TensorSpec("b", (2,), True), TensorSpec("c", (1, 2), False)
    >>> flatten({"c": np.zeros((1, 2)), "b": np.ones(2)}, Manifest(spec, "", "ffa"), trainable_only=False)
    array([1., 1., 0., 0.], dtype=float32)
    """
    specs = manifest.kept(trainable_only)
    _same_names(tensors.keys(), [spec.name for spec in specs])
    result = np.empty(sum(spec.size for spec in specs), np.float32)
    offset = 0
    for spec in specs:
        tensor = tensors[spec.name]
        if tuple(tensor.shape) != spec.shape:
            raise VerificationError(f"adapter tensor {spec.name}: expected shape {spec.shape}, got {tensor.shape}")
        result[offset : offset + spec.size] = tensor.reshape(-1)
        offset += spec.size
    _finite(result)
    return result


def unflatten(vector: Float32Array, manifest: Manifest, trainable_only: bool) -> dict[str, Float32Array]:
    """The vector cut into named tensors: views into it, nothing copied. The inverse of `flatten`.

    Raises:
        VerificationError: wrong dtype or number of values, NaN or infinity.
    """
    check_vector(vector, manifest, trainable_only)
    result: dict[str, Float32Array] = {}
    offset = 0
    for spec in manifest.kept(trainable_only):
        result[spec.name] = vector[offset : offset + spec.size].reshape(spec.shape)
        offset += spec.size
    return result


def check_vector(vector: Float32Array, manifest: Manifest, trainable_only: bool) -> None:
    """Refuses a vector that cannot be this manifest's.

    Raises:
        VerificationError: wrong dtype or number of values, NaN or infinity.
    """
    size = manifest.size if trainable_only else manifest.total_size
    if vector.dtype != np.float32 or vector.shape != (size,):
        raise VerificationError(f"adapter vector: expected float32 of {size}, got {vector.dtype} of {vector.shape}")
    _finite(vector)


def vector_digest(manifest: Manifest, full_vector: Float32Array) -> str:
    """SHA-256 hex over manifest and full vector (little-endian float32): the identity of an adapter.

    Under `ffa` the frozen A is inside the full vector, so two sites with another A have another digest.
    """
    check_vector(full_vector, manifest, trainable_only=False)
    state = hashlib.sha256(_USAGE_VECTOR + bytes.fromhex(manifest.digest()))
    state.update(np.ascontiguousarray(full_vector, dtype="<f4").data)
    return state.hexdigest()


def _same_names(got: Sequence[str] | Any, expected: Sequence[str]) -> None:
    missing, unknown = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    if missing or unknown:
        first = f"missing '{missing[0]}'" if missing else f"unknown '{unknown[0]}'"
        raise VerificationError(f"adapter tensors: {first} ({len(missing)} missing, {len(unknown)} unknown)")


def _finite(vector: Float32Array) -> None:
    # One dot product instead of isfinite: no boolean array of the vector's size. It may overflow for finite values,
    # so a bad sum is confirmed value by value.
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.dot(vector, vector)
    if not np.isfinite(total) and not np.isfinite(vector).all():
        raise VerificationError("adapter vector: holds NaN or infinity")
