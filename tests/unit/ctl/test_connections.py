"""connections: the sockets of a worker, looked up in /proc.  The worker is this process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from socketprotector.ctl import connections
from socketprotector.ctl.connections import AT_LEAST, AT_MOST, EXACT
from socketprotector.system import procfs
from tests.running import Ended, eventually
from tests.unit.ctl.fake import Fake, generation, listener, owner, status, worker

Ctl = Callable[..., Ended]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


def pair(stack: ExitStack, family: int, address: object) -> tuple[socket.socket, socket.socket]:
    """A connection: (the client's end, the worker's)."""
    listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    listener.bind(address)  # type: ignore[arg-type]
    listener.listen()
    client = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
    client.connect(listener.getsockname())
    accepted, _ = listener.accept()
    return client, stack.enter_context(accepted)


@pytest.mark.parametrize(
    ("family", "bind", "listens"),
    [
        (socket.AF_INET, "127.0.0.1", "tcp:127.0.0.1:{}"),
        (socket.AF_INET, "127.0.0.1", "tcp:0.0.0.0:{}"),
        (socket.AF_INET6, "::1", "tcp:[::1]:{}"),
        (socket.AF_INET6, "::1", "tcp:[::]:{}"),
    ],
)
def test_peer_worker_age_and_bytes_of_a_connection(
    family: int, bind: str, listens: str, stack: ExitStack
) -> None:
    client, accepted = pair(stack, family, (bind, 0))
    client.sendall(b"12345")
    address = listens.format(accepted.getsockname()[1])
    times = {str(accepted.fileno()): 40.0}

    def look() -> list[connections.Connection]:
        found, unseen = connections.find_connections(
            [owner(os.getpid(), accepted_at_by_fd=times)], [address], 100.0
        )
        assert unseen == []
        return [each for each in found if each.waiting_bytes is not None]

    eventually(lambda: bool(look()) and look()[0].waiting_bytes == 5, "5 bytes that wait")
    found = look()

    def shown(end: tuple[object, ...]) -> str:
        return f"[{end[0]}]:{end[1]}" if family == socket.AF_INET6 else f"{end[0]}:{end[1]}"

    # Local addresses: the client's own end has another one, and is not seen.
    assert [
        (each.peer, each.local, each.age_s, each.bound, each.generation, each.worker)
        for each in found
    ] == [(shown(client.getsockname()), shown(accepted.getsockname()), 60.0, EXACT, 8, 14)]


def test_mapped_addresses_are_shown_as_what_they_are(stack: ExitStack) -> None:
    listener = stack.enter_context(socket.socket(socket.AF_INET6))
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", 0))
    listener.listen()
    port = listener.getsockname()[1]
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    stack.enter_context(listener.accept()[0])

    found, _ = connections.find_connections([owner(os.getpid())], [f"tcp:[::]:{port}"], now=100.0)

    assert [each.peer for each in found] == [f"127.0.0.1:{client.getsockname()[1]}"]


@pytest.mark.parametrize("name", ["a b", "a  b", "a\tb", "a "])
def test_a_unix_socket_whose_path_has_blanks(stack: ExitStack, tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    client, _ = pair(stack, socket.AF_UNIX, path)
    client.sendall(b"123")

    for draining, bound in (({8}, AT_LEAST), (set[int](), AT_MOST)):
        found, _ = connections.find_connections(
            [owner(os.getpid())], [f"unix:{path}"], 100.0, draining
        )

        assert [(each.local, each.peer, each.age_s, each.bound) for each in found] == [
            (f"unix:{path}", "unix", 10.0, bound)
        ]
        assert found[0].waiting_bytes == 3


@pytest.mark.parametrize("rest", ["", "a b c d e f g h"])
def test_a_line_break_in_the_name_of_somebodys_socket_is_no_row(
    rest: str, stack: ExitStack, tmp_path: Path
) -> None:
    other = stack.enter_context(socket.socket(socket.AF_UNIX))
    other.bind(f"\0{tmp_path.name}-{os.getpid()}\n{rest}")
    path = str(tmp_path / "socket")
    pair(stack, socket.AF_UNIX, path)

    found, _ = connections.find_connections([owner(os.getpid())], [f"unix:{path}"], 100.0)

    assert [each.local for each in found] == [f"unix:{path}"]


def test_a_worker_has_the_addresses_of_its_generation(stack: ExitStack) -> None:
    """Another generation may have had a listener where this worker itself listens now."""
    _, accepted = pair(stack, socket.AF_INET, ("127.0.0.1", 0))
    address = "tcp:{}:{}".format(*accepted.getsockname())
    workers = [owner(os.getpid()), owner(os.getpid(), generation=9, worker=15)]

    for known, in_force, generations in (
        ({8: [address], 9: ["unix:@x"]}, ["unix:@x"], [8]),
        ({8: ["unix:@x"], 9: [address]}, [address], [9]),
        ({8: [address], 9: [address]}, [], [8, 9]),
        ({9: ["unix:@x"]}, [address], [8]),  # an older version started generation 8
        (None, [address], [8, 9]),  # an older protector
    ):
        found, unseen = connections.find_connections(workers, in_force, 100.0, known=known)

        assert sorted(each.generation for each in found) == generations
        assert unseen == []


def test_a_worker_without_known_addresses_is_unseen() -> None:
    """An older protector that stops does not say where its clients came from."""
    found, unseen = connections.find_connections(
        [owner(os.getpid()), owner(os.getpid(), generation=9)],
        [],
        100.0,
        known={9: ["unix:@x"]},
    )

    assert found == []
    assert [(each.generation, each.why) for each in unseen] == [(8, connections._NO_ADDRESS)]


@pytest.mark.parametrize("found", [None, [], {"8": "unix:@x"}, {"x": ["unix:@x"]}])
def test_addresses_of_another_type_are_ignored(found: object) -> None:
    assert connections.known_addresses({"addresses_by_generation": found}) == {}
    mixed = {"addresses_by_generation": {"8": [1, "unix:@x"]}}
    assert connections.known_addresses(mixed) == {8: ["unix:@x"]}


def test_what_is_no_connection_to_a_listener_is_not_shown(stack: ExitStack) -> None:
    pair(stack, socket.AF_INET, ("127.0.0.1", 0))

    assert connections.find_connections(
        [owner(os.getpid())], ["tcp:0.0.0.0:1", "unix:@x"], now=1.0
    ) == ([], [])


def test_a_connection_that_only_a_workers_child_has(stack: ExitStack) -> None:
    client, accepted = pair(stack, socket.AF_INET, ("127.0.0.1", 0))
    port = accepted.getsockname()[1]
    child = "import sys; sys.stdin.read()"
    parent = (
        "import subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], pass_fds=[{accepted.fileno()}]); "
        f"import os; os.close({accepted.fileno()}); print(flush=True); p.wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        pass_fds=[accepted.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    accepted.close()
    assert process.stdout
    process.stdout.readline()

    found, _ = connections.find_connections(
        [owner(process.pid, accepted_at_by_fd={"-1": 5.0})], [f"tcp:127.0.0.1:{port}"], now=100.0
    )
    process.communicate()

    assert [each.peer for each in found] == [f"127.0.0.1:{client.getsockname()[1]}"]
    assert found[0].bound == AT_MOST


#: A process whose second thread starts a child with descriptor N; a third child is a zombie.
_BY_THREAD = """
import os, subprocess, sys, threading
def more():
    children.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[int(sys.argv[1])]))
    os.close(int(sys.argv[1]))
    print(children[0].pid, flush=True)
    sys.stdin.read()
