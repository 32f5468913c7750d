"""The file of --peers, and how another host's metrics become its cell: no socket, no clock."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from socketprotector_exporter.peers_file import Peer, parse
from socketprotector_exporter.peers_model import LINE_BYTES, Host, NoMetrics, Scan

from socketprotector.model.errors import UsageError
from tests.together import together

BEGAN = 1_000_000_000.0


# -- the file --------------------------------------------------------------------


def test_a_line_is_an_address_and_a_name_if_there_is_another_one() -> None:
    text = """
    # all of them
    https://web-1.example.org:9517
    database  https://10.0.0.12:9517/  # the old one
    v6 https://[2001:db8::1]:443/behind/metrics#no-remark
    here http://127.0.0.1:9517
    also http://[::1]:9517
    http://localhost:9518
    """

    assert parse(text, "hosts") == (
        Peer("web-1.example.org", "web-1.example.org", 9517, "/metrics", tls=True),
        Peer("database", "10.0.0.12", 9517, "/metrics", tls=True),
        Peer("v6", "2001:db8::1", 443, "/behind/metrics#no-remark", tls=True),
        Peer("here", "127.0.0.1", 9517, "/metrics", tls=False),
        Peer("also", "::1", 9517, "/metrics", tls=False),
        Peer("localhost", "localhost", 9518, "/metrics", tls=False),
    )


@together(
    ("line", "wanted"),
    [
        ("https://web-1", "write [NAME] https://HOST:PORT"),
        ("web-1:9517", "write [NAME] https://HOST:PORT"),
        ("https://web-1:0", "write [NAME] https://HOST:PORT"),
        ("https://web-1:65536", "write [NAME] https://HOST:PORT"),
        ("https://web-1:9517 web-1", "write [NAME] https://HOST:PORT"),
        ("a b https://web-1:9517", "write [NAME] https://HOST:PORT"),
        ("https://me:s3cret@web-1:9517", "write [NAME] https://HOST:PORT"),
        ("https://web-1:9517/\x1b[2J", "write [NAME] https://HOST:PORT"),
        ("http://web-1:9517", "http:// is for loopback addresses only"),
        ("http://10.0.0.11:9517", "http:// is for loopback addresses only"),
        ("http://localhost.example.org:9517", "http:// is for loopback addresses only"),
        ("https://first:9518", "first is in line 1, too; write a different name"),
    ],
)
def test_a_line_that_says_nothing_is_refused_in_one(line: str, wanted: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(f"https://first:9517\n{line}\n", "hosts")

    assert str(refused.value).startswith(f"--peers hosts: line 2: {wanted}")
    assert "s3cret" not in str(refused.value)


def test_a_file_without_a_host_is_refused() -> None:
    with pytest.raises(UsageError, match="--peers hosts: no host; write a line for each"):
        parse("# none yet\n\n", "hosts")


@settings(deadline=None)
@given(some.text(alphabet="https:/[]#. 1a@\n\x1b", max_size=60))
def test_whatever_the_file_has_it_is_hosts_or_one_line(text: str) -> None:
    said, names = "", ["one"]
    try:
        names = [each.name for each in parse(text, "hosts")]
    except UsageError as error:
        said = str(error)

    assert said.isprintable()
    assert len(set(names)) == len(names) > 0


# -- the metrics -----------------------------------------------------------------


def metrics(name: str = "web", phase: str = "serving", **values: float) -> bytes:
    """Metrics of an instance that serves, or not."""
    all_values = {"up": 1.0, "serving": 1.0, "held": 0.0, "lame_duck": 0.0, **values}
    lines = [f'socketprotector_{metric}{{instance="{name}"}} {value}'
             for metric, value in all_values.items()]  # fmt: skip
    lines += [f'socketprotector_phase{{instance="{name}",phase="{each}"}} {float(each == phase)}'
              for each in ("starting", "serving", "settling", "waiting", "stopping")]  # fmt: skip
    return "\n".join(["# HELP socketprotector_up 1 if the instance answered", *lines, ""]).encode()


class Seen:
    """A host that is asked every five seconds."""

    def __init__(self) -> None:
        self.host = Host("web-1")
        self.at = 0.0

    def answers(self, *parts: bytes) -> dict[str, Any]:
        self.at += 5.0
        scan = Scan()
        scan.feed(b"".join(parts))
        self.host.saw(scan.end(), self.at, BEGAN + self.at)
        return self.shown

    @property
    def shown(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(json.dumps(self.host.shown(), allow_nan=False))
        return found


@pytest.fixture
def seen() -> Seen:
    return Seen()


@together(
    ("told", "state", "tone"),
    [
        (metrics(), "serving", "good"),
        (metrics(healthy=1, last_reload_successful=1), "serving", "good"),
        (metrics(phase="settling"), "settling", "busy"),
        (metrics(phase="starting", serving=0), "starting", "busy"),
        (metrics(phase="stopping", serving=0), "stopping", "warn"),
        (metrics(phase="stopping", lame_duck=1), "draining", "warn"),
        (metrics(lame_duck=1), "draining", "warn"),
        (metrics(held=1, lame_duck=1), "holding", "warn"),
        (metrics(phase="new", serving=0), "unknown", "warn"),
        (metrics(phase="new"), "serving", "good"),
        (metrics(last_reload_successful=0, held=1), "reload failed", "bad"),
        (metrics(healthy=0, last_reload_successful=0), "unhealthy", "bad"),
        (metrics(phase="waiting", serving=0, healthy=0), "not serving", "bad"),
        (b'socketprotector_up{instance="web"} 0.0\n', "no answer", "bad"),
        (b"", "no instance", "warn"),
    ],
)
def test_a_host_is_as_its_worst_instance(told: bytes, state: str, tone: str) -> None:
    one, shown = Seen(), Seen().answers(told)

    assert (shown["state"], shown["tone"]) == (state, tone)
    more = one.answers(told, metrics("fine"))
    names = {"serving": "", "no instance": ""}
    assert more["state"] == ("serving" if state == "no instance" else state)
    assert more["note"] == names.get(state, "web")


def test_many_instances_in_trouble_are_a_number(seen: Seen) -> None:
    shown = seen.answers(*(metrics(f"shop-{each}", held=each % 2) for each in range(12)))

    assert shown["note"] == "shop-1, shop-11, shop-3 and 3 more"
    assert shown["instances"] == 12


def test_connections_a_second_are_known_from_the_second_answer_on(seen: Seen) -> None:
    def shop(count: float) -> bytes:  # workers count there, and nobody accepts
        return metrics("shop", connections_taken_total=count, connections_active=2)

    def web(count: float) -> bytes:
        return metrics(connections_accepted_total=count, connections_taken_total=7)

    assert seen.answers(web(100), shop(10))["rate"] is None
    assert seen.answers(web(200), shop(60))["rate"] == 30
    assert seen.shown["active"] is None  # web does not know
    assert seen.answers(shop(65))["rate"] == 1
    assert seen.shown["active"] == 2
    assert seen.answers(web(0), shop(70))["rate"] is None  # that one is new
    assert seen.answers(web(5), shop(0))["rate"] is None  # that exporter was started anew
    assert seen.answers(web(10), shop(0))["rate"] == 1
    assert seen.answers(metrics(connections_active=0))["rate"] is None  # nobody counts
    assert seen.shown["active"] == 0


def test_since_when_is_kept_while_it_stays_so(seen: Seen) -> None:
    seen.answers(metrics())
    assert seen.answers(metrics(connections_active=1))["since"] == BEGAN + 5
    seen.host.failed("connection refused", BEGAN + 11)
    seen.host.failed("no answer in 4s", BEGAN + 16)
    assert seen.shown == {
        "id": seen.host.id,
        "name": "web-1",
        "tone": "bad",
        "state": "not answering",
        "note": "no answer in 4s",
        "since": BEGAN + 11,
        "instances": None,
        "rate": None,
        "active": None,
    }
    assert seen.answers(metrics())["since"] == BEGAN + 15

    seen.host.forget()
    assert (seen.shown["state"], seen.shown["tone"]) == ("asking", "wait")
    assert seen.shown["instances"] is None


def test_the_name_of_an_instance_is_text_of_some_length(seen: Seen) -> None:
    name = r"}a\"b\\c\n" + "\x1b[2J" + "x" * 500

    shown = seen.answers(metrics(name, held=1))

    assert shown["note"].startswith(r"}a\"b\c\n\x1b[2Jxxx".replace(r"\"", '"'))
    assert len(shown["note"]) == 80


def test_what_is_not_shown_of_a_name_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 MiB of escapes took a second of processor time."""
    read: list[int] = []

    def escape(whole: str) -> str:
        read.append(len(whole))
        return whole

    monkeypatch.setattr("socketprotector.model.text.escape", escape)

    shown = Seen().answers(metrics(r"\n" * 30_000, held=1))

    assert shown["note"] == "\n" * 80
    assert max(read) <= 320


