"""The site's own randomness: an AES key stream, uniform and Gaussian numbers of the right shape."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import ECB
from scipy import stats
from wardround.client.randomness import SecureRandom

KEY = bytes(range(32))


def test_uniform_numbers_are_the_aes_key_stream_in_order_whatever_the_pieces():
    blocks = Cipher(AES256(KEY), ECB()).encryptor().update(b"".join(i.to_bytes(16, "big") for i in range(8)))
    expected = np.array([int.from_bytes(blocks[i : i + 8], "little") >> 11 for i in range(0, 128, 8)]) / 2.0**53
    random = SecureRandom(KEY)
    assert np.concatenate([random.uniform(5), random.uniform(11)]).tolist() == expected.tolist()


def test_without_a_key_no_two_streams_are_alike():
    assert not np.array_equal(SecureRandom().uniform(4), SecureRandom().uniform(4))


def test_a_key_of_another_length_is_refused_and_none_is_ever_shown():
    with pytest.raises(ValueError, match="expected 32 bytes, got 5"):
        SecureRandom(b"short")
    assert repr(SecureRandom(KEY)) == "SecureRandom()"


def test_uniform_numbers_are_uniform():
    found = SecureRandom(KEY).uniform(200_000)
    assert found.min() >= 0 and found.max() < 1
    assert stats.kstest(found, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("std", [1.0, 0.03, 250.0])
def test_gaussian_numbers_have_the_standard_deviation_that_was_asked_for(std: float):
    """The test accepts σ and would reject two thirds and three halves of it."""
    found = SecureRandom(KEY).gaussian(50_001, std).numpy()
    assert found.dtype == np.float64 and found.shape == (50_001,)
    assert stats.kstest(found, stats.norm(0, std).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2, 0.97, 1.03):
        assert stats.kstest(found, stats.norm(0, std * wrong).cdf).pvalue < 1e-3
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.02


def test_many_numbers_are_made_in_blocks_and_none_repeats():
    found = SecureRandom(KEY).gaussian(2 * (1 << 20) + 3, 1.0)
    assert len(np.unique(found.numpy())) == len(found)
