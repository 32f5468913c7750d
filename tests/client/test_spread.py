"""A spread: a draining worker ends its connections evenly, each at its turn."""

from __future__ import annotations

import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from socketprotector_client import Connection, spread, wire
from socketprotector_client.drain_state import Drain
from socketprotector_client.scoreboard import Scoreboard
from socketprotector_client.spread import Spread

from tests.channel import Channel, Worker
from tests.running import DEADLINE_S, Client, eventually

SECONDS = 2.0
SPREAD = {wire.ENV_DRAIN_SPREAD: str(SECONDS)}
COUNT = 8
WAYS = [["threads", str(COUNT)], ["tasks"], ["server"], ["loop"]]


def ends(clients: list[Client]) -> list[float]:
    """Return when each client read its end, in order; each had its own turn."""
    left, found = {each.socket.fileno(): each for each in clients}, []
    while left:
        ready, _, _ = select.select([*left], [], [], DEADLINE_S)
        assert ready, f"{len(left)} of {len(clients)} connections never ended"
        for fd in ready:
            found.append(time.monotonic())
            client = left.pop(fd)
            assert (client.hear(), client.hear()) == ("your turn", "")
    return found


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_connections_end_evenly_and_their_handlers_may_still_write(
    channel: Channel, way: list[str]
) -> None:
    worker = channel.start("spreads.py", *way, env=SPREAD)
    clients = []
    for _ in range(COUNT):
        clients.append(channel.connect())
        assert clients[-1].ask("x") == "x"
    began = time.monotonic()

    channel.end_channel()
    found = ends(clients)

    # None comes before its turn; how late it comes is the machine's.
    each_s = SECONDS * (1 - spread._PATIENCE_PART) / COUNT
    early = [at - began for n, at in enumerate(found, 1) if at - began < (n - 1) * each_s - 0.1]
    assert not early, (each_s, [at - began for at in found])
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


def test_a_worker_that_retires_spreads_too(channel: Channel) -> None:
    worker = channel.start("spreads.py", "threads", "2", env=SPREAD)
    client = channel.connect()
    client.ask("x")

    worker.retire()

    assert (client.hear(), client.hear()) == ("your turn", "")
    assert worker.wait() == 0


def test_without_the_variables_nothing_is_loaded_and_clients_leave_themselves(
    channel: Channel,
) -> None:
    worker = channel.start("spreads.py", "threads", "2")
    client = channel.connect()
    assert client.ask("drains?") == "0 0"

    channel.end_channel()

    eventually(lambda: client.ask("drains?") == "1 1", "the drain")
    assert "spread" not in Path(f"/proc/{worker.pid}/maps").read_text()
    assert client.rest() == ["your turn"]
    assert worker.wait() == 0


def test_a_client_learns_of_its_own_turn_only(channel: Channel) -> None:
    worker = channel.start("spreads.py", "threads", "2", env={wire.ENV_DRAIN_SPREAD: "3600"})
    client = channel.connect()

    channel.end_channel()

    eventually(lambda: client.ask("drains?") == "1 0", "the drain")
    assert client.rest() == ["you left"]
    assert worker.wait() == 0


def test_a_child_leaves_its_parents_connections_alone(channel: Channel) -> None:
    worker = channel.start("spreads.py", "fork", env=SPREAD)
    held = channel.connect()
    child = int(worker.read_line().removeprefix("child "))
    taken = channel.connect()
    assert taken.ask("x") == "x"
    os.kill(worker.pid, 19)  # the parent's own turns do not come now

    channel.end_channel()

    assert (taken.hear(), taken.hear()) == ("your turn", "")
    eventually(lambda: ended(child), "the child's end")
    assert not held.has_answer()
    os.kill(worker.pid, 18)
    assert worker.read_line() == "child ended"
    assert held.hear() == "your turn"
    assert worker.wait() == 0


