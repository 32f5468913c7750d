"""SIGTERM: whose it is, and that no other signal does any harm."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
from socketprotector_client.intake import Intake
from socketprotector_client.signals import TermWatch

from tests.channel import Channel
from tests.procfs import sleeps
from tests.running import DEADLINE_S, eventually


def test_a_programs_own_handler_is_left_alone(channel: Channel) -> None:
    worker = channel.start("signalled.py", "own handler")

    # Python runs a handler late if its signal comes between the last bytecode and the wait.
    eventually(lambda: sleeps(worker.pid), "the worker to wait for connections")
    worker.term()

    assert worker.read_line() == "own handler, draining False"
    assert channel.connect().ask("hello") == "echo hello"


@pytest.mark.parametrize("way", ["restored", "thread"])
def test_the_disposition_is_put_back_at_the_end(channel: Channel, way: str) -> None:
    worker = channel.start("signalled.py", way)

    channel.end_channel()

    rest = "-1" if way == "restored" else "True"
    assert worker.read_line() == f"{signal.SIG_DFL!r} {rest}"


def test_the_disposition_is_put_back_when_the_iteration_is_left(channel: Channel) -> None:
    worker = channel.start("signalled.py", "restored by break")

    channel.connect().close()

    assert worker.read_line() == f"{signal.SIG_DFL!r} -1"


def test_in_another_thread_sigterm_keeps_its_meaning(channel: Channel) -> None:
    worker = channel.start("signalled.py", "thread")

    worker.term()

    assert worker.wait() == -signal.SIGTERM


def test_signals_in_the_middle_lose_no_connection(channel: Channel) -> None:
    worker = channel.start("signalled.py", "noisy")

    for _ in range(100):
        client = channel.connect()
        assert client.ask("hello") == "echo hello"
        client.close()

    worker.term()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


@pytest.mark.parametrize("program", ["iterates.py", "serves.py", "streams.py"])
def test_sigterm_between_connections_leaves_every_other_one_to_the_next_worker(
    channel: Channel, program: str
) -> None:
    clients = []
    for _ in range(5):
        worker = channel.start(program)
        batch = [channel.connect() for _ in range(20)]
        for client in batch:
            client.say("hello")
        os.kill(worker.pid, signal.SIGTERM)
        clients += batch
    channel.start(program)

    for client in clients:
        assert client.hear() == "echo hello"
        client.close()


def test_sigterm_reaches_a_pool_whose_threads_are_all_busy(channel: Channel) -> None:
    worker = channel.start("serves.py", "--threads", "1")
    client = channel.connect()
    assert client.ask("draining") == "False"

    worker.term()

    while client.ask("draining") == "False":
        pass
    client.close()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


@pytest.fixture
def _term_is_free() -> Iterator[None]:
    """A process that pytest-xdist starts handles SIGTERM."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_term_is_free")
def test_asyncio_still_calls_the_programs_handlers_of_other_signals(intake: Intake) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        told, wakes = asyncio.Event(), asyncio.Event()
        loop.add_signal_handler(signal.SIGUSR2, told.set)
        loop.add_reader(intake.fileno(), wakes.set)
        watch = TermWatch(intake)
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
            await asyncio.wait_for(told.wait(), DEADLINE_S)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(wakes.wait(), DEADLINE_S)
        finally:
            watch.stop()
            loop.remove_reader(intake.fileno())

    asyncio.run(main())
    assert intake.drain.begun()


@pytest.mark.usefixtures("_term_is_free")
def test_a_wakeup_descriptor_of_asyncios_that_is_closed_by_now_is_not_restored(
    intake: Intake,
) -> None:
    async def main() -> TermWatch:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, print)
        return TermWatch(intake)

    asyncio.run(main()).stop()

    assert signal.set_wakeup_fd(-1) == -1
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
