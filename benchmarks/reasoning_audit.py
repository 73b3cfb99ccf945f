"""Precision and recall of the automatic flags of reasoning on planted truths: python benchmarks/reasoning_audit.py

Texts with and without one planted defect (simulations/planted_reasoning.py) over questions of the three open registries
and the synthetic one, in the wordings that the rules were changed on and in those held out. Writes
benchmarks/results/reasoning_audit.json. Target: on the held-out wordings every flag has precision and recall of at
least 0.9. Both sets of wordings are by the author of the rules: on another writer's text expect less.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
from environment import record
from wardround.common.question import load_prompt
from wardround.common.reasoning import KINDS, Flag, audit
from wardround.simulations.planted_reasoning import PLANTS, Planted, measure, open_questions, plant
from wardround.simulations.registries import NAMES

QUESTIONS = 1000  # a registry and prompt; Copenhagen has 518 patients, the synthetic registry 600
PROMPTS = ("en", "en_short", "en_usual")
TARGET = 0.9


def written(held_out: bool) -> list[Planted]:
    """Texts over every registry and prompt."""
    texts: list[Planted] = []
    for index, (prompt, name) in enumerate((p, n) for p in PROMPTS for n in (*NAMES, "synthetic")):
        rng = np.random.default_rng([index, held_out])
        template = load_prompt(prompt)
        questions, dictionary = open_questions(name, template, QUESTIONS, rng)
        texts += plant(questions, template, dictionary, held_out=held_out, rng=rng)
    return texts


def measured(held_out: bool) -> dict[str, Any]:
    """Figures of one set of wordings, and milliseconds a text."""
    texts = written(held_out)
    start = time.perf_counter()
    flags: list[list[Flag]] = [audit(text.record, text.text) for text in texts]
    seconds = time.perf_counter() - start
    found = measure(texts, flags)
    return {
        "texts": len(texts),
        "clean_texts": sum(text.plant == "clean" for text in texts),
        "clean_texts_flagged": found["clean"].raised,
        "flags": {
            kind: {
                "planted": found[kind].planted,
                "recall": round(found[kind].recall, 4),
                "raised": found[kind].raised,
                "precision": round(found[kind].precision, 4),
            }
            for kind in KINDS
        },
        "recall_by_plant": {name: [found[name].planted, round(found[name].recall, 4)] for name in PLANTS},
        "ms_per_text": round(1000 * seconds / len(texts), 2),
    }


def main() -> int:
    result = {"tuned_wordings": measured(False), "held_out_wordings": measured(True)}
    met = all(min(f["recall"], f["precision"]) >= TARGET for f in result["held_out_wordings"]["flags"].values())
    path = record("reasoning_audit", {**result, "targets_met": {f"held out: all >= {TARGET}": met}})
    print(json.dumps(result, indent=2))
    print(f"written to {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
