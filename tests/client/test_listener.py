"""The drop-in listening socket: what frameworks ask of it, and how it ends."""

from __future__ import annotations

import http.client
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from socketprotector_client import Connection, Listener, listener_of
from socketprotector_client.worker import current

from tests.channel import Channel
from tests.running import eventually


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    with Listener("127.0.0.1:0") as one:
        one.listen(16)
        yield one


def connect(listener: Listener) -> socket.socket:
    return socket.create_connection(listener.getsockname())


def test_it_accepts_as_a_listening_socket_does(listener: Listener) -> None:
    with connect(listener) as client:
        accepted, peer = listener.accept()

        with accepted:
            assert peer == client.getsockname() == accepted.getpeername()
            assert accepted.gettimeout() is None
            assert (accepted.family, accepted.type) == (socket.AF_INET, socket.SOCK_STREAM)
            client.sendall(b"hello")
            assert accepted.recv(5) == b"hello"


def test_it_looks_like_a_listening_socket(listener: Listener) -> None:
    assert (listener.family, listener.type) == (socket.AF_INET, socket.SOCK_STREAM)
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with pytest.raises(OSError, match="Protocol not available"):
        listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)


def test_a_connection_knows_where_it_came_through(listener: Listener) -> None:
    host, port = listener.getsockname()
    with connect(listener):
        accepted, peer = listener.accept()
        with accepted:
            assert accepted.listener == listener_of(accepted) == f"tcp:{host}:{port}"
            assert accepted.peer == peer
            assert accepted.accepted_at_ns > 0


def test_a_listener_without_blocking_fails_once_after_each_connection(listener: Listener) -> None:
    listener.setblocking(False)
    with connect(listener), connect(listener):
        for _ in range(2):
            assert select.select([listener], [], [], 10)[0]
            listener.accept()[0].close()
            with pytest.raises(BlockingIOError):
                listener.accept()

        assert not select.select([listener], [], [], 0)[0]


@pytest.mark.parametrize(("take", "in_a_row"), [(1, 1), (3, 3), (None, 5)])
def test_it_takes_as_many_in_a_row_as_it_was_told(take: int | None, in_a_row: int) -> None:
    with Listener("127.0.0.1:0", take=take) as listener:
        listener.setblocking(False)
        clients = [connect(listener) for _ in range(5)]

        accepted: list[Connection] = [listener.accept()[0] for _ in range(in_a_row)]

        with pytest.raises(BlockingIOError):
            listener.accept()
        for one in (*accepted, *clients):
            one.close()


def test_it_takes_more_in_a_row_the_longer_there_is_more(listener: Listener) -> None:
    listener.listen(64)
    listener.setblocking(False)
    clients = [connect(listener) for _ in range(40)]
    rows: list[int] = []

    while sum(rows) < len(clients):
        rows.append(len(take_row(listener)))
    grown = list(rows)
    rows.clear()
    for _ in range(6):  # and one at a time, as when there is little to do
        with connect(listener):
            assert select.select([listener], [], [], 10)[0]
            assert len(take_row(listener)) == 1
    more = [connect(listener) for _ in range(3)]
    rows = [len(take_row(listener)) for _ in range(2)]

    assert grown == [1, 2, 4, 8, 16, 9]
    assert rows == [1, 2]
    for one in (*clients, *more):
        one.close()


