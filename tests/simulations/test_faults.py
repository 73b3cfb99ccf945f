"""simulations/faults.py: what the soak says of memory. The soak itself runs in tests/deployment and `make soak`."""

import pytest
from wardround.simulations.faults import _Watch


def watched(held: list[tuple[int, float, int]]) -> _Watch:
    """A watch that has seen these (round, MB, process number) of one worker."""
    watch = _Watch.__new__(_Watch)
    watch._samples = {("site-01", "worker"): held}
    return watch


def rounds(first: int, last: int, megabytes, number: int = 7) -> list[tuple[int, float, int]]:
    return [(at, megabytes(at), number) for at in range(first, last + 1) for _ in range(10)]


def test_memory_that_grows_with_every_round_is_found() -> None:
    grown = watched(rounds(1, 12, lambda at: 400.0 + 30 * at))
    assert grown.growth() == ["site-01 worker: held 580 MB, later 760 MB"]


def test_what_is_loaded_with_the_first_rounds_is_no_growth() -> None:
    assert watched(rounds(1, 12, lambda at: 480.0 if at > 1 else 340.0)).growth() == []
    assert watched(rounds(6, 12, lambda at: 480.0 if at > 6 else 340.0)).growth() == []


@pytest.mark.parametrize(("last", "judged"), [(4, 0), (5, 1)])
def test_a_process_is_judged_from_five_rounds_on(last: int, judged: int) -> None:
    assert len(watched(rounds(1, last, lambda at: 100.0 * at)).judged()) == judged


def test_a_process_started_again_is_another_process() -> None:
    both = rounds(1, 6, lambda at: 400.0, 7) + rounds(7, 12, lambda at: 600.0, 8)
    assert watched(both).growth() == []
    assert len(watched(both).judged()) == 2
