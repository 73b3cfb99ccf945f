"""The final folders load in a plain session and are what was trained; what is wrong leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from wardround.common.adapter import vector_digest
from wardround.common.config import NO_PRIVACY, LoraConfig, ModelConfig, RunConfig
from wardround.common.errors import ModelError, RunFolderError, VerificationError
from wardround.common.lm import merge, models
from wardround.server.finalize import finalize
from wardround.server.provenance import privacy_statement, provenance


def trained(base: Path, strategy: str = "ffa", dtype: str = "float32", size: float = 0.05) -> models.LanguageModel:
    """The tiny model with an adapter as training would leave it: every trained value moved."""
    lm = models.load(
        ModelConfig(id=str(base), dtype=dtype, device="cpu"), LoraConfig(strategy=strategy, rank=4), seed=1
    )
    vector = lm.vector()
    lm.set_vector(vector + np.random.default_rng(2).standard_normal(vector.size).astype(np.float32) * np.float32(size))
    return lm


def facts_of(lm: models.LanguageModel, **changes: object) -> dict:
    config = RunConfig(name="tiny", privacy=NO_PRIVACY, model=lm.config, lora=lm.lora)
    facts = provenance(
        config,
        base_digest=lm.base_digest,
        adapter_digest=vector_digest(lm.manifest, lm.vector(trainable_only=False)),
        schema_digest="5" * 64,
        dictionary_digest="d" * 64,
        sites=4,
        rounds_run=2,
        kept_round=2,
        questions_trained=256,
        simulated=True,
        public=True,
    )
    return {**facts, **changes}


def contents(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_both_folders_load_in_a_plain_session_and_give_the_same_greedy_text(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    finalize(trained(tiny_model_path), tmp_path / "run", facts_of(trained(tiny_model_path)))
    code = """
import sys, torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
run = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(f"{run}/model")
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Sodium: 139 mmol/L; Sepsis?"}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
for model in (AutoModelForCausalLM.from_pretrained(f"{run}/model"),
              AutoPeftModelForCausalLM.from_pretrained(f"{run}/adapter"),
              AutoModelForCausalLM.from_pretrained(sys.argv[2])):
    model.eval()
    print(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(tiny_model_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    merged, adapted, base = done.stdout.strip().splitlines()
    assert merged == adapted
    assert merged != base


@pytest.mark.parametrize("strategy", ["ffa", "fedit"])
def test_merged_logits_are_those_of_base_and_adapter(strategy: str, tiny_model_path: Path, tmp_path: Path) -> None:
    lm = trained(tiny_model_path, strategy)
    done = finalize(lm, tmp_path, facts_of(lm))
    probes = merge.probe_prompts(lm.tokenizer)
    merged = merge.logits(merge.load_plain(done.model, torch.float32), probes)
    assert float((merged - merge.logits(lm.model, probes)).abs().max()) <= 1e-4
    assert done.checks.merge_difference <= done.checks.tolerance == 1e-5
    assert done.checks.adapter_effect > 0.01
    assert not done.checks.adapter_is_zero


def test_the_adapter_file_is_the_vector_bit_for_bit(tiny_model_path: Path, tmp_path: Path) -> None:
    lm = trained(tiny_model_path)
    finalize(lm, tmp_path, facts_of(lm))
    fresh = models.load(lm.config, lm.lora, seed=99)
    fresh.load_adapter_folder(tmp_path / "adapter")
    assert np.array_equal(fresh.vector(trainable_only=False), lm.vector(trainable_only=False))


def test_an_adapter_that_learnt_nothing_gives_the_base_model(tiny_model_path: Path, tmp_path: Path) -> None:
    lm = models.load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=4), seed=1)
    done = finalize(lm, tmp_path, facts_of(lm))
    assert done.checks.adapter_is_zero
    base, merged = load_file(tiny_model_path / "model.safetensors"), load_file(done.model / "model.safetensors")
    assert base.keys() == merged.keys()
    assert all(torch.equal(base[name], merged[name]) for name in base)


def test_full_training_gives_a_model_and_says_that_there_is_no_adapter(tiny_model_path: Path, tmp_path: Path) -> None:
    lm = trained(tiny_model_path, "full", size=0.01)
    done = finalize(lm, tmp_path, facts_of(lm))
    assert contents(tmp_path / "adapter") == ["README.md", "provenance.json"]
    assert "there is no adapter" in (tmp_path / "adapter" / "README.md").read_text()
    probes = merge.probe_prompts(lm.tokenizer)
    assert torch.equal(
        merge.logits(merge.load_plain(done.model, torch.float32), probes), merge.logits(lm.model, probes)
    )
    assert done.checks.adapter_effect > 0


def test_a_model_stored_in_bfloat16_stays_so_and_every_weight_is_rounded_once(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    stored = tmp_path / "stored"
    shutil.copytree(tiny_model_path, stored)
    AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16).save_pretrained(stored)
    lm = trained(stored, dtype="bfloat16")
    done = finalize(lm, tmp_path / "run", facts_of(lm))
    assert {tensor.dtype for tensor in load_file(done.model / "model.safetensors").values()} == {torch.bfloat16}
    assert done.checks.merge_difference <= 0.05


