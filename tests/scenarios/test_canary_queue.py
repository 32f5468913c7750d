"""A canary where the protector accepts: its share is exact, and it costs no client."""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from tests.rounds import rounds
from tests.running import Client, ask
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.operating import Line, Operated, Operating
from tests.scenarios.running_ctl import Running

#: So long that no time ends a canary.
LONG = "1h"


@pytest.fixture
def web(operated: Operating) -> Operated:
    """Two workers, and two listeners."""
    return operated("--workers", "2", "127.0.0.1:0")


@pytest.fixture
def canary(web: Operated) -> Iterator[Callable[[str], Running]]:
    """Begin a canary with this share, as generation 2."""
    started: list[Running] = []

    def start(share: str) -> Running:
        words = ("reload", "--canary", share, "--for", LONG)
        started.append(Running("--control", str(web.path), *words))
        web.daemon.log.wait_for(rf"event=route\b.* sharing=2 share={share}")
        return started[-1]

    yield start
    for each in started:
        each.end()


def pid_of(answer: str) -> int:
    found = re.match(r"\[(\d+)\] ", answer)
    assert found, answer
    return int(found[1])


def generations(web: Operated, count: int) -> list[int]:
    """Connect so many clients, to one listener after the other; return who served each."""
    of = {pid: number for number in (1, 2) for pid in web.pids(number)}
    at = web.addresses
    return [of[pid_of(ask(at[n % len(at)]))] for n in range(count)]


def test_one_of_twenty_connections_over_two_listeners(
    web: Operated, canary: Callable[[str], Running]
) -> None:
    reload = canary("5%")

    hundreds = rounds(2, 20)
    found = Counter(generations(web, 100 * hundreds))

    assert found == {1: 95 * hundreds, 2: 5 * hundreds}
    with Line(web.path) as line:
        line.ask("promote", now=True)
    assert reload.wait() == 0
    assert {*generations_of_serving(web, 20)} == {2}


def generations_of_serving(web: Operated, count: int) -> list[int]:
    of = dict.fromkeys(web.pids(2), 2)
    at = web.addresses
    return [of.get(pid_of(ask(at[n % len(at)])), 1) for n in range(count)]


@pytest.mark.costly
def test_a_canary_whose_workers_are_stopped_is_returned_and_no_client_is_lost(
    web: Operated, canary: Callable[[str], Running]
) -> None:
    old, at = web.pids(1), web.addresses
    reload = canary("50%")
    stopped = web.pids(2)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        clients = [Client(at[n % 2], "hello") for n in range(10)]
        assert {pid_of(each.hear()) for each in clients} <= {*old}
        assert reload.wait() == 3
        assert {pid_of(ask(at[0])) for _ in range(10)} <= {*old}
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    for each in clients:
        each.close()

    assert "no worker has accepted a connection yet" in reload.err.text()
    assert web.status()["route"] == 1


@pytest.mark.parametrize("settle", ["2s", "100ms"])
@pytest.mark.costly
def test_a_canary_whose_workers_stop_after_its_share_is_returned_too(
    operated: Operating, settle: str
) -> None:
    """All clients come to its queue: the old generation gets them from there."""
    web = operated("--workers", "2", "--settle", settle)
    old = web.pids(1)
    with Line(web.path) as line:
        line.ask("reload", canary={"share": "50%", "for_s": 3600})
    web.daemon.log.wait_for(r"event=route\b.* sharing=2 share=50%")
    stopped = web.pids(2)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    clients = [Client(web.address, "hello") for _ in range(4)]
    with Line(web.path) as line:
        line.ask("promote")
    web.daemon.log.wait_for(r"event=route generation=2\b")
    clients += [Client(web.address, "hello") for _ in range(4)]
    try:
        web.daemon.log.wait_for(r"event=reload-failed generation=2\b.*no worker has accepted a")
        assert {pid_of(each.hear()) for each in clients} <= {*old}
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    for each in clients:
        each.close()


@pytest.mark.parametrize("way", ["USR2", "killed"])
@pytest.mark.costly
def test_a_canary_goes_on_in_the_next_program(operated: Operating, way: str) -> None:
    web = operated(*(["--guard"] if way == "killed" else []), "--workers", "2", "127.0.0.1:0")
    with Line(web.path) as line:
        line.ask("reload", canary={"share": "20%", "for_s": 3600})
    web.daemon.log.wait_for(r"event=route\b.* sharing=2 share=20%")
    assert Counter(generations(web, 50)) == {1: 40, 2: 10}
    mark = len(web.daemon.log.seen)
    if way == "killed":
        revived(web.daemon, kill_protector(web.daemon))
    else:
        assert "resumed" in upgrade(web.daemon)
    web.daemon.log.wait_for(r"event=route\b.* sharing=2 share=20%", after=mark)
    assert Counter(generations(web, 50)) == {1: 40, 2: 10}

    with Line(web.path) as line:
        line.ask("rollback")
    web.daemon.log.wait_for(r"event=reload-failed\b", after=mark)
    pids = {*web.pids(1)}
    assert {pid_of(ask(web.address)) for _ in range(10)} <= pids
