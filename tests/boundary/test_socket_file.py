"""The files of a UNIX path that leads to one of several sockets, on the real kernel."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from socketprotector.launch.bind_unix import bind_unix, give_away
from socketprotector.launch.listen_spec import Listen
from socketprotector.system import sock_diag, socket_file
from tests import needs
from tests.rounds import rounds

RIGHTS = socket_file.Rights(-1, -1, 0o640)


class Sockets:
    """Those of one path, which leads to the first of them."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.made: list[socket.socket] = []
        self.add()
        self.lead_to(0)

    def add(self, rights: socket_file.Rights = RIGHTS) -> socket.socket:
        self.made.append(socket_file.bind(self.path, 16, rights, give_away))
        return self.made[-1]

    def lead_to(self, number: int) -> None:
        socket_file.lead_to(self.path, self.made[number], self.made)

    def reached(self, path: str = "") -> int:
        """Return which of them a client comes to."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path or self.path)
            for number, each in enumerate(self.made):
                each.setblocking(False)
                try:
                    each.accept()[0].close()
                except BlockingIOError:
                    continue
                return number
        raise AssertionError("no socket has that client")

    def close(self) -> None:
        socket_file.remove(self.path, self.made)
        self.let_go()

    def let_go(self) -> None:
        """Close them, as a kill does."""
        while self.made:
            self.made.pop().close()


@pytest.fixture
def sockets(tmp_path: Path) -> Iterator[Sockets]:
    made = Sockets(tmp_path / "web.sock")
    yield made
    made.close()


def files(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_a_path_leads_to_one_of_its_sockets_and_each_has_a_file(sockets: Sockets) -> None:
    sockets.add()
    for number in (1, 0, 1, 1, 0):
        sockets.lead_to(number)
        assert sockets.reached() == number
        for each, one in enumerate(sockets.made):
            assert socket_file.leads_to(sockets.path, one) == (each == number)
            assert sockets.reached(socket_file.own_file(sockets.path, one)) == each


def test_nothing_is_left(sockets: Sockets, tmp_path: Path) -> None:
    sockets.add()
    sockets.lead_to(1)

    sockets.close()

    assert files(tmp_path) == []


def test_every_client_comes_to_one_of_them_while_the_path_changes(sockets: Sockets) -> None:
    sockets.add()
    failed: list[OSError] = []
    over, served = threading.Event(), threading.Event()

    def connect() -> None:
        while not over.is_set():
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(sockets.path)
                    assert client.recv(1) == b"+"
                except OSError as error:
                    failed.append(error)

    def accept(one: socket.socket) -> None:
        while True:
            client, _ = one.accept()
            with client:
                if served.is_set():
                    return
                client.send(b"+")

    threads = [threading.Thread(target=accept, args=(one,)) for one in sockets.made]
    clients = [threading.Thread(target=connect) for _ in range(3)]
    for each in (*threads, *clients):
        each.start()
    for number in range(rounds(1000, 4000)):
        sockets.lead_to(number % 2)
    over.set()
    for each in clients:
        each.join()
    served.set()
    for one in sockets.made:
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(socket_file.own_file(sockets.path, one))
    for each in threads:
        each.join()

    assert failed == []


def test_a_server_that_removes_its_socket_s_file_removes_nothing(sockets: Sockets) -> None:
    """Python 3.13's asyncio does, by what getsockname() shows."""
    sockets.add()
    for each in sockets.made:
        with pytest.raises(FileNotFoundError):
            os.unlink(each.getsockname())
        assert socket_file.path_of(each.getsockname()) == sockets.path


#: What the interpreter reports before it happens, of all that changes files or addresses.
CALLS = {"socket.bind", "os.rename", "os.link", "os.remove", "os.chown", "os.chmod", "os.setxattr"}


def killed_at(call: int, act: Callable[[], object]) -> bool:
    """Do something in another process, killed before one of its calls; return whether it was."""
    child = os.fork()
    if child == 0:
        left = call

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in CALLS:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(count)
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def start(path: str) -> socket.socket:
    made, _ = bind_unix(Listen(f"unix:{path}", path=path), path, 16, beside=True)
    return made


