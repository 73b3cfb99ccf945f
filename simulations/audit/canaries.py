"""White-box audit: canary gradients among real patients, through the real draws, clip, sum and noise of a local round.

Run on one machine. Enters: a model, patients of an open registry, what is claimed. Leaves: which canaries an observer
of every noised step believes to have been in.

A canary is a patient whose gradient the auditor chooses (Nasr et al. 2023, arXiv 2302.07956; Andrew et al. 2023, arXiv
2302.03098): equal values in a few places of the trained vector that no other canary has, far longer than C. A fair coin
puts it into the registry or leaves it out; if it is in, it is drawn, clipped, added up and noised as patients are, by
client/grpo.py, client/draws.py and client/private_optimizer.py as they are. The observer sees what the optimizer is
given in every step, which is more than a coordinator or a reader of the model sees, and no more than is accounted for.

The places of a canary are drawn over the whole vector, so that it lies in several tensors and a tensor without noise
shows on all canaries that touch it. The noise of every tensor is measured on values that carry no canary. Tensors
that are each clipped by themselves let a canary of w values be √w times too long at most: with few, too little to show.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...client.draws import QuestionSource
from ...client.grpo import Engine
from ...common.config import RunConfig
from ...common.lm.lora import prepare_training
from ...common.lm.models import LanguageModel
from ...common.question import PromptTemplate, Question

LENGTH = 100.0  # of a canary's gradient over C: what is not clipped is seen at once
_ABSORB_VALUES = 1 << 24  # of canary gradients made at a time

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Canaries:
    """Where canaries are, and which.

    Attributes:
        places: int64 (m, width), places in the trained vector, all different.
        included: bool (m,), the coins.
        spare: int64, places without a canary.
    """

    places: NDArray[np.int64]
    included: NDArray[np.bool_]
    spare: NDArray[np.int64]

    @classmethod
    def plant(cls, values: int, count: int, width: int, rng: np.random.Generator) -> Canaries:
        """`count` canaries of `width` places each in a vector of `values`.

        Raises:
            ValueError: fewer than an eighth of the places would be left to measure the noise on.
        """
        if count * width > values * 7 // 8:
            raise ValueError(f"{count} canaries of {width} values: expected at most 7/8 of {values} trained values")
        order = rng.permutation(values)
        taken = order[: count * width].reshape(count, width)
        return cls(taken, rng.random(count) < 0.5, np.sort(order[count * width :]))


class WithCanaries:
    """A hospital's patients and, behind them, the canaries whose coin put them in."""

    def __init__(self, patients: QuestionSource, canaries: Canaries) -> None:
        self.patients, self.included = patients, np.flatnonzero(canaries.included)
        self._drawn = self.included[:0]

    @property
    def n_patients(self) -> int:
        return self.patients.n_patients + len(self.included)

    def draw(self, patient_indices: np.ndarray, rng: np.random.Generator) -> list[Question]:
        first = self.patients.n_patients
        self._drawn = self.included[patient_indices[patient_indices >= first] - first]
        real = patient_indices[patient_indices < first]
        return self.patients.draw(real, rng) if len(real) else []

    def take_drawn(self) -> NDArray[np.int64]:
        """Canaries of the draw, once: a draw of nobody does not come by here."""
        drawn, self._drawn = self._drawn, self.included[:0]
        return drawn


class AuditedEngine(Engine):
    """The engine, with canaries among the patients and an observer of every step."""

    def __init__(
        self,
        lm: LanguageModel,
        source: WithCanaries,
        template: PromptTemplate,
        config: RunConfig,
        canaries: Canaries,
        **more: Any,
    ) -> None:
        super().__init__(lm, source, template, config, **more)
        assert self.private is not None
        self.source, self.canaries = source, canaries
        self.sizes = [parameter.numel() for parameter in self.trained]
        self.tensor_of = np.repeat(np.arange(len(self.sizes)), self.sizes)
        spare = np.split(canaries.spare, np.searchsorted(canaries.spare, np.cumsum(self.sizes)[:-1]))
        # A tensor of which canaries left no two values takes the noise of all.
        self.spare = [places if len(places) > 1 else canaries.spare for places in spare]
        self.log_ratios = np.zeros(len(canaries.places))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        # What AdamW is given is what an observer of every step sees; it comes after noise and division.
        self.private_optimizer.original_optimizer.register_step_pre_hook(self._observe)
        return optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The patients' part of the step, then the canaries' gradients, absorbed as the patients' are."""
        total = super().training_step(model, inputs, num_items_in_batch)
        for gradients in self._gradients(self.source.take_drawn()):
            self.private_optimizer.absorb(gradients)
        return total

    def _gradients(self, drawn: NDArray[np.int64]) -> Iterator[dict[torch.Tensor, torch.Tensor]]:
        at_once = max(1, _ABSORB_VALUES // sum(self.sizes))
        value = LENGTH * self.private_optimizer.max_grad_norm / self.canaries.places.shape[1] ** 0.5
        for start in range(0, len(drawn), at_once):
            part = torch.from_numpy(self.canaries.places[drawn[start : start + at_once]])
            rows = torch.zeros(len(part), sum(self.sizes)).scatter_(1, part, value)
            split = rows.to(self.lm.device).split(self.sizes, dim=1)
            yield {
                parameter: values.reshape(-1, *parameter.shape)
                for parameter, values in zip(self.trained, split, strict=True)
            }

    def _observe(self, *_: Any) -> None:
        """Adds the step's evidence: log of how much likelier what is seen is if the canary is in than if it is out."""
        assert self.private is not None
        seen = torch.cat([parameter.grad.flatten().double() for parameter in self.trained])  # type: ignore[union-attr]
        values = seen.cpu().numpy() * self.private.expected_patients / self.private.max_grad_norm  # noise σ, a canary 1
        noise = np.array([values[spare].std() for spare in self.spare])
        places = self.canaries.places
        each = np.maximum(noise, 1e-3)[self.tensor_of[places]]
        size = places.shape[1] ** -0.5
        drawn = ((values[places] - size / 2) * size / each**2).sum(1)
        q = self.private.rate
        self.log_ratios += drawn if q == 1 else np.logaddexp(np.log1p(-q), np.log(q) + drawn)


def observe(engine: AuditedEngine) -> Float64:
    """Runs the local round; the evidence for each canary, (m,)."""
    prepare_training(engine.lm.model)
    try:
        engine.train()
    finally:
        engine.close()
    return engine.log_ratios
