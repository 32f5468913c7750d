"""A worker that is short of descriptors leaves connections where they are."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from socketprotector_client import intake as intake_module
from socketprotector_client.address import listen
from socketprotector_client.connection import Connection
from socketprotector_client.descriptors import has_room
from socketprotector_client.errors import Drained
from socketprotector_client.intake import Intake
from socketprotector_client.scoreboard import Scoreboard
from socketprotector_client.serving import serve_from
from socketprotector_client.source import ListenSource
from socketprotector_client.worker import Worker

from tests.channel import Channel
from tests.procfs import descriptors
from tests.running import eventually

from .sharing import connect, in_child, serving


@pytest.mark.parametrize(
    "program",
    ["iterates.py", "serves.py", "streams.py", "asyncio_server.py", "threading_server.py"],
)
def test_with_64_descriptors_none_of_500_connections_is_lost(
    channel: Channel, program: str
) -> None:
    worker = channel.start(program, "--limit", "1000", nofile=64)

    answered = 0
    for _ in range(5):
        clients = [channel.connect_only() for _ in range(100)]
        for client in clients:
            client.say("hello")
            channel.hand_off()
        for client in clients:
            assert client.hear() == "echo hello"
            client.close()
            answered += 1

    assert answered == 500
    assert worker.process.poll() is None
    assert "lost" not in channel.log.read_text()


def test_none_is_lost_where_there_was_room_for_a_row_and_then_is_no_more(
    channel: Channel,
) -> None:
    worker = channel.start("asyncio_server.py", "--limit", "1000", nofile=330)
    clients = [channel.connect() for _ in range(118)]
    eventually(lambda: channel.queued() == 0, "all were taken")
    worker.process.send_signal(signal.SIGSTOP)  # the rest comes in rows
    clients += [channel.connect() for _ in range(282)]
    worker.process.send_signal(signal.SIGCONT)

    for client in clients:
        assert client.ask("hello") == "echo hello"
        client.close()

    assert worker.process.poll() is None
    assert "lost" not in channel.log.read_text()


@pytest.mark.parametrize(("count", "enough"), [(20, True), (21, False)])
def test_room_is_what_the_limit_leaves(count: int, enough: bool) -> None:
    used = len(os.listdir("/proc/self/fd")) - 1  # the one that lists
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 20, hard))
    try:
        assert has_room(count) is (enough and os.stat("/proc/self/fd").st_size > 0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("answer", [0, OSError])
def test_where_the_number_of_descriptors_is_unknown_there_is_no_room_for_a_row(
    monkeypatch: pytest.MonkeyPatch, answer: int | type[OSError]
) -> None:
    def stat(path: str) -> SimpleNamespace:
        if isinstance(answer, int):
            return SimpleNamespace(st_size=answer)  # before Linux 6.2
        raise answer

    with monkeypatch.context() as patch:  # pytest itself needs stat() for the report of a failure
        patch.setattr("socketprotector_client.descriptors.os.stat", stat)
        has = has_room(1)

    assert not has


@pytest.mark.parametrize("keep_free", [0, 1])
def test_no_connection_is_taken_while_the_program_itself_holds_all_descriptors(
    channel: Channel, keep_free: int
) -> None:
    worker = channel.start("leaky.py", str(keep_free), nofile=64)
    first = channel.connect()
    assert worker.read_line() == "full"
    clients = [channel.connect() for _ in range(10)]
    for client in clients:
        client.say("hello")

    assert first.ask("hello") == "echo hello"
    # One more than is free: the library had one in reserve.
    assert channel.queued() >= 10 - keep_free - 1
    first.close()

    for client in clients:
        assert client.hear() == "echo hello"
        client.close()
    assert "lost" not in channel.log.read_text()


def test_a_pool_takes_no_connection_before_all_its_threads_have_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the ninth the C library opens a file, and would get what is given up for a client."""
    begun: list[int] = []
    said: list[str] = []

    class Noting(Intake):
        def get(self, timeout_s: float | None = None) -> Connection | None:
            names = [each.name for each in threading.enumerate()]
            begun.append(sum(name.startswith("serve-") for name in names))
            raise Drained

    source = ListenSource(listen("127.0.0.1:0", 1), handed=False)
    monkeypatch.setattr(Worker, "ready", lambda _: said.append(f"ready with {len(begun)}"))
    worker = Worker({})
    try:
        serve_from(worker, Noting(source, worker.drain, 16, {}, Scoreboard(-1, 0)), print, 16)
    finally:
        source.close()

    assert begun[0] == 15
    assert said == ["ready with 0"]


def test_every_descriptor_named_in_the_environment_is_close_on_exec(channel: Channel) -> None:
    worker = channel.start("serves.py")
    before = {*descriptors(worker.pid).values()}
    assert os.readlink(f"/proc/self/fd/{channel.reader.fileno()}") in before

    flags = {
        int(entry.name): next(
            int(line.split()[1], 8)
            for line in entry.read_text().splitlines()
            if line.startswith("flags:")
        )
        for entry in Path(f"/proc/{worker.pid}/fdinfo").iterdir()
    }

    assert [fd for fd, flag in flags.items() if not flag & os.O_CLOEXEC] == [0, 1, 2]


