"""Sums in the clear, for comparison with secure ones: the same work and the same integers, without masks.

Run on one machine, by a simulation whose config says `secure_aggregation = "none"`. Enters: payloads, read from the
simulated sites' own folders; there is no message that could carry one. Leaves: their sum. A real site refuses the
config (client/policy.py), and no other part of wardround reads a payload.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..client import payload
from ..client.folder import Site
from ..common import sums
from ..common.errors import ProtocolError
from ..common.fixedpoint import rounding_key
from ..common.messages import EvaluateReply, KeysReply, Reply
from ..server.aggregation import Total, Work
from ..server.phases import Consortium


@dataclass(eq=False)
class PlainSums:
    """Implements server/aggregation.py's `Sums`. `paths`: the site.toml of every site."""

    consortium: Consortium
    paths: Mapping[str, Path]

    def total(self, work: Work) -> Total:
        """As `Sums.total`."""
        consortium, instruction = self.consortium, work.instruction(1)
        ring, tail = np.zeros(work.ring_values, np.uint32), np.zeros(work.tail_values, np.int64)

        def add(_: int, reply: Reply) -> None:
            if not isinstance(reply, KeysReply | EvaluateReply):
                raise ProtocolError(f"{reply.site}: expected that the work is done")
            work.take(reply)
            folder = Site.open(self.paths[reply.site]).run_folder(instruction.run_id)
            given = payload.require(folder, instruction.round_index, work.purpose)
            values, counts = given.ring, given.tail.copy()
            if values.dtype == np.float32:
                config = consortium.config
                values, clipped = sums.fixed_point(config).quantise(
                    values.astype(np.float32),
                    float(counts[0]),
                    rounding_key(config.seed, reply.site, instruction.round_index),
                )
                counts[sums.CLIPPED] = clipped
            np.add(ring, values, out=ring)
            np.add(tail, counts, out=tail)

        nodes, _ = consortium.here(consortium.cohort.names)
        result = consortium.visit(work.phase, nodes, instruction, Reply, add)
        consortium.cohort.require(work.phase, len(result.sites), result.failures)
        return Total(ring, tail, result.sites, result.failures, [], result.traffic)

    def forget(self, name: str) -> None:
        """Nothing was kept."""
