"""What the scenarios of the running protector need beyond tests/running.py."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.namespaces import any_users_python
from tests.procfs import cpu_s, kinds_of, state_of, wake_ups
from tests.running import WORKERS, Protector, eventually

NOBODY = 65534
#: Trying again 50 times at most in the first second costs some milliseconds; a spin costs all.
SPIN_SHARE = 0.5

#: The promise holds for workers that are handed connections and for those that accept.
EITHER_HANDOFF = pytest.mark.parametrize("handoff", ["connection", "listener"], indirect=True)


def worker(name: str, *arguments: str | Path) -> tuple[str, ...]:
    """The command of a worker in tests/workers that starts fast: no site, no client library."""
    path = str(WORKERS / f"{name}.py")
    return (sys.executable, "-S", "-E", path, *(str(each) for each in arguments))


def library_worker(name: str, *arguments: str) -> tuple[str, ...]:
    """The command of a worker that is written on the client library."""
    return (sys.executable, str(WORKERS / f"{name}.py"), *arguments)


class Gate:
    """A FIFO that processes wait to read; all go on when the test opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def before(self, *command: str) -> tuple[str, ...]:
        """A command that waits for the gate and then becomes another."""
        return ("/bin/sh", "-c", 'cat "$0" && exec "$@"', str(self.path), *command)

    def open(self) -> None:
        """Let all that wait now through; waits until one does."""
        os.close(os.open(self.path, os.O_WRONLY))

    def let_through(self) -> None:
        """Let all that wait now through, if any does."""
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            pass  # none waits

    def stay_open(self) -> None:
        """Let all through, now and later."""
        waiting = os.open(self.path, os.O_RDWR)  # who waits now reads to its end
        os.unlink(self.path)
        self.path.touch()
        os.close(waiting)


class Release:
    """An executable that can be rewritten between reloads, as a deploy does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def becomes(self, *command: str) -> None:
        """Be another program from the next start on."""
        words = " ".join("'" + word.replace("'", "'\\''") + "'" for word in command)
        self.write(f"#!/bin/sh\nexec {words}\n")

    def write(self, text: str, mode: int = 0o755) -> None:
        """Put a new file in place of the old one, never half-written."""
        new = self.path.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.chmod(mode)
        new.rename(self.path)


def pid_in(reply: str) -> int:
    """The worker's pid in a reply `[pid] line`."""
    found = re.match(r"\[(\d+)\] ", reply)
    assert found, f"no pid in {reply!r}"
    return int(found[1])


def spawned(daemon: Protector, generation: int | None = None) -> list[int]:
    """The pids of all workers that were started, in order; waits for one of the generation."""
    if generation is not None:
        daemon.log.wait_for(f"event=spawned generation={generation} ")
    found = []
    for line in list(daemon.log.seen):
        match = re.search(r"event=spawned generation=(\d+) .*\bpid=(\d+)", line)
        if match and generation in (None, int(match[1])):
            found.append(int(match[2]))
    return found


def hold(pid: int) -> None:
    """Stop a process, and wait until it stands still."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state_of(pid) == "T", f"process {pid} stopped")


def kinds_at_rest(daemon: Protector) -> dict[str, int]:
    """The same of a protector that has done all that it was asked before."""
    mark = daemon.signal(signal.SIGUSR1)
    daemon.log.wait_for("event=reopened", after=mark)
    return kinds_of(daemon.pid)


def no_more_open(before: dict[str, int], *pids: int) -> None:
    """Wait until these processes have together no more descriptors of any kind than before.

    What is given up goes a turn of the loop after what gave it up; and what was still open
    at the first look may have gone since.
    """

    def more() -> list[str]:
        now = kinds_of(*pids)
        return [f"{n} {kind}" for kind, n in now.items() if n > before.get(kind, 0)]

    try:
        eventually(lambda: not more(), "the end of what is no longer needed")
    except AssertionError:
        assert more() == [], before


def watch_for_spinning(pid: int, tries: int, daemon: Protector) -> None:
    """Wait until the protector has woken up a few times, and see what that has cost."""
    cpu, began, woken = cpu_s(pid), time.monotonic(), wake_ups(pid)
    eventually(lambda: wake_ups(pid) >= woken + tries, "its next tries")
    passed = time.monotonic() - began
    assert cpu_s(pid) - cpu < max(0.1, SPIN_SHARE * passed), daemon.log.text()


def worker_for_any_user() -> tuple[str, ...]:
    """Return the command of the worker in_order.py, for the user nobody, too."""
    any_users_python()
    return worker("in_order")
