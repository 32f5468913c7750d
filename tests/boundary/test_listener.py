"""How a listening socket ends: no new clients, but all that have connected."""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from socketprotector.launch.bind import bind_all
from socketprotector.launch.listen_spec import Listen
from socketprotector.model.settings import ListenerSettings
from socketprotector.system import accept_tags, bpf, reuseport, sock_diag, socket_copy, socket_file
from socketprotector.system.listener import Listener
from socketprotector.system.listeners import listener_of
from tests.running import shared_path
from tests.unanswered import Unanswered


def adopted(made: socket.socket, settings: ListenerSettings, *, shared: bool = False) -> Listener:
    made.listen(10)
    made.setblocking(False)
    return listener_of(made.detach(), 0, settings, shared=shared)


def on_tcp(family: socket.AddressFamily, host: str) -> tuple[Listener, tuple[str, int]]:
    made = socket.socket(family)
    made.bind((host, 0))
    port = made.getsockname()[1]
    return adopted(made, ListenerSettings(f"tcp:{host}:{port}")), (host, port)


def on_file(path: Path, *, shared: bool = False) -> Listener:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    found = path.stat()
    settings = ListenerSettings(f"unix:{path}", found.st_dev, found.st_ino)
    return adopted(made, settings, shared=shared)


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
)
def test_no_new_client_gets_in_but_one_that_has_connected_is_accepted(
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
        assert not listener.is_cut_off  # we have removed the file, for a stop
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


def test_an_abstract_name_cannot_refuse_new_ones_while_workers_accept_there() -> None:
    """So a stop must not wait until no more come."""
    made = socket.socket(socket.AF_UNIX)
    made.bind("")  # the kernel draws a name
    name = made.getsockname()
    listener = adopted(made, ListenerSettings(f"unix:@{name[1:].decode()}"), shared=True)
    with socket.socket(socket.AF_UNIX) as client:
        assert not listener.refuse_new()

        client.connect(name)
        listener.socket.accept()[0].close()
    listener.close()


def test_closing_removes_its_own_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    first = on_file(path)
    path.unlink()
    second = on_file(path)

    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


def test_closing_removes_the_file_of_a_shared_socket_though_the_kernel_cannot_tell_whose_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    path = tmp_path / "socket"
    listener = on_file(path, shared=True)
    monkeypatch.setattr(socket_file, "file_of", fail)

    listener.close()

    assert not path.exists()


def test_closing_refuses_clients_even_if_a_copy_is_open_elsewhere() -> None:
    listener, address = on_tcp(socket.AF_INET, "127.0.0.1")
    copy = os.dup(listener.fileno())

    listener.close()

    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(address)
    os.close(copy)


# -- one that was shut down -------------------------------------------------------------

HOW = [socket.SHUT_RD, socket.SHUT_RDWR]


def shared(listen: str, *, second: bool = True, both: bool = False) -> Listener:
    """As it is handed to workers.  both: IPv4 clients may come to an IPv6 address."""
    host, _, port = listen.rpartition(":")
    words = Listen(listen, int(port), host.strip("[]"), options={"v6only": "0"} if both else {})
    [bound] = bind_all([words], 40, notice=print)
    sibling = reuseport.make(bound.socket) if second else None
    fd = sibling.detach() if sibling is not None else -1
    made = listener_of(bound.socket.detach(), 0, bound.settings, shared=True, sibling=fd)
    made.note()
    return made


def came(listener: Listener, count: int = 8) -> list[int]:
    """How many of so many new clients come to each socket."""
    address = listener.socket.getsockname()[:2]
    clients = [socket.create_connection(address, timeout=5) for _ in range(count)]
    found = []
    for each in listener.sockets:
        each.setblocking(False)
        found.append(0)
        while True:
            try:
                each.accept()[0].close()
            except BlockingIOError:
                break
            found[-1] += 1
    for client in clients:
        client.close()
    return found


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
def test_one_that_was_shut_down_listens_again_at_its_port_with_its_backlog(
    listen: str, how: int
) -> None:
    """Also where any port was asked for: it is bound by its number."""
    listener = shared(listen, second=False)
    assert listener.is_alive()
    listener.socket.shutdown(how)

    assert not listener.is_alive()
    assert not listener.has_waiting()  # it hangs up, which is no client
    assert listener.listen_again(0)

    assert listener.is_alive()
    assert reuseport.backlog(listener.socket) == 40
    assert came(listener) == [8]
    listener.close()


def speaks(listener: Listener) -> bool:
    """Whether a client can be heard."""
    with socket.create_connection(listener.socket.getsockname()[:2]) as client:
        accepted, _ = listener.socket.accept()
        with accepted:
            try:
                client.sendall(b"x")
                return accepted.recv(1) == b"x"
            except OSError:
                return False


def test_one_that_was_shut_down_twice_accepts_connections_that_are_not() -> None:
    """The kernel would pass on to each that it is shut down."""
    listener = shared("127.0.0.1:0", second=False)
    for _ in range(2):
        try:
            listener.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # ENOTCONN, but it counts
    listener.socket.listen(40)
    assert not speaks(listener)
    assert not listener.is_sound(0)

    assert listener.listen_again(0)

    assert listener.is_sound(0)
    assert speaks(listener)
    listener.close()


def test_a_socket_has_another_identity_each_time_that_it_has_listened_again() -> None:
    """Otherwise a probe could miss that its connection went to the other socket meanwhile."""
    listener = shared("127.0.0.1:0")
    other, seen = listener.identity(1), [listener.identity(0)]
    for _ in range(3):
        listener.socket.shutdown(socket.SHUT_RDWR)
        assert listener.listen_again(0)
        seen.append(listener.identity(0))

    assert len(set(seen)) == 4
    assert listener.identity(1) == other
    listener.close()


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
def test_clients_come_to_the_side_that_is_meant_whichever_has_listened_last(listen: str) -> None:
    listener = shared(listen)
    for dead in (0, 0, 1, 1, 0, 1, 0):
        for socket_number in (0, 1):
            listener.steer(socket_number)
            assert came(listener) == ([0, 8] if socket_number else [8, 0])
        listener.socket_for(dead).shutdown(socket.SHUT_RDWR)
        assert listener.listen_again(dead)
        listener.steer(1 - dead)
    # A worker does both, and the kernel does not report it.
    listener.socket.shutdown(socket.SHUT_RDWR)
    listener.socket.listen(40)
    listener.steer(0)
    assert came(listener) == [8, 0]
    listener.close()


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
@pytest.mark.parametrize("socket_number", [0, 1])
def test_one_that_has_left_the_group_by_an_option_comes_back_at_a_switch(
    listen: str, socket_number: int
) -> None:
    listener = shared(listen)
    listener.socket_for(socket_number).setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)

    for wanted in (1 - socket_number, socket_number):
        listener.steer(wanted)
        assert came(listener) == ([0, 8] if wanted else [8, 0])
    listener.close()


