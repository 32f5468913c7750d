"""News to the protector: one datagram, whatever the state of the receiver."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from socketprotector_client import notify, wire


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind("")
        monkeypatch.setenv(wire.ENV_NOTIFY, "@" + one.getsockname()[1:].decode())
        yield one


def test_lines_and_fields_travel_in_one_datagram(receiver: socket.socket) -> None:
    assert notify("READY=1", wire.RETIRES_ON_RETURN, status="warm", watchdog=1)

    assert receiver.recv(4096) == (b"READY=1\nX_SOCKETPROTECTOR_RETIRE=1\nSTATUS=warm\nWATCHDOG=1")


def test_a_line_end_in_a_value_does_not_make_another_assignment(receiver: socket.socket) -> None:
    assert notify(status="half\nREADY=1")

    assert receiver.recv(4096) == b"STATUS=half READY=1"


def test_a_path_works_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "notify")
    monkeypatch.setenv(wire.ENV_NOTIFY, path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(path)

        assert notify("STOPPING=1")

        assert receiver.recv(4096) == b"STOPPING=1"


def test_a_full_receiver_neither_blocks_nor_fails(receiver: socket.socket) -> None:
    sent = 0
    while notify(status=sent):
        sent += 1

    assert sent > 0
    assert not notify("READY=1")


def test_a_vanished_receiver_neither_blocks_nor_fails(receiver: socket.socket) -> None:
    receiver.close()

    assert not notify("READY=1")


@pytest.mark.parametrize("address", [None, "", "vsock:2:1", "relative"])
def test_without_a_receiver_it_does_nothing(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(wire.ENV_NOTIFY, raising=False)
    if address is not None:
        monkeypatch.setenv(wire.ENV_NOTIFY, address)

    assert not notify("READY=1")
