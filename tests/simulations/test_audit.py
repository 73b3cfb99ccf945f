"""Membership inference, gradient inversion, and the whole audit with its page and its exit code."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats
from wardround.client.grpo import train_local_round
from wardround.client.private_optimizer import PrivateSteps
from wardround.common import sums
from wardround.common.config import ModelConfig, RunConfig, load_run
from wardround.common.errors import ConfigError, RunFolderError
from wardround.common.lm.models import LanguageModel, load
from wardround.common.lm.scoring import option_log_probs
from wardround.common.question import Question, load_prompt
from wardround.simulations.audit import cli, inversion, membership, page, run
from wardround.simulations.audit.membership import Members, groups, roc, scores, told_apart

TEMPLATE = load_prompt("en_short")


def question(index: int, answer: int | None = None) -> Question:
    record = f"Age {20 + index % 70} years; Sodium {120 + index % 37} mmol/L; Albumin {1 + index % 5}.{index % 10} g/dL"
    text = f"{record}.\nWhat is the patient's Sepsis?\nA. yes\nB. no\nC. unknown"
    answer = index % 3 if answer is None else answer
    return Question("sepsis", "Infection", "feature", text, ("yes", "no", "unknown"), answer, majority=0)


def model(path: Path, strategy: str = "ffa", steps: int = 1) -> tuple[LanguageModel, RunConfig]:
    config = RunConfig.model_validate(
        {
            "name": "test",
            "privacy": {"enabled": False},
            "model": {"id": str(path), "device": "cpu", "dtype": "float32"},
            "lora": {"strategy": strategy, "rank": 16},
            "grpo": {"expectation": "exact", "local_steps": steps, "patients_per_step": 20.0, "learning_rate": 3e-3},
        }
    )
    return load(ModelConfig(id=str(path), device="cpu", dtype="float32"), config.lora, seed=0), config


@pytest.mark.parametrize("private", [False, True])
def test_members_of_a_model_that_remembers_are_found_and_under_privacy_they_are_not(
    tiny_model_path: Path, private: bool
):
    lm, config = model(tiny_model_path, "full", steps=12 if private else 25)
    questions = [question(index, answer=int(np.random.default_rng(index).integers(3))) for index in range(120)]
    member = np.arange(120) % 6 == 0
    trained = [question for question, mine in zip(questions, member, strict=True) if mine]
    before = option_log_probs(lm, questions, TEMPLATE, 16).astype(np.float64)
    steps = PrivateSteps(4.0, 0.1, 0.5, 10.0) if private else None
    train_local_round(lm, Members(trained), TEMPLATE, config, seed=0, private=steps)
    after = option_log_probs(lm, questions, TEMPLATE, 16).astype(np.float64)
    found = {name: told_apart(values, member)["auc"] for name, values in scores(questions, before, after).items()}
    if private:
        assert max(found.values()) < 0.75
    else:
        assert found["reward"] > 0.8 and found["advantage"] > 0.8 and found["likelihood"] > 0.8


def test_scores_are_what_their_names_say():
    asked = [question(0, 1), replace(question(1, 0), options=("yes", "no"))]
    before = np.log([[0.5, 0.25, 0.25], [0.5, 0.5, np.nan]])
    after = np.log([[0.25, 0.5, 0.25], [0.9, 0.1, np.nan]])
    before[1, 2] = after[1, 2] = -np.inf
    found = scores(asked, before, after)
    assert found["reward"] == pytest.approx([0.5, 0.9])
    assert found["advantage"] == pytest.approx([0.25, 0.4])
    assert found["likelihood"] == pytest.approx(np.log([2, 1.8]))
    assert found["drift"][0] == pytest.approx(0.25 * np.log(0.5) + 0.5 * np.log(2))
    assert found["drift"][1] == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2))


def test_members_found_are_counted_at_a_threshold_that_accuses_no_more_others_than_allowed():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(2, 1, 200), rng.normal(0, 1, 1000)])
    member = np.arange(1200) < 200
    found = told_apart(values, member)
    for one in found["tpr"]:
        assert one["alarms"] == one["false_alarms"] * 1000
        assert one["share"] == pytest.approx(stats.norm.sf(stats.norm.isf(one["false_alarms"]) - 2), abs=0.15)
        assert one["ci95"][0] < one["share"] < one["ci95"][1] and one["alarm_ci95"][1] > one["false_alarms"]
    same = told_apart(np.zeros(1200), member)
    assert same["auc"] == 0.5 and [one["share"] for one in same["tpr"]] == [0.0, 0.0]


def test_the_curve_lies_where_the_rates_are():
    values, member = np.array([3.0, 2.0, 1.0, 0.0]), np.array([True, False, True, False])
    points = roc(values, member, points=3)
    assert points[0] == [0.0, 0.0] and points[-1] == [1.0, 1.0] and [0.0, 0.5] in points and [0.5, 1.0] in points


def test_canary_patients_have_answers_by_lot_and_members_are_as_many_as_asked():
    rng = np.random.default_rng(0)
    made = groups([question(index, 2) for index in range(400)], {"canary": 90, "ordinary": 50}, 100, rng)
    assert [group.member.sum() for group in made.values()] == [90, 50]
    assert [len(group.questions) for group in made.values()] == [190, 150]
    assert {one.answer for one in made["ordinary"].questions} == {2}
    counts = np.bincount([one.answer for one in made["canary"].questions], minlength=3)
    assert stats.chisquare(counts).pvalue > 1e-3
    with pytest.raises(ValueError, match="expected at most 300 in all, got 310"):
        groups([question(index) for index in range(300)], {"canary": 250}, 60, rng)


def test_a_record_taken_apart_is_put_together_again():
    record = inversion.Record.of(question(5), TEMPLATE)
    assert record.lines == ("Age 25 years", "Sodium 125 mmol/L", "Albumin 1.5 g/dL")
    assert record.with_lines(record.lines, question(5).answer) == question(5)
    assert "Sodium 140" in record.with_lines(["Age 1 years", "Sodium 140 mmol/L", "x"], 0).text


def read(path: Path, seen: str) -> tuple[int, int]:
    """Values and answers read of two patients with three values each, eight candidates a value."""
    lm, config = model(path)
    start, rng = lm.vector(), np.random.default_rng(0)
    attacker = inversion.Attacker(lm, TEMPLATE, config, start)
    values = answers = 0
    for index in (3, 44):
        record = inversion.Record.of(question(index), TEMPLATE)
        others = [inversion.Record.of(question(index + 1 + other), TEMPLATE).lines for other in range(7)]
        lists = [sorted({line, *(other[place] for other in others)}) for place, line in enumerate(record.lines)]
        private = PrivateSteps(2.0, 0.1, 1.0, 1.0) if seen == "private" else None
        update = inversion.update_of(lm, [record.question], TEMPLATE, config, start, private)
        if seen == "masked":
            update = inversion.masked(update, config)
        lines, answer = attacker.read(update, record, lists, rng)
        values += sum(mine == true for mine, true in zip(lines, record.lines, strict=True))
        answers += answer == record.question.answer
    return values, answers


def test_a_record_is_read_from_an_update_in_the_clear_and_not_from_a_masked_or_a_private_one(
    tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch
):
    values, answers = read(tiny_model_path, "alone")
    assert values >= 5 and answers == 2
    monkeypatch.setattr(inversion, "_STARTS", 1)
    for seen in ("masked", "private"):
        assert read(tiny_model_path, seen)[0] <= 4  # 6/8 by chance


def test_the_truth_is_what_looks_most_like_its_update(tiny_model_path: Path):
    lm, config = model(tiny_model_path)
    start = lm.vector()
    attacker = inversion.Attacker(lm, TEMPLATE, config, start)
    update = inversion.update_of(lm, [question(7)], TEMPLATE, config, start)
    found = attacker.likeness(update, [question(7, 0), question(7, 2), question(7), question(8), question(70)])
    assert found.argmax() == 2 and found[2] > 0.99
    assert np.array_equal(attacker.likeness(update, [question(7)]), found[2:3]) or found[2] == pytest.approx(
        float(attacker.likeness(update, [question(7)])[0]), abs=1e-5
    )


def test_masked_integers_are_uniform_whatever_the_update():
    update = np.full(20_000, 1e-3, np.float32)
    config = load_run(Path("audit"))
    seen = inversion.masked(update, config).astype(np.float64)
    assert stats.kstest(seen * sums.fixed_point(config).scale / 2**31, "uniform", args=(-1, 2)).pvalue > 1e-3


SMALL = run.Settings(
    epsilons=(4.0,),
    canaries=1200,
    width=4,
    bystanders=8,
    canary_members=20,
    ordinary_members=20,
    others=40,
    attacked=1,
)
QUICK = ("grpo.local_steps=2", "federation.rounds=1", "speed.threads=1", "lora.rank=8")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("audit") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion, "_STARTS", 1)
        run.audit(load_run(Path("audit"), QUICK), out, SMALL)
    return out


def test_an_audit_says_what_it_tried_and_what_it_saw(done: Path):
    result = json.loads((done / "audit.json").read_text())
    assert result["passed"] and result["contradictions"] == []
    assert [one["looks"] for one in result["one_run"]] == ["everybody", "plan"]
    assert all(0 <= one["bound_epsilon"] <= one["claimed"] <= 4 < one["most"] for one in result["one_run"])
    assert [one["epsilon"] for one in result["membership"]] == [None, 4.0]
    assert [one["seen"] for one in result["inversion"]] == ["alone", "crowd", "masked", "private"]


def test_an_audit_goes_on_where_it_stopped_and_another_one_needs_a_folder_of_its_own(
    done: Path, monkeypatch: pytest.MonkeyPatch
):
    before = {file: file.read_bytes() for file in (done / "audit.json", done / "audit.html")}
    for file in before:
        file.unlink()
    (done / "parts" / "inversion-masked.json").unlink()
    monkeypatch.setattr(inversion, "_STARTS", 1)
    for part in ("bound", "infer"):
        monkeypatch.setattr(run, part, lambda *_: pytest.fail("done before"))
    run.audit(load_run(Path("audit"), QUICK), done, SMALL)
    # Masks are drawn anew, so what is read from them by chance may be another.
    assert (
        json.loads(before[done / "audit.json"])["one_run"] == json.loads((done / "audit.json").read_text())["one_run"]
    )
    with pytest.raises(RunFolderError, match="another config"):
        run.audit(load_run(Path("audit"), ["seed=9"]), done, SMALL)
    with pytest.raises(RunFolderError, match="not empty"):
        run.audit(load_run(Path("audit"), QUICK), done.parent, SMALL)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br", "line", "rect", "circle", "path") or tag == "svg":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_loads_nothing_and_names_every_figure(done: Path):
    tags = Tags()
    tags.feed((done / "audit.html").read_text())
    assert tags.open == []
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe"} and names >= {"svg", "table", "h1"}
    assert not any(key in ("src", "href") or key.startswith("on") for _, attrs in tags.seen for key in attrs)
    for words in ("No claim was contradicted", "could refute up to", "Whose questions", "What this audit does not say"):
        assert words in tags.text
    result = json.loads((done / "audit.json").read_text())
    assert f"{result['one_run'][0]['claimed']:.3f}" in tags.text


def test_a_page_with_a_refuted_claim_says_so_first_and_the_command_ends_with_one(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    result = json.loads((done / "audit.json").read_text())
    result["one_run"][0]["bound_epsilon"] = 9.0
    sentences = run.contradictions(result)
    assert len(sentences) == 1 and "refutes every ε below 9.000" in sentences[0]
    result |= {"passed": False, "contradictions": sentences}
    page.write(tmp_path / "audit.html", result, "name = '<x>'")
    text = (tmp_path / "audit.html").read_text()
    assert "A claim was contradicted" in text and "refutes every ε below 9.000" in text and "<x>" not in text
    monkeypatch.setattr(run, "audit", lambda *_: result)
    found = CliRunner().invoke(cli.audit, ["--out", str(tmp_path)])
    assert found.exit_code == 1 and "A claim was contradicted." in found.output
    monkeypatch.setattr(run, "audit", lambda *_: result | {"passed": True, "contradictions": []})
    assert CliRunner().invoke(cli.audit, ["--out", str(tmp_path)]).exit_code == 0
    as_json = CliRunner().invoke(cli.audit, ["--out", str(tmp_path), "--json"])
    assert json.loads(as_json.output)["passed"] is True


def test_an_attack_better_than_epsilon_permits_is_a_contradiction(done: Path):
    result = json.loads((done / "audit.json").read_text())
    group = result["membership"][1]["groups"]["canary"]
    group["drift"] |= {"auc": 0.999, "auc_ci95": [0.995, 1.0]}
    (sentence,) = run.contradictions(result)
    assert "Membership of canary patients" in sentence and membership.ATTACKS["drift"] in sentence
    result["membership"][0]["groups"]["canary"]["drift"] |= {"auc_ci95": [0.995, 1.0]}  # nothing was claimed there
    assert len(run.contradictions(result)) == 1


def test_a_config_that_claims_nothing_or_cannot_hold_the_canaries_is_a_users_mistake(tmp_path: Path):
    with pytest.raises(ConfigError, match="claims no"):
        run.audit(load_run(Path("demo")), tmp_path / "a", SMALL)
    with pytest.raises(ConfigError, match="--canaries: 50000 canaries of 4 values"):
        run.audit(load_run(Path("audit"), QUICK), tmp_path / "b", replace(SMALL, canaries=50_000, parts=("one-run",)))
    found = CliRunner().invoke(cli.audit, ["--out", str(tmp_path / "c"), "--epsilon", "1,much"])
    assert isinstance(found.exception, ConfigError) and "numbers up to 20" in str(found.exception)
