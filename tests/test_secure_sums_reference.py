"""The second implementation of docs/secure-sums.md: published vectors, its own golden vectors, dropouts, refusals."""

import hashlib
import hmac
import json
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from . import make_secure_sums_vectors as maker
from . import secure_sums_reference as ref

Json = dict[str, Any]
VALID = [attempt.name for attempt in maker.ATTEMPTS]


def read(name: str) -> Any:
    return json.loads((maker.FOLDER / f"{name}.json").read_text())


def cases(*names: str) -> list[Any]:
    return [pytest.param(case, id=f"{name}: {case['name']}") for name in names for case in read(name)]


# ---- A site made from a vector file alone, and the instructions it is given there


def policy_of(base: Json, number: int, policy: Json | None = None) -> ref.Policy:
    own = base["sites"][str(number)]
    about = base["policy"] | own["policy"] | (policy or {})
    active, verified = (frozenset(map(bytes.fromhex, about[key])) for key in ("active", "verified"))
    return ref.Policy(active, verified | {bytes.fromhex(own["id"])}, about["c"], about["min_sites"])


def site_of(base: Json, number: int, memory: Json | None = None, keeps: ref.Memory | None = None) -> ref.Site:
    own = base["sites"][str(number)]
    fields: Json = {k: bytes.fromhex(v) if isinstance(v, str) else v for k, v in base["binding"].items()}
    binding = ref.Binding(**fields)
    tape, remembered = bytes.fromhex(own["random"]), keeps or ref.Memory()
    payload = own["ring"], own["tail"]
    the_sum = binding.encode()[:21]
    if memory and "attempt" in memory:
        remembered.attempts[the_sum] = memory["attempt"]
    if memory and "signed" in memory:
        remembered.signed[the_sum] = b"a statement of an earlier attempt"
    for giving in (memory or {}).get("given", []):
        ids, with_ids = (frozenset(map(bytes.fromhex, giving[key])) for key in ("ids", "survivors"))
        remembered.payloads[bytes.fromhex(own["content_digest"])] = [ref.Giving(giving["t"], ids, with_ids)]

    def random(size: int) -> bytes:
        nonlocal tape
        taken, tape = tape[:size], tape[size:]
        assert len(taken) == size, "the tape ended"
        return taken

    identity = bytes.fromhex(own["identity_key"])
    return ref.Site(identity, binding, policy_of(base, number), payload, random, remembered)


def base_instruction(base: Json, number: int, exchange: int) -> Json:
    """What the vector's coordinator sent this site in an exchange."""
    if exchange == 3:
        shared = base["exchange_3"]
        return {"recipients": shared["recipients"], "ciphertexts": shared["ciphertexts"][str(number)]}
    if exchange == 4:
        return {"survivors": base["exchange_4"]["survivors"]}
    return {} if exchange == 1 else base[f"exchange_{exchange}"]["instruction"]


def joined(items: Iterable[int | str], base: Json, number: int, exchange: int) -> bytes:
    """A list of a must-fail vector: hexadecimal, or the number of the member whose part the base has."""
    named: dict[int, str] = {}
    if exchange == 2:
        named = {int(i): advert for i, advert in base["exchange_1"]["replies"].items()}
    elif exchange == 3:
        senders = [int(i) for i in base["exchange_2"]["replies"] if int(i) != number]
        named = dict(zip(senders, base["exchange_3"]["ciphertexts"].get(str(number), []), strict=False))
    elif exchange == 5:
        named = {int(i): signature for i, signature in base["exchange_4"]["replies"].items()}
    return bytes.fromhex("".join(named[item] if isinstance(item, int) else item for item in items))


def instruct(site: ref.Site, base: Json, number: int, exchange: int, said: Json) -> bytes:
    """The reply to an instruction as the vector files write it; the one function to rewrite for another product."""
    if exchange == 1:
        return site.keys()
    if exchange == 2:
        return site.shares(said["t"], joined(said["key_list"], base, number, 2))
    if exchange == 3:
        return site.masked(bytes.fromhex(said["recipients"]), joined(said["ciphertexts"], base, number, 3))
    if exchange == 4:
        return site.consistency(bytes.fromhex(said["survivors"]))
    return site.unmask(bytes.fromhex(said["signers"]), joined(said["signatures"], base, number, 5))


