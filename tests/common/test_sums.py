"""What a secure sum carries and is bound to: read again from docs/secure-sums.md §S4, §S9, §S11, byte by byte."""

import hashlib
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wardround.common import sums
from wardround.common.config import RunConfig
from wardround.common.errors import SumError
from wardround.common.secagg.keys import COUNTS, PURPOSES, TEST, UPDATE, VALIDATION, Binding

RUN_ID, MODEL = "0123456789abcdef" * 2, "ab" * 32
INPUTS, ROSTER = bytes(range(32)), bytes(range(32, 64))
HEX = st.binary(min_size=32, max_size=32).map(bytes.hex)


def config(**federation: object) -> RunConfig:
    settings = {"max_sites": 7, "update_range": 0.25, "max_weight": 500, **federation}
    return RunConfig.model_validate(
        {"name": "t", "privacy": {"enabled": False}, "federation": settings, "grpo": {"group_size": 5}}
    )


def binding(purpose: int, run: RunConfig | None = None, **changes: object) -> Binding:
    values = {
        "run_id": RUN_ID, "round_index": 3, "purpose": purpose, "attempt": 2, "ring_values": 10, "tail_values": 4,
        "roster": ROSTER, "model_digest": MODEL, "inputs": INPUTS, **changes,
    }  # fmt: skip
    return sums.binding(run or config(), **values)  # type: ignore[arg-type]


def test_an_update_is_quantised_as_the_config_says():
    uniform, patients = sums.fixed_point(config()), sums.fixed_point(config(weighting="patients"))
    assert (uniform.range_, uniform.max_sites, uniform.max_weight) == (0.25, 7, 1.0)
    assert patients.max_weight == 500.0
    assert uniform.scale == ((2**31 - 1) // 7 - 1) / 0.25


def test_the_tail_of_an_update_begins_with_its_weight_and_ends_with_the_histogram():
    assert sums.UPDATE_TAIL[0] == "weight"  # client/payload.py weighs by it
    assert sums.UPDATE_TAIL[sums.CLIPPED] == "clipped"
    assert sums.update_tail(config()) == 8 + 6  # rewards of a group of 5: 0 to 5 right
    assert len(set(sums.UPDATE_TAIL)) == 8


@pytest.mark.parametrize("sites", [3, 7, 64, 1000, 1024])
def test_counts_at_the_limit_add_up_without_a_wrap_and_one_more_would_not(sites: int):
    most = sums.count_limit(config(max_sites=sites))
    assert sites * most < 2**32 <= sites * (most + 1)


@pytest.mark.parametrize("purpose", sorted(PURPOSES))
def test_the_binding_is_the_documents_177_bytes(purpose: int):
    run = config()
    expected = (
        bytes.fromhex(RUN_ID)
        + struct.pack("<IBIQII", 3, purpose, 2, 10, 4, 7)
        + struct.pack("<d", 0.25 if purpose == UPDATE else 1.0)
        + ROSTER
        + bytes.fromhex(run.digest())
        + bytes.fromhex(MODEL)
        + INPUTS
    )
    assert len(expected) == 177
    assert binding(purpose, run).to_bytes() == expected


def test_everything_that_a_sum_is_about_changes_its_binding():
    changes = {
        "run_id": "f" * 32, "round_index": 4, "purpose": TEST, "attempt": 3, "ring_values": 11, "tail_values": 5,
        "roster": bytes(32), "model_digest": "cd" * 32, "inputs": bytes(32), "run": config(max_sites=8),
    }  # fmt: skip
    made = [binding(VALIDATION)] + [binding(**{"purpose": VALIDATION, name: value}) for name, value in changes.items()]
    assert len({one.to_bytes() for one in made}) == len(changes) + 1
    # Speed settings change no result, so sites with other ones take part in one sum.
    faster = RunConfig.model_validate({**config().model_dump(), "speed": {"threads": 7}})
    assert binding(VALIDATION, faster) == binding(VALIDATION)


@pytest.mark.parametrize(
    "changes", [{"attempt": 0}, {"round_index": -1}, {"ring_values": 0, "tail_values": 0}, {"inputs": b"short"}]
)
def test_a_binding_about_nothing_is_refused(changes: dict):
    with pytest.raises(SumError, match="malformed: binding"):
        binding(**{"purpose": COUNTS, **changes})


def test_the_input_digest_is_over_the_parts_in_their_order():
    domain = b"wardround/secagg/1/input\0"
    assert sums.input_digest("a", "b") == hashlib.sha256(domain + json.dumps(["a", "b"]).encode()).digest()
    assert len({sums.input_digest(*parts) for parts in (("a", "b"), ("b", "a"), ("ab",), ("a", "b", ""), ())}) == 5


@given(model=HEX, inputs=st.binary(min_size=32, max_size=32), content=st.binary(max_size=40))
def test_what_a_site_remembers_of_a_payload_is_what_the_document_says(model: str, inputs: bytes, content: bytes):
    domain = b"wardround/secagg/1/content\0"
    for purpose in PURPOSES:
        about = b"" if purpose == COUNTS else bytes.fromhex(model)
        wanted = hashlib.sha256(domain + bytes([purpose]) + about + inputs + content).hexdigest()
        assert sums.content_digest(purpose, model, inputs, content) == wanted


def test_counts_are_the_same_payload_under_every_model_and_an_update_is_not():
    first, second = ("11" * 32, "22" * 32)
    assert sums.content_digest(COUNTS, first, INPUTS, b"c") == sums.content_digest(COUNTS, second, INPUTS, b"c")
    for purpose in (UPDATE, VALIDATION, TEST):
        digests = {sums.content_digest(purpose, model, INPUTS, b"c") for model in (first, second)}
        assert len(digests) == 2
