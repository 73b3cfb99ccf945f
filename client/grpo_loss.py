"""What GRPO adds up to beyond trl's own loss: weights of parts of a step, and the exact expectation over options.

Runs at a hospital. Pure functions on tensors.

A step's loss is a sum over drawn patients divided by the expected number of patients q·N, a constant of the run, never
by how many the draw happened to give: that is what makes one patient's share of the gradient independent of who else
was drawn (Ponomareva et al. 2023, §5), and what differential privacy needs later. With as many drawn patients as
expected it is trl's loss exactly.

    dr_grpo   patient: sum over its tokens / (G · longest completion)           separable by patient
    grpo      patient: mean over completions of the mean over tokens            separable by patient
    bnpo      tokens of all drawn patients share one normaliser, their count    coupled
    dapo      the same (trl's two differ only across micro-batches, and a step has one normaliser here)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

LossType = Literal["dr_grpo", "grpo", "bnpo", "dapo"]

# trl adds it to the standard deviation of a group's rewards.
ADVANTAGE_EPSILON = 1e-4


@dataclass(frozen=True)
class StepScale:
    """One step's normaliser.

    Attributes:
        loss_type: which loss.
        expected_patients: q·N.
        drawn_patients: in this step.
        drawn_tokens: tokens in the loss, over all drawn patients.
    """

    loss_type: LossType
    expected_patients: float
    drawn_patients: int
    drawn_tokens: int

    def weight(self, patients: int, tokens: int) -> float:
        """What trl's loss of a part of the step is multiplied by, so that the parts add up to the step's loss.

        Args:
            patients: in the part.
            tokens: in the loss, of the part.
        """
        if self.loss_type in ("dr_grpo", "grpo"):  # trl's loss is a mean over the part's patients
            return patients / self.expected_patients
        whole = self.drawn_patients / self.expected_patients
        if self.loss_type == "dapo":  # trl divides by the whole step's tokens already
            return whole
        return whole * tokens / self.drawn_tokens


def exact_loss(log_probs: Tensor, truth: Tensor, scale_rewards: str, entropy_bonus: float = 0.0) -> Tensor:
    """Loss of answer-only questions in the limit of infinitely many completions, one value a patient.

    With p the policy's probabilities over the options and the truth t, a completion that answers o has the advantage
    A_o = r_o − p_t, divided by √(p_t(1 − p_t)) under group scaling. GRPO's expected gradient is Σ_o p_o A_o ∇log p_o:
    the gradient of −Σ_o p_o A_o with A held constant. No sampling, so no sampling noise.

    Expected reward alone is highest for a policy that is sure of its answer, whatever it knows, and one that is sure
    has no gradient left to learn from (∇p_t vanishes as p_t goes to 0 or 1). `entropy_bonus` · H(p) added to the reward
    (Williams and Peng 1991) keeps it unsure where it knows nothing. Without scaling the best policy is
    p_o ∝ exp(P(o) / bonus), P(o) how probable option o is given what the record shows. Under group scaling what is
    expected is 2·arcsin√p_t in place of p_t (its gradient is ∇p_t / √(p_t(1 − p_t))), which is steep near 1: of two
    equally probable options the policy stays even, and where one is clearly the likelier it may still become sure.
    Either way the likeliest option is the policy's likeliest: both rise with p_t, and exchanging two probabilities
    leaves the entropy as it is.

    Args:
        log_probs: (n, most options), with gradient; -inf past a row's own options.
        truth: int64 (n,).
        scale_rewards: `group` or `none`.
        entropy_bonus: reward for a nat of entropy over the options, 0 or more.

    Returns:
        float32 (n,), to be minimised; without a bonus its value is 0, its gradient is what counts.
    """
    p = log_probs.exp()
    right = p.detach().gather(1, truth[:, None])
    advantages = torch.zeros_like(p).scatter_(1, truth[:, None], 1.0) - right
    if scale_rewards == "group":
        advantages = advantages / ((right * (1 - right)).clamp(min=0).sqrt() + ADVANTAGE_EPSILON)
    loss = -(p * advantages.detach()).sum(1)
    if entropy_bonus > 0:
        loss = loss + entropy_bonus * (p * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(1)
    return loss


def parts_by_tokens(costs: Sequence[int], budget: int, one_by_one: bool = False) -> Iterator[list[int]]:
    """Indices in parts whose cost (number × dearest) stays within a budget; at least one index a part.

    As few parts as the budget allows, of about equal numbers: a pass over the weights costs the same for one patient as
    for ten.

    Args:
        costs: tokens of each patient's forward pass.
        budget: tokens of a part.
        one_by_one: one patient a part whatever the budget (per-patient gradients).

    >>> list(parts_by_tokens([10, 30, 12, 500], 40))
    [[0, 2], [1], [3]]
    >>> list(parts_by_tokens([10, 10, 10, 10], 30))
    [[0, 1], [2, 3]]
    """
    order = sorted(range(len(costs)), key=lambda index: (costs[index], index))
    if one_by_one:
        budget = 0
    fewest = len(_filled(order, costs, budget, len(order)))
    # The smallest number a part that needs no more parts.
    for size in range(-(-len(order) // max(fewest, 1)), len(order) + 1):
        parts = _filled(order, costs, budget, size)
        if len(parts) == fewest:
            yield from parts
            return


def _filled(order: list[int], costs: Sequence[int], budget: int, most: int) -> list[list[int]]:
    """Parts filled one after another, of at most `most` indices."""
    parts: list[list[int]] = []
    for index in order:
        if parts and len(parts[-1]) < most and (len(parts[-1]) + 1) * costs[index] <= budget:
            parts[-1].append(index)
        else:
            parts.append([index])
    return parts


def rows_of(batch: dict[str, Any], rows: list[int], width: int) -> dict[str, Any]:
    """Some rows of a batch, completions cut to `width` columns; what belongs to the whole step stays."""
    result: dict[str, Any] = {}
    for key, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            result[key] = value
        elif key in ("completion_ids", "completion_mask", "tool_mask", "ref_per_token_logps"):
            result[key] = value[rows, :width]
        else:
            result[key] = value[rows]
    return result
