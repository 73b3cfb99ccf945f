"""A run's results as `write_report` takes them: made up, consistent with each other, any text where text is free."""

from typing import Any

import numpy as np
from wardround.common.config import RunConfig
from wardround.common.statistics import CHANCE_UNIT, Tally
from wardround.server.evaluate import evaluate
from wardround.server.provenance import provenance

FEATURES = {
    "Laboratory": ["Albumin", "Bilirubin", "Creatinine", "Sodium", "White blood cells", "PaO2/FiO2"],
    "Vital signs": ["Heart rate", "Mean arterial pressure", "Respiratory rate", "Temperature"],
    "Patient": ["Age", "Sex", "Years of education", "Race"],
    "Comorbidity": ["Diabetes", "Dementia", "Cancer"],
    "Diagnosis": ["Disease group", "Coma score", "Sepsis"],
    "Outcome": ["Hospital death", "Death within 6 months"],
}


def tally_of(n: int, seed: int) -> Tally:
    """n questions over FEATURES; three models with shared luck."""
    rng = np.random.default_rng(seed)
    targets = [feature for group in FEATURES.values() for feature in group]
    tally = Tally.empty(targets, ["base", "warmup", "final"])
    share = rng.dirichlet(np.full(len(targets), 2.0))
    for row in rng.choice(len(targets), n, p=share):
        luck, bits = rng.random() * 0.8, 0
        for bit, accuracy in enumerate((0.42, 0.36, 0.44, 0.46)):
            bits |= int(luck + rng.random() * 0.2 < accuracy) << bit
        tally.patterns[row, bits] += 1
        tally.chance[row] += CHANCE_UNIT // (2 if row % 3 == 0 else 5)
        tally.boxed[row] += [rng.random() < 0.7, 1, 1]
        tally.length[row] += rng.integers(10, 48, 3)
    return tally


def case(
    *, text: str = "", rounds: int = 4, public: bool = True, reasoning: bool = True, warmup: bool = True
) -> dict[str, Any]:
    """Keyword arguments of `write_report`; `text` is appended wherever a text is free, to test escaping."""
    rng = np.random.default_rng(7)
    config = RunConfig.model_validate(
        {
            "name": "demo",
            "privacy": {"enabled": False},
            "seed": 17,
            "questions": {"reasoning_tokens": 48 if reasoning else 0},
            "grpo": {"expectation": "sampled" if reasoning else "exact"},
            "federation": {"rounds": rounds},
        }
    )
    sections = {feature + text: name + text for name, group in FEATURES.items() for feature in group}
    counts = tally_of(320, seed=3)
    counts = Tally(tuple(sections), counts.models, counts.patterns, counts.chance, counts.boxed, counts.length)
    sites = [f"hospital-{i + 1}" for i in range(4)]
    records: list[dict[str, Any]] = []
    best = 0
    for index in range(1, rounds + 1):
        rolled_back = index == 3
        best = best if rolled_back else index
        histogram = rng.multinomial(128, np.r_[0.22, np.full(6, 0.09), 0.24] if index % 2 else np.full(8, 1 / 8))
        records.append(
            {
                "round": index,
                "site_count": 4,
                "sites": sites,
                "questions": 128,
                "completions": 896,
                "reward_mean": 0.5 - 0.06 * 0.8**index,
                "boxed_rate": 0.95,
                "completion_tokens_mean": 31.0,
                "reward_histogram": histogram.tolist(),
                "steps": 16,
                "seconds": 121.4 + index,
                "seconds_train": 90.0,
                "bytes_up": 13_800_000,
                "bytes_down": 14_000_000,
                "update_norm_l2": 0.2,
                "clipped": 0,
                "validation_accuracy": 0.40 if rolled_back else 0.48 - 0.049 * 0.7**index,
                "validation_questions": 160,
                "rolled_back": rolled_back,
                "kept_round": best,
                "failures": {"hospital-3" + text: "silent"} if index == 2 else {},
                "model_digest": "a" * 64,
            }
        )
    facts = provenance(
        config,
        base_digest="b" * 64,
        adapter_digest="a" * 64,
        schema_digest="5" * 64,
        dictionary_digest="d" * 64,
        sites=4,
        rounds_run=rounds,
        kept_round=best,
        questions_trained=128 * rounds,
        simulated=True,
        public=public,
    )
    question = (
        "Record\nVital signs: Heart rate 118 /min; Mean arterial pressure 61 mmHg\nLaboratory: Albumin 2.9 g/dL; "
        "Creatinine 1.9 mg/dL\n\nWhat would be the masked value of 'Bilirubin' in section Laboratory?\n"
        "A. 0.5 mg/dL\nB. 1.2 mg/dL\nC. 2.9 mg/dL\nD. 7.0 mg/dL\nE. 12.4 mg/dL"
    )
    said = "Let's think step by step. The patient is hypotensive with a raised creatinine, which fits early "
    said += "multi-organ failure, so a moderately raised value is likely. Therefore, the answer is \\boxed{C}"
    samples = [
        {
            "site": sites[i % 4] + text,
            "target": "Bilirubin",
            "section": "Laboratory" + text,
            "text": question + text,
            "options": ["0.5", "1.2", "2.9", "7.0", "12.4"],
            "answer": "C",
            "models": {
                "base": {"chosen": "A" if i else "–", "text": "The answer is A A A A A A A" + text},
                "final": {"chosen": "C" if i != 1 else "D", "text": said + text},
            },
        }
        for i in range(3)
    ]
    trained = {
        "source": "released",
        "binding_before": 0.34,
        "binding_after": 0.99,
        "binding_questions": 200,
        "questions_trained": 1280,
        "seconds": 481.2,
        "machine": "2 cores, no GPU" + text,
    }
    return {
        "evaluation": evaluate(counts, 4, sections, 2000, seed=17),
        "rounds": records,
        "config": config,
        "provenance": {**facts, "registry": "support_icu" + text, "commit": None, "verified": {"probes": 3}},
        "run": {
            "name": "demo",
            "privacy": {"enabled": False},
            "dictionary": {"name": "support_icu", "title": "SUPPORT ICU" + text, "public": public},
            "sites": {
                site + text: {"rounds": rounds if i < 4 else 0, "has_final": i != 2}
                for i, site in enumerate([*sites, "hospital-5"])
            },
            "training_patients": 4010,
            "losses": [
                {"phase": "warm-up", "round": 0, "site": "node 7", "code": "protocol"},
                {"phase": "train", "round": 2, "site": "hospital-3" + text, "code": "silent"},
                {"phase": "finalize", "round": rounds, "site": "hospital-3" + text, "code": "silent"},
            ],
            "warmup": trained if warmup else {"source": "none"},
            "baseline": {"accuracy": 0.431, "questions": 160},
            "samples": samples,
        },
        "privacy": {"enabled": False, "statement": "Differential privacy was off: no patient-level guarantee."},
        "schema": {
            "targets": [{"name": name} for name in sections],
            "unusable": {"Height": "too few"},
            "rows": 4004,
            "shortcuts": {"Creatinine" + text: ["Urea" + text, "AKI stage"], "Sex" + text: []},
        },
    }
