"""Processes that ``mlx.launch`` starts together, on one machine or on several, here called hosts.

mlx carries arrays between them. All else goes through TCP connections to the first host: what the others are to do
next, and the news that one of them is gone, since a host that waits inside mlx may wait forever.
"""

import atexit
import contextlib
import functools
import json
import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mlx.core as mx
import numpy as np

from ..errors import InputError, KVPError
from ..files import read_json, remove_unfinished

LAUNCHED = "MLX_RANK"
ADDRESSES = ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP")
"""Variables in which ``mlx.launch`` names the first host, where there is no MLX_HOSTFILE."""
LOST = ("[ring]", "[jaccl]", "[nccl]")
"""How mlx's errors begin where a connection to another host breaks."""
JOINING_SECONDS = 30.0
GRACE_SECONDS = 1.0
"""In which a host may end by itself, in an orderly way, after another one is gone."""

T = TypeVar("T")


def is_launched() -> bool:
    """Return whether ``mlx.launch`` started this process."""
    return LAUNCHED in os.environ


def launched_rank() -> int:
    """Return this process's number as ``mlx.launch`` told it, 0 without, or where that is no number."""
    told = os.environ.get(LAUNCHED, "0")
    return int(told) if told.isdecimal() else 0


@functools.cache
def joined() -> "Hosts | None":
    """Return the hosts that this process belongs to, after waiting for them; None where it is alone.

    Raises:
        KVPError: they did not all come.
    """
    if not is_launched():
        return None
    try:
        group = mx.distributed.init()
        return Hosts(group) if group.size() > 1 else None
    except (RuntimeError, OSError) as error:
        raise KVPError(f"the hosts do not find each other ({error}); check the hostfile and the ports.") from error


