"""Clients that have connected, or are about to, and were not read: as the kernel reports it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from socketprotector.system import netlink
from socketprotector.system import sock_diag as module
from socketprotector.system.sock_diag import accepted, is_waiting, still_unread, unaccepted, unread
from socketprotector.system.socket_copy import device_of, leave_devices
from tests import needs
from tests.boundary.listening import KINDS, listening
from tests.namespaces import at, two_links
from tests.running import eventually

V4 = socket.AF_INET


@pytest.fixture
def first() -> Iterator[socket.socket]:
    with listening(V4, "127.0.0.1") as made:
        yield made


def port_of(one: socket.socket) -> int:
    port: int = one.getsockname()[1]
    return port


def found_at(listener: socket.socket, *, in_handshake: bool = False) -> dict[bytes, bool]:
    port = port_of(listener)
    return unread(listener.family, (port,), in_handshake=in_handshake)[port]


def known(listener: socket.socket) -> dict[int, bool]:
    """The ports of accepted clients that no server has read from -> whether they are silent."""
    found = found_at(listener)
    return {int.from_bytes(client[2:4], "big"): silent for client, silent in found.items()}


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_a_client_is_known_from_his_first_packet_until_he_is_read(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    # One that waits for data has its handshakes under way until that comes.
    with (
        listening(family, host, both=both, TCP_DEFER_ACCEPT=30) as listener,
        ExitStack() as clients,
    ):
        assert known(listener) == {}
        made = [
            clients.enter_context(socket.create_connection((each, port_of(listener))))
            for each in hosts
        ]
        assert known(listener) == {port_of(each): False for each in made}

        made[0].sendall(b"words")
        eventually(lambda: can_accept(listener, clients), "one that is through")
        assert known(listener) == {port_of(each): False for each in made}


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_one_client_of_many_is_known_to_wait_until_he_is_accepted(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with listening(family, host, both=both) as listener, ExitStack() as ends:
        for target in hosts:
            address = target, port_of(listener)
            first, ours = (ends.enter_context(socket.create_connection(address)) for _ in range(2))
            assert is_waiting(ours, address)
            assert can_accept(listener, ends)
            assert not is_waiting(first, address)
            ours.shutdown(socket.SHUT_WR)
            assert is_waiting(ours, address)
            with listener.accept()[0]:
                assert not is_waiting(ours, address)
            assert not is_waiting(ours, address), "closed by now"


def test_one_whose_listener_is_bound_to_a_device_waits_too() -> None:
    with socket.socket() as listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        except PermissionError:
            needs.skip("Linux 5.7, or root, to bind to a device")
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = listener.getsockname()
        with socket.create_connection(address) as ours:
            assert is_waiting(ours, address, device_of(listener))
            with listener.accept()[0]:
                assert not is_waiting(ours, address, device_of(listener))
                clients = found_at(listener)
                assert [*clients.values()] == [True]
                assert still_unread(V4, clients) == clients


def test_clients_of_the_same_address_on_another_link_are_not_counted() -> None:
    with two_links() as hosts, ExitStack() as ends:
        one, two = (ends.enter_context(socket.socket(socket.AF_INET6)) for _ in hosts)
        one.bind(at(hosts[0], 0))
        two.bind(at(hosts[1], port_of(one)))
        one.listen()
        two.listen()
        for _ in range(2):
            client = ends.enter_context(socket.socket(socket.AF_INET6))
            client.connect(at(hosts[0], port_of(one)))
        ends.enter_context(one.accept()[0])
        assert (len(unaccepted(one)), len(unaccepted(two))) == (1, 0)
        assert [accepted(each)[0].total() for each in (one, two)] == [1, 0]

        leave_devices(one)  # it gets no more clients, but has those
        assert len(unaccepted(one)) == 1


def test_one_whose_handshake_the_server_has_not_finished_waits(first: socket.socket) -> None:
    """It is in no queue, though its own side is through."""
    address = "127.0.0.1", port_of(first)
    first.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    with socket.create_connection(address) as ours:
        assert is_waiting(ours, address)


def can_accept(listener: socket.socket, accepted: ExitStack) -> bool:
    try:
        accepted.enter_context(listener.accept()[0])
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_a_client_that_says_nothing_is_silent_until_it_speaks(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with listening(family, host, both=both) as listener, ExitStack() as ends:
        client = ends.enter_context(socket.create_connection((hosts[-1], port_of(listener))))
        server = ends.enter_context(listener.accept()[0])
        assert known(listener) == {port_of(client): True}
        clients = found_at(listener)
        assert still_unread(family, clients) == clients

        client.sendall(b"two words")
        eventually(lambda: known(listener) == {port_of(client): False}, "the words")
        assert still_unread(family, clients) == dict.fromkeys(clients, False)
        assert still_unread(family, clients, in_handshake=True) == {}

        server.recv(3)  # the rest is the server's affair
        assert known(listener) == {}
        assert still_unread(family, clients) == {}
        client.sendall(b"and more")
        assert known(listener) == {}
        assert still_unread(family, clients) == {}


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_a_client_in_a_handshake_is_the_same_client_afterwards(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with (
        listening(family, host, both=both, TCP_DEFER_ACCEPT=30) as listener,
        ExitStack() as ends,
    ):
        client = ends.enter_context(socket.create_connection((hosts[-1], port_of(listener))))
        clients = found_at(listener, in_handshake=True)
        assert [*clients.values()] == [False]
        assert still_unread(family, clients) == clients
        assert still_unread(family, clients, in_handshake=True) == clients

        client.sendall(b"words")
        eventually(lambda: not found_at(listener, in_handshake=True), "the end of the handshake")
        assert still_unread(family, clients) == {}, "it waits to be accepted"
        ends.enter_context(listener.accept()[0])
        assert still_unread(family, clients) == clients == found_at(listener)
        assert still_unread(family, clients, in_handshake=True) == {}


def test_another_client_with_the_same_ports_is_another(first: socket.socket) -> None:
    ours = "127.77.0.1", 0  # no other test takes a port of this address
    with (
        socket.create_connection(first.getsockname(), source_address=ours) as client,
        first.accept()[0] as server,
    ):
        address, clients = client.getsockname(), found_at(first)
        for end in (client, server):  # a reset: no TIME_WAIT keeps the ports
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4))
            end.close()
    assert still_unread(V4, clients) == {}
    with socket.create_connection(first.getsockname(), source_address=address), first.accept()[0]:
        assert still_unread(V4, clients) == {}
        assert [*found_at(first).values()] == [True]
        assert clients.keys().isdisjoint(found_at(first))


def test_a_client_is_no_longer_unread_once_its_server_has_half_closed(first: socket.socket) -> None:
    with socket.create_connection(first.getsockname()) as client, first.accept()[0] as server:
        client.sendall(b"words")
        eventually(lambda: known(first) == {port_of(client): False}, "the words")
        clients = found_at(first)
        server.shutdown(socket.SHUT_WR)
        assert found_at(first) == {}
        assert still_unread(V4, clients) == {}


def test_clients_after_one_that_has_gone_are_found(first: socket.socket) -> None:
    with ExitStack() as ends:
        for _ in range(3):
            ends.enter_context(socket.create_connection(first.getsockname()))
            ends.enter_context(first.accept()[0])
        clients = found_at(first)
        for gone in clients:
            never = bytes(4) + gone[4:]  # no connection has port 0
            assert still_unread(V4, [never, *clients]) == clients


def test_clients_that_wait_to_be_accepted_are_left_out(first: socket.socket) -> None:
    with (
        socket.create_connection(first.getsockname()) as one,
        socket.create_connection(first.getsockname()) as another,
    ):
        one.sendall(b"words")
        assert known(first) == {}
        with first.accept()[0]:
            eventually(lambda: known(first) == {port_of(one): False}, "the words")
            with first.accept()[0]:
                assert known(first) == {port_of(one): False, port_of(another): True}


def test_a_client_that_only_hangs_up_is_known_until_that_is_read(first: socket.socket) -> None:
    with socket.create_connection(first.getsockname()) as client, first.accept()[0] as server:
        client.shutdown(socket.SHUT_WR)
        eventually(lambda: known(first) == {port_of(client): False}, "an end that was not read")

        assert server.recv(1) == b""

        assert known(first) == {}


def test_clients_that_are_gone_are_not_known(first: socket.socket) -> None:
    client = socket.create_connection(first.getsockname())
    with first.accept()[0]:
        pass
    client.close()

    eventually(lambda: known(first) == {}, "no client")


def test_other_ports_clients_are_not_listed(first: socket.socket) -> None:
    with (
        listening(V4, "127.0.0.1") as other,
        socket.create_connection(other.getsockname()),
        other.accept()[0],
    ):
        assert known(other)
        assert known(first) == {}


def test_more_than_one_answer_holds_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink, "_ANSWER_BYTES", 8192)
    with listening(V4, "127.0.0.1") as late, ExitStack() as clients:
        late.listen(200)
        for _ in range(150):
            clients.enter_context(socket.create_connection(late.getsockname()))
            clients.enter_context(late.accept()[0])

        assert len(known(late)) == 150


def test_a_kernel_that_reports_less_is_no_error(
    first: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_connection(first.getsockname()), first.accept()[0]:
        clients = found_at(first)
        monkeypatch.setattr(module, "_BYTES_RECEIVED_OFFSET", 4096)
        assert clients
        assert known(first) == {}
        assert still_unread(V4, clients) == {}


def test_a_refusal_of_the_kernel_is_an_error() -> None:
    with pytest.raises(OSError, match="does not report that"):
        unread(200, (80,))
    with pytest.raises(OSError, match="does not report that"):
        still_unread(200, [bytes(48)])
