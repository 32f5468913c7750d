"""A forked child may use what it inherits, or leave it: neither harms its parent."""

from __future__ import annotations

import os
import signal

from tests.client.protector import Protector


def test_sigterm_to_a_child_does_not_make_its_parent_drain(protector: Protector) -> None:
    worker = protector.start("forks.py", "child waits")
    client = protector.connect()
    child = int(worker.read_line().split()[1])

    os.kill(child, signal.SIGTERM)

    assert client.ask("draining") == "False"
    client.close()
    second = protector.connect()
    os.kill(int(worker.read_line().split()[1]), signal.SIGTERM)
    assert second.ask("hello") == "echo hello"
    second.close()
    protector.end_channel()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


def test_a_child_serves_while_its_parent_takes_the_next(protector: Protector) -> None:
    worker = protector.start("forks.py", "child serves")

    clients = [protector.connect() for _ in range(3)]
    pids = {client.ask("pid") for client in clients}

    assert len(pids) == 3
    assert str(worker.pid) not in pids
    for client in clients:
        client.close()
    protector.end_channel()
    assert (worker.read_last(), worker.wait()) == ("ended", 0)


def test_processes_that_share_a_listener_take_turns_and_all_end(protector: Protector) -> None:
    worker = protector.start("forks.py", "prefork")
    child = worker.read_line().split()[1]

    clients = [protector.connect() for _ in range(2)]
    pids = {client.ask("pid") for client in clients}
    assert pids == {str(worker.pid), child}

    waiting = protector.connect()
    clients[0].close()
    assert waiting.ask("pid") in pids
    protector.end_channel()
    clients[1].close()
    waiting.close()

    assert worker.read_rest() == ["child ended 0"]
    assert worker.wait() == 0
