"""Two sockets for one address: to which of them clients come."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from socketprotector.launch.bind import Bound, pair
from socketprotector.model.settings import ListenerSettings
from socketprotector.system import bpf, reuseport, socket_copy
from tests import needs
from tests.boundary.listening import KINDS, listening
from tests.rounds import rounds
from tests.running import DEADLINE_S, ROOT
from tests.unanswered import Unanswered, from_next_door

Pair = tuple[socket.socket, socket.socket]
#: The clients of which a share is drawn; so many at a time have room in a backlog.
CLIENTS, BATCH = rounds(2_000, 20_000), 40


@pytest.fixture
def first() -> Iterator[socket.socket]:
    with listening(socket.AF_INET, "127.0.0.1") as made:
        yield made


def came(pair: Pair, hosts: tuple[str, ...], count: int = 12) -> tuple[int, int]:
    """How many of so many new clients each of the two gets."""
    port = pair[0].getsockname()[1]
    with ExitStack() as clients:
        for n in range(count):
            clients.enter_context(socket.create_connection((hosts[n % len(hosts)], port)))
        return accepted(pair[0]), accepted(pair[1])


def accepted(listener: socket.socket) -> int:
    count = 0
    while True:
        try:
            listener.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_clients_come_to_the_one_that_is_meant(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with listening(family, host, both=both) as one:
        second = reuseport.make(one)
        assert second is not None
        with second:
            pair = one, second
            assert came(pair, hosts) == (12, 0)
            for place in (1, 0, 0, 1, 1, 0):
                reuseport.steer(one, place)
                assert came(pair, hosts) == ((0, 12) if place else (12, 0))


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
@pytest.mark.parametrize("meant", [0, 1])
def test_a_mark_leads_to_the_other_one_and_nobody_else_goes_there(
    family: int, host: str, both: bool, hosts: tuple[str, ...], meant: int
) -> None:
    with listening(family, host, both=both) as one:
        second = reuseport.make(one)
        assert second is not None
        with second:
            pair = one, second
            for target in hosts:
                mark = bpf.Mark.draw(target)
                reuseport.steer(one, 1 - meant, {mark: meant})
                assert came(pair, hosts) == ((0, 12) if meant == 0 else (12, 0))
                for _ in range(5):
                    with socket.socket(mark.family) as ours:
                        mark.put(ours)
                        ours.connect((target, one.getsockname()[1]))
                        assert [accepted(each) for each in pair] == [1 - meant, meant]
            reuseport.steer(one, 1 - meant)
            assert came(pair, hosts) == ((0, 12) if meant == 0 else (12, 0))


def came_to_second(pair: Pair, host: str, count: int) -> int:
    """How many of so many new clients the second gets.  A reset leaves no port in TIME_WAIT."""
    port, second = pair[0].getsockname()[1], 0
    for _ in range(count // BATCH):
        with ExitStack() as clients:
            for _ in range(BATCH):
                one = clients.enter_context(socket.create_connection((host, port)))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        there = accepted(pair[1])
        assert accepted(pair[0]) + there == BATCH
        second += there
    return second


@pytest.mark.parametrize(
    ("family", "host", "drawn"), [(socket.AF_INET, "127.0.0.1", 1), (socket.AF_INET6, "::1", 0)]
)
def test_the_kernel_draws_a_share_and_a_probe_still_comes_where_it_is_meant_to(
    family: int, host: str, drawn: int
) -> None:
    with listening(family, host) as one:
        second = reuseport.make(one)
        assert second is not None
        with second:
            pair = (one, second) if drawn else (second, one)
            mark = bpf.Mark.draw(host)
            marked = {mark: 1 - drawn}
            reuseport.steer(one, 1 - drawn, marked, drawn, share=500)
            mean, sigma = CLIENTS * 0.05, (CLIENTS * 0.05 * 0.95) ** 0.5
            assert abs(came_to_second(pair, host, CLIENTS) - mean) < 4 * sigma
            # Of 1,000 clients, more than 5 are such exceptions once in 10^9 runs.
            reuseport.steer(one, 1 - drawn, {}, drawn, share=1)
            assert came_to_second(pair, host, 1000) <= 5
            reuseport.steer(one, 1 - drawn, marked, drawn, share=9_999)
            assert came_to_second(pair, host, 1000) >= 995
            for _ in range(20):
                with socket.socket(family) as ours:
                    mark.put(ours)
                    ours.connect((host, one.getsockname()[1]))
                    assert [accepted(each) for each in pair] == [1, 0]
            reuseport.steer(one, 1 - drawn)
            assert came_to_second(pair, host, 1000) == 0


@needs.root_with("ip", "nsenter", "unshare")
def test_no_client_of_a_network_has_a_mark() -> None:
    script = Path(__file__).with_name("remote_mark.py")
    done = subprocess.run(
        ["unshare", "--net", sys.executable, script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr

    got_in, came, from_here = json.loads(done.stdout)
    assert got_in == [20, 0]
    assert came == [20, 0]
    assert from_here == [0, 1]


def test_marks_differ() -> None:
    for host in ("127.0.0.1", "::1"):
        assert len({bpf.Mark.draw(host) for _ in range(40)}) > 15


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_one_with_a_mark_comes_in_where_new_clients_are_left_without_an_answer(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with (
        listening(family, host, both=both) as one,
        reuseport.reserve(one, one.getsockname()) as silent,
    ):
        reuseport.silence(silent)
        for target in hosts:
            mark = bpf.Mark.draw(target)
            reuseport.steer(silent, 1, {mark: 0})
            with socket.socket(mark.family) as ours:
                mark.put(ours)
                assert ours.getsockname()[1] == 0, "it takes a port that others cannot have"
                ours.settimeout(DEADLINE_S)
                ours.connect((target, one.getsockname()[1]))
                assert accepted(one) == 1


def test_what_waits_where_nobody_accepts_can_be_discarded(first: socket.socket) -> None:
    first.setblocking(True)
    with ExitStack() as clients:
        ours = [
            clients.enter_context(socket.create_connection(first.getsockname())) for _ in range(5)
        ]
        reuseport.discard_waiting(first, 4)
        assert reuseport.queue(first)[0] == 1  # the last to come
        reuseport.discard_waiting(first, 1)
        reuseport.discard_waiting(first, 0)
        assert [each.recv(1) for each in ours] == [b""] * 5
        assert first.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == bytes(16)
    assert os.get_blocking(first.fileno())


def test_either_can_be_asked_to_steer(first: socket.socket) -> None:
    second = reuseport.make(first)
    assert second is not None
    with second:
        reuseport.steer(second, 1)
        assert came((first, second), ("127.0.0.1",)) == (0, 12)


def test_a_client_that_waits_already_stays_where_it_is(first: socket.socket) -> None:
    second = reuseport.make(first)
    assert second is not None
    with second, socket.create_connection(first.getsockname()):
        reuseport.steer(first, 1)
        assert came((first, second), ("127.0.0.1",)) == (1, 12)


def test_what_accepted_connections_inherit_is_the_same(first: socket.socket) -> None:
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77),
    ]
    for level, option, value in options:
        first.setsockopt(level, option, value)
    second = reuseport.make(first)
    assert second is not None
    with second:
        reuseport.steer(first, 1)
        with socket.create_connection(first.getsockname()):
            connection, _ = second.accept()
            with connection:
                for level, option, value in options:
                    assert connection.getsockopt(level, option) == value


def test_as_many_may_wait(first: socket.socket) -> None:
    second = reuseport.make(first)
    assert second is not None
    with second:
        limits = [
            each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)[28:32]
            for each in (first, second)
        ]
        assert limits[0] == limits[1] == (40).to_bytes(4, "little")


def test_a_process_that_asks_for_the_port_alone_does_not_get_it(first: socket.socket) -> None:
    second = reuseport.make(first)
    assert second is not None
    with second, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            other.bind(first.getsockname())


def test_another_process_of_the_same_user_that_asks_to_share_gets_no_client(
    first: socket.socket,
) -> None:
    second = reuseport.make(first)
    assert second is not None
    with second, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(first.getsockname())
        other.listen()
        other.setblocking(False)
        assert came((first, second), ("127.0.0.1",)) == (12, 0)
        reuseport.steer(first, 1)
        assert came((first, second), ("127.0.0.1",)) == (0, 12)
        assert accepted(other) == 0


def test_there_is_none_for_a_unix_socket_nor_for_one_that_waits_for_data() -> None:
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind("")
        unix.listen()
        assert reuseport.make(unix) is None
    with listening(socket.AF_INET, "127.0.0.1", TCP_DEFER_ACCEPT=5) as late:
        assert reuseport.make(late) is None


def test_where_the_system_has_none_nothing_is_left(
    first: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(reuseport, "steer", fails)
    with pytest.raises(OSError, match="no memory"):
        reuseport.make(first)

    with socket.create_connection(first.getsockname()):
        assert accepted(first) == 1


def test_no_new_client_gets_in_by_either(first: socket.socket) -> None:
    second = reuseport.make(first)
    assert second is not None
    with second:
        for each in (first, second):
            reuseport.refuse_new(each)
        for place in (0, 1):
            reuseport.steer(first, place)
            with socket.socket() as late:
                assert late.connect_ex(first.getsockname()) == errno.ECONNREFUSED


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_it_takes_no_privilege_to_let_no_new_client_in(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with listening(family, host, both=both) as one:
        port = one.getsockname()[1]
        with socket.create_connection((hosts[0], port)) as early:
            _without_privileges(lambda: reuseport.refuse_new(one))
            reuseport.refuse_new(one)  # once more: another program may not know that it was done
            for each in hosts:
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((each, port))
            early.sendall(b"x")
            connection, _ = one.accept()
            with connection:
                assert connection.recv(1) == b"x"


@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_each_of_several_marks_leads_to_its_own_one(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with listening(family, host, both=both) as one:
        second = reuseport.make(one)
        assert second is not None
        with second:
            marks = {bpf.Mark.draw(hosts[0]): n % 2 for n in range(4)}
            reuseport.steer(one, 0, marks)
            for mark, meant in marks.items():
                with socket.socket(mark.family) as ours:
                    mark.put(ours)
                    ours.connect((hosts[0], one.getsockname()[1]))
                    assert [accepted(each) for each in (one, second)] == [1 - meant, meant]
            assert came((one, second), hosts) == (12, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_clients_get_no_answer_and_try_again_and_those_from_before_notice_nothing(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with listening(family, host, both=both) as one, ExitStack() as clients:
        address, port = one.getsockname(), one.getsockname()[1]
        early = clients.enter_context(socket.create_connection((hosts[0], port)))
        begun = clients.enter_context(one.accept()[0])
        silent = clients.enter_context(reuseport.reserve(one, address))
        assert came((one, one), hosts) == (12, 0)
        for _ in range(2):
            reuseport.silence(silent)
            reuseport.steer(silent, 1)
            places = [(each, port) for each in hosts]
            waiting = [clients.enter_context(Unanswered(each)) for each in places]
            waiting += [clients.enter_context(Unanswered(n, from_next_door)) for n in places]
            for each in waiting:
                each.tries_again()
            assert reuseport.queue(silent)[0] == 0
            early.sendall(b"x")
            assert begun.recv(1) == b"x"
            assert accepted(one) == 0

            reuseport.steer(silent, 0)
            silent.shutdown(socket.SHUT_RDWR)
            for each in waiting:
                each.connects()
            assert came((one, one), hosts) == (12 + len(waiting), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_it_takes_no_privilege_to_have_clients_try_again_later(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    def hold() -> None:
        with listening(family, host, both=both) as one, ExitStack() as clients:
            address = one.getsockname()
            silent = clients.enter_context(reuseport.reserve(one, address))
            reuseport.silence(silent)
            reuseport.steer(silent, 1)
            places = [(each, address[1]) for each in hosts]
            found = [clients.enter_context(Unanswered(each)) for each in places]
            found += [clients.enter_context(Unanswered(n, from_next_door)) for n in places]
            for each in found:
                each.tries_again()
            reuseport.steer(silent, 0)
            silent.shutdown(socket.SHUT_RDWR)
            for each in found:
                each.connects()

    _without_privileges(hold)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "host", "both", "hosts"), KINDS)
def test_no_generation_begins_with_a_socket_that_an_earlier_one_has_silenced(
    family: int, host: str, both: bool, hosts: tuple[str, ...]
) -> None:
    with listening(family, host, both=both) as one:
        reuseport.silence(one)  # as any process can that has it
        with ExitStack() as clients:
            places = [(each, one.getsockname()[1]) for each in hosts]
            waiting = [clients.enter_context(Unanswered(each)) for each in places]
            for each in waiting:
                each.tries_again()
            socket_copy.reset(one)
            one.listen(40)  # silence() left room for one client
            for each in waiting:
                each.connects()


@pytest.mark.slow
@pytest.mark.parametrize("left", [(0,), (1,), (0, 1)])
def test_without_the_silent_one_clients_come_to_those_that_are_left(
    first: socket.socket, left: tuple[int, ...]
) -> None:
    """As where we are killed: then a socket lives on that workers have."""
    second = reuseport.make(first)
    assert second is not None
    with second:
        silent = reuseport.reserve(first, first.getsockname())
        reuseport.silence(silent)
        reuseport.steer(silent, 2)
        address, pair = first.getsockname(), (first, second)
        with Unanswered(address) as late:
            late.tries_again()
            for number, each in enumerate(pair):
                if number not in left:
                    each.close()
            silent.close()
            late.connects()
            there = [pair[number] for number in left]
            with ExitStack() as clients:
                for _ in range(12):
                    clients.enter_context(socket.create_connection(address))
                assert sum(accepted(each) for each in there) == 13


def test_handshakes_that_are_under_way_finish() -> None:
    # The server's side of it waits for data here; the client's is done.
    with (
        listening(socket.AF_INET, "127.0.0.1", TCP_DEFER_ACCEPT=30) as one,
        socket.create_connection(one.getsockname()) as client,
    ):
        reuseport.refuse_new(one)
        client.sendall(b"x")
        assert select.select([one], [], [], 30)[0]
        connection, _ = one.accept()
        with connection:
            assert connection.recv(1) == b"x"


def test_one_that_has_a_device_lets_no_new_client_in_either(first: socket.socket) -> None:
    first.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    if os.geteuid() == 0:
        reuseport.refuse_new(first)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(first.getsockname())


def test_no_client_gets_to_the_second_one_at_the_moment_it_begins_to_listen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as one:
        one.setblocking(False)
        one.bind(("127.0.0.1", 0))
        reuseport.prepare(one)
        one.listen(40)
        assert not one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        # That moment, for as long as we like.
        monkeypatch.setattr(reuseport, "steer", lambda *_: None)
        second = reuseport.make(one)
        assert second is not None
        with second:
            assert came((one, second), ("127.0.0.1",), 40) == (40, 0)


def test_passed_sockets_with_one_port_and_several_hosts_have_a_second_each() -> None:
    """The second socket of one host is no other program at the next host."""
    bound: list[Bound] = []
    notices: list[str] = []
    for host in ("127.0.0.1", "127.0.0.2"):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((host, bound[0].socket.getsockname()[1] if bound else 0))
        sock.listen()
        bound.append(Bound(sock, ListenerSettings(f"tcp:{host}:0", foreign=True)))

    made = pair(bound, (), notices.append, lambda *_: "")

    for each in (*bound, *made.values()):
        each.socket.close()
    assert [*made] == [0, 1]
    assert notices == []


def test_a_second_one_needs_no_privilege() -> None:
    def make() -> None:
        with listening(socket.AF_INET, "127.0.0.1") as one:  # it is for the same user alone
            second = reuseport.make(one)
            assert second is not None
            second.close()

    _without_privileges(make)


def _without_privileges(act: Callable[[], None]) -> None:
    """Do it in a child, which becomes the user nobody where we are root."""
    if (pid := os.fork()) == 0:
        try:
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
