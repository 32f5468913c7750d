"""What is started to be measured, and what /proc says about it.

Every process here is started by this module, ended by it, and never searched by name.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

HERE = Path(__file__).parent
ROOT = HERE.parent
START_LIMIT_S = 20.0
STOP_LIMIT_S = 10.0


class CannotMeasure(Exception):
    """A figure that could not be taken; the text says why."""


class Switches(NamedTuple):
    """Context switches of all threads of a process."""

    voluntary: int
    involuntary: int


def built(name: str, *, preloaded: bool = False) -> str:
    """Return the path of bench/NAME; compile it first if bench/NAME.c or a header is newer.

    preloaded: as NAME.so, for LD_PRELOAD.
    """
    source, binary = HERE / f"{name}.c", HERE / (f"{name}.so" if preloaded else name)
    newest_s = max(each.stat().st_mtime for each in (source, *HERE.glob("*.h")))
    if not binary.exists() or binary.stat().st_mtime < newest_s:
        flags = ["-std=c99", "-O2", "-Wall", "-Wextra", "-Werror"]
        flags += ["-fPIC", "-shared"] if preloaded else []
        # Renamed, because another process may run or compile it now.
        new = binary.with_name(f".{binary.name}.{os.getpid()}")
        try:
            subprocess.run(["cc", *flags, "-o", str(new), str(source)], check=True)
            new.rename(binary)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CannotMeasure(f"cannot build {source.name}: {error}") from error
    return str(binary)


def generate(address: str, *options: str) -> dict[str, Any]:
    """Run bench/load against an address and return what it saw."""
    command = [built("load"), *options, address]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return seen


def ask(address: str, line: str = "ping", timeout_s: float = 10.0) -> tuple[int, str]:
    """Send one line on a new connection; return which worker answered and what."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout_s) as sock:
        sock.sendall(line.encode() + b"\n")
        reply = b""
        while not reply.endswith(b"\n"):
            received = sock.recv(65536)
            if not received:
                raise ConnectionResetError(f"only {reply!r} came back")
            reply += received
    pid, _, rest = reply.decode().partition(" ")
    return int(pid.strip("[]")), rest.rstrip("\n")


def stamps(address: str) -> dict[str, int]:
    """Return what the worker that answers knows about itself."""
    told: dict[str, int] = json.loads(ask(address, "stamps")[1])
    return told


def cpu_ns(pid: int) -> int:
    """Return the time on a CPU of all threads of a process, to the nanosecond."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def cpu_ticks(pid: int) -> int:
    """Return utime + stime in ticks (see os.sysconf("SC_CLK_TCK")): the coarse, second opinion."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(after_name[11]) + int(after_name[12])


def switches(pid: int) -> Switches:
    """Return how often the threads of a process gave up or lost their CPU so far."""
    voluntary = involuntary = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        for line in (task / "status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                voluntary += int(line.split()[1])
            elif line.startswith("nonvoluntary_ctxt_switches"):
                involuntary += int(line.split()[1])
    return Switches(voluntary, involuntary)


def resident_kib(pid: int) -> int:
    """Return VmRSS."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise CannotMeasure(f"process {pid} has ended")


def descendants(pid: int) -> list[int]:
    """Return all living children of a process, and theirs."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *descendants(child)]
    return found


def free_port() -> int:
    """Return a port that no process listened on a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Started:
    """A process of ours with an address that answers; a context manager that ends it."""

    def __init__(
        self, command: list[str], address: str, env: dict[str, str], fds: list[int]
    ) -> None:
        self.address = address
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._process = subprocess.Popen(
            command, env={**os.environ, **env}, pass_fds=fds, stdin=subprocess.DEVNULL,
            stdout=self._log, stderr=self._log,
        )  # fmt: skip
        self.pid = self._process.pid
        self._wait_until_it_answers()

    def _wait_until_it_answers(self) -> None:
        deadline_s = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self._ask()
                return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    said = self.said()
                    self.close()
                    raise CannotMeasure(f"{self.address} never answered: {said}") from error
                time.sleep(0.02)

    def _ask(self) -> None:
        """See whether it answers.  Raises OSError."""
        ask(self.address)

    def said(self) -> str:
        """Return the end of what it wrote."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:]

    def close(self) -> None:
        """End it and everything below it: asked first, forced after a while."""
        below = descendants(self.pid) if self._process.poll() is None else []
        self._process.terminate()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            for pid in below:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it ended with its protector, as it should
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            print(self.said(), file=sys.stderr)
        self.close()


def worker_command(mode: str) -> list[str]:
    """Return the command of the worker that is measured."""
    return [built("stamp"), sys.executable, str(HERE / "worker.py"), mode]


def protector(mode: str = "library", *options: str, command: Sequence[str] = ()) -> Started:
    """Start SocketProtector in the foreground on a free port, with the worker behind it.

    command: another worker.
    """
    address = f"127.0.0.1:{free_port()}"
    program = os.environ.get("BENCH_PROTECTOR", "").split() or [
        str(Path(sysconfig.get_path("scripts")) / "SocketProtector"),
        "-f",
    ]
    words = [*program, *options, address, "--", *(command or worker_command(mode))]
    return Started(words, address, {}, [])


#: For protector(): the worker accepts from a listener that it is handed.
HANDED = ("direct", "--handoff", "listener", "--ready", "notify", "--env", "BENCH_LISTENER=3")


def direct() -> Started:
    """Start the same worker on a listener that it accepts from itself."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        fd = listener.fileno()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        env = {"BENCH_LISTENER": str(fd)}
        return Started(worker_command("direct"), address, env, [fd])


def least() -> Started:
    """Start the same worker behind the least that can forward (forward.c), not behind ours."""
    with socket.create_server(("127.0.0.1", 0), backlog=4096) as listener:
        fd = listener.fileno()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = [built("forward"), *worker_command("library")]
        return Started(command, address, {"BENCH_LISTENER": str(fd)}, [fd])
