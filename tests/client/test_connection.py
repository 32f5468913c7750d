"""When a connection counts as open, however it ends."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
from socketprotector_client import Connection, Listener, listener_of
from socketprotector_client.intake import Intake

from .sharing import taken


@pytest.fixture
def listener() -> Iterator[Listener]:
    """One that hands out one connection at a time, with two clients waiting."""
    with Listener("127.0.0.1:0", limit=1) as one:
        one.listen(16)
        address = one.getsockname()
        with socket.create_connection(address), socket.create_connection(address):
            yield one
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join()


def accept(listener: Listener) -> Connection:
    listener.settimeout(10)
    return listener.accept()[0]


def is_full(listener: Listener) -> bool:
    listener.settimeout(0.01)
    try:
        listener.accept()
    except TimeoutError:
        return True
    return False


def wrap(connection: Connection) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    return context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)


def close_twice(connection: Connection) -> None:
    connection.close()
    connection.close()


def close_in_another_thread(connection: Connection) -> None:
    thread = threading.Thread(target=connection.close)
    thread.start()
    thread.join()


@pytest.mark.parametrize("close", [Connection.close, close_twice, close_in_another_thread])
def test_it_ends_with_close(listener: Listener, close: Callable[[Connection], None]) -> None:
    connection = accept(listener)
    assert is_full(listener)

    close(connection)

    accept(listener).close()


def test_it_ends_with_the_last_file_made_from_it(listener: Listener) -> None:
    connection = accept(listener)
    lines = connection.makefile("rb")
    connection.close()
    assert is_full(listener)

    lines.close()

    accept(listener).close()


def test_it_ends_when_it_is_not_referenced(listener: Listener) -> None:
    connection = accept(listener)
    assert is_full(listener)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del connection

    accept(listener).close()


def test_it_goes_on_under_tls_and_ends_there(listener: Listener) -> None:
    connection = accept(listener)
    name = connection.listener
    wrapped = wrap(connection)
    assert is_full(listener)
    assert listener_of(wrapped) == name

    wrapped.close()

    accept(listener).close()


def test_it_goes_on_as_a_bare_descriptor_and_ends_there(listener: Listener) -> None:
    fd = accept(listener).detach()
    assert is_full(listener)

    os.close(fd)

    accept(listener).close()


def test_a_copy_counts_on_its_own(listener: Listener) -> None:
    connection = accept(listener)
    copy = connection.dup()
    connection.close()
    assert is_full(listener)
    assert (copy.listener, copy.peer) == (connection.listener, connection.peer)

    copy.close()

    accept(listener).close()


def test_it_knows_its_addresses_also_after_a_reset() -> None:
    with Listener("127.0.0.1:0") as listener:
        client = socket.create_connection(listener.getsockname())
        client_address = client.getsockname()
        connection = accept(listener)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        assert select.select([connection], [], [], 10)[0]  # the reset has come

        assert connection.getpeername() == connection.peer == client_address
        for _ in range(2):
            assert connection.getsockname() == listener.getsockname()
        assert (connection.family, connection.type) == (socket.AF_INET, socket.SOCK_STREAM)
        connection.close()


def test_it_stays_blocking_when_the_drain_looks_for_unread_clients(intake: Intake) -> None:
    with taken(intake) as connection:
        socket.setdefaulttimeout(30)
        try:
            intake.open.any_beginning()
        finally:
            socket.setdefaulttimeout(None)

        assert os.get_blocking(connection.fileno())


def test_a_closed_one_has_no_addresses(listener: Listener) -> None:
    connection = accept(listener)
    connection.getsockname()

    connection.close()

    for ask in (connection.getsockname, connection.getpeername):
        with pytest.raises(OSError, match="Bad file descriptor"):
            ask()


def test_its_family_is_asked_of_the_kernel_where_it_is_unknown() -> None:
    one, other = socket.socketpair()
    with other, Connection(fileno=one.detach()) as made:
        assert (made.family, made.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
    with Connection(fileno=socket.socket(socket.AF_INET6).detach()) as made:
        assert (made.family, made.type) == (socket.AF_INET6, socket.SOCK_STREAM)


def test_a_socket_of_another_origin_has_no_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(KeyError):
        listener_of(other)


def test_one_whose_number_was_closed_already_gives_it_up_all_the_same(listener: Listener) -> None:
    """As uvloop does it: when this object goes, the number may be another file's."""
    one = accept(listener)
    os.close(one.fileno())

    one.detach()

    assert one.fileno() == -1
    accept(listener).close()


def test_the_end_of_a_detached_connection_is_looked_for_by_one_timer_at_a_time(
    intake: Intake, timers: list[Callable[[], None]]
) -> None:
    number, other = taken(intake).detach(), taken(intake)
    intake.end()
    intake.await_last()
    other.close()
    assert len(timers) == 1

    timers.pop()()
    assert len(timers) == 1
    assert not intake.has_more()

    os.close(number)
    timers.pop()()
    assert intake.has_more()
