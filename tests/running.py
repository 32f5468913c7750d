"""Starts the real command for a test, waits for what it says, and sees that nothing is left.

Everything waits for a fact (a log line, an end of file, a process's end) with a deadline.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import uuid
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests import forked

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ROOT / "tests" / "workers"
COMMAND = (sys.executable, "-m", "socketprotector")
#: Options with which workers accept; those that are built on tests/workers/plain.py do either.
LISTENER = ("--handoff", "listener", "--ready", "notify")
DEADLINE_S = 30.0

#: --start-timeout where a good start has to fit into it on a busy machine, and one that hangs is
#: waited for.
FAIR_START_S = 8
#: In the environment of whatever a test starts, so that what it leaves behind is found.  Not
#: SOCKETPROTECTOR_*, which never reaches a worker.
MARK = "TEST_OF_SOCKETPROTECTOR"


class Lines:
    """What a pipe says, line by line, read by a thread; tests wait for a line.

    Whoever looks takes in first what was written by then, so that what was said before a fact is
    there once the fact is known: the thread may be late.
    """

    def __init__(self, stream: int) -> None:
        """Take ownership of the pipe's end; it is closed at the end of file."""
        self._stream = stream
        self._lines: list[str] = []
        self._rest = b""  # of a line that has no end yet
        self._ended = False
        self._news = threading.Condition(threading.RLock())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        poll = select.poll()
        poll.register(self._stream, select.POLLIN)
        while not self._ended:
            [(_, events)] = poll.poll()
            with self._news:
                if not self._take() and not events & select.POLLIN:
                    self._ended = True
                    if self._rest:
                        self._add(self._rest)
                    os.close(self._stream)
                self._news.notify_all()

    def _take(self) -> bool:
        """Take in what was written so far; say whether that was anything."""
        if self._ended:
            return False
        waiting = array("i", [0])
        fcntl.ioctl(self._stream, termios.FIONREAD, waiting)
        left = waiting[0]
        while left > 0:
            data = os.read(self._stream, left)
            left -= len(data)
            *whole, self._rest = (self._rest + data).split(b"\n")
            for line in whole:
                self._add(line)
        return waiting[0] > 0

    def _add(self, line: bytes) -> None:
        self._lines.append(line.decode("utf-8", "replace"))

    @property
    def seen(self) -> list[str]:
        """All lines that were written so far; it grows."""
        with self._news:
            if self._take():
                self._news.notify_all()
            return self._lines

    def wait_for(self, pattern: str, *, after: int = 0, deadline_s: float = DEADLINE_S) -> str:
        """Return the first line, from index `after` on, in which the pattern is found."""
        wanted = re.compile(pattern)
        until = time.monotonic() + deadline_s
        at = after
        with self._news:
            while True:
                seen = self.seen
                for line in seen[at:]:
                    if wanted.search(line):
                        return line
                at = max(after, len(seen))
                left = until - time.monotonic()
                if self._ended or left <= 0:
                    raise AssertionError(f"no line like {pattern!r} in:\n{self.text()}")
                self._news.wait(left)

    def count(self, pattern: str) -> int:
        return sum(1 for line in list(self.seen) if re.search(pattern, line))

    def text(self) -> str:
        return "\n".join(self.seen)

    def join(self) -> None:
        self._thread.join(DEADLINE_S)


class Protector:
    """A protector in the foreground with its log at hand."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        through: Sequence[str] = (),
        command: Sequence[str] = COMMAND,
        **more: Any,
    ) -> None:
        """`through`: a command that executes the protector in its place, as nice does.

        more: for Popen.
        """
        receive, send = os.pipe()
        out, out_send = os.pipe()
        self.process = forked.popen(
            [*through, *command, "-f", *arguments],
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": out_send,
                "stderr": send,
                "env": {**os.environ, **environment},
                "start_new_session": True,
                **more,
            },
        )
        os.close(send)
        os.close(out_send)
        self.log = Lines(receive)
        self.out = Lines(out)

    @property
    def pid(self) -> int:
        return self.process.pid

    def ready(self) -> Protector:
        """Wait until the first generation serves."""
        self.log.wait_for(r"event=ready\b")
        return self

    @property
    def addresses(self) -> list[str]:
        """The canonical addresses it listens on, in index order."""
        line = self.log.wait_for(r"event=start\b.* listen=")
        found = re.search(r'listen="?([^"]+)"?', line)
        assert found
        return found[1].split()

    @property
    def port(self) -> int:
        return int(self.addresses[0].rpartition(":")[2])

    def signal(self, number: signal.Signals) -> int:
        """Send a signal; return the log's length before it, to wait from there."""
        mark = len(self.log.seen)
        self.process.send_signal(number)
        return mark

    def reload(self) -> None:
        """Reload, and wait until the new generation serves."""
        mark = self.signal(signal.SIGHUP)
        line = self.log.wait_for(r"event=(reloaded|reload-failed)\b", after=mark)
        assert "event=reloaded" in line, self.log.text()

    def worker_pids(self) -> list[int]:
        """The processes of the workers that live now."""
        found = []
        for line in list(self.log.seen):
            if match := re.search(r"event=spawned .*\bpid=(\d+)", line):
                pid = int(match[1])
                if parent_of(pid) == self.pid:
                    found.append(pid)
        return found

    def stop(self, *, status: int = 0) -> None:
        """Stop gracefully and wait for the end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE_S) == status, self.log.text()
        self.log.join()

    def wait(self) -> int:
        """Wait for its end and return the exit status."""
        status = self.process.wait(DEADLINE_S)
        self.log.join()
        return status

    def end(self) -> None:
        """Whatever the test left: end it, and its workers with it."""
        for _ in range(2):
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
                try:
                    self.process.wait(DEADLINE_S)
                except subprocess.TimeoutExpired:
                    self.process.kill()
        self.process.wait()


def parent_of(pid: int) -> int:
    """The parent of a process, 0 when it is gone (or a zombie)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    state, parent = stat.rpartition(")")[2].split()[:2]
    return 0 if state == "Z" else int(parent)


def marked(mark: str) -> list[int]:
    """The living processes that carry a test's mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def wait_gone(pids: Sequence[int], deadline_s: float = DEADLINE_S) -> list[int]:
    """Wait until processes have ended; return those that live on after the deadline."""
    until = time.monotonic() + deadline_s
    left = []
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            left.append(pid)
        os.close(fd)
    return left


def eventually(fact: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait for a fact that nothing announces (a number in /proc), looking every 10 ms."""
    until = time.monotonic() + deadline_s
    while not fact():
        assert time.monotonic() < until, f"never came: {what}"
        select.select([], [], [], 0.01)


def ask(address: tuple[str, int] | str, line: str = "hello", timeout_s: float = DEADLINE_S) -> str:
    """Connect, send a line, return the line that comes back."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    if not isinstance(address, str) and ":" in address[0]:
        family = socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.settimeout(timeout_s)
        client.connect(address)
        return exchange(client, line)


def exchange(client: socket.socket, line: str) -> str:
    """Send a line over a connection and return the line that comes back."""
    client.sendall(line.encode() + b"\n")
    got = b""
    while not got.endswith(b"\n"):
        data = client.recv(4096)
        if not data:
            break
        got += data
    return got.decode().rstrip("\n")


@contextmanager
def mark() -> Iterator[dict[str, str]]:
    """An environment that marks what a test starts; at the end nothing with it may live."""
    value = uuid.uuid4().hex
    yield {MARK: value}
    left = wait_gone(marked(value))
    shown = []
    for pid in left:
        try:
            shown.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "))
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # it has ended after all
    assert not left, f"left behind: {shown}"
