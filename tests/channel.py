"""The protector's side of the protocol without a protector: a channel, RETURN lines, no policy.

It accepts where a test says so, and sends what a test says, in or out of the
protocol.  Workers are real processes.
"""

from __future__ import annotations

import array
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from socketprotector_client import wire

from tests.procfs import sleeps_in
from tests.running import DEADLINE_S, ROOT, Address, Client, eventually

#: Which Python the workers run under: WORKER_PYTHON=python3.9 pytest tests/client
PYTHON = os.environ.get("WORKER_PYTHON", sys.executable)
#: Where another Python finds the library.
LIBRARY = {"PYTHONPATH": f"{ROOT}:{ROOT / 'client_lib'}"}
PROGRAMS = ROOT / "tests" / "client" / "programs"
#: How many connections the channel has room for at least.
ROOM = 500


class Worker:
    """One process of a worker program, and our end of its RETURN line."""

    def __init__(self, process: subprocess.Popen[bytes], return_line: socket.socket) -> None:
        self.process = process
        self.pid = process.pid
        self.return_line = return_line
        self.ready_lines: list[str] = []

    def read_line(self) -> str:
        """The next line that it printed."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], DEADLINE_S)[0], "it printed nothing"
        return self.process.stdout.readline().decode().rstrip("\n")

    def read_rest(self) -> list[str]:
        """What it prints until it ends."""
        lines = []
        while line := self.read_line():
            lines.append(line)
        return lines

    def read_last(self) -> str:
        """The last line that it prints."""
        return self.read_rest()[-1]

    def wait(self) -> int:
        """Its exit status, once it has ended."""
        return self.process.wait(DEADLINE_S)

    def term(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def retire(self) -> None:
        self.return_line.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.return_line.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Channel:
    """Owns listeners, one channel and workers; close() ends them all."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.listeners = [socket.create_server(("127.0.0.1", 0), backlog=1024)]
        self.sender, self.reader = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # So that no send waits: the kernel wakes a blocked sender only once three quarters of the
        # room are free, and a worker at its limit may never free that many.
        self.sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM * wire.RECORD_CHARGE_BYTES)
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.notify.bind("")  # the kernel chooses an abstract name
        self.workers: list[Worker] = []
        self.clients: list[Client] = []

    # Workers

    def start(
        self,
        *command: str | Path,
        alone: bool = False,
        nofile: int | None = None,
        env: dict[str, str] | None = None,
    ) -> Worker:
        """Start a program of programs/ (or a command) and wait until it is ready."""
        worker = self.spawn(*command, alone=alone, nofile=nofile, env=env)
        self.wait_ready(worker)
        return worker

    def spawn(
        self,
        *command: str | Path,
        alone: bool = False,
        nofile: int | None = None,
        env: dict[str, str] | None = None,
    ) -> Worker:
        """Start it; `alone` means without a channel, as if there were no protector."""
        if isinstance(command[0], str) and command[0].endswith(".py"):
            command = (PYTHON, PROGRAMS / command[0], *command[1:])
        if nofile is not None:
            command = ("sh", "-c", f'ulimit -n {nofile}; exec "$@"', "sh", *command)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        notify_name = "@" + self.notify.getsockname()[1:].decode()
        environ = {**os.environ, wire.ENV_NOTIFY: notify_name, **(env or {}), **LIBRARY}
        if not alone:
            environ |= {
                wire.ENV_CHANNEL: str(self.reader.fileno()),
                wire.ENV_RETURN: str(theirs.fileno()),
                wire.ENV_LISTENERS: wire.pack_listeners([name(one) for one in self.listeners]),
                wire.ENV_GENERATION: "1",
                wire.ENV_WORKER: "0",
            }
        with theirs, self.log.open("ab") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                env=environ,
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                bufsize=0,  # or lines would hide from select
                cwd=ROOT,
                pass_fds=() if alone else (self.reader.fileno(), theirs.fileno()),
            )
        self.workers.append(Worker(process, ours))
        return self.workers[-1]

    def fill(self) -> None:
        """Leave no room for what workers say."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
            one.connect(self.notify.getsockname())
            try:
                while True:
                    one.send(b"STATUS=full", socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass

    def starts_unread(self, *command: str | Path, env: dict[str, str] | None = None) -> Worker:
        """Start one that finds no room when it says READY=1; there is some once it has tried to."""
        self.fill()
        worker = self.spawn(*command, env=env)
        client = self.connect()
        client.say("x")  # answered by one that goes on without having been heard
        eventually(lambda: client.has_answer() or waits_for_room(worker.pid), "it has spoken")
        self.wait_ready(worker)
        return worker

    def wait_ready(self, worker: Worker) -> None:
        pidfd = os.pidfd_open(worker.pid)
        try:
            self._hear_until_ready(worker, pidfd)
        finally:
            os.close(pidfd)

    def _hear_until_ready(self, worker: Worker, pidfd: int) -> None:
        while not worker.ready_lines:
            waited_for = [self.notify.fileno(), pidfd]
            heard = select.select(waited_for, [], [], DEADLINE_S)[0]
            assert self.notify.fileno() in heard, "it ended, or said nothing"
            pid, message = self.hear()
            for one in self.workers:
                if one.pid == pid and "READY=1" in message:
                    one.ready_lines += message.split("\n")

    def hear(self) -> tuple[int, str]:
        """The next sd_notify message -> (pid of its sender, text)."""
        assert select.select([self.notify], [], [], DEADLINE_S)[0], "no message came"
        message, control, _, _ = self.notify.recvmsg(4096, socket.CMSG_SPACE(12))
        pid, _, _ = struct.unpack("3i", control[0][2])
        return pid, message.decode()

    def hear_all(self) -> list[tuple[int, str]]:
        """What was said and not heard yet."""
        heard = []
        while select.select([self.notify], [], [], 0)[0]:
            heard.append(self.hear())
        return heard

    # Connections

    def listen_unix(self, path: Path) -> None:
        self.listeners.append(socket.create_server(str(path), family=socket.AF_UNIX))

    def connect(self, listener: int = 0) -> Client:
        """A client whose connection is in the queue."""
        client = self.connect_only(listener)
        self.hand_off(listener)
        return client

    def connect_only(self, listener: int = 0) -> Client:
        """A client whose connection is not accepted yet."""
        one = self.listeners[listener]
        return self.client(one.getsockname())

    def client(self, address: Address) -> Client:
        self.clients.append(Client(address))
        return self.clients[-1]

    def hand_off(
        self,
        listener: int = 0,
        *,
        version: int = wire.VERSION,
        kind: int = wire.KIND_CONNECTION,
        state: bytes = b"",
    ) -> None:
        accepted, _ = self.listeners[listener].accept()
        with accepted:
            self.send(accepted.fileno(), listener, version=version, kind=kind, state=state)

    def send(
        self,
        fd: int | None,
        listener: int = 0,
        *,
        version: int = wire.VERSION,
        kind: int = wire.KIND_CONNECTION,
        state: bytes = b"",
    ) -> None:
        header = wire.HEADER.pack(version, kind, listener, len(state), time.monotonic_ns())
        fds = array.array("i", [] if fd is None else [fd])
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)] if fds else []
        self.sender.sendmsg([header + state], rights, socket.MSG_DONTWAIT)

    def queued(self) -> int:
        """How many connections no worker has taken yet."""
        size = array.array("i", [0])
        fcntl.ioctl(self.reader.fileno(), termios.FIONREAD, size)
        return size[0] // wire.HEADER.size

    def send_again(self) -> None:
        """Send again what stands in the queue, as a protector does while no worker takes it.

        The kernel wakes one who waits there, and that one may be full by now.
        """
        try:
            data, rights, _, _ = self.reader.recvmsg(4096, 64, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        try:
            self.sender.sendmsg([data], rights)
        finally:
            for _, _, fds in rights:
                for fd in array.array("i", fds):
                    os.close(fd)

    def end_channel(self) -> None:
        self.sender.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for client in self.clients:
            client.close()
        for worker in self.workers:
            worker.close()
        for one in (*self.listeners, self.sender, self.reader, self.notify):
            one.close()


def name(listener: socket.socket) -> str:
    """The name of a listener as workers get it."""
    address = listener.getsockname()
    return f"unix:{address}" if isinstance(address, str) else f"tcp:{address[0]}:{address[1]}"


def waits_for_room(pid: int) -> bool:
    """Whether a thread of this process sleeps until what it has sent is read."""
    places = ("unix_wait_for_peer", "poll_schedule_timeout")
    return any(each.startswith(places) for each in sleeps_in(pid))
