"""The console command: exit codes, one clear line, nothing else."""

import pytest
from wardround.common.cli import main


def exit_code(args: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(args)
    return int(stop.value.code or 0)


def test_an_unknown_group_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["hospital"]) == 2
    assert "No such command 'hospital'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["simulate", "run", "nowhere.toml", "--out", "x"], "nowhere.toml: no such file"),
        (["simulate", "run", "demo", "--out", "x", "--set", "grpo.group_sizes=7"], "unknown key 'grpo.group_sizes'"),
        (["simulate", "run", "demo", "--out", "x", "--set", "model.id=no/such-model"], "no/such-model"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    args: list[str], message: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert exit_code(args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
