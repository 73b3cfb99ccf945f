"""Who sees what in which order: drawn from the study's secret seed, so that nobody chooses it and anybody can redo it.

Runs at the coordinator. Enters: the seed (32 secret bytes in the database), a rater's number. Leaves: that rater's
`Slot`s. Private: the seed and the slots; a page shows a slot's place and nothing else of it.

For every rater by itself: the order of items is a random permutation; which model's answer comes first is random, each
model in half of the items (one more at an odd number); a share of the items is planted a second time, later, with the
answers the other way round.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

import numpy as np

_PROTOCOL = b"wardround review 1"
USAGE_ORDER, USAGE_SIDES, USAGE_TWICE = b"order", b"sides", b"twice"
USAGE_FORM, USAGE_LOGIN, USAGE_TAKE_OVER = b"form", b"login", b"take over"  # of server/review/app.py
APART = 10  # at least so many pairs between a pair and its repetition, where there are enough


@dataclass(frozen=True)
class Slot:
    """One place in a rater's sequence.

    Attributes:
        item: index into the study's items.
        first_model: 0 or 1: whose answer comes first.
        repeats: place, from 0, of the slot that this one repeats with the answers exchanged; None: it is no repetition.
    """

    item: int
    first_model: int
    repeats: int | None = None


def derive(seed: bytes, usage: bytes, what: str) -> bytes:
    """32 bytes from the secret seed for one use and one thing; other uses get unrelated ones."""
    return hmac.digest(seed, b"\0".join((_PROTOCOL, usage, what.encode("utf-8", "replace"))), hashlib.sha256)


def _generator(seed: bytes, usage: bytes, rater: int) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(derive(seed, usage, str(rater))))


def repetitions(items: int, share: float) -> int:
    """How many items a rater sees twice.

    >>> repetitions(20, 0.1), repetitions(4, 0.1), repetitions(4, 0.0)
    (2, 1, 0)
    """
    return min(items - 1, max(1, round(items * share))) if share and items > 1 else 0


def sequence(seed: bytes, rater: int, items: int, share: float) -> list[Slot]:
    """A rater's slots, the same at every call.

    Args:
        seed: 32 bytes.
        rater: the rater's number.
        items: how many there are.
        share: of the items that are planted twice, 0 to 0.5.
    """
    if not 0.0 <= share <= 0.5:
        raise ValueError(f"expected a share of 0 to 0.5 planted twice, got {share}")
    order = _generator(seed, USAGE_ORDER, rater).permutation(items)
    sides = _generator(seed, USAGE_SIDES, rater).permutation((np.arange(items) + rater) % 2)
    draws = _generator(seed, USAGE_TWICE, rater)
    # Each has a place on a line, its repetition one further on. Only what comes early enough can come again later: the
    # first half leaves room for the distance.
    line = [(float(place), int(item), False) for place, item in enumerate(order)]
    for place in draws.permutation((items + 1) // 2)[: repetitions(items, share)]:
        after = max(place + 1, min(place + APART + 1, items)) - 0.5
        line.append((float(draws.uniform(after, items)), int(order[place]), True))
    line.sort()
    first = {item: place for place, (_, item, again) in enumerate(line) if not again}
    return [Slot(item, int(sides[item]) ^ again, first[item] if again else None) for _, item, again in line]
