"""How many idle workers wake for a connection, and whose turn it is."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from tests import needs
from tests.channel import PYTHON, Channel, Worker
from tests.procfs import children_of, sleeps_in, wake_ups
from tests.running import ROOT, eventually

WORKERS = 6
ROUNDS = 60


def all_wait(workers: list[Worker]) -> None:
    def waits(worker: Worker) -> bool:
        return all("poll" in each for each in sleeps_in(worker.pid))

    eventually(lambda: all(waits(each) for each in workers), "all wait")


def served_by(channel: Channel) -> int:
    """Connect, hear which worker serves, and see the end of it."""
    client = channel.connect()
    who = client.hear()
    assert client.hear() == ""
    client.close()
    return int(who.partition("]")[0][1:])


def served_web(channel: Channel) -> int:
    """Ask for a page, and see the end of it."""
    client = channel.connect()
    client.say("GET / HTTP/1.0\r\n\r")
    while not (said := client.hear()).startswith("["):
        assert said
    assert client.hear() == ""
    client.close()
    return int(said.partition("]")[0][1:])


def serving(worker: Worker) -> list[int]:
    """The processes that accept: those that have no children."""
    found = [worker.pid]
    for pid in found:
        found += children_of(pid)
    return found[1:] or found


def _needs(package: str) -> None:
    needs.module(package)
    if sys.executable != PYTHON:
        needs.skip(f"{package} in another Python")


@pytest.mark.parametrize("way", ["trio", "anyio", "anyio-trio", "gevent"])
@pytest.mark.costly
def test_one_idle_worker_wakes_under_loops_that_wait_in_ways_of_their_own(
    channel: Channel, way: str
) -> None:
    _needs(way.partition("-")[2] or way)
    test_one_idle_worker_wakes_for_a_connection_and_they_take_turns(channel, way)


@pytest.mark.parametrize(
    ("way", "package"),
    [("waitress", "waitress"), ("gunicorn", "gunicorn"), ("gthread", "gunicorn")],
)
@pytest.mark.costly
def test_a_web_server_that_is_idle_sleeps_while_another_one_serves(
    channel: Channel, way: str, package: str
) -> None:
    _needs(package)
    command = (PYTHON, ROOT / "bench" / "herd.py", way, "0")
    forks = {"HERD_PROCESSES": "1"}
    # Of gunicorn's it is a child that says READY=1.
    start = channel.start if way == "waitress" else channel.spawn
    workers = [start(*command, env=forks) for _ in range(WORKERS)]

    seen: set[int] = set()

    def all_have_served() -> bool:
        seen.add(served_web(channel))
        return len(seen) == WORKERS

    eventually(all_have_served, "all serve")
    processes = [pid for worker in workers for pid in serving(worker)]
    assert set(processes) == seen
    others = 0
    shares: Counter[int] = Counter()
    for _ in range(ROUNDS):
        before = {pid: wake_ups(pid) for pid in processes}
        served = served_web(channel)
        shares[served] += 1
        others += sum(wake_ups(pid) - before[pid] for pid in processes if pid != served)

    # All of them woke for each before.  Each looks around once a second, too.
    assert others < ROUNDS * (WORKERS - 1) / 2
    assert len(shares) == WORKERS


@pytest.mark.costly
@pytest.mark.parametrize("way", ["connections", "blocking", "listener", "aserve", "serve"])
def test_one_idle_worker_wakes_for_a_connection_and_they_take_turns(
    channel: Channel, way: str
) -> None:
    command = (PYTHON, ROOT / "bench" / "herd.py", way, "0")
    workers = [channel.start(*command) for _ in range(WORKERS)]
    for _ in range(3 * WORKERS):
        served_by(channel)
    all_wait(workers)
    before = sum(wake_ups(each.pid) for each in workers)

    shares: Counter[int] = Counter()
    for _ in range(ROUNDS):
        shares[served_by(channel)] += 1
        all_wait(workers)  # on a busy machine one may be long on its way back

    # All of them would be WORKERS * ROUNDS; on a busy machine one may also wait for a lock.
    assert sum(wake_ups(each.pid) for each in workers) - before <= 2 * ROUNDS
    assert max(shares.values()) <= 1.5 * ROUNDS / WORKERS


@pytest.mark.parametrize("way", ["connections", "blocking", "listener", "aserve"])
def test_a_worker_at_its_limit_is_not_woken_in_the_place_of_an_idle_one(
    channel: Channel, way: str
) -> None:
    workers = [
        channel.start(PYTHON, ROOT / "bench" / "herd.py", way, "0", "hold") for _ in range(3)
    ]

    clients = [channel.connect() for _ in workers]
    served = {client.hear().partition("]")[0][1:] for client in clients}

    assert served == {str(worker.pid) for worker in workers}
