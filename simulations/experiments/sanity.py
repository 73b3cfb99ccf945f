"""Does training find what is there, and nothing else? A registry with a known graph, against the best answer.

Run on one machine, by `wardround simulate experiment sanity`; no patient: rows are drawn from the small graph below,
and the accuracy of the best possible answer (Bayes-optimal: the likeliest value given everything the record shows)
follows from it by adding up the whole joint distribution. Every value of a feature is equally frequent, so on features
that depend on nothing no answer is better than chance, and a model that is has seen what it must not see.

    signal_a ─► reading_a      the same level with probability 0.8, else another
    signal_b ─► reading_b      the opposite, with probability 0.85: nothing to be copied
    signal_c, signal_d ─► reading_cd    the pair's own level with probability 0.75, else another
    noise_e, noise_f           nothing

The public warm-up teaches none of it: it has other words, and copying helps with `reading_a` alone. The shipped config
trains a small random model, which must learn the words as well; `sanity-smollm2` the real one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ...client.questions import QuestionBuilder
from ...common.config import RunConfig
from ...common.counts import count
from ...common.dictionary import Dictionary, Feature, dump_dictionary
from ...common.files import write_atomic
from ...common.question import load_prompt
from ...common.schema import derive_schema
from ...common.seeds import derive_seed
from ...server.tracking import Progress
from .. import small_model
from ..federation import load_registry, simulate

N_PATIENTS = 12_000
NEEDED_SHARE = 0.8  # of the way from chance to the best answer, by every feature that depends on something

SAME, OPPOSITE, PAIR = 0.8, 0.85, 0.75
# Levels of each feature, in the order in which rows are drawn.
LEVELS: Mapping[str, tuple[str, ...]] = {
    "signal_a": ("red", "white", "blue"),
    "reading_a": ("red", "white", "blue"),
    "signal_b": ("yes", "no"),
    "reading_b": ("yes", "no"),
    "signal_c": ("high", "low"),
    "signal_d": ("high", "low"),
    "reading_cd": ("north", "east", "south", "west"),
    "noise_e": ("first", "second", "third"),
    "noise_f": ("left", "right"),
}
LABELS: Mapping[str, str] = {
    "signal_a": "Signal colour",
    "reading_a": "Flag colour",
    "signal_b": "Valve open",
    "reading_b": "Alarm on",
    "signal_c": "Oil pressure",
    "signal_d": "Water pressure",
    "reading_cd": "Wind direction",
    "noise_e": "Queue place",
    "noise_f": "Entrance side",
}
INDEPENDENT = ("noise_e", "noise_f")
DEPENDENT = tuple(name for name in LEVELS if name not in INDEPENDENT)


def make(n_patients: int, seed: int) -> tuple[pd.DataFrame, Dictionary]:
    """The registry: one row a patient, and its dictionary."""
    rng = np.random.default_rng([seed, 0x5A71])
    drawn = {name: rng.integers(len(levels), size=n_patients) for name, levels in LEVELS.items()}
    drawn["reading_a"] = _noisy(rng, drawn["signal_a"], 3, SAME)
    drawn["reading_b"] = _noisy(rng, 1 - drawn["signal_b"], 2, OPPOSITE)
    drawn["reading_cd"] = _noisy(rng, 2 * drawn["signal_c"] + drawn["signal_d"], 4, PAIR)
    columns = {"patient": np.arange(n_patients).astype(str)}
    columns.update({name: np.array(LEVELS[name])[values] for name, values in drawn.items()})
    features = (
        Feature(name="patient", label="Patient", role="id"),
        *(
            Feature(name=name, label=LABELS[name], section="Machine", levels={level: level for level in levels})
            for name, levels in LEVELS.items()
        ),
    )
    dictionary = Dictionary(
        name="sanity", title="Synthetic registry with a known graph", public=True, features=features
    )
    return pd.DataFrame(columns), dictionary


def _noisy(rng: np.random.Generator, level: np.ndarray, n_levels: int, kept: float) -> np.ndarray:
    """`level` with probability `kept`, else one of the others, all equally likely."""
    other = (level + rng.integers(1, n_levels, size=len(level))) % n_levels
    return np.where(rng.random(len(level)) < kept, level, other)


def best_accuracy(target: str) -> float:
    """Accuracy of the likeliest value of `target` given all other features: Σ over contexts of the largest joint mass.

    >>> round(best_accuracy("reading_a"), 6), round(best_accuracy("noise_f"), 6)
    (0.8, 0.5)
    """
    names = list(LEVELS)
    place = names.index(target)
    largest: dict[tuple[int, ...], float] = {}
    for cell, mass in _joint().items():
        context = cell[:place] + cell[place + 1 :]
        largest[context] = max(largest.get(context, 0.0), mass)
    return sum(largest.values())


@cache
def _joint() -> dict[tuple[int, ...], float]:
    """Probability of every combination of levels."""

    def noisy(level: int, meant: int, n_levels: int, kept: float) -> float:
        return kept if level == meant else (1 - kept) / (n_levels - 1)

    result: dict[tuple[int, ...], float] = {}
    for cell in itertools.product(*(range(len(levels)) for levels in LEVELS.values())):
        value = dict(zip(LEVELS, cell, strict=True))
        mass = 1.0
        for name in ("signal_a", "signal_b", "signal_c", "signal_d", *INDEPENDENT):
            mass /= len(LEVELS[name])
        mass *= noisy(value["reading_a"], value["signal_a"], 3, SAME)
        mass *= noisy(value["reading_b"], 1 - value["signal_b"], 2, OPPOSITE)
        mass *= noisy(value["reading_cd"], 2 * value["signal_c"] + value["signal_d"], 4, PAIR)
        result[cell] = mass
    return result


def compare(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment's result from a run's evaluation.json.

    Returns:
        "features": one entry each with n, accuracy, ci95, warmup, chance, best, and "share": how much of the way from
        chance to the best answer was gone (None for features that depend on nothing); "passed".
    """
    features: dict[str, Any] = {}
    for name, levels in LEVELS.items():
        group, chance = evaluation["by_feature"][name], 1 / len(levels)
        final, best = group["final"], best_accuracy(name)
        share = (final["accuracy"] - chance) / (best - chance) if name in DEPENDENT else None
        low, high = final["ci95"]
        features[name] = {
            "n": final["n"],
            "accuracy": final["accuracy"],
            "ci95": final["ci95"],
            "warmup": group["warmup"]["accuracy"],
            "chance": chance,
            "best": best,
            "share": share,
            "passed": low <= chance <= high if share is None else share >= NEEDED_SHARE,
        }
    return {"features": features, "needed_share": NEEDED_SHARE, "passed": all(f["passed"] for f in features.values())}


