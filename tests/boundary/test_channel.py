"""The protector's two ends of a channel, against the kernel."""

from __future__ import annotations

import errno
import os
import resource
import socket
import struct
import termios
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec

import pytest
from socketprotector_client import wire

from socketprotector.system.channel import FIONREAD, SEND_FLAGS, Channel

FD = struct.Struct("i")


@pytest.fixture
def channel() -> Iterator[Channel]:
    made = Channel.make(64)
    yield made
    made.close()


def send(channel: Channel, number: int) -> None:
    """Send a connection (here: any descriptor) whose header says its number."""
    header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 0, 0, number)
    fd = os.memfd_create(str(number))
    try:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, FD.pack(fd))]
        channel.write.sendmsg([header], rights, SEND_FLAGS)
    finally:
        os.close(fd)


def fill(channel: Channel) -> int:
    """Send until there is no more room; return how many went in."""
    for number in range(100_000):
        try:
            send(channel, number)
        except BlockingIOError:
            return number
    raise AssertionError("it never was full")


def taken(channel: Channel) -> int | None:
    """Take one back and return the number in its header."""
    message = channel.take_back()
    if message is None:
        return None
    header, fd = message
    os.close(fd)
    return int(wire.HEADER.unpack(header)[4])


def test_what_was_sent_comes_back_oldest_first(channel: Channel) -> None:
    for number in range(5):
        send(channel, number)
    assert channel.depth() == 5

    assert [taken(channel) for _ in range(6)] == [0, 1, 2, 3, 4, None]
    assert channel.depth() == 0


def test_what_comes_back_is_closed_on_exec(channel: Channel) -> None:
    send(channel, 1)

    message = channel.take_back()

    assert message is not None
    assert not os.get_inheritable(message[1])
    os.close(message[1])


@pytest.mark.parametrize("queue", [wire.SMALLEST_QUEUE, 64, 256, 1000])
def test_a_channel_holds_about_as_many_as_wanted(queue: int) -> None:
    channel = Channel.make(queue)
    try:
        wanted = min(queue, channel.capacity())
        assert wanted <= fill(channel) <= channel.capacity() * 2
    finally:
        channel.close()


def test_a_wish_beyond_what_the_system_grants_is_clamped_and_can_be_read_back() -> None:
    channel = Channel.make(1_000_000)
    try:
        assert channel.capacity() < 1_000_000
    finally:
        channel.close()


def test_end_of_file_comes_after_what_is_queued(channel: Channel) -> None:
    send(channel, 7)

    channel.end()

    assert taken(channel) == 7
    assert channel.read.recv(16) == b""
    assert channel.take_back() is None


def test_ending_twice_is_ending_once(channel: Channel) -> None:
    channel.end()
    channel.end()
    channel.close()
    channel.close()


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_RDWR])
def test_a_worker_that_shuts_it_down_is_seen_and_takes_nothing_away(
    channel: Channel, how: int
) -> None:
    send(channel, 1)
    assert not channel.is_shut()
    worker = socket.socket(fileno=os.dup(channel.read.fileno()))
    worker.shutdown(how)
    worker.close()

    assert channel.is_shut()
    with pytest.raises(BrokenPipeError):
        send(channel, 2)
    assert taken(channel) == 1
    channel.end()
    assert not channel.is_shut()  # by us


@pytest.mark.parametrize("how", [socket.SHUT_WR])
def test_a_worker_that_shuts_its_useless_side_does_no_harm(channel: Channel, how: int) -> None:
    channel.read.shutdown(how)

    send(channel, 1)
    assert not channel.is_shut()
    assert taken(channel) == 1


def test_a_worker_cannot_put_anything_in_our_way(channel: Channel) -> None:
    """It would be an ECONNRESET for the next worker that takes once our end is closed."""
    send(channel, 1)

    with pytest.raises(BrokenPipeError):
        channel.read.send(b"nonsense", SEND_FLAGS)

    channel.end()
    assert taken(channel) == 1


def test_a_worker_that_closes_its_end_changes_nothing(channel: Channel) -> None:
    os.close(os.dup(channel.read.fileno()))

    send(channel, 1)
    assert taken(channel) == 1


def test_our_own_ends_stay_blocking_for_the_workers_sake(channel: Channel) -> None:
    assert os.get_blocking(channel.read.fileno())
    send(channel, 1)
    assert taken(channel) == 1
    assert taken(channel) is None
    assert os.get_blocking(channel.read.fileno())


def test_without_a_free_descriptor_the_kernel_drops_the_connection(channel: Channel) -> None:
    """Why the forwarder keeps one in reserve."""
    send(channel, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        message = channel.take_back()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert message is not None
    assert message[1] == -1


@pytest.mark.parametrize("spare", [0, 1])
def test_a_channel_that_cannot_be_made_leaves_nothing(spare: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            Channel.make(64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert caught.value.errno == errno.EMFILE


def test_a_client_library_that_is_too_old_is_noticed_before_a_channel_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The probe of an upgrade imports this; nothing makes a channel before the next reload."""
    spec = find_spec("socketprotector.system.channel")
    assert spec is not None
    assert spec.loader is not None
    monkeypatch.delattr(wire, "RECORD_CHARGE_BYTES")

    with pytest.raises(AttributeError, match="RECORD_CHARGE_BYTES"):
        spec.loader.exec_module(module_from_spec(spec))


def test_the_number_of_an_ioctl_is_that_of_termios() -> None:
    assert FIONREAD == termios.FIONREAD
