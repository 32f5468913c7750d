"""Processes whose end does not come when they are killed, and a loop that waits for a fact."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from socketprotector.model.records import Program
from socketprotector.system.loop import Loop
from socketprotector.system.process import Process, reap_orphans
from tests import forked
from tests.procfs import children_of
from tests.running import DEADLINE_S

SHELL = Program(
    path="/bin/sh",
    argv=("sh", "-c", "exit 3"),
    directory="/",
    environment=(("A", "1"),),
    umask=0o022,
    limits=(),
    nice=0,
)

_PTRACE_SEIZE = 0x4206


@contextmanager
def traced(pid: int) -> Iterator[None]:
    """Have another process trace one and do nothing more.

    While this lasts a killed process stays unreaped: its parent waits, as for one that waits for a
    disk.  Source: ptrace(2).
    """
    receive, send = os.pipe()
    tracer = os.fork()
    if tracer == 0:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
            if libc.ptrace(_PTRACE_SEIZE, pid, None, None) == 0:
                os.write(send, b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(send)
    try:
        assert os.read(receive, 1) == b"!", "it cannot be traced"
        yield
    finally:
        os.close(receive)
        os.kill(tracer, signal.SIGKILL)
        os.waitpid(tracer, 0)


def turn(loop: Loop) -> None:
    """Let the loop see what is due and ready, without waiting."""

    def end() -> None:
        loop.running = False

    loop.running = True
    loop.call_after("end of the turn", 0.0, end)
    loop.run()


def until(loop: Loop, fact: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    """Run the loop until something is so."""
    end = time.monotonic() + deadline_s

    def look() -> None:
        assert time.monotonic() < end, "it never came"
        if fact():
            loop.running = False
        else:
            loop.call_after("until", 0.005, look)

    loop.running = True
    look()
    loop.run()
    loop.cancel("until")
    loop.running = True


def children() -> set[int]:
    """Return the pids of this process's children, the one that forks for tests left out."""
    return {*children_of(os.getpid())} - forked.source()


def settle(loop: Loop) -> None:
    """Run the loop until each child has ended and was reaped, as the supervisor reaps them."""

    def settled() -> bool:
        reap_orphans()
        return not children()

    until(loop, settled)


def running(script: str) -> Program:
    return replace(SHELL, argv=("sh", "-c", script))


def end_of(process: Process) -> tuple[bool, str]:
    poll = select.poll()
    poll.register(process.pidfd, select.POLLIN)
    assert poll.poll(30_000)
    result = process.reap()
    assert result is not None
    process.close()
    return result.clean, result.how


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
