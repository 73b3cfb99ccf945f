"""Two hosts on one machine and the wire between them: late, lossy, narrow, or cut, as a test sets it.

Each host is a network namespace of Linux with its own loopback and one TUN device; nothing else leads out of it. A
thread carries packets from one device to the other. What the wire does is done there, for not every kernel has netem.

A namespace here has no name: it is there as long as a process is in it or this one holds its file. So nothing is left
of a test that was killed, and nothing has to be cleaned up before the next.

A *thread* is in a namespace, and the processes it starts are too: `with wire.at(wire.far): …` puts whatever is started
in the block on the far side, with everything else as it was.
"""

from __future__ import annotations

import ctypes
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

if sys.platform != "linux":
    raise RuntimeError("network namespaces are Linux's")
import fcntl

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_OWN, _TUN = "/proc/thread-self/ns/net", "/dev/net/tun"
_DEVICE = "wire"
_MTU = 1500
_QUEUE_S = 0.5  # of a narrow line: what would wait longer is lost, as at a router
_LIBC = ctypes.CDLL(None, use_errno=True)


class NotPermittedError(Exception):
    """No network namespaces here; the message says what is missing."""


@dataclass(frozen=True, eq=False)
class Host:
    """One side: its namespace and its device, as open files; its address on the wire."""

    address: str
    namespace: int
    device: int


@dataclass(eq=False)
class _Way:
    """One direction. Of each packet: when it is through the narrow part, then the delay."""

    chance: random.Random
    free: float = 0.0  # when the line has sent what it has
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque[tuple[float, bytes]])
    carried: int = 0
    lost: int = 0


class Wire:
    """What carries packets between two hosts; ends with `close`.

    Attributes:
        near, far: the hosts.
        delay_s: of each packet, one way.
        loss: probability that a packet is lost, each way.
        bits_per_s: of each direction; 0: as fast as it goes.
    """

    def __init__(self, near: Host, far: Host, seed: int) -> None:
        self.near, self.far = near, far
        self.delay_s, self.loss, self.bits_per_s = 0.0, 0.0, 0.0
        self._cut = self._closed = False
        self._ways = {near.device: _Way(random.Random(seed)), far.device: _Way(random.Random(seed + 1))}
        self._across = {near.device: far.device, far.device: near.device}
        self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """From now on nothing gets through, nor does what is on its way."""
        self._cut = True

    def mend(self) -> None:
        """As before the cut."""
        self._cut = False

    @property
    def carried(self) -> int:
        """Packets, both ways."""
        return sum(way.carried for way in self._ways.values())

    @property
    def lost(self) -> int:
        """Packets, both ways: by chance, by a full queue, by a cut."""
        return sum(way.lost for way in self._ways.values())

    @contextmanager
    def at(self, host: Host) -> Iterator[None]:
        """This thread, and what it starts, is on a host while the block runs."""
        with _back():
            _enter(host.namespace)
            yield

    def close(self) -> None:
        """Ends the wire; what runs on the far side stays there alone."""
        self._closed = True
        os.write(self._wake[1], b"x")
        self._thread.join()
        for one in (*self._wake, *(fd for host in (self.near, self.far) for fd in (host.device, host.namespace))):
            os.close(one)

    def _carry(self) -> None:
        devices = [*self._ways]
        while not self._closed:
            due = min((way.waiting[0][0] for way in self._ways.values() if way.waiting), default=None)
            patience = None if due is None else max(0.0, due - time.monotonic())
            ready, _, _ = select.select([*devices, self._wake[0]], [], [], patience)
            for device in ready:
                if device in self._ways:
                    self._take(device, self._ways[device])
            now = time.monotonic()
            for device, way in self._ways.items():
                while way.waiting and way.waiting[0][0] <= now:
                    packet = way.waiting.popleft()[1]
                    if self._cut:
                        way.lost += 1
                        continue
                    # A device whose queue is full, or that is not up: lost, as anywhere.
                    with suppress(OSError):
                        os.write(self._across[device], packet)
                    way.carried += 1

    def _take(self, device: int, way: _Way) -> None:
        for _ in range(64):  # the other direction has its turn
            try:
                packet = os.read(device, 2 * _MTU)
            except BlockingIOError:
                return
            now = time.monotonic()
            begins = max(now, way.free)
            if self._cut or way.chance.random() < self.loss or begins - now > _QUEUE_S:
                way.lost += 1
                continue
            way.free = begins + (8 * len(packet) / self.bits_per_s if self.bits_per_s else 0.0)
            way.waiting.append((way.free + self.delay_s, packet))


@contextmanager
def wire(seed: int = 0, network: str = "10.77.0") -> Iterator[Wire]:
    """Two hosts and what is between them; `near` has the first address of the network, `far` the second.

    Raises:
        NotPermittedError: this machine, or who runs this, may not make them.
    """
    if shutil.which("ip") is None:
        raise NotPermittedError("there is no `ip` (iproute2)")
    with ExitStack() as stack:
        near, far = (_host(f"{network}.{number}", stack) for number in (1, 2))
        stack.pop_all()  # from here on it is the wire that closes them
        made = Wire(near, far, seed)
        try:
            yield made
        finally:
            made.close()


def _host(address: str, stack: ExitStack) -> Host:
    """A namespace with loopback and a device; the thread is back where it was."""
    with _back():
        if _LIBC.unshare(_CLONE_NEWNET) != 0:
            raise NotPermittedError(f"network namespaces: {os.strerror(ctypes.get_errno()).lower()}")
        try:
            namespace = os.open(_OWN, os.O_RDONLY)
            stack.callback(os.close, namespace)
            device = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
            stack.callback(os.close, device)
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
        except OSError as error:
            raise NotPermittedError(f"{_TUN}: {(error.strerror or str(error)).lower()}") from None
        for command in (
            "ip link set lo up",
            f"ip address add {address}/24 dev {_DEVICE}",
            f"ip link set {_DEVICE} mtu {_MTU} up",
        ):
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise NotPermittedError(f"{command}: {done.stderr.strip()}")
    return Host(address, namespace, device)


@contextmanager
def _back() -> Iterator[None]:
    """This thread is in the same namespace after the block as before."""
    before = os.open(_OWN, os.O_RDONLY)
    try:
        yield
    finally:
        _enter(before)
        os.close(before)


def _enter(namespace: int) -> None:
    if _LIBC.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
