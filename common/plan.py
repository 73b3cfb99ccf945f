"""What a private run will spend at every site, as events: a function of the run's config alone.

Used by both roles: a site spends these events one by one and checks them against its budget (client/policy.py), the
coordinator reports what the whole plan costs. Enters: the config. Leaves: events; public numbers.

σ of the training steps is the config's, or the smallest that lets the whole plan fit its ε: both roles compute the
same.
"""

from __future__ import annotations

from functools import lru_cache

from .config import PrivacyConfig, RunConfig
from .errors import ConfigError
from .privacy import Event, calibrate


def rate(config: RunConfig) -> float:
    """q, the probability with which every patient is drawn in a step: of declared patients, not of those that are here.

    Raises:
        ConfigError: the run is not private.
    """
    return config.grpo.patients_per_step / _declared(config.privacy)


def noise_multiplier(config: RunConfig) -> float:
    """σ of the training steps.

    Raises:
        ConfigError: ε is too small for the plan; the run is not private.
    """
    privacy, grpo, rounds = config.privacy, config.grpo, config.federation.rounds
    _declared(privacy)
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None and privacy.delta is not None  # as PrivacyConfig checks
    noise = privacy.schema_noise_multiplier, privacy.metrics_noise_multiplier
    return _calibrated(privacy.epsilon, privacy.delta, rate(config), rounds * grpo.local_steps, *noise)


def schema_event(config: RunConfig) -> Event:
    """The counts behind the question schema: all patients, once."""
    return Event("schema", config.privacy.schema_noise_multiplier, 1.0, 1)


def round_event(config: RunConfig) -> Event:
    """One round's training steps."""
    return Event("rounds", noise_multiplier(config), rate(config), config.grpo.local_steps)


def metrics_event(config: RunConfig) -> Event:
    """The results on test patients: all of them, once."""
    return Event("metrics", config.privacy.metrics_noise_multiplier, 1.0, 1)


def events(config: RunConfig) -> tuple[Event, ...]:
    """Everything that a site releases about its patients in the run."""
    return schema_event(config), *[round_event(config)] * config.federation.rounds, metrics_event(config)


@lru_cache(maxsize=8)
def _calibrated(epsilon: float, delta: float, sample_rate: float, steps: int, schema: float, metrics: float) -> float:
    return calibrate(
        epsilon, delta, sample_rate, steps, [Event("schema", schema, 1.0, 1), Event("metrics", metrics, 1.0, 1)]
    )


def _declared(privacy: PrivacyConfig) -> int:
    if not privacy.enabled or privacy.declared_patients is None:
        raise ConfigError("privacy.enabled = false: this run has no plan of private releases")
    return privacy.declared_patients
