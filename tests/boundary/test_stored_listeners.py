"""Listeners that a stop has left: what becomes of each, whatever it was before and is to be now."""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from socketprotector.launch import stored_listeners
from socketprotector.launch.activation import Passed
from socketprotector.launch.bind import Bound, bind_all
from socketprotector.launch.listen_spec import Listen, parse
from socketprotector.model.settings import ListenerSettings
from socketprotector.system import reuseport, socket_file
from socketprotector.system.sock_diag import file_of
from tests import needs

SOCKET, TCP, IP = socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP
SO_LOCK_FILTER = 44
#: All that may stand behind the question mark without rights, and is seen on the socket.
MUCH = "nodelay=1&keepalive=5:6:7&user_timeout=3s&rcvbuf=65536&sndbuf=40000&tos=16&defer_accept=3"
SEEN = [
    (SOCKET, socket.SO_KEEPALIVE),
    (SOCKET, socket.SO_RCVBUF),
    (SOCKET, socket.SO_SNDBUF),
    (SOCKET, socket.SO_REUSEADDR),
    (SOCKET, socket.SO_REUSEPORT),
    (SOCKET, 72),  # SO_BUF_LOCK
    (SOCKET, 62),  # SO_BINDTOIFINDEX
    (IP, socket.IP_TOS),
    (IP, 15),  # IP_FREEBIND
    (TCP, socket.TCP_NODELAY),
    (TCP, socket.TCP_KEEPIDLE),
    (TCP, socket.TCP_KEEPINTVL),
    (TCP, socket.TCP_KEEPCNT),
    (TCP, socket.TCP_FASTOPEN),
    (TCP, socket.TCP_USER_TIMEOUT),
    (TCP, socket.TCP_DEFER_ACCEPT),
]


class Machine:
    """Binds as a start does, and keeps what it has bound as systemd does."""

    def __init__(self) -> None:
        self.bound: list[Bound] = []
        self.kept: list[int] = []
        self.notices: list[str] = []

    def start(self, *texts: str) -> list[Bound]:
        """A first start."""
        self.bound = bind_all([parse(text, "/") for text in texts], 16, notice=lambda text: None)
        return self.bound

    def stop(self) -> list[Bound]:
        """What it leaves is passed to the next one."""
        found = []
        for index, each in enumerate(self.bound):
            self.kept.append(os.dup(each.socket.fileno()))
            passed = socket.socket(fileno=os.dup(each.socket.fileno()))
            settings = ListenerSettings(each.settings.address, name=f"sp.listener.{index}")
            found.append(Bound(passed, settings, inherited=True))
            each.socket.close()
        self.bound = []
        return found

    def restart(
        self,
        *texts: str,
        backlog: int = 16,
        change: Callable[[socket.socket], object] = bool,
        same_name: bool = False,
    ) -> list[Bound]:
        """A stop and the next start; change: what workers have done to the sockets."""
        for each in self.bound:
            change(each.socket)
        listens: list[Listen] = [parse(text, "/") for text in texts]
        taken = stored_listeners.take(
            *(listens, (), self.stop(), backlog, self.notices.append), same_name=same_name
        )
        self.bound = bind_all(listens, backlog, notice=self.notices.append, inherited=taken)
        return self.bound

    def close(self) -> None:
        for each in self.bound:
            each.socket.close()
        for fd in self.kept:
            os.close(fd)


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.close()


@pytest.fixture
def port() -> int:
    with socket.socket() as chooser:
        chooser.setsockopt(SOCKET, socket.SO_REUSEADDR, 1)
        chooser.bind(("127.0.0.1", 0))
        return int(chooser.getsockname()[1])


def inode(one: socket.socket) -> int:
    return os.fstat(one.fileno()).st_ino


def seen(one: socket.socket) -> list[int]:
    found = []
    for level, option in SEEN:
        try:
            found.append(one.getsockopt(level, option))
        except OSError:  # an older kernel
            found.append(-1)
    return found


