"""A worker that is short of descriptors leaves connections where they are."""

from __future__ import annotations

import os
import resource
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
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

    monkeypatch.setattr("socketprotector_client.descriptors.os.stat", stat)

    has = has_room(1)

    monkeypatch.undo()
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
        serve_from(worker, Noting(source, worker.drain, 1, {}, Scoreboard(-1, 0)), print, 16)
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
