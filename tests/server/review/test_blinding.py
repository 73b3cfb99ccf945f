"""The order of what a rater sees: random, the same at every call, balanced, with repetitions turned round."""

from itertools import product

import pytest
from wardround.server.review.blinding import APART, repetitions, sequence

SEED = bytes(range(32))


def test_the_order_is_stable_and_differs_between_raters_and_seeds() -> None:
    again = sequence(SEED, 1, 50, 0.1)
    assert sequence(SEED, 1, 50, 0.1) == again
    others = [sequence(SEED, 2, 50, 0.1), sequence(bytes(32), 1, 50, 0.1)]
    assert all([slot.item for slot in other] != [slot.item for slot in again] for other in others)


@pytest.mark.parametrize(("items", "share"), product((1, 2, 3, 7, 20, 101), (0.0, 0.1, 0.5)))
def test_every_item_comes_once_and_a_share_once_more_later_with_sides_exchanged(items: int, share: float) -> None:
    for rater in range(1, 6):
        slots = sequence(SEED, rater, items, share)
        first = [slot for slot in slots if slot.repeats is None]
        assert sorted(slot.item for slot in first) == list(range(items))
        assert len(slots) - items == repetitions(items, share)
        assert len({slot.item for slot in slots if slot.repeats is not None}) == len(slots) - items
        for place, slot in enumerate(slots):
            if slot.repeats is not None:
                before = slots[slot.repeats]
                assert before == type(slot)(slot.item, 1 - slot.first_model)
                assert place - slot.repeats > (APART if items >= 2 * APART + 2 else 0)


def test_each_model_comes_first_in_half_of_the_items() -> None:
    for rater in range(1, 20):
        slots = sequence(SEED, rater, 40, 0.0)
        assert sum(slot.first_model for slot in slots) == 20
    odd = [sum(slot.first_model for slot in sequence(SEED, rater, 5, 0.0)) for rater in range(1, 9)]
    assert set(odd) == {2, 3}


def test_sides_and_places_are_spread_evenly_over_raters() -> None:
    """400 raters: an item is first-sided, and in the first half, as often as coins say (within five deviations)."""
    raters = [sequence(SEED, rater, 10, 0.0) for rater in range(400)]
    for item in range(10):
        slots = [(place, slot) for slots in raters for place, slot in enumerate(slots) if slot.item == item]
        assert abs(sum(slot.first_model for _, slot in slots) - 200) < 50
        assert abs(sum(place < 5 for place, _ in slots) - 200) < 50


def test_a_share_beyond_a_half_is_not_possible() -> None:
    with pytest.raises(ValueError, match=r"0 to 0\.5"):
        sequence(SEED, 1, 10, 0.6)
