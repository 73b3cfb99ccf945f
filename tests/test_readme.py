"""The README's commands, word for word, in an empty folder; only the model is the tests' tiny one."""

import shlex
from pathlib import Path

import pytest
from wardround.common.cli import main

README = Path(__file__).parents[1] / "README.md"
# A model that the released warm-up adapter does not fit, so none is used; everything else is as it is written.
TINY = ["--set", "warmup.enabled=false", "--set", "warmup.adapter=none", "--set"]


def commands(heading: str) -> list[list[str]]:
    """The wardround commands of the first shell block below a heading."""
    block = README.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("```sh\n")[1].split("```")[0]
    lines = block.replace("\\\n", " ").splitlines()
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "wardround"]


def test_the_commands_for_an_own_registry_work_word_for_word(
    tmp_path: Path, tiny_model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = commands("Use it on your own registry")
    assert [words[:2] for words in found[:5]] == [
        ["simulate", "registry"],
        ["client", "dictionary"],
        ["client", "check"],
        ["client", "questions"],
        ["simulate", "run"],
    ]
    for words in found:
        more = [*TINY, f"model.id={tiny_model_path}"] if words[:2] == ["simulate", "run"] else []
        main([*words, *more])  # a failure exits
    assert (tmp_path / "runs" / "small" / "report.html").exists()
    assert (tmp_path / "runs" / "small" / "score.json").exists()
    assert "clean" in capsys.readouterr().out