def raw(reply: str | list[str]) -> bytes:
    return bytes.fromhex(reply if isinstance(reply, str) else "".join(reply))


def replay(base: Json, number: int, answered: int, memory: ref.Memory) -> ref.Site:
    """A site that answered the first exchanges of an attempt, as the vector says."""
    site = site_of(base, number, keeps=memory)
    for exchange in range(1, answered + 1):
        reply = instruct(site, base, number, exchange, base_instruction(base, number, exchange))
        assert reply == raw(base[f"exchange_{exchange}"]["replies"][str(number)])
    return site


# ---- Golden vectors


def test_the_script_writes_the_same_bytes_again():
    assert {path.name: path.read_text() for path in maker.FOLDER.iterdir()} == maker.files()


@pytest.mark.parametrize("name", VALID)
def test_every_site_replies_as_the_vector_says(name: str):
    base = read(name)
    for number in map(int, base["sites"]):
        site = site_of(base, number)
        for exchange in range(1, 6):
            replies = base[f"exchange_{exchange}"]["replies"]
            if str(number) not in replies:
                break
            said = base_instruction(base, number, exchange)
            first = instruct(site, base, number, exchange, said)
            assert first == raw(replies[str(number)])
            assert instruct(site, base, number, exchange, said) == first


@pytest.mark.parametrize("name", VALID)
def test_keys_in_between_are_those_of_the_specification(name: str):
    base = read(name)
    key_list = bytes.fromhex("".join(base["exchange_2"]["instruction"]["key_list"]))
    digest = ref.list_digest(base["parameters"]["t"], key_list)
    assert digest.hex() == base["exchange_2"]["list_digest"]
    assert len(bytes.fromhex(base["binding_bytes"])) == 177
    for number, own in base["sites"].items():
        advert = ref.read_advert(raw(base["exchange_1"]["replies"][number]))
        assert advert.min_survivors == own["min_survivors"]
        assert own["random"].startswith(own["encryption_key"] + own["mask_key"] + own["self_seed"])
        assert own["self_key"] == ref.self_key(raw(own["self_seed"]), digest, raw(own["id"])).hex()
        for other, key in own["pair_keys_with"].items():
            assert key == base["sites"][other]["pair_keys_with"][number]
            assert own["share_keys_to"][other] != base["sites"][other]["share_keys_to"][number]


@pytest.mark.parametrize(
    ("first", "second", "answered"),
    [
        ("n4_t3_again", "n6_t5_again_run", 3),  # 3 + 5 > 6 + 1
        ("n4_t3_again", "n4_t3_again_run", 5),  # the same survivors once more
    ],
)
def test_a_payload_is_given_again_where_that_shows_nothing_new(first: str, second: str, answered: int):
    memory = ref.Memory()
    for base in (read(first), read(second)):
        replay(base, 1, answered, memory)


def recovered(base: Json, changed: Json | None = None) -> tuple[ref.Vector, set[tuple[int, int]]]:
    masked = {int(i): raw(data) for i, data in base["exchange_3"]["replies"].items()}
    answers = base["exchange_5"]["replies"] | (changed or {})
    return ref.recover(
        base["parameters"]["t"],
        bytes.fromhex("".join(base["exchange_2"]["instruction"]["key_list"])),
        bytes.fromhex(base["exchange_3"]["recipients"]),
        bytes.fromhex(base["exchange_4"]["survivors"]),
        masked,
        {int(i): raw(data) for i, data in answers.items() if data is not None},
    )


def plain_sum(payloads: list[ref.Vector]) -> ref.Vector:
    ring = [sum(values) % 2**32 for values in zip(*(p[0] for p in payloads), strict=True)]
    return ring, [sum(values) % 2**64 for values in zip(*(p[1] for p in payloads), strict=True)]


