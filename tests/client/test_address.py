"""Listen addresses: what people may write, and binding without a protector."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from socketprotector_client.address import (
    Endpoint,
    close_all,
    family_of,
    listen,
    name_of,
    resolve,
    sockname_of,
)
from socketprotector_client.source import ListenSource

from tests.together import together

if TYPE_CHECKING:
    from socketprotector_client.address import ListenAddress

V4, V6, UNIX = socket.AF_INET, socket.AF_INET6, socket.AF_UNIX
ANY = [Endpoint(V4, ("0.0.0.0", 4321)), Endpoint(V6, ("::", 4321))]


@together(
    ("address", "expected"),
    [
        (4321, [ANY]),
        ("4321", [ANY]),
        (":4321", [ANY]),
        (("", 4321), [ANY]),
        ("127.0.0.1:4321", [[Endpoint(V4, ("127.0.0.1", 4321))]]),
        ("tcp:127.0.0.1:4321", [[Endpoint(V4, ("127.0.0.1", 4321))]]),
        (("127.0.0.1", 4321), [[Endpoint(V4, ("127.0.0.1", 4321))]]),
        ("[::1]:4321", [[Endpoint(V6, ("::1", 4321, 0, 0))]]),
        ("unix:/run/x", [[Endpoint(UNIX, "/run/x")]]),
        ("unix:@x", [[Endpoint(UNIX, "\0x")]]),
        (
            ["unix:/run/x", ("127.0.0.1", 1), 4321],
            [[Endpoint(UNIX, "/run/x")], [Endpoint(V4, ("127.0.0.1", 1))], ANY],
        ),
        (("unix:/a", "unix:/b"), [[Endpoint(UNIX, "/a")], [Endpoint(UNIX, "/b")]]),
    ],
)
def test_every_form_of_address_is_understood(
    address: ListenAddress, expected: list[list[Endpoint]]
) -> None:
    assert resolve(address) == expected


@together("address", ["", "localhost", "host:port", "1:70000", "unix:", "-1", -1])
def test_anything_else_is_refused_in_clear_words(address: ListenAddress) -> None:
    with pytest.raises(ValueError, match="cannot listen on"):
        resolve(address)


@pytest.mark.parametrize(
    ("name", "family", "sockname"),
    [
        ("tcp:127.0.0.1:80", V4, ("127.0.0.1", 80)),
        ("tcp:[::1]:80", V6, ("::1", 80, 0, 0)),
        ("tcp:[fe80::1%lo]:80", V6, ("fe80::1", 80, 0, socket.if_nametoindex("lo"))),
        # An interface that is gone: only its number is known.
        ("tcp:[fe80::1%987654]:80", V6, ("fe80::1", 80, 0, 987654)),
        ("unix:/run/x", UNIX, "/run/x"),
        ("unix:@x", UNIX, b"\0x"),
    ],
)
def test_a_name_says_what_getsockname_would(name: str, family: int, sockname: object) -> None:
    assert (family_of(name), sockname_of(name)) == (family, sockname)
    assert name_of(family, sockname) == name


def test_a_removed_listener_has_no_family() -> None:
    assert family_of("-") is None


def test_port_0_takes_one_number_for_both_families() -> None:
    listeners = listen(0, 16)

    ports = {one.getsockname()[1] for one in listeners}

    close_all(listeners)
    assert len(ports) == 1
    assert 0 not in ports


def test_a_port_in_use_is_named_and_nothing_stays_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(OSError, match=f"cannot listen on tcp:127.0.0.1:{port}: ") as caught:
            listen(["127.0.0.1:0", f"127.0.0.1:{port}"], 16)

    assert caught.value.errno == errno.EADDRINUSE


def test_a_restarted_program_listens_at_once_though_clients_were_connected() -> None:
    """A connection that this side closes first keeps its port for a minute (TIME_WAIT)."""
    (listener,) = listen("127.0.0.1:0", 16)
    address = listener.getsockname()
    with socket.create_connection(address) as client:
        listener.accept()[0].close()
        assert client.recv(1) == b""
    close_all([listener])

    close_all(listen(address, 16))


def test_an_address_that_cannot_be_bound_at_all_says_why() -> None:
    with pytest.raises(socket.gaierror, match=r"cannot listen on 'a\.\.b:80': "):
        listen("a..b:80", 1)
    with pytest.raises(OSError, match=r"cannot listen on unix:/x+: AF_UNIX path too long"):
        listen("unix:/" + "x" * 200, 16)
    with pytest.raises(ValueError, match=r"cannot listen on .*70000"):
        listen(("127.0.0.1", 70000), 16)


def test_a_stale_unix_socket_is_replaced_and_ours_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(UNIX) as stale:
        stale.bind(str(path))

    listeners = listen(f"unix:{path}", 16)
    with socket.socket(UNIX) as client:
        client.connect(str(path))
    close_all(listeners)

    assert not path.exists()


def test_a_live_unix_socket_is_not_stolen(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.create_server(str(path), family=UNIX):
        with pytest.raises(OSError, match="cannot listen on unix:") as caught:
            listen(f"unix:{path}", 16)

        assert caught.value.errno == errno.EADDRINUSE
        assert path.exists()


def test_a_path_that_another_program_has_bound_since_is_not_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    source = ListenSource(listen(f"unix:{path}", 16), handed=False)
    os.unlink(path)

    with socket.create_server(path, family=UNIX):
        source.close()

        assert os.path.exists(path)


def test_a_path_is_removed_before_another_program_may_bind_it(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")

    class Listener(socket.socket):
        def close(self) -> None:
            super().close()
            other.bind(path)

    with socket.socket(UNIX) as other:
        listener = Listener(UNIX)
        listener.bind(path)
        ListenSource([listener], handed=False).close()

        assert os.path.exists(path)


def test_a_relative_path_is_removed_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = ListenSource(listen("unix:socket", 16), handed=False)
    monkeypatch.chdir("/")

    source.close()

    assert not (tmp_path / "socket").exists()


def test_a_file_that_is_no_socket_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")

    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        listen(f"unix:{path}", 16)

    assert path.read_text() == "precious"
