"""What a message can contain is bounded where it is read, and no field of it stops who reads on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from socketprotector_exporter.counters import Counters
from socketprotector_exporter.metrics import MetricSet
from socketprotector_exporter.web_model import Instance

from socketprotector.ctl import queries, status_table
from socketprotector.ctl.message import message_in
from socketprotector.ctl.query_all import SocketAnswer
from socketprotector.ctl.status_table import heading, listeners, reload_lines, totals
from tests.rounds import rounds
from tests.unit.ctl.fake import generation, health, reload, status, worker

FULL = status(
    generation(7, "draining", worker(1), draining_since_at=150.0, oldest_waiting_s=31.0),
    generation(8, "serving", worker(2)),
    held_s=3.0,
    lame_duck_s=4.0,
    health=health("unhealthy", "500"),
    dry_run=reload(9, "failed", "why"),
    reloads=[reload(8, "failed", "why; its last words:\nx"), reload(9, "running")],
    restarts=1,
    crashes=2,
)


def read(text: str | bytes) -> Any:
    return message_in(text.encode() if isinstance(text, str) else text)


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"3", b"null", b"[]", b"{", b"\xff", b"9" * 9000),
        *(b"[" * 200_000, b'{"a":' * 200_000, b'{"a":[' + b"[]," * 200_000 + b"0]}"),
    ],
)
def test_what_is_no_message_is_none(line: bytes) -> None:
    assert read(line) is None


def test_what_no_protector_sends_is_null() -> None:
    digits = "9" * 400
    assert read(f'{{"a":{digits},"b":-{digits},"c":1e999,"d":NaN,"e":1e300,"f":2.5}}') == {
        **dict.fromkeys("abcde"),
        "f": 2.5,
    }
    assert read('{"now": 1795397058.76, "pid": 4194304, "ok": true}') == {
        "now": 1795397058.76,
        "pid": 4194304,
        "ok": True,
    }
    deep = read('{"x":' + "[" * 900 + "]" * 900 + "}")
    assert json.dumps(deep).count("[") < 20


@pytest.mark.parametrize("name", [b"a\\ud800b", b"a\xed\xa0\x80b", b"a\xffb"])
def test_each_text_can_be_encoded(name: bytes) -> None:
    found = read(b'{"name":"%b","%b":1}' % (name, name))
    assert set(found) == {"name", found["name"]}
    assert found["name"].encode()[:1] == b"a"


def test_no_text_and_no_list_is_endless() -> None:
    found = read(json.dumps({"name": "x" * (1 << 20), "list": [1] * (1 << 17)}))
    assert len(found["name"]) == 1 << 18
    assert len(found["list"]) == 1 << 16


def test_a_status_stays_as_it_is() -> None:
    assert read(json.dumps(FULL)) == FULL
    characters = {"name": "gr\u00fc\u00df \U0001f600 \u202e"}
    assert read(json.dumps(characters)) == characters


class _Answers(Collector):
    def __init__(self, *found: Any) -> None:
        self.series = MetricSet()
        for place, each in enumerate(found):
            self.series.add(f"web-{place}", each, Counters())

    def collect(self) -> Any:
        return [each for each in self.series.families() if each.samples]

    def describe(self) -> Any:
        return []


def exposed(*found: Any) -> str:
    registry = CollectorRegistry()
    registry.register(_Answers(*found))
    return generate_latest(registry).decode()


ODD = some.recursive(
    some.none()
    | some.booleans()
    | some.integers()
    | some.sampled_from([10**400, -(10**400), 1e308, float("inf"), float("nan")])
    | some.floats()
    | some.text(some.characters(codec=None), max_size=9),
    lambda each: some.lists(each, max_size=3) | some.dictionaries(some.text(max_size=3), each),
    max_leaves=5,
)


@settings(max_examples=rounds(20, 200), deadline=None)
@given(data=some.data())
def test_no_value_of_any_field_stops_who_shows_it(data: some.DataObject) -> None:
    message = json.loads(json.dumps(FULL))
    for _ in range(data.draw(some.integers(1, 3))):
        place, field = message, data.draw(some.sampled_from(sorted(message)))
        while (
            isinstance(place.get(field), list | dict)
            and place[field]
            and data.draw(some.booleans())
        ):
            inner = place[field]
            inner = inner[0] if isinstance(inner, list) else inner
            if not isinstance(inner, dict) or not inner:
                break
            place, field = inner, data.draw(some.sampled_from(sorted(inner)))
        place[field] = data.draw(ODD)
    found = read(json.dumps(message))

    for show in (
        heading,
        totals,
        listeners,
        reload_lines,
        status_table.generations,
    ):
        show(found)
    status_table.workers(found, {})
    queries._row("web", SocketAnswer("/run/x", found))
    metrics = exposed(found)
    assert 'up{instance="web-0"} 1.0' in metrics
    instance = Instance("/run/x")
    for at in (1.0, 2.0):
        instance.see(found, at, at)
        json.dumps(instance.shown(), allow_nan=False).encode()
    event = read(
        json.dumps(
            {
                "event": "x",
                "at": 1.0,
                **{n: data.draw(ODD) for n in ("at", "generation", "worker", "last_words")},
            }
        )
    )
    json.dumps(instance.hear(event), allow_nan=False).encode()


def test_what_fails_all_the_same_hides_no_other_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    good = MetricSet._add_states

    def fails(self: MetricSet, instance: str, told: Any) -> None:
        good(self, instance, told)
        if told["name"] == "bad":
            raise ArithmeticError

    monkeypatch.setattr(MetricSet, "_add_states", fails)
    metrics = exposed(status(name="bad"), status(name="good"))
    assert 'socketprotector_up{instance="web-0"} 0.0' in metrics
    assert metrics.count('"web-0"') == 1
    assert 'socketprotector_connections_active{instance="web-1"} 3.0' in metrics