def _texts(config: RunConfig) -> list[str]:
    """Questions about the first rows, for the small model's words: every level and label is among them."""
    registry, template = load_registry(config), load_prompt(config.model.prompt)
    schema = derive_schema(count(registry.values, registry.dictionary), registry.dictionary, config.questions)
    builder = QuestionBuilder(registry, schema, template, config.questions)
    return small_model.texts_of(template, builder.build(np.arange(300), np.random.default_rng(0)))


def run(
    config: RunConfig,
    out: Path,
    *,
    resume: bool,
    progress: Progress | None = None,
    n_patients: int = N_PATIENTS,
    simulated: Callable[..., dict[str, Any]] = simulate,
) -> dict[str, Any]:
    """Makes the registry in OUT/registry, trains on it in OUT/run, writes OUT/sanity.json.

    Args:
        config: of the run; its registry is replaced by the experiment's own.
        out: a folder.
        resume: continue the run in it.
        progress: as `simulate`.
        n_patients: of the registry.
        simulated: `simulate`.
    """
    table, dictionary = make(n_patients, derive_seed(config.seed, "sanity registry"))
    folder = out / "registry"
    begun = (out / "run").exists()  # by another config perhaps, which is refused below: nothing is written over
    if not begun:
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / "table.parquet", index=False)
        write_atomic(folder / "dictionary.toml", dump_dictionary(dictionary).encode(), mode=0o644)
    source = {"registry": str(folder / "table.parquet"), "dictionary": str(folder / "dictionary.toml")}
    settings = config.model_copy(update={"simulation": config.simulation.model_copy(update=source)})
    if config.model.id == small_model.SMALL:
        made = out / small_model.SMALL
        if not begun:
            small_model.make(made, _texts(settings), seed=derive_seed(config.seed, "sanity model"))
        settings = settings.model_copy(update={"model": config.model.model_copy(update={"id": str(made)})})
    result = compare(simulated(settings, out / "run", resume=resume, progress=progress))
    write_atomic(out / "sanity.json", (json.dumps(result, indent=1) + "\n").encode(), mode=0o644)
    return result