def test_no_client_gets_to_one_that_listens_again_while_the_other_is_steered_to() -> None:
    listener = shared("127.0.0.1:0")
    listener.steer(1)
    listener.socket.shutdown(socket.SHUT_RDWR)
    assert listener.listen_again(0)  # and nothing was steered yet

    assert came(listener) == [0, 8]
    listener.close()


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "[::1]:0"])
@pytest.mark.parametrize("asked", [0, 1])
@pytest.mark.parametrize("dead", [0, 1])
def test_while_one_is_asked_what_is_for_one_that_is_shut_down_comes_to_no_other(
    listen: str, asked: int, dead: int
) -> None:
    """Neither a client to the one that is asked, nor the question to the one that serves."""
    listener = shared(listen)
    mark = bpf.Mark.draw(listener.local_address[0])
    address, marked = listener.socket.getsockname(), {mark: asked}
    serving = 1 - asked
    for _ in range(2):  # in whatever order they stand then
        listener.steer(serving, marked)
        listener.socket_for(dead).shutdown(socket.SHUT_RDWR)
        with Unanswered(address, mark.put if dead == asked else lambda one: None):
            assert not listener.has_waiting()
            listener.steer(serving, marked)  # before that is seen
        with Unanswered(address, mark.put if dead == asked else lambda one: None):
            assert not listener.has_waiting()
        assert listener.listen_again(dead)
        for number, put in ((asked, mark.put), (serving, lambda one: None)) * 2:
            with Unanswered(address, put):
                assert [listener.has_waiting(n) for n in (number, 1 - number)] == [True, False]
                listener.socket_for(number).accept()[0].close()
            if number == serving:
                listener.steer(serving, marked)
    listener.steer(serving)
    assert len(sock_diag.listening(listener.socket.family, listener.port)) == 2
    listener.close()


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_kernel_finds_no_third_socket_while_it_leaves(
    host: str, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over IPv4 it would find this socket first, and a client would wait for a second."""
    listener = shared(f"{host}:0")
    marked = {} if held else {bpf.Mark.draw(listener.local_address[0]): 1}
    left: list[int] = []

    def leaves(sock: socket.socket) -> None:
        left.append(socket_copy.device_of(sock))
        sock.shutdown(socket.SHUT_RDWR)

    monkeypatch.setattr("socketprotector.system.tcp_listener.shut_down", leaves)
    for number in range(3):
        listener.steer(0, marked, held=held)
        assert len(sock_diag.listening(listener.socket.family, listener.port)) == 3
        listener.steer(0)
        again = f".{number + 1}"
        assert [*listener.descriptors()] == ["sp.listener.0", "sp.twin.0", f"sp.reserved.0{again}"]

    assert left == [socket_copy.NO_DEVICE] * 3
    assert came(listener) == [8, 0]
    monkeypatch.undo()
    listener.close()


def test_over_ipv6_the_third_socket_leaves_and_joins_again() -> None:
    """There the kernel finds the oldest socket first."""
    listener = shared("[::1]:0")
    for _ in range(2):
        listener.steer(0, held=True)
        listener.steer(0)

    assert "sp.reserved.0" in listener.descriptors()
    assert came(listener) == [8, 0]
    listener.close()


@pytest.mark.parametrize("failing", ["bind_beside", "leave_devices"])
def test_without_a_fresh_third_socket_the_same_one_joins_again(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> socket.socket:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    listener = shared("127.0.0.1:0")
    listener.reserve()
    monkeypatch.setattr(socket_copy, failing, fails)
    for _ in range(2):
        listener.steer(0, held=True)
        with Unanswered(listener.socket.getsockname()) as client:
            client.tries_again()
            listener.steer(0)
            client.connects()
        listener.socket.accept()[0].close()

    assert "sp.reserved.0" in listener.descriptors()
    assert not listener.has_no_spare
    monkeypatch.undo()
    listener.close()


@pytest.mark.parametrize("is_member", [True, False])
def test_a_retired_third_socket_that_the_store_still_has_is_replaced(is_member: bool) -> None:
    """The program was killed while the socket left, or before it could store the next one."""
    listener = shared("127.0.0.1:0")
    listener.steer(0, held=True)
    fds = [os.dup(fd) for fd in listener.descriptors().values()]
    socket_copy.leave_devices(listener.reserve())
    if not is_member:
        listener.reserve().shutdown(socket.SHUT_RDWR)
    after = listener_of(fds[0], 0, listener.settings, shared=True, sibling=fds[1], reserved=fds[2])

    after.steer(0)
    after.bind_anew(1)
    assert not after.has_no_spare
    assert "sp.reserved.0.1" in after.descriptors(), "a broken socket could need it"

    for held in (True, False):
        after.steer(0, held=held)
        with Unanswered(after.socket.getsockname()) as client:
            if held:
                client.tries_again()
            else:
                client.connects()
                after.socket.accept()[0].close()
    assert came(after) == [8, 0]
    for each in (after, listener):
        each.close()


def test_one_of_an_ipv4_address_in_the_form_of_ipv6_is_asked_over_ipv4() -> None:
    """From ::1 there is no way to it."""
    listener = shared("[::ffff:127.0.0.1]:0", both=True)
    mark = bpf.Mark.draw(listener.local_address[0])

    for number in (0, 1):
        listener.steer(1 - number, {mark: number})
        with Unanswered(listener.local_address, mark.put):
            assert [listener.has_waiting(n) for n in (number, 1 - number)] == [True, False]
            listener.socket_for(number).accept()[0].close()
    listener.close()


def test_where_the_kernel_does_not_report_who_listens_our_own_calls_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> dict[int, int]:
        raise OSError(errno.ENOENT, "no sock_diag")

    monkeypatch.setattr("socketprotector.system.sock_diag.listening", fails)
    listener = shared("127.0.0.1:0")
    for dead in (0, 1, 1, 0):
        listener.socket_for(dead).shutdown(socket.SHUT_RDWR)
        assert listener.listen_again(dead)
        for socket_number in (0, 1):
            listener.steer(socket_number)
            assert came(listener) == ([0, 8] if socket_number else [8, 0])
    listener.close()


def test_where_the_kernel_cannot_tell_for_the_moment_no_client_is_steered_by_a_guess(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> dict[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    earlier = shared("127.0.0.1:0")
    earlier.socket.shutdown(socket.SHUT_RDWR)
    assert earlier.listen_again(0)
    earlier.steer(0)
    fds = [os.dup(each.fileno()) for each in earlier.sockets]
    listener = listener_of(fds[0], 3, earlier.settings, shared=True, sibling=fds[1])
    monkeypatch.setattr("socketprotector.system.sock_diag.listening", fails)

    with pytest.raises(OSError, match="Too many"):
        listener.steer(0)

    assert came(listener) == [8, 0]
    listener.close()
    earlier.close()


def test_one_that_comes_back_on_another_port_is_bound_anew_to_its_own() -> None:
    """As an older version has bound it, or the process that passes it in."""
    made = socket.socket()
    made.bind(("127.0.0.1", 0))
    made.listen(40)
    port = made.getsockname()[1]
    settings = ListenerSettings(f"tcp:127.0.0.1:{port}")
    listener = listener_of(made.detach(), 3, settings, shared=True)
    listener.socket.shutdown(socket.SHUT_RDWR)

    assert not listener.listen_again(0)
    listener.bind_anew(0)

    assert listener.socket.getsockname() == ("127.0.0.1", port)
    assert list(listener.descriptors()) == ["sp.listener.3.1"]
    assert came(listener) == [8]
    listener.close()


def test_one_of_two_is_bound_anew_to_its_port_where_the_other_is_on_another_one() -> None:
    first = socket.socket()
    first.bind(("127.0.0.1", 0))
    first.listen(40)
    port = first.getsockname()[1]
    second = reuseport.make(first)
    assert second is not None
    settings = ListenerSettings(f"tcp:127.0.0.1:{port}")
    listener = listener_of(first.detach(), 3, settings, shared=True, sibling=second.detach())
    listener.socket.shutdown(socket.SHUT_RDWR)
    listener.socket.listen(40)

    listener.bind_anew(1)
    assert [listener.is_alive(0), listener.is_alive(1)] == [False, True]
    listener.bind_anew(0)

    assert [each.getsockname()[1] for each in listener.sockets] == [port, port]
    for wanted in (0, 1):
        listener.steer(wanted)
        assert came(listener) == ([0, 8] if wanted else [8, 0])
    listener.close()


@pytest.mark.parametrize("socket_number", [0, 1])
def test_one_of_two_is_bound_anew_beside_the_other(socket_number: int) -> None:
    listener = shared("127.0.0.1:0")
    listener.steer(1 - socket_number)
    before = set(listener.descriptors())

    listener.bind_anew(socket_number)

    assert len(before - set(listener.descriptors())) == 1
    for wanted in (0, 1):
        listener.steer(wanted)
        assert came(listener) == ([0, 8] if wanted else [8, 0])
    listener.close()


@pytest.mark.parametrize("spare", [True, False])
@pytest.mark.parametrize("socket_number", [0, 1])
def test_one_that_is_shut_down_listens_again_after_the_other_was_bound_anew(
    socket_number: int, spare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> socket.socket:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    listener = shared("127.0.0.1:0")
    if spare:
        listener.reserve()
        monkeypatch.setattr(socket_copy, "bind_beside", fails)
    listener.socket_for(1 - socket_number).shutdown(socket.SHUT_RDWR)

    listener.bind_anew(socket_number)

    assert reuseport.backlog(listener.socket_for(socket_number)) == 40
    assert listener.listen_again(1 - socket_number)
    for wanted in (0, 1):
        listener.steer(wanted)
        assert came(listener) == ([0, 8] if wanted else [8, 0])
    listener.close()


@pytest.mark.parametrize("socket_number", [0, 1])
def test_where_its_address_cannot_be_bound_the_spare_takes_its_place(
    socket_number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> socket.socket:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    listener = shared("127.0.0.1:0")
    spare = listener.reserve()
    kept = accept_tags.tag_of(listener.socket_for(socket_number))
    monkeypatch.setattr(socket_copy, "bind_beside", fails)
    listener.steer(1 - socket_number)

    listener.bind_anew(socket_number)

    assert listener.socket_for(socket_number) is spare
    assert accept_tags.tag_of(spare) == kept
    assert listener.has_no_spare
    assert came(listener) == ([0, 8] if socket_number == 0 else [8, 0]), "it gets none yet"
    for wanted in (0, 1):
        listener.steer(wanted)
        assert came(listener) == ([0, 8] if wanted else [8, 0])
    monkeypatch.undo()
    fd = listener.reserve().fileno()
    assert listener.descriptors()["sp.reserved.0.1"] == fd, "a name is for one descriptor for ever"
    listener.close()


@pytest.mark.parametrize("socket_number", [0, 1])
def test_where_one_of_two_cannot_be_bound_anew_the_other_serves_both(socket_number: int) -> None:
    listener = shared("127.0.0.1:0")
    other = listener.socket_for(1 - socket_number).fileno()

    listener.drop_socket(socket_number)

    assert [each.fileno() for each in listener.sockets] == [other]
    assert [name.startswith("sp.listener.0") for name in listener.descriptors()] == [True]
    assert came(listener) == [8]
    listener.close()


@pytest.mark.parametrize("how", HOW)
def test_a_unix_socket_is_bound_anew_with_the_rights_that_it_had(tmp_path: Path, how: int) -> None:
    path = tmp_path / "socket"
    listener = on_file(path)
    path.chmod(0o640)
    listener.socket.shutdown(how)

    assert not listener.is_alive()
    assert not listener.has_waiting()
    assert not listener.listen_again(0)
    listener.bind_anew(0)

    assert listener.is_alive()
    assert path.stat().st_mode & 0o777 == 0o640
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert listener.has_waiting()
    listener.close()
    assert not path.exists()


def test_a_client_finds_a_file_at_every_moment_in_which_one_is_bound_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    listener = on_file(path)
    listener.socket.shutdown(socket.SHUT_RDWR)
    seen = []

    def trace(*_: object) -> Any:
        with socket.socket(socket.AF_UNIX) as client:
            seen.append(client.connect_ex(str(path)))
        return trace

    sys.settrace(trace)
    try:
        listener.bind_anew(0)
    finally:
        sys.settrace(None)

    assert set(seen) == {errno.ECONNREFUSED, 0}, "the old one, then the new one"
    assert [each.name for each in tmp_path.iterdir()] == ["socket"]
    assert listener.settings.inode == path.stat().st_ino
    listener.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["rename", "geteuid"])
def test_one_that_cannot_be_bound_anew_leaves_the_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fails(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    path = tmp_path / "socket"
    listener = on_file(path)
    listener.socket.shutdown(socket.SHUT_RDWR)
    monkeypatch.setattr(os, call, fails)
    with pytest.raises(OSError, match="Read-only"):
        listener.bind_anew(0)
    monkeypatch.undo()

    assert [each.name for each in tmp_path.iterdir()] == ["socket"]
    listener.close()


def test_a_path_without_room_for_another_name_is_bound_anew(tmp_path: Path) -> None:
    folder = tmp_path / ("f" * (104 - len(str(tmp_path))))
    folder.mkdir()
    path = folder / "s"
    listener = on_file(path)
    listener.socket.shutdown(socket.SHUT_RDWR)

    listener.bind_anew(0)

    assert listener.is_alive()
    listener.close()
    assert list(folder.iterdir()) == []


def test_a_file_that_is_another_s_by_now_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = on_file(path)
    path.unlink()
    other = on_file(path)
    listener.socket.shutdown(socket.SHUT_RDWR)

    with pytest.raises(OSError, match="another file"):
        listener.bind_anew(0)

    assert other.is_alive()
    listener.close()
    other.close()


def test_what_was_passed_in_is_never_bound_anew() -> None:
    made = socket.create_server(("127.0.0.1", 0))
    port = made.getsockname()[1]
    listener = listener_of(
        made.detach(), 0, ListenerSettings(f"tcp:127.0.0.1:{port}", foreign=True), shared=True
    )
    with pytest.raises(OSError, match="passed in"):
        listener.bind_anew(0)
    listener.close()


def test_a_socket_of_workers_keeps_its_flags_and_one_of_ours_never_waits() -> None:
    for is_shared in (True, False):
        for blocks in (True, False):
            made = socket.create_server(("127.0.0.1", 0))
            made.setblocking(blocks)
            settings = ListenerSettings(f"tcp:127.0.0.1:{made.getsockname()[1]}")
            listener = listener_of(made.detach(), 0, settings, shared=is_shared)
            assert listener.blocks == (is_shared and blocks)
            listener.close()


def test_a_link_to_our_file_is_as_good_for_clients(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = on_file(path)
    path.rename(tmp_path / "elsewhere")
    assert listener.is_cut_off
    path.symlink_to("elsewhere")
    assert not listener.is_cut_off
    (tmp_path / "elsewhere").unlink()
    assert listener.is_cut_off
    listener.close()


@pytest.mark.parametrize("has_room", [True, False])
def test_a_folder_that_is_closed_to_us_is_open_to_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    """The only socket of a path stays as it is, also where files beside it had room."""
    path = tmp_path / "s" if has_room else shared_path(tmp_path)
    listener = on_file(path, shared=True)
    assert bool(listener.path) == has_room
    real = os.lstat

    def closed(name: str, **how: Any) -> os.stat_result:
        if os.path.dirname(name) == os.fspath(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return real(name, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", closed)
        assert not listener.is_cut_off
        assert not listener.is_out_of_reach(0)
        assert not listener.is_passed_by(0)
        listener.steer(0)
        listener.remove_files()
    assert path.exists()
    assert not listener.is_cut_off
    path.unlink()
    assert listener.is_cut_off
    listener.close()
