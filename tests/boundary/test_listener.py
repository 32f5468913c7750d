"""How a listening socket ends: nobody new, but everybody who has connected."""

from __future__ import annotations

import errno
import os
import select
import socket
from pathlib import Path

import pytest

from socketprotector.listener import Listener
from socketprotector.settings import ListenerSettings


def adopted(made: socket.socket, settings: ListenerSettings) -> Listener:
    made.listen(10)
    made.setblocking(False)
    return Listener(made.detach(), 0, settings)


def on_tcp(family: socket.AddressFamily, host: str) -> tuple[Listener, tuple[str, int]]:
    made = socket.socket(family)
    made.bind((host, 0))
    port = made.getsockname()[1]
    return adopted(made, ListenerSettings(f"tcp:{host}:{port}")), (host, port)


def on_file(path: Path) -> Listener:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    found = path.stat()
    return adopted(made, ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino))


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_nobody_new_gets_in_but_who_has_connected_is_accepted(
    family: socket.AddressFamily, host: str
) -> None:
    listener, address = on_tcp(family, host)
    with socket.socket(family) as early, socket.socket(family) as late:
        early.connect(address)

        listener.refuse_new()

        assert late.connect_ex(address) == errno.ECONNREFUSED
        accepted, _ = listener.socket.accept()
        accepted.close()
        with pytest.raises(BlockingIOError):
            listener.socket.accept()
        listener.close()


def test_a_unix_socket_refuses_new_ones_and_keeps_the_queue(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = on_file(path)
    with socket.socket(socket.AF_UNIX) as early, socket.socket(socket.AF_UNIX) as late:
        early.connect(str(path))
        os.link(path, tmp_path / "other")

        listener.refuse_new()

        assert not path.exists()
        with pytest.raises(ConnectionRefusedError):
            late.connect(str(tmp_path / "other"))
        accepted, _ = listener.socket.accept()
        accepted.close()
        with pytest.raises(BlockingIOError):
            listener.socket.accept()
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        assert poll.poll(0)  # for ever: it must not be waited for
        assert listener.always_readable
    listener.close()


def test_closing_removes_its_file_and_nobody_elses(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = on_file(path)
    path.unlink()
    second = on_file(path)

    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


def test_closing_tells_clients_that_wait_even_if_a_copy_is_open_elsewhere() -> None:
    listener, address = on_tcp(socket.AF_INET, "127.0.0.1")
    copy = os.dup(listener.fileno())

    listener.close()

    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(address)
    os.close(copy)
