"""Each parser of bytes from others: whatever they are, it answers, refuses, or reads nothing.

Nothing but its own error is raised.  What is well formed is understood: the positive controls.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socketprotector.ctl.client import Client
from socketprotector.ctl.errors import NoProtector, RequestRefused
from socketprotector.model import control_requests, text
from socketprotector.model.control_requests import RequestError
from socketprotector.model.einhorn import ack
from socketprotector.system.sd_notify import parse
from tests.hostile import instance as false
from tests.hostile.examples import FEW, JSON

#: What a parser looks for, so that examples come near to it.
WORDS = st.sampled_from(
    [
        *(b"worker:ack", b"command", b"pid", b":", b"%0A", b"%25", b'"', b"{", b"}", b"\\u0000"),
        *(b"READY=1", b"STATUS=", b"\n", b"=", b"\xff", b"v", b"1", b",", b"status", b"id", b"["),
    ]
)
BYTES = st.binary() | st.lists(WORDS | st.binary(max_size=3)).map(b"".join)


@FEW
@given(BYTES | JSON.map(lambda value: json.dumps(value).encode()))
def test_an_ack(line: bytes) -> None:
    found = ack(line)

    assert found is None or found >= 0
    assert ack(b'{"command":"worker:ack","pid":7}') == 7


@FEW
@given(BYTES)
def test_a_notification(data: bytes) -> None:
    found = parse(data)

    assert all(name and "\n" not in name + value for name, value in found.items())
    assert parse(data.replace(b"\0", b"") + b"\nREADY=1")["READY"] == "1"


@FEW
@given(BYTES | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_request(line: bytes) -> None:
    try:
        found = control_requests.parse(line)
    except RequestError as error:
        answered, command = json.loads(control_requests.refusal(error)), ""
    else:
        answered, command = {"ok": True}, found.command
    assert answered["ok"] is (command in control_requests.COMMANDS)
    assert control_requests.parse(b'{"v":1,"command":"status"}').command == "status"


@FEW
@given(st.text() | st.sampled_from(["/etc/passwd", "sh -c id", "../x", "true", "PATH"]))
def test_no_argument_of_a_request_is_a_text(value: str) -> None:
    """So none names a program, a file or a variable.

    One of the four levels is a word; and the name of a release is one, which leads nowhere else.
    """
    taken = [each.arguments for each in control_requests.COMMANDS.values()]
    arguments = [pair for each in taken for pair in each.items()]
    named = [kind for name, kind in arguments if name in ("release", "expect")]
    assert len(named) == 3
    assert value[:1] != "." or not any(is_one(value) for _, is_one in named)
    assert not {*value} & {*"/\0 \n"} or not any(is_one(value) for _, is_one in named)
    kinds = [kind for name, kind in arguments if name not in ("release", "expect")]
    levels = ("debug", "info", "warning", "error")
    assert not any(is_one(value) for _, is_one in kinds) or value in levels
    assert [words for words, is_one in kinds if is_one("info")] == [
        '"debug", "info", "warning" or "error"'
    ]


@FEW
@given(BYTES | JSON.map(lambda value: json.dumps({"id": 1, "ok": True, "result": value}).encode()))
def test_an_answer(tmp_path: Path, line: bytes) -> None:
    """Of an instance; the one that comes after a good one is read, too."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        client = Client.__new__(Client)
        client.path, client._socket, client._last_id = "x", ours, 1
        client._reset()
        theirs.sendall(line + b"\n" + b'{"id":1,"ok":true,"result":{"good":1}}\n')
        theirs.shutdown(socket.SHUT_WR)
        try:
            found: Any = client.answer(0.0)
        except (NoProtector, RequestRefused):
            return
        assert found is None or isinstance(found, dict)


@FEW
@given(st.text(st.characters(categories=None)) | st.just(false.ESCAPES))
def test_a_text_that_is_shown(value: str) -> None:
    assert text.escape(value).isprintable()
    text.escape(value).encode()  # raises where a lone surrogate is left
    assert text.escape("plain") == "plain"


@pytest.mark.parametrize("line", [b"", b"{}", b'{"command":"worker:ack"}', b"[" * 512])
def test_lines_at_the_edge(line: bytes) -> None:
    assert ack(line) in (None, 0)
