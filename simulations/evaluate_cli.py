"""`wardround evaluate` and `wardround ask`: what a model is worth, and what it says. Heavy imports inside commands.

`evaluate` without a table runs the suite over open registries (suite.py); with one, it scores a model on that registry,
which is how a hospital does it on its own patients (client/score.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..client.score import Request
    from ..common.config import RunConfig

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
_PATH = click.Path(path_type=Path)
_SPOKEN, _SAMPLES = 12, 1


@click.command(
    context_settings=_SETTINGS,
    epilog="Example: wardround evaluate runs/demo/model --out runs/demo/evaluation   ·   wardround evaluate "
    "runs/demo/model --out e --tasks support-mortality,smart-mace -n 500 --beside central=runs/central/model   ·   "
    "wardround evaluate --compare e1/evaluation.json e2/evaluation.json   ·   one registry: wardround evaluate "
    "runs/demo/model table.parquet support_icu --out score.json   ·   a hospital that took part: wardround evaluate "
    "model registry.csv dictionary.toml --site site.toml --out score.json",
)
@click.argument("model", required=False)
@click.argument("table", type=_PATH, required=False)
@click.argument("dictionary", type=_PATH, required=False)
@click.option("--out", type=_PATH, default=None, help="The suite's folder; with TABLE: where the JSON goes.")
@click.option(
    "-n", "--number", type=click.IntRange(1), default=None, help="Most questions. Default: 150 a task, 500 of TABLE."
)
@click.option("--tasks", default="", metavar="NAME,…", help="Suite: these only; names or .toml files. Default: all.")
@click.option("--base", default=None, help="Suite: what MODEL is compared with. Default: as its provenance says.")
@click.option("--beside", multiple=True, metavar="NAME=MODEL", help="Suite: one more model or adapter; repeatable.")
@click.option("--table", "files", multiple=True, metavar="NAME=FILE", help="Suite: file of registry ist_stroke.")
@click.option(
    "--spoken", type=click.IntRange(0), default=_SPOKEN, show_default=True, help="Suite: questions also put in words."
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=_SAMPLES,
    show_default=True,
    help="Suite: texts a question; they vote.",
)
@click.option("--calibrate", is_flag=True, help="Suite: base and final also without their liking for letters.")
@click.option("--no-tabular", is_flag=True, help="Suite: no logistic regression and gradient boosting beside.")
@click.option("--review", type=_PATH, default=None, help="Suite: a review's figures: server review stats STUDY --json.")
@click.option("--compare", "compared", nargs=2, type=_PATH, default=None, help="Two evaluation.json side by side.")
@click.option("--schema", type=_PATH, default=None, help="TABLE: a run's schema.json; else from its training patients.")
@click.option("--adapter", type=_PATH, default=None, help="TABLE: a peft adapter folder to put on MODEL.")
@click.option("--config", type=_PATH, default=None, help="Run config. Default: MODEL's run, else demo.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a config key; may be repeated.")
@click.option("--site", type=_PATH, default=None, help="TABLE: site.toml, this hospital's mapping and test patients.")
@click.option(
    "--export-harness", "harness", type=_PATH, default=None, help="TABLE: the questions as a task, docs/harness.md."
)
@click.option(
    "--inside-hospital", is_flag=True, help="That folder stays inside: needed where the registry is not open."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON and no progress; --out is written too.")
def evaluate(
    model: str | None,
    table: Path | None,
    dictionary: Path | None,
    out: Path | None,
    number: int | None,
    tasks: str,
    base: str | None,
    beside: tuple[str, ...],
    files: tuple[str, ...],
    spoken: int,
    samples: int,
    calibrate: bool,
    no_tabular: bool,
    review: Path | None,
    compared: tuple[Path, Path] | None,
    schema: Path | None,
    adapter: Path | None,
    config: Path | None,
    overrides: tuple[str, ...],
    site: Path | None,
    harness: Path | None,
    inside_hospital: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Evaluate MODEL (a folder, a packaged name or a cached id) on held-out patients.

    Without TABLE: the suite, all tasks over the open registries, beside its base model, logistic regression and
    gradient boosting; writes evaluation.json, report.html, card.md, and reasoning.jsonl and review.jsonl for experts.
    Of a run's model it also tells what the sites' own test patients gave.

    With TABLE and DICTIONARY: one question a test patient of that registry. Who is a test patient decides the
    hospital's own key with --site; else that of the simulated run which trained MODEL on this registry, which MODEL
    brings with it; else a public one, which is right only for a registry that MODEL was not trained on.
    """
    from ..client import score
    from ..common.errors import ConfigError

    if compared is not None:
        _compare(*compared, as_json)
        return
    if model is None or out is None:
        raise ConfigError("expected MODEL and --out, or --compare with two files; see wardround evaluate --help")
    if (table is None) != (dictionary is None):
        raise ConfigError(f"TABLE {table}: expected its DICTIONARY after it")
    settings = _settings(model, config, overrides)
    if table is not None and dictionary is not None:
        of_the_suite = {
            "--tasks": tasks, "--base": base, "--beside": beside, "--table": files, "--spoken": spoken != _SPOKEN,
            "--samples": samples != _SAMPLES, "--calibrate": calibrate, "--no-tabular": no_tabular, "--review": review,
        }  # fmt: skip
        _refuse(of_the_suite, "belongs to the suite, without TABLE")
        request = score.Request(
            table=table, dictionary=dictionary, config=settings, adapter=adapter, schema=schema, site=site,
            n_questions=number or 500, seed=seed, harness=harness, inside_hospital=inside_hospital,
        )  # fmt: skip
        _score(request, out, as_json)
        return
    _refuse(
        {"--schema": schema, "--adapter": adapter, "--site": site, "--export-harness": harness}, "belongs to a TABLE"
    )
    _suite(
        model, out, number or 150, [name.strip() for name in tasks.split(",") if name.strip()], base,
        _named("--beside", beside), _named("--table", files), spoken, samples, calibrate, not no_tabular, review,
        settings, seed, as_json,
    )  # fmt: skip


