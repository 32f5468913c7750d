"""Long connections end spread out: at a reload, at a stop, and where workers cannot do it."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import pytest

from tests.procfs import environment_of
from tests.running import Client, eventually
from tests.scenarios.adopting import kill_protector, revived
from tests.scenarios.operating import OBEYS, Operated, Operating
from tests.scenarios.tools import EITHER_HANDOFF, worker
from tests.unit.ctl.conftest import run

WORKER = (*OBEYS, "16")
CLIENTS = 8
FOR_HOURS = ("--drain-spread", "1h", "--stop-timeout", "1h")


def connected(one: Operated, stack: ExitStack, count: int = CLIENTS) -> list[Client]:
    clients = [stack.enter_context(Client(one.address)) for _ in range(count)]
    for each in clients:
        each.ask("x")
    return clients


def at_end(client: Client) -> None:
    """Read the end of a connection, and not a reset."""
    assert client.hear() == ""


@EITHER_HANDOFF
def test_a_replaced_generation_ends_its_connections(operated: Operating, handoff: str) -> None:
    one = operated("--handoff", handoff, "--drain-spread", "1s", command=WORKER)
    with ExitStack() as stack:
        clients = connected(one, stack)

        one.daemon.reload()

        for each in clients:
            at_end(each)
    one.daemon.log.wait_for('event=exited generation=1 .*how="exited with status 0"$')
    assert not one.daemon.log.count("event=signalled")
    assert not one.daemon.log.count("event=no-spread")
    one.daemon.stop()


@EITHER_HANDOFF
def test_a_stop_ends_them_and_a_reload_before_it_does_not(
    operated: Operating, handoff: str
) -> None:
    words = ("--handoff", handoff, "--stop-spread", "1s", "--stop-timeout", "1h")
    one = operated(*words, command=WORKER)
    with ExitStack() as stack:
        clients = connected(one, stack)
        one.daemon.reload()
        one.until_generation(1, phase="draining")
        assert [bool(each.ask("x")) for each in clients] == [True] * CLIENTS
        assert "closing" not in one.generation(1)

        one.daemon.stop()

        for each in clients:
            at_end(each)
    assert not one.daemon.log.count("event=signalled")


@pytest.mark.costly
def test_a_stop_shortens_a_spread_and_status_shows_how_far_it_is(operated: Operating) -> None:
    one = operated(*FOR_HOURS, "--stop-spread", "1s", command=WORKER)
    with ExitStack() as stack:
        clients = connected(one, stack)
        one.daemon.reload()
        eventually(lambda: "closing" in one.generation(1), "the spread")
        closing = one.generation(1)["closing"]
        assert 3000 < closing["left_s"] <= 3600
        assert closing["per_s"] == pytest.approx(CLIENTS / 3600, rel=0.5)
        shown = run("--control", str(one.path), "status")
        assert "generation 1: closing 0/min, 60 min left\n" in shown.out

        one.daemon.stop()

        for each in clients:
            at_end(each)
    assert not one.daemon.log.count("event=signalled")


@pytest.mark.costly
def test_a_killed_protector_changes_no_order(operated: Operating) -> None:
    one = operated("--guard", *FOR_HOURS, command=WORKER)
    with ExitStack() as stack:
        clients = connected(one, stack, 1)
        one.daemon.reload()
        eventually(lambda: "closing" in one.generation(1), "the spread")
        before = one.generation(1)["closing"]["left_s"]

        revived(one.daemon, kill_protector(one.daemon))

        eventually(lambda: bool(one.generation(1)), "the control socket")
        assert one.generation(1)["closing"]["left_s"] < before
        assert clients[0].ask("x").endswith("x")
    one.daemon.stop()


@pytest.mark.parametrize(
    ("words", "command"),
    [
        ((), worker("minimal")),
        (("--handoff", "listener"), worker("accepts")),
    ],
    ids=["connection", "listener"],
)
def test_other_workers_are_named_once(
    operated: Operating, words: tuple[str, ...], command: tuple[str, ...]
) -> None:
    one = operated(*words, "--drain-spread", "1s", "--workers", "2", command=command)

    one.daemon.log.wait_for("event=no-spread generation=1 workers=2 reason=")
    one.daemon.stop()
    assert one.daemon.log.count("event=no-spread") == 1


@pytest.mark.costly
def test_a_rolling_reload_ends_connections_worker_by_worker(operated: Operating) -> None:
    words = ("--reload-order", "rolling", "--drain-timeout", "1h", "--workers", "2")
    one = operated(*words, "--drain-spread", "2s", command=WORKER)
    with ExitStack() as stack:
        clients = connected(one, stack)

        one.daemon.reload()

        for each in clients:
            at_end(each)
    one.daemon.log.wait_for("event=reloaded generation=2")
    assert not one.daemon.log.count("event=signalled")
    one.daemon.stop()


def test_the_variables_are_only_there_if_it_is_switched_on(operated: Operating) -> None:
    one = operated("--stop-spread", "1500ms", command=(sys.executable, *WORKER[1:]))
    [pid] = one.pids(1)

    found = environment_of(pid)

    assert found["SOCKETPROTECTOR_STOP_SPREAD"] == "1.5"
    assert "SOCKETPROTECTOR_DRAIN_SPREAD" not in found
    one.daemon.stop()
