"""The prober: makes TLS connections to a generation, and forwards connections to it.

The prober is a separate process: ssl must not stay in the protector's memory, and a handshake
blocks.  The prober exits when its line to the protector is closed.  It runs as a script, on the
standard library alone:

    python prober.py LINE

LINE is the descriptor of a SEQPACKET socket.  A message with two descriptors describes an HTTPS
request (`TlsRequest`).  The descriptors are the connection to the generation, and a socket for the
answer.  The prober reports `+` when the answer has ended, `-WHY` if the connection failed, `~WHY`
if the answer has not ended in time.  The request's number and a space come before WHY.

A message with one descriptor, a check command's connection, says where to forward this connection
(`Target`).  The prober copies bytes in both directions.  It reports `+0` for each connection to the
generation.
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

#: The time limit of a forwarded connection's connect().
_CONNECT_S = 5.0
#: The longest limit.  An operator may set any time, but a socket's timeout is a C int of
#: milliseconds: 24.8 days.
_LONGEST_S = 86_400.0
_MESSAGE_BYTES = 64 * 1024
#: How many characters of an exception are reported.
_SHOWN = 120
_COPIED_BYTES = 64 * 1024
#: Connections that are forwarded at once; others are closed.
_AT_ONCE = 64
_room = threading.BoundedSemaphore(_AT_ONCE)


class TlsRequest:
    """A request over TLS, as the protector describes it in JSON.

    `host` is the Host header, `request` the text of the request.  `number` is the probe's number,
    `limit_s` the time left, and `limit` the probe's limit in words.
    """

    def __init__(self, text: bytes) -> None:
        fields = json.loads(text)
        self._host: str = fields["host"]
        self._request: str = fields["request"]
        self._number: int = fields["number"]
        limit_s: float = fields["limit_s"]
        self._limit_s = min(limit_s, _LONGEST_S)
        self._limit: str = fields["limit"] if limit_s <= _LONGEST_S else "1d"

    def carry_out(self, connection: socket.socket, answer: socket.socket) -> bytes:
        """Send the request, copy what comes to `answer`, and return the report for the protector.

        connection: maybe not yet established.
        """
        sign, why = "-", ""
        try:
            with connection, answer:
                self._exchange(connection, answer)
                sign = "+"
        except TimeoutError:
            sign, why = "~", f"no answer within {self._limit}"
        except ConnectionRefusedError:
            why = "refused"
        except OSError as error:
            why = error.strerror or str(error)
            if hasattr(error, "reason"):  # an SSLError
                why = f"no TLS: {error.reason or why}"
        except Exception as error:
            # For example the host's name is invalid, or this Python has no ssl.
            why = f"cannot be probed: {_quoted(str(error) or type(error).__name__)}"
        return f"{sign}{self._number} {why}".encode()

    def _exchange(self, connection: socket.socket, answer: socket.socket) -> None:
        until = time.monotonic() + self._limit_s
        _await_connected(connection, until)
        with self._secured(connection) as secured:
            secured.settimeout(_left_s(until))
            secured.sendall(self._request.encode("ascii"))
            secured.settimeout(_left_s(until))
            while data := secured.recv(_COPIED_BYTES):
                try:
                    answer.sendall(data)
                except (BrokenPipeError, ConnectionResetError):
                    return  # the protector has read enough
                secured.settimeout(_left_s(until))

    def _secured(self, connection: socket.socket) -> socket.socket:
        import ssl  # here: not every Python has it, and forwarding does not need it

        # No certificate is verified: the server is our own worker.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        # The name without the port.
        name = "" if self._host.startswith("[") else self._host.partition(":")[0]
        name.encode("idna")  # an invalid name fails here, before wrap_socket() owns the socket
        return context.wrap_socket(connection, server_hostname=name or None)


class Target:
    """Where to forward connections, as the protector describes it in JSON.

    `address`, `source` and `options` (of the socket) make a connection to the generation; the path
    of a UNIX socket has port 0.
    """

    def __init__(self, text: bytes) -> None:
        self._fields = json.loads(text)

    def connect(self) -> socket.socket:
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
            connection.settimeout(_CONNECT_S)
            connection.connect(there)
        except BaseException:
            connection.close()
            raise
        return connection


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
    connection.settimeout(_left_s(until))


def _left_s(until: float) -> float:
    """Return the time left, as a time limit; the time limit 0 would mean: do not wait."""
    return max(0.001, until - time.monotonic())


def _quoted(text: str) -> str:
    """Return any text as one short printable line, in quotation marks."""
    line = " ".join(text.split())[:_SHOWN]
    return '"' + "".join(each if each.isprintable() else "?" for each in line) + '"'


def say(line: socket.socket, text: bytes) -> None:
    """Send a message to the protector; exit if the protector has closed the line."""
    try:
        line.send(text)
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the same as at the line's end of file in main()


# -- the probe address -----------------------------------------------------------


def forward(client: socket.socket, target: Target, line: socket.socket) -> None:
    """Forward a connection to the generation, to its end."""
    if not _room.acquire(blocking=False):
        client.close()
        return
    try:
        with client, target.connect() as server:
            say(line, b"+0")
            server.settimeout(None)
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()
    except (OSError, RuntimeError):
        pass  # for example the generation does not listen; the client sees a closed connection
    finally:
        _room.release()


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

    def work(text: bytes, given: list[socket.socket]) -> None:
        # An exception means that memory ran out, or the line has ended: exit, and let the protector
        # start another prober.
        with contextlib.suppress(Exception):
            if len(given) == 1:
                forward(given[0], Target(text), line)
            else:
                say(line, TlsRequest(text).carry_out(*given))
            return
        os._exit(1)

    while True:
        try:
            text, fds, _, _ = socket.recv_fds(line, _MESSAGE_BYTES, 2)
        except ConnectionResetError:  # the protector closed the line before it read our report
            text, fds = b"", []
        if not text:
            os._exit(0)  # the running threads have nothing to finish
        given = [socket.socket(fileno=fd) for fd in fds]
        try:
            threading.Thread(target=work, args=(text, given), daemon=True).start()
        except RuntimeError:  # no more threads
            os._exit(1)


if __name__ == "__main__":
    main()
