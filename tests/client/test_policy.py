"""The hospital's own limits: what the coordinator demands × what the site says."""

import numpy as np
import pytest
from wardround.client import policy
from wardround.client.gate import WORK
from wardround.common.config import PolicyConfig, RunConfig
from wardround.common.dictionary import Dictionary
from wardround.common.errors import ConfigError, RefusedError
from wardround.common.messages import (
    INSTRUCTIONS,
    REPLIES,
    CountInstruction,
    EvaluateReply,
    Failure,
    KeysReply,
    MaskedReply,
    Reply,
    WarmupReply,
)
from wardround.simulations.synthetic_registry import make

PUBLIC = make(40, seed=1)[1]
PRIVATE = PUBLIC.model_copy(update={"public": False})
SIMULATED = PolicyConfig(simulated=True, share_samples=True)
REAL = PolicyConfig(require_privacy=False)  # a hospital's that does without differential privacy, by its own decision


def ask(config: RunConfig, round_index: int = 1) -> CountInstruction:
    return CountInstruction(
        run_id="0" * 32,
        config=config.to_json(),
        config_digest=config.digest(),
        round_index=round_index,
        model_digest="",
        attempt=1,
        dictionary_digest="",
    )


def run(secure: str = "bonawitz") -> RunConfig:
    federation = {"rounds": 5, "secure_aggregation": secure}
    return RunConfig.model_validate(
        {"name": "t", "privacy": {"enabled": False}, "federation": federation, "grpo": {"local_steps": 9}}
    )


def masked() -> MaskedReply:
    return MaskedReply(run_id="r", site="s", round_index=1, masked=np.zeros(4, np.uint32))


def evaluated(samples: str) -> EvaluateReply:
    return EvaluateReply(run_id="r", site="s", round_index=1, samples=samples, advert=np.zeros(1, np.uint8))


@pytest.mark.parametrize(
    ("site", "round_index", "said"),
    [
        (PolicyConfig(max_rounds=4), 1, "max_rounds: this hospital allows 4, the coordinator asks for 5"),
        (PolicyConfig(max_local_steps=8), 1, "max_local_steps: this hospital allows 8"),
        (PolicyConfig(), 6, "round 6: the run's config says rounds 0 to 5"),
        (PolicyConfig(), -1, "round -1"),
    ],
)
@pytest.mark.parametrize("dictionary", [PUBLIC, PRIVATE], ids=["public", "private"])
def test_a_demand_beyond_a_limit_is_refused(site: PolicyConfig, dictionary: Dictionary, round_index: int, said: str):
    with pytest.raises(RefusedError, match=said):
        policy.check_instruction(site, dictionary, run(), ask(run(), round_index))


@pytest.mark.parametrize("round_index", [0, 5])
@pytest.mark.parametrize("dictionary", [PUBLIC, PRIVATE], ids=["public", "private"])
def test_a_real_hospital_takes_part_in_secure_sums_up_to_its_limits(dictionary: Dictionary, round_index: int):
    site = REAL.model_copy(update={"max_rounds": 5, "max_local_steps": 9})
    policy.check_instruction(site, dictionary, run(), ask(run(), round_index))


@pytest.mark.parametrize(
    ("site", "dictionary"),
    [(PolicyConfig(), PUBLIC), (PolicyConfig(), PRIVATE), (PolicyConfig(simulated=True), PRIVATE)],
)
def test_sums_in_the_clear_are_for_simulated_sites_of_public_registries_only(
    site: PolicyConfig, dictionary: Dictionary
):
    config = run("none")
    with pytest.raises(RefusedError, match="adds updates and counts up in the clear: only a simulated site"):
        policy.check_instruction(site, dictionary, config, ask(config))
    policy.check_instruction(PolicyConfig(simulated=True), PUBLIC, config, ask(config))


