"""Bytes that are none, to every decoder: what comes out is a value that encodes to the same bytes, or an error of ours.

Inputs are valid encodings with something changed: bits, lengths, pieces repeated, moved or taken from another encoding;
of JSON also values and keys, with checksums, signatures and lengths made to fit again where that leads further in. The
default run gives each decoder enough of them for 20,000 in all. A million, once, and then in other places:

    python -m tests.common.secagg.test_fuzz 1000000 [seed]
"""

import base64
import contextlib
import copy
import hashlib
import json
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wardround.common import messages
from wardround.common.config import NO_PRIVACY, RunConfig
from wardround.common.errors import WardroundError
from wardround.common.files import read_record, write_record
from wardround.common.identity import Card, Identity
from wardround.common.messages import INSTRUCTIONS, REPLIES, WireMessage
from wardround.common.roster import Roster
from wardround.common.secagg import client_state, shamir
from wardround.common.secagg.keys import Advert, Binding, KeyList, bitmap, members_of, pieces
from wardround.common.secagg.server_state import Attempt

from .parties import BINDING, Party, parties, relay

COORDINATOR = Identity.from_seed(b"k" * 32)
EXAMPLES, MUTANTS = 40, 50  # of one decoder: 2,000 inputs

# ---- Mutations


NUMBERS = [0, 1, 2, 3, 127, 128, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
TEXTS = ["", "0", "a" * 64, "é", "\ud800", "\x00", "../..", "NaN", "null", "1e999", "A" * 10_000]
JSON_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 1.5, -0.0, 1e308, 2**31, 2**53, 2**63, 2**64, -(2**63) - 1, 10**400,
    [], {}, [[]], [{}], {"": 0}, *TEXTS,
]  # fmt: skip


def mutate_bytes(data: bytes, rng: Random, others: list[bytes]) -> bytes:
    """One to three changes of an encoding."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at, size = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 32, 33, 64, 82, 375])
        piece = data[at : at + size]
        kind = rng.randrange(10)
        if kind == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[at + size :]
        elif kind == 3:
            data = data[:at] + piece + data[at:]
        elif kind == 4:
            data = data[:at] + rng.randbytes(size) + data[at + size :]
        elif kind == 5:
            number = rng.choice(NUMBERS).to_bytes(8, rng.choice(["little", "big"]))
            data = data[:at] + number[: rng.choice([1, 2, 4, 8])] + data[at + rng.choice([1, 2, 4, 8]) :]
        elif kind == 6:
            other = rng.choice(others)
            data = data[:at] + other[at : at + size] + data[at + size :]
        elif kind == 7:
            data = data[:at] + rng.choice([b"\x00", b"\xff"]) * size + data[at + size :]
        elif kind == 8:
            data = data + rng.randbytes(rng.randrange(1, 9))
        else:
            other = rng.randrange(len(data) + 1)
            data = data[:at] + data[other : other + size] + data[at + size :]
    return data


def mutate_json(value: Any, rng: Random) -> Any:
    """One to three changes somewhere in a JSON value."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places: list[tuple[Any, Any]] = []

        def walk(node: Any, places: list[tuple[Any, Any]] = places) -> None:
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, item in items:
                places.append((node, key))
                walk(item)

        walk(value)
        if not places:
            return rng.choice(JSON_VALUES)
        node, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[rng.choice(TEXTS)] = node[key]
        elif kind == 2 and isinstance(node, list):
            node.insert(key, node[key])
        elif kind == 3 and isinstance(node[key], int) and type(node[key]) is not bool:
            node[key] += rng.choice([-1, 1, 2**16, -(2**40)])
        elif kind == 4 and isinstance(node[key], str) and node[key]:
            at = rng.randrange(len(node[key]))
            node[key] = node[key][:at] + rng.choice(["", "0", "f", "G", "é", node[key][at] * 2]) + node[key][at + 1 :]
        else:
            node[key] = copy.deepcopy(rng.choice(JSON_VALUES))
    return value


# ---- Decoders


@dataclass(frozen=True)
class Decoder:
    """A valid encoding changed by `mutant`, and what reads it: raises ours, or returns whether it reads back alike."""

    mutant: Callable[[Random], Any]
    read: Callable[[Any], bool]


