"""Several intakes of one process: they are counted, waited for and stopped together."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from socketprotector_client import wire
from socketprotector_client.address import listen
from socketprotector_client.drain_state import Drain
from socketprotector_client.intake import Intake
from socketprotector_client.scoreboard import Scoreboard
from socketprotector_client.source import ListenSource

from tests.channel import Channel
from tests.running import eventually

from .sharing import in_child, taken


class Process:
    """What the intakes of one process share."""

    def __init__(self) -> None:
        self.record = os.memfd_create("board")
        os.ftruncate(self.record, wire.BOARD_BYTES)
        self.board = Scoreboard(os.dup(self.record), 0)
        self.drain = Drain(())

    def open(self) -> Intake:
        source = ListenSource(listen("127.0.0.1:0", 16), handed=False)
        return Intake(source, self.drain, 2, {}, self.board)

    def active(self) -> int:
        words = os.pread(self.record, wire.BOARD_BYTES, 0)
        return int.from_bytes(words[8 * wire.BOARD_ACTIVE :][:8], "little")


@pytest.fixture
def process() -> Iterator[Process]:
    made = Process()
    yield made
    os.close(made.record)
    del made.board, made.drain
    gc.collect()  # otherwise the mapping stays


@pytest.fixture
def make_intake(process: Process) -> Iterator[Callable[[], Intake]]:
    with ExitStack() as stack:

        def make() -> Intake:
            intake = process.open()
            stack.callback(intake.close)
            return intake

        yield make


def test_one_that_was_idle_when_another_began_is_counted(
    process: Process, make_intake: Callable[[], Intake]
) -> None:
    first, second = make_intake(), make_intake()

    with taken(first), taken(second):
        assert process.active() == 2

    assert process.active() == 0


def test_one_that_has_ended_is_counted_until_its_last_connection_has(
    process: Process, make_intake: Callable[[], Intake]
) -> None:
    first = make_intake()
    with taken(first):
        first.end()
        second = make_intake()
        assert process.drain.intakes() == [first, second]

    assert process.drain.intakes() == [first, second]
    assert first not in (make_intake(), *process.drain.intakes())


def test_a_child_leaves_out_what_its_parent_serves(
    process: Process, make_intake: Callable[[], Intake]
) -> None:
    first, second = make_intake(), make_intake()

    with taken(first):
        in_child(lambda: process.drain.intakes() == [second])
        assert process.drain.intakes() == [first, second]


def test_a_dropped_one_is_forgotten(process: Process) -> None:
    intake = process.open()
    dropped, spare = weakref.ref(intake), intake._spare

    del intake
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()

    assert dropped() is None
    assert not process.drain.intakes()
    spare.release()


def test_a_dropped_one_counts_what_it_has_detached(process: Process) -> None:
    """As ssl does with a client: only the descriptor is left."""
    dropped, client = drop_with_a_client(process)
    gc.collect()
    other = process.open()

    assert process.active() == 1
    assert process.drain.intakes() == [dropped(), other]

    os.close(client)
    for each in process.drain.intakes():
        assert len(each.open) == 0
        each.close()


def drop_with_a_client(process: Process) -> tuple[weakref.ref[Intake], int]:
    intake = process.open()
    return weakref.ref(intake), taken(intake).detach()


def test_each_can_be_stopped_without_a_free_descriptor(
    make_intake: Callable[[], Intake], monkeypatch: pytest.MonkeyPatch
) -> None:
    intakes = make_intake(), make_intake()
    monkeypatch.setattr("socketprotector_client.wait_set.Socket", none_is_free)

    intakes[0].request_drain()

    assert [each.waits.wait(0) != [] for each in intakes] == [True, True]


def none_is_free(*_: object) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_listener_without_a_client_waits_for_the_clients_of_another(channel: Channel) -> None:
    worker = channel.start("two_listeners.py", "8001", "8001")
    client = channel.connect()
    assert client.ask("hello") == "echo hello"

    worker.retire()

    assert [client.ask("draining") for _ in range(3)] == ["True"] * 3
    client.close()
    assert worker.wait() == 0
    assert not channel.log.read_text(), "two listeners of one address are no mistake"


def test_two_addresses_that_share_a_queue_cause_a_warning(channel: Channel) -> None:
    """A client of the public port could reach the server of the private one."""
    channel.start("two_listeners.py", "8001", "127.0.0.1:8002")

    text = "clients of 8001 and 127.0.0.1:8002 can reach either"
    eventually(lambda: text in channel.log.read_text(), "a warning")


def test_listeners_that_drain_send_one_sigterm(channel: Channel) -> None:
    worker = channel.start("two_listeners.py", "8001", "8001", "handles")

    worker.retire()

    assert worker.read_rest() == ["SIGTERM: 1"]


@pytest.mark.parametrize(
    ("way", "count"), [("aserve", 2), ("connections", 2), ("serve", 4), ("serve-one", 2)]
)
def test_sigterm_ends_all(channel: Channel, way: str, count: int) -> None:
    """serve-one: a call has no more threads than clients, or the second client might wake none."""
    worker = channel.start("several.py", way)
    clients = [channel.connect() for _ in range(count)]
    # So many clients that both calls serve some, and have begun to handle SIGTERM.
    assert [client.ask("hello") for client in clients] == ["echo hello"] * count

    worker.term()
    for client in clients:
        client.close()

    assert (worker.read_rest(), worker.wait()) == (["ended"], 0)