def connect(address: tuple[str, int] | str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    try:
        client.connect(address)
    except OSError:
        client.close()
        raise
    return client


def accepts(one: socket.socket, address: tuple[str, int] | str) -> bool:
    """Whether a client that connects gets to it."""
    with connect(address) as client:
        client.sendall(b"x")  # some wait for that
        poll = select.poll()
        poll.register(one, select.POLLIN)
        if not poll.poll(10_000):
            return False
        one.accept()[0].close()
    return True


def test_the_same_socket_is_taken_with_all_clients_that_wait_there(
    machine: Machine, port: int
) -> None:
    [before] = machine.start(f"127.0.0.1:{port}")
    number = inode(before.socket)
    with connect(("127.0.0.1", port)) as waiting:
        [after] = machine.restart(f"web=127.0.0.1:{port}")
        assert inode(after.socket) == number
        after.socket.accept()[0].close()
        assert waiting.recv(1) == b""
    assert after.settings.name == "web"
    assert after.inherited
    assert machine.notices == []


def test_an_address_that_is_no_longer_wanted_is_free_at_once(
    machine: Machine, tmp_path: Path, port: int
) -> None:
    path = str(tmp_path / "socket")
    machine.start(f"127.0.0.1:{port}", f"unix:{path}", f"unix:@gone-{port}")
    machine.restart("127.0.0.1:0")

    for address in (("127.0.0.1", port), path, f"\0gone-{port}"):
        with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
            connect(address)
    assert socket_file.is_stale(path), "the next bind there removes it"
    with socket.socket() as another:  # though systemd has a copy for the moment
        another.setsockopt(SOCKET, socket.SO_REUSEADDR, 1)
        another.bind(("127.0.0.1", port))
        another.listen()


def test_a_file_that_another_has_put_there_is_not_removed(machine: Machine, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    machine.start(f"unix:{path}")
    os.unlink(path)
    with socket.socket(socket.AF_UNIX) as another:
        another.bind(path)
        another.listen()
        machine.restart("127.0.0.1:0")
        assert accepts(another, path)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
@pytest.mark.parametrize(("before", "after"), [(MUCH, ""), ("", MUCH), ("fastopen=5", "nodelay=1")])
def test_its_options_are_those_of_the_new_start(
    machine: Machine, host: str, before: str, after: str
) -> None:
    [first] = machine.start(f"{host}:0?{before}")
    number, port = inode(first.socket), first.socket.getsockname()[1]
    [second] = machine.restart(f"{host}:{port}?{after}")
    [fresh] = bind_all([parse(f"{host}:0?{after}", "/")], 16, notice=lambda text: None)
    with fresh.socket:
        assert seen(second.socket) == seen(fresh.socket)
    if machine.notices:  # a kernel before 5.14
        assert "rcvbuf" in machine.notices[0]
    else:
        assert inode(second.socket) == number


def test_the_backlog_is_the_new_one(machine: Machine, port: int) -> None:
    machine.start(f"127.0.0.1:{port}")
    [after] = machine.restart(f"127.0.0.1:{port}", backlog=77)
    assert reuseport.backlog(after.socket) == 77
    [after] = machine.restart(f"127.0.0.1:{port}?backlog=5", backlog=77)
    assert reuseport.backlog(after.socket) == 5


@pytest.mark.parametrize(
    # A user who is not root cannot undo it: where it is done by a device, that takes CAP_NET_RAW.
    "refuses",
    [False, pytest.param(True, marks=needs.ROOT)],
    ids=["it lets clients in", "it refuses new clients"],
)
def test_what_workers_have_done_to_it_is_undone(machine: Machine, port: int, refuses: bool) -> None:
    def change(one: socket.socket) -> None:
        if refuses:
            reuseport.refuse_new(one)
        one.setblocking(True)
        one.setsockopt(SOCKET, socket.SO_RCVTIMEO, bytes([0] * 8 + [1] + [0] * 7))
        one.setsockopt(SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 9, 0, 0, 0]))
        one.setsockopt(TCP, socket.TCP_DEFER_ACCEPT, 9)

    machine.start(f"127.0.0.1:{port}")
    [after] = machine.restart(f"127.0.0.1:{port}", change=change)
    assert after.inherited
    assert accepts(after.socket, ("127.0.0.1", port))
    assert not after.socket.getblocking()
    assert after.socket.getsockopt(SOCKET, socket.SO_LINGER, 8)[:4] == bytes(4)
    assert after.socket.getsockopt(SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)
    assert after.socket.getsockopt(TCP, socket.TCP_DEFER_ACCEPT) == 0


