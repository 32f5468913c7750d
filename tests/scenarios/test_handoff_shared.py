"""`--handoff listener`: what the holders of a listening socket share stays as its workers have it.

The tests have a copy of the socket, too, and so see what the workers see.

What a process with a descriptor can change for all, beside what docs/modes.md lists:

* SO_PEERCRED of UNIX clients is the last caller of listen(): SocketProtector calls it at the first
  start, as the user that it runs as;
* IP_MULTICAST_LOOP, IP_MULTICAST_ALL and IP_BIND_ADDRESS_NO_PORT are the accept tag:
  SocketProtector sets them when it binds, and where needed before a generation starts;
* a socket that was shut down listens again at most ten times a second.  With the sysctl
  net.ipv4.tcp_migrate_req the kernel gives its queued clients to the other socket of the address;
* a socket that another program or an older version bound as port 0 cannot listen again.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from socketprotector.daemon import checkpoint
from tests import needs
from tests.load import Load
from tests.running import Client, Protector, ask, eventually
from tests.scenarios.adopting import kill_protector, revived, served, upgrade
from tests.scenarios.managers import Service
from tests.scenarios.tools import library_worker, pid_in, spawned, worker

Starter = Callable[..., Protector]
MODE = ("--handoff", "listener", "--ready", "notify")
#: Both accept until no client is left.
SERVERS = {"asyncio": worker("asyncio_accepts"), "library": library_worker("asyncio_server")}
#: Who replaces the protector under living workers.
HOW = ("upgrade", "guard", "store")

_SYS_PIDFD_GETFD = 438
_SO_ATTACH_FILTER = 26
_PASS_ALL = struct.pack("HBBI", 0x06, 0, 0, 0xFFFFFFFF)
#: With values that are not the kernel's own; accepted connections inherit nearly all of them.
OPTIONS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, struct.pack("i", 1)),
    (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 7)),
    (socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 77, 0)),
    (socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 78, 0)),
    (socket.SOL_SOCKET, socket.SO_RCVBUF, struct.pack("i", 87_654)),
    (socket.SOL_SOCKET, socket.SO_SNDBUF, struct.pack("i", 76_543)),
    (socket.SOL_SOCKET, socket.SO_RCVLOWAT, struct.pack("i", 1)),
    (socket.SOL_SOCKET, socket.SO_PRIORITY, struct.pack("i", 3)),
    (socket.SOL_SOCKET, socket.SO_REUSEADDR, struct.pack("i", 1)),
    (socket.IPPROTO_IP, socket.IP_TOS, struct.pack("i", 16)),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, struct.pack("i", 1)),
    (socket.IPPROTO_TCP, socket.TCP_MAXSEG, struct.pack("i", 1400)),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, struct.pack("i", 79)),
    (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, struct.pack("i", 3)),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, struct.pack("i", 80_000)),
    (socket.IPPROTO_TCP, socket.TCP_FASTOPEN, struct.pack("i", 5)),
)
_OF_UNIX = (socket.SOL_SOCKET,)


@contextmanager
def theirs(pid: int, fd: int = 3) -> Iterator[socket.socket]:
    """A copy of a worker's listening socket: of the same open file description."""
    process = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(_SYS_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    assert copy >= 0, os.strerror(ctypes.get_errno())
    with socket.socket(fileno=copy) as made:
        yield made


def turn(listening: socket.socket) -> None:
    """Set all that a server could set."""
    for level, option, value in OPTIONS:
        if listening.family != socket.AF_UNIX or level in _OF_UNIX:
            listening.setsockopt(level, option, value)
    code = array.array("B", _PASS_ALL)
    program = struct.pack("HP", 1, code.buffer_info()[0])
    try:
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    except PermissionError:  # on TCP sockets kernels of 2026 on want CAP_NET_ADMIN for it
        assert not needs.IS_ROOT
    listening.listen(55)


def switches(listening: socket.socket) -> dict[str, object]:
    """How all of that stands, and the flags of the open file description."""
    found: dict[str, object] = {
        f"{level}.{option}": listening.getsockopt(level, option, 16)
        for level, option, _ in OPTIONS
        if listening.family != socket.AF_UNIX or level in _OF_UNIX
    }
    found["flags"] = oct(fcntl.fcntl(listening, fcntl.F_GETFL))
    found["listens"] = listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    # So many instructions: it has one.  With an empty buffer it is only told.
    found["filter"] = listening.getsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER)
    if listening.family != socket.AF_UNIX:
        info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        found["backlog"] = struct.unpack_from("=I", info, 28)[0]
    return found


