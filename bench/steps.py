"""What each step of handing one connection over costs by itself, in this interpreter.

The account beside the figure of one connection at a time: the same calls as on the hot path,
timed in one process, and the waking of one more process, timed between two.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable

ROUNDS = 3000
BATCH = 32  # connections prepared before a step is timed on all of them


def _each_us(step: Callable[[int], object], count: int) -> float:
    begun_ns = time.perf_counter_ns()
    for index in range(count):
        step(index)
    return (time.perf_counter_ns() - begun_ns) / count / 1e3


def steps_us() -> dict[str, float]:
    """Return the microseconds of each step, the smallest of many batches (so: undisturbed)."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    listener.setblocking(False)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    poll = select.epoll()
    poll.register(listener.fileno(), select.EPOLLIN)
    number = struct.Struct("i")
    header = struct.Struct("<BBHIQ")
    best: dict[str, float] = {}

    def note(name: str, step: Callable[[int], object]) -> None:
        best[name] = min(best.get(name, 1e9), _each_us(step, BATCH))

    def refused(_: int) -> None:
        try:
            listener.accept()
        except BlockingIOError:
            pass  # what is timed

    fds: list[int] = []
    taken: list[int] = []

    def accept(_: int) -> None:
        fds.append(listener.accept()[0].detach())

    def send(index: int) -> None:
        record = header.pack(1, 1, 0, 0, time.monotonic_ns())
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, number.pack(fds[index]))
        ours.sendmsg([record], [rights], socket.MSG_DONTWAIT)

    def take(_: int) -> None:
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        ancillary = theirs.recvmsg(16, socket.CMSG_LEN(4), flags)[1]
        fd = number.unpack(ancillary[0][2])[0]
        taken.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd).detach())

    for _ in range(ROUNDS // BATCH):
        clients = [socket.create_connection(listener.getsockname()) for _ in range(BATCH)]
        note("epoll_wait that returns at once", lambda _: poll.poll())
        note("accept", accept)
        note("accept that finds nothing", refused)
        note("sendmsg with the descriptor", send)
        note("recvmsg with the descriptor", take)
        note("close of the protector's copy", lambda index: os.close(fds[index]))
        for fd in taken:
            os.close(fd)
        for client in clients:
            client.close()
        fds.clear()
        taken.clear()
    for end in (listener, ours, theirs):
        end.close()
    poll.close()
    best["waking one more process"] = wakeup_us()
    return best


def wakeup_us() -> float:
    """Return the microseconds from a send to the return of another process's epoll_wait.

    Half the round trip of one record between two processes that both sleep in epoll_wait, less
    what the same send, epoll_wait and recv cost when no process has to be woken.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            ours.close()
            echo = select.epoll()
            echo.register(theirs.fileno(), select.EPOLLIN)
            while echo.poll() and (said := theirs.recv(64)):
                theirs.send(said)
        finally:
            os._exit(0)
    poll = select.epoll()
    poll.register(ours.fileno(), select.EPOLLIN)
    trips: list[int] = []
    for _ in range(ROUNDS):
        begun_ns = time.perf_counter_ns()
        ours.send(b"x" * 16)
        poll.poll()
        ours.recv(64)
        trips.append(time.perf_counter_ns() - begun_ns)
    ours.close()
    theirs.close()
    poll.close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    poll = select.epoll()
    poll.register(right.fileno(), select.EPOLLIN)
    alone: list[int] = []
    for _ in range(ROUNDS):
        begun_ns = time.perf_counter_ns()
        left.send(b"x" * 16)
        poll.poll()
        right.recv(64)
        alone.append(time.perf_counter_ns() - begun_ns)
    left.close()
    right.close()
    poll.close()
    middle = ROUNDS // 2
    return (sorted(trips)[middle] / 2 - sorted(alone)[middle]) / 1e3
