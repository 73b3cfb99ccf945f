"""What the question schema is worth under noise, by bins: python benchmarks/noised_schema.py

The registry, sites and noise of demo-private: SUPPORT ICU, four sites, 4,088 training patients; the sum of the sites'
noised counts becomes a schema as in a run, five draws of noise each, and is compared with the schema of the exact
counts. Then as if every patient were ten, for a study of that size. Writes benchmarks/results/noised_schema.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from environment import record
from wardround.client.registry import split_rows
from wardround.common.config import PrivacyConfig, QuestionsConfig, load_run
from wardround.common.counts import Counts, count
from wardround.common.dictionary import Dictionary
from wardround.common.errors import RegistryError
from wardround.common.noisy import count_scales, read_counts, resolution
from wardround.common.schema import Schema, derive_schema
from wardround.simulations import federation

EXACT_BINS = (192, 24)
BINS = ((24, 3), (24, 4), (24, 2), (24, 6), (12, 3), (48, 3))
DRAWS = 5
SHOWN = 6  # features a record shows in the demo


def noised(exact: Counts, privacy: PrivacyConfig, sites: int, rng: np.random.Generator) -> Counts:
    """As the coordinator reads the sum; the sum of the sites' noise is drawn at once."""
    one, two = (scale * np.sqrt(sites) for scale in count_scales(exact.layout, privacy.schema_noise_multiplier))
    noise = rng.standard_normal(len(exact.vector))
    first = exact.layout.first_table
    noise[:first] *= one
    noise[first:] *= two
    ring = np.rint(exact.vector + noise).astype(np.int64).astype(np.uint32)
    return read_counts(ring, exact.dictionary, privacy, sites)


def compared(true: Schema, other: Schema) -> dict[str, float]:
    """Targets that are left; over their pairs, shares of the two schemas and what is hidden; the worth of records."""
    pairs = [(target, name) for target in other.names for name in true.mi[target]]
    mine, found = (np.array([schema.mi[target][name] for target, name in pairs]) for schema in (true, other))
    hidden, seen = (
        {(target, name) for target in other.names for name in schema.shortcuts[target]} for schema in (true, other)
    )
    worth: list[float] = []
    for target in other.names:
        names = [name for name in true.mi[target] if (target, name) not in hidden]
        best, shown = (sorted(names, key=lambda name, by=by: -by.mi[target][name])[:SHOWN] for by in (true, other))
        total = sum(true.mi[target][name] for name in best)
        worth.append(sum(true.mi[target][name] for name in shown) / total if total else 1.0)
    levels: list[float] = []
    for asked in other.targets:
        if asked.frequencies:
            exact = np.array(true.target(asked.name).frequencies)
            levels.append(0.5 * float(np.abs(exact - np.array(asked.frequencies)).sum()))
    return {
        "usable_targets": len(other.names),
        "correlation": float(np.corrcoef(mine, found)[0, 1]),
        "share_error_rms": float(np.sqrt(np.mean((mine - found) ** 2))),
        "shortcuts_exact": len(hidden),
        "shortcuts_missed": len(hidden - seen),
        "hidden_without_reason": len(seen - hidden),
        "pairs": len(pairs),
        "worth_of_records": float(np.mean(worth)),
        "level_frequencies_off": float(np.mean(levels)),
    }


def measure(
    exact: dict[tuple[int, int], Counts],
    true: Schema,
    dictionary: Dictionary,
    privacy: PrivacyConfig,
    questions: QuestionsConfig,
    sites: int,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for bins, pair_bins in BINS:
        settings = privacy.model_copy(update={"schema_bins": bins, "schema_pair_bins": pair_bins})
        counts = exact[bins, pair_bins]
        draws: list[dict[str, float]] = []
        for seed in range(DRAWS):
            try:
                made = derive_schema(
                    noised(counts, settings, sites, np.random.default_rng(seed)), dictionary, questions
                )
            except RegistryError:
                continue
            draws.append(compared(true, made))
        scales = count_scales(counts.layout, settings.schema_noise_multiplier)
        rows.append(
            {"bins": bins, "pair_bins": pair_bins, "counts": counts.layout.size, "draws": len(draws)}
            | {"site_noise_bins": round(scales[0], 1), "site_noise_cells": round(scales[1], 1)}
            | {key: round(float(np.mean([draw[key] for draw in draws])), 4) for key in (draws[0] if draws else {})}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    config = load_run(Path("demo-private"))
    registry = federation.load_registry(config)
    parts = federation.divide(registry, config)
    training = split_rows(registry, bytes.fromhex(federation.split_key(config)))["train"]
    rows = np.concatenate([part[np.isin(part, training)] for part in parts])
    values = {name: column[rows] for name, column in registry.values.items()}
    dictionary, privacy, questions = registry.dictionary, config.privacy, config.questions
    results: dict[str, Any] = {}
    for times in (1, 10):
        exact = {
            (bins, pair_bins): count(
                values,
                dictionary,
                resolution(privacy.model_copy(update={"schema_bins": bins, "schema_pair_bins": pair_bins})),
            )
            for bins, pair_bins in (EXACT_BINS, *BINS)
        }
        exact = {key: Counts(one.dictionary, one.vector * times, one.resolution) for key, one in exact.items()}
        true = derive_schema(exact[EXACT_BINS], dictionary, questions)
        results[f"{len(rows) * times}_patients"] = measure(exact, true, dictionary, privacy, questions, len(parts))
    print(record("noised_schema", results))


if __name__ == "__main__":
    main()
