"""The product replays tests/vectors/secure_sums/, which the reference wrote: same bytes, same refusals.

The reference (tests/secure_sums_reference.py) is a second implementation of docs/secure-sums.md; the two share nothing
but the specification. Must-fail vectors are refused by their word, twice, with the site's state as it was.
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wardround.common.errors import SumError
from wardround.common.fixedpoint import FixedPoint, Quantiser, rounding_key
from wardround.common.identity import Identity
from wardround.common.secagg import client_state
from wardround.common.secagg.client_state import SIGNED, Membership
from wardround.common.secagg.keys import Advert, Binding, Giving, KeyList
from wardround.common.secagg.prg import KeyStream
from wardround.common.secagg.server_state import Attempt

from .parties import Party, as_lists, refused

Json = dict[str, Any]
FOLDER = Path(__file__).parents[2] / "vectors" / "secure_sums"
VALID = sorted(path.stem for path in FOLDER.glob("*.json") if path.stem.startswith(("n", "tail")))
EXCHANGES = range(1, 6)


@cache
def read(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


def cases(*names: str) -> list[Any]:
    return [pytest.param(case, id=f"{name}: {case['name']}") for name in names for case in read(name)]


def raw(reply: str | list[str]) -> bytes:
    return bytes.fromhex(reply if isinstance(reply, str) else "".join(reply))


def binding_of(base: Json) -> Binding:
    about = {key: raw(value) if isinstance(value, str) else value for key, value in base["binding"].items()}
    names = {"d": "ring_values", "k": "tail_values", "range_r": "range_"}
    names |= {f"{name}_digest": name for name in ("roster", "config", "model", "input")}
    return Binding(**{names.get(key, key): value for key, value in about.items()})


def members_of(base: Json, number: int, policy: Json | None = None) -> Membership:
    own = base["sites"][str(number)]
    about = base["policy"] | own["policy"] | (policy or {})
    active, verified = (frozenset(map(bytes.fromhex, about[key])) for key in ("active", "verified"))
    return Membership(active, verified | {raw(own["id"])}, about["c"], about["min_sites"])


def no_random(size: int) -> bytes:
    raise AssertionError("the tape ended")


def tape_of(base: Json, number: int) -> Any:
    left = raw(base["sites"][str(number)]["random"])

    def random(size: int) -> bytes:
        nonlocal left
        taken, left = left[:size], left[size:]
        assert len(taken) == size, "the tape ended"
        return taken

    return random


def party_of(base: Json, number: int) -> Party:
    own = base["sites"][str(number)]
    payload = np.array(own["ring"], np.uint32), np.array(own["tail"], np.uint64)
    return Party(Identity.from_seed(raw(own["identity_key"])), members_of(base, number), *payload, no_random)


def named(base: Json, number: int, exchange: int) -> dict[int, str]:
    """What an integer stands for in an instruction's list."""
    if exchange == 2:
        return {int(i): advert for i, advert in base["exchange_1"]["replies"].items()}
    if exchange == 3:
        senders = [int(i) for i in base["exchange_2"]["replies"] if int(i) != number]
        return dict(zip(senders, base["exchange_3"]["ciphertexts"].get(str(number), []), strict=False))
    return {int(i): signature for i, signature in base["exchange_4"]["replies"].items()}


def ask(site: Party, base: Json, number: int, exchange: int, said: Json | None = None) -> bytes:
    """The site's reply to an instruction; None: the base's own."""
    if said is None:
        said = {} if exchange == 1 else base[f"exchange_{exchange}"].get("instruction", base[f"exchange_{exchange}"])
        if exchange == 3:
            said = {"recipients": said["recipients"], "ciphertexts": said["ciphertexts"][str(number)]}

    def joined(items: list[int | str]) -> bytes:
        known = named(base, number, exchange)
        return raw([known[item] if isinstance(item, int) else item for item in items])

    if exchange == 1:
        return site.keys(binding_of(base))
    if exchange == 2:
        return site.shares(said["t"], joined(said["key_list"]))
    if exchange == 3:
        return site.masked(raw(said["recipients"]), joined(said["ciphertexts"])).tobytes()
    if exchange == 4:
        return site.consistency(raw(said["survivors"]))
    return site.unmask(raw(said["signers"]), joined(said["signatures"]))


def replay(site: Party, base: Json, number: int, answered: int, *, restart: bool = False) -> None:
    """Exchanges 1 to `answered`, every one asked twice, each reply compared."""
    site.members, site.random = members_of(base, number), tape_of(base, number)
    for exchange in range(1, answered + 1):
        for _ in range(2):
            reply = ask(site, base, number, exchange)
            assert reply == raw(base[f"exchange_{exchange}"]["replies"][str(number)])
            if restart:
                site.restart()


# ---- Valid attempts


