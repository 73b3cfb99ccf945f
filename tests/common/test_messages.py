"""Wire messages: golden bytes, an independent reading of them, round trips, and every refusal of the decoder."""

import hashlib
import json
import struct
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from wardround.common import messages
from wardround.common.errors import ProtocolError
from wardround.common.messages import (
    INSTRUCTIONS,
    REPLIES,
    EvaluateReply,
    Failure,
    Instruction,
    KeysReply,
    MaskedReply,
    MaskInstruction,
    Reply,
    SharesInstruction,
    SumInstruction,
    TrainInstruction,
    WarmupReply,
    WireMessage,
    decode,
    dtypes_of,
    encode,
    join,
    split,
)

GOLDEN = Path(__file__).parents[1] / "vectors" / "messages.json"
PREFIX = struct.Struct("<4sHHI")


def sample(kind: type[WireMessage]) -> WireMessage:
    """One message of a kind, every field set to something that its name decides."""
    scalars, vectors = messages._LAYOUTS[kind.KIND]
    values: dict[str, object] = {}
    for name, expected in scalars.items():
        number = len(name)
        values[name] = {str: f"{name} é", int: number, float: number / 4, bool: True}[expected]
    for name, dtype in vectors.items():
        values[name] = np.arange(-1, 3).astype(dtype)
    return kind(**values)


def golden() -> dict[str, str]:
    """What GOLDEN holds: `python -m tests.common.test_messages` writes it again after a change of the protocol."""
    return {kind.__name__: encode(sample(kind)).hex() for kind in (*INSTRUCTIONS, *REPLIES)}


def with_header(message: WireMessage, header: bytes) -> bytes:
    head, vectors = split(message)
    kind = PREFIX.unpack_from(head)[2]
    return PREFIX.pack(b"WARD", messages.PROTOCOL_VERSION, kind, len(header)) + header + b"".join(vectors.values())


def header_of(message: WireMessage) -> dict:
    return json.loads(split(message)[0][PREFIX.size :])


def canonical(header: dict) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(",", ":")).encode()


def test_every_kind_has_the_bytes_that_were_published():
    assert golden() == json.loads(GOLDEN.read_text())


def test_kinds_and_routes_are_unique():
    assert len({kind.KIND for kind in (*INSTRUCTIONS, *REPLIES)}) == len(INSTRUCTIONS) + len(REPLIES)
    assert len({kind.ROUTE for kind in INSTRUCTIONS}) == len(INSTRUCTIONS)


@pytest.mark.parametrize("name", json.loads(GOLDEN.read_text()))
def test_a_straightforward_reader_finds_every_field_in_the_bytes(name: str):
    data = bytes.fromhex(json.loads(GOLDEN.read_text())[name])
    kind = getattr(messages, name)
    magic, version, number, size = PREFIX.unpack_from(data)
    header = json.loads(data[PREFIX.size : PREFIX.size + size])
    rest = data[PREFIX.size + size :]
    expected = sample(kind)
    assert (magic, version, number) == (b"WARD", 3, kind.KIND)
    assert header["fields"] == {key: getattr(expected, key) for key in header["fields"]}
    for key in [item for item in vars(expected) if item in header["vectors"]]:
        values = getattr(expected, key)
        raw, rest = rest[: values.nbytes], rest[values.nbytes :]
        assert raw == values.tobytes()
        assert header["vectors"][key] == {"count": len(values), "sha256": hashlib.sha256(raw).hexdigest()}
    assert rest == b""


@pytest.mark.parametrize("kind", [*INSTRUCTIONS, *REPLIES])
def test_decoding_gives_back_what_was_encoded(kind: type[WireMessage]):
    message = sample(kind)
    assert decode(encode(message), kind) == message
    assert join(*split(message), kind) == message
    assert decode(encode(message), Instruction if issubclass(kind, Instruction) else Reply) == message


@given(
    masked=hnp.arrays(np.uint32, st.integers(0, 40)),
    round_index=st.integers(-(2**63), 2**63 - 1),
    site=st.text(),
)
def test_any_masked_vector_survives_the_round_trip_bit_for_bit(masked: np.ndarray, round_index: int, site: str):
    site = site.encode("utf-8", "ignore").decode()
    message = MaskedReply(run_id="r", site=site, round_index=round_index, masked=masked)
    again = decode(encode(message), MaskedReply)
    assert again.masked.tobytes() == masked.tobytes()
    assert (again.round_index, again.site) == (round_index, site)


@given(
    vector=hnp.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)),
    attempt=st.integers(-(2**63), 2**63 - 1),
)
def test_any_global_model_survives_the_round_trip_bit_for_bit(vector: np.ndarray, attempt: int):
    again = decode(encode(replace(sample(TrainInstruction), attempt=attempt, vector=vector)), TrainInstruction)
    assert again.vector.tobytes() == vector.tobytes() and again.attempt == attempt