def _refuse(options: Mapping[str, object], why: str) -> None:
    from ..common.errors import ConfigError

    given = [name for name, value in options.items() if value]
    if given:
        raise ConfigError(f"{given[0]} {why}")


def _named(option: str, texts: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE pairs of a repeatable option."""
    from ..common.errors import ConfigError

    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option}: expected NAME=…, got '{text}'")
        if name in found:
            raise ConfigError(f"{option}: '{name}' is given twice")
        found[name] = value
    return found


def _settings(model: str, config: Path | None, overrides: Sequence[str]) -> RunConfig:
    """The run config: the given one, else that of the run whose folder MODEL lies in, else the demo's."""
    from ..client import score
    from ..common.config import load_run

    own = Path(model).parent / "config.resolved.toml"
    if config is None:
        config = own if (Path(model) / "provenance.json").is_file() and own.is_file() else Path("demo")
    return score.model_config(load_run(config, tuple(overrides)), model)


def _compare(first: Path, second: Path, as_json: bool) -> None:
    from ..common.evaluation_file import read_evaluation
    from ..server import compare

    result = compare.compare(read_evaluation(first), read_evaluation(second))
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        click.echo(f"A: {first}\nB: {second}")
        _console().print(compare.table(result))
        for note in compare.notes(result):
            click.echo(note)


def _suite(
    model: str,
    out: Path,
    number: int,
    names: Sequence[str],
    base: str | None,
    beside: Mapping[str, str],
    files: Mapping[str, str],
    spoken: int,
    samples: int,
    calibrate: bool,
    tabular: bool,
    review: Path | None,
    settings: RunConfig,
    seed: int,
    as_json: bool,
) -> None:
    from ..common.cli import limit_threads
    from ..common.errors import ConfigError
    from ..common.evaluation_file import read_review
    from ..common.files import check_writable
    from ..common.progress import progress_bar
    from ..common.tasks import load_tasks
    from . import registries

    if out.is_file():
        raise ConfigError(f"--out {out}: expected a folder, got a file")
    if (out / "run.json").is_file():
        raise ConfigError(f"--out {out}: the folder of a run, whose evaluation.json and report.html would be replaced")
    reviewed = {} if review is None else read_review(review)
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    limit_threads(settings.speed.threads)  # before torch is imported
    from . import suite as step

    asked = step.Request(
        model=model, base=base or step.base_of(model), beside=beside,
        tables={name: Path(file) for name, file in files.items()},
        tasks=load_tasks(names, (*registries.NAMES, *files)), config=settings, n_questions=number, spoken=spoken,
        samples=samples, calibrate=calibrate, tabular=tabular, seed=seed, review=reviewed,
    )  # fmt: skip
    prepared = step.prepare(asked, out)
    total, done = sum(prepared.work(exam) for exam in prepared.exams), 0
    with progress_bar("answers", total, quiet=as_json) as advance:

        def on_step(note: str, answered: int) -> None:
            nonlocal done
            done += answered
            advance(done, note)

        on_step("reading registries", 0)
        result, contrasts = step.run(prepared, out, on_step)
    _write_reports(result, contrasts, out)
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    _print_suite(result)
    made = ("evaluation.json", "report.html", "card.md", "reasoning.jsonl", "review.jsonl")
    click.echo("   ".join(str(out / name) for name in made if (out / name).exists()))


def _write_reports(result: Mapping[str, Any], contrasts: Mapping[str, Any], out: Path) -> None:
    from ..common.files import write_atomic
    from ..server.evaluation_card import evaluation_card
    from ..server.evaluation_report import write_evaluation_report

    write_evaluation_report(out / "report.html", result, contrasts=contrasts)
    write_atomic(out / "card.md", evaluation_card(result).encode(), mode=0o644)


def _print_suite(result: Mapping[str, Any]) -> None:
    """A table of all tasks and the findings of each."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from ..common.findings import points

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("task and model", "accuracy, %", "AUROC", "− reference"):
        shown.add_column(heading, justify="left" if heading.startswith("task") else "right", no_wrap=True)
    for task in result["tasks"]:
        pairs = {pair["model"]: pair for pair in task["paired"] if pair["against"] == task["reference"]}
        shown.add_row(f"[bold]{task['name']}[/bold]", f"n = {task['n']}")
        for name, told in {**task["models"], "majority option": task["majority"]}.items():
            low, high = told["accuracy"]["ci95"]
            event, pair = told.get("event"), pairs.get(name)
            difference = ""
            if pair is not None:
                below, above = pair["ci95"]
                difference = f"{points(pair['difference'])} ({points(below)} to {points(above)})"
            shown.add_row(
                f"  {name}",
                f"{100 * told['accuracy']['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})",
                "" if not event else f"{event['auroc']['value']:.3f}",
                difference,
            )
        shown.add_section()
    console = _console()
    console.print(shown)
    for task in result["tasks"]:
        console.print(f"[bold]{task['name']}[/bold]")
        for finding in task["findings"]:
            console.print(f"  {finding}", markup=False, highlight=False)
    if sums := result["federated"]:
        console.print(f"[bold]the sites' own test patients[/bold], run {escape(sums['run'])}")
        for finding in (*sums["findings"], *(text for task in sums["tasks"] for text in task["findings"])):
            console.print(f"  {finding}", markup=False, highlight=False)
    for registry, models in result["reasoning"].items():
        for name, flags in models.items():
            told = ", ".join(
                f"{kind} {number}" for kind, number in flags.items() if kind not in ("n", "any") and number
            )
            console.print(
                f"reasoning, {registry}, {name}: {flags['any']} of {flags['n']} texts flagged"
                + (f" ({told})" if told else ""),
                markup=False,
                highlight=False,
            )


def _score(request: Request, out: Path, as_json: bool) -> None:
    from ..client import score as step
    from ..common.cli import limit_threads
    from ..common.errors import ConfigError
    from ..common.files import check_writable
    from ..common.progress import progress_bar

    if out.is_dir():
        raise ConfigError(f"--out {out}: expected a file, got a folder")
    check_writable(out.parent)
    settings = request.config
    limit_threads(settings.speed.threads)  # before torch is imported
    exam = step.prepare(request)
    at_a_time = f"{settings.speed.micro_batch} at a time"
    with progress_bar("questions", len(exam.questions), quiet=as_json) as advance:
        advance(0, "loading the model")
        result = step.score(exam, lambda done: advance(done, at_a_time))
    step.write(out, result)
    if as_json:
        click.echo(json.dumps(result, indent=2, sort_keys=True))
    else:
        _print_score(result)
        click.echo(out)


def _print_score(result: Mapping[str, Any]) -> None:
    from rich.table import Table

    shown = Table(title=f"{result['n']} questions, one a test patient", title_justify="left")
    shown.add_column("")
    shown.add_column("accuracy", justify="right")
    shown.add_column("95 % interval", justify="right")
    for name in ("model", "majority"):
        low, high = result[name]["ci95"]
        shown.add_row(name, f"{result[name]['accuracy']:.1%}", f"{low:.1%} to {high:.1%}")
    shown.add_row("chance", f"{result['chance']:.1%}", "")
    _console().print(shown)


@click.command(
    context_settings=_SETTINGS,
    epilog='Example: echo \'{"age": 71, "sex": "Male", "crea1": 2.4}\' > record.json; wardround ask runs/demo/model '
    "record.json --dictionary support_icu --target hospdead",
)
@click.argument("model")
@click.argument("record", type=_PATH)
@click.option("--dictionary", required=True, type=_PATH, help="The record's dictionary: a file or a shipped name.")
@click.option("--target", required=True, help="What is asked: a feature or an outcome of the dictionary.")
@click.option("--option", "options", multiple=True, help="An option; repeat. Default: all levels, or quantiles.")
@click.option("--schema", type=_PATH, default=None, help="A run's schema.json. Default: that of MODEL's run, if any.")
@click.option("--words", type=click.IntRange(0), default=128, show_default=True, help="Most tokens of its reasoning.")
@click.option("--config", type=_PATH, default=None, help="Run config: prompt. Default: MODEL's run, or demo.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer as JSON.")
def ask(
    model: str,
    record: Path,
    dictionary: Path,
    target: str,
    options: tuple[str, ...],
    schema: Path | None,
    words: int,
    config: Path | None,
    as_json: bool,
) -> None:
    """Ask MODEL one question about one RECORD: its reasoning, and the probability of every option.

    RECORD is a JSON file of the dictionary's columns with their cells. The answer is a small model's guess for looking
    into the model, never advice on a patient.
    """
    from ..client import ask as step
    from ..client import score
    from ..common.cli import limit_threads
    from ..common.dictionary import load_dictionary
    from ..common.question import LETTERS, load_prompt

    settings, described = _settings(model, config, ()), load_dictionary(dictionary)
    limit_threads(settings.speed.threads)
    known = score.read_schema(schema) if schema is not None else None
    own = Path(model).parent / "schema.json"
    if known is None and own.is_file():
        found = score.read_schema(own)
        known = found if found.dictionary_digest == described.digest() else None
    template = load_prompt(settings.model.prompt)
    question = step.make_question(
        step.read_record(record), target, described, known, template, settings.questions, options
    )
    answer = step.ask(settings, question, template, words)
    if as_json:
        content = {"question": answer.question, "reasoning": answer.text}
        shares = dict(zip(answer.options, answer.probabilities, strict=True))
        click.echo(json.dumps({**content, "probabilities": shares}, indent=2, ensure_ascii=False))
        return
    click.echo(f"{answer.question}\n")
    if answer.text:
        click.echo(f"{answer.text}\n")
    best = max(answer.probabilities)
    for letter, option, share in zip(LETTERS, answer.options, answer.probabilities, strict=False):
        click.echo(f"{letter}  {100 * share:5.1f} %  {option}{'  ◄' if share == best else ''}")


def _console() -> Any:
    from rich.console import Console

    return Console(soft_wrap=True)
