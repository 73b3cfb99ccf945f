"""Clip, add up, add noise, step: Opacus's optimizer for one patient's gradient a row, with this project's noise.

Run at a hospital by client/grpo.py, in runs with differential privacy. Enters: gradients of single patients. Leaves:
nothing; the steps it takes are what an update is made of. Private: everything before the noise.

Formal Guarantees (docs/privacy.md):
    The sum that noise is added to, in double precision, changes by at most C in L2 norm when one patient is added or
    taken away, whatever the gradients hold (NaN and infinity become zero); accounting allows for C · (1 + 1e-5). Noise
    of standard deviation σ · C is added to every trained value once a step, also when nobody was drawn. Dividing by
    q·N̂, a constant of the run, comes after.

Opacus's `DPOptimizer` keeps parameters, sums and state. Exchanged are `clip_and_accumulate` (norms and sums in double
precision, values that are not finite, a factor that is exactly 1 below C) and `add_noise` (client/randomness.py instead
of torch's generator, for which Opacus's secure mode needs a package that nobody maintains).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from .randomness import SecureRandom


@dataclass(frozen=True)
class PrivateSteps:
    """What makes a round's steps private; constants of the run but for the randomness.

    Attributes:
        noise_multiplier: σ.
        max_grad_norm: C.
        rate: q, the probability of every patient in every step.
        expected_patients: q·N̂, with N̂ as declared.
        random: the site's own.
    """

    noise_multiplier: float
    max_grad_norm: float
    rate: float
    expected_patients: float
    random: SecureRandom = field(default_factory=SecureRandom, repr=False)


class PrivateOptimizer(DPOptimizer):
    """`absorb` gradients of single patients as often as need be, then `step` once."""

    def __init__(self, optimizer: torch.optim.Optimizer, steps: PrivateSteps) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=steps.noise_multiplier,
            max_grad_norm=steps.max_grad_norm,
            expected_batch_size=steps.expected_patients,  # type: ignore[arg-type]
        )
        self._random = steps.random

    def absorb(self, gradients: Mapping[Tensor, Tensor]) -> None:
        """Clips gradients of single patients together over all parameters, and adds them to the step's sums.

        Args:
            gradients: of every trained parameter, shape (patients, *parameter's). Changed: values that are not finite.
        """
        for parameter in self.params:
            parameter.grad_sample = gradients[parameter]  # type: ignore[attr-defined]
        self.clip_and_accumulate()
        for parameter in self.params:
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def clip_and_accumulate(self) -> None:
        """Opacus's, on `grad_sample` of every parameter."""
        samples: Sequence[Tensor] = [parameter.grad_sample for parameter in self.params]  # type: ignore[attr-defined]
        factor = clip_factors(samples, self.max_grad_norm)
        for parameter, sample in zip(self.params, samples, strict=True):
            total = parameter.summed_grad  # type: ignore[attr-defined]
            if total is None:
                total = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
            # In double precision: in float32, rounding a sum of a thousand patients is more than the slack.
            for gradient, share in zip(sample, factor.tolist(), strict=True):
                total.add_(gradient, alpha=share)
            parameter.summed_grad = total  # type: ignore[attr-defined]

    def add_noise(self) -> None:
        """Gaussian noise on the sums, float64 rounded to the parameters' dtype."""
        for parameter in self.params:
            noise = self._random.gaussian(parameter.numel(), self.noise_multiplier * self.max_grad_norm)
            total = parameter.summed_grad  # type: ignore[attr-defined]
            noise = noise.view(parameter.shape).to(parameter.device)
            parameter.grad = (noise if total is None else noise.add_(total)).to(parameter.dtype)

    def scale_grad(self) -> None:
        """Divides by the expected number of patients, never by how many were drawn."""
        for parameter in self.params:
            parameter.grad /= self.expected_batch_size  # type: ignore[operator]

    def pre_step(self, closure: object = None) -> bool:
        """Noise on what was absorbed, which may be nothing."""
        self.add_noise()
        self.scale_grad()
        for parameter in self.params:
            parameter.summed_grad = None  # type: ignore[attr-defined]
        return True


def clip_factors(samples: Sequence[Tensor], most: float) -> Tensor:
    """What each patient's gradient is multiplied by: min(1, C / norm), over all parameters together.

    A patient whose gradient holds NaN or infinity gets zero, and its gradient is set to zero.

    Args:
        samples: of every parameter, shape (patients, …). Changed in place where they are not finite.
        most: C.

    Returns:
        float64 (patients,).
    """
    squares = torch.stack([sample.flatten(1).double().square().sum(1) for sample in samples]).sum(0)
    bad = ~torch.isfinite(squares)
    if bool(bad.any()):
        for sample in samples:
            sample[bad] = 0
        squares = torch.where(bad, 0.0, squares)
    return (most / squares.sqrt().clamp(min=most)).clamp(max=1.0)