@pytest.mark.parametrize("name", VALID)
@pytest.mark.parametrize("restart", [False, True], ids=["", "restarted after every message"])
def test_every_site_gives_the_bytes_of_the_vector_at_every_exchange(name: str, restart: bool):
    base = read(name)
    for number in map(int, base["sites"]):
        answers = [str(number) in base[f"exchange_{exchange}"]["replies"] for exchange in EXCHANGES]
        site = party_of(base, number)
        replay(site, base, number, answers.index(False) if False in answers else 5, restart=restart)
        if site.state.stage >= client_state.SHARES:
            with pytest.raises(AssertionError, match="the tape ended"):
                site.random(1)  # all of it was used


@pytest.mark.parametrize("name", VALID)
def test_digests_and_keys_in_between_are_the_vectors(name: str):
    base, binding = read(name), binding_of(read(name))
    assert binding.to_bytes() == raw(base["binding_bytes"])
    assert Binding.from_bytes(raw(base["binding_bytes"])) == binding
    keys = KeyList.from_bytes(base["parameters"]["t"], raw(base["exchange_2"]["instruction"]["key_list"]))
    assert keys.digest.hex() == base["exchange_2"]["list_digest"]
    for number, own in base["sites"].items():
        me, site = int(number) - 1, party_of(base, int(number))
        if str(number) not in base["exchange_2"]["replies"]:
            continue
        assert client_state.self_key(keys, raw(own["self_seed"]), me).hex() == own["self_key"]
        for other, key in own["pair_keys_with"].items():
            assert client_state.pair_key(keys, raw(own["mask_key"]), me, int(other) - 1).hex() == key
        replay(site, base, int(number), 1)
        assert site.content() == own["content_digest"]
        assert site.members.min_survivors == own["min_survivors"]


def coordinator_of(base: Json, until: int) -> Attempt:
    """The product's coordinator after taking all replies of exchanges 1 to `until`; what it relays is compared."""
    attempt, ids = Attempt(binding_of(base)), {number: raw(own["id"]) for number, own in base["sites"].items()}
    replies = [base[f"exchange_{exchange}"]["replies"] for exchange in EXCHANGES]
    for number, advert in reversed(replies[0].items()):  # in any order
        attempt.add_advert(ids[number], raw(advert))
    keys = attempt.close_keys(base["parameters"]["t"])
    assert keys.to_bytes() == raw(base["exchange_2"]["instruction"]["key_list"])
    for number, ciphertexts in reversed(replies[1].items()):
        attempt.add_shares(ids[number], raw(ciphertexts))
    assert attempt.close_shares() == raw(base["exchange_3"]["recipients"])
    for number, ciphertexts in base["exchange_3"]["ciphertexts"].items():
        assert attempt.ciphertexts_for(ids[number]) == raw(ciphertexts)
    if until < 3:
        return attempt
    for number, masked in reversed(replies[2].items()):
        attempt.add_masked(ids[number], np.frombuffer(raw(masked), np.uint32))
    assert attempt.close_sum() == raw(base["exchange_4"]["survivors"])
    attempt = Attempt.from_record(*attempt.to_record())  # killed, and started again
    for number, signature in reversed(replies[3].items()):
        attempt.add_signature(ids[number], raw(signature))
    said = base["exchange_5"]["instruction"]
    assert attempt.close_signatures() == (raw(said["signers"]), raw(said["signatures"]))
    if until == 5:
        for number, answer in reversed(replies[4].items()):
            attempt.add_answer(ids[number], raw(answer))
    return attempt


@pytest.mark.parametrize("name", VALID)
def test_the_coordinator_relays_and_finds_what_the_vector_says(name: str):
    base = read(name)
    attempt = coordinator_of(base, 5)
    assert as_lists(attempt.unmask()) == (base["sum"]["ring"], base["sum"]["tail"])
    assert attempt.misfits == ()


@pytest.mark.parametrize(
    ("first", "second", "answered"), [("n4_t3_again", "n6_t5_again_run", 3), ("n4_t3_again", "n4_t3_again_run", 5)]
)
def test_a_payload_is_given_again_where_that_shows_nothing_new(first: str, second: str, answered: int):
    site = party_of(read(first), 1)
    replay(site, read(first), 1, answered)
    replay(site, read(second), 1, answered)


# ---- Must-fail