@together(
    ("told", "why"),
    [
        (b"<html>log in</html>", "sends no metrics of ours"),
        (b"node_load1 0.5\n", "sends no metrics of ours"),
        (b"\x00" * 9, "sends no metrics of ours"),
        (b"x" * (LINE_BYTES + 1), "sends no metrics of ours"),
        (metrics() * 1200, "sends more than 10000 samples of ours"),
    ],
)
def test_what_is_no_metrics_is_told(told: bytes, why: str) -> None:
    with pytest.raises(NoMetrics, match=why):
        Seen().answers(told)


@settings(deadline=None)
@given(some.lists(some.integers(0, 400), max_size=12))
def test_it_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    told = metrics(connections_accepted_total=9) + metrics("shop", held=1).rstrip()
    whole, pieces = Scan(), Scan()
    whole.feed(told)
    places = sorted({0, len(told), *(cut for cut in cuts if cut < len(told))})
    for begin, end in itertools.pairwise(places):
        pieces.feed(told[begin:end])

    assert pieces.end() == whole.end()
    assert {name: one.state for name, one in whole.end().items()} == {
        "web": "serving", "shop": "holding"
    }  # fmt: skip


@settings(deadline=None)
@given(some.binary(max_size=300))
def test_hostile_metrics_are_a_cell_or_no_metrics(junk: bytes) -> None:
    seen = Seen()
    for told in (junk, b'socketprotector_up{instance="' + junk + b'"} 1\n', metrics() + junk):
        try:
            assert seen.answers(told)["name"] == "web-1"
        except NoMetrics:
            pass
