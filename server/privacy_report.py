"""privacy.json of a run, and its part of report.html: what one patient's data can have changed, in ε, and in words.

Run by the coordinator when a run ends. Enters: the config and how far the run came; public numbers. Leaves:
privacy.json and the report's sentences. Private: nothing. What each hospital has really spent, over all its runs, is in
its own ledger (`wardround client ledger show`); this is what the run cost a patient of one site at most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common import plan
from ..common.config import RunConfig
from ..common.files import write_atomic
from ..common.findings import points
from ..common.privacy import Event, epsilon_prv, epsilon_rdp
from ..common.statistics import Z95

COMPONENTS = {
    "schema": "counts behind the question schema",
    "rounds": "training steps",
    "metrics": "results on test patients",
}
OFF = (
    "Differential privacy was off: no patient-level guarantee. A study of patients who are not in an open registry "
    "turns it on before its first round ([privacy] in the run's config): what has left cannot be taken back."
)


def privacy_report(config: RunConfig, rounds: Mapping[str, int], rounds_run: int) -> dict[str, Any]:
    """The content of privacy.json.

    Args:
        config: the run's.
        rounds: by site, in how many rounds its update was in the sum.
        rounds_run: rounds that were begun: a site may have trained in one and dropped out of its sum.
    """
    if not config.privacy.enabled:
        return {"enabled": False, "statement": OFF}
    privacy, delta = config.privacy, config.privacy.delta
    assert delta is not None
    events = [plan.schema_event(config), *[plan.round_event(config)] * rounds_run, plan.metrics_event(config)]
    spent = _spent(events, delta)
    return {
        "enabled": True,
        "unit": "one patient of one site, with all encounters, added or taken away",
        "epsilon_planned": privacy.epsilon,
        "delta": delta,
        "epsilon": spent,
        "components": {
            kind: {"what": words, **_spent([event for event in events if event.kind == kind], delta)}
            for kind, words in COMPONENTS.items()
        },
        "events": [event.to_json() for event in events],
        "noise_multiplier": plan.noise_multiplier(config),
        "sample_rate": plan.rate(config),
        "steps": rounds_run * config.grpo.local_steps,
        "max_grad_norm": privacy.max_grad_norm,
        "declared_patients": privacy.declared_patients,
        "sites": {site: {"rounds": number, **spent} for site, number in rounds.items()},
        "statement": statement(spent["prv"], delta),
        "protected": protected(),
        "not_protected": not_protected(),
    }


def cost(
    config: RunConfig, evaluation: Mapping[str, Any], *, updates: int, sites: int, parameters: int
) -> dict[str, Any]:
    """What privacy cost this run: the noise beside what it hides, in training and in the test results.

    Args:
        config: the run's; its privacy is on.
        evaluation: content of evaluation.json.
        updates: site updates that were added up, over all rounds.
        sites: in the sum of test results.
        parameters: trainable ones.

    Returns:
        "training_noise_ratio": length of all noise over the greatest length that all clipped gradients can add up to;
        "half_interval", "half_interval_without_noise": of the final model's accuracy; "sentences".
    """
    steps, drawn = updates * config.grpo.local_steps, config.grpo.patients_per_step
    ratio = plan.noise_multiplier(config) * math.sqrt(parameters) / (drawn * math.sqrt(steps)) if steps else math.inf
    low, high = evaluation["final"]["ci95"]
    share, n = evaluation["final"]["accuracy"], evaluation["n"]
    alone = Z95 * math.sqrt(share * (1 - share) / n)
    sentences = [
        f"Training: {steps:,} noised sums of about {drawn:.0f} patients each, over {sites} sites. All noise together "
        f"is {ratio:.1f} times as long as the gradients could have been had every patient pulled in the same "
        "direction. "
        "With k times the patients in a draw the same noise weighs 1 / k as much.",
        f"Test results: noise of standard deviation {evaluation['noise']:.1f} on each count makes the final model's "
        f"95 % interval {100 * (high - low):.1f} points wide; {n:,} questions without noise give {200 * alone:.1f}.",
    ]
    return {
        "training_noise_ratio": ratio if math.isfinite(ratio) else None,
        "half_interval": (high - low) / 2,
        "half_interval_without_noise": alone,
        "sentences": sentences if steps else sentences[1:],
    }


def against(reference: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """What the rounds of a private run added beside what a run without privacy added; one sentence.

    The interval takes the two runs as independent: where they asked the same patients it is too wide rather than too
    narrow.

    Args:
        reference: content of reference.json: the other run's name and paired comparison.
        evaluation: the private run's evaluation.json.
    """
    before = "warmup" if "final-warmup" in evaluation["paired"] else "base"
    with_privacy, without = evaluation["paired"][f"final-{before}"], reference["paired"][f"final-{before}"]
    lost = without["difference"] - with_privacy["difference"]
    half = math.hypot(*((item["ci95"][1] - item["ci95"][0]) / 2 for item in (with_privacy, without)))
    return (
        f"Accuracy: the rounds changed it by {points(with_privacy['difference'])} points here and by "
        f"{points(without['difference'])} points in '{reference['name']}', without differential privacy: a cost of "
        f"{points(lost)} points (95 % interval {points(lost - half)} to {points(lost + half)})."
    )


ALONE = (
    "Accuracy: what the same rounds reach without noise is not known from this run. On an open registry it can be "
    "measured: --reference names a run without differential privacy."
)


def write_privacy_report(path: Path, report: Mapping[str, Any]) -> None:
    """Writes privacy.json, whole or not at all."""
    write_atomic(path, json.dumps(report, indent=1, ensure_ascii=False).encode() + b"\n", mode=0o644)


def _spent(events: list[Event], delta: float) -> dict[str, float]:
    """ε by both accounts, rounded up to four digits."""
    return {
        "prv": _up(epsilon_prv(events, delta).epsilon),
        "rdp": _up(epsilon_rdp(events, delta).epsilon),
    }


def _up(value: float) -> float:
    return math.ceil(value * 1e4) / 1e4


def statement(epsilon: float, delta: float) -> str:
    """What ε means, for somebody who decides about patients' data.

    >>> statement(2.0, 1e-5)[:72]
    'ε = 2.00 at δ = 1e-05, for each patient of each site. Whatever somebody '
    """
    # The success of the best test of membership at a false alarm rate of 5 %, by the definition: power ≤ e^ε α + δ,
    # and 1 − power ≥ e^−ε (1 − α − δ).
    power = min(math.exp(epsilon) * 0.05 + delta, 1 - math.exp(-epsilon) * (1 - 0.05 - delta))
    return (
        f"ε = {epsilon:.2f} at δ = {delta:g}, for each patient of each site. Whatever somebody knows besides, and "
        "however they use all that left: who wants to tell whether one patient was in the registry, and accuses one "
        f"in twenty of those who were not, finds at most {100 * power:.1f} in a hundred of those who were. An ε of "
        f"about 1 and below is a strong promise; this one is {_strength(epsilon)}."
    )


def _strength(epsilon: float) -> str:
    for limit, words in ((1.0, "strong"), (3.0, "moderate"), (8.0, "weak")):
        if epsilon <= limit:
            return words
    return "very weak: it stops little beyond the extraction of single records"


def protected() -> list[str]:
    """What held, one sentence each."""
    return [
        "Everything about patients that left a site in this run (question schema, updates, test results) carried "
        "noise of the site's own, made from a key that nobody else has and that was never stored. How many patients "
        "were drawn, and what the model got right in training, was not sent.",
        "The guarantee is each site's own: it holds against the coordinator, the other sites and every reader of the "
        "final model, also if all of them work together.",
        "Each site recorded what it was about to spend before it computed, and refuses what would pass its own budget.",
    ]


def not_protected() -> list[str]:
    """What the guarantee does not say, one sentence each."""
    return [
        "ε adds up across sites that hold the same patient, and across runs: each site's ledger has its own sum.",
        "Choosing settings by looking at several private runs is not accounted.",
        "What a model says about patients in general (an association that is true of many) is not hidden: it is what "
        "the study is for.",
        "How long a site takes, and whether it takes part, is not noised.",
    ]
