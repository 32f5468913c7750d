"""Stand-ins for systemd: they pass descriptors, keep them, and read their notify socket."""

from __future__ import annotations

import fcntl
import os
import random
import re
import select
import socket
import stat
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

from socketprotector.system.sd_notify import parse
from tests.running import (
    COMMAND,
    DEADLINE_S,
    Protector,
    eventually,
)
from tests.scenarios.tools import worker

MANY = worker("many")
#: Moves the descriptors 1000, 1001, ... to 3, 4, ..., sets LISTEN_PID, and executes.
PASS_STORED = """
import os, resource, sys
count = int(sys.argv[1])
for place in range(count):
    os.dup2(1000 + place, 3 + place)
    os.close(1000 + place)
os.environ["LISTEN_PID"] = str(os.getpid())
if limit := os.environ.pop("TEST_NOFILE", ""):  # LimitNOFILE=, which is set before
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), hard))
os.execvp(sys.argv[2], sys.argv[2:])
"""
RELAYED = ("sp.relay.", "sp.output.")
OWN = {"sp.settings", "sp.state", "sp.pidfile", "sp.control", "sp.notify", "sp.listener.0"}


#: Moves the descriptors named in its arguments to 3, 4, ... and executes the rest.
PASS_ON = """
import os, sys
fds = [int(word) for word in sys.argv[1].split(",") if word]
for place, fd in enumerate(fds):
    os.dup2(fd, 100 + place)
    os.close(fd)
for place, fd in enumerate(fds):
    os.dup2(100 + place, 3 + place)
    os.close(100 + place)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = str(len(fds))
os.execvp(sys.argv[2], sys.argv[2:])
"""


