"""Scrapes of a real protector: what it says is what happened."""

from __future__ import annotations

import signal
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.running import DEADLINE_S, ROOT, Protector, ask, eventually
from tests.scenarios.operating import Line
from tests.scenarios.tools import Release, library_worker, worker
from tests.systems.life import under_unit
from tests.unit.exporter.conftest import Exporter


def samples(exporter: Exporter, tls: ssl.SSLContext | None = None) -> dict[str, float]:
    """`name` or `name{label}` without the instance -> value."""
    address = f"{exporter.address}/metrics"
    with urllib.request.urlopen(address, timeout=DEADLINE_S, context=tls) as answer:
        body = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "instance"]
            name = sample.name.removeprefix("socketprotector_")
            found[f"{name}{{{','.join(labels)}}}" if labels else name] = sample.value
    return found


def test_what_a_protector_says_is_what_happened(
    protector: Callable[..., Protector],
    exporter: Callable[..., Exporter],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("x")
    release = Release(folder / "daemon")
    release.becomes(*library_worker("echo"))
    control = folder / "web.control"
    daemon = protector(
        "--control", control, "--workers", "2", "127.0.0.1:0", "--", release.path
    ).ready()
    one = exporter("--control", control)
    before = samples(one)
    assert before["up"] == before["serving"] == 1
    assert before["workers{ready}"] == before["workers_wanted"] == 2
    assert before["generations{serving}"] == 1
    assert before["connections_accepted_total"] == 0

    for _ in range(10):
        ask(("127.0.0.1", daemon.port))
    eventually(lambda: samples(one)["connections_finished_total"] == 10, "10 that have ended")
    after = samples(one)
    assert after["connections_accepted_total"] == after["connections_taken_total"] == 10
    assert after["connections_active"] == after["queue_depth"] == 0
    assert after["wait_seconds_bucket{+Inf}"] == 10
    assert after[f"backlog_limit{{tcp:127.0.0.1:{daemon.port}}}"] > 0

    daemon.reload()
    eventually(lambda: samples(one)["generations{draining}"] == 0, "the old one's end")
    release.write("#!/bin/sh\nexit 1\n")
    mark = daemon.signal(signal.SIGHUP)
    daemon.log.wait_for("event=reload-failed", after=mark)
    ask(("127.0.0.1", daemon.port))
    eventually(lambda: samples(one)["connections_taken_total"] == 11, "those of both generations")
    after = samples(one)
    assert after["reloads_total{reloaded}"] == after["reloads_total{failed}"] == 1
    assert after["last_reload_successful"] == 0
    assert after["last_reload_success_timestamp_seconds"] > before["start_time_seconds"]

    daemon.stop()
    assert samples(one) == {"up": 0}


def test_a_lame_duck_is_not_ready_and_serves(
    protector: Callable[..., Protector],
    exporter: Callable[..., Exporter],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    control = tmp_path_factory.mktemp("x") / "web.control"
    daemon = protector(
        "--name", "web", "--control", control, "127.0.0.1:0", "--", *worker("many")
    ).ready()
    one = exporter("--control", control)

    def ready() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"{one.address}/readyz/web", timeout=DEADLINE_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    assert ready() == (200, "ok\n")
    with Line(control) as line:
        assert line.ask("lame-duck", on=True) == {"lame_duck": "on"}

        assert ready() == (503, "web: lame duck\n")
        seen = samples(one)
        assert (seen["lame_duck"], seen["serving"], seen["up"]) == (1, 1, 1)
        assert ask(("127.0.0.1", daemon.port)).endswith("] hello")

        assert line.ask("lame-duck", on=False) == {"lame_duck": "off"}
    assert ready() == (200, "ok\n")
    daemon.stop()


def test_what_workers_without_the_library_count_is_absent(
    protector: Callable[..., Protector],
    exporter: Callable[..., Exporter],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    control: Path = tmp_path_factory.mktemp("x") / "c"
    daemon = protector("--control", control, "127.0.0.1:0", "--", *worker("many")).ready()
    ask(("127.0.0.1", daemon.port))

    seen = samples(exporter("--control", control))

    assert seen["connections_accepted_total"] == 1
    assert not {"connections_taken_total", "connections_active"} & seen.keys()
    daemon.stop()


@pytest.mark.parametrize("unit", ["socketprotector-exporter", "socketprotector-page"])
def test_page_and_metrics_need_no_call_that_the_units_forbid(
    protector: Callable[..., Protector],
    exporter: Callable[..., Exporter],
    runtime: Path,
    unit: str,
) -> None:
    """Such a call kills the exporter by SIGSYS."""
    control = runtime / "web.control"
    words = ("--name", "web", "--control", control, "127.0.0.1:0", "--", *worker("many"))
    daemon = protector(*words).ready()
    through = under_unit(ROOT / f"exporter/init.d/{unit}.service")
    page = ("--web", "127.0.0.1:0") if unit == "socketprotector-page" else ()

    one = exporter("--all", *page, through=through)

    assert samples(one)["serving"] == 1
    if page:
        with urllib.request.urlopen(f"{one.page}/events", timeout=DEADLINE_S) as events:
            assert any(b'"web"' in line for line in events)  # as long as there are some
    assert one.end() == 0
    daemon.stop()