def test_one_that_had_a_second_one_has_another_and_is_the_one_clients_come_to(
    machine: Machine, port: int
) -> None:
    [before] = machine.start(f"127.0.0.1:{port}")
    second = reuseport.make(before.socket)
    assert second is not None
    reuseport.steer(before.socket, 1)
    with connect(("127.0.0.1", port)):  # to the second, which is the one that is left
        before.socket.shutdown(socket.SHUT_RDWR)
        before.socket.close()
        machine.bound = [Bound(second, before.settings)]
        [after] = machine.restart(f"127.0.0.1:{port}")
        assert inode(after.socket) == os.fstat(machine.kept[0]).st_ino
        after.socket.accept()[0].close()
    another = reuseport.make(after.socket)
    assert another is not None
    with another:
        for place, one in ((0, after.socket), (1, another), (0, after.socket)):
            reuseport.steer(after.socket, place)
            assert accepts(one, ("127.0.0.1", port))


def test_what_cannot_be_undone_is_bound_anew_and_reported(machine: Machine, port: int) -> None:
    def lock(one: socket.socket) -> None:
        reuseport.refuse_new(one)
        one.setsockopt(SOCKET, SO_LOCK_FILTER, 1)

    machine.start(f"127.0.0.1:{port}")
    [after] = machine.restart(f"127.0.0.1:{port}", change=lock)
    assert not after.inherited
    assert accepts(after.socket, ("127.0.0.1", port))
    assert f"127.0.0.1:{port}: bound again" in machine.notices[0]


def test_an_address_for_each_of_several_devices_is_bound_anew_and_reported(
    machine: Machine, port: int
) -> None:
    machine.start(f"127.0.0.1:{port}")
    listens = [parse(f"127.0.0.1:{port}?device={each}", "/") for each in ("lo", "other")]

    assert stored_listeners.take(listens, (), machine.stop(), 16, machine.notices.append) == {}

    [said] = machine.notices
    assert said.startswith(f"127.0.0.1:{port}?device=lo: bound again, ")


def test_both_families_in_one_socket_or_in_two_are_told_apart(machine: Machine, port: int) -> None:
    machine.start(f"{port}?v6only=0")
    two = machine.restart(str(port))
    assert len(two) == 2
    assert not any(each.inherited for each in two)
    assert "v6only" in machine.notices[0]
    assert accepts(two[0].socket, ("127.0.0.1", port))
    machine.notices.clear()
    one = machine.restart(f"{port}?v6only=0")
    assert [each.inherited for each in one] == [False]
    assert accepts(one[0].socket, ("127.0.0.1", port))


