"""The bugs of the other program that hands accepted connections to long-lived workers.

Node.js `cluster` does so since 2013; each test is named after the report it answers.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.load import Load
from tests.procfs import descriptors, in_backlog, wake_ups
from tests.rounds import rounds
from tests.running import Client, Protector, eventually
from tests.scenarios.tools import Release, hold, kinds_at_rest, no_more_open, spawned, worker

Start = Callable[..., Protector]


@pytest.mark.costly
def test_node_3551_no_request_is_lost_when_workers_restart(protector: Start) -> None:
    daemon = protector("--workers", "4", "127.0.0.1:0", "--", *worker("many")).ready()
    load = Load(f"127.0.0.1:{daemon.port}", concurrency=16).start()
    worker_number = 4

    for _ in range(rounds(2, 20)):  # one after the other, then all at once
        worker_number += 1
        mark = daemon.signal(signal.SIGTTIN)
        daemon.log.wait_for(f"event=worker-ready .*worker={worker_number}$", after=mark)
        mark = daemon.signal(signal.SIGTTOU)
        daemon.log.wait_for("event=exited", after=mark)
        daemon.reload()
        worker_number += 4

    load.wait_for(lambda now: len(now.pids) > 4)
    assert load.stop().failures == ()
    daemon.stop()


@pytest.mark.costly
def test_node_21746_nothing_stays_behind_in_a_queue_whose_workers_all_died(
    protector: Start, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*worker("many"))
    daemon = protector("--workers", "3", "127.0.0.1:0", "--", release.path).ready()
    before = kinds_at_rest(daemon)
    for pid in spawned(daemon):
        hold(pid)
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(100)]
    eventually(lambda: in_backlog(daemon.port) == 0, "all of them in the queue")
    release.path.unlink()
    for pid in spawned(daemon):
        os.kill(pid, signal.SIGKILL)
    # Later lines of that loop are withheld, for all workers of the generation together.
    eventually(lambda: daemon.log.count("cannot start") >= 5, "no worker comes after them")

    release.becomes(*worker("many"))
    daemon.reload()

    for number, client in enumerate(clients):
        assert client.hear().endswith(f" line {number}")
        client.close()
    no_more_open(before, daemon.pid)
    daemon.stop()


@pytest.mark.costly
def test_node_v0_8792_the_protector_survives_workers_that_crash_while_it_sends(
    protector: Start,
) -> None:
    daemon = protector("--workers", "2", "127.0.0.1:0", "--", *worker("many")).ready()
    load = Load(f"127.0.0.1:{daemon.port}", concurrency=32).start()

    for generation in range(1, 11):
        before = load.snapshot().connections
        load.wait_for(lambda now, least=before + 20: now.connections > least)  # type: ignore[misc]
        for pid in spawned(daemon, generation):
            os.kill(pid, signal.SIGKILL)
        daemon.reload()

    seen = load.stop()
    assert {failure.kind for failure in seen.failures} <= {"reset", "empty"}  # what they had taken
    assert daemon.process.poll() is None
    daemon.stop()


def test_node_v0_8746_a_busy_worker_fills_the_backlog_and_not_the_protector(
    protector: Start,
) -> None:
    daemon = protector("--queue", "16", "127.0.0.1:0", "--", *worker("in_order")).ready()
    (pid,) = spawned(daemon)
    hold(pid)
    kinds_at_rest(daemon)
    before = len(descriptors(daemon.pid))

    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(400)]
    eventually(lambda: len(descriptors(daemon.pid)) == before + 1, "a full queue, one undelivered")

    kinds_at_rest(daemon)
    woken = wake_ups(daemon.pid)
    more = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(400, 420)]
    assert in_backlog(daemon.port) > 350
    assert len(descriptors(daemon.pid)) <= before + 1  # the undelivered one
    # None is taken before there is room; the looks at whether a worker takes anything come twice
    # as late each time, so that the machine's pace does not matter.
    assert wake_ups(daemon.pid) - woken < len(more) / 2
    os.kill(pid, signal.SIGCONT)
    for number, client in enumerate(clients + more):
        assert client.hear() == f"[{pid}] line {number}, number {number + 1}"
        client.close()
    daemon.stop()


def test_node_v0_10427_no_client_is_refused_while_there_is_no_worker(
    protector: Start, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*worker("many"))
    daemon = protector("127.0.0.1:0", "--", release.path).ready()
    (pid,) = spawned(daemon)
    release.path.unlink()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: daemon.log.count("cannot start") >= 4, "no worker comes after it")

    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(50)]

    release.becomes(*worker("many"))  # found by the next try, without a reload
    for number, client in enumerate(clients):
        assert client.hear().endswith(f" line {number}")
        client.close()
    assert daemon.log.count("event=reloading") == 0
    daemon.stop()
