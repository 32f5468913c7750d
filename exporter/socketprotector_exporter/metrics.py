"""The metrics, and their values from a status.

Names and units follow Prometheus: base units, counters end in _total.  Labels are instances,
listeners, phases, states and results.  Pids and generations are no labels, so there are few series.
docs/metrics.md lists the metrics, and a test compares the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily as Total
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import HistogramMetricFamily as Histogram
from prometheus_client.core import InfoMetricFamily as Info
from prometheus_client.core import Metric

from socketprotector.ctl.api import (
    Status,
    is_lame_duck,
    label,
    listed,
    measure,
    rollout_of,
    serves,
    valid_dry_run,
)

from .counters import BUCKETS, RESULTS, Counters

PHASES = ("starting", "serving", "reloading", "settling", "stopping", "waiting")
GENERATION_PHASES = ("starting", "settling", "serving", "draining", "abandoned")
STAGES = ("starting", "share", "all", "settling", "replacing")
STATES = ("starting", "ready", "retiring", "orphaned", "waiting")
#: Phases in which a generation has no connections, so that its unknown count is no gap in a sum.
_WITHOUT_CONNECTIONS = ("starting", "abandoned")
_INSTANCE = "instance"
#: The buckets' upper bounds in seconds; the last bucket has none.
_BOUNDS = [*(str(2**n / 1_000_000) for n in range(BUCKETS - 1)), "+Inf"]


#: Kind, name, meaning, labels besides `instance`.
_FAMILIES: tuple[tuple[Any, ...], ...] = (
    (Gauge, "up", "1 if the instance answered"),
    (Info, "build", "`version` of the protector."),
    (Gauge, "start_time_seconds", "When the instance was started, since the epoch."),
    (Total, "restarts", "Restarts of SocketProtector, after a crash or by an upgrade."),
    (Gauge, "phase", "1 for the current phase.", "phase"),
    (Gauge, "serving", "1 if a generation gets new connections, or will after a hold."),
    (Gauge, "held", "1 during a hold: no connection is accepted."),
    (
        Gauge,
        "lame_duck",
        "1 if the instance serves, but load balancers should send clients elsewhere.",
    ),
    (Gauge, "healthy", "1 if the serving generation passes --health, 0 if it fails."),
    (Gauge, "health_failures", "Failed health checks since the last passed one."),
    (Gauge, "guarded", "1 under --guard."),
    (Gauge, "generations", "Generations in each phase.", "phase"),
    (Gauge, "workers", "Workers in each state, of all generations.", "state"),
    (Gauge, "child_processes", "Forked children of workers."),
    (Gauge, "workers_wanted", "Workers that the serving generation should have."),
    (Gauge, "rollout_stage", "1 for the stage of the rollout in progress.", "stage"),
    (Gauge, "rollout_share_ratio", "Share of new connections for the new generation, 0 to 1."),
    (Gauge, "rollout_connections", "New connections that the new generation has got."),
    (Gauge, "rollout_workers_replaced", "Workers that a rolling reload has replaced."),
    (
        Gauge,
        "rollout_workers_awaited",
        "Workers that drain; one of them must end before the next worker starts.",
    ),
    (Info, "release", "The `release` that is serving."),
    (Gauge, "release_is_current", "1 if a restart would start the serving release, 0 if not."),
    (Total, "worker_crashes", "Workers that ended unexpectedly."),
    (Total, "connections_accepted", "Connections that SocketProtector accepted."),
    (Total, "connections_taken", "Connections that workers have taken."),
    (Total, "connections_finished", "Connections that workers have finished or lost."),
    (Total, "connection_errors", "Connections whose handler failed."),
    (
        Total,
        "connections_lost",
        "Connections lost by the `protector`, or open in a `worker` that died.",
        "by",
    ),
    (Gauge, "connections_active", "Connections that workers have open."),
    (Gauge, "queue_depth", "Connections sent to workers and not yet taken."),
    (Gauge, "queue_limit", "Connections that fit in the queue."),
    (Gauge, "backlog_depth", "Connections that wait in the kernel.", "listener"),
    (Gauge, "backlog_limit", "Connections that fit in the backlog.", "listener"),
    (
        Histogram,
        "wait_seconds",
        "Time from accept until a worker takes the connection (no `_sum`).",
    ),
    (Total, "reloads", "Finished reloads: `reloaded` or `failed`.", "result"),
    (Gauge, "last_reload_successful", "1 if the last finished reload succeeded."),
    (
        Gauge,
        "last_dry_run_successful",
        "1 if the last dry run passed; no value once a later reload has begun.",
    ),
    (
        Gauge,
        "last_reload_success_timestamp_seconds",
        "When a reload last succeeded, since the epoch.",
    ),
)
#: Health state -> value; an unknown state has no sample.
_HEALTH = {"healthy": 1.0, "unhealthy": 0.0}
#: Metric -> the field of the status with its value.
_FIELDS = {
    "start_time_seconds": "started_at",
    "restarts": "restarts",
    "workers_wanted": "workers_wanted",
    "worker_crashes": "crashes",
    "queue_limit": "queue_limit",
}


class MetricSet:
    """All metrics, filled instance by instance."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {
            name: kind(f"socketprotector_{name}", text, labels=[_INSTANCE, *labels])
            for kind, name, text, *labels in _FAMILIES
        }

    def families(self) -> Iterator[Metric]:
        """Yield all metric families, also those without samples."""
        yield from self._families.values()

    def add_silent(self, instance: str) -> None:
        """Add an instance that did not answer."""
        self._put("up", instance, 0.0)

    def add(self, instance: str, status: Status, totals: Counters) -> None:
        """Add an instance's samples; if its status is malformed, add the instance as silent."""
        before = {name: len(family.samples) for name, family in self._families.items()}
        try:
            totals.see(status)
            self._add(instance, status, totals)
        except Exception:  # a status of an unknown form
            for name, samples in before.items():
                del self._families[name].samples[samples:]
            self.add_silent(instance)

    def _add(self, instance: str, status: Status, totals: Counters) -> None:
        self._put("up", instance, 1.0)
        version = label(status, "version")
        if version is not None:
            self._families["build"].add_metric([instance], {"version": version})
        for name, wanted in _FIELDS.items():
            self._put(name, instance, measure(status, wanted))
        self._add_states(instance, status)
        self._add_connections(instance, status, totals)
        for result in RESULTS:
            self._put("reloads", instance, float(totals.reloads[result]), result)
        if totals.last_result is not None:
            succeeded = float(totals.last_result == "reloaded")
            self._put("last_reload_successful", instance, succeeded)
        if (dry_run := valid_dry_run(status)) is not None:
            passed = float(label(dry_run, "result") == "passed")
            self._put("last_dry_run_successful", instance, passed)
        success = "last_reload_success_timestamp_seconds"
        self._put(success, instance, totals.last_success_at)

    def _add_states(self, instance: str, status: Status) -> None:
        if label(status, "phase") in PHASES:
            self._put_each("phase", instance, PHASES, [status])
        self._put("serving", instance, float(serves(status)))
        if "held_s" in status:
            self._put("held", instance, float(status["held_s"] is not None))
        if "lame_duck" in status:
            self._put("lame_duck", instance, float(is_lame_duck(status)))
        health = status.get("health")
        if isinstance(health, dict):
            if (state := label(health, "state")) in _HEALTH:
                self._put("healthy", instance, _HEALTH[state])
            self._put("health_failures", instance, measure(health, "failures"))
        if isinstance(status.get("guarded"), bool):
            self._put("guarded", instance, float(status["guarded"]))
        generations = listed(status, "generations")
        self._put_each("generations", instance, GENERATION_PHASES, generations)
        workers = [each for one in generations for each in listed(one, "workers")]
        self._put_each("workers", instance, STATES, workers, "state")
        forked = sum(len(listed(each, "processes")) for each in workers)
        self._put("child_processes", instance, float(forked))
        self._add_rollout(instance, status)
        releases = status.get("releases")
        if isinstance(releases, dict) and (serving := label(releases, "serving")):
            self._families["release"].add_metric([instance], {"release": serving})
            is_current = float(releases.get("current") == serving)
            self._put("release_is_current", instance, is_current)

    def _add_rollout(self, instance: str, status: Status) -> None:
        rollout = rollout_of(status)
        self._put_each("rollout_stage", instance, STAGES, filter(None, [rollout]), "stage")
        if rollout is None:
            return
        share = measure(rollout, "share")
        self._put("rollout_share_ratio", instance, None if share is None else share / 100)
        self._put("rollout_connections", instance, measure(rollout, "met"))
        self._put("rollout_workers_replaced", instance, measure(rollout, "replaced"))
        if "waits_for" in rollout:
            awaited = float(len(listed(rollout, "waits_for")))
            self._put("rollout_workers_awaited", instance, awaited)

    def _add_connections(self, instance: str, status: Status, totals: Counters) -> None:
        generations = listed(status, "generations")
        self._put("connections_accepted", instance, totals.forwarded)
        self._put("connections_taken", instance, totals.count("accepted"))
        self._put("connections_finished", instance, totals.count("finished"))
        self._put("connection_errors", instance, totals.count("errors"))
        self._put("connections_lost", instance, measure(status, "lost"), "protector")
        self._put("connections_lost", instance, totals.count("lost"), "worker")
        self._put("connections_active", instance, _sum(generations, "active"))
        self._put("queue_depth", instance, _sum(generations, "queue"))
        seen = set()
        for each in listed(status, "listeners"):
            listener = label(each, "address")
            if listener is not None and listener not in seen:
                seen.add(listener)
                self._put("backlog_depth", instance, measure(each, "backlog"), listener)
                self._put("backlog_limit", instance, measure(each, "backlog_limit"), listener)
        if (waits := totals.waits) is not None:
            buckets = list(zip(_BOUNDS, accumulate(waits), strict=True))
            self._families["wait_seconds"].add_metric([instance], buckets, sum_value=None)

    # -- samples -------------------------------------------------------------

    def _put(self, name: str, instance: str, value: float | None, *labels: str) -> None:
        """Add a sample; None: the value is unknown, and there is no sample."""
        if value is not None:
            self._families[name].add_metric([instance, *labels], value)

    def _put_each(
        self,
        name: str,
        instance: str,
        known: Iterable[str],
        things: Iterable[Status],
        by: str = "phase",
    ) -> None:
        """Add the number of things of each known kind, also 0."""
        counts = Counter(label(thing, by) for thing in things)
        for each in known:
            self._put(name, instance, float(counts[each]), each)


def _sum(generations: Iterable[Status], name: str) -> float | None:
    """Return the sum over the generations; None if a value is unknown, or if there is no value."""
    total = None
    for each in generations:
        value = measure(each, name)
        if value is not None:
            total = (total or 0.0) + value
        elif label(each, "phase") not in _WITHOUT_CONNECTIONS:
            return None
    return total
