"""What the scenarios of the running protector need beyond tests/running.py."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.running import DEADLINE_S, WORKERS, Protector, eventually

NOBODY = 65534
#: Trying again 50 times at most in the first second costs some milliseconds; a spin costs all.
SPIN_SHARE = 0.5

Address = tuple[str, int] | str
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
    """A FIFO that somebody waits to read; all go on when the test opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.mkfifo(path)

    def before(self, *command: str) -> tuple[str, ...]:
        """A command that waits for the gate and then becomes another."""
        return ("/bin/sh", "-c", 'cat "$0" && exec "$@"', str(self.path), *command)

    def open(self) -> None:
        """Let everybody through who waits now; waits until somebody does."""
        os.close(os.open(self.path, os.O_WRONLY))

    def let_through(self) -> None:
        """Let everybody through who waits now, if somebody does."""
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            pass  # nobody

    def stay_open(self) -> None:
        """Let everybody through, now and later."""
        os.unlink(self.path)
        self.path.touch()


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


class Client:
    """One connection of a test: what is sent, and what comes back later."""

    def __init__(self, address: Address, line: str | None = None) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        if not isinstance(address, str) and ":" in address[0]:
            family = socket.AF_INET6
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE_S)
        self.socket.connect(address)
        self._got = b""
        if line is not None:
            self.say(line)

    def say(self, line: str) -> None:
        self.socket.sendall(line.encode() + b"\n")

    def hear(self) -> str:
        """Return the next line; what came before the end of file, if that comes first."""
        while b"\n" not in self._got:
            data = self.socket.recv(65536)
            if not data:
                break
            self._got += data
        line, _, self._got = self._got.partition(b"\n")
        return line.decode()

    def ask(self, line: str = "hello") -> str:
        self.say(line)
        return self.hear()

    def reset(self) -> None:
        """Close so that the other side reads a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


def listening(port: int) -> int:
    """How many sockets listen on a port of IPv4."""
    table = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    found = [line.split()[1:4] for line in table]
    return sum(local.endswith(f":{port:04X}") and state == "0A" for local, _, state in found)


def state_of(pid: int) -> str:
    """R, S, T, Z, ...; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text.rpartition(")")[2].split()[0]


def hold(pid: int) -> None:
    """Stop a process, and wait until it stands still."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state_of(pid) == "T", f"process {pid} stopped")


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def wake_ups(pid: int) -> int:
    """How often a process went to sleep by itself so far."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"^voluntary_ctxt_switches:\t(\d+)", text, re.MULTILINE)
    assert found
    return int(found[1])


def memory_kib(pid: int) -> int:
    """What a process keeps in memory for itself."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"^RssAnon:\s+(\d+)", text, re.MULTILINE)
    assert found
    return int(found[1])


def descriptors(pid: int) -> dict[int, str]:
    """Number and target of each descriptor of a process."""
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
        except FileNotFoundError:
            continue
    return found


def kinds_of(pid: int) -> dict[str, int]:
    """How many descriptors of each kind a process has: sockets, pipes, pidfds, ..."""
    counted: dict[str, int] = {}
    for target in descriptors(pid).values():
        kind = re.sub(r":\[\d+\]$", "", target)
        counted[kind] = counted.get(kind, 0) + 1
    return counted


def kinds_at_rest(daemon: Protector) -> dict[str, int]:
    """The same of a protector that has done all that it was told before."""
    mark = daemon.signal(signal.SIGUSR1)
    daemon.log.wait_for("event=reopened", after=mark)
    return kinds_of(daemon.pid)


def no_more_open(before: dict[str, int], *pids: int) -> None:
    """Wait until these processes have together no more descriptors of any kind than before.

    What is given up goes a turn of the loop after what gave it up; and what was still open
    at the first look may have gone since.
    """

    def more() -> list[str]:
        now = together(*pids)
        return [f"{n} {kind}" for kind, n in now.items() if n > before.get(kind, 0)]

    try:
        eventually(lambda: not more(), "the end of what is no longer needed")
    except AssertionError:
        assert more() == [], before


def together(*pids: int) -> dict[str, int]:
    """How many descriptors of each kind these processes have."""
    counted: dict[str, int] = {}
    for pid in pids:
        for kind, n in kinds_of(pid).items():
            counted[kind] = counted.get(kind, 0) + n
    return counted


def in_backlog(port: int) -> int:
    """How many connections wait in the kernel's backlogs of a listener on 127.0.0.1."""
    waiting = 0
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        words = line.split()
        if words[1].endswith(f":{port:04X}") and words[3] == "0A":
            waiting += int(words[4].partition(":")[2], 16)
    return waiting


def children_of(pid: int) -> list[int]:
    """The living and unreaped children of a process."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return [int(word) for word in text.split()]


def watch_for_spinning(pid: int, tries: int, daemon: Protector) -> None:
    """Wait until the protector has woken up a few times, and see what that has cost."""
    cpu, began, woken = cpu_s(pid), time.monotonic(), wake_ups(pid)
    eventually(lambda: wake_ups(pid) >= woken + tries, "its next tries")
    passed = time.monotonic() - began
    assert cpu_s(pid) - cpu < max(0.1, SPIN_SHARE * passed), daemon.log.text()


def worker_for_nobody() -> tuple[str, ...]:
    """The command of the worker in_order.py with a Python that nobody may execute."""
    _, *rest = worker("in_order")
    for python in (sys.executable, "/usr/bin/python3"):
        check = [python, "-S", "-E", "-c", "import sys; open(sys.argv[1])", rest[-1]]
        try:
            subprocess.run(
                check, user=NOBODY, group=NOBODY, cwd="/", check=True, stderr=subprocess.DEVNULL
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return (python, *rest)
    pytest.skip("NEEDS a Python and a checkout that the user nobody may read")