def of_bytes(valid: list[bytes], read: Callable[[bytes], bool]) -> Decoder:
    assert all(read(data) for data in valid)
    return Decoder(lambda rng: mutate_bytes(rng.choice(valid), rng, valid), read)


@cache
def begun() -> tuple[list[Party], Any]:
    sites = parties(5)
    run = relay(sites, 4)
    run.run(3)
    return sites, run


def binding_decoder() -> Decoder:
    others = [replace(BINDING, attempt=2**32 - 1, ring_values=2**32), replace(BINDING, purpose=2, range_=1e-300)]
    valid = [binding.to_bytes() for binding in (BINDING, *others)]
    return of_bytes(valid, lambda data: Binding.from_bytes(data).to_bytes() == data)


def advert_decoder() -> Decoder:
    valid = [advert.to_bytes() for advert in begun()[1].attempt.keys.adverts]

    def read(data: bytes) -> bool:
        advert = Advert.from_bytes(data)
        try:
            advert.verify()
        except WardroundError:
            assert data not in valid
        else:
            assert data in valid
        return advert.to_bytes() == data

    return of_bytes(valid, read)


def key_list_decoder() -> Decoder:
    data = begun()[1].said["key_list"]
    valid = [data, data[375:], data[:-375]]

    def mutant(rng: Random) -> tuple[int, bytes, int]:
        threshold = rng.choice([4, 4, 3, *NUMBERS, -1, -(2**63)])
        return threshold, mutate_bytes(rng.choice(valid), rng, valid), rng.choice([16, 1024, 3])

    def read(given: tuple[int, bytes, int]) -> bool:
        keys = KeyList.from_bytes(*given)
        return keys.to_bytes() == given[1] and len(keys.digest) == 32 and sorted(keys.ids) == list(keys.ids)

    return Decoder(mutant, read)


def bitmap_decoder() -> Decoder:
    def mutant(rng: Random) -> tuple[bytes, int]:
        n = rng.choice([3, 5, 7, 8, 9, 16, 17, 1024])
        data = bitmap([i for i in range(n) if rng.random() < 0.5], n)
        return mutate_bytes(data, rng, [data]) if rng.random() < 0.8 else data, n

    return Decoder(mutant, lambda given: bitmap(members_of(*given), given[1]) == given[0])


def pieces_decoder() -> Decoder:
    def mutant(rng: Random) -> tuple[bytes, int, int]:
        count, size = rng.randrange(6), rng.choice([33, 64, 82])
        data = rng.randbytes(count * size)
        return mutate_bytes(data, rng, [data]) if rng.random() < 0.8 else data, count, size

    return Decoder(mutant, lambda given: b"".join(pieces(*given, "test")) == given[0])


def shamir_decoder() -> Decoder:
    values = [0, 1, 2**256 - 1, 2**256, shamir.PRIME - 1, 5 << 200]
    return of_bytes(
        [shamir.to_bytes(value) for value in values], lambda data: shamir.to_bytes(shamir.from_bytes(data)) == data
    )


def example(kind: type[WireMessage]) -> WireMessage:
    """A message of a kind, with something in every field."""
    scalars, vectors = messages._LAYOUTS[kind.KIND]
    config = RunConfig(name="fuzz", privacy=NO_PRIVACY)
    texts = {"run_id": "ab" * 16, "config": config.to_json(), "config_digest": config.digest(), "samples": "[]"}
    made: dict[str, Any] = {str: "text", int: 3, float: 0.5, bool: True}
    values = {name: texts.get(name, made[kind_]) for name, kind_ in scalars.items()}
    arrays = {name: np.arange(3).astype(dtype) for name, dtype in vectors.items()}
    return kind(**values, **arrays)


@cache
def wire() -> list[tuple[type[WireMessage], bytes, dict[str, bytes]]]:
    return [(kind, *messages.split(example(kind))) for kind in (*INSTRUCTIONS, *REPLIES)]


def with_header(head: bytes, header: Any, rng: Random) -> bytes:
    """A head with another JSON header, canonical or nearly so, its length made to fit."""
    separators = (",", ":") if rng.random() < 0.9 else (", ", ": ")
    raw = json.dumps(header, sort_keys=rng.random() < 0.95, separators=separators).encode()
    return head[:8] + struct.pack("<I", len(raw)) + raw


