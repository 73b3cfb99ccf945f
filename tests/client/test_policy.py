"""The hospital's own limits: what the coordinator demands × what the site says."""

import re
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from wardround.client import policy
from wardround.client.gate import WORK
from wardround.client.ledger import Spend
from wardround.common.config import PolicyConfig, PrivacyConfig, RunConfig, parse
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
from wardround.common.privacy import Event, Filter, pin_order
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


# ---- the privacy budget

PLAN = (Event("schema", 4.0, 1.0, 1), *[Event("rounds", 1.5, 1.0, 4)] * 5, Event("metrics", 4.0, 1.0, 1))
ASKED = PrivacyConfig(enabled=True, epsilon=200.0, delta=1e-5, max_grad_norm=1.0, declared_patients=1000)
THIS, OTHER = "ab" * 16, "cd" * 16


def spend_all(site: PolicyConfig, run_id: str, history: list[Spend]) -> int:
    """Spends a plan as a site does, and says how many of its events the budget affords before one is refused."""
    for index, event in enumerate(PLAN):
        try:
            orders = policy.check_spend(site, history, event, run_id=run_id, plan=PLAN, privacy=ASKED)
        except RefusedError:
            return index
        history.append(Spend(run_id, index, event.to_json(), orders, len(history) + 1))
    return len(PLAN)


def affordable(epsilon: float, order: float, before: tuple[Event, ...] = ()) -> int:
    """The same by the filter itself."""
    budget = Filter(epsilon, 1e-5, order)
    return next((n for n in range(len(PLAN)) if not budget.affords((*before, *PLAN[:n]), PLAN[n])), len(PLAN))


@pytest.mark.parametrize("epsilon", [0.5, 5.0, 8.0, 11.0, 100.0])
def test_a_budget_over_all_runs_is_that_of_the_filter_at_the_order_that_was_fixed_first(epsilon: float):
    site = PolicyConfig(epsilon=epsilon, delta=1e-5)
    history: list[Spend] = []
    first = spend_all(site, THIS, history)
    order = pin_order(PLAN, epsilon, 1e-5)
    assert first == affordable(epsilon, order)
    assert [one.orders.get("total") for one in history] == [order, *[None] * (len(history) - 1)][: len(history)]
    assert spend_all(site, OTHER, history) == affordable(epsilon, order, PLAN[:first])
    assert 0 < affordable(8.0, pin_order(PLAN, 8.0, 1e-5)) < len(PLAN)  # the table has a budget for a part of a run


def test_a_budget_for_one_run_begins_again_with_the_next_and_the_total_does_not():
    limits = {"epsilon": 14.0, "epsilon_per_run": 11.0, "delta": 1e-5}
    history: list[Spend] = []
    one = spend_all(PolicyConfig(**limits), THIS, history)
    assert one == affordable(11.0, pin_order(PLAN, 11.0, 1e-5)) < len(PLAN)
    two = spend_all(PolicyConfig(**limits), OTHER, history)
    assert 0 < two == affordable(14.0, pin_order(PLAN, 14.0, 1e-5), PLAN[:one]) < one
    assert [known.run for known in history if "run" in known.orders] == [THIS, OTHER]


def test_without_a_budget_everything_is_afforded_and_the_orders_are_fixed_all_the_same():
    history: list[Spend] = []
    assert spend_all(PolicyConfig(simulated=True), THIS, history) == len(PLAN)
    assert history[0].orders == dict.fromkeys(("total", "run", "plan"), pin_order(PLAN, 200.0, 1e-5))
    # A budget that is set later counts what was spent before it.
    assert spend_all(PolicyConfig(epsilon=9.0, delta=1e-5), OTHER, history) < len(PLAN)


