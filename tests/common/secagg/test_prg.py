"""common/secagg/prg.py: the stream is AES-256-CTR, from any byte on, and no two masks begin alike."""

import base64
import secrets

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from wardround.common.secagg.prg import BLOCK_BYTES, KeyStream, Mask

KEY = bytes(range(32))

# NIST SP 800-38A, F.5.5 (CTR-AES256.Encrypt): key, first counter block, plaintext and ciphertext of four blocks.
NIST_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
NIST_COUNTER = int.from_bytes(bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"), "big")
NIST_PLAIN = bytes.fromhex(
    "6bc1bee22e409f96e93d7e117393172a"
    "ae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52ef"
    "f69f2445df4f9b17ad2b417be66c3710"
)
NIST_CIPHER = bytes.fromhex(
    "601ec313775789a5b7a7f504bbf3d228"
    "f443e3ca4d62b59aca84e990cacaf5c5"
    "2b0930daa23de94ce87017ba2d84988d"
    "dfc9c58db67aada613c2dd08457941a6"
)


def stream(key: bytes, size: int, offset: int = 0) -> bytes:
    out = np.empty(size, np.uint8)
    KeyStream(key, offset).fill(out)
    return out.tobytes()


def test_the_stream_is_nists_counter_mode():
    # A stream begins at counter block 0; NIST's example begins at another, which is a seek of so many blocks.
    found = stream(NIST_KEY, 64, 16 * NIST_COUNTER)
    assert bytes(a ^ b for a, b in zip(found, NIST_PLAIN, strict=True)) == NIST_CIPHER


def test_the_first_block_is_the_encrypted_zero_block():
    encryptor = Cipher(algorithms.AES(KEY), modes.ECB()).encryptor()
    blocks = b"".join(i.to_bytes(16, "big") for i in range(3))
    assert stream(KEY, 48) == encryptor.update(blocks)


def test_the_nist_known_answer_for_a_key_of_zeros_and_a_zero_counter_block():
    # CAVP AESAVS, ECBVarKey/GFSbox for 256 bits: AES-256 of zeros under a zero key.
    assert stream(bytes(32), 16).hex() == "dc95c078a2408989ad48a21492842087"


@given(st.integers(0, 400), st.lists(st.integers(0, 100), max_size=8))
def test_a_stream_read_in_pieces_from_any_byte_is_the_same_stream(offset: int, sizes: list[int]):
    whole = stream(KEY, offset + sum(sizes))
    reader, found = KeyStream(KEY, offset), b""
    for size in sizes:
        out = np.empty(size, np.uint8)
        reader.fill(out)
        found += out.tobytes()
    assert found == whole[offset:]


def test_a_stream_can_begin_beyond_two_to_the_32_values():
    far = 4 * 2**32 + 5
    counter = (far // 16).to_bytes(16, "big")
    encryptor = Cipher(algorithms.AES(KEY), modes.CTR(counter)).encryptor()
    assert stream(KEY, 20, far) == encryptor.update(bytes(40))[far % 16 :][:20]


@settings(max_examples=50)
@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 50), st.sampled_from([np.uint32, np.uint64]), st.data())
def test_a_mask_is_the_sum_of_its_streams_in_little_endian_numbers(
    adding: int, subtracting: int, size: int, dtype: type[np.unsignedinteger], data: st.DataObject
):
    offset = data.draw(st.integers(0, 60))
    keys = [bytes([i]) * 32 for i in range(adding + subtracting)]
    width = np.dtype(dtype).itemsize
    values = [data.draw(st.integers(0, 2 ** (8 * width) - 1)) for _ in range(size)]
    block = np.array(values, dtype)
    Mask(keys[:adding], keys[adding:], offset).apply(block)
    for number, key in enumerate(keys):
        sign = 1 if number < adding else -1
        drawn = stream(key, size * width, offset)
        words = [int.from_bytes(drawn[width * i : width * (i + 1)], "little") for i in range(size)]
        values = [(value + sign * word) % 2 ** (8 * width) for value, word in zip(values, words, strict=True)]
    assert block.tolist() == values


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_of_another_length_is_refused(size: int):
    with pytest.raises(ValueError, match=f"expected 32 bytes, got {size}"):
        KeyStream(bytes(size))


def test_an_offset_below_zero_and_more_than_a_block_are_refused():
    with pytest.raises(ValueError, match="offset_bytes"):
        KeyStream(KEY, -1)
    with pytest.raises(ValueError, match="at most"):
        KeyStream(KEY).fill(np.empty(BLOCK_BYTES + 1, np.uint8))


def test_of_2_to_18_masks_none_begin_alike_where_flwrs_repeat_over_a_hundred_times():
    """A shared key of flwr is base64 text; its generator XORs the words of it, of which 28 bits vary."""
    from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
    from flwr.supercore.primitives.asymmetric import generate_key_pairs

    private, public = generate_key_pairs()
    example = generate_shared_key(private, public)
    assert len(example) == 44 and len(base64.urlsafe_b64decode(example)) == 32

    count = 2**18
    raw = np.random.default_rng(7).bytes(32 * count)
    keys = [raw[32 * i : 32 * (i + 1)] for i in range(count)]
    assert len({stream(key, 16) for key in keys}) == count

    # Making flwr's generator takes 0.3 ms, so only keys that its fold makes equal are run through it: a lower bound.
    theirs = [base64.urlsafe_b64encode(key) for key in keys]
    folded = np.bitwise_xor.reduce(np.frombuffer(b"".join(theirs), "<u4").reshape(count, -1), axis=1)
    order = np.argsort(folded, kind="stable")
    same = np.flatnonzero(folded[order][1:] == folded[order][:-1])

    def prefix(key: bytes) -> list[int]:
        return pseudo_rand_gen(key, 2**32, [(4,)])[0].tolist()

    repeats = sum(prefix(theirs[order[place]]) == prefix(theirs[order[place + 1]]) for place in same)
    assert repeats > 100


def test_system_random_keys_give_streams_without_visible_bias():
    drawn = np.empty(BLOCK_BYTES, np.uint8)
    KeyStream(secrets.token_bytes(32)).fill(drawn)
    ones = int(np.unpackbits(drawn).sum())
    bits = 8 * BLOCK_BYTES
    assert abs(ones - bits / 2) < 6 * (bits**0.5) / 2
