"""The card of an evaluation, in the order of TRIPOD-LLM's items (Gallifant et al. 2025, Nature Medicine 31:60-69).

Role: where an evaluation's files are written. Enters: content of evaluation.json. Leaves: Markdown. An item is filled
where evaluation and provenance hold the answer; everything else is for the authors, and the card says so. Nothing is
made up, and an item is called not applicable only where that follows from how wardround evaluates. Items are named in
our own words; for a submission the official checklist counts (https://tripod-llm.vercel.app).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from ..common.findings import percent
from ..common.scored import MAJORITY
from ..common.subgroups import shown_direction
from .evaluate import LABELS, interval
from .evaluation_report import facts, headline, review, task_facts, title, worse_at_sites
from .evaluation_tables import difference, label, number, pair_of

_FILL = "**For the authors:** "
_ITEM = re.compile(r"^### (\S+) ([^\n]*)\n(.*?)(?=^#|\Z)", re.MULTILINE | re.DOTALL)


def evaluation_card(evaluation: Mapping[str, Any]) -> str:
    """The card as Markdown, every item of TRIPOD-LLM in its place.

    Args:
        evaluation: content of evaluation.json.
    """
    tasks = {_title(evaluation, task): task for task in evaluation["tasks"]}
    others = dict.fromkeys(model for task in tasks.values() for model in task["models"] if model != task["final"])
    body = _template().render(
        fill=_FILL,
        version=plain(evaluation["wardround"]),
        finals=_named(dict.fromkeys(task["final"] for task in tasks.values())),
        names=_named(tasks),
        others=_named(others),
        headline=plain(headline(evaluation["tasks"])),
        asked=sum(task["n"] for task in tasks.values()),
        n_tasks=len(tasks),
        sources=_told(evaluation, "registries") or _list(_registries(evaluation)),
        models=_told(evaluation, "models", "base_model", "base_digest"),
        settings=_told(evaluation, "settings", "questions", "samples", "seed"),
        prompts=_told(evaluation, "prompt", "prompts"),
        compute=_told(evaluation, "machine", "hardware", "seconds"),
        code=_told(evaluation, "commit", "versions") or f"- wardround {plain(evaluation['wardround'])}",
        review=_review(evaluation["review"]),
        counts=_list(f"{name}: {_asked(task)}" for name, task in tasks.items()),
        flow=_list(
            f"{name}: {_asked(task)}; groups of fewer than {task['min_cell']} patients are not reported"
            for name, task in tasks.items()
        ),
        groups=_list(_groups(tasks)),
        outcomes=_list(f"{name}: {_events(task)}" for name, task in tasks.items()),
        performance=[[plain(cell) for cell in row] for name, task in tasks.items() for row in _rows(name, task)],
        said=_list(f"{name}: {task['findings'][0]}" for name, task in tasks.items() if task["findings"]),
        federated=_federated(evaluation["federated"]),
        fairness=_fairness(tasks, list(worse_at_sites(evaluation["federated"]))),
        limits=_list(f"{name}: {task['power']['sentence']}" for name, task in tasks.items()),
    )
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    items = _ITEM.findall(body)
    whole = [place for place, _, text in items if text.strip().startswith(_FILL)]
    part = [place for place, _, text in items if _FILL in text and place not in whole]
    return (
        f"# {plain(title(evaluation))}: evaluation card\n\n"
        f"Made by wardround {plain(evaluation['wardround'])} from an evaluation.json of schema "
        f"{evaluation['evaluation_schema']}, in the order of the items of TRIPOD-LLM (Gallifant et al. 2025, "
        "doi:10.1038/s41591-024-03425-5), named here in our own words. What no file holds is marked as for the "
        "authors, and nothing is filled in for them. Research software: not a medical device; nothing here is advice "
        f"about a patient.\n\nOf {len(items)} items, {len(whole)} are left to the authors ({', '.join(whole)}) and "
        f"{len(part)} need their word besides ({', '.join(part)}).\n\n{body}\n"
    )


def plain(value: object) -> str:
    """A text of a user's as one line that Markdown shows as it is.

    >>> print(plain("a|b <b>c"))
    a\\|b \\<b\\>c
    """
    return re.sub(r"([\\`*\[\]<>|#~])", r"\\\1", " ".join(str(value).split()))


def _named(names: Mapping[str, Any]) -> str:
    return ", ".join(plain(name) for name in names)


def _list(sentences: Iterator[str] | Sequence[str]) -> str:
    return "\n".join(f"- {plain(sentence)}" for sentence in sentences)


def _told(evaluation: Mapping[str, Any], *keys: str) -> str:
    """What provenance holds under some keys, as a list; "" where it holds none."""
    held = {key: evaluation["provenance"][key] for key in keys if key in evaluation["provenance"]}
    return _list([f"{name}: {text}" for name, text in facts(held)])


def _title(evaluation: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    """The task's title; its name besides where another task has the same one."""
    titles = [str(task_facts(evaluation, one["name"]).get("title") or one["name"]) for one in evaluation["tasks"]]
    own = str(task_facts(evaluation, task["name"]).get("title") or task["name"])
    return own if titles.count(own) == 1 else f"{own} ({task['name']})"


