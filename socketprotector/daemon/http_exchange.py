"""Sends an HTTP request over one connection, and judges the answer.

Request and answer pass through the event loop, so a server that answers badly or never holds
nothing up.  Only TLS needs another process, the prober (prober_client.py).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Collection

from ..model.http_answer import MOST_BYTES, HttpAnswer
from ..system.loop import WRITE, Loop


class HttpExchange:
    """One request, and its answer."""

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        request: bytes,
        good: Collection[int],
        done: Callable[[str], None],
    ) -> None:
        """Send the request when the connection is established.  Raises OSError.

        connection: does not block; the caller closes it after close().
        request: b"": the prober sends it, and the caller calls end() after the prober's report.
        good: the statuses of good answers.
        done: called once, with why the answer is bad; "": it is good.
        """
        self._loop, self._connection, self._done = loop, connection, done
        self._request = request
        #: Why the connection ended early; "": it did not; None: the prober reports it.
        self._end_why = "" if request else None
        self._answer = HttpAnswer(good)
        if request:
            loop.watch(connection.fileno(), self._send, WRITE)
        else:
            loop.watch(connection.fileno(), self._receive)

    @property
    def why_by_header(self) -> str:
        """Why the answer is bad, if its header says so but no body has come; otherwise ""."""
        return self._answer.why_by_header

    def end(self, why: str) -> None:
        """Judge the answer, all of which the prober has sent.

        why: how the prober's connection failed; "": it has ended.
        """
        self._end_why = why
        self._receive()

    def close(self) -> None:
        """Stop, without calling `done`."""
        self._loop.unwatch(self._connection.fileno())

    def _send(self) -> None:
        try:
            if code := self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code))
            self._request = self._request[self._connection.send(self._request) :]
            if not self._request:
                # watch() could fail, and the answer would count as bad.
                self._loop.rewatch(self._connection.fileno(), self._receive)
        except BlockingIOError:
            return
        except OSError as error:
            self._finish(_text(error))

    def _receive(self) -> None:
        why = None
        while why is None:
            try:
                data = self._connection.recv(MOST_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                data, self._end_why = b"", _text(error)
            if not data and self._end_why is None:
                self.close()  # the prober reports how its connection has ended
                return
            if not data and self._end_why:
                why = self._answer.why_by_header or self._end_why
            else:
                why = self._answer.feed(data)
        self._finish(why)

    def _finish(self, why: str) -> None:
        self.close()
        self._done(why)


def request(path: str, host: str) -> bytes:
    """Return a GET request.  host: the Host header."""
    header = (
        f"GET {path} HTTP/1.1",
        f"Host: {host}",
        "User-Agent: SocketProtector",
        "Accept: */*",
        "Connection: close",
    )
    return "".join(f"{line}\r\n" for line in (*header, "")).encode("ascii")


def _text(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    return error.strerror or str(error)