def test_a_path_keeps_its_file_and_has_the_rights_of_the_new_start(
    machine: Machine, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    [before] = machine.start(f"unix:{path}?mode=600")
    number, found = inode(before.socket), os.lstat(path)
    umask = os.umask(0o027)
    try:
        for options, mode in (("", 0o750), ("?mode=666", 0o666), ("?mode=600", 0o600)):
            with connect(path):
                [after] = machine.restart(f"unix:{path}{options}")
                after.socket.accept()[0].close()
            assert inode(after.socket) == number
            assert stat.S_IMODE(os.lstat(path).st_mode) == mode
    finally:
        os.umask(umask)
    assert os.lstat(path).st_ino == found.st_ino == after.settings.inode
    assert machine.notices == []
    after.discard()
    assert os.path.lexists(path), "it is still there for the next try"


@needs.ROOT
def test_a_path_belongs_to_the_user_of_the_new_start(machine: Machine, tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    machine.start(f"unix:{path}?user=7&group=8")
    for options, owner in (("?user=9", (9, os.getegid())), ("", (0, os.getegid()))):
        [after] = machine.restart(f"unix:{path}{options}")
        assert after.inherited
        found = os.lstat(path)
        assert (found.st_uid, found.st_gid) == owner


@pytest.mark.parametrize("instead", ["nothing", "a file", "another socket"])
def test_a_path_whose_file_is_gone_is_bound_anew(
    machine: Machine, tmp_path: Path, instead: str
) -> None:
    path = str(tmp_path / "socket")
    machine.start(f"unix:{path}")
    os.unlink(path)
    if instead == "another socket":
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
    [after] = machine.restart(f"unix:{path}")
    assert not after.inherited
    assert accepts(after.socket, path)
    assert len(machine.notices) == 1


def test_a_path_is_the_same_through_a_link(machine: Machine, tmp_path: Path) -> None:
    """As /var/run is a link to /run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "var-run").symlink_to("run")
    [before] = machine.start(f"unix:{tmp_path}/var-run/socket")
    with connect(f"{tmp_path}/run/socket"):
        for folder in ("run", "var-run"):
            [after] = machine.restart(f"unix:{tmp_path}/{folder}/socket")
            assert after.inherited
            assert after.settings.inode == before.settings.inode
            assert after.settings.address == f"unix:{tmp_path}/{folder}/socket"
        assert select.select([after.socket], [], [], 0)[0]
    assert machine.notices == []


def test_where_workers_accept_a_path_through_another_link_is_bound_anew(
    machine: Machine, tmp_path: Path
) -> None:
    """Later sockets are made by the listener's name, but the old link may then lead elsewhere."""
    (tmp_path / "r1").mkdir()
    (tmp_path / "current").symlink_to("r1")
    machine.start(f"unix:{tmp_path}/current/socket")

    [after] = machine.restart(f"unix:{tmp_path}/r1/socket", same_name=True)
    assert after.settings.address == f"unix:{tmp_path}/r1/socket"
    assert not after.inherited
    [again] = machine.restart(f"unix:{tmp_path}/r1/socket", same_name=True)
    assert again.inherited


def test_an_abstract_name_is_taken(machine: Machine, port: int) -> None:
    machine.start(f"unix:@left-{port}")
    [after] = machine.restart(f"unix:@left-{port}")
    assert after.inherited
    assert accepts(after.socket, f"\0left-{port}")


def test_one_that_systemd_passes_itself_stands_before_one_that_was_left(
    machine: Machine, port: int
) -> None:
    machine.start(f"127.0.0.1:{port}")
    listens = [parse("fd:web", "/")]
    assert stored_listeners.take(listens, {0}, machine.stop(), 16, machine.notices.append) == {}
    with pytest.raises(ConnectionRefusedError):
        connect(("127.0.0.1", port))


def test_no_file_is_known_of_what_has_none(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        assert file_of(one) == 0
        one.bind(str(tmp_path / "socket"))
        assert file_of(one) == os.lstat(tmp_path / "socket").st_ino & 0xFFFFFFFF


def test_the_fd_store_gets_new_names_after_the_old_ones_are_removed(
    machine: Machine, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        texts = [f"127.0.0.1:{port}", f"127.0.0.2:{port}", f"127.0.0.3:{port}"]
        machine.start(*texts)
        given = machine.stop()
        stored = [*(each.settings.name for each in given), "sp.state", "sp.worker.1.process"]
        listens = [parse(text, "/") for text in (texts[0], texts[2], texts[1])]
        taken = stored_listeners.take(listens, (), given, 16, machine.notices.append)
        machine.bound = bind_all(listens, 16, notice=machine.notices.append, inherited=taken)
        places = {f"sp.listener.{index}": each for index, each in enumerate(machine.bound)}
        stored_listeners.store(Passed([], given, stored), places)
        systemd.setblocking(False)
        said = []
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(systemd, 4096, 4)
            except BlockingIOError:
                break
            said.append(data.decode().split("\n")[:2])
            for fd in fds:
                os.close(fd)

    over = {"sp.listener.1", "sp.listener.2", "sp.state", "sp.worker.1.process"}
    assert {name for verb, name in said[:4]} == {f"FDNAME={each}" for each in over}
    assert {verb for verb, name in said[:4]} == {"FDSTOREREMOVE=1"}
    assert said[4:] == [
        ["FDSTORE=1", "FDNAME=sp.listener.1"],
        ["FDSTORE=1", "FDNAME=sp.listener.2"],
    ]
