"""The page says what the run's files say, loads nothing, and survives hostile texts."""

import json
import re
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from wardround.common.config import RunConfig, to_toml
from wardround.common.errors import RunFolderError
from wardround.common.statistics import Tally, summarise
from wardround.server import evaluate, plots
from wardround.server.privacy_report import ALONE, against, cost, privacy_report
from wardround.server.report import check_reference, rewrite, write_report

from tests.server.report_case import case, tally_of

HOSTILE = (
    """ </title></script><script>alert(1)</script><img src=x onerror=alert(2)> "' onload='x' {{ 7*7 }} {% x %} & ]]>"""
)
VOID = {"meta", "br", "img", "input", "hr", "link"}


class Page(HTMLParser):
    """Collects elements and checks that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts)).replace("\N{NO-BREAK SPACE}", " ")

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def written(folder: Path, **choices: object) -> tuple[str, Page]:
    text = write_report(folder / "report.html", **case(**choices)).read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_shows_the_result_in_words_table_and_plot(tmp_path: Path) -> None:
    text, page = written(tmp_path)
    evaluation, shown = case()["evaluation"], page.text()
    for name in ("base", "warmup", "final", "majority"):
        assert evaluate.percent(evaluation[name]["accuracy"]) in shown
        assert evaluate.interval(evaluation[name]["ci95"]) in shown
    assert evaluate.percent(evaluation["chance"]) in shown
    assert evaluate.verdict(evaluation) in shown
    assert evaluate.baselines(evaluation) in shown
    assert evaluate.points(evaluation["paired"]["final-warmup"]["difference"]) in shown
    for section in evaluation["by_section"]:
        assert section in shown
    assert "On 200 such questions that it was not trained on, accuracy went from 34.0 % to 99.0 %" in shown
    assert "node 7 warm-up (protocol); hospital-3 train of round 2 (silent); hospital-3 finalize (silent)." in shown
    assert "simulated sites 4" in shown and "training patients 4,010" in shown
    assert "hospital-2 4 has it hospital-3 4 not yet" in shown and "hospital-5 0 has it" in shown
    assert "rolled back" in shown
    assert "No patient-level guarantee" in shown
    assert text.count("<h1>") == 1


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    text, page = written(tmp_path)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert not re.search(r"url\(|@import|https?:|//[a-z]", text.split("</style>")[0].lower())
    for tag, attributes in page.elements:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    policy = [meta["content"] for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    plain_tags = [tag for tag, _ in written(tmp_path)[1].elements]
    text, page = written(tmp_path, text=HOSTILE)
    assert [tag for tag, _ in page.elements] == plain_tags
    assert "<script" not in text.lower() and "<img" not in text.lower()
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
    assert "{{ 7*7 }}" in page.text()


def test_hostile_texts_in_plots_stay_texts() -> None:
    drawn = plots.reward_bars({1: [1, 2]}, [HOSTILE, HOSTILE], HOSTILE)
    drawn += plots.line_plot([plots.RoundPoint(1, 0.5)], HOSTILE, HOSTILE)
    drawn += plots.interval_strip([(HOSTILE, 0.5, 0.4, 0.6)], plots.Scale(0, 1)) + plots.marker_key(HOSTILE)
    page = Page(drawn)
    assert {tag for tag, _ in page.elements} <= {"svg", "rect", "line", "text", "title", "circle", "path"}
    assert all("onload" not in attributes for _, attributes in page.elements)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    assert written(tmp_path)[0] == written(tmp_path)[0]


def test_every_plot_and_table_can_be_read_aloud(tmp_path: Path) -> None:
    _, page = written(tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") == 5
    plots_shown = [attributes for attributes in page.named("svg") if attributes.get("role") == "img"]
    assert len(plots_shown) == 3
    assert all("round 1" in str(attributes["aria-label"]) for attributes in plots_shown)
    outer = [attributes for attributes in page.named("svg") if attributes.get("class") in ("strip", "key", "axis")]
    assert outer and all(attributes.get("aria-hidden") == "true" for attributes in outer)
    assert all("scope" in attributes for attributes in page.named("th"))
    assert page.named("html") == [{"lang": "en"}]


def test_samples_of_a_registry_that_is_not_open_are_not_shown(tmp_path: Path) -> None:
    text, page = written(tmp_path, public=False)
    assert "questions and reasoning stay in each site's own report" in page.text()
    assert "Heart rate 118" not in text and "hypotensive" not in text
    assert "Heart rate 118" in written(tmp_path, public=True)[0]


def test_a_scored_choice_is_not_mixed_up_with_the_text_beside_it(tmp_path: Path) -> None:
    shown = written(tmp_path, reasoning=False)[1].text()
    assert "final chose D: wrong" in shown
    assert "(scored: letters only, no text)" in shown and "asked to think aloud, not scored:" in shown
    assert "base chose –: wrong" in shown
    shown = written(tmp_path, reasoning=True)[1].text()
    assert "(scored: the answer its text ends in)" in shown and "think aloud, not scored" not in shown


def test_answer_only_runs_without_warm_up_say_so(tmp_path: Path) -> None:
    _, page = written(tmp_path, reasoning=False, warmup=False)
    assert "Questions are answer-only" in page.text()
    assert "Off: round 0 is the base model" in page.text()
    assert "warmed up" not in page.text() and "over the base model" in page.text()
    assert "probability that the model gave the true option" in page.text()
    assert "teach nothing" not in page.text()


def test_a_run_without_gate_reward_or_samples_has_a_page(tmp_path: Path) -> None:
    values = case(rounds=1)
    record = {**values["rounds"][0], "validation_accuracy": None, "validation_questions": 0}
    record |= {"reward_mean": None, "reward_histogram": [0] * 8, "questions": 0}
    run = {**values["run"], "baseline": {"accuracy": None, "questions": 0}, "samples": []}
    path = write_report(tmp_path / "report.html", **{**values, "rounds": [record], "run": run})
    shown = Page(path.read_text()).text()
    assert "best so far" not in shown
    for words in ("had no validation gate", "No question was trained", "No sample was sent", "Without validation each"):
        assert words in shown


def test_a_run_whose_final_model_is_round_0_calls_no_round_kept_or_best(tmp_path: Path) -> None:
    values = case(rounds=2)
    rounds = [{**record, "kept_round": 0, "rolled_back": record["round"] == 1} for record in values["rounds"]]
    facts = {**values["provenance"], "kept_round": 0}
    path = write_report(tmp_path / "report.html", **{**values, "rounds": rounds, "provenance": facts})
    shown = Page(path.read_text()).text()
    assert "here round 0, for no round came up to the model before them." in shown
    assert "rolled back 13.8 MB" in shown and "continued 13.8 MB" in shown
    assert "kept" not in shown.replace("kept round 0 questions trained", "") and "best so far 13.8 MB" not in shown
    assert "Final model: round 0." in path.read_text()


def test_a_run_that_keeps_the_last_round_calls_none_the_best(tmp_path: Path) -> None:
    values = case(rounds=2)
    federation = values["config"].federation.model_copy(update={"keep": "last"})
    values["config"] = values["config"].model_copy(update={"federation": federation})
    shown = Page(write_report(tmp_path / "report.html", **values).read_text()).text()
    assert "The final model is that of the last round validated and not rolled back: here round 2." in shown
    assert "best" not in shown
    assert "continued 13.8 MB" in shown
    rounds = [{**record, "kept_round": 0, "rolled_back": True} for record in values["rounds"]]
    facts = {**values["provenance"], "kept_round": 0}
    page = write_report(tmp_path / "none.html", **{**values, "rounds": rounds, "provenance": facts})
    assert "here round 0, for none was." in Page(page.read_text()).text()


def test_a_run_of_many_rounds_is_drawn_as_a_line(tmp_path: Path) -> None:
    text, page = written(tmp_path, rounds=200)
    assert len(text) < 500_000
    assert len([1 for attributes in page.named("line") if "path" in str(attributes.get("class"))]) >= 197


def run_folder(folder: Path) -> Path:
    values = case()
    (folder / "model").mkdir(parents=True)
    (folder / "config.resolved.toml").write_text(to_toml(values["config"]))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in values["rounds"]))
    (folder / "model" / "provenance.json").write_text(json.dumps(values["provenance"]))
    for name in ("evaluation", "run", "schema", "privacy"):
        (folder / f"{name}.json").write_text(json.dumps(values[name]))
    return folder


def test_the_page_is_made_again_from_the_run_folder(tmp_path: Path) -> None:
    assert rewrite(run_folder(tmp_path / "run")).read_text() == written(tmp_path)[0]


@pytest.mark.parametrize(
    "name", ["evaluation.json", "rounds.jsonl", "run.json", "schema.json", "privacy.json", "model/provenance.json"]
)
def test_an_unfinished_run_folder_is_one_clear_line(name: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / name).unlink()
    with pytest.raises(RunFolderError, match=f"{re.escape(name)}: missing or unreadable; expected the folder of a fin"):
        rewrite(folder)
    (folder / name).write_text("{half")
    with pytest.raises(RunFolderError, match="not valid JSON"):
        rewrite(folder)
    assert not (folder / "report.html").exists()


def test_feature_labels_are_used_where_they_are_known(tmp_path: Path) -> None:
    values = case()
    values["run"]["dictionary"]["labels"] = {"Albumin": "Serum albumin, first day"}
    assert "Serum albumin, first day" in write_report(tmp_path / "report.html", **values).read_text()


def test_scales_hold_their_values_and_have_few_round_ticks() -> None:
    for values in ([0.0, 1.0], [0.5], [0.31, 0.315], [0.99, 1.0], [0.0, 0.001]):
        scale = plots.share_scale(values)
        assert 0 <= scale.low <= min(values) <= max(values) <= scale.high <= 1
        assert 2 <= len(scale.ticks()) <= 8
        assert 0 <= scale.percent(2.0) <= 100


def test_examples_in_the_docstrings_hold() -> None:
    import doctest

    for name in ("plots", "report"):
        assert doctest.testmod(import_module(f"wardround.server.{name}")).failed == 0


def private_case() -> dict:
    values = case()
    config = RunConfig.model_validate(
        {
            "name": "private",
            "privacy": {
                "enabled": True,
                "epsilon": 6.0,
                "delta": 1e-5,
                "max_grad_norm": 0.5,
                "declared_patients": 1000,
                "noise_multiplier": 1.0,
            },
            "federation": {"rounds": 4, "validation_questions_per_site": 0},
        }
    )
    tally = tally_of(320, seed=3)
    patterns = tally.patterns.sum(0, keepdims=True)
    nothing = np.zeros((1, 3), np.int64)
    pooled = Tally(("all",), tally.models, patterns, tally.chance.sum(keepdims=True), nothing, nothing, 6.0)
    evaluation = {**summarise(pooled, {"all": "all"}), "sites": 4}
    report = privacy_report(config, {"hospital-1": 4}, 4)
    report["cost"] = cost(config, evaluation, updates=16, sites=4, parameters=1000)
    return {**values, "config": config, "evaluation": evaluation, "privacy": report}


def test_the_page_of_a_private_run_says_what_epsilon_means_and_what_it_cost(tmp_path: Path) -> None:
    values = private_case()
    shown = Page(write_report(tmp_path / "report.html", **values).read_text()).text()
    assert values["privacy"]["statement"] in shown
    assert "What it cost" in shown and values["privacy"]["cost"]["sentences"][0] in shown and ALONE in shown
    assert "the counts carry noise for privacy" in shown and "exact McNemar" not in shown
    assert "n ≈ 320" in shown and "would have cost more of the privacy budget" in shown
    assert "ε adds up across sites that hold the same patient" in shown
    assert "Choosing settings by looking at several private runs is not accounted" in shown
    reference = {"name": "plain", "paired": case()["evaluation"]["paired"]}
    beside = Page(write_report(tmp_path / "report.html", **values, reference=reference).read_text()).text()
    assert against(reference, values["evaluation"]) in beside and ALONE not in beside


def test_a_reference_has_to_be_a_finished_run_without_privacy(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"evaluation\.json: missing"):
        check_reference(tmp_path)
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(RunFolderError, match="holds no comparison"):
        check_reference(tmp_path)
    (tmp_path / "evaluation.json").write_text(json.dumps(case()["evaluation"]))
    (tmp_path / "config.resolved.toml").write_text(to_toml(private_case()["config"]))
    with pytest.raises(RunFolderError, match="expected one without"):
        check_reference(tmp_path)
    (tmp_path / "config.resolved.toml").write_text(to_toml(case()["config"]))
    check_reference(tmp_path)
