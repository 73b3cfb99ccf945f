"""Ranking and Brier score from counts agree with scikit-learn and with DeLong's own double sum, and add up."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from wardround.common.errors import ProtocolError
from wardround.common.event_sums import BINS, EDGES, EVENT_SIZE, EventSums


def patients(seed: int, n: int = 400, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that rank somewhat, and who had the event."""
    rng = np.random.default_rng(seed)
    happened = rng.random(n) < share
    return 1 / (1 + np.exp(2 - 1.2 * happened - rng.normal(size=n))), happened


def binned(probability: np.ndarray) -> np.ndarray:
    return np.searchsorted(EDGES, probability, side="right")


def delong(score: np.ndarray, happened: np.ndarray) -> float:
    """The variance by its definition: placements of each patient among the others, one by one."""
    with_event, without = score[happened], score[~happened]
    psi = (with_event[:, None] > without) + 0.5 * (with_event[:, None] == without)
    return psi.mean(1).var(ddof=1) / len(with_event) + psi.mean(0).var(ddof=1) / len(without)


@pytest.mark.parametrize("seed", range(5))
def test_the_area_is_that_of_scikit_learn_for_binned_probabilities(seed: int):
    probability, happened = patients(seed)
    area, _ = EventSums.of(probability, happened).auroc()
    assert area == pytest.approx(roc_auc_score(happened, binned(probability)), abs=1e-12)


def test_bins_move_the_area_by_a_small_part_of_its_standard_error():
    moved: list[float] = []
    for seed in range(100):
        probability, happened = patients(seed)
        moved.append(EventSums.of(probability, happened).auroc()[0] - float(roc_auc_score(happened, probability)))
        assert abs(moved[-1]) < np.sqrt(delong(probability, happened)) / 3
    assert abs(np.mean(moved)) < 0.002


def test_rare_events_are_resolved_as_well():
    probability, happened = patients(3, n=20_000, share=0.02)
    few = probability / 30  # all between 0.01 and 3 %
    area, _ = EventSums.of(few, happened).auroc()
    assert area == pytest.approx(roc_auc_score(happened, few), abs=0.005)


def test_the_interval_is_delongs_on_the_logit_scale():
    probability, happened = patients(1)
    area, (low, high) = EventSums.of(probability, happened).auroc()
    error = np.sqrt(delong(binned(probability), happened)) / (area * (1 - area))
    middle = np.log(area / (1 - area))
    assert np.log(np.array([low, high]) / (1 - np.array([low, high]))) == pytest.approx(
        middle + np.array([-1, 1]) * 1.959963984540054 * error
    )


def test_the_interval_holds_the_true_area_nineteen_times_in_twenty():
    whole = patients(99, n=400_000)
    true = roc_auc_score(whole[1], whole[0])
    inside = [
        low < true < high for low, high in (EventSums.of(*patients(seed, n=150)).auroc()[1] for seed in range(600))
    ]
    assert 0.925 < np.mean(inside) < 0.975


def test_patients_that_are_ranked_perfectly_show_no_scatter_so_nothing_is_claimed():
    happened = np.array([False] * 8 + [True] * 5)
    assert EventSums.of(np.where(happened, 0.9, 0.1), happened).auroc() == (1.0, [0.0, 1.0])


def test_without_both_kinds_of_patients_there_is_no_area():
    with pytest.raises(ValueError, match="with and without"):
        EventSums.of(np.array([0.2, 0.3]), np.array([False, False])).auroc()


def test_the_brier_score_is_the_mean_squared_error_with_its_standard_error():
    probability, happened = patients(2)
    score, (low, high) = EventSums.of(probability, happened).brier()
    squared = (probability - happened) ** 2
    assert score == pytest.approx(squared.mean(), abs=1e-6)
    half = 1.959963984540054 * squared.std(ddof=1) / np.sqrt(len(squared))
    assert [low, high] == pytest.approx([squared.mean() - half, squared.mean() + half], abs=1e-5)


def test_adding_vectors_adds_hospitals():
    probability, happened = patients(4)
    first, second = (EventSums.of(probability[own], happened[own]) for own in (slice(0, 130), slice(130, None)))
    both = EventSums.from_vector(first.to_vector() + second.to_vector())
    one = EventSums.of(probability, happened)
    assert np.array_equal(both.bins, one.bins)
    assert both.auroc() == one.auroc()
    assert both.brier()[0] == pytest.approx(one.brier()[0], abs=1e-5)
    assert (both.n, both.events) == (len(happened), int(happened.sum()))


@pytest.mark.parametrize(
    "place, value",
    [(0, -1), (3, 2**60), (2 * BINS, 2**40), (2 * BINS + 1, 2**40)],
    ids=["below", "large", "score", "squared"],
)
def test_numbers_that_no_patients_have_are_refused(place: int, value: int):
    vector = EventSums.of(*patients(5)).to_vector()
    vector[place] = value
    with pytest.raises(ProtocolError):
        EventSums.from_vector(vector)


def test_a_vector_of_another_length_is_refused():
    with pytest.raises(ProtocolError, match=str(EVENT_SIZE)):
        EventSums.from_vector(np.zeros(EVENT_SIZE - 1, np.int64))