def test_only_listed_base_models_are_allowed():
    policy.check_model(PolicyConfig(), "any")
    policy.check_model(PolicyConfig(allowed_models=("a", "b")), "b")
    with pytest.raises(RefusedError, match="allowed_models"):
        policy.check_model(PolicyConfig(allowed_models=("a",)), "b")


def test_targets_the_hospital_never_asks_are_left_out():
    assert policy.allowed_targets(PolicyConfig(targets_never_asked=("hiv",)), ("age", "hiv")) == ["age"]
    with pytest.raises(RefusedError, match="no target"):
        policy.allowed_targets(PolicyConfig(targets_never_asked=("hiv",)), ("hiv",))


def test_a_name_that_the_dictionary_does_not_have_is_not_taken_for_a_protection():
    site = PolicyConfig(simulated=True, max_rounds=5, max_local_steps=9, targets_never_asked=("age", "hivv"))
    with pytest.raises(ConfigError, match="targets_never_asked: dictionary 'synthetic' has no entry 'hivv'"):
        policy.check_instruction(site, PUBLIC, run(), ask(run()))


def test_runs_are_limited():
    policy.check_runs(PolicyConfig(max_runs=3), 3)
    with pytest.raises(RefusedError, match="max_runs: this hospital allows 3, the coordinator asks for 4"):
        policy.check_runs(PolicyConfig(max_runs=3), 4)


@pytest.mark.parametrize("dictionary", [PUBLIC, PRIVATE], ids=["public", "private"])
def test_a_masked_vector_leaves_every_site_and_the_ledger_says_what_can_be_read(dictionary: Dictionary):
    said = policy.check_egress(PolicyConfig(), dictionary, masked(), 100, 0)
    assert said == "a vector under masks: only the sum of a quorum can be read"


@pytest.mark.parametrize(
    ("site", "dictionary"),
    [
        (PolicyConfig(simulated=True), PUBLIC),
        (PolicyConfig(share_samples=True), PUBLIC),
        (SIMULATED, PRIVATE),
    ],
)
def test_samples_leave_only_where_everything_is_open(site: PolicyConfig, dictionary: Dictionary):
    policy.check_egress(SIMULATED, PUBLIC, evaluated('[{"text": "x"}]'), 100, 0)
    policy.check_egress(site, dictionary, evaluated("[]"), 100, 0)
    with pytest.raises(RefusedError, match="samples"):
        policy.check_egress(site, dictionary, evaluated('[{"text": "x"}]'), 100, 0)


def test_bytes_count_over_everything_that_left():
    site = PolicyConfig(simulated=True, max_upload_bytes=1000)
    policy.check_egress(site, PUBLIC, masked(), 400, 600)
    with pytest.raises(
        RefusedError, match="max_upload_bytes: this hospital allows 1000, the coordinator asks for 1001"
    ):
        policy.check_egress(site, PUBLIC, masked(), 401, 600)


def test_a_reply_that_is_not_on_the_list_does_not_leave():
    class Other(WarmupReply):
        pass

    other = Other(run_id="r", site="s", round_index=0, model_digest="", dictionary_digest="")
    with pytest.raises(RefusedError, match="Other is not among"):
        policy.check_egress(SIMULATED, PUBLIC, other, 1, 0)


def test_every_kind_of_reply_has_a_purpose_and_every_instruction_work():
    assert set(policy.PURPOSE) == set(REPLIES)
    assert set(WORK) == set(INSTRUCTIONS)
    assert all(issubclass(kind, Reply) for kind in policy.PURPOSE)
    # A person reads these in the ledger: what leaves under a key, a mask or an encryption says so.
    for kind in set(REPLIES) - {Failure}:
        assert any(word in policy.PURPOSE[kind] for word in ("confirm", "keys", "masks", "signature", "unmask"))


def test_keys_say_nothing_of_what_they_are_for():
    keys = KeysReply(run_id="r", site="s", round_index=1, advert=np.zeros(375, np.uint8))
    assert policy.check_egress(PolicyConfig(), PRIVATE, keys, 1, 0) == "public keys for a secure sum"
