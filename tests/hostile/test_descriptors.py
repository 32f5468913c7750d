"""What is sent along with messages is never received, and its end is not waited for.

Where the last copy of a descriptor closes slowly the reader would stand still: then the test
ends by its time limit.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from socketprotector.ctl.client import connect
from socketprotector.daemon.control.server import ControlServer
from socketprotector.model.records import Program
from socketprotector.model.settings import ListenerSettings
from socketprotector.system.foreign_descriptors import drop_unread
from socketprotector.system.listeners import listener_of
from socketprotector.system.loop import Loop
from socketprotector.system.readiness import Readiness
from socketprotector.system.sd_notify import NotifySocket
from tests import needs
from tests.hostile.descriptors import (
    can_be_refused,
    of_each_kind,
    room_for,
    send,
    slow_to_close,
)

pytestmark = pytest.mark.timeout(60)

OURS = frozenset({os.getuid()})
KINDS = ("lingering", "nested")
STATUS = b'{"v":1,"command":"status"}\n'
NEARLY_ALL = 250  # SCM_MAX_FD is 253


def opened() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def notify() -> Iterator[NotifySocket]:
    made = NotifySocket.make("@socketprotector-test-" + os.urandom(8).hex(), OURS)
    yield made
    made.close()


def say(notify: NotifySocket, data: bytes, *fds: int) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as worker:
        send(worker, data, *fds, to=notify.address)


def heard(notify: NotifySocket) -> list[dict[str, str]]:
    found = []
    while (fields := notify.peek(os.getpid())) is not None:
        found.append(dict(fields))
        notify.remove()
    return found


# -- what a worker sends with a notification ---------------------------------------------------


@pytest.mark.parametrize("room", [0, 1, 2, 30])
def test_near_the_limit_no_descriptor_stays(notify: NotifySocket, room: int) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        say(notify, b"STATUS=first", *[one.fileno()] * NEARLY_ALL)
    say(notify, b"READY=1")
    before = opened()

    with room_for(room):
        found = heard(notify)

    assert found == [{"STATUS": "first"}, {"READY": "1"}]
    assert opened() == before


def test_descriptors_of_any_kind_are_dropped(notify: NotifySocket) -> None:
    before = opened()
    for fd in (fds := of_each_kind()):
        say(notify, b"STATUS=one", fd)
        assert heard(notify) == [{"STATUS": "one"}]
    say(notify, b"STATUS=all", *fds)
    for fd in fds:
        os.close(fd)

    assert heard(notify) == [{"STATUS": "all"}]
    assert opened() == before


@pytest.mark.parametrize("room", [0, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_a_descriptor_that_is_slow_to_close_is_not_waited_for(
    notify: NotifySocket, kind: str, room: int
) -> None:
    with slow_to_close(kind) as fd:
        say(notify, b"READY=1", fd)
        os.close(fd)

        with room_for(room):
            assert heard(notify) == [{"READY": "1"}]


@pytest.mark.parametrize("kind", KINDS)
def test_nor_where_its_message_was_never_read(kind: str) -> None:
    notify = NotifySocket.make("@socketprotector-test-" + os.urandom(8).hex(), OURS)
    kept = os.dup(notify.fileno())  # as the guard does
    with slow_to_close(kind) as fd:
        say(notify, b"")
        say(notify, b"READY=1", fd)
        os.close(fd)

        notify.close()
        os.close(kept)


# -- on its other lines ------------------------------------------------------------------------


@pytest.mark.parametrize("first", [b"x", b""])
@pytest.mark.parametrize("kind", KINDS)
def test_a_return_line_is_closed_without_a_wait(kind: str, first: bytes) -> None:
    """Also by the last process that has it, and behind a message that looks like the end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept = os.dup(ours.fileno())
    with theirs, slow_to_close(kind) as fd:
        send(theirs, first)
        send(theirs, first, *[0] * NEARLY_ALL)
        send(theirs, b"x", fd)
        os.close(fd)

        drop_unread(ours)
        ours.close()
        os.close(kept)
        with pytest.raises(BrokenPipeError):
            send(theirs, b"x")