def test_without_owner_and_group_in_its_argument_a_socket_has_ours(tmp_path: Path) -> None:
    with start(str(tmp_path / "s")):
        found = (tmp_path / "s").stat()

    assert (found.st_uid, found.st_gid) == (os.geteuid(), os.getegid())


def bind_and_lead(sockets: Sockets) -> None:
    sockets.add()
    sockets.lead_to(-1)


SWITCHES: dict[str, Callable[[Sockets], object]] = {
    "bind": lambda sockets: sockets.add(),
    "bind and lead": bind_and_lead,
    "lead": lambda sockets: sockets.lead_to(1),
}
ENDS: dict[str, Callable[[Sockets], object]] = {
    "forget": lambda sockets: socket_file.forget(sockets.path, sockets.made[1]),
    "remove": lambda sockets: socket_file.remove(sockets.path, sockets.made),
    "start": lambda sockets: start(sockets.path),
}


@pytest.mark.parametrize("act", SWITCHES)
def test_a_kill_before_any_call_leaves_what_the_next_program_understands(
    tmp_path: Path, act: str
) -> None:
    """The next program has the sockets, as from a guard; but none that was made just now."""
    call, killed = 0, True
    while killed:
        call += 1
        sockets = Sockets(tmp_path / "web.sock")
        sockets.add()
        killed = killed_at(call, partial(SWITCHES[act], sockets))
        with suppress(ConnectionRefusedError):  # of one that only the killed program had
            assert sockets.reached() in (0, 1)
        sockets.add()
        for number in (2, 1, 0):
            sockets.lead_to(number)
            assert sockets.reached() == number
        sockets.let_go()
        start(sockets.path).close()
    assert call > 2


@pytest.mark.parametrize("act", [*SWITCHES, *ENDS])
def test_a_kill_before_any_call_leaves_what_the_next_start_removes(
    tmp_path: Path, act: str
) -> None:
    path, call, killed = tmp_path / "web.sock", 0, True
    while killed:
        call += 1
        sockets = Sockets(path)
        sockets.add()
        if act == "start":
            sockets.let_go()
        killed = killed_at(call, partial((SWITCHES | ENDS)[act], sockets))
        sockets.let_go()

        with start(sockets.path) as made:
            own = os.path.basename(socket_file.own_file(sockets.path, made))
            assert files(tmp_path) == sorted([own, path.name])
            assert socket_file.leads_to(sockets.path, made)
            socket_file.remove(sockets.path, [made])
        assert files(tmp_path) == []
    assert call > 1


def test_what_a_killed_program_was_about_to_rename_is_removed_at_the_end(
    sockets: Sockets, tmp_path: Path
) -> None:
    own = socket_file.own_file(sockets.path, sockets.made[0])
    os.link(own, tmp_path / ".web.sock.sp-new", follow_symlinks=False)

    sockets.close()

    assert files(tmp_path) == []


def test_a_path_that_leads_to_a_socket_of_a_killed_program_is_led_on(sockets: Sockets) -> None:
    """It was killed before any process kept that socket for the next one."""
    killed = socket_file.bind(sockets.path, 16, RIGHTS, give_away)
    left = socket_file.own_file(sockets.path, killed)
    socket_file.lead_to(sockets.path, killed, [*sockets.made, killed])

    with pytest.raises(OSError, match="in use"):  # as long as it lives
        sockets.lead_to(0)
    killed.close()
    sockets.lead_to(0)

    assert sockets.reached() == 0
    assert not os.path.exists(left)


