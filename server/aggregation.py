"""The mean of the sites' updates, one at a time: memory for one sum, however many sites.

Run by the coordinator. Enters: updates in the clear (simulated sites of public registries only). Leaves: their weighted
mean. Here masked integer vectors will be added up instead, and only their sum will be readable.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..common.errors import ProtocolError

_BLOCK = 1 << 18  # values converted to float64 at a time: 2 MiB beside the sum


class MeanUpdate:
    """Weighted mean of float32 vectors, summed in float64.

    A float sum depends on its order in the last bits, and updates are added as they arrive: in a simulation in the
    order of the sites' names, so that a repeated run gives the same bits; over a network in any order. The integer sums
    of secure aggregation will not depend on it.
    """

    def __init__(self, size: int) -> None:
        self._sum = np.zeros(size, np.float64)
        self.weight = 0
        self.sites: list[str] = []

    def add(self, site: str, delta: NDArray[np.float32], weight: int) -> None:
        """Adds one site's update.

        Raises:
            ProtocolError: wrong length or dtype, NaN or infinity, a weight below 1, or a site twice. Nothing was added.
        """
        if delta.dtype != np.float32 or delta.shape != self._sum.shape:
            raise ProtocolError(
                f"update of {site}: expected float32 of {self._sum.shape}, got {delta.dtype} of {delta.shape}"
            )
        if not 1 <= weight <= 2**31:
            raise ProtocolError(f"update of {site}: expected a weight of 1 to 2^31, got {weight}")
        if site in self.sites:
            raise ProtocolError(f"update of {site}: expected one update a site, got a second")
        if not np.isfinite(delta).all():
            raise ProtocolError(f"update of {site}: holds NaN or infinity")
        for start in range(0, len(delta), _BLOCK):
            self._sum[start : start + _BLOCK] += delta[start : start + _BLOCK].astype(np.float64) * weight
        self.weight += weight
        self.sites.append(site)

    def mean(self) -> NDArray[np.float64]:
        """float64 (size,): the weighted mean.

        Raises:
            ProtocolError: nothing was added.
        """
        if not self.sites:
            raise ProtocolError("mean update: expected at least one site, got none")
        return self._sum / self.weight
