"""Rewards of completions and the counts of a round."""

import numpy as np
import pytest
from wardround.client.reward import RoundCounts, reward, text_reward, trl_reward
from wardround.common.question import Question

ASKED = Question("age", "Patient", "feature", "...", ("41", "63", "80"), answer=1, majority=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\\boxed{B}", 1.0),
        ("\\boxed{A} or rather \\boxed{B}", 1.0),
        ("\\boxed{B} or rather \\boxed{A}", 0.0),
        ("\\boxed{B}, no: \\boxed{E}", 0.0),  # the last box counts, and E is no option
        ("\\boxed{63}", 0.0),
        ("B", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_box_counts_and_a_letter_that_is_no_option_is_wrong(text, expected):
    assert text_reward(text, ASKED) == expected


def test_no_answer_is_wrong():
    assert reward(None, ASKED) == 0.0
    assert trl_reward(chosen=[1, None, 2], question=[ASKED] * 3, prompts=[""] * 3) == [1.0, 0.0, 0.0]


def test_counts_of_sampled_groups_add_up():
    counts = RoundCounts(3)
    counts.add_draw(2)
    counts.add_draw(0)
    counts.add_rewards(np.array([[1.0, 0, 1], [0, 0, 0]]), boxed=2, tokens=40)
    assert (counts.questions, counts.empty_draws, counts.completions) == (2, 1, 6)
    assert (counts.reward_sum, counts.boxed, counts.completion_tokens) == (2.0, 2, 40)
    assert counts.histogram.tolist() == [1, 0, 1, 0]


def test_probabilities_fall_into_as_many_bins_as_a_group_has_counts():
    counts = RoundCounts(4)
    counts.add_probabilities(np.array([0.0, 0.19, 0.21, 0.99, 1.0]))
    assert counts.histogram.tolist() == [2, 1, 0, 0, 2]
    assert counts.reward_sum == pytest.approx(2.39)
