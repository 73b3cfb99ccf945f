"""Keeps a party's processes running: `wardround server start` and `wardround client start`.

Used by both roles. Enters: commands. Leaves: a log file a process, and status.json, which `status` commands read.
Private: nothing; what processes write is theirs to keep clean.

A process that ends is started again, after a pause that doubles from 1 s to a minute and starts anew once it has
lived a minute. One that ends with exit code 2 has found a mistake that only a person can mend: everything stops, and
its last line is the error. SIGTERM and SIGINT end the processes in reverse order, each with time to finish what it is
at. They die with the supervisor, however that dies.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

from .errors import RunFolderError, UserError
from .files import private_folder, write_atomic

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
IN_ORDER_S = 30.0  # one that lived shorter has done nothing yet
FINAL = 2  # exit code of a mistake: starting again cannot help
MAX_LOG_BYTES = 20_000_000  # then NAME.log becomes NAME.log.1; looked at when a process starts, and every minute
_LOOK_S = 0.2
_PR_SET_PDEATHSIG = 1
# Loaded before any fork: between that and exec nothing must be.
_LIBC: ctypes.CDLL | None = ctypes.CDLL(None) if sys.platform == "linux" else None


class ChildError(UserError):
    """A process ended with a mistake that only a person can mend; the message is its last line."""

    code = "config"


@dataclass(frozen=True)
class Child:
    """A process to keep running.

    Attributes:
        name: for its log file and for people.
        command: program and arguments; no secret in them, for others on the machine can read them.
        environment: beside the supervisor's own.
        grace_s: time to finish after SIGTERM; None: the supervisor's.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    grace_s: float | None = None


@dataclass(eq=False)
class _Running:
    child: Child
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0  # monotonic
    since: float = 0.0  # wall clock, for people
    restarts: int = 0
    pause_s: float = FIRST_PAUSE_S
    due: float = 0.0  # monotonic; when to start again
    last_exit: int | None = None


