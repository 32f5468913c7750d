"""What --ready accept, http: and https: may say, and which answers are good."""

from __future__ import annotations

import re

import pytest

from socketprotector.model.policy import Policy
from socketprotector.model.probe_spec import ProbeSpec, read, read_health, refuse_unclear
from tests.together import together


@together(
    ("text", "spec"),
    [
        ("accept", ProbeSpec("accept")),
        ("http:/", ProbeSpec("http", path="/")),
        ("http:/healthz", ProbeSpec("http", path="/healthz")),
        ("https:/healthz?full=1", ProbeSpec("https", path="/healthz?full=1")),
        ("http:/p=204", ProbeSpec("http", path="/p", status=204)),
        ("http:/p?a=200=200", ProbeSpec("http", path="/p?a=200", status=200)),
        ("http:/p=2", ProbeSpec("http", path="/p=2")),
        ("http:/p=999", ProbeSpec("http", path="/p=999")),
        ("http://shop.example/p", ProbeSpec("http", host="shop.example", path="/p")),
        ("http://[::1]:80/p", ProbeSpec("http", host="[::1]:80", path="/p")),
        ("http:[web]/p", ProbeSpec("http", listener="web", path="/p")),
        (
            "https:[web]//shop.example/p/=301",
            ProbeSpec("https", "web", "shop.example", "/p/", 301),
        ),
    ],
)
def test_each_part_of_it_may_be_said(text: str, spec: ProbeSpec) -> None:
    assert read(text) == spec


@together(
    "text",
    [
        "",
        "http",
        "http:",
        "http:p",
        "http:/a b",
        "http://host",
        "http:[]/p",
        "http:/ä",
        "ftp:/p",
        "http:/a\r\nX: y",
        "accept:/p",
        "http:[a]b/p",
    ],
)
def test_nothing_else_may(text: str) -> None:
    with pytest.raises(ValueError, match="write http:/path"):
        read(text)


@together(
    ("text", "why"),
    [
        ("http:/h?depth=300", "write http:/h?depth=300=200 (query, then status), or ?depth==300"),
        ("https:[a]//b/h?x=1&full=204", "is 204 a status or part of the query?"),
        ("http:/=600", "600 is no status; write 100 to 599"),
        ("http:/h=2xx", "2xx is no status"),
        ("http:/h=099", "099 is no status"),
    ],
)
def test_an_option_whose_end_may_be_a_status_or_not_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        refuse_unclear(text)
    assert read(text).by_http, "a state of an earlier version may have it"


@together(
    ("text", "path", "status"),
    [
        ("http:/h?depth=300=200", "/h?depth=300", 200),
        ("http:/h?depth==300", "/h?depth=", 300),
        ("http:/h?depth=300&", "/h?depth=300&", 0),
        ("http:/h?x=1", "/h?x=1", 0),
        ("http:/h?x=600", "/h?x=600", 0),
        ("http:/h?x=1&y=2=204", "/h?x=1&y=2", 204),
        ("http:/h=2xx=200", "/h=2xx", 200),
        ("http:/h=204", "/h", 204),
        ("http:/h;v=abc", "/h;v=abc", 0),
        ("http:/a=1/200", "/a=1/200", 0),
        ("accept", "", 0),
    ],
)
def test_an_option_whose_end_is_clear_is_not(text: str, path: str, status: int) -> None:
    refuse_unclear(text)
    assert (read(text).path, read(text).status) == (path, status)


def test_an_answer_is_good_as_load_balancers_have_it_or_as_it_was_asked_for() -> None:
    assert {200, 204, 301, 399} <= set(read("http:/").good)
    assert {100, 199, 400, 404, 500, 503}.isdisjoint(read("http:/").good)
    assert read("http:/=503").good == (503,)


def test_which_policies_ask_and_which_are_ready_by_the_answer_alone() -> None:
    told = {
        kind: (Policy(ready=kind).probes, Policy(ready=kind).answer_decides)
        for kind in (*("notify", "ack", "fd", "check", "after", "any", "accept", "http", "https"),)
    }

    alone, beside, none = (True, True), (True, False), (False, False)
    assert told == {
        **dict.fromkeys(("notify", "ack", "fd", "check", "after"), none),
        **dict.fromkeys(("accept", "http", "https"), alone),
        "any": beside,
    }


def test_health_is_asked_the_same_and_by_a_command() -> None:
    assert read_health("accept") == ProbeSpec("accept")
    assert read_health("http:/p=204") == ProbeSpec("http", path="/p", status=204)
    assert read_health("check:curl -f :/ x") == ProbeSpec("check", path="curl -f :/ x")


@together("text", ["", "check:", "check: ", "notify", "http:x", "after:1s"])
def test_what_else_health_is_given_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="accept or check:COMMAND"):
        read_health(text)