children = []
ended = subprocess.Popen(["true"])
os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
thread = threading.Thread(target=more)
thread.start()
thread.join()
children[0].communicate()
ended.wait()
"""


@pytest.mark.parametrize("hidden", [None, PermissionError, FileNotFoundError])
def test_a_child_that_a_workers_thread_has_started_is_searched_or_reported(
    hidden: type[OSError] | None, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, accepted = pair(stack, socket.AF_INET, ("127.0.0.1", 0))
    local, number = "{}:{}".format(*accepted.getsockname()), accepted.fileno()
    with subprocess.Popen(
        [sys.executable, "-c", _BY_THREAD, str(number)],
        pass_fds=[number],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        accepted.close()
        assert process.stdout
        child = int(process.stdout.readline())
        read = procfs.sockets

        def sockets(pid: int) -> Iterator[tuple[int, int]]:
            if hidden is not None and pid != process.pid:
                raise hidden
            return read(pid)

        monkeypatch.setattr(procfs, "sockets", sockets)

        found, unseen = connections.find_connections(
            [owner(process.pid)], [f"tcp:{local}"], now=100.0
        )
        process.communicate()

    assert [each.pid for each in found] == ([] if hidden else [process.pid])
    assert [each.pid for each in unseen] == ([process.pid] if hidden else [])
    for each in unseen:
        assert each.why.startswith(f"process {child}: ")


def test_pids_of_another_namespace_are_not_looked_up(stack: ExitStack) -> None:
    _, accepted = pair(stack, socket.AF_INET, ("127.0.0.1", 0))
    listens = ["tcp:{}:{}".format(*accepted.getsockname())]

    found, unseen = connections.find_connections(
        [owner(os.getpid())], listens, now=100.0, shares_pids=False
    )

    assert found == []
    assert [(each.pid, "PID namespace" in each.why) for each in unseen] == [(os.getpid(), True)]


def test_pids_are_not_looked_up_in_the_proc_of_another_namespace(
    monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    """As after unshare --pid --fork without --mount-proc, where /proc has others with our pids."""
    _, accepted = pair(stack, socket.AF_INET, ("127.0.0.1", 0))
    listens = ["tcp:{}:{}".format(*accepted.getsockname())]
    read = os.readlink
    monkeypatch.setattr(os, "readlink", lambda path: "1" if path == "/proc/self" else read(path))

    for orphaned in (False, True):
        found, unseen = connections.find_connections(
            [owner(os.getpid(), orphaned=orphaned)], listens, now=100.0
        )

        assert found == []
        assert [(each.pid, procfs.MISSING in each.why) for each in unseen] == [(os.getpid(), True)]


def test_a_connection_of_a_forked_child_is_shown_once(stack: ExitStack) -> None:
    """The answer has the parent, whose descendants are searched, and the child with its times."""
    _, accepted = pair(stack, socket.AF_INET, ("127.0.0.1", 0))
    child = subprocess.Popen(["sleep", "1000"], pass_fds=[accepted.fileno()])
    stack.callback(child.wait)
    stack.callback(child.kill)
    number = accepted.fileno()
    address = f"tcp:127.0.0.1:{accepted.getsockname()[1]}"
    accepted.close()
    places = [owner(os.getpid()), owner(child.pid, accepted_at_by_fd={str(number): 40.0})]

    for each in (places, places[::-1]):
        found, _ = connections.find_connections(each, [address], now=100.0)

        assert [(one.pid, one.bound, one.age_s) for one in found if one.local == address[4:]] == [
            (child.pid, EXACT, 60.0)
        ]


def test_a_worker_that_has_ended_meanwhile_is_left_out() -> None:
    process = subprocess.Popen(["true"])
    process.wait()

    assert connections.find_connections(
        [owner(process.pid), owner(0)], ["tcp:0.0.0.0:1"], now=1.0
    ) == ([], [])


def test_a_worker_that_ends_while_its_table_is_read_hides_no_other(
    monkeypatch: pytest.MonkeyPatch, stack: ExitStack
) -> None:
    """Both are in one network namespace, whose table is read once."""
    _, accepted = pair(stack, socket.AF_INET, ("127.0.0.1", 0))
    port = accepted.getsockname()[1]
    process = subprocess.Popen(["sleep", "1000"])
    read = connections._sockets

    def read_later(pid: int, addresses: tuple[str, ...]) -> object:
        if pid == process.pid:
            process.kill()
            process.wait()
        return read(pid, addresses)

    monkeypatch.setattr(connections, "_sockets", read_later)

    found, unseen = connections.find_connections(
        [owner(process.pid), owner(os.getpid())], [f"tcp:127.0.0.1:{port}"], now=100.0
    )

    assert ({each.pid for each in found}, unseen) == ({os.getpid()}, [])


def test_a_worker_of_another_user_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.readlink

    def no(path: str) -> str:
        if path == "/proc/self":
            return read(path)
        raise PermissionError

    monkeypatch.setattr(os, "readlink", no)

    _, unseen = connections.find_connections([owner(1)], ["tcp:0.0.0.0:1"], now=1.0)

    assert [(each.pid, each.why) for each in unseen] == [
        (1, "permission denied; run as root or as the worker's user")
    ]


@pytest.mark.parametrize(
    ("phase", "age"), [("draining", ">=1h2m"), ("abandoned", "<=1h2m"), ("serving", "<=1h2m")]
)
def test_the_command_shows_rows_and_sums(
    fake: Fake, ctl: Ctl, stack: ExitStack, phase: str, age: str
) -> None:
    client, accepted = pair(stack, socket.AF_INET, ("127.0.0.1", 0))
    port = accepted.getsockname()[1]
    fake.status = status(
        generation(8, phase, worker(14)),
        now=time.time(),
        listeners=[listener(f"tcp:127.0.0.1:{port}")],
    )
    fake.answers["connections"] = lambda *_: {
        "workers": [owner(os.getpid(), since_at=time.time() - 3725)]
    }

    said = ctl("connections", "8")

    peer = f"127.0.0.1:{client.getsockname()[1]}"
    lines = [line.split() for line in said.out.splitlines()]
    assert lines[0] == ["GENERATION", "WORKER", "PID", "PEER", "LOCAL", "AGE", "WAITING"]
    assert lines[1] == [
        *("8", "14", str(os.getpid()), peer, f"127.0.0.1:{port}"),
        *(age, "0"),
    ]
    assert said.out.endswith(f"\ngeneration 8 {phase}: 1 connection, oldest {age}\n")
    assert fake.asked[-1] == {"command": "connections", "generation": 8}
    # So it is during a stop: no listener is in force, but the answer has the generation's.
    fake.status["listeners"] = []
    hidden = ctl("connections")
    assert hidden.out == "no connections that this user can see\n"
    assert connections._NO_ADDRESS in hidden.err
    fake.answers["connections"] = lambda *_: {
        "workers": [owner(os.getpid())],
        "addresses_by_generation": {"8": [f"tcp:127.0.0.1:{port}"]},
    }
    told = json.loads(ctl("connections", "--json").out)
    assert [each["peer"] for each in told["connections"]] == [peer]
    assert fake.asked[-1] == {"command": "connections"}


def test_none(fake: Fake, ctl: Ctl) -> None:
    fake.answers["connections"] = lambda *_: {"workers": []}

    assert ctl("connections") == Ended(0, "no connections\n", "")


def test_the_connections_of_orphans_are_found_by_their_session(stack: ExitStack) -> None:
    """The worker has ended; what it had started keeps them."""
    _, accepted = pair(stack, socket.AF_INET, ("127.0.0.1", 0))
    code = "import os; os.fork() or (os.write(1, b'+'), os.read(0, 1)); os._exit(0)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[accepted.fileno()],
        start_new_session=True,
    ) as leader:
        assert leader.stdin
        assert leader.stdout
        assert leader.stdout.read(1) == b"+"
        leader.wait()
        host, port = accepted.getsockname()
        listens = [f"tcp:{host}:{port}"]

        alive, _ = connections.find_connections([owner(leader.pid)], listens, 100.0)
        left, _ = connections.find_connections([owner(leader.pid, orphaned=True)], listens, 100.0)

    assert alive == []
    assert [(each.worker, each.pid, each.bound) for each in left] == [(14, leader.pid, AT_MOST)]
