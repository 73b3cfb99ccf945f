"""The console command: exit codes, one clear line, nothing else."""

import errno
from pathlib import Path

import click
import pytest
from wardround.common.cli import main, wardround


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
        (["simulate", "run", "dated.toml", "--out", "x"], "dated.toml: 'name': Input should be a valid string"),
        (["simulate", "run", "/no/such/place/demo", "--out", "x"], "/no/such/place/demo: no such file"),
        (["simulate", "run", "demo", "--out", "file/x"], "expected a folder, got a file at"),
        (["simulate", "registry", "support_icu", "--out", "file/x"], "file/x: not a directory"),
        (["server", "warmup", "demo", "--out", "file"], "expected a folder, got a file at"),
        (["server", "warmup", "demo", "--out", "file/x"], "expected a folder, got a file at"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    args: list[str], message: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(str(tmp_path))
    Path("file").write_text("x")
    Path("dated.toml").write_text("name = 2024-05-01\n")
    assert exit_code(args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (OSError(errno.EACCES, "Permission denied", "runs/x"), 2, "error: runs/x: permission denied; check the path"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: the disk is full; free some space"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "error: the disk is full at runs/x; free"),
        (KeyboardInterrupt(), 130, "interrupted; nothing half-written."),
        (click.exceptions.Abort("With --resume it goes on."), 130, "half-written. With --resume it goes on."),
    ],
)
def test_what_the_machine_says_is_one_line_too(
    raised: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def broken() -> None:
        raise raised

    monkeypatch.setattr(wardround, "get_command", lambda *_: broken)
    assert exit_code(["broken"]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line]  # click ends the terminal's ^C line
    assert len(lines) == 1 and said in lines[0]
    assert ("--resume" in lines[0]) == ("--resume" in str(raised))


def test_an_error_without_a_file_is_not_taken_for_a_wrong_path(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def broken() -> None:
        raise OSError("model.safetensors is not what it should be")

    monkeypatch.setattr(wardround, "get_command", lambda *_: broken)
    with pytest.raises(OSError, match="is not what it should be"):
        main(["broken"])