class Hosts:
    """A group of processes that run the same program, and the line of each to the first.

    Attributes:
        group: mlx's.
        rank: this host's number; host 0 talks to the user.
        size: how many there are.
        has_lost: whether another one ended before its work was done.
    """

    def __init__(self, group: Any):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.has_lost = False
        self._messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._last_choice: mx.array | None = None
        self._is_leaving = threading.Event()
        self._is_told = threading.Event()
        self._lines = self._connected()
        for number, line in self._lines.items():
            threading.Thread(target=self._listen, args=(number, line), daemon=True).start()
        atexit.register(self.leave, has_finished=True)

    # What hosts compute together

    def summed(self, x: np.ndarray) -> np.ndarray:
        """Return the sum over hosts, the same on each."""
        array = mx.array(x, getattr(mx, x.dtype.name))  # float64 stays what it is
        return np.array(mx.distributed.all_sum(array, group=self.group, stream=mx.cpu))

    def gathered(self, x: np.ndarray) -> np.ndarray:
        """Return the rows of all hosts, in the order of their numbers."""
        counts = np.zeros(self.size, np.int32)
        counts[self.rank] = len(x)
        ends = self.summed(counts).cumsum()
        rows = np.zeros((ends[-1], *x.shape[1:]), x.dtype)
        rows[ends[self.rank] - len(x) : ends[self.rank]] = x
        return self.summed(rows)

    def largest(self, x: mx.array) -> mx.array:
        """Return the largest over hosts, element by element; lazy."""
        return mx.distributed.all_max(x, group=self.group)

    def first_choice(self, sampler: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        """Return a sampler that chooses on every host what ``sampler`` chooses on the first.

        Choices wait for one another: those of a batch would else be exchanged in any order.
        """

        def choose(logprobs: mx.array) -> mx.array:
            own = sampler(logprobs) * (self.rank == 0)
            if self._last_choice is not None:
                own = mx.depends(own, self._last_choice)
            self._last_choice = mx.distributed.all_sum(own, group=self.group)
            return self._last_choice

        return choose

    def together(self, action: Callable[[], T]) -> T:
        """Run what each host has to do for itself; where it fails on any, all end, and the first such says why.

        Raises:
            KVPError: it failed here, and on no host before.
            SystemExit: it failed on one before.
        """
        outcome: list[T] = []
        error: KVPError | None = None
        try:
            outcome.append(action())
        except KVPError as found:
            error = found
        codes = np.zeros(self.size, np.int32)
        codes[self.rank] = 0 if error is None else error.exit_code
        failed = np.flatnonzero(codes := self.summed(codes))
        if not failed.size:
            return outcome[0]
        if error is None or failed[0] != self.rank:
            raise SystemExit(int(codes[failed[0]]))
        raise error if self.rank == 0 else KVPError(str(error))

    # The line to the first host

    def tell(self, message: dict[str, Any]) -> None:
        """Tell the other hosts something, if this is the first."""
        if self.rank == 0:
            self._send(message)

    def hear(self) -> dict[str, Any] | None:
        """Return what the first host tells next, None when it has finished."""
        return self._messages.get()

    def leave(self, *, has_finished: bool) -> None:
        """Tell the other hosts that this one ends: its work is done, or it has said why not."""
        self._is_leaving.set()
        self._send(None if has_finished else {})

    def is_told(self, seconds: float = GRACE_SECONDS / 2) -> bool:
        """Return whether it is said why another host ended, after a while in which the news may be on its way."""
        return self._is_told.wait(seconds)

    def ask_to_end(self) -> None:
        """Ask the first host, from another one, to end all of them in its own way; it hears that."""
        self._send({"ask": "end"})

    def end(self, error: Exception) -> NoReturn:
        """End this host at once, from any thread, where it cannot go on; the others do as well, since it is gone."""
        is_lost = str(error).startswith(LOST)
        if not (is_lost and self.is_told()):
            line = gone("another host") if is_lost else f"{type(error).__name__}: {error}"
            os.write(2, f"kvp: {' '.join(line.split())}\n".encode())
        remove_unfinished()
        os._exit(1)

    def _send(self, message: dict[str, Any] | None) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):  # it is gone, as the listening thread hears too
                line.sendall(json.dumps(message).encode() + b"\n")

    def _listen(self, number: int, line: socket.socket) -> None:
        message: dict[str, Any] | None = {}
        with contextlib.suppress(OSError):
            for text in line.makefile(encoding="utf-8"):
                if message := json.loads(text):
                    self._messages.put(message)
                    continue
                self._is_told.set()
                break
        if message is None:
            self._messages.put(None)
            return
        self.has_lost = True
        if not self._is_told.is_set() and not self._is_leaving.is_set():
            os.write(2, f"kvp: {gone(f'host {number}')}\n".encode())
            self._is_told.set()
        if not self._is_leaving.wait(GRACE_SECONDS):
            remove_unfinished()
            os._exit(1)

    def _connected(self) -> dict[int, socket.socket]:
        """Return this host's connections by the others' numbers; a key keeps strangers out."""
        server = socket.create_server((first_address(), 0), backlog=self.size) if self.rank == 0 else None
        offer = [server.getsockname()[1], *secrets.token_bytes(16)] if server else [0] * 17
        port, *key = self.summed(np.array(offer, np.int32)).tolist()
        if server is None:
            line = _kept_alive(socket.create_connection((first_address(), port), timeout=JOINING_SECONDS))
            line.sendall(bytes([*key, *self.rank.to_bytes(2)]))
            return {0: line}
        lines: dict[int, socket.socket] = {}
        with server:
            server.settimeout(JOINING_SECONDS)
            while len(lines) < self.size - 1:
                line = _kept_alive(server.accept()[0])
                greeting = line.recv(18, socket.MSG_WAITALL)
                if secrets.compare_digest(greeting[:16], bytes(key)):
                    lines[int.from_bytes(greeting[16:])] = line
                else:
                    line.close()
        return lines


def gone(who: str) -> str:
    """Return what is said where another host is gone."""
    return f"{who} is gone, and what was under way with it; start all hosts again."


def first_address() -> str:
    """Return the first host's address, as ``mlx.launch`` tells it.

    Raises:
        InputError: it does not.
    """
    if file := os.environ.get("MLX_HOSTFILE"):
        place = str(read_json(Path(file))[0][0])
    else:
        place = next((os.environ[name] for name in ADDRESSES if name in os.environ), "")
    if not place:
        raise InputError("mlx.launch names no first host; use its backend ring, jaccl or nccl.")
    return place.rsplit(":", 1)[0].strip("[]")


def _kept_alive(line: socket.socket) -> socket.socket:
    """Send small messages at once, and find out within 8 seconds that the machine at the other end is gone."""
    line.settimeout(None)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
    for option, value in ((idle, 2), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 3)):
        if option is not None:
            line.setsockopt(socket.IPPROTO_TCP, option, value)
    return line
