"""The prober: sends HTTP probes to a generation, and reports the answers.

The prober is a separate process: ssl must not stay in the protector's memory, and a server may
answer badly or never.  A reload waits until the prober has started, and the start takes processor
time from clients.  So the prober imports little; http.client would double the time.  The prober
exits when its line to the protector is closed.  It runs as a script, on the standard library alone:

    python prober.py LINE

LINE is the descriptor of a SEQPACKET socket.  Each message on it describes a probe
(`ProbeRequest`), and passes the connection to send the probe over.  The prober reports `+` for a
good answer, `-WHY` for a bad answer, `~WHY` for no answer in time.  The probe's number and a space
come before WHY.

Under --handoff listener the prober also forwards connections from the probe address:

    python prober.py LINE LISTENING

Then the only message says where to connect, and the prober copies bytes in both directions.  It
reports `+0` for each connection to the generation.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The time limit of a probe that has none of its own.
LIMIT_S = 5.0
#: The longest limit.  An operator may set any time, but a socket's timeout is a C int of
#: milliseconds: 24.8 days.
_LONGEST_S = 86_400.0
#: The pause before another accept while the system is short of descriptors or memory.
_PAUSE_S = 0.05
#: How much of an answer is read.
_MOST_BYTES = 64 * 1024
#: How many characters of an answer are reported.
_SHOWN = 120
_COPIED_BYTES = 64 * 1024
#: Connections that are forwarded at once; others wait.
_AT_ONCE = 64


class BadAnswer(Exception):
    """An answer that is not HTTP, or too long; the message says why."""


class Answer:
    """What a server answers, up to the probe's time limit and _MOST_BYTES.

    Messages are read as RFC 9112 defines them, but their fields are not checked.
    """

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._socket, self._until = connection, until
        self._received = bytearray()
        self._read = 0  # how many of the received bytes line() has returned

    def head(self) -> tuple[int, str, dict[bytes, bytes]]:
        """Return the status, its reason and the header fields.  Raises BadAnswer, OSError."""
        first = self.line()
        version, code, reason = (*first.split(None, 2), b"", b"", b"")[:3]
        if version[:7] != b"HTTP/1." or len(code) != 3 or not code.isdigit() or code < b"100":
            raise BadAnswer(f"no HTTP: {_shown(first.decode('latin-1'))}")
        fields = {}
        while line := self.line():
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip()
        return int(code), reason.decode("latin-1"), fields

    def body(self, fields: dict[bytes, bytes]) -> bytes:
        """Return the first bytes of the body.  Raises BadAnswer, OSError; ValueError: no number."""
        length = int(fields.get(b"content-length", b"%d" % _SHOWN))
        if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
            length = int(self.line().partition(b";")[0], 16)
        if self._read == len(self._received) and length:
            self._receive()
        return bytes(self._received[self._read :][: min(length, _SHOWN)])

    def line(self) -> bytes:
        """Return the next line of a header, without its end."""
        while (end := self._received.find(b"\n", self._read)) < 0:
            if not self._receive():
                where = "within its header" if self._received else "without an answer"
                raise BadAnswer(f"closed {where}")
        line = bytes(self._received[self._read : end])
        self._read = end + 1
        return line.removesuffix(b"\r")

    def _receive(self) -> bool:
        """Receive more bytes; return False at the end of the answer."""
        left = _MOST_BYTES - len(self._received)
        if not left:
            raise BadAnswer(f"more than {_MOST_BYTES // 1024} KiB")
        self._socket.settimeout(max(0.001, self._until - time.monotonic()))
        data = self._socket.recv(left)
        self._received += data
        return bool(data)


class ProbeRequest:
    """One probe, as the protector describes it in JSON.

    `address`, `source` and `options` (of the socket) make a connection to the generation; the path
    of a UNIX socket has port 0.  `kind`, `host` and `path` describe the request; `good` has the
    good statuses.  Optional: `number`, `limit_s` (the time left), and `limit`, the probe's limit
    in words.
    """

    def __init__(self, text: bytes) -> None:
        self._fields = json.loads(text)
        limit_s: float = self._fields.get("limit_s", LIMIT_S)
        self._limit_s = min(limit_s, _LONGEST_S)
        words: str = self._fields.get("limit", f"{LIMIT_S:.0f}s")
        self._limit = words if limit_s <= _LONGEST_S else "1d"
        self._late = False

    def connect(self, limit_s: float) -> socket.socket:
        """Connect to the generation.  Raises OSError."""
        fields = self._fields
        host, port = fields["address"]
        family, there = _sockaddr(host, port) if port else (socket.AF_UNIX, host)
        connection = socket.socket(family)
        try:
            for level, option, value in fields["options"]:
                connection.setsockopt(level, option, value)
            if fields["source"]:
                connection.bind(_sockaddr(fields["source"], 0)[1])
            connection.settimeout(limit_s)
            connection.connect(there)
        except BaseException:
            connection.close()
            raise
        return connection

    def report(self, given: socket.socket | None = None) -> bytes:
        """Send the probe, and return the report for the protector."""
        why = self.send(given)
        sign = "+" if not why else "~" if self._late else "-"
        number = f"{self._fields['number']} " if "number" in self._fields else ""
        return f"{sign}{number}{why}".encode()

    def send(self, given: socket.socket | None = None) -> str:
        """Send the probe, and return why the answer is bad; "": it is good.

        given: a connection, maybe not yet established.
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
        except ConnectionRefusedError:
            why = "refused"
        except OSError as error:
            why = error.strerror or str(error)
            if hasattr(error, "reason"):  # an SSLError
                why = f"no TLS: {error.reason or why}"
        except Exception as error:
            # For example the host's name is invalid, or this Python has no ssl.
            why = f"cannot be probed: {_shown(str(error) or type(error).__name__)}"
        return f"GET {self._fields['path']}: {why}" if why else ""

    def _fetch(self, plain: socket.socket, until: float) -> str:
        """Send the request, and return why the answer is bad; "": it is good."""
        request = self._fields
        plain.settimeout(max(0.001, until - time.monotonic()))
        with self._secured(plain) as connection:
            header = (
                f"GET {request['path']} HTTP/1.1",
                f"Host: {request['host'] or _shown_address(*request['address'])}",
                "User-Agent: SocketProtector",
                "Accept: */*",
                "Connection: close",
            )
            connection.sendall("".join(f"{line}\r\n" for line in (*header, "")).encode("ascii"))
            answer = Answer(connection, until)
            status, reason, fields = answer.head()
            while status < 200 and status != 101:  # for example 103 comes before the answer
                status, reason, fields = answer.head()
            if status in request["good"]:
                return ""
            body = b""
            if status not in (101, 204, 304):  # these have no body
                with contextlib.suppress(OSError, BadAnswer, ValueError):
                    body = answer.body(fields)
            says = _shown(body.decode("utf-8", "replace").strip()) if body.strip() else ""
            return f"{status}, {says or _line(reason) or 'no text'}"

    def _secured(self, plain: socket.socket) -> socket.socket:
        if self._fields["kind"] != "https":
            return plain
        import ssl  # here: not every Python has it

        # No certificate is verified: the server is our own worker.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        host: str = self._fields["host"]
        name = "" if host.startswith("[") else host.partition(":")[0]  # without the port
        name.encode("idna")  # an invalid name fails here, before wrap_socket() owns the socket
        return context.wrap_socket(plain, server_hostname=name or None)


