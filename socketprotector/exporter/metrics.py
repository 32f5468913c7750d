"""Which metrics there are, and how they are made of a status.

Names and units as Prometheus wants them: base units, counters end in _total.  No label has more
values than there are instances, listeners, phases, states or results: no pid and no generation.
docs/metrics.md lists them; a test compares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from ..ctl.fields import Status, label, listed, measure
from .counters import BUCKETS, RESULTS, Counters

PHASES = ("starting", "serving", "reloading", "settling", "stopping", "waiting")
GENERATION_PHASES = ("starting", "settling", "serving", "draining", "abandoned")
STATES = ("starting", "ready", "retiring", "orphaned", "waiting")
#: No connection was ever given to these: what they have not counted is nothing.
_WITHOUT_CONNECTIONS = ("starting", "abandoned")
_INSTANCE = "instance"
#: Upper ends in seconds; the last bucket has none.
_BOUNDS = [*(str(2**n / 1_000_000) for n in range(BUCKETS - 1)), "+Inf"]


class MetricSet:
    """All metrics, filled instance by instance."""

    def __init__(self) -> None:
        self._families: dict[str, Metric] = {}
        self._gauge("up", "1 if the instance answered")
        self._info("build", "The protector's version.")
        self._gauge("start_time_seconds", "When it was started, since the epoch.")
        self._counter("restarts", "Programs that went on where another stopped.")
        self._gauge("phase", "1 for the phase that it is in.", "phase")
        self._gauge("serving", "1 if new connections go to a generation.")
        self._gauge("held", "1 if it accepts nothing because it was told so.")
        self._gauge("guarded", "1 if a guard would start it again.")
        self._gauge("generations", "Generations in each phase.", "phase")
        self._gauge("workers", "Workers in each state, of all generations.", "state")
        self._gauge("workers_wanted", "Workers that the serving generation is to have.")
        self._counter("worker_crashes", "Workers that ended unasked.")
        self._counter("connections_accepted", "Connections accepted and sent to workers.")
        self._counter("connections_taken", "Connections that workers have taken.")
        self._counter("connections_finished", "Connections that workers have finished.")
        self._counter("connection_errors", "Connections whose handler has failed.")
        self._counter("connections_lost", "Connections lost, and in whose hands.", "by")
        self._gauge("connections_active", "Connections that workers have open.")
        self._gauge("queue_depth", "Connections sent to workers and not yet taken.")
        self._gauge("queue_limit", "How many fit there.")
        self._gauge("backlog_depth", "Connections that wait in the kernel.", "listener")
        self._gauge("backlog_limit", "How many fit there.", "listener")
        self._families["wait_seconds"] = HistogramMetricFamily(
            "socketprotector_wait_seconds",
            "From accept to being taken by a worker; there is no sum.",
            labels=[_INSTANCE],
        )
        self._counter("reloads", "Reloads that have ended.", "result")
        self._gauge("last_reload_successful", "1 if the last reload that has ended succeeded.")
        self._gauge("last_reload_success_timestamp_seconds", "When one last did, since the epoch.")

    def families(self) -> Iterator[Metric]:
        """Yield all of them; some may have no samples."""
        yield from self._families.values()

    def add_silent(self, instance: str) -> None:
        """Add an instance that did not answer."""
        self._put("up", instance, 0.0)

    def add(self, instance: str, status: Status, totals: Counters) -> None:
        """Add an instance by its status, which `totals` has seen."""
        self._put("up", instance, 1.0)
        version = label(status, "version")
        if version is not None:
            build = self._families["build"]
            assert isinstance(build, InfoMetricFamily)
            build.add_metric([instance], {"version": version})
        for name, wanted in (
            ("start_time_seconds", "started_at"),
            ("restarts", "restarts"),
            ("workers_wanted", "workers_wanted"),
            ("worker_crashes", "crashes"),
            ("queue_limit", "queue_limit"),
        ):
            self._put(name, instance, measure(status, wanted))
        self._add_states(instance, status)
        self._add_connections(instance, status, totals)
        for result in RESULTS:
            self._put("reloads", instance, float(totals.reloads[result]), result)
        if totals.last_result is not None:
            succeeded = float(totals.last_result == "reloaded")
            self._put("last_reload_successful", instance, succeeded)
        success = "last_reload_success_timestamp_seconds"
        self._put(success, instance, totals.last_success_at)

    def _add_states(self, instance: str, status: Status) -> None:
        phase = label(status, "phase")
        if phase in PHASES:
            for each in PHASES:
                self._put("phase", instance, float(each == phase), each)
        self._put("serving", instance, float(serves(status)))
        if "held_s" in status:
            self._put("held", instance, float(status["held_s"] is not None))
        if isinstance(status.get("guarded"), bool):
            self._put("guarded", instance, float(status["guarded"]))
        generations = list(listed(status, "generations"))
        self._put_each("generations", instance, GENERATION_PHASES, generations, "phase")
        workers = [each for told in generations for each in listed(told, "workers")]
        self._put_each("workers", instance, STATES, workers, "state")

    def _add_connections(self, instance: str, status: Status, totals: Counters) -> None:
        generations = list(listed(status, "generations"))
        self._put("connections_accepted", instance, totals.forwarded)
        self._put("connections_taken", instance, totals.count("accepted"))
        self._put("connections_finished", instance, totals.count("finished"))
        self._put("connection_errors", instance, totals.count("errors"))
        self._put("connections_lost", instance, measure(status, "lost"), "protector")
        self._put("connections_lost", instance, totals.count("lost"), "worker")
        self._put("connections_active", instance, _sum(generations, "active"))
        self._put("queue_depth", instance, _sum(generations, "queue"))
        seen = set()
        for told in listed(status, "listeners"):
            listener = label(told, "address")
            if listener is not None and listener not in seen:
                seen.add(listener)
                self._put("backlog_depth", instance, measure(told, "backlog"), listener)
                self._put("backlog_limit", instance, measure(told, "backlog_limit"), listener)
        waits = totals.waits
        if waits is not None:
            family = self._families["wait_seconds"]
            assert isinstance(family, HistogramMetricFamily)
            so_far, buckets = 0.0, []
            for bound, count in zip(_BOUNDS, waits, strict=True):
                so_far += count
                buckets.append((bound, so_far))
            family.add_metric([instance], buckets, sum_value=None)

    # -- samples -------------------------------------------------------------

    def _put(self, name: str, instance: str, value: float | None, *labels: str) -> None:
        """Add a sample; none for what is not known."""
        if value is not None:
            family = self._families[name]
            assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
            family.add_metric([instance, *labels], value)

    def _put_each(
        self,
        name: str,
        instance: str,
        known: Iterable[str],
        things: Iterable[Mapping[str, object]],
        by: str,
    ) -> None:
        """Add how many things there are of each kind: 0 is known."""
        counts = Counter(thing.get(by) for thing in things)
        for each in known:
            self._put(name, instance, float(counts[each]), each)

    def _gauge(self, name: str, text: str, *labels: str) -> None:
        self._families[name] = GaugeMetricFamily(
            f"socketprotector_{name}", text, labels=[_INSTANCE, *labels]
        )

    def _counter(self, name: str, text: str, *labels: str) -> None:
        self._families[name] = CounterMetricFamily(
            f"socketprotector_{name}", text, labels=[_INSTANCE, *labels]
        )

    def _info(self, name: str, text: str) -> None:
        self._families[name] = InfoMetricFamily(f"socketprotector_{name}", text, labels=[_INSTANCE])


def serves(status: Status) -> bool:
    """Whether new connections go to a generation."""
    return measure(status, "route") is not None and label(status, "phase") != "stopping"


def _sum(generations: Iterable[Status], name: str) -> float | None:
    """Add up what each has; None where one does not say, or where there is none."""
    total = None
    for each in generations:
        value = measure(each, name)
        if value is not None:
            total = (total or 0.0) + value
        elif label(each, "phase") not in _WITHOUT_CONNECTIONS:
            return None
    return total
