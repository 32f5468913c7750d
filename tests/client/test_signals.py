"""SIGTERM: whose it is, and that no other signal does any harm."""

from __future__ import annotations

import os
import signal

import pytest

from tests.client.protector import Protector


def test_a_programs_own_handler_is_left_alone(protector: Protector) -> None:
    worker = protector.start("signalled.py", "own handler")

    worker.term()

    assert worker.read_line() == "own handler, draining False"
    assert protector.connect().ask("hello") == "echo hello"


@pytest.mark.parametrize("way", ["restored", "thread"])
def test_the_disposition_is_put_back_at_the_end(protector: Protector, way: str) -> None:
    worker = protector.start("signalled.py", way)

    protector.end_channel()

    rest = "-1" if way == "restored" else "True"
    assert worker.read_line() == f"{signal.SIG_DFL!r} {rest}"


def test_the_disposition_is_put_back_when_the_iteration_is_left(protector: Protector) -> None:
    worker = protector.start("signalled.py", "restored by break")

    protector.connect().close()

    assert worker.read_line() == f"{signal.SIG_DFL!r} -1"


def test_in_another_thread_sigterm_keeps_its_meaning(protector: Protector) -> None:
    worker = protector.start("signalled.py", "thread")

    worker.term()

    assert worker.wait() == -signal.SIGTERM


def test_signals_in_the_middle_lose_no_connection(protector: Protector) -> None:
    worker = protector.start("signalled.py", "noisy")

    for _ in range(100):
        client = protector.connect()
        assert client.ask("hello") == "echo hello"
        client.close()

    worker.term()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


@pytest.mark.parametrize("program", ["iterates.py", "serves.py", "streams.py"])
def test_sigterm_between_connections_leaves_every_other_one_to_the_next_worker(
    protector: Protector, program: str
) -> None:
    clients = []
    for _ in range(5):
        worker = protector.start(program)
        batch = [protector.connect() for _ in range(20)]
        for client in batch:
            client.send("hello")
        os.kill(worker.pid, signal.SIGTERM)
        clients += batch
    protector.start(program)

    for client in clients:
        assert client.read() == "echo hello"
        client.close()


def test_sigterm_reaches_a_pool_whose_threads_are_all_busy(protector: Protector) -> None:
    worker = protector.start("serves.py", "--threads", "1")
    client = protector.connect()
    assert client.ask("draining") == "False"

    worker.term()

    while client.ask("draining") == "False":
        pass
    client.close()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)
