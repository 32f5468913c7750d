"""How many idle workers wake for a connection, and whose turn it is."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.client.protector import PYTHON, ROOT, Protector, Worker, until

WORKERS = 6
ROUNDS = 60


def sleeps(worker: Worker) -> int:
    """How often the threads of a worker went to sleep, and so were woken."""
    found = 0
    for task in Path(f"/proc/{worker.pid}/task").iterdir():
        status = (task / "status").read_text()
        found += int(re.findall(r"^voluntary_ctxt_switches:\t(\d+)", status, re.M)[0])
    return found


def all_wait(workers: list[Worker]) -> None:
    def waits(worker: Worker) -> bool:
        threads = Path(f"/proc/{worker.pid}/task").iterdir()
        return all("poll" in (thread / "wchan").read_text() for thread in threads)

    until(lambda: all(waits(each) for each in workers), "all wait")


def served_by(protector: Protector) -> int:
    """Connect, hear who serves, and see the end of it."""
    client = protector.connect()
    who = client.read()
    assert client.read() == ""
    client.close()
    return int(who.partition("]")[0][1:])


def served_web(protector: Protector) -> int:
    """Ask for a page, and see the end of it."""
    client = protector.connect()
    client.send("GET / HTTP/1.0\r\n\r")
    while not (said := client.read()).startswith("["):
        assert said
    assert client.read() == ""
    client.close()
    return int(said.partition("]")[0][1:])


def serving(worker: Worker) -> list[int]:
    """The processes that accept: those that have no children."""
    found = [worker.pid]
    for pid in found:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found += map(int, children)
    return found[1:] or found


@pytest.mark.parametrize("way", ["trio", "anyio", "anyio-trio", "gevent"])
def test_one_idle_worker_wakes_under_loops_that_wait_in_ways_of_their_own(
    protector: Protector, way: str
) -> None:
    pytest.importorskip(way.partition("-")[2] or way)
    test_one_idle_worker_wakes_for_a_connection_and_they_take_turns(protector, way)


@pytest.mark.parametrize(
    ("way", "needs"),
    [("waitress", "waitress"), ("gunicorn", "gunicorn"), ("gthread", "gunicorn")],
)
def test_a_web_server_that_is_idle_sleeps_while_another_one_serves(
    protector: Protector, way: str, needs: str
) -> None:
    pytest.importorskip(needs)
    command = (PYTHON, ROOT / "bench" / "herd.py", way, "0")
    forks = {"HERD_PROCESSES": "1"}
    # Of gunicorn's it is a child that says READY=1.
    start = protector.start if way == "waitress" else protector.spawn
    workers = [start(*command, env=forks) for _ in range(WORKERS)]

    def slept(pid: int) -> int:
        status = Path(f"/proc/{pid}/status").read_text()
        return int(re.findall(r"^voluntary_ctxt_switches:\t(\d+)", status, re.M)[0])

    seen: set[int] = set()

    def all_have_served() -> bool:
        seen.add(served_web(protector))
        return len(seen) == WORKERS

    until(all_have_served, "all serve")
    processes = [pid for worker in workers for pid in serving(worker)]
    assert set(processes) == seen
    others = 0
    shares: Counter[int] = Counter()
    for _ in range(ROUNDS):
        before = {pid: slept(pid) for pid in processes}
        served = served_web(protector)
        shares[served] += 1
        others += sum(slept(pid) - before[pid] for pid in processes if pid != served)

    # Each looks around once a second, too.  All of them woke for each before.
    assert others < ROUNDS
    assert len(shares) == WORKERS


@pytest.mark.parametrize("way", ["connections", "blocking", "listener", "aserve", "serve"])
def test_one_idle_worker_wakes_for_a_connection_and_they_take_turns(
    protector: Protector, way: str
) -> None:
    command = (PYTHON, ROOT / "bench" / "herd.py", way, "0")
    workers = [protector.start(*command) for _ in range(WORKERS)]
    for _ in range(3 * WORKERS):
        served_by(protector)
    all_wait(workers)
    before = sum(map(sleeps, workers))

    shares: Counter[int] = Counter()
    for _ in range(ROUNDS):
        shares[served_by(protector)] += 1
        all_wait(workers)  # on a busy machine one may be long on its way back

    assert sum(map(sleeps, workers)) - before <= 1.2 * ROUNDS
    assert max(shares.values()) <= 1.5 * ROUNDS / WORKERS


@pytest.mark.parametrize("way", ["connections", "blocking", "listener", "aserve"])
def test_who_is_at_its_limit_is_not_woken_in_the_place_of_an_idle_one(
    protector: Protector, way: str
) -> None:
    workers = [
        protector.start(PYTHON, ROOT / "bench" / "herd.py", way, "0", "hold") for _ in range(3)
    ]

    clients = [protector.connect() for _ in workers]
    served = {client.read().partition("]")[0][1:] for client in clients}

    assert served == {str(worker.pid) for worker in workers}
