"""The final model made at the hospital: what was confirmed, merged into the base model of the run, or nothing."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from wardround.client.merge import merge
from wardround.client.update import claim
from wardround.common.adapter import vector_digest
from wardround.common.cli import main
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.errors import ModelError, RunFolderError, UserError, VerificationError
from wardround.common.files import write_record
from wardround.common.lm import models
from wardround.common.lm.merge import load_plain, logits, probe_prompts

from tests.tiny import tiny_model

RUN = "0123456789abcdef" * 2


def site(folder: Path, base: Path, strategy: str = "ffa") -> Path:
    """A site folder after finalize; its site.toml."""
    lm = models.load(ModelConfig(id=str(base), device="cpu"), LoraConfig(strategy=strategy, rank=4), seed=1)
    vector = lm.vector()
    lm.set_vector(vector + np.random.default_rng(2).standard_normal(vector.size).astype(np.float32) * np.float32(0.05))
    run = folder / "state" / "runs" / RUN
    run.mkdir(parents=True)
    (folder / "site.toml").write_text('name = "a"\ntable = "t.csv"\ndictionary = "d.toml"\n')
    full = lm.vector(trainable_only=False)
    write_record(run / "round-0.record", {"manifest": lm.manifest.to_json()}, {"vector": full})
    lm.save_adapter(run / "adapter")
    (run / "adapter" / "digest.txt").write_text(vector_digest(lm.manifest, full) + "\n")
    return folder / "site.toml"


def test_the_merged_model_is_base_and_adapter(tmp_path: Path, tiny_model_path: Path):
    path = site(tmp_path, tiny_model_path)
    digest = merge(path, RUN, tmp_path / "model")
    adapter = tmp_path / "state" / "runs" / RUN / "adapter"
    assert digest == (adapter / "digest.txt").read_text().strip()
    lm = models.load(ModelConfig(id=str(tiny_model_path), device="cpu"), LoraConfig(rank=4), seed=5)
    lm.load_adapter_folder(adapter)
    probes = probe_prompts(lm.tokenizer)
    merged = logits(load_plain(tmp_path / "model", lm.dtype), probes)
    assert float((merged - logits(lm.model, probes)).abs().max()) < 1e-4


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_the_model_is_what_the_umask_says(tmp_path: Path, tiny_model_path: Path, umask: int, mode: int):
    path, before = site(tmp_path, tiny_model_path), os.umask(umask)
    try:
        merge(path, RUN, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {mode}


def test_another_adapter_than_the_confirmed_one_is_not_merged(tmp_path: Path, tiny_model_path: Path):
    path = site(tmp_path, tiny_model_path)
    (tmp_path / "state" / "runs" / RUN / "adapter" / "digest.txt").write_text("0" * 64)
    with pytest.raises(VerificationError, match="does not hold the adapter that this site confirmed"):
        merge(path, RUN, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_another_base_model_is_refused_and_the_right_one_may_have_moved(tmp_path: Path, tiny_model_path: Path):
    path = site(tmp_path / "site", tiny_model_path)
    other = tiny_model(tmp_path / "other", seed=9)
    with pytest.raises(VerificationError, match="not those that the run was trained on"):
        merge(path, RUN, tmp_path / "model", str(other))
    config = tmp_path / "site" / "state" / "runs" / RUN / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "/gone"}))
    with pytest.raises(ModelError, match="/gone: the base model is no longer there; say with --base"):
        merge(path, RUN, tmp_path / "model")
    merge(path, RUN, tmp_path / "model", str(tiny_model_path))
    with pytest.raises(RunFolderError, match="exists already"):
        merge(path, RUN, tmp_path / "model", str(tiny_model_path))


@pytest.mark.parametrize("run_id", ["", "nosuch", "../runs", f"../../{RUN}", "."])
def test_a_run_that_is_not_here_is_named_with_those_that_are(tmp_path: Path, tiny_model_path: Path, run_id: str):
    with pytest.raises(UserError, match=f"expected one that this site took part in, there is {RUN}"):
        merge(site(tmp_path, tiny_model_path), run_id, tmp_path / "model")


def test_an_adapter_that_has_not_come_is_not_merged(tmp_path: Path):
    (tmp_path / "state" / "runs" / RUN).mkdir(parents=True)
    claim(tmp_path / "state" / "runs" / RUN, 1, "in")
    (tmp_path / "site.toml").write_text('name = "a"\ntable = "t.csv"\ndictionary = "d.toml"\n')
    with pytest.raises(UserError, match="its final adapter is not here yet"):
        merge(tmp_path / "site.toml", RUN, tmp_path / "model")


def test_a_run_of_all_parameters_has_nothing_to_merge(tmp_path: Path, tiny_model_path: Path):
    with pytest.raises(UserError, match="adapter is the whole model; nothing to merge"):
        merge(site(tmp_path, tiny_model_path, "full"), RUN, tmp_path / "model")


def test_the_command_prints_folder_and_digest(
    tmp_path: Path, tiny_model_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = site(tmp_path, tiny_model_path)
    main(["client", "merge", str(path), RUN, "--out", str(tmp_path / "model")])
    digest = (tmp_path / "state" / "runs" / RUN / "adapter" / "digest.txt").read_text().strip()
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'model'}\nadapter {digest}: ")
