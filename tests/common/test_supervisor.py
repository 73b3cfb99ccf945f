"""Processes stay up, mistakes stop everything with one line, and nothing outlives its supervisor."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from wardround.common import supervisor
from wardround.common.errors import RunFolderError
from wardround.common.supervisor import Child, ChildError, Supervisor, exclusive, holder, read_status

PATIENCE_S = 30.0


def child(name: str, code: str) -> Child:
    return Child(name, (sys.executable, "-c", code))


def until(condition, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def started(folder: Path, *children: Child, grace_s: float = 10.0) -> subprocess.Popen[bytes]:
    """A supervisor in a process of its own."""
    wanted = [[one.name, list(one.command)] for one in children]
    code = (
        "import json, sys; from pathlib import Path; from wardround.common.supervisor import *\n"
        f"folder = Path({str(folder)!r})\n"
        f"children = [Child(name, tuple(command)) for name, command in json.loads({json.dumps(wanted)!r})]\n"
        f"sys.exit(Supervisor(children, folder / 'logs', folder / 'status.json', {grace_s}).run())"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)


def pid_of(folder: Path, name: str) -> int | None:
    status = read_status(folder / "status.json")
    return status["processes"].get(name, {}).get("pid") if status else None


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


SLEEPS = "import time; print('up', flush=True); time.sleep(600)"


def test_what_runs_stays_up_where_nothing_can_be_written_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on a full disk: no status, no copy of a long log."""
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE_S", 0.5)
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 1)
    logs = tmp_path / "logs"
    (logs / "a.log.1").mkdir(parents=True)  # nothing can be copied there
    one = Supervisor([child("a", SLEEPS)], logs, tmp_path / "gone" / "status.json")
    threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert one.run() == 0 and "up" in (logs / "a.log").read_text()


def test_a_killed_process_is_started_again_and_the_status_says_so(tmp_path: Path):
    running = started(tmp_path, child("a", SLEEPS), child("b", SLEEPS))
    try:
        until(lambda: pid_of(tmp_path, "a") and pid_of(tmp_path, "b"), "both start")
        first, other = pid_of(tmp_path, "a"), pid_of(tmp_path, "b")
        os.kill(first, signal.SIGKILL)
        until(lambda: pid_of(tmp_path, "a") not in (None, first), "the killed one starts again")
        status = read_status(tmp_path / "status.json")
        assert status["processes"]["a"]["restarts"] == 1 and status["processes"]["a"]["last_exit"] == -signal.SIGKILL
        assert pid_of(tmp_path, "b") == other
    finally:
        running.terminate()
        assert running.wait(PATIENCE_S) == 0
    status = read_status(tmp_path / "status.json")
    assert status["supervisor"] is None and {one["pid"] for one in status["processes"].values()} == {None}


def test_sigterm_lets_each_finish_in_reverse_order(tmp_path: Path):
    order = tmp_path / "order"
    code = (
        "import signal, sys, time\n"
        "def end(*_):\n"
        "    time.sleep(0.3); open({order!r}, 'a').write({name!r}); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); open({ready!r}, 'w').write('x'); time.sleep(600)"
    )
    made = [
        child(name, code.format(order=str(order), name=name, ready=str(tmp_path / f"ready-{name}"))) for name in "abc"
    ]
    running = started(tmp_path, *made)
    until(lambda: all((tmp_path / f"ready-{name}").exists() for name in "abc"), "all are up")
    running.terminate()
    assert running.wait(PATIENCE_S) == 0
    assert order.read_text() == "cba"


def test_what_does_not_finish_in_time_is_killed_with_all_that_it_started(tmp_path: Path):
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{left.pid}}'); time.sleep(600)"
    )
    running = started(tmp_path, child("deaf", code), grace_s=0.5)
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2, "it is up")
    running.terminate()
    assert running.wait(PATIENCE_S) == 0
    for pid in map(int, pids.read_text().split()):
        until(lambda pid=pid: not alive(pid), "nothing is left")


def test_processes_die_with_a_killed_supervisor(tmp_path: Path):
    running = started(tmp_path, child("a", SLEEPS))
    until(lambda: pid_of(tmp_path, "a"), "it starts")
    pid = pid_of(tmp_path, "a")
    running.kill()
    running.wait()
    until(lambda: not alive(pid), "its child is gone")


def test_a_mistake_that_only_a_person_can_mend_stops_everything_with_its_last_line(tmp_path: Path):
    wrong = child("wrong", "import sys; print('noise'); print('coordinator.toml: expected a port'); sys.exit(2)")
    with pytest.raises(ChildError, match=r"coordinator\.toml: expected a port") as caught:
        Supervisor([child("good", SLEEPS), wrong], tmp_path / "logs", tmp_path / "status.json").run()
    assert caught.value.exit_code == 2
    assert read_status(tmp_path / "status.json")["supervisor"] is None


def test_a_program_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(ChildError, match="no-such-program: cannot be started"):
        Supervisor([Child("x", ("no-such-program",))], tmp_path / "logs", tmp_path / "status.json").run()


def test_one_that_ends_in_order_is_back_at_once_and_a_crashing_one_waits_longer_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.4)
    monkeypatch.setattr(supervisor, "IN_ORDER_S", 0.0)
    running = Supervisor(
        [child("ends", "print('here')"), child("fails", "import sys; print('here'); sys.exit(1)")],
        tmp_path / "logs",
        tmp_path / "status.json",
    )
    threading.Timer(4.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert running.run() == 0
    times = {name: (tmp_path / "logs" / f"{name}.log").read_text().count("here") for name in ("ends", "fails")}
    assert 2 <= times["fails"] <= 5  # pauses of 0.4, 0.8, 1.6, 3.2 s
    assert times["ends"] > times["fails"]


def test_one_that_ends_in_order_as_soon_as_it_was_started_waits_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.4)  # a SuperNode that is refused ends with 0
    running = Supervisor([child("ends", "print('here')")], tmp_path / "logs", tmp_path / "status.json")
    threading.Timer(4.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert running.run() == 0
    assert 2 <= (tmp_path / "logs" / "ends.log").read_text().count("here") <= 5


def test_a_long_log_is_kept_once_and_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "MAX_LOG_BYTES", 10)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "wrong.log").write_text("what was written before\n")
    wrong = child("wrong", "import sys; print('now'); sys.exit(2)")
    with pytest.raises(ChildError, match="now"):
        Supervisor([wrong], tmp_path / "logs", tmp_path / "status.json").run()
    assert (tmp_path / "logs" / "wrong.log").read_text() == "now\n"
    old = tmp_path / "logs" / "wrong.log.1"
    assert old.read_text() == "what was written before\n" and old.stat().st_mode & 0o077 == 0


def test_nobody_starts_the_same_thing_twice(tmp_path: Path):
    lock = tmp_path / "lock"
    assert holder(lock) is None
    with exclusive(lock, "this coordinator"):
        assert holder(lock) == os.getpid()
        with (
            pytest.raises(RunFolderError, match=f"this coordinator is running already .process {os.getpid()}."),
            exclusive(lock, "this coordinator"),
        ):
            pass
    assert holder(lock) is None
    with exclusive(lock, "this coordinator"):
        pass


def test_a_status_that_is_not_there_or_damaged_is_none(tmp_path: Path):
    assert read_status(tmp_path / "status.json") is None
    (tmp_path / "status.json").write_text("{")
    assert read_status(tmp_path / "status.json") is None