def _sockaddr(host: str, port: int) -> tuple[int, tuple[Any, ...]]:
    """Return the family of a numeric host, and the address as connect() takes it."""
    # Bytes, because for a str Python would load the IDNA codec.
    found = socket.getaddrinfo(
        host.encode(), port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )
    family, _, _, _, address = found[0]
    return family, address


def _await_connected(connection: socket.socket, until: float) -> None:
    """Wait until a connection is established.  Raises OSError; TimeoutError: not in time."""
    waiting = select.poll()
    waiting.register(connection.fileno(), select.POLLOUT)
    if not waiting.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError
    if failed := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        raise OSError(failed, os.strerror(failed))
    connection.settimeout(max(0.001, until - time.monotonic()))


def _shown_address(host: str, port: int) -> str:
    """Return an address as the Host header has it."""
    if not port:
        return "localhost"  # it is a UNIX socket
    bare = host.partition("%")[0]  # an interface means nothing to others (RFC 6874)
    return f"[{bare}]:{port}" if ":" in host else f"{host}:{port}"


def _shown(text: str) -> str:
    return f'"{_line(text)}"'


def _line(text: str) -> str:
    """Return any text as one short printable line."""
    line = " ".join(text.split())[:_SHOWN]
    return "".join(each if each.isprintable() else "?" for each in line)


def say(line: socket.socket, text: bytes) -> None:
    """Send a message to the protector; exit if the protector has closed the line."""
    try:
        line.send(text)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the same as at the line's end of file in main()


# -- the probe address -----------------------------------------------------------


def forward(listening: socket.socket, request: ProbeRequest, line: socket.socket) -> None:
    """Forward all connections of a listening socket to the generation; never return."""
    room = threading.BoundedSemaphore(_AT_ONCE)
    while True:
        room.acquire()
        try:
            client, _ = listening.accept()
            given = (client, request, room, line)
            threading.Thread(target=_forward_one, args=given, daemon=True).start()
        except (OSError, RuntimeError):  # out of descriptors, memory or threads
            room.release()
            time.sleep(_PAUSE_S)


def _forward_one(
    client: socket.socket,
    request: ProbeRequest,
    room: threading.BoundedSemaphore,
    line: socket.socket,
) -> None:
    try:
        with client, request.connect(LIMIT_S) as server:
            say(line, b"+0")
            server.settimeout(None)
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()
    except (OSError, RuntimeError):
        pass  # for example the generation does not listen; the client sees a closed connection
    finally:
        room.release()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy bytes until end of file, and pass the end of file on."""
    try:
        while data := source.recv(_COPIED_BYTES):
            target.sendall(data)
    except OSError:
        for each in (source, target):  # the other direction ends, too
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
    else:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)


def main() -> None:
    # Only the end of the line ends the prober: at a stop the protector exits first.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    line = socket.socket(fileno=int(sys.argv[1]))
    line.set_inheritable(False)

    def work(request: ProbeRequest, given: socket.socket | None) -> None:
        # An exception means that memory ran out, or the line has ended: exit, and let the protector
        # start another prober.
        with contextlib.suppress(Exception):
            if len(sys.argv) > 2:
                forward(socket.socket(fileno=int(sys.argv[2])), request, line)
            else:
                say(line, request.report(given))
                return
        os._exit(1)

    while True:
        try:
            text, fds, _, _ = socket.recv_fds(line, _MOST_BYTES, 1)
        except ConnectionResetError:  # the protector closed the line before it read our report
            text, fds = b"", []
        if not text:
            os._exit(0)  # the running threads have nothing to finish
        given = socket.socket(fileno=fds[0]) if fds else None
        try:
            threading.Thread(target=work, args=(ProbeRequest(text), given), daemon=True).start()
        except RuntimeError:  # no more threads
            os._exit(1)


if __name__ == "__main__":
    main()
