"""Which users the protector trusts where a number may stand for many: real namespaces."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from socketprotector.system.peer_credentials import (
    may_be_signalled,
    unmistakable_groups,
    unmistakable_users,
)
from tests import needs
from tests.namespaces import (
    MAP,
    STRANGER,
    any_users_python,
    in_user_namespace,
    needs_root,
    of_user,
    read_line,
    tell,
)

OVERFLOW = int(Path("/proc/sys/kernel/overflowuid").read_text())
#: Says which of these numbers stand for one user each.
ASKS = (
    "from socketprotector.system.peer_credentials import unmistakable_users as users\n"
    "from socketprotector.system.peer_credentials import unmistakable_groups as groups\n"
    f"print(sorted(users([0, 1, {OVERFLOW}])), sorted(groups([0, 1, {OVERFLOW}])))\n"
)
#: Hears what comes to a notify socket to which root and another may speak.
HEARS = """
import sys
from socketprotector.system.sd_notify import NotifySocket
one = NotifySocket.make(sys.argv[1], frozenset({0, int(sys.argv[2])}))
print(one.address, flush=True)
for line in sys.stdin:
    found = one.peek(int(line))
    if found is not None:
        one.remove()
    print(found, flush=True)
"""
#: Accepts one client after the other as this user, and says which it lets in.
CONTROLS = """
import os, socket, sys
from socketprotector.daemon.control.server import ControlServer
class Loop:
    def watch(self, *_): pass
class Listener:
    socket = socket.socket(socket.AF_UNIX)
    def fileno(self): return self.socket.fileno()
listener = Listener()
listener.socket.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o666)
listener.socket.listen()
os.setuid(int(sys.argv[2]))
group = int(sys.argv[3]) if sys.argv[3] else None
control = ControlServer(
    listener, Loop(), None, None, uids=frozenset({0, os.getuid(), int(sys.argv[2])}), group=group
)
print("listens", flush=True)
for line in sys.stdin:
    print(bool(control._commands_for(listener.socket.accept()[0])), flush=True)
"""
SPEAKS = """
import socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
    one.sendto(b"READY=1", sys.argv[1].replace("@", "\\0", 1))
"""
CONNECTS = """
import socket, sys
one = socket.socket(socket.AF_UNIX)
one.connect(sys.argv[1])
print("connected", flush=True)
one.recv(1)
"""


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (any_users_python()[0], "-c", code, *arguments)


def speak(uid: int, address: str) -> None:
    with of_user(uid, SPEAKS, address) as process:
        assert process.wait() == 0


@pytest.fixture
def address() -> str:
    return "@socketprotector-test-" + os.urandom(8).hex()


@pytest.fixture
def open_folder(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which any user may make a socket."""
    return Path(os.environ["XDG_RUNTIME_DIR"])


def test_outside_of_namespaces_each_number_stands_for_one_user() -> None:
    if Path("/proc/self/uid_map").read_text().split()[2] != str(2**32 - 1):
        needs.skip("a user namespace that is the machine's")
    assert unmistakable_users([0, 1, OVERFLOW]) == {0, 1, OVERFLOW}
    assert unmistakable_groups([0, 1, OVERFLOW]) == {0, 1, OVERFLOW}


@needs_root
@pytest.mark.parametrize(
    "users", ["", "0 100000 1", MAP], ids=["none", "without nobody", "with nobody"]
)
def test_where_some_users_are_unmapped_the_overflow_user_is_not_trusted(users: str) -> None:
    with in_user_namespace(*python(ASKS), users=users) as process:
        assert read_line(process) == "[0, 1] [0, 1]"


@needs_root
def test_a_namespace_that_has_all_users_knows_them_apart() -> None:
    with in_user_namespace(*python(ASKS), users=f"0 0 {2**32 - 1}") as process:
        assert read_line(process) == f"[0, 1, {OVERFLOW}] [0, 1, {OVERFLOW}]"


@needs_root
def test_a_stranger_is_not_taken_for_nobody_on_an_abstract_name(address: str) -> None:
    with in_user_namespace(*python(HEARS, address, str(OVERFLOW))) as process:
        assert read_line(process) == address
        speak(STRANGER, address)
        tell(process, "1")
        assert read_line(process) == "{}"

        speak(100_000, address)  # root in there
        tell(process, "1")
        assert read_line(process) == "{'READY': '1'}"


@needs_root
def test_the_user_nobody_is_heard_on_a_path_that_only_it_was_given(open_folder: Path) -> None:
    path = str(open_folder / os.urandom(12).hex())
    with in_user_namespace(*python(HEARS, path, str(OVERFLOW))) as process:
        assert read_line(process) == path
        speak(100_000 + OVERFLOW, path)
        tell(process, "1")
        assert read_line(process) == "{'READY': '1'}"


@pytest.fixture
def let_in(open_folder: Path) -> Iterator[Callable[[int], str]]:
    """Whether the control socket of `nobody`'s protector in there lets a user of the host in."""
    path = str(open_folder / "c")
    with in_user_namespace(*python(CONTROLS, path, str(OVERFLOW), "")) as process:
        assert read_line(process) == "listens"

        def ask(uid: int) -> str:
            with connected(uid, path):
                tell(process, "")
                return read_line(process)

        yield ask


@contextmanager
def connected(uid: int, path: str) -> Iterator[None]:
    with of_user(uid, CONNECTS, path) as process:
        assert read_line(process) == "connected"
        yield


@needs_root
@pytest.mark.parametrize(
    ("uid", "said"),
    [
        (STRANGER, "False"),
        (100_000 + OVERFLOW, "True"),  # the real one: the kernel lets us signal him
        (100_000, "True"),
        (100_000 + 1, "False"),
    ],
    ids=["stranger", "nobody", "root", "another"],
)
def test_a_user_that_connects_is_known_by_what_cannot_be_mistaken(
    let_in: Callable[[int], str], uid: int, said: str
) -> None:
    assert let_in(uid) == said


@needs_root
def test_a_strangers_group_is_not_taken_for_nogroup(open_folder: Path) -> None:
    path = str(open_folder / "c")
    with in_user_namespace(*python(CONTROLS, path, "1", str(OVERFLOW))) as process:
        assert read_line(process) == "listens"
        with connected(STRANGER, path):
            tell(process, "")
            assert read_line(process) == "False"


def test_a_process_that_has_ended_may_not_be_signalled() -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")
    listener.listen()
    with listener:
        child = os.fork()
        if child == 0:
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(listener.getsockname())
            os._exit(0)
        with listener.accept()[0] as connection:
            os.waitpid(child, 0)
            assert not may_be_signalled(connection)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert may_be_signalled(ours)
