"""What a site gives to a sum: kept bit for bit, masked once, never without its masks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from wardround.client import payload, update
from wardround.client.payload import Payload
from wardround.common import sums
from wardround.common.config import NO_PRIVACY, RunConfig
from wardround.common.errors import ConfigError, ProtocolError, VerificationError
from wardround.common.fixedpoint import rounding_key
from wardround.common.messages import Failure, MaskedReply
from wardround.common.secagg.client_state import MaskKeys
from wardround.common.secagg.keys import COUNTS, TEST, UPDATE, VALIDATION

from .sum_case import MODEL, NAMES, ROUND, SCHEMA, VALUES, Coordinator, config, run_folder, write_three

pytestmark = pytest.mark.usefixtures("cheap_scrypt")

INPUTS = sums.input_digest(SCHEMA)
KEYS = MaskKeys((b"\x01" * 32, b"\x02" * 32), (b"\x03" * 32,))
CONFIG = config(weighting="patients", max_weight=400)


def counts(ring: list[int] | None = None, tail: list[int] | None = None) -> Payload:
    return Payload(MODEL, INPUTS, np.array(ring or [], np.uint32), np.array(tail or [], np.int64))


def trained(delta: np.ndarray, weight: int = 300) -> Payload:
    return Payload(MODEL, INPUTS, delta, np.array([weight, 0, 7, 8, 9], np.int64))


def stream(key: bytes, ring: int, tail: int) -> tuple[np.ndarray, np.ndarray]:
    """secure-sums.md §S7: AES-256-CTR from an all-zero counter block, first the ring's bytes, then the tail's."""
    data = Cipher(AES256(key), CTR(bytes(16))).encryptor().update(bytes(4 * ring + 8 * tail))
    return np.frombuffer(data[: 4 * ring], "<u4"), np.frombuffer(data[4 * ring :], "<u8")


def unmasked(masked: np.ndarray, ring: int, tail: int, keys: MaskKeys = KEYS) -> tuple[list[int], list[int]]:
    """What the sum of all sites would hold of this one, had it no other."""
    left, right = masked[:ring].copy(), masked[ring:].astype("<u4").view("<u8").copy()
    for key in keys.plus:
        left -= stream(key, ring, tail)[0]
        right -= stream(key, ring, tail)[1]
    for key in keys.minus:
        left += stream(key, ring, tail)[0]
        right += stream(key, ring, tail)[1]
    return left.tolist(), right.tolist()


@given(
    ring=hnp.arrays(np.uint32, st.integers(0, 9)),
    tail=hnp.arrays(np.int64, st.integers(0, 5), elements=st.integers(0, 2**40)),
)
def test_integers_come_out_under_the_masks_the_tail_in_halves(ring: np.ndarray, tail: np.ndarray):
    out = Payload(MODEL, INPUTS, ring, tail).masked(CONFIG, "s", 0, KEYS)
    assert out.dtype == np.uint32 and out.shape == (len(ring) + 2 * len(tail),)
    assert unmasked(out, len(ring), len(tail)) == (ring.tolist(), tail.tolist())


@given(
    delta=hnp.arrays(np.float32, st.integers(1, 9), elements=st.floats(-3, 3, width=32)),
    weight=st.integers(1, 400),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_update_comes_out_quantised_under_the_masks(delta: np.ndarray, weight: int, seed: int):
    run = RunConfig.model_validate({**CONFIG.model_dump(), "seed": seed})
    before, given_ = delta.copy(), trained(delta, weight)
    ring, tail = unmasked(given_.masked(run, "north", 4, KEYS), len(delta), 5)
    wanted, clipped = sums.fixed_point(run).quantise(delta.copy(), weight, rounding_key(seed, "north", 4))
    assert ring == wanted.tolist()
    assert tail == [weight, clipped, 7, 8, 9]
    assert clipped == np.count_nonzero(np.abs(before) > 1.0)
    assert delta.tobytes() == before.tobytes() and given_.tail[sums.CLIPPED] == 0  # the stored one stays as it is


def test_the_same_payload_and_keys_give_the_same_bytes_and_another_site_round_or_seed_rounds_otherwise():
    delta = np.linspace(-1, 1, 999, dtype=np.float32)
    first = trained(delta).masked(CONFIG, "north", 1, KEYS)
    assert first.tobytes() == trained(delta).masked(CONFIG, "north", 1, KEYS).tobytes()
    seeded = RunConfig.model_validate({**CONFIG.model_dump(), "seed": 1})
    for run, site, index in ((CONFIG, "south", 1), (CONFIG, "north", 2), (seeded, "north", 1)):
        steps = (trained(delta).masked(run, site, index, KEYS) - first).view(np.int32)
        assert set(steps.tolist()) == {-1, 0, 1}


@pytest.mark.parametrize("given_", [counts([1, 2], [3]), trained(np.ones(3, np.float32))], ids=["counts", "update"])
def test_nothing_leaves_without_a_self_mask(given_: Payload):
    with pytest.raises(ValueError, match="expected at least the self key"):
        given_.masked(CONFIG, "s", 0, MaskKeys((), KEYS.minus))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_no_number_is_refused(bad: float):
    with pytest.raises(VerificationError, match="NaN or infinity"):
        trained(np.array([0, bad], np.float32)).masked(CONFIG, "s", 0, KEYS)


@pytest.mark.parametrize("weight", [0, 401])
def test_a_weight_out_of_range_is_refused(weight: int):
    with pytest.raises(ConfigError, match="weight of a site: expected 1 to 400"):
        trained(np.ones(2, np.float32), weight).masked(CONFIG, "s", 0, KEYS)


@pytest.mark.parametrize("value", [-1, 2**40 + 1])
def test_a_tail_value_out_of_range_is_refused(value: int):
    for given_ in (counts([1], [value]), replace(trained(np.ones(2, np.float32)), tail=np.array([1, 0, value]))):
        with pytest.raises(VerificationError, match=r"at most 2\^40"):
            given_.masked(CONFIG, "s", 0, KEYS)


def test_a_stored_payload_comes_back_bit_for_bit_and_for_its_owner_alone(tmp_path: Path):
    given_ = counts([1, 2**32 - 1], [5, 2**40])
    for purpose in (COUNTS, VALIDATION, TEST):
        payload.store(tmp_path, 2, purpose, given_)
        again = payload.require(tmp_path, 2, purpose)
        assert (again.model_digest, again.inputs) == (MODEL, INPUTS)
        assert (again.ring.dtype, again.ring.tolist()) == (np.uint32, [1, 2**32 - 1])
        assert (again.tail.dtype, again.tail.tolist()) == (np.int64, [5, 2**40])
        assert again.content_digest(purpose) == given_.content_digest(purpose)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "counts-00002.record", "test-00002.record", "validation-00002.record",
    ]  # fmt: skip
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_the_payload_of_a_round_is_its_stored_update(tmp_path: Path):
    delta, tail = np.array([0.5, -2], np.float32), np.array([3, 0, 1], np.int64)
    update.store(tmp_path, 1, update.StoredUpdate("in", MODEL, INPUTS.hex(), delta, tail))
    given_ = payload.require(tmp_path, 1, UPDATE)
    assert (given_.model_digest, given_.inputs) == (MODEL, INPUTS)
    assert given_.ring.tobytes() == delta.tobytes() and given_.tail.tolist() == [3, 0, 1]
    assert payload.path_of(tmp_path, 1, UPDATE) == update.path_of(tmp_path, 1)


@pytest.mark.parametrize(("purpose", "word"), [(COUNTS, "counts"), (UPDATE, "update"), (TEST, "test")])
def test_a_site_that_did_not_do_the_work_has_nothing_to_add(tmp_path: Path, purpose: int, word: str):
    assert payload.load(tmp_path, 1, purpose) is None
    with pytest.raises(ProtocolError, match=f"nothing to add to the sum of {word} in round 1"):
        payload.require(tmp_path, 1, purpose)


def test_a_damaged_payload_is_refused(tmp_path: Path):
    payload.store(tmp_path, 0, COUNTS, counts([1], [2]))
    path = payload.path_of(tmp_path, 0, COUNTS)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationError, match="damaged"):
        payload.load(tmp_path, 0, COUNTS)


def test_what_a_site_remembers_of_a_payload_covers_every_value():
    given_ = counts([1, 2], [3, 4])
    others = [counts([1, 3], [3, 4]), counts([1, 2], [3, 5]), replace(given_, inputs=bytes(32))]
    digests = {one.content_digest(VALIDATION) for one in (given_, *others, replace(given_, model_digest="cd" * 32))}
    assert len(digests) == 5 and given_.content_digest(TEST) not in digests
    # Before quantising and masks: another range or weight limit makes it no other payload.
    assert trained(np.ones(2, np.float32)).content_digest(UPDATE) == trained(np.ones(2, np.float32)).content_digest(
        UPDATE
    )


def placed(folder: Path, purpose: int, run: RunConfig) -> tuple[Coordinator, dict[str, Payload]]:
    """Three sites whose work is done, and the coordinator."""
    coordinator = Coordinator(write_three(folder, run), run, purpose)
    rng, payloads = np.random.default_rng(1), {}
    for number, name in enumerate(NAMES, start=1):
        tail = np.zeros(sums.update_tail(run) if purpose == UPDATE else 2, np.int64)
        tail[[0, -1]] = [1 if purpose == UPDATE else 10 * number, number]
        payloads[name] = coordinator.place(name, rng.normal(0, 0.5, VALUES).astype(np.float32), tail)
    return coordinator, payloads


@pytest.mark.parametrize("purpose", [UPDATE, VALIDATION])
def test_three_sites_add_up_exactly(tmp_path: Path, purpose: int):
    run = config()
    coordinator, payloads = placed(tmp_path, purpose, run)
    assert len(list(coordinator.masked())) == 3
    ring, tail = coordinator.finish()
    wanted_ring, wanted_tail = np.zeros(len(ring), np.uint32), np.zeros(len(tail), np.int64)
    for name, given_ in payloads.items():
        values, clipped = given_.ring.copy(), 0
        if purpose == UPDATE:
            key = rounding_key(run.seed, name, ROUND)
            values, clipped = sums.fixed_point(run).quantise(values.astype(np.float32), 1, key)
        wanted_ring += values.astype(np.uint32)
        wanted_tail += given_.tail
        wanted_tail[sums.CLIPPED] += clipped
    assert ring.tolist() == wanted_ring.tolist() and tail.tolist() == wanted_tail.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"run": config(update_range=0.5)},
        {"run": config(max_sites=63)},
        {"run": RunConfig(name="t", privacy=NO_PRIVACY, seed=1)},
        {"model_digest": "cd" * 32},
    ],
    ids=["range", "max_sites", "seed", "model"],
)
def test_one_update_is_never_masked_twice_under_the_same_keys_but_for_another_config(tmp_path: Path, changes: dict):
    # The difference of the two vectors would be the update at two scales, without a mask.
    coordinator, _ = placed(tmp_path, UPDATE, config())
    for name, reply in coordinator.masked():
        asked = coordinator.asked[name]
        again = replace(asked, **coordinator.head(**changes))
        refused = coordinator.ask(name, again)
        assert isinstance(refused, Failure) and refused.code == "out-of-turn"
        assert coordinator.ask(name, asked) == reply  # the identical instruction gets the identical bytes
    coordinator.finish()


def test_a_payload_that_changed_on_disk_is_not_masked_again(tmp_path: Path):
    # A coordinator gets a validation computed anew by asking for another model, then for the first one again.
    coordinator, payloads = placed(tmp_path, VALIDATION, config())
    first: dict[str, MaskedReply] = {}
    for name, reply in coordinator.masked():
        first[name] = reply
        coordinator.place(name, np.zeros(0), np.zeros(2, np.int64))
        refused = coordinator.ask(name, coordinator.asked[name])
        assert isinstance(refused, Failure) and refused.code == "other-sum"
    log = (run_folder(coordinator.sites[NAMES[0]]).parents[1] / "site.log").read_text()
    assert "the stored vector is not the one that was masked with this site's keys" in log
    for name, given_ in payloads.items():  # put back, everything goes on
        coordinator.place(name, np.zeros(0), given_.tail)
        assert coordinator.ask(name, coordinator.asked[name]) == first[name]
    assert coordinator.finish()[1].tolist() == [60, 6]
