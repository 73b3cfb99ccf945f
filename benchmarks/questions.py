"""Questions rendered a second, and schema counts of a large registry: python benchmarks/questions.py

One core. Each part runs in a fresh process, so that its peak memory is its own; tables are synthetic. Writes
benchmarks/results/questions.json. Targets: at least 10,000 questions/s with all 50 features shown (100,000 patients),
counts of 1,000,000 × 50 in at most 60 s and 4 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
from environment import peak_rss_bytes, record
from numpy.typing import NDArray
from wardround.client.questions import QuestionBuilder
from wardround.client.registry import Registry
from wardround.common.config import QuestionsConfig
from wardround.common.counts import count, grid
from wardround.common.dictionary import Dictionary, Feature
from wardround.common.question import load_prompt
from wardround.common.schema import derive_schema

FEATURES = 50
PATIENTS = 100_000
COUNTED_ROWS = 1_000_000
QUESTIONS = 20_000
REPEATS = 3


def synthetic(rows: int) -> Registry:
    """35 numbers and 15 categories that share one hidden factor, 5 % missing, and an outcome."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal(rows)
    features, values = [Feature(name="patient", label="Patient", role="id")], {}
    for k in range(FEATURES):
        section = f"Section {k // 10 + 1}"
        missing = rng.random(rows) < 0.05
        if k % 10 < 7:
            name = f"number_{k:02d}"
            feature = Feature(
                name=name,
                label=f"Number {k}",
                kind="number",
                section=section,
                low=0,
                high=200,
                decimals=1,
                unit="mg/dL",
            )
            points = grid(feature)
            drawn = np.clip(points.index(100 + 12 * (hidden + rng.standard_normal(rows))), points.first, points.last)
            values[name] = np.where(missing, np.nan, points.value(drawn))
        else:
            name = f"level_{k:02d}"
            levels = {str(i): f"Level {i}" for i in range(6)}
            feature = Feature(name=name, label=f"Category {k}", section=section, levels=levels)
            drawn = np.clip(np.rint(hidden + 2.5 + rng.standard_normal(rows)), 0, 5)
            values[name] = np.where(missing, -1, drawn).astype(np.int16)
        features.append(feature)
    features.append(
        Feature(
            name="died", label="Death", role="outcome", section="Outcome", levels={"0": "No", "1": "Yes"}, known_at=7,
            question="Did the patient die in hospital?",
        )
    )  # fmt: skip
    values["died"] = (hidden > 1).astype(np.int16)
    patients: NDArray[Any] = np.arange(rows).astype(str).astype(object)
    return Registry(
        Dictionary(name="benchmark", title="Benchmark", public=True, features=tuple(features)), patients, values
    )


def render() -> dict[str, object]:
    """Questions a second, best of REPEATS and the median."""
    registry = synthetic(PATIENTS)
    settings = QuestionsConfig(features_per_record=FEATURES)
    schema = derive_schema(count(registry.values, registry.dictionary), registry.dictionary, settings)
    rows = np.random.default_rng(1).integers(PATIENTS, size=QUESTIONS)
    result: dict[str, object] = {"patients": PATIENTS, "features": FEATURES, "questions": QUESTIONS}
    for template in ("en", "en_short", "ko"):
        builder = QuestionBuilder(registry, schema, load_prompt(template), settings)
        speeds: list[float] = []
        for repeat in range(REPEATS):
            start = time.perf_counter()
            questions = builder.build(rows, np.random.default_rng(repeat))
            speeds.append(len(questions) / (time.perf_counter() - start))
        result[f"questions_per_s_{template}"] = round(float(np.median(speeds)))
    return result | {"peak_rss_bytes": peak_rss_bytes()}


def counts() -> dict[str, object]:
    """Seconds and peak memory (table included) of one site's schema counts."""
    registry = synthetic(COUNTED_ROWS)
    start = time.perf_counter()
    counted = count(registry.values, registry.dictionary)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    derive_schema(counted, registry.dictionary, QuestionsConfig())
    return {
        "rows": COUNTED_ROWS,
        "features": FEATURES,
        "count_s": round(seconds, 2),
        "derive_s": round(time.perf_counter() - start, 2),
        "vector_bytes": counted.vector.nbytes,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main() -> int:
    if len(sys.argv) > 1:
        print(json.dumps({"render": render, "counts": counts}[sys.argv[1]]()))
        return 0
    one_core = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    parts: dict[str, dict[str, Any]] = {
        name: json.loads(subprocess.check_output([sys.executable, __file__, name], env=one_core))
        for name in ("render", "counts")
    }
    met = {
        "questions_per_s >= 10000": parts["render"]["questions_per_s_en"] >= 10_000,
        "count_s <= 60": parts["counts"]["count_s"] <= 60,
        "count peak <= 4 GB": parts["counts"]["peak_rss_bytes"] <= 4e9,
    }
    path = record("questions", {**parts, "targets_met": met})
    print(json.dumps({**parts, "targets_met": met}, indent=2))
    print(f"written to {path}")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
