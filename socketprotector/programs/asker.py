"""The asker: asks a generation by HTTP whether it may serve.

A process of its own, because http.client and ssl are not to stay in the protector, and what answers
may do so badly or never.  It is given questions, says what came of each try, and ends with its
line, which is all that it knows of the protector.  Run as a script, on the standard library alone:

    python asker.py LINE

LINE is the number of a SEQPACKET socket.  Each message there is a question, see `Asked`, with a
connection to ask by.  What it says of that: `+` the answer was good; `-WHY` it was not; `~WHY`
there was none in time.  In front of WHY stands the number of the question, and a space.

Under --handoff listener it also forwards what comes to the probe address:

    python asker.py LINE LISTENING

The one message says where it connects to; it copies bytes both ways.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

#: Each try, where the question does not say.
LIMIT_S = 5.0
#: And at most: sockets take milliseconds as a C int, 24.8 days, and an operator may give any time.
_LONGEST_S = 86_400.0
#: Where the system is short of something.
_PAUSE_S = 0.05
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

    def flush(self) -> None:
        """Do nothing: each response flushes what another one of the same answer has closed.

        Python 3.13 would report that on stderr, for each answer with 1xx before it.
        """

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n") and (line or self._begun) and len(line) != size:
            raise BadAnswer("closed within its header")
        self._begun = True
        return line


class Answering:
    """What http.client.HTTPResponse takes as a socket."""

    def __init__(self, answer: Answer) -> None:
        self._lines = Lines(answer)

    def makefile(self, mode: str) -> Lines:
        return self._lines


class Asked:
    """One question: where, as whom, and what.

    As the protector sends it: JSON with `address`, `source` and `options` (of the socket) of a
    connection that reaches the generation, where a path has port 0; and `kind`, `host`, `path` and
    `good`, all good statuses; and maybe a `number`, and `limit_s` of each try, which is `limit` in
    words.
    """

    def __init__(self, text: bytes) -> None:
        self._told = json.loads(text)
        limit_s: float = self._told.get("limit_s", LIMIT_S)
        self._limit_s = min(limit_s, _LONGEST_S)
        words: str = self._told.get("limit", f"{LIMIT_S:.0f}s")
        self._limit = words if limit_s <= _LONGEST_S else "1d"
        self._late = False

    def connect(self, limit_s: float) -> socket.socket:
        """Connect to the generation.  Raises OSError."""
        told = self._told
        host, port = told["address"]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        one = socket.socket(family if port else socket.AF_UNIX)
        try:
            for level, option, value in told["options"]:
                one.setsockopt(level, option, value)
            if told["source"]:
                one.bind((told["source"], 0))
            one.settimeout(limit_s)
            one.connect((host, port) if port else host)
        except BaseException:
            one.close()
            raise
        return one

    def says(self, given: socket.socket | None = None) -> bytes:
        """Ask, and return what to say of it."""
        why = self.ask(given)
        sign = "+" if not why else "~" if self._late else "-"
        number = f"{self._told['number']} " if "number" in self._told else ""
        return f"{sign}{number}{why}".encode()

    def ask(self, given: socket.socket | None = None) -> str:
        """Return why the answer is not good; "" if it is.

        given: a connection, maybe not yet made.
        """
        until = time.monotonic() + self._limit_s
        self._late = False
        try:
            with given or self.connect(self._limit_s) as plain:
                _await_connected(plain, until)
                why = self._fetch(plain, until)
        except TimeoutError:
            self._late = True
            why = f"no answer within {self._limit}"
        except BadAnswer as error:
            why = str(error)
        except http.client.RemoteDisconnected:
            why = "closed without an answer"
        except http.client.HTTPException as error:
            why = f"no HTTP: {_shown(str(error) or type(error).__name__)}"
        except ConnectionRefusedError:
            why = "refused"
        except OSError as error:
            why = error.strerror or str(error)
            if hasattr(error, "reason"):  # an SSLError
                why = f"no TLS: {error.reason or why}"
        except Exception as error:
            # What the standard library makes of an odd host, say; or it has no ssl here.
            why = f"cannot be asked: {_shown(str(error) or type(error).__name__)}"
        return f"GET {self._told['path']}: {why}" if why else ""

    def _fetch(self, plain: socket.socket, until: float) -> str:
        told = self._told
        plain.settimeout(max(0.001, until - time.monotonic()))
        with self._secured(plain) as one:
            header = (
                f"GET {told['path']} HTTP/1.1",
                f"Host: {told['host'] or _shown_address(*told['address'])}",
                "User-Agent: SocketProtector",
                "Accept: */*",
                "Connection: close",
            )
            one.sendall("".join(f"{line}\r\n" for line in (*header, "")).encode("ascii"))
            answering = Answering(Answer(one, until))
            said: list[http.client.HTTPResponse] = []  # kept, as one that is not closes the rest
            while not said or (100 <= said[-1].status < 200 and said[-1].status != 101):
                said.append(http.client.HTTPResponse(answering, method="GET"))  # type: ignore[arg-type]
                said[-1].begin()  # 103, say, comes before the answer
            response = said[-1]
            if response.status in told["good"]:
                return ""
            try:
                body = response.read1(_SHOWN)
            except (OSError, BadAnswer, http.client.HTTPException):
                body = b""
            says = _shown(body.decode("utf-8", "replace").strip()) if body.strip() else ""
            return f"{response.status}, {says or _line(response.reason) or 'no text'}"

    def _secured(self, plain: socket.socket) -> socket.socket:
        if self._told["kind"] != "https":
            return plain
        import ssl  # here: not every Python has it

        # It is our own: what is asked is whether it answers, not who it is.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        host: str = self._told["host"]
        name = "" if host.startswith("[") else host.partition(":")[0]  # without the port
        name.encode("idna")  # one that is none is told here, before that has taken the socket
        return context.wrap_socket(plain, server_hostname=name or None)


def _await_connected(one: socket.socket, until: float) -> None:
    """Raises OSError, TimeoutError where that takes too long."""
    waiting = select.poll()
    waiting.register(one.fileno(), select.POLLOUT)
    if not waiting.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError
    if failed := one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(failed, os.strerror(failed))
    one.settimeout(max(0.001, until - time.monotonic()))


def _shown_address(host: str, port: int) -> str:
    """Return what stands in the Host header."""
    if not port:
        return "localhost"  # it is a UNIX socket
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _shown(text: str) -> str:
    return f'"{_line(text)}"'


def _line(text: str) -> str:
    """Return one short line of what may be anything."""
    line = " ".join(text.split())[:_SHOWN]
    return "".join(each if each.isprintable() else "?" for each in line)


def say(line: socket.socket, text: bytes) -> None:
    """Send a message to the protector; end where it does not listen any more."""
    try:
        line.send(text)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # as where the end of the line is read first


# -- the probe address -----------------------------------------------------------


def forward(listening: socket.socket, asked: Asked) -> None:
    """Copy what comes there to the generation, and back, for ever."""
    room = threading.BoundedSemaphore(_AT_ONCE)
    while True:
        room.acquire()
        try:
            one, _ = listening.accept()
            threading.Thread(target=_forward_one, args=(one, asked, room), daemon=True).start()
        except (OSError, RuntimeError):  # the system is short of something
            room.release()
            time.sleep(_PAUSE_S)


def _forward_one(one: socket.socket, asked: Asked, room: threading.BoundedSemaphore) -> None:
    try:
        with one, asked.connect(LIMIT_S) as other:
            other.settimeout(None)
            back = threading.Thread(target=_copy, args=(other, one), daemon=True)
            back.start()
            _copy(one, other)
            back.join()
    except (OSError, RuntimeError):
        pass  # the generation does not listen, say, which whoever has connected sees
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

    def work(asked: Asked, given: socket.socket | None) -> None:
        # Not for long: the line has ended; or there is no memory, and another process is due.
        with contextlib.suppress(Exception):
            if len(sys.argv) > 2:
                forward(socket.socket(fileno=int(sys.argv[2])), asked)
            else:
                say(line, asked.says(given))
                return
        os._exit(1)

    while True:
        try:
            text, fds, _, _ = socket.recv_fds(line, _MOST_BYTES, 1)
        except ConnectionResetError:  # its other end was closed before what we said was read
            text, fds = b"", []
        if not text:
            os._exit(0)  # what is under way has nothing to finish
        given = socket.socket(fileno=fds[0]) if fds else None
        try:
            threading.Thread(target=work, args=(Asked(text), given), daemon=True).start()
        except RuntimeError:  # no more threads
            os._exit(1)


if __name__ == "__main__":
    main()
