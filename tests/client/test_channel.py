"""The Channel alone: one record in, one descriptor out."""

from __future__ import annotations

import array
import fcntl
import os
import resource
import socket
from collections.abc import Iterator

import pytest
from socketprotector_client import Channel, Drained, OutOfDescriptors, ProtocolError, wire
from socketprotector_client.source import ChannelSource

from tests import needs
from tests.running import Client, eventually

LISTENERS = ("tcp:0.0.0.0:80", "tcp:[::]:80", "unix:/run/x", wire.REMOVED_LISTENER)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Channel]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        channel = Channel(theirs.detach(), LISTENERS)
        yield ours, channel
        channel.close()


@pytest.fixture
def sender(pair: tuple[socket.socket, Channel]) -> socket.socket:
    return pair[0]


@pytest.fixture
def channel(pair: tuple[socket.socket, Channel]) -> Channel:
    return pair[1]


def send(
    sender: socket.socket, *fds: int, header: bytes | None = None, version: int = 1, kind: int = 1
) -> None:
    if header is None:
        header = wire.HEADER.pack(version, kind, 2, 0, 12345)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sender.sendmsg([header], rights)


def is_hung_up(pipe_read_end: int) -> bool:
    """Whether no process holds the write end of a pipe any more."""
    os.set_blocking(pipe_read_end, False)
    try:
        return os.read(pipe_read_end, 1) == b""
    except BlockingIOError:
        return False


def test_a_connection_comes_with_its_listener_and_the_time_it_was_accepted(
    sender: socket.socket, channel: Channel
) -> None:
    read_end, write_end = os.pipe()
    send(sender, write_end)
    os.close(write_end)

    taken = channel.take()

    assert taken is not None
    fd, listener, accepted_at_ns = taken
    assert (listener, accepted_at_ns) == (2, 12345)
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.write(fd, b"x")
    assert os.read(read_end, 1) == b"x"
    os.close(fd)
    os.close(read_end)


def test_families_are_known_by_listener(channel: Channel) -> None:
    assert channel.families == (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, None)


def test_an_empty_queue_gives_none_then_its_end(sender: socket.socket, channel: Channel) -> None:
    assert channel.take() is None

    sender.shutdown(socket.SHUT_WR)

    for _ in range(2):
        with pytest.raises(Drained):
            channel.take()


def test_taking_leaves_the_shared_flags_alone(sender: socket.socket, channel: Channel) -> None:
    before = fcntl.fcntl(channel.fileno(), fcntl.F_GETFL)

    assert channel.take() is None

    assert fcntl.fcntl(channel.fileno(), fcntl.F_GETFL) == before
    assert not before & os.O_NONBLOCK


def test_another_version_is_refused_and_closed(sender: socket.socket, channel: Channel) -> None:
    read_end, write_end = os.pipe()
    send(sender, write_end, version=2)
    os.close(write_end)

    with pytest.raises(ProtocolError, match="version 2: this library speaks version 1"):
        channel.take()

    assert is_hung_up(read_end)
    os.close(read_end)


@pytest.mark.parametrize("kind", [wire.KIND_RETURNED, 77])
def test_a_kind_of_a_later_version_is_closed_and_passed_over(
    sender: socket.socket, channel: Channel, kind: int, caplog: pytest.LogCaptureFixture
) -> None:
    read_end, write_end = os.pipe()
    send(sender, write_end, kind=kind)
    send(sender, write_end)
    os.close(write_end)

    taken = channel.take()

    assert taken is not None
    os.close(taken[0])
    assert is_hung_up(read_end)
    os.close(read_end)
    assert f"message of kind {kind}" in caplog.text


def test_state_of_a_later_version_is_cut_off(sender: socket.socket, channel: Channel) -> None:
    header = wire.HEADER.pack(1, wire.KIND_CONNECTION, 0, 4096, 1) + b"s" * 4096
    send(sender, 0, header=header)

    taken = channel.take()

    assert taken is not None
    os.close(taken[0])
    assert channel.take() is None


@pytest.mark.parametrize("header", [b"\1", b"\1\1\0\0"])
def test_a_record_cut_short_is_refused_and_its_descriptor_closed(
    sender: socket.socket, channel: Channel, header: bytes
) -> None:
    read_end, write_end = os.pipe()
    send(sender, write_end, header=header)
    os.close(write_end)

    with pytest.raises(ProtocolError, match="message of"):
        channel.take()

    assert is_hung_up(read_end)
    os.close(read_end)


def test_a_record_without_a_descriptor_is_refused(sender: socket.socket, channel: Channel) -> None:
    send(sender)

    with pytest.raises(ProtocolError, match="16 bytes without a connection"):
        channel.take()


def test_a_second_descriptor_does_not_stay_open(sender: socket.socket, channel: Channel) -> None:
    pipes = [os.pipe(), os.pipe()]
    send(sender, *(write_end for _, write_end in pipes))
    for _, write_end in pipes:
        os.close(write_end)

    taken = channel.take()

    assert taken is not None
    os.close(taken[0])
    for read_end, _ in pipes:
        assert is_hung_up(read_end)
        os.close(read_end)


def test_without_a_free_descriptor_it_says_that_the_connection_is_lost(
    sender: socket.socket, channel: Channel
) -> None:
    send(sender, 0)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))

    try:
        with pytest.raises(OutOfDescriptors, match="it is lost"):
            channel.take()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs.IPV6)])
def test_only_a_client_that_has_sent_something_is_served_after_its_reset(
    sender: socket.socket, channel: Channel, host: str
) -> None:
    source = ChannelSource(channel, wakes_one=True)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    header = wire.HEADER.pack(1, 1, int(family == socket.AF_INET6), 0, 12345)
    addresses = []
    with socket.create_server((host, 0), family=family) as listener:
        for line in ("", "last words"):
            client = Client(listener.getsockname(), line or None)
            addresses.append(client.socket.getsockname())
            client.reset()
            accepted, peer = listener.accept()
            with accepted:
                assert peer == addresses[-1]
                eventually(lambda end=accepted: is_reset(end), "a reset")  # type: ignore[misc]
                send(sender, accepted.fileno(), header=header)

    assert source.take(-1) is None
    connection = source.take(-1)

    assert connection is not None
    with connection:
        assert connection.getpeername() == addresses[1]
        assert connection.recv(100) == b"last words\n"


def is_reset(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return True
    return False
