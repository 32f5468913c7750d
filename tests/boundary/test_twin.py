"""Two sockets for one address: to which of them clients come."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from socketprotector import twin
from tests.boundary.listening import KINDS, listening

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def first() -> Iterator[socket.socket]:
    with listening(socket.AF_INET, "127.0.0.1") as made:
        yield made


def came(pair: Pair, hosts: tuple[str, ...], count: int = 12) -> tuple[int, int]:
    """How many of so many new clients each of the two gets."""
    port = pair[0].getsockname()[1]
    with ExitStack() as clients:
        for n in range(count):
            clients.enter_context(socket.create_connection((hosts[n % len(hosts)], port)))
        return accepted(pair[0]), accepted(pair[1])


def accepted(listener: socket.socket) -> int:
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_clients_come_to_the_one_that_is_meant(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with listening(family, host, both=both) as one:
        second = twin.make(one)
        assert second is not None
        with second:
            pair = one, second
            assert came(pair, hosts) == (12, 0)
            for place in (1, 0, 0, 1, 1, 0):
                twin.steer(one, place)
                assert came(pair, hosts) == ((0, 12) if place else (12, 0))


def test_either_can_be_asked_to_steer(first: socket.socket) -> None:
    second = twin.make(first)
    assert second is not None
    with second:
        twin.steer(second, 1)
        assert came((first, second), ("127.0.0.1",)) == (0, 12)


def test_who_waits_already_stays_where_he_is(first: socket.socket) -> None:
    second = twin.make(first)
    assert second is not None
    with second, socket.create_connection(first.getsockname()):
        twin.steer(first, 1)
        assert came((first, second), ("127.0.0.1",)) == (1, 12)


def test_what_accepted_connections_inherit_is_the_same(first: socket.socket) -> None:
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
    ]
    for level, option, value in options:
        first.setsockopt(level, option, value)
    second = twin.make(first)
    assert second is not None
    with second:
        twin.steer(first, 1)
        with socket.create_connection(first.getsockname()):
            connection, _ = second.accept()
            with connection:
                for level, option, value in options:
                    assert connection.getsockopt(level, option) == value


def test_as_many_may_wait(first: socket.socket) -> None:
    second = twin.make(first)
    assert second is not None
    with second:
        limits = [
            each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)[28:32]
            for each in (first, second)
        ]
        assert limits[0] == limits[1] == (40).to_bytes(4, "little")


def test_who_asks_for_the_port_alone_does_not_get_it(first: socket.socket) -> None:
    second = twin.make(first)
    assert second is not None
    with second, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            other.bind(first.getsockname())


def test_a_stranger_of_the_same_user_who_asks_to_share_gets_nobody(first: socket.socket) -> None:
    second = twin.make(first)
    assert second is not None
    with second, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(first.getsockname())
        other.listen()
        other.setblocking(False)
        assert came((first, second), ("127.0.0.1",)) == (12, 0)
        twin.steer(first, 1)
        assert came((first, second), ("127.0.0.1",)) == (0, 12)
        assert accepted(other) == 0


def test_there_is_none_for_a_unix_socket_nor_for_one_that_waits_for_data() -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("")
        unix.listen()
        assert twin.make(unix) is None
    with listening(socket.AF_INET, "127.0.0.1", TCP_DEFER_ACCEPT=5) as late:
        assert twin.make(late) is None


def test_where_the_system_has_none_nothing_is_left(
    first: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(twin, "steer", fails)
    with pytest.raises(OSError, match="no memory"):
        twin.make(first)

    with socket.create_connection(first.getsockname()):
        assert accepted(first) == 1


def test_nobody_new_gets_in_by_either(first: socket.socket) -> None:
    second = twin.make(first)
    assert second is not None
    with second:
        for each in (first, second):
            twin.refuse_new(each)
        for place in (0, 1):
            twin.steer(first, place)
            with socket.socket() as late:
                late.setblocking(False)
                assert late.connect_ex(first.getsockname()) == errno.EINPROGRESS
                assert late.connect_ex(first.getsockname()) == errno.EALREADY
