"""Applies the mean update to the global adapter: FedAvg or FedAdam (Reddi et al. 2021, arXiv 2003.00295, Algorithm 2).

Run by the coordinator. Enters and leaves: global vectors and the optimizer's state, public to the run. The symbols are
the paper's: Δ the mean update, m and v its moments, η the server's learning rate, τ the adaptivity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.config import FederationConfig
from ..common.errors import VerificationError

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ServerOptimizer:
    """One step's rule and state; immutable, so that a round that hurts is undone by keeping the older object.

    Attributes:
        config: which rule, with its constants.
        m, v: float64 (trainable,) under FedAdam; None before the first step and under FedAvg.
    """

    config: FederationConfig
    m: Float64 | None = None
    v: Float64 | None = None

    def step(self, x: Float32, delta: Float64) -> tuple[Float32, ServerOptimizer]:
        """The next global vector and the optimizer after this step.

        Args:
            x: float32 (trainable,), the vector that the sites started from.
            delta: float64 (trainable,), their mean update.

        Raises:
            VerificationError: other lengths, or the result is not finite.
        """
        if x.shape != delta.shape:
            raise VerificationError(f"server step: expected a mean update of {x.shape}, got {delta.shape}")
        config, eta = self.config, self.config.eta
        after = self
        if config.server_optimizer == "fedavg":
            moved = x.astype(np.float64) + eta * delta
        else:
            tau = config.server_epsilon
            before_m = np.zeros_like(delta) if self.m is None else self.m
            before_v = np.full_like(delta, tau * tau) if self.v is None else self.v  # v₋₁ ≥ τ²
            m = config.server_beta1 * before_m + (1 - config.server_beta1) * delta
            v = config.server_beta2 * before_v + (1 - config.server_beta2) * delta * delta
            moved = x.astype(np.float64) + eta * m / (np.sqrt(v) + tau)
            after = ServerOptimizer(config, m, v)
        result = moved.astype(np.float32)
        if not np.isfinite(result).all():
            raise VerificationError("server step: the new adapter holds NaN or infinity")
        return result, after

    def state(self) -> dict[str, Float64]:
        """The vectors that a journal keeps."""
        return {} if self.m is None or self.v is None else {"m": self.m, "v": self.v}

    @classmethod
    def restored(cls, config: FederationConfig, state: Mapping[str, NDArray[np.float64]]) -> ServerOptimizer:
        """The optimizer whose `state()` was kept."""
        return cls(config, state.get("m"), state.get("v"))