def test_training_in_bfloat16_leaves_a_model_merged_as_its_base_is_stored(
    tiny_model_path: Path, tmp_path: Path
) -> None:
    lm = trained(tiny_model_path, dtype="bfloat16")
    done = finalize(lm, tmp_path, facts_of(lm))
    assert {tensor.dtype for tensor in load_file(done.model / "model.safetensors").values()} == {torch.float32}
    assert done.checks.merge_difference <= 1e-5


def test_a_finalize_that_is_repeated_writes_the_same_bytes(tiny_model_path: Path, tmp_path: Path) -> None:
    lm = trained(tiny_model_path)
    finalize(lm, tmp_path, facts_of(lm))
    before = {name: (tmp_path / name).read_bytes() for name in contents(tmp_path) if (tmp_path / name).is_file()}
    (tmp_path / ".model.new-killed").mkdir()
    finalize(lm, tmp_path, facts_of(lm))
    after = {name: (tmp_path / name).read_bytes() for name in contents(tmp_path) if (tmp_path / name).is_file()}
    assert before == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "model"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_who_may_read_the_folders_is_what_the_umask_says(
    tiny_model_path: Path, tmp_path: Path, umask: int, mode: int
) -> None:
    lm, before = trained(tiny_model_path), os.umask(umask)
    try:
        finalize(lm, tmp_path, facts_of(lm))
    finally:
        os.umask(before)
    for folder in ("adapter", "model"):
        assert {file.stat().st_mode & 0o777 for file in (tmp_path / folder).iterdir()} == {mode}


def test_card_and_provenance_say_where_the_model_comes_from(tiny_model_path: Path, tmp_path: Path) -> None:
    lm = trained(tiny_model_path)
    facts = facts_of(lm)
    finalize(lm, tmp_path, facts)
    card = (tmp_path / "model" / "README.md").read_text()
    for part in (facts["config_digest"], facts["base_digest"], facts["adapter_digest"], "No patient-level guarantee"):
        assert part in card
    assert "left the sites under masks" in card and "at least 3 each time" in card and "in the clear" not in card
    assert "Not evaluated." in card
    written = json.loads((tmp_path / "model" / "provenance.json").read_text())
    assert {key: written[key] for key in facts} == facts
    assert written["verified"]["merge_difference"] <= 1e-5


def test_what_was_added_up_in_the_clear_is_said_first(tiny_model_path: Path) -> None:
    facts = facts_of(trained(tiny_model_path), secure_aggregation="none")
    said = privacy_statement(facts)
    assert said.startswith("Updates and counts were added up in the clear") and "under masks" not in said
    said = privacy_statement({**facts, "secure_aggregation": "bonawitz", "min_sites": 5, "colluders": 2})
    assert "at least 5 each time" in said and "at most 2 of the hospitals" in said and "in the clear" not in said


def test_another_adapter_than_the_run_says_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    lm = trained(tiny_model_path)
    with pytest.raises(VerificationError, match="final adapter: expected"):
        finalize(lm, tmp_path, facts_of(lm, adapter_digest="0" * 64))
    assert contents(tmp_path) == []


def test_too_little_disk_is_refused_with_both_figures(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2_000_000, 1_000_000, 1_000_000))
    lm = trained(tiny_model_path)
    with pytest.raises(RunFolderError, match=r"needs \d+ MB of disk, 1 MB are free"):
        finalize(lm, tmp_path, facts_of(lm))
    assert contents(tmp_path) == []


def saved_adapter(base: Path, folder: Path) -> Path:
    trained(base).save_adapter(folder)
    return folder


def test_an_adapter_with_keys_that_fit_no_layer_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    """vllm issue 34186: another prefix loads without an error and gives the base model."""
    adapter = saved_adapter(tiny_model_path, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.", "base_model.model.language_model."): t for name, t in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="missing"), pytest.raises(VerificationError, match="fit no layer"):
        merge.merge_adapter(tiny_model_path, adapter, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_truncated_adapter_file_is_refused(tiny_model_path: Path, tmp_path: Path) -> None:
    adapter = saved_adapter(tiny_model_path, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="does not load"):
        merge.merge_adapter(tiny_model_path, adapter, tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_merge_that_skips_a_layer_is_found(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    original = Linear.merge
    skipped: list[Linear] = []

    def merge_all_but_one(layer: Linear, *args: object, **kwargs: object) -> None:
        if skipped:
            original(layer, *args, **kwargs)
        skipped.append(layer)

    adapter = saved_adapter(tiny_model_path, tmp_path / "adapter")
    monkeypatch.setattr(Linear, "merge", merge_all_but_one)
    with pytest.raises(VerificationError, match="is not W"):
        merge.merge_adapter(tiny_model_path, adapter, tmp_path / "model")
    assert len(skipped) == 1
    assert not (tmp_path / "model").exists()


def test_a_file_that_does_not_hold_what_memory_holds_is_found(
    tiny_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    original = LlamaForCausalLM.save_pretrained

    def flip_one_bit(model: LlamaForCausalLM, folder: Path, **kwargs: object) -> None:
        original(model, folder, **kwargs)
        path = Path(folder) / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1000] ^= 1
        path.write_bytes(data)

    adapter = saved_adapter(tiny_model_path, tmp_path / "adapter")
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", flip_one_bit)
    with pytest.raises(VerificationError, match="is not the one memory holds"):
        merge.merge_adapter(tiny_model_path, adapter, tmp_path / "model")
    assert not (tmp_path / "model").exists()
