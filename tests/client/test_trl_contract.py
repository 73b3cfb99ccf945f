"""What client/grpo.py relies on in trl, transformers and accelerate is what was read when it was written.

A failure here does not say that anything is wrong: it says what to read again, in the new version, before the digest
below is replaced. `python -m tests.client.test_trl_contract` prints the present digests.
"""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import trl
from accelerate import Accelerator
from transformers import Trainer
from trl import GRPOTrainer
from trl.trainer import utils

# Member → digest of its source, and what of it client/grpo.py depends on.
READ_IN_TRL_1_16: dict[Callable[..., Any], tuple[str, str]] = {
    GRPOTrainer.get_train_dataloader: (
        "2bffe5a57c539e17",
        "overridden: the train loop only iterates it and takes its length",
    ),
    GRPOTrainer.training_step: (
        "9e18632f7dd8e8d8",
        "overridden: generation, loss and backward all happen inside it; counts _step",
    ),
    GRPOTrainer._prepare_inputs: (
        "f824e7fb07147956",
        "bypassed by training_step: shuffles completions across patients",
    ),
    GRPOTrainer._generate_and_score_completions: (
        "1fa48922792dcd5c",
        "extended: keys of the batch; rewards, advantages, beta, ref",
    ),
    GRPOTrainer._generate: (
        "2a27fdf8f5e6f356",
        "calls rollout_func; env_mask becomes tool_mask; other keys go to the rewards",
    ),
    GRPOTrainer._calculate_rewards: (
        "736ae29b083840b5",
        "calls trl_reward with the rows' columns as keyword arguments",
    ),
    GRPOTrainer._get_per_token_logps_and_entropies: (
        "ea73c3909275851d",
        "overridden: its arguments and the three values it returns",
    ),
    GRPOTrainer._compute_loss: (
        "80295546bbdbf6f7",
        "runs unchanged: masks, normalisers that StepScale builds on, the KL term",
    ),
    GRPOTrainer.compute_loss: ("a2d6ef8bd29c3e26", "runs unchanged"),
    GRPOTrainer.__init__: ("18f01b7a46c9544b", "beta = 0 adds no reference adapter; replaces model.forward once"),
    utils.add_fused_lm_head: ("422d009f04b66659", "sets `forward` on the model instance, which Engine takes off again"),
    utils.nanstd: ("081b874388d813a0", "Bessel's correction: exact mode uses its limit"),
    Trainer.create_optimizer: ("c798977d9dca3601", "overridden: sets self.optimizer and returns it"),
    Trainer._run_epoch: ("31aff00f34c302a2", "one training_step a step, then optimizer.step, whatever the batch holds"),
    Trainer._inner_training_loop: ("20ec4276e99fe7ae", "calls accelerator.free_memory, which Engine replaces"),
    Accelerator.free_memory: ("f61b2373c6b0dff1", "replaced: resets the same attributes, without collecting garbage"),
}


def digest(member: Callable[..., Any]) -> str:
    return hashlib.sha256(inspect.getsource(inspect.unwrap(member)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("member", READ_IN_TRL_1_16, ids=lambda member: member.__qualname__)
def test_what_the_engine_builds_on_has_not_changed(member):
    expected, reliance = READ_IN_TRL_1_16[member]
    assert digest(member) == expected, (
        f"{member.__module__}.{member.__qualname__} differs from the one read in trl 1.16.0 (installed: "
        f"{trl.__version__}). Read it again, and client/grpo.py, which relies on it: {reliance}. When both agree, run "
        "the parity tests in tests/client/test_grpo.py and put the new digest here."
    )


def test_trl_is_the_minor_version_that_was_read():
    assert trl.__version__.startswith("1.16."), f"client/grpo.py was written against trl 1.16, got {trl.__version__}"


if __name__ == "__main__":
    for listed in READ_IN_TRL_1_16:
        print(digest(listed), listed.__qualname__)