@pytest.mark.parametrize("name", VALID)
def test_the_coordinator_finds_the_plain_sum_of_the_survivors(name: str):
    base = read(name)
    alive = ref.read_bitmap(bytes.fromhex(base["exchange_4"]["survivors"]), base["parameters"]["n"])
    payloads = [(base["sites"][str(i)]["ring"], base["sites"][str(i)]["tail"]) for i in alive]
    assert recovered(base) == (plain_sum(payloads), set())
    assert recovered(base)[0] == (base["sum"]["ring"], base["sum"]["tail"])


@pytest.mark.parametrize(
    "case", cases("fail_keys", "fail_shares", "fail_masked", "fail_consistency", "fail_unmask")
)  # fmt: skip
def test_every_must_fail_vector_is_refused_by_its_word(case: Json):
    base, number, memory = read(case["base"]), case["site"], ref.Memory()
    if "earlier" in case:
        replay(read(case["earlier"]["base"]), number, case["earlier"]["answered"], memory)
    site = site_of(base, number, case.get("memory"), memory)
    for exchange in range(1, case["answered"] + 1):
        instruct(site, base, number, exchange, base_instruction(base, number, exchange))
    for earlier in case.get("before", []):
        instruct(site, base, number, earlier["exchange"], earlier["instruction"])
    site.policy = policy_of(base, number, case.get("policy"))
    for _ in range(2):
        with pytest.raises(ref.Refused) as refused:
            instruct(site, base, number, case["exchange"], case["instruction"])
        assert refused.value.word == case["failure"]


@pytest.mark.parametrize("case", cases("fail_coordinator"))
def test_the_coordinator_refuses_a_vector_of_another_length(case: Json):
    base = read(case["base"])
    base["exchange_3"]["replies"][str(case["site"])] = case["reply"]
    with pytest.raises(ref.Refused, match=case["failure"]):
        recovered(base)


@pytest.mark.parametrize("case", cases("recovery"))
def test_lying_answers_are_corrected_or_nothing_is_released(case: Json):
    base = read(case["base"])
    if "failure" in case:
        with pytest.raises(ref.Refused, match=case["failure"]):
            recovered(base, case["answers_instead"])
    else:
        total, wrong = recovered(base, case["answers_instead"])
        assert total == (base["sum"]["ring"], base["sum"]["tail"])
        assert wrong == set(map(tuple, case["wrong"]))


# ---- Dropouts, and what a site does not do twice


def run(leaving: dict[int, set[int]]) -> tuple[ref.Vector, set[int]]:
    """The sum of n5_t4's payloads when members answer nothing from an exchange on, and whose payloads are in it."""
    base, t = read("n5_t4"), 4
    sites = {i: site_of(base, i) for i in range(1, 6)}
    for i, site in sites.items():
        site.random = maker.Tape(f"dropouts {i}")

    def present(exchange: int) -> list[int]:
        gone = set().union(*(leaving.get(e, set()) for e in range(1, exchange + 1)))
        return [i for i in sites if i not in gone]

    adverts = [sites[i].keys() for i in present(1)]
    key_list, numbers = b"".join(adverts), {i: at + 1 for at, i in enumerate(present(1))}
    n = len(adverts)
    shares = {i: sites[i].shares(t, key_list) for i in present(2)}
    recipients = ref.make_bitmap([numbers[i] for i in shares], n)

    def between(u: int, v: int) -> bytes:
        at = numbers[v] - 1 - (numbers[v] > numbers[u])
        return shares[u][at * ref.CIPHERTEXT_BYTES :][: ref.CIPHERTEXT_BYTES]

    masked = {
        v: sites[v].masked(recipients, b"".join(between(u, v) for u in shares if u != v)) for v in present(3)
    }  # fmt: skip
    survivors = ref.make_bitmap([numbers[i] for i in masked], n)
    signed = {v: sites[v].consistency(survivors) for v in present(4)}
    signers = ref.make_bitmap([numbers[i] for i in signed], n)
    answers = {numbers[v]: sites[v].unmask(signers, b"".join(signed.values())) for v in present(5)}
    total, wrong = ref.recover(
        t, key_list, recipients, survivors, {numbers[v]: data for v, data in masked.items()}, answers
    )
    assert not wrong
    assert total == plain_sum([sites[v].payload for v in masked])
    return total, set(masked)


