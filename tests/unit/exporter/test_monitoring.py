"""Alert rules and dashboard, against what the exporter answers, by Prometheus's promtool."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from socketprotector_exporter.counters import BUCKETS, Counters
from socketprotector_exporter.metrics import MetricSet

from tests import needs
from tests.running import ROOT
from tests.unit.ctl.fake import awaited, generation, listener, reload, rolling, status, worker

RULES = ROOT / "exporter" / "init.d" / "prometheus-rules.yml"
DASHBOARD = ROOT / "exporter" / "init.d" / "grafana-dashboard.json"
promtool = needs.programs("promtool")
#: Which are raised by what ails each instance of recorded().
ALERTS = {
    "ill": {
        *("ProtectorDown", "Unhealthy", "ReloadFailed", "CrashLoop", "QueueFull", "StuckDrain"),
        *("ConnectionsLost", "HeldTooLong"),
    },
    "unasked": {"HealthUnknown"},
    "waits": {"RolloutWaits"},
    "without a worker": {"ProtectorDown"},
    "stuck": {"QueueFull"},
    "listener": {"QueueFull"},
}


class _Families:
    def __init__(self, families: list[Metric]) -> None:
        self.families = families

    def collect(self) -> list[Metric]:
        return self.families


def scrape(instances: dict[str, dict[str, Any]], totals: dict[str, Counters]) -> str:
    """What /metrics answers."""
    series = MetricSet()
    for name, told in instances.items():
        totals.setdefault(name, Counters()).see(told)
        series.add(name, told, totals[name])
    registry = CollectorRegistry()
    registry.register(_Families([each for each in series.families() if each.samples]))
    return generate_latest(registry).decode()


def waits(count: int) -> dict[str, Any]:
    return {"buckets": [count if bucket == 8 else 0 for bucket in range(BUCKETS)]}


def recorded() -> tuple[str, str]:
    """Two scrapes an hour apart: of one that is well, one whose health is unknown, one whose
    rolling reload waits, one without a ready worker, two whose workers take no client, and one with
    every other trouble there is.
    """
    totals: dict[str, Counters] = {}
    found = []
    for hour in (0, 1):
        well = status(
            generation(8, "serving", worker(1), accepted=100 + 9000 * hour, wait_us=waits(hour)),
            forwarded=100 + 9000 * hour,
            health={"probe": "http:/", "state": "healthy", "failures": 0},
            reloads=[reload(8, "reloaded")],
        )
        draining = [generation(n, "draining", worker(n)) for n in range(4)]
        serving = generation(8, "serving", worker(9), queue=270, lost=30 * hour)
        ill = status(
            *draining,
            serving,
            route=None,
            crashes=60 * hour,
            held_s=9.0,
            health={"probe": "http:/", "state": "unhealthy", "failures": 5},
            reloads=[reload(8, "failed", "why")],
            dry_run=reload(9, "failed", "why"),
        )
        unasked = status(
            health={"probe": "http:/", "state": "unknown", "failures": 0},
            reloads=[reload(8, "reloaded")],
        )
        # One of two rolling reloads goes on.
        waits_for = status(rollout=rolling(awaited(5)), reloads=[reload(8, "reloaded")])
        rolls = rolling(awaited(5), replaced=3 + 60 * hour)
        goes_on = status(rollout=rolls, reloads=[reload(8, "reloaded")])
        named = {"well": well, "ill": ill, "unasked": unasked, "waits": waits_for}
        named["without a worker"] = status(generation(8, "serving", worker(9, state="waiting")))
        named["stuck"] = status(generation(8, "serving", worker(9), queue=4))
        uncounted = generation(8, "serving", worker(9), queue=4000, accepted=None, wait_us=None)
        full = listener(backlog=4000, backlog_limit=4096)
        named["listener"] = status(uncounted, queue_limit=None, listeners=[full])
        found.append(scrape({**named, "goes on": goes_on}, totals))
    return found[0], found[1]


def checked(*words: str | Path, given: str | None = None) -> None:
    done = subprocess.run(
        ["promtool", *words], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    """Those of the dashboard, with what Grafana puts in place of its variables."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    found += [each["expr"] for each in board["annotations"]["list"]]
    return [each.replace("$instance", ".*").replace("$__rate_interval", "5m") for each in found]


@promtool
def test_a_scrape_is_as_prometheus_wants_it() -> None:
    checked("check", "metrics", given=recorded()[1])


@promtool
def test_each_alert_is_raised_by_its_trouble_and_none_without(tmp_path: Path) -> None:
    first, last = (
        {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        for text in recorded()
    )
    series = []
    for (name, *labels), value in last.items():
        shown = ",".join(f"{label}={json.dumps(text)}" for label, text in labels)
        before = first.get((name, *labels), 0.0)
        series.append(
            {"series": f"{name}{{{shown}}}", "values": f"{before}+{(value - before) / 60}x60"}
        )
    firing = [
        {
            "labels": f'{{alertname="{name}",alertstate="firing",instance="{instance}"}}',
            "value": 1,
        }
        for instance, names in ALERTS.items()
        for name in sorted(names)
    ]
    without_more = 'max by (alertname, alertstate, instance) (ALERTS{alertstate="firing"})'
    asked = {"expr": without_more, "eval_time": "50m", "exp_samples": firing}
    told = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [asked]}],
    }
    path = tmp_path / "test.yml"
    path.write_text(json.dumps(told))  # which is YAML, too

    checked("check", "rules", RULES)
    checked("test", "rules", path)


@promtool
def test_each_expression_of_the_dashboard_is_one(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": each} for n, each in enumerate(expressions())]
    path = tmp_path / "dashboard.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))

    checked("check", "rules", path)


def test_rules_and_dashboard_name_metrics_and_labels_that_there_are() -> None:
    there = set(re.findall(r"^(socketprotector_\w+)", recorded()[1], re.MULTILINE))
    rules = RULES.read_text(encoding="utf-8")
    for text in (rules, *expressions()):
        # What is behind a colon is a recorded series' name, not a metric.
        assert set(re.findall(r"socketprotector_\w+", text)) <= there
        assert "by (instance" not in text, "instances of one name on two hosts would be one"
    assert set(re.findall(r"alert: (\w+)", rules)) == set().union(*ALERTS.values())
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [tuple(panel["gridPos"][each] for each in "xyw") for panel in board["panels"]]
    assert all(x + width <= 24 for x, _, width in places)