@given(key_list=st.binary(max_size=200), threshold=st.integers(-(2**63), 2**63 - 1))
def test_any_bytes_of_a_secure_sum_survive_the_round_trip(key_list: bytes, threshold: int):
    message = replace(sample(SharesInstruction), threshold=threshold, key_list=np.frombuffer(key_list, np.uint8))
    again = decode(encode(message), SharesInstruction)
    assert again.key_list.tobytes() == key_list and again.threshold == threshold


@given(data=st.binary(max_size=200))
def test_noise_is_refused_with_our_own_error(data: bytes):
    with pytest.raises(ProtocolError):
        decode(data, WireMessage)


@given(position=st.integers(0), value=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_gives_another_valid_message(position: int, value: int):
    good = encode(sample(EvaluateReply))
    position %= len(good)
    bad = good[:position] + bytes([value]) + good[position + 1 :]
    try:
        again = decode(bad, WireMessage)
    except ProtocolError:
        return
    assert encode(again) == bad


@given(position=st.integers(0), value=st.integers(0, 255))
def test_a_changed_byte_of_a_vector_is_always_refused(position: int, value: int):
    good = encode(sample(MaskInstruction))
    start = len(split(sample(MaskInstruction))[0])
    position = start + position % (len(good) - start)
    bad = good[:position] + bytes([value]) + good[position + 1 :]
    if bad != good:
        with pytest.raises(ProtocolError, match="SHA-256"):
            decode(bad, MaskInstruction)


GOOD = encode(sample(WarmupReply))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (GOOD[:5], "expected at least 12 bytes, got 5"),
        (b"NOPE" + GOOD[4:], "expected magic b'WARD', got b'NOPE'"),
        (GOOD[:4] + b"\x01\x00" + GOOD[6:], "expected protocol version 3, got 1"),
        (GOOD[:6] + b"\x63\x00" + GOOD[8:], "expected a known message kind, got 99"),
        (GOOD[:6] + b"\x0a\x00" + GOOD[8:], "expected a known message kind, got 10"),  # CollectReply of version 1
        (GOOD[:8] + b"\xff\xff\xff\xff" + GOOD[12:], "expected a header of at most"),
        (GOOD[:-1], "expected a header of at most"),
        (GOOD + b"\x00", f"expected {len(GOOD)} bytes, got {len(GOOD) + 1}"),
        (with_header(sample(WarmupReply), b"not json"), "expected a canonical JSON header"),
        (with_header(sample(WarmupReply), b"[" * 9000), "expected a canonical JSON header"),
        (with_header(sample(WarmupReply), b'{"fields":NaN}'), "expected a canonical JSON header"),
        (with_header(sample(WarmupReply), b" " + canonical(header_of(sample(WarmupReply)))), "in other bytes"),
        (with_header(sample(WarmupReply), b"[]"), "expected an object of"),
        (with_header(sample(WarmupReply), canonical({"fields": {}, "vectors": {}})), "fields: expected an object of"),
    ],
)
def test_malformed_bytes_are_refused_with_what_was_expected(data: bytes, said: str):
    with pytest.raises(ProtocolError, match=said.replace("[", r"\[")):
        decode(data, WireMessage)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("round_index", "8", "WarmupReply.round_index: expected int, got str"),
        ("round_index", True, "WarmupReply.round_index: expected int, got bool"),
        ("round_index", 1.0, "WarmupReply.round_index: expected int, got float"),
        ("round_index", 2**63, "expected a 64-bit integer, got 64 bits"),
        ("site", 3, "WarmupReply.site: expected str, got int"),
        ("extra", 3, "fields: expected an object of"),
    ],
)
def test_a_field_of_another_type_is_refused_by_name(field: str, value: object, said: str):
    header = header_of(sample(WarmupReply))
    header["fields"][field] = value
    with pytest.raises(ProtocolError, match=said):
        decode(with_header(sample(WarmupReply), canonical(header)), WarmupReply)


@pytest.mark.parametrize("about", [{"count": -1, "sha256": ""}, {"count": 2**40, "sha256": ""}, {"count": 1.0}, 4])
def test_a_vector_that_is_badly_described_is_refused(about: object):
    header = header_of(sample(KeysReply))
    header["vectors"]["advert"] = about
    with pytest.raises(ProtocolError):
        decode(with_header(sample(KeysReply), canonical(header)), KeysReply)


def test_another_kind_than_expected_is_refused_by_both_names():
    with pytest.raises(ProtocolError, match="expected KeysReply, got WarmupReply"):
        decode(GOOD, KeysReply)


