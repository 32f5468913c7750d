"""`systemctl restart` refuses nobody: listeners stay in systemd's store over a stop in order.

systemd's part is played by the test (test_store.py); with the real one: `make test-vm`.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.load import Load
from tests.rounds import rounds
from tests.running import eventually
from tests.scenarios.test_store import MANY, Service
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    Client,
    hold,
    spawned,
    worker,
)

ROUNDS = rounds(8, 100)
LISTENER = ("--handoff", "listener", "--ready", "notify")
ACCEPTS = worker("accepts")


@pytest.fixture
def service(tmp_path: Path, marked_environment: dict[str, str]) -> Iterator[Service]:
    made = Service(tmp_path, {**marked_environment, "INVOCATION_ID": "of a unit"})
    yield made
    made.close()


def words_of(handoff: str, *listens: str | Path) -> tuple[str | Path, ...]:
    """The same daemon either way."""
    if handoff == "listener":
        return (*LISTENER, *listens, "--", *ACCEPTS)
    return (*listens, "--", *MANY)


def serves(service: Service) -> None:
    service.wait_for("READY")


def refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


@EITHER_HANDOFF
def test_twenty_restarts_under_load_refuse_and_reset_nobody(
    service: Service, handoff: str, free_port: Callable[[], int]
) -> None:
    port = free_port()
    words = words_of(handoff, f"127.0.0.1:{port}")
    service.start(*words)
    serves(service)
    with Load(f"127.0.0.1:{port}", concurrency=4) as load:
        for _ in range(ROUNDS):
            finished = load.snapshot().connections
            load.wait_for(lambda now, before=finished: now.connections > before + 5)  # type: ignore[misc]
            service.restart(*words)
            serves(service)
    seen = load.snapshot()
    service.stop()

    print(f"{seen.connections} connections over {len(service.started) - 1} restarts")
    assert seen.failures == ()
    assert refused(port)
    assert not service.store


@EITHER_HANDOFF
def test_who_came_before_the_stop_is_served_by_the_old_and_who_comes_later_by_the_next(
    service: Service, handoff: str, free_port: Callable[[], int]
) -> None:
    port = free_port()
    words = words_of(handoff, f"127.0.0.1:{port}")
    first = service.start(*words)
    serves(service)
    [old] = spawned(first)
    hold(old)  # so that who connects now is still in the queue at the stop
    before = [Client(("127.0.0.1", port), f"before {number}") for number in range(3)]
    mark = first.signal(signal.SIGTERM)
    service.wait_for("STOPPING")
    if handoff == "connection":
        first.log.wait_for("event=drained|event=route|connections", after=0)
    eventually(lambda: "sp.listener.0" in service.store, "the listener in the store")
    later = [Client(("127.0.0.1", port), f"later {number}") for number in range(3)]
    os.kill(old, signal.SIGCONT)

    for number, client in enumerate(before):
        assert client.hear() == f"[{old}] before {number}"
        client.close()
    assert first.wait() == 0, mark
    service.said.clear()
    second = service.start(*words)
    serves(service)
    [new] = spawned(second)
    for number, client in enumerate(later):
        assert client.hear() == f"[{new}] later {number}"
        client.close()
    service.stop()