@pytest.mark.parametrize("exchange", range(1, 6))
@pytest.mark.parametrize("gone", [set(), {1}, {2}, {3}, {4}, {5}])
def test_sum_of_five_survives_any_one_dropout_in_any_exchange(exchange: int, gone: set[int]):
    assert run({exchange: gone})[1] == set(range(1, 6)) - (gone if exchange <= 3 else set())


@pytest.mark.parametrize("exchange", range(1, 6))
@pytest.mark.parametrize("gone", combinations(range(1, 6), 2))
def test_two_dropouts_of_five_release_nothing(exchange: int, gone: tuple[int, int]):
    with pytest.raises(ref.Refused, match="threshold"):
        run({exchange: set(gone)})
    with pytest.raises(ref.Refused, match="threshold"):
        run({exchange: {gone[0]}, min(exchange + 1, 5): set(gone)})


def test_a_higher_attempt_closes_the_lower_one():
    base, memory = read("n3_t3"), ref.Memory()
    first, second = site_of(base, 1), site_of(base, 1)
    first.memory = second.memory = memory
    second.binding = maker.replace(second.binding, attempt=3)
    first.keys()
    second.keys()
    with pytest.raises(ref.Refused, match="out-of-turn"):
        instruct(first, base, 1, 2, base_instruction(base, 1, 2))


def test_keys_of_low_order_are_those_whose_product_with_any_key_is_one():
    assert len(ref.LOW_ORDER) == 5
    for u in ref.LOW_ORDER:
        with pytest.raises(ref.Refused, match="low order"):
            ref.x25519(maker.seeded("any", 32), u.to_bytes(32, "little"))


def test_a_key_of_low_order_is_refused():
    with pytest.raises(ref.Refused, match="low order"):
        ref.x25519(maker.seeded("any", 32), bytes(32))


def test_a_dealer_that_lies_to_one_holder_makes_the_holder_look_like_the_liar():
    """What §S9 names is dealer or holder: the coordinator cannot tell which of the two lied."""
    honest = dict(enumerate(ref.share(bytes(32), 4, 5, maker.Tape("dealer")), 1))
    assert ref.find_secret(honest | {3: honest[3] + 1}, 4, lambda s: s == bytes(32)) == (bytes(32), {3})


# ---- Parameters, Shamir, fixed point


@pytest.mark.parametrize(("n", "c", "t"), [(3, 1, 3), (5, 2, 4), (7, 2, 5), (5, 1, 4), (4, 1, 3)])
def test_smallest_threshold_is_the_smallest_that_a_site_accepts(n: int, c: int, t: int):
    ids = [bytes([i]) for i in range(n)]
    policy = ref.Policy(frozenset(ids), frozenset(ids), c, 3)
    assert ref.smallest_threshold(n, c) == t
    ref.check_parameters(t, ids, policy)
    with pytest.raises(ref.Refused, match="threshold"):
        ref.check_parameters(t - 1, ids, policy)


def test_any_t_shares_give_the_secret_and_fewer_fit_every_secret():
    secret = maker.seeded("secret", 32)
    shares = dict(enumerate(ref.share(secret, 3, 5, maker.Tape("shares")), 1))
    for subset in combinations(shares, 3):
        value = ref.interpolate({i: shares[i] for i in subset})
        assert value.to_bytes(32, "little") == secret
    for other in (0, 1, ref.P - 1):
        points = {0: other, 1: shares[1], 2: shares[2]}
        assert ref.interpolate(points, 1) == shares[1]
        assert ref.interpolate(points, 0) == other