def test_a_run_that_asks_for_more_than_its_own_epsilon_is_refused_without_any_policy():
    """Counts for a second round, or more noise-free rounds than were planned."""
    least = next(e / 100 for e in range(100, 5000) if affordable(e / 100, pin_order(PLAN, e / 100, 1e-5)) == len(PLAN))
    asked, history = ASKED.model_copy(update={"epsilon": least}), []
    about = {"run_id": THIS, "plan": PLAN, "privacy": asked}
    for index, event in enumerate(PLAN):
        orders = policy.check_spend(PolicyConfig(), history, event, **about)
        history.append(Spend(THIS, index, event.to_json(), orders, len(history) + 1))
    with pytest.raises(RefusedError, match=rf"privacy\.epsilon: the run says {least:g} at delta = 1e-05; spent"):
        policy.check_spend(PolicyConfig(), history, PLAN[1], **about)
    other = {**about, "run_id": OTHER}
    policy.check_spend(PolicyConfig(), history, PLAN[1], **other)  # another run has an ε of its own


def test_the_noise_that_follows_from_epsilon_is_looked_at_when_it_is_spent():
    site = PolicyConfig(epsilon=50.0, delta=1e-5, min_noise_multiplier=1.6)
    about = {"run_id": THIS, "plan": PLAN, "privacy": ASKED}
    policy.check_spend(site, [], PLAN[0], **about)
    with pytest.raises(RefusedError, match=r"allows 1\.6 or more, the coordinator asks for rounds: σ = 1\.5"):
        policy.check_spend(site, [], PLAN[1], **about)


def test_a_refusal_says_the_budget_what_is_spent_and_what_was_asked():
    history = [Spend(THIS, 1, Event("rounds", 1.5, 1.0, 4).to_json(), {"total": 8.0}, 1)]
    with pytest.raises(
        RefusedError, match=r"policy\.epsilon: this hospital allows 6 at delta = 1e-05; spent [\d.]+, and"
    ):
        policy.check_spend(
            PolicyConfig(epsilon=6.0, delta=1e-5), history, PLAN[1], run_id=THIS, plan=PLAN, privacy=ASKED
        )
    with pytest.raises(
        RefusedError, match=r"policy\.epsilon: epsilon = 0\.0001 .* too small for any part of such a plan"
    ):
        policy.check_spend(PolicyConfig(epsilon=0.0001, delta=1e-5), [], PLAN[1], run_id=THIS, plan=PLAN, privacy=ASKED)


# ---- limits that contradict each other


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"epsilon": 1.0}, "epsilon without delta: a budget is both"),
        ({"delta": 1e-5}, "delta without epsilon: a budget is both"),
        ({"epsilon_per_run": 1.0}, "epsilon_per_run without epsilon"),
        ({"epsilon": 1.0, "delta": 1e-5, "epsilon_per_run": 2.0}, "epsilon_per_run = 2.0: more than epsilon = 1.0"),
        ({"epsilon": 0.0, "delta": 1e-5}, "'epsilon': Input should be greater than 0"),
        ({"epsilon": -1.0, "delta": 1e-5}, "'epsilon'"),
        ({"epsilon": 1.0, "delta": 1.0}, "'delta'"),
        ({"max_grad_norm": 0.0}, "'max_grad_norm'"),
        ({"min_noise_multiplier": 0}, "'min_noise_multiplier'"),
        ({"tasks": ["read"]}, "'tasks.0'"),
        ({"hours": "20-06"}, "hours = '20-06': expected begin and end, as '20:00-06:00'"),
        ({"hours": "24:00-06:00"}, "expected begin and end"),
        ({"hours": "06:00-06:00"}, "begin and end are the same"),
        ({"max_bytes_per_run": 0}, "'max_bytes_per_run'"),
        ({"min_level_patients": 0}, "'min_level_patients'"),
        ({"epsilonn": 1.0}, "unknown key 'epsilonn'"),
    ],
)
def test_a_policy_that_cannot_be_meant_stops_the_site_with_its_line(limits: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse(PolicyConfig, limits, "site.toml")


def test_hours_may_pass_midnight_and_end_before_their_end():
    site = PolicyConfig(hours="22:30-05:00")
    for clock, allowed in (("22:29", False), ("22:30", True), ("00:00", True), ("04:59", True), ("05:00", False)):
        now = datetime.fromisoformat(f"2026-03-01T{clock}:59")
        if allowed:
            policy.check_hours(site, now)
        else:
            with pytest.raises(RefusedError, match=f"policy.hours: .* asks at {clock}"):
                policy.check_hours(site, now)
    policy.check_hours(PolicyConfig(), datetime.fromisoformat("2026-03-01T12:00"))
