"""The asker: asks a generation by HTTP whether it may serve.

A process of its own, because http.client and ssl are not to stay in the protector, and what answers
may do so badly or never.  It is given one question, says what came of each try, and ends with its
line, which is all that it knows of the protector.  Run as a script, on the standard library alone:

    python asker.py LINE

LINE is the number of a SEQPACKET socket.  The first message there is the question, see `Asked`.
What it says: `+` the answer was good; `-WHY` it was not.

Under --handoff listener it also forwards what comes to the probe address:

    python asker.py LINE LISTENING

It connects to where the question is, and copies bytes both ways.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import ssl
import sys
import threading
import time
from typing import Any

#: Each try.
LIMIT_S = 5.0
#: The next try begins after a tenth of the time that it has taken so far, from the first to the
#: second of these.
_FIRST_PAUSE_S = 0.05
_LAST_PAUSE_S = 1.0
_PAUSE_SHARE = 0.1
#: What is read of one answer.
_MOST_BYTES = 64 * 1024
#: What is said of it.
_SHOWN = 120
_COPIED_BYTES = 64 * 1024
#: Connections that are forwarded at once; others wait.
_AT_ONCE = 64


class BadAnswer(Exception):
    """It is no HTTP, or too much of it; the message says why."""


class Answer(io.RawIOBase):
    """What comes from a socket, until the try's time is over or it is too much."""

    def __init__(self, one: socket.socket, until: float) -> None:
        self._socket, self._until = one, until
        self._left = _MOST_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left:
            raise BadAnswer(f"more than {_MOST_BYTES // 1024} KiB")
        self._socket.settimeout(max(0.001, self._until - time.monotonic()))
        count = self._socket.recv_into(memoryview(buffer)[: self._left])
        self._left -= count
        return count


class Lines(io.BufferedReader):
    """An answer whose header must be whole: http.client takes the end of file as its end."""

    _begun = False

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and (line or self._begun) and len(line) != size:
            raise BadAnswer("closed within its header")
        self._begun = True
        return line


class Answering:
    """What http.client.HTTPResponse takes as a socket."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def makefile(self, mode: str) -> Lines:
        return Lines(self._answer)


class Asked:
    """One question: where, as whom, and what.

    As the protector sends it: JSON with `address`, `source` and `options` (of the socket) of a
    connection that reaches the generation; and `kind`, `host`, `path` and `good`, all good
    statuses.
    """

    def __init__(self, text: bytes) -> None:
        self._told = json.loads(text)

    def connect(self, limit_s: float) -> socket.socket:
        """Connect to the generation.  Raises OSError."""
        told = self._told
        host, port = told["address"]
        one = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            for level, option, value in told["options"]:
                one.setsockopt(level, option, value)
            if told["source"]:
                one.bind((told["source"], 0))
            one.settimeout(limit_s)
            one.connect((host, port))
        except BaseException:
            one.close()
            raise
        return one

    def ask(self) -> str:
        """Return why the answer is not good; "" if it is."""
        until = time.monotonic() + LIMIT_S
        try:
            with self.connect(LIMIT_S) as plain:
                why = self._fetch(plain, until)
        except TimeoutError:
            why = f"no answer within {LIMIT_S:g} s"
        except BadAnswer as error:
            why = str(error)
        except http.client.RemoteDisconnected:
            why = "closed without an answer"
        except http.client.HTTPException as error:
            why = f"no HTTP: {_shown(str(error) or type(error).__name__)}"
        except ssl.SSLError as error:
            why = f"no TLS: {error.reason or error.strerror}"
        except ConnectionRefusedError:
            why = "refused"
        except OSError as error:
            why = error.strerror or str(error)
        return f"GET {self._told['path']}: {why}" if why else ""

    def _fetch(self, plain: socket.socket, until: float) -> str:
        told = self._told
        with self._secured(plain) as one:
            host, port = told["address"]
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            header = (
                f"GET {told['path']} HTTP/1.1",
                f"Host: {told['host'] or address}",
                "User-Agent: SocketProtector",
                "Accept: */*",
                "Connection: close",
            )
            one.sendall("".join(f"{line}\r\n" for line in (*header, "")).encode("ascii"))
            response = http.client.HTTPResponse(Answering(Answer(one, until)), method="GET")  # type: ignore[arg-type]
            response.begin()
            if response.status in told["good"]:
                return ""
            try:
                body = response.read1(_SHOWN)
            except (OSError, BadAnswer, http.client.HTTPException):
                body = b""
            says = _shown(body.decode("utf-8", "replace").strip()) if body.strip() else ""
            return f"{response.status}, {says or response.reason or 'no text'}"

    def _secured(self, plain: socket.socket) -> socket.socket:
        if self._told["kind"] != "https":
            return plain
        # It is our own: what is asked is whether it answers, not who it is.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context.wrap_socket(plain, server_hostname=self._told["host"] or None)


def _shown(text: str) -> str:
    """Return one short line of what may be anything."""
    line = " ".join(text.split())
    shown = "".join(each if each.isprintable() else "?" for each in line[:_SHOWN])
    return f'"{shown}"'


def ask_again_and_again(line: socket.socket, asked: Asked) -> None:
    """Say what each try has brought, for ever."""
    began = time.monotonic()
    while True:
        why = asked.ask()
        line.send(f"-{why}".encode() if why else b"+")
        for_s = time.monotonic() - began
        time.sleep(min(max(_FIRST_PAUSE_S, _PAUSE_SHARE * for_s), _LAST_PAUSE_S))


# -- the probe address -----------------------------------------------------------


def forward(listening: socket.socket, asked: Asked) -> None:
    """Copy what comes there to the generation, and back, for ever."""
    room = threading.BoundedSemaphore(_AT_ONCE)
    while True:
        room.acquire()
        try:
            one, _ = listening.accept()
        except OSError:
            room.release()
            time.sleep(_FIRST_PAUSE_S)
            continue
        threading.Thread(target=_forward_one, args=(one, asked, room), daemon=True).start()


def _forward_one(one: socket.socket, asked: Asked, room: threading.BoundedSemaphore) -> None:
    try:
        with one, asked.connect(LIMIT_S) as other:
            other.settimeout(None)
            back = threading.Thread(target=_copy, args=(other, one), daemon=True)
            back.start()
            _copy(one, other)
            back.join()
    except OSError:
        pass  # the generation does not listen, which whoever has connected sees
    finally:
        room.release()


def _copy(one: socket.socket, other: socket.socket) -> None:
    """Copy until the end of file, and pass that on."""
    try:
        while data := one.recv(_COPIED_BYTES):
            other.sendall(data)
    except OSError:
        for each in (one, other):  # the other direction ends, too
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
    else:
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)


def main() -> None:
    # It ends with its line only: a stop of the service ends the protector first.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    line = socket.socket(fileno=int(sys.argv[1]))
    line.set_inheritable(False)
    asked = Asked(line.recv(_MOST_BYTES))

    def work() -> None:
        with contextlib.suppress(OSError):  # of the line: it has ended
            if len(sys.argv) > 2:
                forward(socket.socket(fileno=int(sys.argv[2])), asked)
            else:
                ask_again_and_again(line, asked)

    threading.Thread(target=work, daemon=True).start()
    while line.recv(1):
        pass
    os._exit(0)  # what is under way has nothing to finish


if __name__ == "__main__":
    main()
