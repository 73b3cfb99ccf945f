"""common/lm/tree.py: prompts that begin alike, each beginning computed once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from wardround.common.config import LoraConfig, ModelConfig
from wardround.common.errors import ModelError
from wardround.common.lm.models import LanguageModel, load
from wardround.common.lm.scoring import hidden_states
from wardround.common.lm.tree import PromptTree

from ...tiny import tiny_model, tiny_phi

FAMILIES = [
    [[7, 8, 9, 10], [7, 8, 9, 11, 12], [7, 8, 20], [30, 31]],  # a beginning of three, of two, of none
    [[5], [5, 6], [5, 6, 7]],  # one ends where the next goes on
    [[5, 6, 7]] * 3,  # all the same
    [[9, 8, 7], [5, 6], [9, 8, 6]],  # not sorted: what begins alike stands apart
]


@pytest.fixture(scope="module", params=[tiny_model, tiny_phi])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    path: Path = request.param(tmp_path_factory.mktemp("model"))
    made = load(ModelConfig(id=str(path), device="cpu", dtype="float32"), LoraConfig(rank=4), seed=1)
    rng = np.random.default_rng(0)
    made.set_vector((rng.normal(size=made.manifest.size) * 0.1).astype(np.float32))
    return made


@pytest.mark.parametrize("prompts", FAMILIES)
@torch.inference_mode()
def test_last_states_are_those_of_each_prompt_alone(lm: LanguageModel, prompts: list[list[int]]) -> None:
    found = PromptTree(prompts).last_states(lm)
    alone = torch.stack([hidden_states(lm, [ids])[0, -1] for ids in prompts])
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_long_prompts_with_deep_beginnings_agree_too(lm: LanguageModel) -> None:
    rng = np.random.default_rng(0)
    stems = [rng.integers(5, 200, n).tolist() for n in (40, 9, 23)]
    prompts = sorted(
        [*stems[0], *stems[1 + row % 2], *rng.integers(5, 200, 1 + 11 * (row % 5)).tolist()] for row in range(12)
    )
    found = PromptTree(prompts).last_states(lm)
    alone = torch.stack([hidden_states(lm, [ids])[0, -1] for ids in prompts])
    torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-4)


def test_a_sorted_batch_holds_every_beginning_once() -> None:
    tree = PromptTree(FAMILIES[0])
    assert tree.ids.tolist() == [7, 8, 9, 10, 11, 12, 20, 30, 31]
    assert tree.positions.tolist() == [0, 1, 2, 3, 3, 4, 2, 0, 1]
    assert [path.tolist() for path in tree.paths] == [[0, 1, 2, 3], [0, 1, 2, 4, 5], [0, 1, 6], [7, 8]]


@pytest.mark.parametrize("prompts", FAMILIES)
def test_every_path_spells_its_prompt(prompts: list[list[int]]) -> None:
    tree = PromptTree(prompts)
    assert [tree.ids[path].tolist() for path in tree.paths] == prompts
    assert all(tree.positions[path].tolist() == list(range(len(path))) for path in tree.paths)
    assert len(tree.ids) <= sum(map(len, prompts))


def test_the_models_attention_is_its_own_again_afterwards(lm: LanguageModel) -> None:
    base = lm.model.get_base_model()
    before = base.config._attn_implementation
    PromptTree(FAMILIES[0]).last_states(lm)
    assert base.config._attn_implementation == before


def test_a_model_that_sees_only_a_window_is_refused(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lm.model.get_base_model()
    monkeypatch.setattr(base.config, "layer_types", ["sliding_attention"] * 2, raising=False)
    with pytest.raises(ModelError, match="cannot share"):
        PromptTree(FAMILIES[0]).last_states(lm)
