"""The server's step against Reddi et al. (2021), Algorithm 2, written out value by value."""

import math

import numpy as np
import pytest
from wardround.common.config import FederationConfig
from wardround.common.errors import VerificationError
from wardround.server.optimizer import ServerOptimizer

ADAM = FederationConfig(
    server_optimizer="fedadam", server_learning_rate=0.1, server_beta1=0.9, server_beta2=0.99, server_epsilon=1e-3
)


def test_fedavg_adds_the_mean_update():
    x, after = ServerOptimizer(FederationConfig(server_learning_rate=0.5)).step(
        np.array([1, 2], np.float32), np.array([2.0, -4.0])
    )
    assert x.tolist() == [2.0, 0.0]
    assert x.dtype == np.float32
    assert after.state() == {}


def test_fedadam_follows_the_paper_value_by_value():
    rng = np.random.default_rng(1)
    x = rng.standard_normal(5).astype(np.float32)
    optimizer = ServerOptimizer(ADAM)
    by_hand = [float(value) for value in x]
    m, v = [0.0] * 5, [1e-6] * 5
    for _ in range(4):
        delta = rng.standard_normal(5)
        x, optimizer = optimizer.step(x, delta)
        for i in range(5):
            m[i] = 0.9 * m[i] + 0.1 * delta[i]
            v[i] = 0.99 * v[i] + 0.01 * delta[i] ** 2
            by_hand[i] = float(np.float32(by_hand[i] + 0.1 * m[i] / (math.sqrt(v[i]) + 1e-3)))
    assert np.allclose(x, by_hand, rtol=1e-6)


@pytest.mark.parametrize("config", [FederationConfig(), ADAM])
def test_a_restored_optimizer_steps_to_the_same_bits(config: FederationConfig):
    rng = np.random.default_rng(2)
    x, optimizer = ServerOptimizer(config).step(rng.standard_normal(7).astype(np.float32), rng.standard_normal(7))
    restored = ServerOptimizer.restored(config, {key: value.copy() for key, value in optimizer.state().items()})
    delta = rng.standard_normal(7)
    one, two = optimizer.step(x, delta), restored.step(x, delta)
    assert one[0].tobytes() == two[0].tobytes()
    assert [value.tobytes() for value in one[1].state().values()] == [v.tobytes() for v in two[1].state().values()]


@pytest.mark.parametrize("config", [FederationConfig(), ADAM])
def test_a_step_leaves_the_older_optimizer_and_vector_as_they_were(config: FederationConfig):
    x, optimizer = ServerOptimizer(config).step(np.zeros(3, np.float32), np.ones(3))
    before = {key: value.tobytes() for key, value in optimizer.state().items()}, x.tobytes()
    optimizer.step(x, np.ones(3))
    assert ({key: value.tobytes() for key, value in optimizer.state().items()}, x.tobytes()) == before


def test_a_step_to_something_not_finite_is_refused():
    with pytest.raises(VerificationError, match="NaN or infinity"), np.errstate(over="ignore"):
        ServerOptimizer(FederationConfig()).step(np.zeros(1, np.float32), np.array([1e300]))


def test_a_mean_update_of_another_length_is_refused():
    with pytest.raises(VerificationError, match="expected a mean update"):
        ServerOptimizer(FederationConfig()).step(np.zeros(2, np.float32), np.zeros(3))


def test_the_default_fedadam_step_is_of_the_order_of_the_mean_update():
    config = FederationConfig(server_optimizer="fedadam")
    delta = np.array([1e-3, -3e-4, 1e-4, -1e-6, 0.0])  # what a few local steps of 2e-4 leave
    x, optimizer = ServerOptimizer(config).step(np.zeros(5, np.float32), delta)
    assert np.abs(x).max() <= config.eta
    assert np.array_equal(np.sign(x), np.sign(delta))
    assert 0.1 <= np.linalg.norm(x) / np.linalg.norm(delta) <= 3
    for _ in range(20):  # nor does it grow when the sites agree round after round
        before = x
        x, optimizer = optimizer.step(x, delta)
        assert np.linalg.norm(x - before) <= 3 * np.linalg.norm(delta)