def message_mutant(rng: Random) -> tuple[type[WireMessage], bytes, dict[str, bytes]]:
    kind, head, vectors = rng.choice(wire())
    vectors, what = dict(vectors), rng.randrange(5)
    if what == 0:
        head = mutate_bytes(head, rng, [one for _, one, _ in wire()])
    elif what == 1:
        head = with_header(head, mutate_json(json.loads(head[12:]), rng), rng)
    elif what == 2:  # another vector, and the head says so
        header = json.loads(head[12:])
        for name in vectors:
            vectors[name] = mutate_bytes(vectors[name], rng, list(vectors.values()))
            digest = hashlib.sha256(vectors[name]).hexdigest()
            header["vectors"][name] = {"count": len(vectors[name]) // rng.choice([1, 4, 4, 8]), "sha256": digest}
        head = with_header(head, header, rng)
    elif what == 3 and vectors:
        name = rng.choice(list(vectors))
        if rng.random() < 0.5:
            vectors[name] = mutate_bytes(vectors[name], rng, list(vectors.values()))
        else:
            vectors[rng.choice([name + "x", "", "masked", "vector"])] = vectors.pop(name)
    else:
        number = rng.choice([*NUMBERS[:9], *messages._KINDS])
        head = head[:6] + struct.pack("<H", number) + head[8:]
    expected = rng.choice([kind, kind, kind, messages.Reply, messages.Instruction, rng.choice(wire())[0]])
    return expected, head, vectors


def read_message(given: tuple[type[WireMessage], bytes, dict[str, bytes]]) -> bool:
    expected, head, vectors = given
    run = head + b"".join(vectors.values())
    decoded = None
    with contextlib.suppress(WardroundError):
        decoded = messages.decode(run, expected)
    joined = messages.join(head, vectors, expected)
    assert isinstance(joined, expected) and messages.split(joined) == (head, vectors)
    return decoded is not None and messages.encode(decoded) == run


def message_decoder() -> Decoder:
    return Decoder(message_mutant, read_message)


def record_values() -> tuple[Any, Mapping[str, np.ndarray]]:
    run = begun()[1]
    return run.attempt.to_record()


def attempt_decoder() -> Decoder:
    values, vectors = record_values()

    def mutant(rng: Random) -> tuple[Any, dict[str, np.ndarray]]:
        bent, arrays, what = values, dict(vectors), rng.randrange(3)
        if what == 0:
            bent = mutate_json(values, rng)
        elif what == 1:
            name = rng.choice(list(arrays))
            raw = mutate_bytes(arrays[name].tobytes(), rng, [arrays[name].tobytes()])
            arrays[name] = np.frombuffer(raw, np.uint8)
            if rng.random() < 0.2:
                arrays[rng.choice(["ring", "tail", "other"])] = arrays.pop(name)
            if rng.random() < 0.2:
                arrays["ring"] = np.zeros(rng.randrange(9), rng.choice(["f4", "f8", "i8", "u4", "u1"]))
        else:
            raw = mutate_bytes(base64.b64decode(values["keys"]), rng, [begun()[1].said["key_list"]])
            bent = {**values, "keys": base64.b64encode(raw).decode()}
        return bent, arrays

    def read(given: tuple[Any, dict[str, np.ndarray]]) -> bool:
        if not isinstance(given[0], dict):
            return True  # a record's values are an object
        attempt = Attempt.from_record(*given)
        again, arrays = attempt.to_record()
        for site in attempt.recipients:  # what it holds can be used: nothing but our errors
            try:
                attempt.add_signature(site, bytes(64))
            except WardroundError:
                continue
        return arrays["ring"].size == given[1]["ring"].nbytes and again["threshold"] == given[0]["threshold"]

    return Decoder(mutant, read)


@cache
def roster() -> Roster:
    cards = [Card.make(Identity.from_seed(bytes([i]) * 32), f"site-{i}") for i in range(1, 4)]
    return Roster.first(COORDINATOR, "all · 전체", cards).revoking(COORDINATOR, "site-2")


def signed_again(content: Any, use: str) -> Any:
    """A roster's or card's content with a good signature of whoever it names, where it is one of ours."""
    if not isinstance(content, dict) or not isinstance(content.get("signature"), str):
        return content
    if use == "roster":
        kept = {key: value for key, value in content.items() if key != "signature"}
        try:
            said = json.dumps(kept, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
        except (TypeError, ValueError):
            return content
        return content | {"signature": COORDINATOR.sign("roster", said).hex()}
    try:
        said = hashlib.sha256(content["name"].encode()).digest() + bytes.fromhex(content["id"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return content
    return content | {"signature": Identity.from_seed(b"\x01" * 32).sign("card", said).hex()}


def file_decoder(valid: list[bytes], read: Callable[[bytes], bool], use: str) -> Decoder:
    assert all(read(data) for data in valid)

    def mutant(rng: Random) -> bytes:
        data = rng.choice(valid)
        if rng.random() < 0.3:
            return mutate_bytes(data, rng, valid)
        content = mutate_json(json.loads(data), rng)
        if rng.random() < 0.7:
            content = signed_again(content, use)
        return json.dumps(content, ensure_ascii=rng.random() < 0.9).encode("utf-8", "surrogatepass")

    return Decoder(mutant, read)


def roster_decoder() -> Decoder:
    def read(data: bytes) -> bool:
        found = Roster.parse(data, "roster.json")
        return Roster.parse(found.to_json().encode(), "again") == found and len(found.digest) == 32

    return file_decoder([roster().to_json().encode()], read, "roster")


def card_decoder() -> Decoder:
    one, two = (Identity.from_seed(bytes([i]) * 32) for i in (1, 2))
    valid = [card.to_json().encode() for card in (Card.make(one, "north"), Card.make(one, "north", two))]

    def read(data: bytes) -> bool:
        found = Card.parse(data, "card.json")
        return Card.parse(found.to_json().encode(), "again") == found

    return file_decoder(valid, read, "card")


def record_decoder() -> Decoder:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path, values = folder / "fuzz.record", {"name": "a", "numbers": [1, 2], "nested": {"x": None}}
    vectors = {"a": np.arange(5, dtype=np.uint32), "b": np.zeros(0, np.float32), "c": np.arange(3, dtype=np.uint8)}
    write_record(path, values, vectors)
    valid = path.read_bytes()
    body = valid[:-32]
    (size,) = struct.unpack("<I", body[6:10])

    def mutant(rng: Random) -> bytes:
        what = rng.randrange(3)
        if what == 0:
            return mutate_bytes(valid, rng, [valid])
        bent = mutate_bytes(body, rng, [body])
        if what == 1:  # the header is another one, and its length fits
            header = json.dumps(mutate_json(json.loads(body[10 : 10 + size]), rng)).encode()
            bent = body[:6] + struct.pack("<I", len(header)) + header + body[10 + size :]
        return bent + hashlib.sha256(bent).digest()  # the checksum, too

    def read(data: bytes) -> bool:
        path.write_bytes(data)
        record = read_record(path)
        return isinstance(record.values, dict) and all(vector.ndim == 1 for vector in record.vectors.values())

    return Decoder(mutant, read)


def exchange_decoder() -> Decoder:
    """The site's state machine: an answer is to the one right request, anything else an error and nothing changed."""
    sites, run = begun()
    site, said = sites[0], run.said
    fresh = parties(5)
    first = relay(fresh, 4)
    first.run(1)
    sealed_run = relay(parties(5), 4)
    sealed_run.run(2)
    sealed = sealed_run.attempt.ciphertexts_for(site.id)
    signed = relay(parties(5), 4)
    signed.run(4)
    shared = sealed_run.sites[site.id].state
    signed_state = signed.sites[site.id].state
    masked = site.state
    valid = [said["key_list"], said["recipients"], said["survivors"], signed.said["signatures"], sealed]

    def mutant(rng: Random) -> tuple[int, bytes, bytes]:
        exchange = rng.randrange(2, 6)
        parts = {
            2: (rng.choice([4, 3, 5, 0, -1, 2**16, 2**63 - 1]).to_bytes(8, "little", signed=True), said["key_list"]),
            3: (said["recipients"], sealed),
            4: (said["survivors"], b""),
            5: (signed.said["signers"], signed.said["signatures"]),
        }
        a, b = parts[exchange]
        if exchange != 2 and rng.random() < 0.6:
            a = mutate_bytes(a, rng, valid)
        if rng.random() < 0.6:
            b = mutate_bytes(b, rng, valid)
        return exchange, a, b

    def no_random(size: int) -> bytes:
        return bytes(range(size))

    def read(given: tuple[int, bytes, bytes]) -> bool:
        exchange, a, b = given
        if exchange == 2:
            state = fresh[0].state
            threshold = int.from_bytes(a[:8], "little", signed=True)
            client_state.share(state, site.members, threshold, b, no_random)
            listed = [b[i : i + 375] for i in range(0, len(b), 375)]
            members = [advert.to_bytes() for advert in run.attempt.keys.adverts]
            n = len(listed)
            return listed == [one for one in members if one in listed] and 2 * threshold > n + 1 and 3 <= threshold <= n
        if exchange == 3:
            client_state.mask(shared, site.members, a, b)
            return (a, b) == (said["recipients"], sealed)
        if exchange == 4:
            client_state.sign(masked, site.members, a, site.identity.key)
            return len(members_of(a, 5)) >= 4
        client_state.unmask(signed_state, site.members, a, b)
        return len(members_of(a, 5)) >= 4

    return Decoder(mutant, read)


DECODERS: dict[str, Callable[[], Decoder]] = {
    "binding": binding_decoder,
    "advert": advert_decoder,
    "key list": key_list_decoder,
    "bitmap": bitmap_decoder,
    "pieces": pieces_decoder,
    "share value": shamir_decoder,
    "message": message_decoder,
    "coordinator's record of a sum": attempt_decoder,
    "roster": roster_decoder,
    "card": card_decoder,
    "record file": record_decoder,
    "exchange": exchange_decoder,
}
built = cache(lambda name: DECODERS[name]())


def try_mutants(name: str, seed: int, count: int) -> Counter[str]:
    """How many inputs were read, and how many refused, by class."""
    decoder, rng, outcomes = built(name), Random(f"{name} {seed}"), Counter[str]()
    for _ in range(count):
        given = decoder.mutant(rng)
        try:
            alike = decoder.read(given)
        except WardroundError as error:
            outcomes[type(error).__name__] += 1
        except Exception as error:
            raise AssertionError(f"{name}: {given!r:.3000}") from error
        else:
            assert alike, f"{name}: reads back as something else: {given!r:.3000}"
            outcomes["read"] += 1
    return outcomes


@pytest.mark.parametrize("name", DECODERS)
@given(seed=st.integers(0, 2**64 - 1))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_only_our_errors_come_out_of_a_decoder(name: str, seed: int):
    assert sum(try_mutants(name, seed, MUTANTS).values()) == MUTANTS


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.binary(max_size=800))
@settings(max_examples=20, deadline=None, derandomize=True, database=None)
def test_random_bytes_are_refused_too(name: str, data: bytes):
    decoder = built(name)
    given = decoder.mutant(Random(0))
    if isinstance(given, bytes):
        with contextlib.suppress(WardroundError):
            assert decoder.read(data)


def test_the_default_run_gives_twenty_thousand_inputs_and_reaches_both_outcomes():
    assert len(DECODERS) * EXAMPLES * MUTANTS >= 20_000
    for name in DECODERS:
        outcomes = try_mutants(name, 1, 300)
        assert outcomes["read"] > 0 and outcomes.total() - outcomes["read"] > 0, (name, outcomes)


def test_every_field_of_every_kind_of_message_is_in_the_examples():
    for kind, _, vectors in wire():
        scalars, layout = messages._LAYOUTS[kind.KIND]
        assert {item.name for item in fields(kind)} == {*scalars, *layout} and set(vectors) == set(layout)


def main(inputs: int, seed: int) -> None:
    """Gives every decoder its part of the inputs; prints what became of them."""
    each, done, batch = -(-inputs // len(DECODERS)), 0, 500
    for name in DECODERS:
        outcomes = Counter[str]()
        for index in range(-(-each // batch)):
            outcomes += try_mutants(name, seed + index, batch)
        done += outcomes.total()
        print(f"{name}: {outcomes.total()} inputs, {dict(outcomes)}", flush=True)
    print(f"{done} inputs, no error but ours")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