def _registries(evaluation: Mapping[str, Any]) -> list[str]:
    found = [task_facts(evaluation, task["name"]).get("registry") for task in evaluation["tasks"]]
    return [f"registry: {name}" for name in dict.fromkeys(found) if name is not None]


def _asked(task: Mapping[str, Any]) -> str:
    return f"{task['n']:,} questions about {task['patients']:,} patients"


def _events(task: Mapping[str, Any]) -> str:
    event = task["models"][task["final"]]["event"]
    happened = "" if event is None else f", {event['events']:,} events in {event['n']:,} questions"
    return f"{task['patients']:,} patients{happened}"


def _groups(tasks: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """How many patients of each reported stratum were asked about."""
    for name, task in tasks.items():
        for axis, table in task["subgroups"]["axes"].items():
            if table["strata"]:
                strata = ", ".join(f"{row['stratum']} {row['patients']:,}" for row in table["strata"])
                yield f"{name}, patients by {axis}: {strata}"


def _rows(name: str, task: Mapping[str, Any]) -> Iterator[list[str]]:
    """Rows of the table of performance: every model, the majority option, chance."""
    told: Mapping[str, Any] = {**task["models"], MAJORITY: task["majority"]}
    for model, one in told.items():
        event = one.get("event")
        change = difference(pair_of(task, model, task["reference"]))
        area = number(None if event is None else event["auroc"], 2)
        yield [
            name,
            label(model),
            f"{percent(one['accuracy']['value'])} ({interval(one['accuracy']['ci95'])})",
            f"{change[0]} ({change[1]})" if change[0] else "",
            f"{area[0]} ({area[1]})" if area[0] else "",
        ]
    yield [name, "chance", percent(task["chance"]), "", ""]


def _review(found: Mapping[str, Any]) -> str:
    """What raters preferred, a list for people and one for programs; "" where there was no review."""
    told = review(found)
    if told is None:
        return ""
    parts = [plain(f"{told['said']} {told['nobody']}")]
    for words, said in told["kinds"]:
        figures = [f"{name}: {text}" for name, text in said["rows"]]
        parts.append(f"{plain(words)}:\n\n{_list([*figures, *said['impossible']])}")
    return "\n\n".join(parts)


def _federated(found: Mapping[str, Any]) -> str:
    """What the sites' own test patients gave; "" where the model is of no run."""
    if not found:
        return ""
    figures = ", ".join(
        f"{LABELS.get(name, name)} {percent(one['value'])} ({interval(one['ci95'])})"
        for name, one in found["models"].items()
    )
    about, sites = "about " if found["noise"] else "", "simulated sites" if found["simulated"] else "sites"
    asked = f"{about}{found['n']:,} questions, one a patient, at {found['sites']} {sites} of run {found['run']}"
    tasks = [f"{told['title']}: {text}" for told in found["tasks"] for text in told["findings"]]
    told = _list([f"accuracy: {figures}; chance {percent(found['chance'])}", *found["findings"], *tasks])
    return f"From sums over the sites' own test patients ({plain(asked)}), apart from the table:\n\n{told}"


def _fairness(tasks: Mapping[str, Mapping[str, Any]], at_sites: Sequence[str]) -> str:
    """What got worse, by name; or that nothing is shown to have."""
    worse: list[str] = []
    for name, task in tasks.items():
        pair = pair_of(task, task["final"], task["reference"])
        if pair is not None and shown_direction(dict(pair)) < 0:
            worse.append(f"{name}: worse as a whole than {task['reference']}")
        for row in task["subgroups"]["worse"]:
            size = f"{100 * abs(row['difference']):.1f} points"
            worse.append(f"{name}: worse with {row['axis']} '{row['stratum']}' by {size} (n = {row['n']:,})")
    worse += at_sites
    tested = sum(len(table["strata"]) for task in tasks.values() for table in task["subgroups"]["axes"].values())
    if worse or not tested:
        return _list(worse) or "No subgroup was looked at."
    if all(task["final"] == task["reference"] for task in tasks.values()):
        return f"Accuracy is told of {tested} subgroups; without a reference nothing is said of change."
    return f"Of {tested} subgroups none is shown worse than before, which small ones may hide."


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # Markdown: values are escaped by `plain`
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("evaluation_card.md.j2")
