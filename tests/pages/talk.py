#!/usr/bin/env python3
"""Talk to the control socket of `web`, and compare what comes with what a page shows on stdin.

talk.py control     `> LINE` is sent.  `< LINE` is what comes: `...` in a string and T stand
                    for anything; `< ...` is any number of lines.
talk.py status      the names of the fields are those of what status says now.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

PATH = "/run/socketprotector/web.control"
DEADLINE_S = 30.0


def is_like(shown: object, came: object) -> bool:
    if isinstance(shown, dict) and isinstance(came, dict):
        return shown.keys() == came.keys() and all(is_like(shown[n], came[n]) for n in shown)
    if isinstance(shown, str) and isinstance(came, str):
        return re.fullmatch(".*".join(map(re.escape, shown.split("..."))), came) is not None
    return shown == came or (shown == "T" and isinstance(came, float))


def names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from names(each)


def talk(stream: TextIO) -> None:
    any_lines = False
    for line in sys.stdin:
        sign, _, shown = line.strip().partition(" ")
        if sign == ">":
            print(shown, file=stream, flush=True)
        elif shown == "...":
            any_lines = True
        else:
            wanted = json.loads(re.sub(r"\bT\b", '"T"', shown))
            while True:
                came = stream.readline()
                print(came, end="")
                if is_like(wanted, json.loads(came)):
                    break
                assert any_lines, f"shown is {shown}"
            any_lines = False


def status(stream: TextIO) -> dict[str, Any]:
    print('{"v": 1, "command": "status"}', file=stream, flush=True)
    answer: dict[str, Any] = json.loads(stream.readline())["result"]
    return answer


def compare(stream: TextIO) -> None:
    until = time.monotonic() + DEADLINE_S
    while "waits_for" in (now := status(stream)):  # an old generation still drains
        assert time.monotonic() < until, now["waits_for"]
        time.sleep(0.02)
    came = set(names(now))
    shown = set(re.findall(r'"(\w+)":', sys.stdin.read()))
    assert came == shown, f"not shown: {came - shown}; not there: {shown - came}"


with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(DEADLINE_S)
    client.connect(PATH)
    with client.makefile("rw", encoding="utf-8") as stream:
        (talk if sys.argv[1] == "control" else compare)(stream)
