"""simulations/faults.py: what the soak says of memory. The soak itself runs in tests/deployment and `make soak`."""

from types import SimpleNamespace

import pytest
from wardround.simulations import faults
from wardround.simulations.faults import _Watch


def watched(held: list[tuple[int, float, int]]) -> _Watch:
    """A watch that has seen these (round, MB, process number) of one worker."""
    watch = _Watch.__new__(_Watch)
    watch._samples, watch._round = {("site-01", "worker"): held}, 0
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


class _Progress(_Watch):
    """A watch over nobody, of a run whose round is given."""

    def __init__(self, said: list[int]) -> None:
        self._samples, self._sampled, self._round, self._began, self._said = {}, -100.0, 0, 0.0, iter(said)
        self._made = SimpleNamespace(coordinator=SimpleNamespace(), hospitals={})

    def progress(self) -> dict[str, int]:
        return {"round": next(self._said)}


def test_a_run_that_begins_again_is_in_the_round_in_which_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "COORDINATOR_PROCESSES", ())
    monkeypatch.setattr(faults, "SITE_PROCESSES", ())
    monkeypatch.setattr(faults, "_SAMPLE_S", -1.0)
    watch = _Progress([6, 0, 7])
    seen = []
    for _ in range(3):
        watch._sample()
        seen.append(watch._round)
    assert seen == [6, 6, 7]


def test_a_long_run_in_which_no_worker_could_be_judged_says_so() -> None:
    watch = watched(rounds(11, 12, lambda at: 400.0))
    watch._round = 12
    assert watch.growth() == [
        f"no {kind} lived long enough for its memory to be judged" for kind in ("superlink", "supernode", "worker")
    ]