def test_vectors_must_be_those_of_the_head():
    head, vectors = split(sample(MaskedReply))
    for others in ({}, {**vectors, "update": b"\0" * 16}, {"update": vectors["masked"]}):
        with pytest.raises(ProtocolError, match="expected vectors"):
            join(head, others, MaskedReply)
    with pytest.raises(ProtocolError, match="expected 16 bytes, got 15"):
        join(head, {"masked": vectors["masked"][:-1]}, MaskedReply)
    with pytest.raises(ProtocolError, match="SHA-256"):
        join(head, {"masked": bytes(16)}, MaskedReply)


@pytest.mark.parametrize(
    "bad",
    [np.zeros(3), np.zeros(3, np.float32), np.zeros(3, np.int64), np.zeros((2, 2), np.uint32), np.zeros(3, ">u4")],
)
def test_a_vector_of_another_type_is_not_encoded(bad: np.ndarray):
    with pytest.raises(ProtocolError, match="expected 1-D <u4"):
        encode(MaskedReply(run_id="r", site="s", round_index=1, masked=bad))


@pytest.mark.parametrize("bad", [1.5, float("inf"), None, [1, 2], {"update": 1}, b"x"])
def test_a_field_of_another_type_is_not_encoded(bad: object):
    with pytest.raises(ProtocolError, match=r"WarmupReply\.site: expected str, got"):
        encode(replace(sample(WarmupReply), site=bad))


def every_subclass(kind: type) -> list[type]:
    return [found for child in kind.__subclasses__() for found in (child, *every_subclass(child))]


def fields_of(kind: type[WireMessage]) -> dict[str, str]:
    """Names of a kind's fields and what they hold: a scalar's type, or a vector's dtype. Read from the annotations."""
    hints = get_type_hints(kind, include_extras=True)
    return {item.name: str(get_args(hints[item.name])[1:2] or hints[item.name].__name__) for item in fields(kind)}


# Every field that any reply has. "samples" is for open registries (tests/client/test_policy.py); digests are of models,
# dictionaries and schemas; the bytes are those of docs/secure-sums.md.
LEAVES = {
    "run_id": "str",
    "site": "str",
    "round_index": "int",
    "code": "str",
    "model_digest": "str",
    "dictionary_digest": "str",
    "schema_digest": "str",
    "samples": "str",
    "advert": "('|u1',)",
    "ciphertexts": "('|u1',)",
    "signature": "('|u1',)",
    "answer": "('|u1',)",
    "masked": "('<u4',)",
}


def test_no_message_type_can_carry_an_unmasked_update_weight_or_count():
    kinds = [kind for kind in every_subclass(WireMessage) if kind.__module__ == messages.__name__]
    assert {kind for kind in kinds if kind.KIND} == {*INSTRUCTIONS, *REPLIES}
    leaving = [kind for kind in kinds if not issubclass(kind, Instruction)]
    assert set(REPLIES) == {kind for kind in leaving if kind.KIND}
    for kind in leaving:
        assert fields_of(kind).items() <= LEAVES.items(), kind.__name__
    # One vector of numbers, and it is masked; the one number beside it is the round's, which the coordinator chose.
    assert {kind for kind in REPLIES if set(dtypes_of(kind).values()) - {np.dtype(np.uint8)}} == {MaskedReply}
    assert dtypes_of(MaskedReply) == {"masked": np.dtype(np.uint32)}
    assert {name for name, holds in LEAVES.items() if holds in ("int", "float")} == {"round_index"}


def test_only_exchanges_of_a_secure_sum_ask_for_what_is_computed_of_patients():
    asked = {kind for kind in INSTRUCTIONS if issubclass(kind, SumInstruction)}
    assert {kind.ROUTE for kind in asked} == {"query.shares", "query.mask", "query.survivors", "query.unmask"}
    for kind in asked:
        assert {"run_id", "round_index", "purpose", "attempt"} <= set(fields_of(kind))


def test_messages_that_differ_in_their_receipt_share_the_bytes_of_their_vectors():
    one = sample(TrainInstruction)
    other, packed = replace(one, receipt="another"), {}
    (head, vectors), (other_head, others) = split(one, packed), split(other, packed)
    assert (head, vectors) == split(one) and (other_head, others) == split(other)
    assert vectors["vector"] is others["vector"] and head != other_head


def test_only_published_kinds_are_encoded():
    with pytest.raises(ProtocolError, match="expected a message kind"):
        encode(Reply(run_id="r", site="s", round_index=1))


def test_decoded_vectors_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        decode(encode(sample(TrainInstruction)), TrainInstruction).vector[0] = 1


def test_a_failure_carries_a_code_and_no_text():
    assert set(header_of(sample(Failure))["fields"]) == {"run_id", "site", "round_index", "code"}


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=1, sort_keys=True) + "\n")
