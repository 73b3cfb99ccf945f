"""Gradient inversion: what a coordinator could read from one hospital's update, if it saw one.

Run on one machine. Enters: a model, questions of patients of an open registry. Leaves: how many of the record's values,
and of the right answers, were read from an update of one step, against chance.

The attacker knows the model that was sent, the prompt, which features the record shows, what was asked and its options;
not the values, and not which option was right. For every value it has a list of candidates (the true one and those of
other patients), changes one at a time and keeps what makes the gradient of the whole question most like the update
(cosine similarity; AdamW's first step says little more than signs, so those are compared), from three starts. Nothing
better is tried, so what is not read here may be readable; text that is on no list of candidates is not read at all.
Methods that recover text from nothing (DAGER, arXiv 2405.15586) need gradients of a rank above the number of tokens;
those of a LoRA adapter have its own rank.

What is seen is what client/grpo.py, client/private_optimizer.py and the masks of secure sums make of the same patient:

    alone      the update of one patient in the clear
    crowd      the update of several patients in the clear, one of whom is attacked
    masked     the same as `alone` as it leaves in a secure sum: masked integers
    private    the update of one patient in the clear, under differential privacy
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ...client.grpo import Engine, train_local_round
from ...client.grpo_loss import parts_by_tokens
from ...client.private_optimizer import PrivateSteps
from ...client.update import difference
from ...common import sums
from ...common.config import RunConfig
from ...common.dictionary import Dictionary
from ...common.lm.models import LanguageModel
from ...common.lm.scoring import encode
from ...common.question import PromptTemplate, Question
from ...common.secagg.masking import quantise_and_mask
from .membership import Members

CANDIDATES = 8  # for each value, the true one among them
CROWD = 8  # patients of a step
_STARTS, _SWEEPS = 3, 8
_CERTAIN = 0.99  # likeness of a question that is the right one
_ADAM_EPSILON = 1e-8

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Record:
    """A question taken apart: the lines of its record, and what stands around them."""

    question: Question
    lines: tuple[str, ...]
    before: str
    after: str
    separator: str

    @classmethod
    def of(cls, question: Question, template: PromptTemplate) -> Record:
        """Raises ValueError where the prompt's own words occur in a record."""
        before, rest = template.user.split("{record}")
        ends = rest.split("{")[0]
        record, found, after = question.text.removeprefix(before).partition(ends)
        if not found or not ends:
            raise ValueError("prompt: expected words of its own after {record}, to find where a record ends")
        return cls(question, tuple(record.split(template.separator)), before, ends + after, template.separator)

    def with_lines(self, lines: Sequence[str], answer: int) -> Question:
        return replace(self.question, text=self.before + self.separator.join(lines) + self.after, answer=answer)


def alternatives(
    records: Sequence[Record], dictionary: Dictionary, template: PromptTemplate
) -> Mapping[str, Sequence[str]]:
    """All lines of the same feature that occur in the records, by line."""
    starts = [template.line.format(label=f.label, value="\0", unit="").split("\0")[0] for f in dictionary.features]
    starts.sort(key=len, reverse=True)  # "Lactate after the outcome" before "Lactate"
    by_start: dict[str, set[str]] = {}
    for record in records:
        for line in record.lines:
            start = next((start for start in starts if line.startswith(start)), line)
            by_start.setdefault(start, set()).add(line)
    return {line: sorted(lines) for lines in by_start.values() for line in lines}


class Attacker:
    """Knows the model that was sent, and makes gradients of questions with it."""

    def __init__(self, lm: LanguageModel, template: PromptTemplate, config: RunConfig, start: Float32) -> None:
        self.lm, self.template, self.start = lm, template, start
        lm.set_vector(start)
        self.engine = Engine(lm, Members([]), template, config, seed=0)

    def likeness(self, update: Float32, candidates: Sequence[Question]) -> NDArray[np.float64]:
        """Cosine similarity of the update, turned round, with AdamW's first step on each candidate."""
        self.lm.set_vector(self.start)
        self.lm.model.train()
        lengths = [len(encode(self.lm, self.template, question, False)) for question in candidates]
        apart = not self.engine.told_apart
        order = [index for part in parts_by_tokens(lengths, self.engine.tokens_per_backward, apart) for index in part]
        result = np.zeros(len(candidates))
        seen = torch.from_numpy(-update).to(self.lm.device)
        done = 0
        for loss in self.engine.losses(candidates, one_by_one=apart):
            found = self.engine.patient_gradients(loss * self.engine.draws.expected_patients)
            flat = torch.cat([found[parameter].flatten(1) for parameter in self.lm.trainable().values()], dim=1)
            steps = flat / (flat.abs() + _ADAM_EPSILON)
            cosines = torch.nn.functional.cosine_similarity(steps, seen[None], dim=1)
            result[order[done : done + len(flat)]] = cosines.cpu().numpy()
            done += len(flat)
        return result

    def read(
        self, update: Float32, record: Record, lists: Sequence[Sequence[str]], rng: np.random.Generator
    ) -> tuple[list[str], int]:
        """The values and the right option that explain the update best, of some random starts."""
        best: tuple[float, list[str], int] = -2.0, [], 0
        for _ in range(_STARTS):
            found = self._climb(update, record, lists, rng)
            best = max(best, found, key=lambda one: one[0])
            if best[0] > _CERTAIN:
                break
        return best[1], best[2]

    def _climb(
        self, update: Float32, record: Record, lists: Sequence[Sequence[str]], rng: np.random.Generator
    ) -> tuple[float, list[str], int]:
        """From a random start, one value at a time, until nothing is more like the update."""
        lines, options = [str(rng.choice(each)) for each in lists], len(record.question.options)
        answer, likeness = int(rng.integers(options)), -1.0
        for _ in range(_SWEEPS):
            before = answer, list(lines)
            found = self.likeness(update, [record.with_lines(lines, option) for option in range(options)])
            answer, likeness = int(found.argmax()), float(found.max())
            for place, each in enumerate(lists):
                if len(each) > 1:
                    tried = [record.with_lines([*lines[:place], line, *lines[place + 1 :]], answer) for line in each]
                    found = self.likeness(update, tried)
                    lines[place], likeness = each[int(found.argmax())], float(found.max())
            if (answer, lines) == before:
                break
        return likeness, lines, answer


def update_of(
    lm: LanguageModel,
    questions: Sequence[Question],
    template: PromptTemplate,
    config: RunConfig,
    start: Float32,
    private: PrivateSteps | None = None,
) -> Float32:
    """A hospital's update after one step over these patients, all of them drawn."""
    grpo = config.grpo.model_copy(update={"local_steps": 1, "patients_per_step": float(len(questions))})
    settings = config.model_copy(update={"grpo": grpo})
    lm.set_vector(start)
    result = train_local_round(lm, Members(questions), template, settings, seed=config.seed, private=private)
    return difference(result.vector, start)


def masked(update: Float32, config: RunConfig) -> Float32:
    """The update as it leaves in a secure sum, read as if the masks were not there."""
    fixed_point = sums.fixed_point(config)
    tail = np.zeros(0, np.uint64)
    keys = [secrets.token_bytes(32) for _ in range(3)]  # the self mask, and those with two other hospitals
    ring, _ = quantise_and_mask(update.copy(), tail, fixed_point, 1.0, secrets.token_bytes(32), keys[:2], keys[2:])
    return fixed_point.mean(ring, fixed_point.max_weight).astype(np.float32)
