"""Where a model comes from, as data, and what was and was not protected while it was made, in sentences.

Run by the coordinator. Enters: the run's config, digests, counts of sites and rounds. Leaves: provenance.json beside
the model, the model card, the report. Holds nothing of a patient and no site's name.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..common.config import RunConfig

_PACKAGES = ("wardround", "torch", "transformers", "peft", "trl", "flwr", "numpy", "safetensors")


def provenance(
    config: RunConfig,
    *,
    base_digest: str,
    adapter_digest: str,
    schema_digest: str,
    dictionary_digest: str,
    sites: int,
    rounds_run: int,
    kept_round: int,
    questions_trained: int,
    simulated: bool,
    public: bool,
    split_key: str | None = None,
) -> dict[str, Any]:
    """The content of provenance.json: the same run gives the same bytes on the same machine.

    Args:
        config: the run's.
        base_digest: of the base model.
        adapter_digest: of manifest and full vector of the final adapter.
        schema_digest: of the question schema.
        dictionary_digest: of the data dictionary.
        sites: how many took part: had an update in some round.
        rounds_run: training rounds that were completed.
        kept_round: whose adapter is the final one; 0: the model before the rounds, warmed up where that was on.
        questions_trained: over all sites and rounds.
        simulated: all sites ran on one machine.
        public: the registry is open or synthetic.
        split_key: hex, by which the simulated sites divided an open registry. It is written down, so that
            `wardround evaluate` finds this run's own test patients; a real site's key is a secret and never here.
    """
    facts: dict[str, Any] = {
        "run": config.name,
        "seed": config.seed,
        "base_model": config.model.id,
        "base_digest": base_digest,
        "dtype": config.model.dtype,
        "strategy": config.lora.strategy,
        "adapter_digest": adapter_digest,
        "config_digest": config.digest(),
        "schema_digest": schema_digest,
        "dictionary_digest": dictionary_digest,
        "registry": Path(config.simulation.registry).name if simulated else None,
        "warmup": config.warmup.enabled,
        "public": public,
        "simulated": simulated,
        "sites": sites,
        "rounds_run": rounds_run,
        "kept_round": kept_round,
        "questions_trained": questions_trained,
        "secure_aggregation": config.federation.secure_aggregation,
        "min_sites": config.federation.min_sites,
        "colluders": config.federation.colluders,
        "differential_privacy": _differential_privacy(config),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
        "commit": commit(),
    }
    if simulated and public and split_key is not None:
        facts["split_key"] = split_key
    return facts


def _differential_privacy(config: RunConfig) -> str:
    if not config.privacy.enabled:
        return "none"
    return f"epsilon {config.privacy.epsilon:g} at delta {config.privacy.delta:g} for a patient of a site (planned)"


def commit() -> str | None:
    """The checkout's commit, with "-dirty" where files were changed; None for an installed wheel, or without git."""
    checkout = Path(__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except OSError:  # git itself is not installed
        return None
    return done.stdout.strip() or None


def protected(facts: Mapping[str, Any]) -> list[str]:
    """What held in this run, one sentence each."""
    samples = ", except sample questions of this open registry" if facts["public"] else ""
    sentences: list[str] = []
    if facts["secure_aggregation"] == "bonawitz":
        sentences.append(
            "Counts, updates with weights and statistics, validation and test results left the sites under masks; the "
            "coordinator could read sums over the sites that finished, at least "
            f"{facts['min_sites']} each time, and nothing of one site, as long as at most {facts['colluders']} of the "
            "hospitals that the others verified told it what they know (docs/secure-sums.md)."
        )
    return [
        *sentences,
        f"Patient rows, the questions made from them and the model's answers were read only by the site's own code"
        f"{samples}. What a site sends is enumerated (its name, public keys and encrypted shares, masked vectors, "
        "signatures, digests and error codes), and the site's ledger has each message before it leaves.",
        "Each site checked its own policy before it worked and again before it answered; errors left as codes, never "
        "as texts.",
        "Each site compared the digest of the model it was given with the one the coordinator named, and the digest "
        "of the final adapter with the one it received.",
    ]


def not_protected(facts: Mapping[str, Any]) -> list[str]:
    """What did not hold in this run, one sentence each."""
    sentences: list[str] = []
    if facts["secure_aggregation"] == "none":
        sentences.append(
            "Updates and counts were added up in the clear, on one machine: there each site's own can be read, and an "
            "update can give away the texts it was trained on. Sites that are not simulations over a public registry "
            "refuse such a run."
        )
    if facts["differential_privacy"] == "none":
        sentences.append(
            "No patient-level guarantee: no noise was added to updates, counts or results (no differential privacy), "
            "so the sums and the model may hold traces of single patients."
        )
    sentences.append(
        "A site that sends a bad update on purpose is not detected; the validation gate only limits what it can do."
    )
    if facts["simulated"]:
        sentences.append(
            "Sites and coordinator were one process on one machine: their separation was simulated, not enforced."
        )
    return sentences


def privacy_statement(facts: Mapping[str, Any]) -> str:
    """Everything above as one paragraph, what is not protected first."""
    return " ".join(not_protected(facts) + protected(facts))
