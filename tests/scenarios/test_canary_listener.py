"""A canary where workers accept: the kernel draws its share, and it costs no client."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.load import Load
from tests.rounds import rounds
from tests.running import Client, ask, eventually
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.operating import Line, Operated, Operating
from tests.scenarios.probed import get
from tests.scenarios.tools import Release, library_worker, worker

MODE = ("--handoff", "listener", "--ready", "notify", "--workers", "2")
SERVERS = {"asyncio": worker("asyncio_accepts"), "library": library_worker("asyncio_server")}
#: A draw fails once in 30,000 times; a share that is 0 always does.
SIGMAS = 4.5
#: Take-backs under load.
TAKE_BACKS = rounds(2, 20)
#: In percent, and how many clients it is drawn from: a share that is 0 has to fail.
SHARE, CONNECTIONS = rounds(20, 5), rounds(120, 2000)
#: Of clients from which a fifth is drawn.
DRAWS = rounds(100, 300)


def pid_of(answer: str) -> int:
    found = re.match(r"\[(\d+)\] ", answer)
    assert found, answer
    return int(found[1])


def begin(web: Operated, share: str) -> int:
    """Begin a canary with this share; return the log's length before it."""
    mark = len(web.daemon.log.seen)
    with Line(web.path) as line:
        line.ask("reload", canary={"share": share, "for_s": 3600})
    web.daemon.log.wait_for(rf"event=route\b.* sharing=\d+ share={share}", after=mark)
    return mark


def order(web: Operated, command: str, event: str, **arguments: bool) -> None:
    """Order the end of a canary, and wait for the verdict."""
    mark = len(web.daemon.log.seen)
    with Line(web.path) as line:
        line.ask(command, **arguments)
    web.daemon.log.wait_for(rf"event={event}\b", after=mark)


def generations(web: Operated, count: int, *numbers: int) -> Counter[int]:
    """Connect so many clients; return how many each of these generations has served."""
    of = {pid: number for number in numbers for pid in web.pids(number)}
    address = web.address  # which asks for the status
    return Counter(of[pid_of(ask(address))] for _ in range(count))


def is_about(found: int, count: int, share: float) -> bool:
    """Return whether the kernel may have drawn so many."""
    sigma = math.sqrt(count * share * (1 - share))
    return abs(found - count * share) < SIGMAS * sigma


@pytest.mark.costly
@pytest.mark.parametrize("server", SERVERS)
def test_a_share_of_all_connections_within_chance(operated: Operating, server: str) -> None:
    web = operated(*MODE, command=SERVERS[server])
    begin(web, f"{SHARE}%")
    found = generations(web, CONNECTIONS, 1, 2)
    assert is_about(found[2], CONNECTIONS, SHARE / 100), found

    order(web, "promote", "reloaded", now=True)
    assert generations(web, 50, 2) == {2: 50}
    begin(web, "50%")
    assert is_about(generations(web, 100, 2, 3)[3], 100, 0.5)
    order(web, "rollback", "reload-failed")
    assert generations(web, 50, 2) == {2: 50}


@pytest.mark.parametrize("way", ["USR2", "killed"])
@pytest.mark.costly
def test_a_canary_goes_on_in_the_next_program(operated: Operating, way: str) -> None:
    guard = ["--guard"] if way == "killed" else []
    web = operated(*guard, *MODE, command=SERVERS["asyncio"])
    begin(web, "20%")
    mark = len(web.daemon.log.seen)
    if way == "killed":
        revived(web.daemon, kill_protector(web.daemon))
    else:
        assert "resumed" in upgrade(web.daemon)
    web.daemon.log.wait_for(r"event=route\b.* sharing=2 share=20%", after=mark)
    found = generations(web, DRAWS, 1, 2)
    assert is_about(found[2], DRAWS, 0.2), found

    order(web, "rollback", "reload-failed")
    assert generations(web, 20, 1) == {1: 20}


@pytest.mark.parametrize("server", SERVERS)
def test_no_client_is_lost_when_a_canary_is_taken_back(operated: Operating, server: str) -> None:
    web = operated(*MODE, command=SERVERS[server])
    with Load(f"127.0.0.1:{web.address[1]}") as load:
        for number in range(TAKE_BACKS):
            begin(web, "50%")
            canary = {*web.pids(number + 2)}
            load.wait_for(lambda now, pids=canary: pids <= now.pids.keys())  # type: ignore[misc]
            order(web, "rollback", "reload-failed")
            web.daemon.log.wait_for(rf"event=drained generation={number + 2}\b")
    assert load.snapshot().failures == ()