class Replaced:
    """A protector that is replaced in one of the ways while its workers live."""

    def __init__(
        self, how: str, protector: Starter, service: Service, command: tuple[str, ...], listen: str
    ) -> None:
        self.how, self.service = how, service
        self.words = (*MODE, listen, "--", *command)
        if how == "store":
            self.daemon = service.start(*self.words).ready()
        else:
            self.daemon = protector(*(("--guard",) if how == "guard" else ()), *self.words).ready()

    def replace(self) -> None:
        if self.how == "upgrade":
            assert "event=resumed" in upgrade(self.daemon)
        elif self.how == "guard":
            revived(self.daemon, kill_protector(self.daemon))
        else:
            self.service.kill()
            self.daemon = self.service.start(*self.words)
            self.daemon.log.wait_for("event=route")  # from then on it takes signals


@pytest.fixture
def service(tmp_path: Path, marked_environment: dict[str, str]) -> Iterator[Service]:
    made = Service(tmp_path, marked_environment)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("server", list(SERVERS))
@pytest.mark.costly
def test_another_protector_leaves_no_server_hanging_in_accept(
    protector: Starter, service: Service, how: str, server: str
) -> None:
    """O_NONBLOCK is shared by all workers: one that polls in vain must not wait in accept()."""
    replaced = Replaced(how, protector, service, SERVERS[server], "127.0.0.1:0")
    address = ("127.0.0.1", replaced.daemon.port)
    [pid] = spawned(replaced.daemon)

    with Client(address, "kept") as kept:
        assert pid_in(kept.hear()) == pid
        with Load(f"127.0.0.1:{address[1]}", concurrency=4) as load:
            served(load)
            for _ in range(3):
                replaced.replace()
                served(load)
        for _ in range(4):  # one by one, so that each is followed by an accept() of none
            assert pid_in(ask(address)) == pid
            assert pid_in(kept.ask()) == pid

    assert not load.snapshot().failures
    replaced.daemon.stop()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_all_that_a_server_has_set_stays_as_it_is(
    protector: Starter, service: Service, tmp_path: Path, how: str, kind: str
) -> None:
    listen = "127.0.0.1:0" if kind == "tcp" else f"unix:{tmp_path / 's'}"
    replaced = Replaced(how, protector, service, SERVERS["asyncio"], listen)
    [pid] = spawned(replaced.daemon)

    with theirs(pid) as listening:
        turn(listening)
        flags = fcntl.fcntl(listening, fcntl.F_GETFL)
        for more in (os.O_ASYNC, 0):
            fcntl.fcntl(listening, fcntl.F_SETFL, flags | more)
            before = switches(listening)
            assert int(str(before["flags"]), 8) & os.O_NONBLOCK
            replaced.replace()
            assert switches(listening) == before
    replaced.daemon.stop()


@pytest.mark.parametrize("server", list(SERVERS))
@pytest.mark.costly
def test_what_a_service_manager_resets_is_put_back_as_living_workers_have_it(
    service: Service, server: str
) -> None:
    """systemd clears O_NONBLOCK of a .socket unit's descriptors at each start of the service."""
    with socket.create_server(("127.0.0.1", 0)) as given:
        address = given.getsockname()
        service.sockets["http"] = os.dup(given.fileno())
        words = (*MODE, "fd:http", "--", *SERVERS[server])
        daemon = service.start(*words).ready()
        [pid] = spawned(daemon)
        with Client(address, "kept") as kept:
            for _ in range(3):
                assert pid_in(kept.hear()) == pid
                assert not os.get_blocking(given.fileno())
                service.kill()
                os.set_blocking(given.fileno(), True)
                daemon = service.start(*words)
                daemon.log.wait_for("event=route")
                assert not os.get_blocking(given.fileno())
                for _ in range(4):
                    assert pid_in(ask(address)) == pid
                kept.say("once more")
            assert pid_in(kept.hear()) == pid
        daemon.stop()


@pytest.mark.costly
def test_a_flag_that_is_set_late_is_put_back_too(service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as given:
        service.sockets["http"] = os.dup(given.fileno())
        words = (*MODE[:2], "--ready", "after:0", "fd:http", "--", "/bin/sleep", "1000")
        service.start(*words).ready()
        eventually(lambda: "sp.state" in service.store, "the state in the store")
        state = service.store["sp.state"]

        def noted() -> bool:
            found = checkpoint.read(state)
            return found is not None and found.nonblocking == (0,)

        assert not noted()
        os.set_blocking(given.fileno(), False)
        eventually(noted, "the flag in the state")
        service.kill()
        os.set_blocking(given.fileno(), True)
        service.start(*words).log.wait_for("event=route")

        assert not os.get_blocking(given.fileno())
        service.main.signal(signal.SIGINT)
        assert service.main.wait() == 0
