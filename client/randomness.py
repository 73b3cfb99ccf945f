"""The site's own randomness where privacy rests on it: who is drawn, and the noise.

Run by the site. Enters: 32 random bytes of the operating system. Leaves: nothing by itself; noise leaves inside noised
sums. Private: the key, which is never stored: whoever has it can take the noise off again.

Uniform and Gaussian numbers come from an AES-256-CTR key stream, never from the run's seed, which the coordinator
knows. A Gaussian sample is (g₁ + g₂ + g₃ + g₄) / 2 of four samples by Box and Muller in double precision, from uniforms
of 53 bits: the sum of 2n samples, n = 2, keeps an observer from telling by its last bits which sum a noised value came
from (Holohan and Braghin 2021, arXiv 2107.10138, §5.1; Opacus's secure mode does the same). No g is beyond 8.6 standard
deviations; a true Gaussian is with probability 1e-17, far below any δ.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

_SUMMANDS = 4
_BLOCK = 1 << 20  # numbers made at a time: memory does not grow with the model
Float64 = NDArray[np.float64]


class SecureRandom:
    """A stream of random numbers. Not for two threads at once.

    Args:
        key: 32 bytes; None: of the operating system. A key is given in tests only.
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = os.urandom(32) if key is None else key
        if len(key) != 32:
            raise ValueError(f"key: expected 32 bytes, got {len(key)}")
        self._stream = Cipher(AES256(key), CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        return "SecureRandom()"

    def uniform(self, count: int) -> Float64:
        """float64 (count,), in [0, 1), multiples of 2⁻⁵³."""
        words = np.frombuffer(self._stream.update(bytes(8 * count)), "<u8")
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def gaussian(self, count: int, std: float) -> torch.Tensor:
        """float64 (count,) on the CPU, mean 0, standard deviation `std`."""
        result = torch.zeros(count, dtype=torch.float64)
        for start in range(0, count, _BLOCK):
            part = result[start : start + _BLOCK]
            for _ in range(_SUMMANDS):
                part += self._standard(len(part))
        return result.mul_(std / 2)

    def _standard(self, count: int) -> torch.Tensor:
        half = -(-count // 2)
        uniform = torch.from_numpy(self.uniform(2 * half))
        # 1 − u is in (0, 1]: its logarithm is finite.
        radius = uniform[:half].neg_().log1p_().mul_(-2).sqrt_()
        angle = uniform[half:].mul_(2 * np.pi)
        return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]