@pytest.mark.costly
def test_clients_of_a_canary_whose_workers_are_stopped_are_served(operated: Operating) -> None:
    """They wait at its socket: a generation of the last good command starts there."""
    web = operated(*MODE, "--kill-timeout", "2s", command=SERVERS["asyncio"])
    mark = begin(web, "50%")
    stopped = web.pids(2)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    clients = [Client(web.address, "hello") for _ in range(20)]
    web.daemon.log.wait_for(r"event=reload-failed\b.*no worker has accepted", after=mark)
    pids = {pid_of(each.hear()) for each in clients}
    assert pids.isdisjoint(stopped)
    for each in clients:
        each.close()


@pytest.mark.costly
def test_a_canary_whose_workers_stop_after_its_share_is_returned_too(operated: Operating) -> None:
    """--settle is over at once, but not while clients wait in vain."""
    web = operated(*MODE, "--settle", "100ms", "--kill-timeout", "2s", command=SERVERS["asyncio"])
    mark = begin(web, "50%")
    stopped = web.pids(2)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    clients = [Client(web.address, "hello") for _ in range(20)]
    with Line(web.path) as line:
        line.ask("promote")
    said = web.daemon.log.wait_for(r"event=(reloaded|reload-failed)\b", after=mark)
    assert "event=reload-failed" in said
    assert "no worker has accepted a connection" in said
    assert {pid_of(each.hear()) for each in clients}.isdisjoint(stopped)
    # Their rescue has not waited until the stopped workers accept.
    assert not web.daemon.log.count("event=not-accepted")
    for each in clients:
        each.close()


#: A worker on the client library that answers HTTP.
ANSWERS = """
import os
from socketprotector_client import serve
def answer(one, address):
    with one:
        one.recv(65536)
        one.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n[%d]" % os.getpid())
serve(answer, threads=8)
"""
#: A check that makes a connection of its own.
CONNECTS = "exec 3<>/dev/tcp/${SOCKETPROTECTOR_PROBE/://} && echo hello >&3 && head -c 1 <&3"


@pytest.mark.parametrize("check", ["http:/healthz", f"check:bash -c '{CONNECTS}'"])
def test_the_checks_of_a_canary_do_not_count_as_its_clients(
    operated: Operating, check: str
) -> None:
    """Otherwise they would satisfy --at-least."""
    words = ("--ready", "http:/healthz", "--settle", "1h", "--settle-check", check)
    web = operated(*MODE[:2], *words, command=(sys.executable, "-c", ANSWERS))
    begin(web, "50%")

    def is_probed() -> bool:
        status = web.status()
        [canary] = [each for each in status["generations"] if each["number"] == 2]
        # At most one probe has been accepted, but not reported yet.
        return bool(canary["accepted"] >= 3 and status["rollout"]["met"] == 0)

    eventually(is_probed, "probes that do not count")
    old = get(web.address[1])
    eventually(lambda: get(web.address[1]) != old, "a client in the canary")
    eventually(lambda: web.status()["rollout"]["met"] >= 1, "a client that counts")
    order(web, "rollback", "reload-failed")


@pytest.mark.costly
def test_a_canary_that_accepts_at_one_listener_alone_reads_from_its_clients_there(
    operated: Operating, tmp_path: Path
) -> None:
    release, gate = Release(tmp_path / "daemon"), tmp_path / "gate"
    release.becomes(*SERVERS["asyncio"])
    web = operated(*MODE, "--kill-timeout", "2s", "127.0.0.1:0", command=(release.path,))
    release.becomes(*worker("accepts_first", str(gate)))
    mark = begin(web, "50%")
    release.becomes(*SERVERS["asyncio"])  # for the clients that the canary leaves
    first, second = web.addresses
    there = [Client(first, "hello") for _ in range(20)]
    elsewhere = [Client(second, "hello") for _ in range(20)]
    web.daemon.log.wait_for(r"event=reload-failed\b.*no worker has accepted", after=mark)
    canary = {*web.pids(2)}
    gate.touch()
    assert {pid_of(each.hear()) for each in there} & canary
    assert {pid_of(each.hear()) for each in elsewhere}.isdisjoint(canary)
    for each in there + elsewhere:
        each.close()