@pytest.mark.parametrize("case", cases("fail_keys", "fail_shares", "fail_masked", "fail_consistency", "fail_unmask"))
def test_every_must_fail_vector_is_refused_by_its_word_and_changes_nothing(case: Json):
    base, number, memory = read(case["base"]), case["site"], case.get("memory", {})
    site, binding = party_of(base, number), binding_of(base)
    if "earlier" in case:
        replay(site, read(case["earlier"]["base"]), number, case["earlier"]["answered"])
    if "attempt" in memory:  # answered, about something else: the identical instruction would get identical bytes
        site.random = tape_of(base, number)
        site.keys(replace(binding, attempt=memory["attempt"], input=bytes(32)))
    if memory.get("signed"):
        assert site.now is not None
        site.sums[site.now] = replace(site.state, stage=SIGNED)
    replay(site, base, number, case["answered"])
    for giving in memory.get("given", []):
        ids, survivors = ([raw(one) for one in giving[key]] for key in ("ids", "survivors"))
        site.given[site.content()] = [Giving(giving["t"], frozenset(ids), tuple(survivors))]
    for earlier in case.get("before", []):
        ask(site, base, number, earlier["exchange"], earlier["instruction"])
    site.members = members_of(base, number, case.get("policy"))
    if site.now is None:  # nothing was asked before: the sum is this one
        site.now = (binding.run_id, binding.round_index, binding.purpose)
    refused(case["failure"], site, lambda: ask(site, base, number, case["exchange"], case["instruction"]))


def of_an_advert(case: Json) -> bool:
    """Whether a refused key list has an advert that is refused by itself."""
    there = any(isinstance(item, str) for item in case["instruction"]["key_list"])
    return (
        there and case["failure"].startswith(("malformed", "signature", "other")) and "more members" not in case["name"]
    )


@pytest.mark.parametrize("case", [case for case in cases("fail_shares") if of_an_advert(case.values[0])])
def test_the_coordinator_refuses_an_advert_by_the_same_word(case: Json):
    """A coordinator that relayed what sites must refuse would lose the attempt."""
    attempt, codes = Attempt(binding_of(read(case["base"]))), set()
    for item in case["instruction"]["key_list"]:
        if isinstance(item, str):
            with pytest.raises(SumError) as caught:
                attempt.add_advert(raw(item)[183:215], raw(item))
            codes.add(caught.value.code)
    assert attempt.adverts == {}
    assert codes == {case["failure"]} or codes == {"other-model", "other-config"}


@pytest.mark.parametrize("case", cases("fail_coordinator"))
def test_the_coordinator_refuses_a_vector_of_another_length(case: Json):
    base, reply = read(case["base"]), raw(case["reply"])
    attempt = coordinator_of(base, 2)
    site = raw(base["sites"][str(case["site"])]["id"])
    vector = np.frombuffer(reply, np.uint8 if len(reply) % 4 else np.uint32)
    with pytest.raises(SumError) as caught:
        attempt.add_masked(site, vector)
    assert caught.value.code == case["failure"]
    with pytest.raises(SumError, match="threshold"):
        attempt.unmask()


@pytest.mark.parametrize("case", cases("recovery"))
def test_lying_answers_are_corrected_or_nothing_is_released(case: Json):
    base = read(case["base"])
    attempt, ids = coordinator_of(base, 4), {number: raw(own["id"]) for number, own in base["sites"].items()}
    for number, answer in (base["exchange_5"]["replies"] | case["answers_instead"]).items():
        if answer is None:
            continue
        try:
            attempt.add_answer(ids[number], raw(answer))
        except SumError as error:  # of a wrong length: none
            assert error.code == "malformed" and "truncated" in case["name"]
    if "failure" in case:
        with pytest.raises(SumError) as caught:
            attempt.unmask()
        assert caught.value.code == case["failure"] and attempt.misfits == ()
    else:
        assert as_lists(attempt.unmask()) == (base["sum"]["ring"], base["sum"]["tail"])
        wrong = [(ids[str(dealer)], ids[str(holder)]) for dealer, holder in case["wrong"]]
        assert sorted(attempt.misfits) == sorted(wrong)


# ---- Fixed point


class Drawn:
    """The rounding stream of a vector."""

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def fill(self, out: Any) -> None:
        out[:] = self.values


@pytest.mark.parametrize("case", read("fixed_point"), ids=lambda case: case["about"])
def test_fixed_point_vectors(case: Json):
    fixed_point = FixedPoint(case["range"], case["max_sites"], float(case["W"]))
    quantiser = Quantiser(fixed_point, float(case["w"]), bytes(32))
    quantiser._rounding = Drawn(case["rounding"])  # pyright: ignore[reportAttributeAccessIssue]
    values = np.array(case["x"], np.float32)
    if "seed 7" in case["about"]:
        drawn = np.empty(len(values), "<u4")
        KeyStream(rounding_key(7, "north", 3)).fill(drawn)
        assert drawn.tolist() == case["rounding"]
    assert quantiser.apply(values) == case["clipped"]
    assert values.view(np.uint32).tolist() == case["ring"]
    alone = fixed_point.mean(values.view(np.uint32).copy(), float(case["W"]))
    assert np.allclose(alone, case["alone"], rtol=1e-12, atol=0)


def test_an_advert_of_another_layout_is_no_advert():
    """The layout before min_survivors was 373 bytes."""
    advert = raw(read("n3_t3")["exchange_1"]["replies"]["1"])
    assert Advert.BYTES == len(advert) == 375
    with pytest.raises(SumError, match="malformed"):
        Advert.from_bytes(advert[:181] + advert[183:])
