"""Options of a listening socket that are kept and restored: each that this kernel has."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import pytest

from socketprotector.system import reuseport, socket_copy, socket_snapshot
from socketprotector.system.socket_snapshot import OPTIONS, Option, as_text, from_text
from tests.boundary.listening import ignore_clients

FAMILIES = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
_ADDRESSES: dict[socket.AddressFamily, tuple[str, int] | str]
_ADDRESSES = {socket.AF_INET: ("127.0.0.1", 0), socket.AF_INET6: ("::1", 0), socket.AF_UNIX: ""}
_SPECIAL = {
    "SO_LINGER": struct.pack("ii", 1, 5),
    "SO_RCVTIMEO": struct.pack("ll", 1, 0),
    "SO_SNDTIMEO": struct.pack("ll", 1, 0),
    "TCP_CONGESTION": b"reno\0",
    "TCP_ULP": b"tls\0",
}


@pytest.fixture(params=FAMILIES, ids=[each.name for each in FAMILIES])
def listening(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    with socket.socket(request.param) as one:
        one.bind(_ADDRESSES[request.param])
        one.listen(100)
        yield one


def changed(one: socket.socket, option: Option) -> bool:
    """Set an option to something else; return whether that could be done."""
    before = socket_snapshot.take(one).get(option.name)
    if before is None:
        return False
    number = int.from_bytes(before[:4], "little")
    for value in (_SPECIAL.get(option.name), number + 1, 1, 5, 600, 3 * number, 0):
        try:
            if value is not None and value != number:
                one.setsockopt(option.level, option.number, value)
        except (OSError, OverflowError, TypeError):  # above what an int holds
            continue
        if socket_snapshot.take(one)[option.name] != before:
            return True
    return False


def test_each_option_is_restored_or_named(listening: socket.socket) -> None:
    before = socket_snapshot.take(listening)
    wrong, seen = [], 0
    for option in OPTIONS:
        if not changed(listening, option) and option.name != "TCP_MAXSEG":
            continue
        seen += 1
        stays = set(socket_snapshot.restore(listening, before))
        now = socket_snapshot.take(listening)
        differ = {name for name in before if now[name] != before[name]}
        if stays != differ or (not option.stays and not option.privilege and option.name in stays):
            wrong.append((option.name, stays, differ))
    assert wrong == []
    assert seen > (10 if listening.family == socket.AF_UNIX else 25)


def test_the_backlog_is_restored(listening: socket.socket) -> None:
    before = socket_snapshot.take(listening)
    listening.listen(5)
    assert reuseport.queue(listening) == (0, 5)

    assert socket_snapshot.restore(listening, before) == []

    assert reuseport.queue(listening) == (0, 100)


@pytest.mark.parametrize("device", [0x7FFFFFF0, socket_copy.NO_DEVICE])
def test_a_device_that_does_not_exist_is_restored_or_named(device: int) -> None:
    """Its name cannot be read, and no client reaches the socket."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        before = socket_snapshot.take(one)
        with suppress(PermissionError):  # before Linux 5.7
            one.setsockopt(socket.SOL_SOCKET, 62, device)
        stays = socket_snapshot.restore(one, before)

        now = one.getsockopt(socket.SOL_SOCKET, 62)
        assert (now, stays) in ((0, []), (device, ["SO_BINDTOIFINDEX"]))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_key_that_the_kernel_does_not_show_is_named(family: socket.AddressFamily) -> None:
    with socket.create_server(_ADDRESSES[family], family=family) as one:
        before = socket_snapshot.take(one)
        assert socket_snapshot.restore(one, before) == []
        ignore_clients(one)

        assert socket_snapshot.restore(one, before) == ["TCP_MD5SIG"]


def test_a_segment_size_is_unset_not_set_to_what_it_read_as() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        before = socket_snapshot.take(one)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 700)

        assert socket_snapshot.restore(one, before) == []

        with socket.socket() as client:
            client.connect(one.getsockname())
            with one.accept()[0] as accepted:
                size = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        assert size > 1000, "that of the network, not 536"


def test_a_unix_socket_lets_descriptors_pass_again() -> None:
    with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as client:
        one.bind("")
        one.listen()
        before = socket_snapshot.take(one)
        with suppress(OSError):  # before Linux 6.16
            one.setsockopt(socket.SOL_SOCKET, 83, 0)  # SO_PASSRIGHTS

        assert socket_snapshot.restore(one, before) == []

        client.connect(one.getsockname())
        with one.accept()[0] as accepted:
            socket.send_fds(client, [b"x"], [client.fileno()])
            _, received, _, _ = socket.recv_fds(accepted, 1, 1)
    for each in received:
        os.close(each)
    assert len(received) == 1


def test_it_outlives_the_program_as_text(listening: socket.socket) -> None:
    before = socket_snapshot.take(listening)

    assert from_text(as_text(before)) == before
