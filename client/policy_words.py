"""A hospital's limits as sentences that a privacy officer can read and sign: `wardround client policy explain`.

Run by the site; pure. Enters: `[policy]` of site.toml. Leaves: nothing; text for the hospital's own screen. Every
limit has its sentence, also one that is off, so that what is not limited is read, too. client/policy.py enforces them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..common.config import TASKS, PolicyConfig
from .policy import requires_privacy

_TASK_WORDS = {
    "counts": "counting for the question schema",
    "train": "training",
    "validate": "validation",
    "test": "the final test",
}


def _require_privacy(policy: PolicyConfig) -> str:
    if policy.require_privacy is False:
        return (
            "Runs WITHOUT differential privacy are accepted: nothing then bounds what a sum, or the model, says of one "
            "patient."
        )
    if policy.require_privacy or requires_privacy(policy, open_site=True):
        return "Only runs with differential privacy for patients are accepted."
    if policy.simulated:
        return "Runs without differential privacy are accepted while the dictionary says that the registry is public."
    return "Only runs with differential privacy for patients are accepted (not set; a real hospital's default)."


def _epsilon(policy: PolicyConfig) -> str:
    if policy.epsilon is None:
        if policy.require_privacy is False or policy.simulated:
            return "No total privacy budget is set: ε may grow without end over the runs."
        return "No total privacy budget is set, so no private run is accepted: set epsilon and delta."
    return (
        f"Over all runs together, for good, a patient's privacy loss stays within ε = {policy.epsilon:g} at δ = "
        f"{policy.delta:g}; what would pass it is refused before it starts."
    )


def _delta(policy: PolicyConfig) -> str:
    if policy.delta is None:
        return "A run's δ may be anything up to 1 / (10 · patients)."
    return f"A run's δ may be at most {policy.delta:g}, and at most 1 / (10 · patients)."


def _tasks(policy: PolicyConfig) -> str:
    if not policy.tasks:
        return "Nothing may be computed of patients."
    allowed = [_TASK_WORDS[task] for task in TASKS if task in policy.tasks]
    refused = [_TASK_WORDS[task] for task in TASKS if task not in policy.tasks]
    return f"Patients may be used for {', '.join(allowed)}" + (f"; never for {', '.join(refused)}." if refused else ".")


def _named(names: tuple[str, ...]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _or(value: object, said: str, off: str) -> str:
    return off if value is None else said.format(value)


_SENTENCES: Mapping[str, Callable[[PolicyConfig], str]] = {
    "simulated": lambda policy: (
        "This is a SIMULATED site: while its dictionary says that the registry is public, it may add up without masks."
        if policy.simulated
        else "Everything computed of patients leaves under the masks of a secure sum only; nothing leaves in the clear."
    ),
    "require_privacy": _require_privacy,
    "epsilon": _epsilon,
    "epsilon_per_run": lambda policy: _or(
        policy.epsilon_per_run,
        "One run may use at most ε = {:g} of that.",
        "One run may use as much of the budget as there is.",
    ),
    "delta": _delta,
    "min_noise_multiplier": lambda policy: _or(
        policy.min_noise_multiplier,
        "The noise multiplier σ of everything that is released must be at least {:g}.",
        "Any noise multiplier σ is accepted; only ε limits it.",
    ),
    "max_grad_norm": lambda policy: _or(
        policy.max_grad_norm,
        "The clipping bound C on one patient's gradient may be at most {:g}.",
        "Any clipping bound C on one patient's gradient is accepted.",
    ),
    "min_sites": lambda policy: (
        f"A sum is joined only with at least {policy.min_sites} hospitals that this one has verified itself, it "
        "included."
    ),
    "colluders": lambda policy: (
        f"Sums withstand that the coordinator is told everything by {policy.colluders} other "
        f"hospital{'s' * (policy.colluders > 1)}; hospitals that were not verified count as such."
    ),
    "repeat_with_others": lambda policy: (
        "The same result MAY be added up again with other hospitals: two sums then show those that differ, together."
        if policy.repeat_with_others
        else "The same result is not added up a second time with other hospitals."
    ),
    "tasks": _tasks,
    "targets_allowed": lambda policy: (
        f"Only these may be asked about: {_named(policy.targets_allowed)}."
        if policy.targets_allowed
        else "Every feature and outcome of the dictionary may be asked about, but for those of the next line."
    ),
    "targets_never_asked": lambda policy: (
        f"Never asked about: {_named(policy.targets_never_asked)}. They may still be shown in this hospital's own "
        "records."
        if policy.targets_never_asked
        else "No feature or outcome is excluded from being asked about."
    ),
    "min_training_patients": lambda policy: (
        f"With fewer than {policy.min_training_patients} training patients this hospital takes no part."
        if policy.min_training_patients > 1
        else "This hospital takes part with any number of training patients."
    ),
    "min_test_patients": lambda policy: (
        f"The answers of fewer than {policy.min_test_patients} test patients are not added to any sum of test results; "
        "with fewer, this hospital takes no part in those of a private run, nor in a run that asks fewer."
        if policy.min_test_patients > 1
        else "The answers of any number of test patients are added to the sums of test results."
    ),
    "min_level_patients": lambda policy: (
        f"A question schema that shows a level of certainly fewer than {policy.min_level_patients} patients of all "
        "hospitals together is refused."
        if policy.min_level_patients > 1
        else "A question schema may show a level of any number of patients."
    ),
    "opt_out": lambda policy: _or(
        policy.opt_out,
        "Patients listed in {} are left out before anything is counted; without that file nothing is done.",
        "No list of patients who opted out is named.",
    ),
    "share_samples": lambda policy: (
        "Sample questions leave for the report if this site is simulated and its registry public."
        if policy.share_samples
        else "No question about a patient leaves."
    ),
    "allowed_models": lambda policy: (
        f"Only these base models are accepted, by the digest of their files: {', '.join(policy.allowed_models)}."
        if policy.allowed_models
        else "Any base model is accepted."
    ),
    "max_rounds": lambda policy: f"A run may have at most {policy.max_rounds:,} rounds.",
    "max_local_steps": lambda policy: f"A round may have at most {policy.max_local_steps:,} training steps here.",
    "max_runs": lambda policy: f"This hospital takes part in at most {policy.max_runs:,} runs.",
    "max_bytes_per_run": lambda policy: _or(
        policy.max_bytes_per_run, "At most {:,} bytes leave for one run.", "There is no limit on the bytes of one run."
    ),
    "max_upload_bytes": lambda policy: f"At most {policy.max_upload_bytes:,} bytes leave over all runs.",
    "hours": lambda policy: _or(
        policy.hours,
        "Work begins only between {} by this machine's clock; a secure sum whose work is done ends at any hour.",
        "Work begins at any hour.",
    ),
}


def explain(policy: PolicyConfig) -> list[tuple[str, str]]:
    """Every limit with its sentence, as they are read: privacy, sums, patients, size, time."""
    return [(name, sentence(policy)) for name, sentence in _SENTENCES.items()]