def test_p_is_prime_and_holds_every_secret():
    assert ref.P > 2**256
    assert all(pow(a, ref.P - 1, ref.P) == 1 for a in (2, 3, 5, 7, 11, 13))


@pytest.mark.parametrize("case", read("fixed_point"), ids=lambda case: case["about"])
def test_fixed_point_vectors(case: Json):
    arguments = case["w"], case["W"], case["range"], case["max_sites"], case["rounding"]
    assert ref.quantise(case["x"], *arguments) == (case["ring"], case["clipped"])
    assert ref.dequantise(case["ring"], case["range"], case["max_sites"]) == case["alone"]


@given(
    values=st.lists(
        st.tuples(st.floats(-4, 4, width=32), st.integers(1, 100), st.integers(0, 2**32 - 1)), min_size=1, max_size=64
    ),
    range_r=st.sampled_from([0.1, 1.0, 4.0]),
)
@settings(max_examples=200, deadline=None)
def test_the_sum_is_within_n_over_scale_of_the_exact_one(values: list[tuple[float, int, int]], range_r: float):
    rings = [ref.quantise([x], w, 100, range_r, 64, [r])[0][0] for x, w, r in values]
    exact = sum(min(max(x, -range_r), range_r) * w / 100 for x, w, _ in values)
    total = ref.dequantise([sum(rings) % 2**32], range_r, 64)[0]
    assert abs(total - exact) <= (len(values) + 1e-6) / ref.scale(range_r, 64)


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(ref.Refused):
        ref.quantise([float("nan")], 1, 1, 1.0, 3, [0])


# ---- Published vectors of the primitives


def test_x25519_of_rfc_7748_section_6_1():
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    publics = ref.x25519_public(alice), ref.x25519_public(bob)
    assert publics[0].hex() == "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    assert publics[1].hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert ref.x25519(alice, publics[1]).hex() == ref.x25519(bob, publics[0]).hex() == shared


def test_hkdf_of_rfc_5869_test_case_3():
    okm = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert ref.hkdf_sha256(b"\x0b" * 22, b"", 42).hex() == okm


def test_hkdf_is_two_hmacs_over_the_documented_info():
    prk = hmac.digest(bytes(32), b"secret", hashlib.sha256)
    info = b"wardround/secagg/1/pair-mask\x00context"
    assert ref.hkdf(b"secret", "pair-mask", b"context") == hmac.digest(prk, info + b"\x01", hashlib.sha256)


def test_ed25519_of_rfc_8032_test_2():
    identity = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    public = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert ref.ed25519_public(identity).hex() == public
    assert ref.sign(identity, b"\x72").hex() == signature
    ref.check_signature(bytes.fromhex(public), bytes.fromhex(signature), b"\x72")


def test_aes_256_ctr_of_sp_800_38a_f_5_5():
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain = (
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    cipher = (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    counter = bytes(range(0xF0, 0x100))
    assert ref.aes_256_ctr(key, counter, bytes.fromhex(plain)).hex() == cipher


def test_the_stream_starts_with_the_zero_block_of_the_gcm_paper():
    """Test case 13 of McGrew and Viega (2005): AES-256 of 16 zero bytes under the zero key."""
    ring, tail = ref.stream(bytes(32), 2, 1)
    assert ref.encode_vector((ring, tail)).hex() == "dc95c078a2408989ad48a21492842087"


def test_aes_256_gcm_of_the_nist_test_vectors():
    """gcmEncryptExtIV256.rsp, first vector: no plaintext, no associated data; then test case 14 of the GCM paper."""
    key = bytes.fromhex("b52c505a37d78eda5dd34f20c22540ea1b58963cf8e5bf8ffa85f9f2492505b4")
    nonce = bytes.fromhex("516c33929df5a3284ff463d7")
    assert AESGCM(key).encrypt(nonce, b"", b"").hex() == "bdc1ac884d332457a1d2664f168c76f0"
    whole = "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"
    assert AESGCM(bytes(32)).encrypt(bytes(12), bytes(16), b"").hex() == whole
