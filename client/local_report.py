"""A site's own report of a run's evaluation: its accuracies and its sample questions, for the hospital's own eyes.

Run by the site when it has scored its test patients. Enters: its own counts, and questions with both models' texts.
Leaves: nothing; `state/runs/<run id>/report.html` has mode 0600, for samples are records of patients. The coordinator's
report shows pooled results, and samples of open registries only.

One page: no script, nothing loaded, every text escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.files import write_atomic
from ..common.statistics import MAJORITY, Tally

_LABELS = {"base": "base", "warmup": "warmed up", "final": "final", MAJORITY: "always the most frequent option"}
_STYLE = """
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { padding: .25rem .75rem; text-align: left; border-bottom: 1px solid #8886 }
td { font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; background: #8881; padding: .75rem }
"""


def write(
    path: Path,
    *,
    site: str,
    run_id: str,
    tally: Tally,
    labels: Mapping[str, str],
    samples: Sequence[Mapping[str, Any]],
    answer_only: bool,
    tasks: Sequence[tuple[str, Mapping[str, NDArray[np.bool_]]]] = (),
) -> None:
    """Writes the page, whole or not at all, for its owner alone.

    Args:
        path: report.html.
        site: this site's name.
        run_id: the run.
        tally: this site's own counts.
        labels: target → what a person calls it.
        samples: questions with each model's choice and text.
        answer_only: models are scored by letters alone; a sample's text was asked for beside.
        tasks: of the run, each with its title and which answers of each model were right.
    """
    names = (*tally.models, MAJORITY)
    total = int(tally.n.sum())
    rows = [(_label(name), f"{int(tally.correct(name).sum())} of {total}") for name in names]
    by_target = [
        (labels.get(target, target), str(tally.n[row]), *(str(tally.correct(name)[row]) for name in names))
        for row, target in enumerate(tally.targets)
        if tally.n[row]
    ]
    parts = [
        f"<h1>{escape(site)}: own test patients</h1>",
        f"<p>Run {escape(run_id)}. This page stays at this hospital: samples are records of its patients.</p>",
        _table("Right answers", ("model", "right"), rows),
        "<details><summary>By feature</summary>",
        _table("Questions, and how many were answered right", ("feature", "questions", *map(_label, names)), by_target),
        "</details>",
        _table(
            "Tasks: right answers",
            ("task", *map(_label, tally.models)),
            [
                (title, *(f"{int(right[name].sum())} of {len(right[name])}" for name in tally.models))
                for title, right in tasks
            ],
        )
        if tasks
        else "",
        "<h2>Sample questions</h2>" if samples else "",
        *(_sample(sample, labels, answer_only) for sample in samples),
    ]
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>wardround: {escape(site)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
    write_atomic(path, page.encode())


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def _table(caption: str, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(word)}</th>' for word in heading)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _sample(sample: Mapping[str, Any], labels: Mapping[str, str], answer_only: bool) -> str:
    scored = "scored: letters only, no text" if answer_only else "scored: the answer its text ends in"
    before = "asked to think aloud, not scored:" if answer_only else "its text:"
    said = "".join(
        f"<p><strong>{escape(_label(name))}</strong> chose {escape(answer['chosen'])} ({scored})</p>"
        + (f"<p>{before}</p><pre>{escape(answer['text'])}</pre>" if answer["text"] else "")
        for name, answer in sample["models"].items()
    )
    return (
        f"<h3>{escape(labels.get(sample['target'], sample['target']))}</h3><pre>{escape(sample['text'])}</pre>"
        f"<p>True answer: <strong>{escape(sample['answer'])}</strong></p>{said}"
    )