@pytest.mark.parametrize("read", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_line_of_an_ack_is_read_and_closed_without_a_wait(
    loop: Loop, kind: str, read: bool
) -> None:
    ours, theirs = socket.socketpair()
    program = Program("/", ("x",), "/", (), 0o022, (), 0, ready="ack")
    readiness = Readiness(program, {"ack": ours.detach()}, loop, 1)
    ready: list[str] = []

    def is_ready(by: str) -> None:
        ready.append(by)
        loop.running = False

    def never(why: str) -> None:
        raise AssertionError(why)

    readiness.watch(is_ready, None, never, never, lambda: None)  # type: ignore[arg-type]
    with theirs, slow_to_close(kind) as fd:
        send(theirs, b'{"command":"worker:ack","pid":1}\n', fd, *[0] * NEARLY_ALL)
        os.close(fd)
        if read:
            loop.run()
        readiness.close()

    assert ready == ["ack"] * read


# -- to the control socket ---------------------------------------------------------------------


class Control:
    """A control socket with a loop of its own."""

    def __init__(self, path: Path, loop: Loop, uids: frozenset[int]) -> None:
        self.path, self.loop = str(path), loop
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.bind(self.path)
        sock.listen()
        found = path.stat()
        settings = ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino)
        self.asked: list[str] = []
        self.server = ControlServer(
            listener_of(sock.detach(), -1, settings),
            loop,
            lambda client, request: self.asked.append(request.command),
            lambda pid: None,
            uids=uids,
            group=None,
        )

    def run_until(self, ends: Callable[[], bool]) -> None:
        """Turn the loop until this is so."""

        def look() -> None:
            if ends():
                self.loop.running = False
            else:
                self.loop.call_after("look", 0.005, look)

        look()
        self.loop.running = not ends()
        self.loop.run()


@pytest.fixture(params=["new kernel", "old kernel"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 6.16 descriptors cannot be refused."""
    if request.param == "old kernel":
        monkeypatch.setattr("socketprotector.daemon.control.server.refuse_descriptors", id)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("uids", [OURS, frozenset({54_321})])
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_of_the_control_socket_cannot_hold_it_up(
    tmp_path: Path, loop: Loop, kind: str, uids: frozenset[int]
) -> None:
    """Whether it may ask or not: what it has sent is dropped, and the next client is answered."""
    control = Control(tmp_path / "control", loop, uids)
    refused = -1
    with socket.socket(socket.AF_UNIX) as hostile, slow_to_close(kind) as fd:
        hostile.connect(control.path)
        try:
            send(hostile, STATUS, fd)
        except PermissionError:
            hostile.send(STATUS)
            refused = fd  # closed when its peer is gone, and then at once
        else:
            os.close(fd)
        with socket.socket(socket.AF_UNIX) as good:
            good.connect(control.path)
            good.send(STATUS)
            good.setblocking(False)
            if uids == OURS:
                control.run_until(lambda: control.asked == ["status"] * 2)
            else:
                control.run_until(lambda: _said(good) != b"")
        control.server.close()
    if refused >= 0:
        os.close(refused)


def _said(client: socket.socket) -> bytes:
    try:
        return client.recv(4096)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_was_not_accepted_does_not_hold_up_the_end(
    tmp_path: Path, loop: Loop, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Before Linux 6.16: what it has sent is dropped with the listening socket."""
    monkeypatch.setattr("socketprotector.daemon.control.server.refuse_descriptors", id)
    control = Control(tmp_path / "control", loop, OURS)
    with socket.socket(socket.AF_UNIX) as hostile, slow_to_close(kind) as fd:
        hostile.connect(control.path)
        send(hostile, STATUS, fd)
        os.close(fd)

        control.server.close()

        with pytest.raises(ConnectionError):
            hostile.send(STATUS)


@needs.unless(can_be_refused(), "Linux 6.16, which refuses descriptors")
def test_a_control_socket_refuses_descriptors(tmp_path: Path, loop: Loop) -> None:
    """And takes what comes without any: the positive control."""
    control = Control(tmp_path / "control", loop, OURS)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(control.path)
        with pytest.raises(PermissionError):
            send(client, STATUS, 0)
        client.send(STATUS)
        control.run_until(lambda: control.asked == ["status"])
    control.server.close()


@needs.unless(can_be_refused(), "Linux 6.16, which refuses descriptors")
@pytest.mark.parametrize("kind", KINDS)
def test_an_instance_cannot_hold_up_a_command(tmp_path: Path, kind: str) -> None:
    """The connection of socketprotectorctl takes no descriptors where the kernel can refuse."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "control"))
        listener.listen()
        with connect(str(tmp_path / "control"), 5.0) as client:
            instance, _ = listener.accept()
            with instance:
                with slow_to_close(kind) as fd, pytest.raises(PermissionError):
                    send(instance, b"x", fd)
                os.close(fd)
                instance.send(b"y")
                assert client.recv(1) == b"y", "the positive control"