# -- an intake that lacks descriptors ------------------------------------------------------------


@contextmanager
def free_descriptors(count: int) -> Iterator[None]:
    """Leave this number of descriptors free, besides the descriptor that an intake reserves."""

    def is_free(fd: int) -> bool:
        try:
            os.fstat(fd)
        except OSError:
            return True
        return False

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = filter(is_free, itertools.count())
    first = next(itertools.islice(free, count, None))
    resource.setrlimit(resource.RLIMIT_NOFILE, (first, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture
def takes_if_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a descriptor is free before each connection, which the kernel would drop."""
    take = ListenSource.take

    def checked(self: ListenSource, fd: int) -> Connection | None:
        try:
            os.close(os.dup(fd))
        except OSError:
            pytest.fail("no descriptor is free")
        return take(self, fd)

    monkeypatch.setattr(ListenSource, "take", checked)


@pytest.mark.usefixtures("takes_if_free")
@pytest.mark.parametrize(
    ("get", "pooled"), [(Intake.get, False), (Intake.get, True), (Intake.get_now, False)]
)
def test_the_kept_descriptor_is_given_up_for_a_connection(
    intake: Intake, get: Callable[[Intake], Connection | None], pooled: bool
) -> None:
    if pooled:
        intake.share()
    with connect(intake), free_descriptors(0):
        connection = get(intake)

        assert connection is not None
        connection.close()


@pytest.mark.usefixtures("takes_if_free")
def test_without_a_descriptor_clients_wait_and_so_does_the_worker(
    intake: Intake, timers: list[Callable[[], None]]
) -> None:
    with connect(intake), connect(intake):
        with free_descriptors(0):
            first = intake.get_now()
            assert first is not None
            assert not intake.has_more()
            timers.pop()()
            assert intake.has_more()
            assert intake.get_now() is None
            assert not intake.has_more()

        timers.pop()()
        second = intake.get_now()
        assert second is not None
    first.close()
    second.close()
    assert timers == []


@pytest.mark.usefixtures("takes_if_free", "timers")
@pytest.mark.parametrize(
    ("free", "later", "in_all"),
    [(1, 0, 2), (100, 0, 3), (1 + 32 + 256, 31, 34)],
    ids=["too few", "few", "many"],
)
def test_a_row_takes_no_more_than_there_are_descriptors_for(
    free: int, later: int, in_all: int
) -> None:
    """Other threads may open 256 files meanwhile."""
    source = ListenSource(listen("127.0.0.1:0", 64), handed=False)
    with serving(source, limit=64) as intake, ExitStack() as clients, ExitStack() as row:
        for _ in range(40):
            clients.enter_context(connect(intake))
        with free_descriptors(free):
            for get in (intake.get_now, intake.get_next):
                connection = get()
                assert connection is not None
                row.enter_context(connection)

        count = 2
        with free_descriptors(later):
            while (connection := intake.get_next()) is not None:
                row.enter_context(connection)
                count += 1

        assert count == in_all


def test_the_free_descriptors_are_counted_once_in_a_row(
    source: ListenSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check for each connection would cost two system calls more."""
    checks: list[str] = []

    def is_enough(count: int) -> bool:
        checks.append(f"are {count} free?")
        return count <= 1000

    monkeypatch.setattr(intake_module, "has_room", is_enough)
    with serving(source) as intake, ExitStack() as row:
        for _ in range(4):
            row.enter_context(connect(intake))
        first = intake.get_now()
        assert first is not None
        row.enter_context(first)
        monkeypatch.setattr(intake._spare, "release", lambda: checks.append("is one free?"))
        for _ in range(3):
            connection = intake.get_next()
            assert connection is not None
            row.enter_context(connection)
        monkeypatch.undo()

    assert len(checks) == 1


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_client_that_the_system_has_no_resource_for_waits(
    intake: Intake,
    timers: list[Callable[[], None]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    def fails(fd: int) -> Connection:
        raise OSError(number, "no resource")

    with connect(intake):
        with monkeypatch.context() as patch:
            patch.setattr(intake.source, "take", fails)
            assert intake.get_now() is None
        [message] = caplog.messages
        assert message.startswith(f"[Errno {number}] no resource; trying again in ")
        assert not intake.has_more()

        timers.pop()()
        connection = intake.get_now()
        assert connection is not None
        connection.close()


def test_another_error_of_a_listener_is_not_hidden(
    intake: Intake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> Connection:
        raise OSError(errno.EINVAL, "not a listener")

    monkeypatch.setattr(intake.source, "take", fails)
    with connect(intake), pytest.raises(OSError, match="not a listener"):
        intake.get_now()


@pytest.mark.usefixtures("takes_if_free")
def test_a_forked_child_keeps_a_descriptor_for_its_first_connection(intake: Intake) -> None:
    def serves() -> bool:
        with free_descriptors(0):
            return intake.get_now() is not None

    with connect(intake):
        in_child(serves)


def test_a_child_that_is_forked_after_the_end_keeps_no_descriptor(intake: Intake) -> None:
    intake.end()
    before = len(os.listdir("/proc/self/fd"))

    in_child(lambda: len(os.listdir("/proc/self/fd")) == before)
