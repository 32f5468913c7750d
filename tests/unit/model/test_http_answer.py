"""The answer to an HTTP probe: which answers are good, and how a bad one is reported."""

from __future__ import annotations

from collections.abc import Iterable

from socketprotector.model.http_answer import MOST_BYTES, HttpAnswer
from tests.together import together

HTTP = b"HTTP/1.1 "
CHUNKED = HTTP + b"500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b""


def verdict(pieces: Iterable[bytes]) -> str | None:
    """Feed the pieces until there is a verdict; the last may be END."""
    answer = HttpAnswer((200, 204))
    for piece in pieces:
        why = answer.feed(piece)
        if why is not None:
            return why
    return None


def bytewise(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


@together(
    "answer",
    [
        HTTP + b"200 OK\r\n\r\n",
        b"HTTP/1.0 204 None\r\nX: y\r\n\r\n",
        HTTP + b"100 Continue\r\n\r\n" + HTTP + b"200 OK\r\nContent-Length: 3\r\n\r\nabc",
        HTTP + b"200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        HTTP + b"200 OK\r\nContent-Length: 100000000\r\n\r\n",
        b"HTTP/1.1  200  OK\r\n\r\n",
        HTTP + b"103 Early Hints\r\nLink: </x>\r\n\r\n" + HTTP + b"200 OK\r\n\r\n",
        HTTP + b"200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    ],
)
def test_an_answer_with_a_good_status_is_good_before_it_ends(answer: bytes) -> None:
    assert verdict([answer]) == ""
    assert verdict(bytewise(answer)) == ""


@together(
    ("answer", "why"),
    [
        (b"", "closed without an answer"),
        (b"\n" + HTTP + b"200 OK\r\n\r\n", 'no HTTP: ""'),
        (b"garbage\r\n\r\n", 'no HTTP: "garbage"'),
        (b"\x16\x03\x01\n", 'no HTTP: "???"'),
        (HTTP + b"200", "closed within its header"),
        (HTTP + b"200 OK\r\nContent-Le", "closed within its header"),
        (HTTP + b"200 OK\r\nX: y\r\n", "closed within its header"),
        (HTTP + b"100 Continue\r\n\r\n", "closed within its header"),
        (HTTP + b"200 OK\r\nX: " + b"y" * 100_000, "more than 64 KiB"),
        (HTTP + b"200 OK\r\n" + b"X: y\r\n" * 200, "closed within its header"),
        ((HTTP + b"100 Continue\r\n\r\n") * 5000, "more than 64 KiB"),
        (HTTP + b"500 Oh\r\n\r\ndatabase \x00\ngone", '500, "database ? gone"'),
        (HTTP + b"503 Service Unavailable\r\n\r\n", "503, Service Unavailable"),
        (HTTP + b"500 Oh\r\n\r\n\xff", '500, "\ufffd"'),
        (HTTP + b"304 Same\r\n\r\n", "304, Same"),
        (HTTP + b"500 Oh\r\ncontent-length :  4 \r\n\r\nlost?", '500, "lost"'),
        (HTTP + b"500 Oh\r\nContent-Length: four\r\n\r\nlost", "500, Oh"),
        (HTTP + b"500 Oh\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nlost", "500, Oh"),
        (HTTP + b"500 Oh\n\nlost", '500, "lost"'),
        (b"HTTP/2 200\r\n\r\n", 'no HTTP: "HTTP/2 200"'),
        (HTTP + b"+20 OK\r\n\r\n", 'no HTTP: "HTTP/1.1 +20 OK"'),
        (HTTP + b"099 OK\r\n\r\n", 'no HTTP: "HTTP/1.1 099 OK"'),
        (HTTP + b"503\r\n\r\n", "503, no text"),
        (HTTP + b"503 \x1b[2J\x00\r\n\r\n", "503, ?[2J?"),
        (HTTP + b"503 " + b"x" * 50_000 + b"\r\n\r\n", "503, " + "x" * 120),
        (HTTP + b"101 Switching\r\n\r\n", "101, Switching"),
        (HTTP + b"302 Found\r\nLocation: /x\r\n\r\n", "302, Found"),
        (HTTP + b"500 Oh\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nlost\r\n", '500, "lost"'),
        (HTTP + b"500 Oh\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "500, Oh"),
        (HTTP + b"500 Oh\r\n\r\n" + b"x" * 1000, '500, "' + "x" * 120 + '"'),
    ],
)
def test_a_bad_answer_is_reported_in_one_line(answer: bytes, why: str) -> None:
    pieces = [answer, END] if answer else [END]
    assert verdict(pieces) == why


@together(
    ("answer", "why"),
    [
        (HTTP + b"503 Busy\r\nContent-Length: 0\r\n\r\n", "503, Busy"),
        (HTTP + b"304 Same\r\n\r\n", "304, Same"),
        (HTTP + b"205 Reset\r\n\r\nbody", '205, "body"'),
        (HTTP + b"101 Switching\r\n\r\n", "101, Switching"),
        (CHUNKED + b"4\r\nlost\r\n", '500, "lost"'),
        (CHUNKED + b"4;extension=1\r\nlost\r\n", '500, "lost"'),
        (CHUNKED + b"10\r\n0123456789abcdef\r\n", '500, "0123456789abcdef"'),
        (bytes(64 * 1024), "more than 64 KiB"),
    ],
)
def test_a_bad_answer_is_reported_before_it_ends(answer: bytes, why: str) -> None:
    assert verdict([answer]) == why


def test_a_204_that_is_bad_has_no_body() -> None:
    answer = HttpAnswer((200,))
    assert answer.feed(HTTP + b"204 None\r\n\r\n") == "204, None"


def test_less_than_the_most_may_be_incomplete() -> None:
    assert verdict([bytes(64 * 1024 - 1)]) is None


@together("size", [MOST_BYTES // 3, MOST_BYTES - 1, 2 * MOST_BYTES])
def test_how_much_is_read_does_not_depend_on_how_it_arrives(size: int) -> None:
    begin, end = HTTP + b"200 OK\r\nX: ", b"\r\n\r\n"
    for more, why in ((0, ""), (1, "more than 64 KiB")):
        answer = begin + b"y" * (MOST_BYTES - len(begin + end) + more) + end
        assert verdict([answer[at : at + size] for at in range(0, len(answer), size)]) == why


def test_a_body_that_does_not_come_leaves_what_the_header_says() -> None:
    answer = HttpAnswer((200,))
    assert answer.feed(HTTP + b"500 Oh\r\nContent-Length: 5\r\n") is None
    assert answer.why_by_header == ""
    assert answer.feed(b"\r\n") is None
    assert answer.why_by_header == "500, Oh"
    assert answer.feed(END) == "500, Oh"