def ended(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "Z"


# -- its parts --------------------------------------------------------------------------


class Board:
    """A scoreboard in this process."""

    def __init__(self) -> None:
        fd = os.memfd_create("board")
        os.ftruncate(fd, wire.BOARD_BYTES)
        self.board = Scoreboard(fd, 0)

    def close(self) -> None:
        """Give up the memory, of which mmap keeps a descriptor."""
        words = self.board.words
        assert words is not None
        assert self.board._file is not None
        shared = words.obj
        words.release()
        self.board._file.release()
        assert isinstance(shared, mmap.mmap)
        shared.close()

    def order(self, until: int) -> None:
        assert self.board.words is not None
        self.board.words[wire.BOARD_SPREAD_UNTIL] = until


class PlainDrain(Drain):
    """A drain without a thread, which would keep a pipe for ever."""

    def __init__(self) -> None:
        super().__init__([])
        self._then: list[Callable[[], object]] = []

    def begin(self) -> None:
        for each in self._then:
            each()

    def on_begin(self, callback: Callable[[], object]) -> None:
        self._then.append(callback)


class Turns:
    """A spread, its drain and its connections, in this process."""

    def __init__(self, seconds: float) -> None:
        self.board = Board()
        self.drain = PlainDrain()
        self.spread = Spread(self.drain, seconds, self.board.board)
        self.open = self.spread.open_connections(lambda: None)
        self.kept: list[Connection] = []
        self.spread.arm()

    def connect(self) -> tuple[socket.socket, Connection]:
        """Return both ends of a TCP connection; the spread knows one."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        served = Connection(socket.AF_INET, socket.SOCK_STREAM, 0, accepted.detach())
        self.open.add(served)
        self.kept.append(served)
        return client, served


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], Turns]]:
    made: list[Turns] = []

    def make(seconds: float) -> Turns:
        made.append(Turns(seconds))
        return made[-1]

    yield make
    threads = [each.spread for each in made if each.spread.over]
    for each in made:
        for one in each.kept:
            one.close()
        each.spread.over = False

    def end(*_: object) -> None:
        raise SystemExit  # ends the thread, which otherwise lives as long as its process

    monkeypatch.setattr(Spread, "_until", end)
    eventually(lambda: all(each.over for each in threads), "the end of the threads")
    for each in made:
        each.board.close()


def test_a_worker_declares_itself_before_it_is_ready(turns: Callable[[float], Turns]) -> None:
    made = turns(1.0)

    assert made.board.board.words is not None
    assert made.board.board.words[wire.BOARD_SPREADS] == 1


def test_the_order_of_the_protector_counts_and_an_earlier_one_may_follow(
    turns: Callable[[float], Turns],
) -> None:
    made = turns(0.01)
    client, served = made.connect()
    made.board.order(wire.SPREAD_NEVER)
    served.setblocking(False)
    made.drain.begin()
    eventually(lambda: made.spread.over, "the thread")
    with client:
        with pytest.raises(BlockingIOError):
            served.recv(1)  # no end of file

        made.board.order(time.monotonic_ns())
        served.setblocking(True)

        assert served.recv(1) == b""
        served.sendall(b"bye")
        assert client.recv(3) == b"bye"


def test_idle_connections_come_first_then_those_that_await_an_answer(
    turns: Callable[[float], Turns], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = turns(3600.0)
    states = [(False, True), (True, False), (True, True), (False, False), (True, True)]
    found = {}
    for state in states:
        client, served = made.connect()
        client.close()
        found[os.fstat(served.fileno()).st_ino] = state
    monkeypatch.setattr(spread, "_state_of", lambda fd: found[os.fstat(fd).st_ino])
    order = spread._Turns(made.spread)
    order.find()

    seen = []
    for _ in states:
        before = set(made.spread._due)
        order.next(1)
        seen += [found[each] for each in made.spread._due - before]

    assert seen[:3] == [(True, True), (True, True), (True, False)]
    assert {*seen[3:]} == {(False, True), (False, False)}


def test_what_the_kernel_knows_tells_idle_and_unanswered_connections(
    turns: Callable[[float], Turns], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, served = turns(3600.0).connect()
    fd = served.fileno()
    with client:
        assert spread._state_of(fd)[1]
        client.sendall(b"question")
        assert spread._state_of(fd) == (False, False)  # unread
        served.recv(8)
        assert not spread._state_of(fd)[1]
        served.sendall(b"answer")
        eventually(lambda: spread._state_of(fd)[1], "the acknowledgement")
        monkeypatch.setattr(spread, "_IDLE_MS", 0)
        assert spread._state_of(fd) == (True, True)
        monkeypatch.setattr(spread, "_IDLE_MS", 10**9)
        assert spread._state_of(fd) == (False, True)


def test_a_connection_without_an_answer_keeps_its_input_for_a_while(
    turns: Callable[[float], Turns],
) -> None:
    made = turns(3600.0)
    client, served = made.connect()
    served.setblocking(False)
    with client:
        client.sendall(b"question")
        order = spread._Turns(made.spread)
        order.find()
        order.next(1)
        now = time.monotonic()
        order.end_late(now, 3600.0)
        assert made.spread.is_due(served.fileno())
        eventually(lambda: served.recv(8, socket.MSG_PEEK) == b"question", "the bytes")
        served.recv(8)
        with pytest.raises(BlockingIOError):
            served.recv(1)

        order.end_late(now + 3600.0, 3600.0)

        assert served.recv(1) == b""


def test_a_program_ends_connections_in_its_own_way(turns: Callable[[float], Turns]) -> None:
    made = turns(3600.0)
    client, served = made.connect()
    ended_by: list[list[int]] = []
    made.spread.end = ended_by.append
    served.setblocking(False)
    with client:
        order = spread._Turns(made.spread)
        order.find()
        order.next(1)
        now = time.monotonic()

        assert ended_by == [[served.fileno()]]
        order.end_late(now, 3600.0)
        with pytest.raises(BlockingIOError):
            served.recv(1)
        order.end_late(now + 3600.0, 3600.0)
        assert served.recv(1) == b""


def test_without_a_free_descriptor_a_turn_comes_later(
    turns: Callable[[float], Turns], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = turns(3600.0)
    client, served = made.connect()
    order = spread._Turns(made.spread)

    def full(fd: int) -> int:
        raise OSError(24, "Too many open files")

    with client:
        with monkeypatch.context() as scarce:
            scarce.setattr(os, "dup", full)
            order.find()
            with pytest.raises(OSError, match="Too many open files"):
                order.next(1)
        assert len(order) == 1

        order.next(1)

        assert served.recv(1) == b""


def test_a_detached_descriptor_is_ended_and_a_reused_number_is_not(
    turns: Callable[[float], Turns],
) -> None:
    made = turns(3600.0)
    (client, served), (other, reused) = made.connect(), made.connect()
    plain = made.open.exchange(served)
    number = made.open.exchange(reused).detach()
    with client, other, plain, socket.socket() as stranger:
        os.dup2(stranger.fileno(), number, inheritable=False)
        order = spread._Turns(made.spread)
        order.find()
        order.next(2)

        assert plain.recv(1) == b""
        assert os.fstat(number).st_ino not in made.spread._due
        os.close(number)


def test_a_worker_with_another_ready_is_no_worker_that_spreads(channel: Channel) -> None:
    """own_loop.py takes from the Channel itself."""
    worker: Worker = channel.start("own_loop.py", env=SPREAD)
    client = channel.connect()
    client.ask("x")

    channel.end_channel()

    assert client.rest()[-1:] != ["your turn"]
    assert worker.wait() == 0
