"""Workers that make room for another one: they hang, or have done enough.

Clients that connect meanwhile are served, and none is refused.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.load import Load
from tests.procfs import in_backlog
from tests.rounds import rounds
from tests.running import WORKERS, Client
from tests.scenarios.adopting import served, upgrade
from tests.scenarios.operating import (
    OBEYS,
    Line,
    Operated,
    Operating,
    nothing_of,
    pass_time,
    say_watchdog,
)
from tests.scenarios.tools import EITHER_HANDOFF, Gate, Release, hold, pid_in, spawned

ASYNCIO = (sys.executable, str(WORKERS / "asyncio_server.py"))


def in_order(web: Operated, *events: str) -> None:
    """See that the log has these, in this order."""
    web.daemon.log.wait_for(events[-1])
    lines = iter(list(web.daemon.log.seen))
    for event in events:
        assert any(event in line for line in lines), f"no {event} in its place"


def is_cut_off(client: Client) -> bool:
    """Wait for the end of a connection, which may be a reset."""
    try:
        return client.hear() == ""
    except ConnectionResetError:
        return True


# -- hanging ------------------------------------------------------------------------


def hangs(web: Operated, line: Line, hanging: Client, last: tuple[str, ...]) -> None:
    """One has been made to hang: see what becomes of it, and that others are served."""
    address = ("127.0.0.1", web.daemon.port)
    clients = [Client(address, "hello") for _ in range(20)]

    assert line.event("worker-stuck")["worker"] == 1
    new = line.event("spawned", worker=2)["pid"]
    for each in clients:  # it serves one at a time, too
        assert pid_in(each.hear()) == new
        each.close()

    assert is_cut_off(hanging)
    in_order(
        web,
        "event=worker-stuck worker=1",
        "event=replacing generation=1",
        "event=spawned generation=1 worker=2",
        "event=worker-ready generation=1 worker=2",
        *last,
    )
    assert in_backlog(web.daemon.port) == 0
    hanging.close()
    [crash] = line.ask("crashes")["crashes"]
    assert (crash["worker"], crash["when"]) == (1, "serving")
    assert crash["how"] in last[-1]
    assert web.status()["route"] == 1


def test_one_that_hangs_is_replaced_first_then_ended(operated: Operating) -> None:
    web = operated("--watchdog", "2s", "--kill-timeout", "60s", command=(*OBEYS, "1"))
    line = web.line(follows=True)
    say_watchdog(web.pids(1)[0])
    hanging = Client(web.address, "hang")

    last = (
        "event=signalled worker=1 signal=ABRT",
        'event=exited generation=1 worker=1 how="was killed by SIGABRT"',
    )
    hangs(web, line, hanging, last)


@EITHER_HANDOFF
@pytest.mark.costly
def test_one_that_hangs_with_its_first_client_is_replaced(operated: Operating) -> None:
    """As a bad release does: the library has spoken before it takes any client."""
    web = operated("--watchdog", "2s", command=(*OBEYS, "1"))
    line = web.line(follows=True)

    with Client(web.address, "hang") as hanging:
        assert line.event("worker-stuck")["worker"] == 1
        assert is_cut_off(hanging)


@pytest.mark.costly
def test_one_that_is_deaf_as_well_is_killed(operated: Operating) -> None:
    web = operated("--watchdog", "500ms", "--kill-timeout", "300ms", command=(*OBEYS, "1", "deaf"))
    line = web.line(follows=True)
    say_watchdog(web.pids(1)[0])
    hanging = Client(web.address, "hang")

    last = (
        "event=signalled worker=1 signal=ABRT",
        "event=signalled worker=1 signal=KILL",
        'event=exited generation=1 worker=1 how="was killed by SIGKILL"',
    )
    hangs(web, line, hanging, last)


def test_an_event_loop_that_is_blocked_hangs(operated: Operating, tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    release = Release(tmp_path / "daemon")
    release.becomes(*ASYNCIO, str(gate.path))  # the first handler blocks the loop
    web = operated(*("--watchdog", "2s", "--kill-timeout", "60s"), command=(str(release.path),))
    release.becomes(*ASYNCIO)
    line = web.line(follows=True)
    with Client(web.address, "hello") as hanging:
        assert line.event("worker-stuck")["worker"] == 1
        line.event("worker-ready", worker=2)
        with Client(("127.0.0.1", web.daemon.port), "hello") as client:
            assert pid_in(client.hear()) == spawned(web.daemon)[1]
        assert is_cut_off(hanging)
    assert line.event("exited", worker=1)["how"] == "was killed by SIGABRT"


@pytest.mark.parametrize("command", [(*OBEYS, "4"), ASYNCIO], ids=["threads", "asyncio"])
@pytest.mark.costly
def test_one_that_is_well_is_left_alone_idle_and_under_load(
    operated: Operating, command: tuple[str, ...]
) -> None:
    web = operated("--watchdog", "4s", command=command)
    line = web.line(follows=True)
    [pid] = web.pids(1)
    say_watchdog(pid)
    nothing_of(line, ["worker-stuck"], 5.0)

    with Load(f"127.0.0.1:{web.daemon.port}", concurrency=16) as load:
        served(load)
        nothing_of(web.line(follows=True), ["worker-stuck"], 5.0)
    assert load.snapshot().failures == ()
    assert web.pids(1) == [pid]


@pytest.mark.costly
@pytest.mark.parametrize("command", [(*OBEYS, "4"), ASYNCIO], ids=["threads", "asyncio"])
def test_one_that_drains_or_retires_does_not_hang_however_long_it_takes(
    operated: Operating, command: tuple[str, ...]
) -> None:
    web = operated("--watchdog", "4s", "--workers", "2", command=command)
    line = web.line(follows=True)
    for pid in web.pids(1):
        say_watchdog(pid)
    draining = [Client(web.address, "hello") for _ in range(4)]
    old = {pid_in(each.hear()) for each in draining}
    line.ask("reload")
    line.event("reloaded", generation=2)
    retiring = Client(web.address, "hello")
    pid = pid_in(retiring.hear())
    say_watchdog(pid)
    line.ask("replace", pid=pid)
    line.event("worker-ready", generation=2, worker=5)

    nothing_of(line, ["worker-stuck"], 5.0)

    assert {pid_in(each.ask()) for each in draining} == old
    assert pid_in(retiring.ask()) == pid
    for each in (*draining, retiring):
        each.close()


@pytest.mark.costly
def test_a_pool_whose_threads_are_all_busy_does_not_hang(operated: Operating) -> None:
    web = operated("--watchdog", "4s", command=(*OBEYS, "2"))
    line = web.line(follows=True)
    with Client(web.address, "hello") as one, Client(web.address, "hello") as another:
        pids = {pid_in(one.hear()), pid_in(another.hear())}
        say_watchdog(pids.pop())

        nothing_of(line, ["worker-stuck"], 5.0)

        assert pid_in(one.ask()) == pid_in(another.ask())


@pytest.mark.costly
def test_what_was_said_while_the_protector_stood_still_counts(operated: Operating) -> None:
    web = operated("--watchdog", "4s", command=(*OBEYS, "4"))
    line = web.line(follows=True)
    [pid] = web.pids(1)
    say_watchdog(pid)
    hold(web.daemon.pid)
    pass_time(5.0)  # the worker speaks, and the protector does not listen
    say_watchdog(pid)

    web.daemon.signal(signal.SIGCONT)

    nothing_of(line, ["worker-stuck"], 0.5)
    assert web.pids(1) == [pid]


@EITHER_HANDOFF
def test_a_worker_that_never_spoke_is_not_waited_for(operated: Operating) -> None:
    web = operated("--watchdog", "100ms")
    line = web.line(follows=True)
    [pid] = web.pids(1)
    hold(pid)

    nothing_of(line, ["worker-stuck"], 0.5)

    os.kill(pid, signal.SIGCONT)
    assert web.pids(1) == [pid]


@pytest.mark.costly
def test_that_one_has_spoken_is_known_after_an_upgrade(operated: Operating) -> None:
    web = operated("--watchdog", "500ms", "--kill-timeout", "100ms", command=(*OBEYS, "4"))
    [pid] = web.pids(1)
    say_watchdog(pid)
    assert "event=resumed" in upgrade(web.daemon)
    line = web.line(follows=True)

    os.kill(pid, signal.SIGSTOP)

    assert line.event("exited", worker=1)["how"] == "was killed by SIGKILL"
    in_order(web, "event=worker-stuck worker=1", "event=worker-ready generation=1 worker=2")


# -- doing enough ----------------------------------------------------------------------


def replaced(line: Line, count: int) -> list[dict[str, Any]]:
    """Wait until so many workers have left as they were asked to."""
    ended = [line.event("exited") for _ in range(count)]
    assert {each["how"] for each in ended} == {"exited with status 0"}
    assert not any("lost" in each for each in ended)
    return ended


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        (("--retire-after", "100+-30"), r"accepted \d+ connections \(limit: ([7-9]|1[0-3])\d\)"),
        (("--max-age", "1s"), "older than 1s"),
    ],
    ids=["connections", "age"],
)
@EITHER_HANDOFF
@pytest.mark.costly
def test_a_worker_that_has_done_enough_is_replaced_under_load_and_nothing_fails(
    operated: Operating, limit: tuple[str, ...], reason: str
) -> None:
    web = operated(*limit, "--workers", "2", command=(*OBEYS, "4"))
    line = web.line(follows=True)
    rate = rounds(200, 0) or None
    with Load(f"127.0.0.1:{web.daemon.port}", concurrency=8, rate_per_s=rate) as load:
        replaced(line, 4)
        assert "event=resumed" in upgrade(web.daemon)
        line = web.line(follows=True)
        mark = len(web.daemon.log.seen)
        # The first two may have been on their way out.
        web.daemon.log.wait_for(f'event=replacing generation=1 reason="{reason}"', after=mark)
        replaced(line, 2)
        served(load)
    assert load.snapshot().failures == ()
    found = web.status()
    assert (found["route"], found["crashes"], found["lost"] or 0) == (1, 0, 0)
    [generation] = found["generations"]
    assert generation["lost"] == 0
    assert web.daemon.log.count("event=signalled|event=not-counted") == 0


@EITHER_HANDOFF
def test_that_a_worker_does_not_count_is_said_once(operated: Operating) -> None:
    web = operated("--retire-after", "1", "--max-age", "3s", "--workers", "2")
    line = web.line(follows=True)

    assert "--retire-after has no effect" in web.daemon.log.wait_for("event=not-counted ")
    replaced(line, 2)

    assert web.daemon.log.count("event=not-counted") == 1
    assert web.daemon.log.count("event=replacing .*accepted") == 0


@EITHER_HANDOFF
def test_a_worker_that_has_grown_too_large_finishes_what_it_has_and_is_replaced(
    operated: Operating,
) -> None:
    web = operated("--max-memory", "64M", command=(*OBEYS, "4"))
    line = web.line(follows=True)
    with Client(web.address, "hello") as client:
        old = pid_in(client.hear())
        client.ask("grow")
        line.event("retired", worker=1)

        with Client(("127.0.0.1", web.daemon.port), "hello") as another:
            assert pid_in(another.hear()) == spawned(web.daemon)[1]
        assert pid_in(client.ask()) == old
    assert line.event("exited", worker=1)["how"] == "exited with status 0"
    web.daemon.log.wait_for(r"MiB resident \(limit: 64 MiB\)")


def test_a_limit_that_no_worker_keeps_is_a_warning_and_slows_down(operated: Operating) -> None:
    web = operated("--max-memory", "1M")
    line = web.line(follows=True)

    assert "--max-memory (1 MiB) within 5s" in line.event("limit-too-low")["hint"]

    (warning,) = web.status()["warnings"]
    assert "raise the limit; the next worker is replaced in " in warning


@EITHER_HANDOFF
def test_a_worker_that_cannot_be_asked_on_its_line_gets_term(operated: Operating) -> None:
    """Each in turn; by the time that the test hears of it the first one may be gone."""
    web = operated("--max-age", "500ms")
    line = web.line(follows=True)

    told = line.event("signalled")
    number = told["worker"]
    assert told["signal"] == "TERM"

    assert line.event("exited", worker=number)["how"] == "exited with status 0"
    in_order(
        web,
        "event=replacing generation=1",
        f"event=worker-ready generation=1 worker={number + 1}",
        f"event=signalled worker={number} signal=TERM",
    )
