"""Reads the answer to an HTTP probe, and says why it is bad.

Pure.  Messages are read as RFC 9112 defines them, but their fields are not checked.
"""

from __future__ import annotations

from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Generator

#: How much of an answer is read.
MOST_BYTES = 64 * 1024
#: How many characters of an answer are reported.
_SHOWN = 120


class BadAnswer(Exception):
    """An answer that is not HTTP, or too long; the message says why."""


class HttpAnswer:
    """The answer of a server, which arrives in pieces."""

    def __init__(self, good: Collection[int]) -> None:
        """good: the statuses of good answers."""
        self._good = good
        self._received = bytearray()
        self._read = 0  # how many of the received bytes _line() has returned
        self._has_ended = False
        #: Why the answer is bad, according to its header alone; "": it is not known yet.
        self.why_by_header = ""
        self._judging = self._judge()
        next(self._judging)

    def feed(self, data: bytes) -> str | None:
        """Take the next bytes, or b"" at the end of the answer.

        Returns why the answer is bad, "" if it is good, or None if more bytes must come.
        """
        self._received += data[: MOST_BYTES - len(self._received)]
        self._has_ended = not data
        try:
            next(self._judging)
        except StopIteration as verdict:
            why: str = verdict.value
            return why
        except BadAnswer as error:
            return str(error)
        return None

    # -- inside: these methods yield when they need more bytes ---------------------------

    def _judge(self) -> Generator[None, None, str]:
        """Return why the answer is bad; "": it is good.  Raises BadAnswer."""
        status, reason, fields = yield from self._header()
        while status < 200 and status != 101:  # for example 103 comes before the answer
            status, reason, fields = yield from self._header()
        if status in self._good:
            return ""
        self.why_by_header = f"{status}, {_line(reason) or 'no text'}"
        body = b""
        if status not in (101, 204, 304):  # these have no body
            with suppress(BadAnswer, ValueError):
                body = yield from self._body(fields)
        text = body.decode("utf-8", "replace").strip()
        return f"{status}, {_quoted(text)}" if text else self.why_by_header

    def _header(self) -> Generator[None, None, tuple[int, str, dict[bytes, bytes]]]:
        """Return the status, its reason and the header fields.  Raises BadAnswer."""
        first = yield from self._line()
        version, code, reason = (*first.split(None, 2), b"", b"", b"")[:3]
        if version[:7] != b"HTTP/1." or len(code) != 3 or not code.isdigit() or code < b"100":
            raise BadAnswer(f"no HTTP: {_quoted(first.decode('latin-1'))}")
        fields = {}
        while line := (yield from self._line()):
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip()
        return int(code), reason.decode("latin-1"), fields

    def _body(self, fields: dict[bytes, bytes]) -> Generator[None, None, bytes]:
        """Return the first bytes of the body.  Raises BadAnswer; ValueError: no number."""
        length = int(fields.get(b"content-length", b"%d" % _SHOWN))
        if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
            length = int((yield from self._line()).partition(b";")[0], 16)
        if self._read == len(self._received) and length:
            yield from self._more()
        return bytes(self._received[self._read :][: min(length, _SHOWN)])

    def _line(self) -> Generator[None, None, bytes]:
        """Return the next line of a header, without its end.  Raises BadAnswer."""
        while (end := self._received.find(b"\n", self._read)) < 0:
            yield from self._more()
            if self._has_ended:
                where = "within its header" if self._received else "without an answer"
                raise BadAnswer(f"closed {where}")
        line = bytes(self._received[self._read : end])
        self._read = end + 1
        return line.removesuffix(b"\r")

    def _more(self) -> Generator[None, None, None]:
        """Let feed() take more bytes.  Raises BadAnswer if it has taken enough."""
        if len(self._received) >= MOST_BYTES:
            raise BadAnswer(f"more than {MOST_BYTES // 1024} KiB")
        yield


def _quoted(text: str) -> str:
    return f'"{_line(text)}"'


def _line(text: str) -> str:
    """Return any text as one short printable line."""
    line = " ".join(text.split())[:_SHOWN]
    return "".join(each if each.isprintable() else "?" for each in line)