@contextmanager
def exclusive(path: Path, what: str) -> Generator[None]:
    """Holds a lock file while the block runs, so that nobody starts the same thing twice.

    Args:
        path: the file; its folder is there. The lock ends with the process, also when that is killed.
        what: is running, for the error.

    Raises:
        RunFolderError: another process holds it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
            raise RunFolderError(
                f"{path.parent}: {what} is running already{f' (process {owner})' if owner else ''}; stop it first"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def holder(path: Path) -> int | None:
    """The process that holds a lock file of `exclusive`, or None: nobody does."""
    try:
        handle = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
        return int(owner) if owner.isdigit() else None
    else:
        return None
    finally:
        os.close(handle)


class Supervisor:
    """Runs some processes until it is told to stop.

    Args:
        children: started in this order, stopped in reverse.
        logs: folder for NAME.log of each, made if it is not there.
        status: the file that says what runs.
        grace_s: time to finish after SIGTERM, before SIGKILL.
    """

    def __init__(self, children: Sequence[Child], logs: Path, status: Path, grace_s: float = 30.0) -> None:
        self._running = [_Running(child) for child in children]
        self._logs, self._status, self._grace_s = logs, status, grace_s
        self._stopping = False
        self._began = time.time()

    def run(self) -> int:
        """Runs until SIGTERM or SIGINT; 0.

        Raises:
            ChildError: a process ended with exit code 2; everything else was stopped.
        """
        private_folder(self._logs)
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        looked = time.monotonic()
        try:
            while not self._stopping:
                for one in self._running:
                    self._look(one)
                if time.monotonic() - looked > LONGEST_PAUSE_S:
                    looked = time.monotonic()
                    self._cut_logs()
                time.sleep(_LOOK_S)
        finally:
            self._end()
            self._write(running=False)
            for number, handler in before.items():
                signal.signal(number, handler)
        return 0

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True

    def _look(self, one: _Running) -> None:
        now = time.monotonic()
        if one.process is None:
            if now >= one.due:
                self._start(one)
            return
        code = one.process.poll()
        if code is None:
            if now - one.started > LONGEST_PAUSE_S:
                one.pause_s = FIRST_PAUSE_S
            return
        _kill_session(one.process)
        one.process, one.last_exit = None, code
        if code == FINAL:
            raise ChildError(self._last_line(one.child) or f"{one.child.name}: ended with exit code {FINAL}")
        one.restarts += 1
        # One that ended in order (a worker that wants a fresh process) is wanted back at once, and one that does so
        # again and again (a SuperNode that is refused) is not.
        in_order = code == 0 and now - one.started > IN_ORDER_S
        one.due = now + (0.0 if in_order else one.pause_s)
        one.pause_s = FIRST_PAUSE_S if in_order else min(2 * one.pause_s, LONGEST_PAUSE_S)
        _say(f"{one.child.name} ended ({_words(code)}); starting it again in {max(0.0, one.due - now):.0f} s")
        self._write()

    def _start(self, one: _Running) -> None:
        path = self._logs / f"{one.child.name}.log"
        self._cut(path)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            try:
                one.process = subprocess.Popen(
                    one.child.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **one.child.environment},
                    start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone, which drains
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                raise ChildError(f"{one.child.command[0]}: cannot be started: {error.strerror}") from None
        one.started, one.since = time.monotonic(), time.time()
        self._write()

    def _end(self) -> None:
        """Ends all that runs: each gets SIGTERM and its time, in reverse order; then what is left of its session."""
        for one in reversed(self._running):
            if one.process is None:
                continue
            grace = self._grace_s if one.child.grace_s is None else one.child.grace_s
            for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
                try:
                    if number == signal.SIGTERM:
                        one.process.send_signal(number)  # its own children are its own to drain
                    else:
                        os.killpg(one.process.pid, number)
                except ProcessLookupError:
                    break
                try:
                    one.process.wait(patience)
                except subprocess.TimeoutExpired:
                    if number == signal.SIGTERM:
                        _say(f"{one.child.name} did not finish in {grace:.0f} s; ending it")
            _kill_session(one.process)
            one.last_exit, one.process = one.process.returncode, None

    def _write(self, running: bool = True) -> None:
        content: dict[str, Any] = {
            "supervisor": os.getpid() if running else None,
            "since": self._began,
            "processes": {
                one.child.name: {
                    "pid": one.process.pid if one.process else None,
                    "since": one.since if one.process else None,
                    "restarts": one.restarts,
                    "last_exit": one.last_exit,
                }
                for one in self._running
            },
        }
        with suppress(OSError):  # a full disk must not end what runs
            write_atomic(self._status, json.dumps(content, indent=1).encode() + b"\n")

    def _cut_logs(self) -> None:
        for one in self._running:
            with suppress(OSError):  # no room for the copy
                self._cut(self._logs / f"{one.child.name}.log", running=one.process is not None)

    def _cut(self, path: Path, running: bool = False) -> None:
        """Keeps a log from filling the disk. A running process appends to the file it has open: that is emptied."""
        if not path.exists() or path.stat().st_size < MAX_LOG_BYTES:
            return
        old = path.with_name(path.name + ".1")
        if running:
            old.write_bytes(path.read_bytes())
            os.truncate(path, 0)
        else:
            path.replace(old)
        old.chmod(0o600)

    def _last_line(self, child: Child) -> str:
        path = self._logs / f"{child.name}.log"
        lines = [line.strip() for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
        return lines[-1][:500] if lines else ""


def read_status(path: Path) -> dict[str, Any] | None:
    """What a supervisor last wrote, or None: it never ran, or what is there is not readable."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else None


def _die_with_parent() -> None:
    """In the child, before its program: SIGKILL when the supervisor dies, so that nothing runs unwatched."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def end_with_parent() -> None:
    """For `preexec_fn` of whoever starts a supervisor: SIGTERM when its own parent dies, so that it drains."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Ends whatever a process started and left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _words(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _say(line: str) -> None:
    with suppress(OSError):  # a file on a full disk, a pipe that nobody reads any more
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