class Giver:
    """Opens sockets as a .socket unit does, and starts a protector with them."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.given: list[tuple[str, socket.socket]] = []
        self.started: list[Protector] = []

    def tcp(
        self,
        name: str,
        family: int = socket.AF_INET,
        *,
        both: bool = False,
        bound_by_number: bool = False,
        reuse: bool = False,
    ) -> int:
        """reuse: as with `ReusePort=yes`."""
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not both)
        host = "::" if both else "::1" if family == socket.AF_INET6 else "127.0.0.1"
        with socket.socket(family) as chooser:
            port = 0
            if bound_by_number:  # as units have it, and it is kept when the socket is shut down
                for each in (chooser, made):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                chooser.bind((host, 0))
                port = chooser.getsockname()[1]
            made.bind((host, port))
        made.listen()
        self.given.append((name, made))
        return int(made.getsockname()[1])

    def unix(self, name: str, path: Path) -> str:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.bind(str(path))
        made.listen()
        self.given.append((name, made))
        return str(path)

    def start(self, *words: str, **more: Any) -> Protector:
        """more: for Popen."""
        # Above 100, so that moving one does not run over another.
        fds = [fd_above(each.fileno()) for _, each in self.given]
        names = ":".join(name for name, _ in self.given)
        daemon = Protector(
            words,
            {**self.environment, "LISTEN_FDNAMES": names},
            through=(sys.executable, "-I", "-S", "-c", PASS_ON, ",".join(str(fd) for fd in fds)),
            pass_fds=fds,
            **more,
        )
        for fd in fds:
            os.close(fd)
        self.started.append(daemon)
        return daemon

    def close(self) -> None:
        for each in self.started:
            each.end()
            print(each.log.text())
        for _, made in self.given:
            made.close()


def fd_above(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD, 200)


class Manager:
    """Hears what a service says, as the service manager does, and remembers the sender."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(DEADLINE_S)
        self.sender = 0

    def hear(self) -> dict[str, str]:
        """The next message that is not about the descriptor store (test_store.py)."""
        while True:
            data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(12))
            [credentials] = [c for _, kind, c in ancillary if kind == socket.SCM_CREDENTIALS]
            self.sender = struct.unpack("3i", credentials)[0]
            fields = parse(data)
            print(f"{time.monotonic():.3f} from {self.sender}: {fields}")
            if "FDNAME" not in fields:
                return fields

    def wait_for(self, name: str) -> dict[str, str]:
        """The next message with NAME=1, past any others."""
        while (fields := self.hear()).get(name) != "1":
            pass
        return fields

    def rest(self) -> list[dict[str, str]]:
        """What has been said and not been heard yet."""
        heard = []
        self.socket.setblocking(False)
        try:
            while True:
                heard.append(self.hear())
        except BlockingIOError:
            return heard
        finally:
            self.socket.settimeout(DEADLINE_S)

    def fill(self) -> int:
        """Have others say so much that nothing more goes in; return how many messages."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            said = 0
            try:
                while True:
                    other.sendto(b"STATUS=noise", self.socket.getsockname())
                    said += 1
            except BlockingIOError:
                return said

    def close(self) -> None:
        self.socket.close()
        if not self.address.startswith("@"):
            Path(self.address).unlink(missing_ok=True)


def same_socket(one: int, other: int) -> bool:
    """Whether two descriptors are of the same socket; the ends of a pipe are two files."""
    found = os.fstat(one)
    return stat.S_ISSOCK(found.st_mode) and os.path.samestat(found, os.fstat(other))


class Service:
    """One unit: its notify socket, its descriptor store, and its main process."""

    def __init__(
        self, folder: Path, environment: dict[str, str], options: tuple[str, ...] = ()
    ) -> None:
        """options: in front of those that the command is given."""
        self.options = options
        self.address = str(folder / "notify")
        self.pid_file = folder / "pid"
        self.environment = environment
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind(self.address)
        os.chmod(self.address, 0o777)  # as systemd's own: any user may write to it
        self.socket.setblocking(False)
        self.store: dict[str, int] = {}
        self.sockets: dict[str, int] = {}  # of a .socket unit, which are not in the store
        self.said: list[dict[str, str]] = []
        self.started: list[Protector] = []
        self.random = random.Random(1)
        # It listens all the time, as the real one does: a datagram socket queues but a few.
        self.lock = threading.RLock()
        self.wake = os.eventfd(0, os.EFD_CLOEXEC)
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        while self.wake not in [fd for fd, _ in poll.poll()]:
            self.hear()

    @property
    def main(self) -> Protector:
        return self.started[-1]

    def start(self, *words: str | Path, under: tuple[str, ...] = ()) -> Protector:
        """Start the command with all that it is passed, in an order of its own.

        under: what executes it in its own place.  What those before it have said and nobody has
        waited for, such as READY=1 of a reload, is forgotten: this one has not said it.
        """
        with self.lock:
            self.hear()
            self.said.clear()
        passed = self.sockets | self.store
        names = list(passed)
        self.random.shuffle(names)
        high = []
        for place, name in enumerate(names):
            os.dup2(passed[name], 1000 + place, inheritable=True)
            high.append(1000 + place)
        # Without it we are a listener that is not known to keep anything over a stop.
        unknown = {"INVOCATION_ID": ""}
        environment = {**unknown, **self.environment, "NOTIFY_SOCKET": self.address}
        if names:
            environment |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
        python = COMMAND[0]
        self.started.append(
            Protector(
                ["--pid-file", str(self.pid_file), *self.options, *(str(word) for word in words)],
                environment,
                through=(*under, python, "-I", "-S", "-c", PASS_STORED, str(len(names))),
                pass_fds=high,
            )
        )
        for fd in high:
            os.close(fd)
        return self.main

    def hear(self) -> None:
        """Take in what was said."""
        with self.lock:
            while self.hear_one():
                pass

    def hear_one(self) -> bool:
        try:
            data, ancillary, _, _ = self.socket.recvmsg(4096, 1024, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        fds = [
            fd
            for _, kind, content in ancillary
            if kind == socket.SCM_RIGHTS
            for (fd,) in struct.iter_unpack("i", content)
        ]
        fields = parse(data)
        self.said.append(fields)
        name = fields.get("FDNAME", "stored")
        if fields.get("FDSTORE") == "1":
            assert re.fullmatch(r"[ -9;-~]{1,255}", name), "no name for systemd"
            assert fields.get("FDPOLL") == "0", f"{name} would be dropped when it hangs up"
            [fd] = fds
            if any(same_socket(fd, each) for each in self.store.values()):
                os.close(fd)  # it is there, under the name that it has
                return True
            if name in self.store:
                os.close(self.store.pop(name))
            self.store[name] = fd
        elif fields.get("FDSTOREREMOVE") == "1":
            assert not fds
            if name in self.store:
                os.close(self.store.pop(name))
        else:
            assert not fds
        return True

    def wait_for(self, name: str, value: str = "1") -> dict[str, str]:
        """Hear until NAME=VALUE was said after the last such wait; return that message."""
        found: list[dict[str, str]] = []

        def heard() -> bool:
            while self.said and not found:
                fields = self.said.pop(0)
                if fields.get(name) == value:
                    found.append(fields)
            return bool(found)

        eventually(heard, f"{name}={value}")
        return found[0]

    def kill(self) -> None:
        """SIGKILL the main process; what it had said before counts."""
        self.main.process.kill()
        self.main.process.wait(DEADLINE_S)
        self.hear()

    def stop(self) -> None:
        """As `systemctl stop`: in order, and then the store is emptied."""
        self.main.stop()
        self.drop()

    def drop(self) -> None:
        """As systemd does where no start waits."""
        with self.lock:
            self.hear()
            for fd in self.store.values():
                os.close(fd)
            self.store.clear()

    def restart(self, *words: str | Path) -> Protector:
        """As `systemctl restart`: a stop in order, after which a start waits."""
        self.main.stop()
        self.hear()
        self.said.clear()
        return self.start(*words)

    def close(self) -> None:
        for each in self.started:
            each.end()
            print(f"--- log of protector {each.pid} ---\n{each.log.text()}")
        os.eventfd_write(self.wake, 1)
        self.thread.join(DEADLINE_S)
        os.close(self.wake)
        self.drop()
        for fd in self.sockets.values():
            os.close(fd)
        self.socket.close()


def wait_stored(service: Service, wanted: set[str]) -> None:
    """Wait until this is stored, besides the log relay's; nothing at all if nothing is wanted."""

    def stored() -> set[str]:
        relays = {name for name in service.store if name.startswith(RELAYED)}
        return set(service.store) - (relays if wanted else set())

    try:
        eventually(lambda: stored() == wanted, "the same in the store")
    finally:
        print("in the store and not wanted:", sorted(stored() - wanted))
        print("wanted and not in the store:", sorted(wanted - stored()))


def of_generation(number: int, *workers: int) -> set[str]:
    found = {f"sp.channel.{number}.{what}" for what in ("read", "write", "board")}
    for each in workers:
        found |= {f"sp.worker.{each}.{what}" for what in ("process", "notify", "line")}
    return found
