"""One local GRPO round at a hospital: draws of patients → questions → completions → rewards → a new adapter.

Runs at a hospital, on its own patients. Enters: the model with the round's starting adapter, a source of questions, the
run's config, a seed. Leaves (through client/site.py and the gate after it): the trained vector and sums over the
round. Questions, completions and single rewards stay here.

The engine is trl's GRPOTrainer (arXiv 2402.03300): its rewards, advantages and loss run unchanged. What is exchanged,
and why:

    create_optimizer                      AdamW, made plainly
    get_train_dataloader                  a step is one Poisson draw of patients, not a shuffled batch
    training_step                         one draw, one step; parts are weighted by constants; an empty draw still steps
                                          (privacy: gradients of single patients go to client/private_optimizer.py)
    _generate_and_score_completions       questions travel beside the prompts; the reference is the round's start
    _get_per_token_logps_and_entropies    one pass over the prompt for the whole group (common/lm/prefix.py)

Departures from trl: the normaliser is the expected number of patients (client/grpo_loss.py); forced letters are scored
under the softmax over the question's options; with reasoning, groups whose advantages are all zero are not run backward
(their gradient is zero). One update per draw, so the policy ratio is 1 and clipping never acts.

The reference model of beta > 0 is the round's starting adapter. trl does the same with a copy of the adapter inside the
model; here the starting values are swapped in for the time of a forward pass, so that the adapter's tensors stay those
of the manifest.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from ..common.config import RunConfig
from ..common.lm.generation import Answering, Completion, completion_log_probs, draw, rollout
from ..common.lm.lora import fused_parameters, patient_gradients, prepare_training
from ..common.lm.memory import give_back_free_memory, out_of_memory, tokens_per_backward
from ..common.lm.models import LanguageModel
from ..common.lm.prefix import SharedPrefix, causal_model, option_log_softmax
from ..common.lm.scoring import encode_texts, render
from ..common.question import PromptTemplate, Question
from ..common.seeds import derive_rng, derive_seed
from .checkpoint import Checkpoint, Progress
from .draws import Asked, Draws, QuestionSource
from .grpo_loss import StepScale, exact_loss, parts_by_tokens, rows_of
from .private_optimizer import PrivateOptimizer, PrivateSteps
from .reward import LocalResult, RoundCounts, reward, trl_reward

_ROLLOUT_SHARE = 16  # tokens decoded at a time, over those of a backward pass: no activations are kept

__all__ = ["Engine", "LocalResult", "QuestionSource", "train_local_round"]


def train_local_round(
    lm: LanguageModel,
    source: QuestionSource,
    template: PromptTemplate,
    config: RunConfig,
    *,
    seed: int,
    round_index: int = 1,
    private: PrivateSteps | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> LocalResult:
    """Trains from the vector that `lm` holds; afterwards `lm` holds the result.

    The same arguments give the same bits on one machine's CPU: draws, questions and samples come from `seed` alone. On
    a GPU some of torch's backward passes add up in an order of their own.

    Args:
        lm: model with the round's starting adapter.
        source: this hospital's questions.
        template: their prompt.
        config: the run's; `grpo`, `questions.reasoning_tokens` and `speed` are read.
        seed: of this round at this site.
        round_index: of this round, from 1; the learning rate follows from it.
        private: clip every patient's gradient and add noise; None: no privacy of single patients.
        on_step: called after every step with (steps done, steps, mean reward of the step; NaN for an empty draw).
        checkpoint: where progress is kept, and found again by the next call; None: nowhere. The caller removes it.

    Raises:
        ModelError: the model cannot share a prompt among completions, its tokenizer splits option letters, or the GPU
            ran out of memory.
        VerificationError: training gave a vector that is not finite.
    """
    began = time.perf_counter()
    if config.speed.threads:
        torch.set_num_threads(config.speed.threads)
    prepare_training(lm.model)
    engine = Engine(lm, source, template, config, seed=seed, round_index=round_index, private=private, on_step=on_step)
    done = engine.go_on(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # trl asks for names that transformers has renamed
        try:
            if done < config.grpo.local_steps:
                engine.train()
        except torch.OutOfMemoryError:
            raise out_of_memory(engine.tokens_per_backward, engine.dearest) from None
        finally:
            engine.close()
    give_back_free_memory()
    total, counts = time.perf_counter() - began, engine.counts
    phases = {**engine.phase_seconds, "other": total - sum(engine.phase_seconds.values())}
    return LocalResult(
        vector=lm.vector(),
        questions=counts.questions,
        completions=counts.completions,
        reward_sum=counts.reward_sum,
        boxed=counts.boxed,
        completion_tokens=counts.completion_tokens,
        steps=done + engine.state.global_step,
        empty_draws=counts.empty_draws,
        reward_histogram=counts.histogram,
        seconds=total,
        phase_seconds=phases,
    )


class Engine(GRPOTrainer):
    """trl's trainer for one round; made and thrown away with it (tens of milliseconds).

    Contract with trl 1.16: tests/client/test_trl_contract.py.
    """

    def __init__(
        self,
        lm: LanguageModel,
        source: QuestionSource,
        template: PromptTemplate,
        config: RunConfig,
        *,
        seed: int,
        round_index: int = 1,
        private: PrivateSteps | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self.learning_rate = config.learning_rate_of(round_index)
        grpo, reasoning = config.grpo, config.questions.reasoning_tokens
        self.lm, self.template, self.grpo, self.reasoning_tokens = lm, template, grpo, reasoning
        self.answering = Answering(lm, template)
        self.private = private
        self.draws = Draws(source, grpo.patients_per_step, grpo.local_steps, derive_rng(seed, "draws"), private)
        self.sampler = torch.Generator().manual_seed(derive_seed(seed, "sampling"))
        self.tokens_per_backward = config.speed.tokens_per_backward or tokens_per_backward(lm)
        self.dearest = 0  # tokens of the largest single patient's pass so far
        self.on_step = on_step
        self.never_generated: Sequence[int] = ()  # benchmarks suppress the end token
        self.counts = RoundCounts(grpo.group_size)
        self.phase_seconds = {"rollout": 0.0, "loss": 0.0}
        base = causal_model(lm)
        own_forward = vars(base).get("forward")
        # trl asks for a folder though nothing is written; warnings are about defaults that do not apply here.
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                super().__init__(
                    model=lm.model,
                    args=_arguments(config, folder, seed, lm.device),
                    reward_funcs=cast(Any, trl_reward),
                    rollout_func=self._rollout,
                    train_dataset=Dataset.from_dict({"prompt": [""]}),  # never read
                    processing_class=lm.tokenizer,
                )
            finally:
                # trl replaces model.forward by one with a fused head, in a chain that grows with every trainer.
                vars(base).pop("forward", None)
                if own_forward is not None:
                    base.forward = own_forward
        self.remove_callback(PrinterCallback)
        # Trainer.train frees memory first, which collects garbage over the whole process: a quarter of a second.
        self.accelerator.free_memory = self._forget_prepared  # type: ignore[method-assign]
        self.current_gradient_accumulation_steps = 1  # Trainer.train sets it; `losses` also works without
        self.trained = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
        self.beta = grpo.beta  # after super().__init__, which would add a copy of the adapter to the model
        self.starting_values = [p.detach().clone() for p in self.trained] if self.beta else []
        self.part_patients = 0  # of the part of `losses` that was yielded last
        # Whether one backward pass gives the gradients of all its patients apart; else every patient has its own.
        self.told_apart = set(self.trained) <= fused_parameters(lm.model)
        self._known: Tensor | None = None
        self._part: tuple[list[Asked], list[Completion]] = ([], [])
        self._uniform = torch.empty(0)
        self._found: Progress | None = None
        self.adam: torch.optim.AdamW | None = None

    def go_on(self, checkpoint: Checkpoint | None) -> int:
        """Keeps this round's progress, after going on from what is kept of it; how many steps were done before.

        Called once, before `train`: the round's starting values, which beta > 0 needs, are those of `__init__`.
        """
        if checkpoint is None:
            return 0
        self.add_callback(_Keeper(self, checkpoint))
        found = self._found = checkpoint.load()
        if found is None:
            return 0
        self._put(self.trained, found.values)
        if self.private is None:
            self.draws.rng.bit_generator.state = found.draws or {}
            self.sampler.set_state(torch.from_numpy(found.sampler.copy()))
            self.counts.restore(found.counts)
        self._step, self.draws.steps = found.steps, self.grpo.local_steps - found.steps
        self.args.max_steps = self.draws.steps
        return found.steps

    def progress(self) -> Progress:
        """This round after the steps done so far; between two steps only."""
        secret = self.private is not None
        assert self.adam is not None
        states = [self.adam.state[parameter] for parameter in self.trained]
        return Progress(
            steps=self._step,
            values=_joined(self.trained),
            first=_joined(state["exp_avg"] for state in states),
            second=_joined(state["exp_avg_sq"] for state in states),
            draws=None if secret else dict(self.draws.rng.bit_generator.state),
            sampler=np.zeros(0, np.uint8) if secret else self.sampler.get_state().numpy(),
            counts={} if secret else self.counts.to_dict(),
        )

    @torch.no_grad()
    def _put(self, tensors: Sequence[Tensor], vector: np.ndarray) -> None:
        parts = np.split(vector, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(torch.from_numpy(part.copy()).view(tensor.shape))

    def close(self) -> None:
        """Leaves the model as evaluation wants it and drops what refers to it."""
        self.lm.model.eval()
        for parameter in self.trained:
            parameter.grad = None
        self.optimizer = self.adam = self._known = self._found = None
        self.remove_callback(_Keeper)
        self._part, self.starting_values = ([], []), []

    def _forget_prepared(self, *objects: Any) -> list[None]:
        self.accelerator._schedulers, self.accelerator._optimizers = [], []
        self.accelerator._models, self.accelerator._dataloaders = [], []
        self.accelerator.step = 0
        return [None] * len(objects)

    def get_train_dataloader(self) -> Draws:  # type: ignore[override]
        return self.draws

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW without weight decay over what the strategy trains, fresh every round.

        Trainer's own sorts parameters into those that decay and those that do not: 40 ms for nothing here.
        """
        self.optimizer = adam = self.adam = torch.optim.AdamW(self.trained, lr=self.learning_rate, weight_decay=0.0)
        if self._found is not None:
            moments = [torch.zeros_like(parameter) for parameter in self.trained for _ in range(2)]
            self._put(moments[::2], self._found.first)
            self._put(moments[1::2], self._found.second)
            for parameter, first, second in zip(self.trained, moments[::2], moments[1::2], strict=True):
                step = torch.tensor(float(self._found.steps))  # as torch.optim has it: float32, on the CPU
                adam.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
            self._found = None
        if self.private is not None:
            self.optimizer = self.private_optimizer = PrivateOptimizer(self.optimizer, self.private)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Gradients of one step; the caller (Trainer) steps the optimizer.

        Gradients start at zero, not at None: with an empty draw, or without any reward variance, the optimizer's
        moments decay and its step count rises as always.
        """
        if not model.training:  # it goes through all modules: 8 ms in a step of 100 on a GPU
            model.train()
        for parameter in self.trained:
            parameter.grad = None if self.private else torch.zeros_like(parameter)
        total, before = torch.zeros((), device=self.lm.device), (self.counts.reward_sum, self.counts.completions)
        for loss in self.losses(inputs, one_by_one=self.private is not None and not self.told_apart):
            began = time.perf_counter()
            if self.private is None:
                self.accelerator.backward(loss)
            else:
                self.private_optimizer.absorb(self.patient_gradients(loss * self.draws.expected_patients))
            total += loss.detach()
            self.phase_seconds["loss"] += time.perf_counter() - began
        self.counts.add_draw(len(inputs))
        self._step += 1
        if self.on_step is not None:
            count = self.counts.completions - before[1]
            mean = (self.counts.reward_sum - before[0]) / count if count else float("nan")
            self.on_step(self._step, self.grpo.local_steps, mean)
        return total

    def patient_gradients(self, loss: Tensor) -> dict[Tensor, Tensor]:
        """Gradients of single patients, of the part of `losses` that was yielded last, by trained parameter.

        Args:
            loss: that part, times the constant that it was divided by: a sum of terms of single patients.

        Returns:
            Shape (patients of the part, *parameter's).
        """
        if self.told_apart:
            with patient_gradients(self.part_patients) as found:
                loss.backward()
            return found
        for parameter in self.trained:
            parameter.grad = None
        loss.backward()  # one patient
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        return {parameter: grad[None] for parameter, grad in zip(self.trained, grads, strict=True)}

    def losses(self, questions: Sequence[Question], *, one_by_one: bool = False) -> Iterator[Tensor]:
        """The step's loss in parts that are to be run backward one after another.

        Args:
            questions: of one draw.
            one_by_one: one patient's group a part (per-patient gradients), else as many as the speed settings allow.

        Yields:
            Scalars that add up to the step's loss. Groups whose gradient is zero are left out.
        """
        if not questions:
            return
        reasoning = self.reasoning_tokens > 0
        texts = [render(self.lm, self.template, question, reasoning) for question in questions]
        asked = [Asked(*one) for one in zip(questions, encode_texts(self.lm, texts), strict=True)]
        most = self.grpo.group_size * (self.reasoning_tokens + len(self.answering.forced_ids)) if reasoning else 0
        self.dearest = max(self.dearest, *(len(one.prompt) + most for one in asked))
        scale = StepScale(self.grpo.loss_type, self.draws.expected_patients, len(asked), len(asked))
        if reasoning:
            yield from self._sampled_losses(asked, one_by_one)
            return
        # One uniform number a completion, drawn for the whole step: parts do not change what is sampled.
        shape = len(asked), self.grpo.group_size
        self._uniform = torch.rand(shape, generator=self.sampler, dtype=torch.float64)
        uniform = self._uniform
        for part in parts_by_tokens([len(one.prompt) for one in asked], self.tokens_per_backward, one_by_one):
            self._uniform, mine, self.part_patients = uniform[part], [asked[index] for index in part], len(part)
            if self.grpo.expectation == "exact":
                yield self._exact_loss(mine) * (len(part) / scale.expected_patients)
            else:
                batch = self._generate_and_score_completions(mine)
                # A completion is one token here, so all loss types are the mean over completions.
                yield self.compute_loss(self.model, batch) * (len(part) / scale.expected_patients)

    def _sampled_losses(self, asked: list[Asked], one_by_one: bool) -> Iterator[Tensor]:
        group = self.grpo.group_size
        batch = self._generate_and_score_completions(asked)
        completions = self._part[1]
        tokens = [sum(sum(c.in_loss) for c in completions[i * group : (i + 1) * group]) for i in range(len(asked))]
        scale = StepScale(self.grpo.loss_type, self.draws.expected_patients, len(asked), sum(tokens))
        moving = batch["advantages"].view(-1, group).abs().amax(1) > 0
        live = [index for index in range(len(asked)) if self.beta or bool(moving[index])]
        longest = [max(len(c.ids) for c in completions[i * group : (i + 1) * group]) for i in live]
        costs = [len(asked[i].prompt) + group * width for i, width in zip(live, longest, strict=True)]
        for part in parts_by_tokens(costs, self.tokens_per_backward, one_by_one):
            began = time.perf_counter()
            chosen, self.part_patients = [live[index] for index in part], len(part)
            rows = [row for index in chosen for row in range(index * group, (index + 1) * group)]
            self._part = [asked[index] for index in chosen], [completions[row] for row in rows]
            width = max(longest[index] for index in part)
            loss = self.compute_loss(self.model, rows_of(batch, rows, width))
            weight = scale.weight(len(chosen), sum(tokens[index] for index in chosen))
            self.phase_seconds["loss"] += time.perf_counter() - began
            yield loss * weight

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Completions, rewards and advantages of one list of `Asked`; the rows of a group lie next to each other."""
        self._part = list(inputs), []
        rows = [{"prompt": "", "question": asked.question} for asked in inputs for _ in range(self.grpo.group_size)]
        beta, self.beta = self.beta, 0.0  # trl's own reference would be another adapter inside the model
        try:
            batch = super()._generate_and_score_completions(rows)
        finally:
            self.beta = beta
        if self.beta:
            with self._starting_values(), torch.no_grad():
                batch["ref_per_token_logps"] = self._log_probs_in_parts()
        self._count()
        return batch

    def _rollout(self, prompts: Any, trainer: Any) -> dict[str, Any]:
        """trl's rollout function; prompts and questions are in `_part`."""
        began = time.perf_counter()
        asked, group = self._part[0], self.grpo.group_size
        completions = self._complete(asked)
        self._part = asked, completions
        self.phase_seconds["rollout"] += time.perf_counter() - began
        return {
            "prompt_ids": [one.prompt for one in asked for _ in range(group)],
            "completion_ids": [completion.ids for completion in completions],
            "logprobs": None,
            "env_mask": [[int(own) for own in completion.in_loss] for completion in completions],
            "chosen": [completion.answer for completion in completions],
        }

    def _complete(self, asked: list[Asked]) -> list[Completion]:
        """G completions of every question; answer-only ones with their log-probabilities in `_known`."""
        if self.reasoning_tokens:
            self._known = None
            return self._rollouts(asked)
        log_probs = self._option_log_probs(asked)
        chosen = draw(log_probs.detach(), self._uniform)
        self._known = log_probs.gather(1, chosen).reshape(-1, 1)
        letters, completions = self.answering.letters.tolist(), []
        for option in chosen.flatten().tolist():
            completions.append(Completion(generated=1, answer=option, forced=True))
            completions[-1].add(letters[option], 0.0)
        return completions

    def _rollouts(self, asked: list[Asked]) -> list[Completion]:
        """Rollouts of the whole step in parts that fit in memory; a Poisson draw has no upper size.

        One uniform number a token, drawn for the whole step: parts do not change what is sampled.
        """
        group, tokens = self.grpo.group_size, self.reasoning_tokens
        shape = len(asked), group, tokens + 1
        uniform = torch.rand(shape, generator=self.sampler, dtype=torch.float64)
        result: list[list[Completion]] = [[] for _ in asked]
        costs = [len(one.prompt) + group * tokens for one in asked]
        for part in parts_by_tokens(costs, _ROLLOUT_SHARE * self.tokens_per_backward):
            mine = [asked[index] for index in part]
            completions = rollout(
                self.lm,
                self.answering,
                [one.prompt for one in mine],
                [one.n_options for one in mine],
                group_size=group,
                max_tokens=tokens,
                temperature=self.grpo.temperature,
                uniform=uniform[part].reshape(len(part) * group, -1),
                suppress=self.never_generated,
            )
            for place, index in enumerate(part):
                result[index] = completions[place * group : (place + 1) * group]
        return [completion for completions in result for completion in completions]

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, None]:
        """Log-probabilities of the rows in `_part`. Entropies (only trl's metrics want them) are not computed: zero."""
        log_probs = self._known if self._known is not None else self._log_probs_now()
        return log_probs, torch.zeros_like(log_probs), None

    def _log_probs_now(self) -> Tensor:
        """Log-probabilities of the completions in `_part` under the values that the model holds."""
        asked, completions = self._part
        if not self.reasoning_tokens:
            chosen = torch.tensor([completion.answer for completion in completions], device=self.lm.device)
            return self._option_log_probs(asked).gather(1, chosen.view(len(asked), -1)).reshape(-1, 1)
        prompts, n_options = [one.prompt for one in asked], [one.n_options for one in asked]
        return completion_log_probs(self.lm, self.answering, prompts, completions, n_options, self.grpo.temperature)

    def _log_probs_in_parts(self) -> Tensor:
        """`_log_probs_now` for a whole step, in parts that fit in memory; without gradients."""
        (asked, completions), group = self._part, self.grpo.group_size
        width = max(len(completion.ids) for completion in completions)
        result = torch.zeros(len(completions), width, device=self.lm.device)
        costs = [len(one.prompt) + group * width for one in asked]
        try:
            for part in parts_by_tokens(costs, _ROLLOUT_SHARE * self.tokens_per_backward):
                rows = [row for index in part for row in range(index * group, (index + 1) * group)]
                self._part = [asked[index] for index in part], [completions[row] for row in rows]
                log_probs = self._log_probs_now()
                result[rows, : log_probs.shape[1]] = log_probs
        finally:
            self._part = asked, completions
        return result

    def _option_log_probs(self, asked: list[Asked]) -> Tensor:
        """Answer-only: log-probabilities over the options, (n, most options); one forward pass."""
        prefix = SharedPrefix(self.lm, [one.prompt for one in asked], 1)
        n_options = torch.tensor([one.n_options for one in asked], device=self.lm.device)
        letters = self.answering.letters[: max(one.n_options for one in asked)]
        return option_log_softmax(prefix.base, prefix.last_hidden, letters, n_options, self.grpo.temperature)

    def _exact_loss(self, asked: list[Asked]) -> Tensor:
        truth = torch.tensor([one.question.answer for one in asked], device=self.lm.device)
        began = time.perf_counter()
        log_probs = self._option_log_probs(asked)
        right = log_probs.detach().gather(1, truth[:, None])[:, 0].exp().double().cpu().numpy()
        self.counts.add_probabilities(right)
        loss = exact_loss(log_probs, truth, self.grpo.scale_rewards, self.grpo.entropy_bonus).mean()
        self.phase_seconds["loss"] += time.perf_counter() - began
        return loss

    def _count(self) -> None:
        asked, completions = self._part
        rewards = [reward(c.answer, asked[row // self.grpo.group_size].question) for row, c in enumerate(completions)]
        self.counts.add_rewards(
            np.array(rewards).reshape(len(asked), self.grpo.group_size),
            boxed=sum(completion.boxed for completion in completions),
            tokens=sum(completion.generated for completion in completions),
        )

    @contextmanager
    def _starting_values(self) -> Iterator[None]:
        """Within it the model holds the round's starting values."""
        now = [parameter.data for parameter in self.trained]
        for parameter, value in zip(self.trained, self.starting_values, strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(self.trained, now, strict=True):
                parameter.data = value


class _Keeper(TrainerCallback):
    """Saves a round's progress after a step, when it is due; the last one's comes out as the result."""

    def __init__(self, engine: Engine, checkpoint: Checkpoint) -> None:
        self.engine, self.checkpoint = engine, checkpoint

    def on_step_end(self, args: Any, state: Any, control: Any, **_kwargs: Any) -> None:
        """After the optimizer's step."""
        if state.global_step < args.max_steps and self.checkpoint.due:
            self.checkpoint.save(self.engine.progress())


def _joined(tensors: Iterable[Tensor]) -> np.ndarray:
    """Tensors as one float32 vector."""
    return torch.cat([tensor.detach().to("cpu", torch.float32).flatten() for tensor in tensors]).numpy()


def _arguments(config: RunConfig, folder: str, seed: int, device: torch.device) -> GRPOConfig:
    """trl's settings; everything that couples patients beyond the loss type stays off."""
    grpo = config.grpo
    arguments = GRPOConfig(
        output_dir=folder,
        seed=seed % 2**32,
        use_cpu=device.type == "cpu",
        bf16=False,  # the model's own dtype; no autocast
        max_steps=grpo.local_steps,
        per_device_train_batch_size=grpo.group_size,
        num_generations=grpo.group_size,
        # The longest completion: reasoning and a letter.
        max_completion_length=config.questions.reasoning_tokens + 1,
        temperature=grpo.temperature,
        # trl's defaults, written out: the loss must not change with them.
        epsilon=0.2,
        importance_sampling_level="token",
        use_bias_correction_kl=True,
        loss_type=grpo.loss_type,
        scale_rewards=grpo.scale_rewards,
        beta=0.0,
        learning_rate=grpo.learning_rate,  # not read: `create_optimizer` has the round's own
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="adamw_torch",
        disable_dropout=True,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    arguments._n_gpu = 1  # the model is on one device; with more in sight transformers would wrap it in DataParallel
    return arguments