@pytest.mark.parametrize(("workers", "longest"), [(1, 32), (8, 4), (32, 1), (100, 1)])
def test_the_longest_row_is_shared_by_all_workers(
    workers: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(current(), "sharers", workers)
    with Listener("127.0.0.1:0") as listener:
        listener.listen(128)
        listener.setblocking(False)
        clients = [connect(listener) for _ in range(100)]

        rows: list[int] = []
        while sum(rows) < len(clients):
            rows.append(len(take_row(listener)))

        assert max(rows) == longest
        for one in clients:
            one.close()


def take_row(listener: Listener) -> list[Connection]:
    """Accept until it fails, as event loops do, and close what came."""
    row: list[Connection] = []
    while True:
        try:
            row.append(listener.accept()[0])
        except BlockingIOError:
            for one in row:
                one.close()
            return row


def test_a_timeout_is_kept(listener: Listener) -> None:
    listener.settimeout(0.01)

    with pytest.raises(TimeoutError):
        listener.accept()


def test_shutdown_is_harmless(listener: Listener) -> None:
    listener.shutdown(socket.SHUT_RDWR)

    with connect(listener):
        listener.accept()[0].close()


def test_it_cannot_be_wrapped_in_tls_as_a_whole(listener: Listener) -> None:
    with pytest.raises(OSError, match="wrap the accepted connections instead"):
        listener.detach()


def test_one_without_an_address_is_bound_later() -> None:
    with Listener() as listener:
        with pytest.raises(ValueError, match="no protector and no address"):
            listener.listen()

        listener.bind(("127.0.0.1", 0))
        listener.listen()

        with connect(listener):
            listener.accept()[0].close()


def test_one_on_a_path_removes_it_at_the_end(tmp_path: Path) -> None:
    with Listener() as listener:
        listener.bind(str(tmp_path / "socket"))
        assert listener.family == socket.AF_UNIX
        assert listener.getsockname() == str(tmp_path / "socket")

    assert not (tmp_path / "socket").exists()


def test_http_server_answers_and_closes_keep_alive_connections_at_drain(channel: Channel) -> None:
    worker = channel.start("http_server.py", "0")
    host, port = channel.listeners[0].getsockname()
    client = http.client.HTTPConnection(host, port, timeout=30)
    client.connect()
    channel.hand_off()

    client.request("GET", "/")
    assert client.getresponse().read() == f"{worker.pid} False".encode()
    channel.end_channel()
    client.request("GET", "/")
    response = client.getresponse()

    assert response.read() == f"{worker.pid} True".encode()
    assert response.headers["Connection"] == "close"
    client.close()
    assert worker.wait() == 0


@pytest.mark.parametrize("way", ["asyncio", "thread"])
def test_a_server_that_knows_nothing_of_draining_ends_after_its_last_client(
    channel: Channel, way: str
) -> None:
    worker = channel.start("listens_bare.py", way)
    client = channel.connect()
    assert client.ask("hello") == "echo hello"

    channel.end_channel()
    eventually(lambda: client.ask("draining") == "True", "the worker notices")
    assert client.ask("hello") == "echo hello"
    client.close()

    assert (worker.read_last(), worker.wait()) == ("cleaned up", 0)


def test_connections_wrapped_in_tls_keep_a_draining_worker(channel: Channel) -> None:
    worker = channel.start("tls.py")
    before, after = channel.connect(), channel.connect()
    assert [worker.read_line() for _ in range(2)] == ["held"] * 2

    channel.end_channel()
    before.close()
    assert worker.read_line() == "let go"
    assert not after.has_answer()
    after.close()

    assert worker.read_rest() == ["let go"]
    assert worker.wait() == 0


def test_a_signal_handler_has_it_stop_and_the_loop_sleeps_until_the_last_client_is_gone(
    channel: Channel,
) -> None:
    worker = channel.start("stops.py")
    client = channel.connect()
    assert worker.read_line() == "taken"

    worker.process.send_signal(signal.SIGUSR1)
    assert [worker.read_line() for _ in range(2)] == ["drains", "sleeps"]
    waits = channel.connect()
    client.close()

    assert (worker.read_rest(), worker.wait()) == ([], 0)
    assert channel.queued() == 1
    waits.close()


@pytest.mark.parametrize("by_signal", [False, True])
def test_one_that_takes_sigterm_for_the_begin_of_the_drain_gets_another_however_it_began(
    channel: Channel, by_signal: bool
) -> None:
    worker = channel.start("stops_at_term.py")
    channel.connect()
    assert worker.read_line() == "taken"

    if by_signal:
        worker.process.send_signal(signal.SIGTERM)
    else:
        channel.end_channel()

    assert (worker.read_rest(), worker.wait()) == ([], 0)


def test_a_main_thread_that_waits_for_ever_is_interrupted(channel: Channel) -> None:
    worker = channel.start("listens_bare.py", "waiting main thread")

    channel.end_channel()

    assert worker.read_rest() == ["interrupted", "cleaned up"]
    assert worker.wait() == 0


def test_a_server_is_told_to_finish_only_after_a_fresh_connection_was_read(
    channel: Channel,
) -> None:
    worker = channel.start("leaves.py", "600")
    idle, fresh = channel.connect(), channel.connect()
    assert [worker.read_line() for _ in range(2)] == ["taken"] * 2
    idle.say("hello")
    assert worker.read_line() == "hello"

    channel.end_channel()
    assert worker.read_line() == "leaving"
    for _ in range(100):  # so long it looks again and again
        idle.say("more")
        assert worker.read_line() == "more"
    fresh.say("first words")

    assert worker.read_rest() == ["first words", "TERM"]


def test_a_server_is_told_to_finish_only_after_a_tls_handshake(channel: Channel) -> None:
    worker = channel.start("leaves.py", "600", "600000")
    client = channel.connect()
    assert worker.read_line() == "taken"
    client.say("client hello")
    assert worker.read_line() == "client hello"

    channel.end_channel()
    assert worker.read_line() == "leaving"
    assert worker.process.stdout is not None
    assert not select.select([worker.process.stdout], [], [], 0.1)[0]  # it waits
    client.say("x" * 4096)  # more than a handshake

    assert worker.read_last() == "TERM"


@pytest.mark.parametrize("patience_s", ["0.05", "600"])
def test_a_server_is_told_to_finish_though_its_clients_say_nothing(
    channel: Channel, patience_s: str
) -> None:
    worker = channel.start("leaves.py", patience_s)
    client = channel.connect()
    assert worker.read_line() == "taken"
    if patience_s == "600":  # not one that has spoken, but one that never will
        client.close()
        assert worker.read_line() == "closed"

    channel.end_channel()

    assert [each for each in worker.read_rest() if each != "closed"] == ["leaving", "TERM"]
