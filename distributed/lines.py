"""Straight lines from a client to shards on the same machine: sockets, past Ray.

A call by Ray takes about 1 ms of processor time on either side, and a training step makes three
calls of each shard; over a line a call takes a tenth of that. Ray starts the shards, says where
their lines are, and carries whatever a line does not: calls of other machines, of a shard that has
gone, and those that fail (as an answer that is an error goes by Ray, which can send one).

A line is an abstract Unix socket, which no other machine reaches, and which both ends refuse to a
process of another user. What goes over it: 8 bytes, how long the head is; the head in JSON (tree
and dtypes as in `Packed`, then each array's dtype and shape); the arrays.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any

import numpy as np

from sparsemem.distributed.wire import Packed

LENGTH = struct.Struct("<Q")
FAILED = LENGTH.pack(0)  # instead of an answer
MOST = 1 << 26  # bytes of a head
PATIENCE = 10.0  # seconds for an answer that has begun
ARE_THERE = hasattr(socket, "SO_PEERCRED")  # on Linux


class LostLine(Exception):
    """The other end is gone, or what it says is no answer."""


def send(end: socket.socket, packed: Packed) -> None:
    """A call or an answer."""
    arrays = [np.ascontiguousarray(array) for array in packed.arrays]
    kinds = [[array.dtype.str, array.shape] for array in packed.arrays]
    head = json.dumps([packed.tree, packed.dtypes, kinds], separators=(",", ":")).encode()
    end.sendall(LENGTH.pack(len(head)) + head)
    for array in arrays:
        end.sendall(array.reshape(-1).view(np.uint8).data)


def receive(end: socket.socket) -> Packed | None:
    """What was sent; None for FAILED."""
    length = bytearray(LENGTH.size)
    fill(end, length)
    (size,) = LENGTH.unpack(length)
    if not size:
        return None
    if size > MOST:
        raise LostLine(f"a head has {size} bytes, expected at most {MOST}")
    head = bytearray(size)
    fill(end, head)
    tree, dtypes, kinds = json.loads(head)
    arrays = [np.empty(shape, np.dtype(kind)) for kind, shape in kinds]
    for array in arrays:
        fill(end, array.reshape(-1).view(np.uint8))
    return Packed(tree, dtypes, arrays)


def fill(end: socket.socket, buffer: Any) -> None:
    """Receive as many bytes as there is room for."""
    view = memoryview(buffer)
    while len(view):
        count = end.recv_into(view)
        if not count:
            raise LostLine("the other end is closed")
        view = view[count:]


def is_own(end: socket.socket) -> bool:
    """Whether a process of this user is at the other end."""
    peer = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", peer)
    return bool(user == os.getuid())


class Switchboard:
    """A shard's end of all lines to it, each with a thread; `answer` is to stand that.

    Whatever it raises is heard as a failure, and nothing of what.
    """

    def __init__(self, answer: Callable[[Packed], Packed]) -> None:
        self._answer, self.address = answer, uuid.uuid4().hex
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(f"\0{self.address}")
        self._socket.listen()
        Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No further lines. Those that there are end with their clients."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                end, _ = self._socket.accept()
                Thread(target=self._serve, args=(end,), daemon=True).start()

    def _serve(self, end: socket.socket) -> None:
        with end, suppress(OSError, LostLine, ValueError, TypeError):
            if not is_own(end):
                return
            while (call := receive(end)) is not None:
                try:
                    answer = self._answer(call)
                except Exception:
                    end.sendall(FAILED)
                else:
                    send(end, answer)


class Heard:
    """What becomes of a call."""

    def __init__(self, line: Line) -> None:
        self.line, self.is_done = line, False
        self.answer: Packed | None = None  # None, if done: it failed, or the line was lost


class Line:
    """A client's end. Calls are answered in their order. For one thread at a time."""

    def __init__(self, address: str) -> None:
        """OSError if the shard is not on this machine, LostLine if it is another user's."""
        self._waiting: deque[Heard] = deque()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.is_open = True
        try:
            self._socket.connect(f"\0{address}")
            if not is_own(self._socket):
                raise LostLine("another user's process is at the other end")
        except BaseException:
            self.close()
            raise

    def ask(self, call: Packed, seconds: float) -> Heard:
        """Make a call; within so many seconds the other end has to have room for it."""
        heard = Heard(self)
        self._waiting.append(heard)
        try:
            self._socket.settimeout(seconds)
            send(self._socket, call)
        except OSError:
            self.close()
        return heard

    def hear(self, heard: Heard, seconds: float) -> None:
        """Wait until a call is done; TimeoutError after so long, and the line is closed."""
        deadline = time.monotonic() + seconds
        while not heard.is_done:
            self._next(max(deadline - time.monotonic(), 0.001))

    def look(self, heard: Heard) -> bool:
        """Whether a call is done, without waiting for the shard."""
        while not heard.is_done and select.select([self._socket], [], [], 0)[0]:
            with suppress(TimeoutError):
                self._next(PATIENCE)
        return heard.is_done

    def _next(self, seconds: float) -> None:
        """The next answer; if the line is lost, of all calls."""
        try:
            self._socket.settimeout(seconds)
            answer = receive(self._socket)
        except TimeoutError:
            self.close()
            raise
        except (OSError, LostLine, ValueError, TypeError):
            self.close()
        else:
            first = self._waiting.popleft()
            first.answer, first.is_done = answer, True

    def close(self) -> None:
        """All calls that have no answer have failed."""
        self.is_open = False
        self._socket.close()
        for heard in self._waiting:
            heard.is_done = True
        self._waiting.clear()
