"""Metrics made of statuses: names, units, growing counts, and nothing for what is not known."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from socketprotector_exporter.counters import BUCKETS, Counters
from socketprotector_exporter.metrics import MetricSet

from tests.rounds import rounds
from tests.unit.ctl.fake import (
    awaited,
    canary,
    generation,
    listener,
    reload,
    rolling,
    status,
    worker,
)

#: Each metric's type, and its labels besides `instance`: stable (docs/compatibility.md).
STABLE = {
    "up": ("gauge", ()),
    "build": ("info", ()),
    "start_time_seconds": ("gauge", ()),
    "restarts": ("counter", ()),
    "phase": ("gauge", ("phase",)),
    "serving": ("gauge", ()),
    "held": ("gauge", ()),
    "lame_duck": ("gauge", ()),
    "healthy": ("gauge", ()),
    "health_failures": ("gauge", ()),
    "guarded": ("gauge", ()),
    "generations": ("gauge", ("phase",)),
    "workers": ("gauge", ("state",)),
    "child_processes": ("gauge", ()),
    "workers_wanted": ("gauge", ()),
    "rollout_stage": ("gauge", ("stage",)),
    "rollout_share_ratio": ("gauge", ()),
    "rollout_connections": ("gauge", ()),
    "rollout_workers_replaced": ("gauge", ()),
    "rollout_workers_awaited": ("gauge", ()),
    "release": ("info", ()),
    "release_is_current": ("gauge", ()),
    "worker_crashes": ("counter", ()),
    "connections_accepted": ("counter", ()),
    "connections_taken": ("counter", ()),
    "connections_finished": ("counter", ()),
    "connection_errors": ("counter", ()),
    "connections_lost": ("counter", ("by",)),
    "connections_active": ("gauge", ()),
    "queue_depth": ("gauge", ()),
    "queue_limit": ("gauge", ()),
    "backlog_depth": ("gauge", ("listener",)),
    "backlog_limit": ("gauge", ("listener",)),
    "wait_seconds": ("histogram", ()),
    "reloads": ("counter", ("result",)),
    "last_reload_successful": ("gauge", ()),
    "last_dry_run_successful": ("gauge", ()),
    "last_reload_success_timestamp_seconds": ("gauge", ()),
}


class Collected:
    """One instance, seen status by status, as a scrape would show it."""

    def __init__(self) -> None:
        self.totals = Counters()
        self.text = ""

    def see(self, told: dict[str, Any]) -> Collected:
        self.totals.see(told)
        series = MetricSet()
        series.add("web", told, self.totals)
        registry = CollectorRegistry()
        registry.register(_Once(list(series.families())))
        self.text = generate_latest(registry).decode()
        return self

    def value(self, name: str, **labels: str) -> float | None:
        wanted = {"instance": "web", **labels}
        found = [
            sample.value
            for family in text_string_to_metric_families(self.text)
            for sample in family.samples
            if sample.name == f"socketprotector_{name}" and sample.labels == wanted
        ]
        assert len(found) < 2
        return found[0] if found else None


class _Once:
    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families


def waits(**counts: int) -> dict[str, Any]:
    buckets = [0] * BUCKETS
    for place, count in counts.items():
        buckets[int(place[1:])] = count
    return {"count": sum(buckets), "p50": 1, "p99": 1, "buckets": buckets}


def test_no_metric_is_removed_or_changed() -> None:
    """A metric is only added: add it here, too."""
    made = {
        family.name.removeprefix("socketprotector_"): (
            family.type,
            (*family.__dict__["_labelnames"],),
        )
        for family in MetricSet().families()
    }
    assert made == {name: (kind, ("instance", *labels)) for name, (kind, labels) in STABLE.items()}


def test_a_status_becomes_metrics() -> None:
    seen = Collected().see(
        status(
            generation(7, "draining", worker(1), active=2, accepted=10, queue=0, lost=1),
            generation(
                8, "serving", worker(2), worker(3, state="starting"), active=5, accepted=30, queue=4
            ),
            restarts=2,
            forwarded=40,
            lost=1,
        )
    )

    assert seen.value("up") == 1
    assert seen.value("build_info", version="0.9.0") == 1
    assert seen.value("start_time_seconds") == 50
    assert seen.value("restarts_total") == 2
    assert seen.value("phase", phase="serving") == 1
    assert seen.value("phase", phase="reloading") == 0
    assert seen.value("generations", phase="draining") == 1
    assert seen.value("generations", phase="abandoned") == 0
    assert seen.value("workers", state="ready") == 2
    assert seen.value("workers", state="starting") == 1
    assert seen.value("connections_accepted_total") == 40
    assert seen.value("connections_taken_total") == 40
    assert seen.value("connections_active") == 7
    assert seen.value("connections_lost_total", by="worker") == 1
    assert seen.value("connections_lost_total", by="protector") == 1
    assert seen.value("queue_depth") == 4
    assert seen.value("queue_limit") == 278
    assert seen.value("backlog_depth", listener="tcp:0.0.0.0:4321") == 3
    assert seen.value("backlog_limit", listener="tcp:0.0.0.0:4321") == 4096
    assert seen.value("held") == 0
    assert seen.value("serving") == 1


def test_forked_children_are_counted() -> None:
    forked = worker(2, processes=[{"number": 0, "pid": 9}, {"number": 1, "pid": 10}])
    seen = Collected().see(status(generation(8, "serving", forked, worker(3))))

    assert seen.value("child_processes") == 2
    assert seen.value("workers", state="ready") == 2


def test_a_lame_duck_serves() -> None:
    seen = Collected().see(status(lame_duck="stopping", phase="stopping"))

    assert (seen.value("lame_duck"), seen.value("serving")) == (1, 1)
    assert Collected().see(status()).value("lame_duck") == 0


def test_a_rollout_has_a_stage_a_share_and_connections() -> None:
    none = Collected().see(status())
    stages = ("starting", "share", "all", "settling", "replacing")
    assert [none.value("rollout_stage", stage=each) for each in stages] == [0, 0, 0, 0, 0]
    for name in ("share_ratio", "connections", "workers_replaced", "workers_awaited"):
        assert none.value(f"rollout_{name}") is None

    seen = Collected().see(status(rollout=canary()))
    assert [seen.value("rollout_stage", stage=each) for each in stages] == [0, 1, 0, 0, 0]
    assert (seen.value("rollout_share_ratio"), seen.value("rollout_connections")) == (0.05, 1230)
    assert seen.value("rollout_workers_awaited") is None
    assert Collected().see(status(rollout=canary(met=None))).value("rollout_connections") is None

    rolls = Collected().see(status(rollout=rolling(awaited(5), awaited(6))))
    assert rolls.value("rollout_stage", stage="replacing") == 1
    assert rolls.value("rollout_workers_replaced") == 3
    assert rolls.value("rollout_workers_awaited") == 2
    assert Collected().see(status(rollout=rolling())).value("rollout_workers_awaited") == 0


def test_a_release_has_a_name_and_says_whether_a_restart_starts_it() -> None:
    assert Collected().see(status()).value("release_info", release="2") is None
    for current, value in (("2", 1), ("3", 0), (None, 0)):
        seen = Collected().see(status(releases={"serving": "2", "current": current}))
        assert seen.value("release_info", release="2") == 1
        assert seen.value("release_is_current") == value


def test_a_dry_run_counts_until_the_next_reload() -> None:
    def told(*reloads: dict[str, Any], result: str) -> float | None:
        seen = Collected().see(status(dry_run=reload(9, result), reloads=list(reloads)))
        return seen.value("last_dry_run_successful")

    before, after = reload(8, "reloaded"), reload(10, "running")
    assert (told(before, result="failed"), told(before, result="passed")) == (0, 1)
    assert (told(before, result="running"), told(before, after, result="failed")) == (None, None)
    assert Collected().see(status()).value("last_dry_run_successful") is None


def test_what_is_not_known_is_absent() -> None:
    unknown: dict[str, Any] = dict.fromkeys(("accepted", "active", "finished", "errors", "wait_us"))
    seen = Collected().see(
        status(
            generation(8, **unknown),
            listeners=[listener("a", backlog=None, backlog_limit=9)],
        )
    )

    for name in ("taken_total", "finished_total", "active"):
        assert seen.value(f"connections_{name}") is None
    assert seen.value("connection_errors_total") is None
    assert "wait_seconds" not in re.sub("#.*", "", seen.text)
    assert seen.value("backlog_depth", listener="a") is None
    assert seen.value("backlog_limit", listener="a") == 9
    assert seen.value("last_reload_success_timestamp_seconds") is None


def test_where_workers_accept_what_the_protector_would_count_is_absent() -> None:
    seen = Collected().see(
        status(generation(8, queue=None), forwarded=None, lost=None, queue_limit=None)
    )

    assert seen.value("connections_accepted_total") is None
    assert seen.value("connections_lost_total", by="protector") is None
    assert seen.value("queue_depth") is None
    assert seen.value("queue_limit") is None
    assert seen.value("connections_taken_total") == 120  # the client library counts there, too


def test_a_sum_is_absent_while_one_generation_that_has_served_does_not_count() -> None:
    def active(*generations: Any) -> float | None:
        return Collected().see(status(*generations)).value("connections_active")

    silent = generation(7, "draining", active=None)
    assert active(silent, generation(8, active=3)) is None
    assert active(generation(8, active=3), generation(9, "starting", active=None)) == 3
    assert active(generation(1, "starting", active=None)) is None


def test_the_wait_is_a_histogram_in_seconds() -> None:
    seen = Collected().see(status(generation(8, wait_us=waits(b0=1, b6=10, b31=2))))

    assert seen.value("wait_seconds_bucket", le="1e-06") == 1
    assert seen.value("wait_seconds_bucket", le="3.2e-05") == 1
    assert seen.value("wait_seconds_bucket", le="6.4e-05") == 11
    assert seen.value("wait_seconds_bucket", le="1073.741824") == 11
    assert seen.value("wait_seconds_bucket", le="+Inf") == 13


def test_counts_do_not_go_back_when_a_generation_is_gone() -> None:
    one = Collected()
    one.see(status(generation(7, accepted=100, lost=2, wait_us=waits(b3=5))))
    one.see(
        status(
            generation(7, "draining", accepted=110, lost=2, wait_us=waits(b3=6)),
            generation(8, accepted=5, wait_us=waits(b3=1)),
        )
    )
    one.see(status(generation(8, accepted=6, wait_us=waits(b3=2))))

    assert one.value("connections_taken_total") == 116
    assert one.value("connections_lost_total", by="worker") == 2
    assert one.value("wait_seconds_bucket", le="+Inf") == 8
    # A new protector counts its generations from the beginning.
    one.see(status(generation(8, accepted=1, opened_at=999.0, wait_us=None)))
    assert one.value("connections_taken_total") == 117
    assert one.value("wait_seconds_bucket", le="+Inf") == 8


def test_what_was_forwarded_does_not_go_back_when_a_protector_comes_back() -> None:
    collected = Collected()
    collected.see(status(forwarded=1000))

    after_a_kill = collected.see(status(forwarded=990, restarts=1))
    assert after_a_kill.value("connections_accepted_total") == 1000

    begun_anew = collected.see(status(forwarded=3, started_at=99.0))
    assert begun_anew.value("connections_accepted_total") == 3


def test_a_worker_that_counts_backwards_does_not_reduce_the_total() -> None:
    one = Collected()
    one.see(status(generation(7, accepted=100)))
    one.see(status(generation(7, accepted=3)))

    assert one.value("connections_taken_total") == 100


def ended(number: int, result: str) -> dict[str, Any]:
    ended_at = None if result == "running" else 10.0 * number + 1
    return {**reload(number, result), "began_at": 10.0 * number, "ended_at": ended_at}


def test_reloads_are_counted_by_result_once_each() -> None:
    one = Collected().see(status())
    assert one.value("reloads_total", result="failed") == 0
    assert one.value("last_reload_successful") is None

    all_of_them = [ended(n, "failed" if n % 3 == 0 else "reloaded") for n in range(1, 31)]
    for last in range(1, 31):
        shown = all_of_them[max(0, last - 10) : last]
        for _ in range(2):
            one.see(status(reloads=[*shown[:-1], ended(last, "running")]))
        for _ in range(2):
            one.see(status(reloads=shown))

    assert one.value("reloads_total", result="reloaded") == 20
    assert one.value("reloads_total", result="failed") == 10
    assert one.value("last_reload_successful") == 0
    assert one.value("last_reload_success_timestamp_seconds") == 291


def test_a_failed_reload_is_over_once_another_protector_runs() -> None:
    one = Collected().see(status(reloads=[ended(2, "failed")]))
    assert one.value("last_reload_successful") == 0

    one.see(status(started_at=99.0))
    assert one.value("last_reload_successful") is None
    assert one.value("reloads_total", result="failed") == 1


PLAIN = some.none() | some.booleans() | some.floats() | some.integers() | some.text(max_size=3)
NAMES = sorted({*status(), *generation(1), *canary(), *rolling()})
OBJECT = some.dictionaries(some.sampled_from(NAMES), PLAIN)
JUNK = PLAIN | OBJECT | some.lists(PLAIN | OBJECT, max_size=3)


@given(some.dictionaries(some.sampled_from(sorted([*status(), "rollout", "releases"])), JUNK))
@settings(max_examples=rounds(25, 100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_status_breaks_it(told: dict[str, Any]) -> None:
    seen = Collected().see({**status(), **told}).see({**status(), **told})

    list(text_string_to_metric_families(seen.text))


def test_no_label_grows_without_an_end() -> None:
    labels = {
        label
        for family in MetricSet().families()
        for label in family._labelnames  # type: ignore[attr-defined]
    }

    assert labels == {"instance", "phase", "stage", "state", "listener", "result", "by"}


@pytest.mark.parametrize("phase", ["serving", "no such phase"])
def test_a_phase_that_is_not_known_is_absent(phase: str) -> None:
    seen = Collected().see(status(phase=phase))

    assert seen.value("phase", phase="serving") == (1 if phase == "serving" else None)
