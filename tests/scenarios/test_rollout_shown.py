"""What operators, programs and scrapes see of a rollout on real processes."""

from __future__ import annotations

from typing import Any

import pytest
from socketprotector_exporter.counters import Counters
from socketprotector_exporter.metrics import MetricSet
from socketprotector_exporter.web_model import Instance

from tests.running import Client, ask, eventually
from tests.scenarios.operating import Operated, Operating
from tests.scenarios.tools import EITHER_HANDOFF, library_worker, pid_in
from tests.unit.ctl.conftest import run

ECHO = library_worker("echo")
#: Has one connection at a time, so two clients are in two workers.
ONE_EACH = library_worker("echo", "1")
HALF = {"share": "50%", "for_s": 3600, "at_least": 2}


def told(one: Operated, command: str = "status") -> list[str]:
    """The lines of socketprotectorctl."""
    return run("--control", one.path, command).out.splitlines()


def metrics(status: dict[str, Any]) -> dict[str, float]:
    """Metric of a rollout -> value; of the stages the name of the present one."""
    series = MetricSet()
    series.add("web", status, Counters())
    samples = [each for family in series.families() for each in family.samples]
    return {
        each.labels.get("stage", each.name.removeprefix("socketprotector_rollout_")): each.value
        for each in samples
        if "rollout" in each.name and each.value
    }


def grey_lines(status: dict[str, Any]) -> list[str]:
    """What the page says on top of a card."""
    instance = Instance("web.control")
    instance.see(status, 0.0, 0.0)
    found: list[str] = instance.shown()["waits_for"]
    return found


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_canary_is_seen_from_its_share_to_its_verdict(operated: Operating, handoff: str) -> None:
    one = operated("--settle", "3600s", command=ECHO)
    line = one.line(follows=True)
    line.ask("reload", canary=HALF)
    shared = line.event("route", sharing=2)
    assert (shared["generation"], shared["share"]) == (1, "50%")

    [canary_pid] = one.pids(2)
    met = sum(pid_in(ask(one.address)) == canary_pid for _ in range(40))
    # Where workers accept, the kernel draws: that all go to one generation never happens.
    assert met == 20 if handoff == "connection" else 2 <= met < 40
    status = line.status()
    rollout = dict(status["rollout"])
    assert 0 < rollout.pop("left_s") <= 3600
    canary = {"generation": 2, "kind": "canary", "stage": "share", "share": 50.0}
    assert rollout == {**canary, "met": met, "at_least": 2}
    words = f"rollout: generation 2 gets 50% of new connections ({met} so far); it gets all in "
    assert [each.startswith(words) for each in told(one)[1:3]] == [True, False]
    assert grey_lines(status)[0].startswith(words)
    assert metrics(status) == {"share": 1, "share_ratio": 0.5, "connections": met}

    line.ask("promote")
    assert "sharing" not in line.event("route", generation=2)
    assert (line.status()["rollout"]["stage"], line.status()["rollout"]["share"]) == ("all", 100.0)
    line.ask("promote")
    reason = f"the canary had {met} connections at 50%"
    assert line.event("reloaded", "reload-failed")["reason"] == reason
    status = line.status()
    assert "rollout" not in status
    assert (status["reloads"][-1]["result"], status["reloads"][-1]["reason"]) == (
        "reloaded",
        reason,
    )
    assert told(one, "history")[-1].endswith(reason)

    line.ask("reload", canary=HALF)
    line.event("route", sharing=3)
    line.ask("rollback")
    assert "sharing" not in line.event("route", generation=2)
    reason = line.event("reloaded", "reload-failed")["reason"]
    assert reason.startswith("rolled back: ")
    assert told(one, "history")[-1].endswith(reason)
    assert "rollout" not in line.status()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_rolling_reload_names_the_worker_that_it_waits_for(operated: Operating) -> None:
    rolls = ("--reload-order", "rolling", "--surge", "1", "--drain-timeout", "3600s")
    one = operated(*rolls, "--workers", "2", command=ONE_EACH)
    line = one.line(follows=True)
    clients = {}
    for _ in range(2):
        client = Client(one.address)
        clients[client.ask().partition("]")[0]] = client
    [last] = [each for each in one.generation(1)["workers"] if each["slot"] == 1]
    line.ask("reload")
    eventually(lambda: bool(line.status().get("rollout", {}).get("waits_for")), "who it waits for")

    status = line.status()
    rollout = dict(status["rollout"])
    awaited: dict[str, Any] = dict(*rollout.pop("waits_for"))
    assert awaited.pop("oldest_s") >= 0
    assert awaited == {"worker": last["number"], "generation": 1, "active": 1}
    rolling = {"generation": 2, "kind": "rolling", "stage": "replacing", "left_s": None}
    assert rollout == {**rolling, "met": 0, "share": rollout["share"], "replaced": 1, "wanted": 2}
    words = f"rollout: 1 of 2 workers replaced, waiting for worker {last['number']} (1 connection, "
    assert [each.startswith(words) for each in told(one)[1:3]] == [True, False]
    assert grey_lines(status)[0].startswith(words)
    assert metrics(status) == {
        "replacing": 1,
        "share_ratio": rollout["share"] / 100,
        "workers_replaced": 1,
        "workers_awaited": 1,
    }

    for client in clients.values():
        client.close()
    line.event("reloaded")
    assert "rollout" not in line.status()