def test_no_file_of_another_user_keeps_a_path_from_leading_elsewhere(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root can remove any file; in a folder as /tmp is, others cannot."""
    theirs = f"{os.path.dirname(sockets.path)}/.web.sock.sp-new"
    Path(theirs).touch()
    unlink = os.unlink

    def refuse(path: str) -> None:
        if path == theirs:
            raise PermissionError(errno.EPERM, "not its owner")
        unlink(path)

    monkeypatch.setattr(os, "unlink", refuse)
    sockets.add()
    sockets.lead_to(1)
    assert sockets.reached() == 1
    monkeypatch.undo()
    os.unlink(theirs)


def test_a_path_that_was_removed_is_made_again(sockets: Sockets) -> None:
    sockets.add()
    os.unlink(sockets.path)

    sockets.lead_to(1)

    assert sockets.reached() == 1


def test_a_path_that_leads_to_another_program_s_socket_is_left_alone(sockets: Sockets) -> None:
    os.unlink(sockets.path)
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(sockets.path)
        with pytest.raises(OSError, match="another program") as raised:
            sockets.lead_to(0)
        sockets.close()
        assert os.path.exists(sockets.path)
    os.unlink(sockets.path)
    assert raised.value.errno == errno.EEXIST


def test_a_socket_that_was_bound_as_the_path_keeps_a_file(tmp_path: Path) -> None:
    """A program before this one had one socket for all generations."""
    path = tmp_path / "s"
    first = socket.socket(socket.AF_UNIX)
    first.bind(str(path))
    first.listen()
    found = Sockets.__new__(Sockets)
    found.path, found.made = str(path), [first]
    socket_file.keep_file(found.path, first)
    found.add()
    for number in (1, 0, 1, 0):
        found.lead_to(number)
        assert found.reached() == number
    found.close()
    assert files(tmp_path) == []


def test_one_whose_file_was_removed_is_found_by_the_kernel(sockets: Sockets) -> None:
    sockets.add()
    os.unlink(socket_file.own_file(sockets.path, sockets.made[0]))
    assert socket_file.leads_to(sockets.path, sockets.made[0])

    sockets.lead_to(1)
    sockets.lead_to(0)

    assert sockets.reached() == 0


def test_where_the_kernel_does_not_tell_the_file_of_a_socket_its_name_is_believed(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    known = socket_file.identity_of(sockets.path, sockets.made[0])
    monkeypatch.setattr(socket_file, "file_of", fail)

    assert socket_file.identity_of(sockets.path, sockets.made[0]) == known


def test_a_socket_has_the_rights_of_the_path(sockets: Sockets) -> None:
    os.chmod(sockets.path, 0o600)
    one = sockets.add(socket_file.rights_of(sockets.path))

    found = os.lstat(socket_file.own_file(sockets.path, one))

    assert stat.S_IMODE(found.st_mode) == 0o600


@needs.ANOTHER_USER
def test_and_its_owner(sockets: Sockets) -> None:
    os.chown(sockets.path, 65534, 65534)
    sockets.add(socket_file.rights_of(sockets.path))
    sockets.lead_to(1)

    found = os.lstat(sockets.path)

    assert (found.st_uid, found.st_gid) == (65534, 65534)


def test_accepted_connections_are_counted_for_the_socket_that_has_them(sockets: Sockets) -> None:
    sockets.add()
    kept = []
    for number, clients in ((0, 2), (1, 3)):
        sockets.lead_to(number)
        for _ in range(clients):
            client = socket.socket(socket.AF_UNIX)
            client.connect(sockets.path)
            kept += [client, sockets.made[number].accept()[0]]
    keys = [sock_diag.file_key(one) for one in sockets.made]

    found = Counter(key for key, _, _ in sock_diag.accepted_unix() if key in keys)
    assert found == dict(zip(keys, (2, 3), strict=True))
    for each in kept:
        each.close()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("/run/.web.sock.sp-0a1b2c", "/run/web.sock"),
        ("/run/web.sock", "/run/web.sock"),
        ("/run/.web.sock.sp-xyz", "/run/.web.sock.sp-xyz"),
        ("/.s.sp-000000", "/s"),
        ("/a\nfolder/.web\nsock.sp-0a1b2c", "/a\nfolder/web\nsock"),
    ],
)
def test_what_a_socket_is_bound_as_names_its_path(name: str, path: str) -> None:
    assert socket_file.path_of(name) == path


def test_a_path_without_room_for_another_name_has_one_socket(tmp_path: Path) -> None:
    longest = 107 - len(".web.sp-000000~") + len("web")
    assert socket_file.has_room("/" + "x" * (longest - 5) + "/web")
    assert not socket_file.has_room("/" + "x" * (longest - 4) + "/web")
