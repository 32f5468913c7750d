"""A false instance: a control socket that answers with its worst, until its client leaves."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

EVENT = b'{"v":1,"event":"x","at":1.0,"level":"info"}\n'
#: What drives a terminal, forges a line, turns text around, or cannot be encoded.
ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\x7f\u202e\u2028\ud800"
#: How a behaviour sends; False when the client has left.
Send = Callable[[bytes], bool]


def events(send: Send) -> None:
    """Send events without end, and never the answer."""
    while send(EVENT * 20_000):
        pass


def other_answers(send: Send) -> None:
    """Send answers to requests that it was not sent."""
    while send(b'{"v":1,"id":"other","ok":true,"result":{}}\n' * 1000):
        pass


def no_end_of_line(send: Send) -> None:
    """Send one line without end."""
    while send(b" " * 65_536):
        pass


def drops(send: Send) -> None:
    """Send one byte now and then."""
    while send(b" "):
        time.sleep(0.01)


def silence(send: Send) -> None:
    """Send nothing, for as long as the client stays."""


def depth(send: Send) -> None:
    send(b'{"v":1,"id":1,"ok":true,"result":' + b"[" * 200_000 + b"\n")


def values(send: Send) -> None:
    """Send an answer that would take a hundred times its length in memory."""
    send(b'{"v":1,"id":1,"ok":true,"result":{"generations":[' + b"{}," * 1_000_000 + b"{}]}}\n")


def nonsense(send: Send) -> None:
    send(bytes(range(256)).replace(b"\n", b"") * 10 + b"\n")


def digits(send: Send) -> None:
    send(b'{"v":1,"id":1,"ok":true,"result":{"pid":' + b"9" * 60_000 + b"}}\n")


#: Those from which no answer can be had.
BEHAVIOURS = {
    each.__name__: each
    for each in (
        *(events, other_answers, no_end_of_line, drops, silence, depth, values, nonsense, digits),
    )
}


def saying(result: object) -> Callable[[Send], None]:
    """Return a behaviour that gives this as the result of the first request."""

    def behave(send: Send) -> None:
        send(json.dumps({"v": 1, "id": 1, "ok": True, "result": result}).encode() + b"\n")

    return behave


@contextlib.contextmanager
def instance(path: Path, behave: Callable[[Send], None]) -> Iterator[str]:
    """Listen at a path, and behave like this towards each client when it has sent a line."""
    threads: list[threading.Thread] = []
    clients: list[socket.socket] = []

    def serve(sock: socket.socket) -> None:
        def send(data: bytes) -> bool:
            try:
                sock.sendall(data)
            except OSError:
                return False
            return True

        with sock, contextlib.suppress(OSError):
            if sock.recv(65_536):
                behave(send)
                while sock.recv(65_536):  # until the client leaves
                    pass

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                clients.append(listener.accept()[0])
                threads.append(threading.Thread(target=serve, args=(clients[-1],)))
                threads[-1].start()

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        accepts = threading.Thread(target=accept)
        accepts.start()
        try:
            yield str(path)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            accepts.join()
            for client in clients:
                with contextlib.suppress(OSError):  # it has left
                    client.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join()
