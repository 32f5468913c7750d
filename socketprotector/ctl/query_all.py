"""Sends one request to many control sockets at once, in one loop, each with a timeout.

A hundred instances, some of them dead or stopped, take no longer than the slowest answer.
"""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass

from .client import LONGEST_LINE, VERSION, Message, connect, peer_pid
from .errors import NoProtector, PermissionDenied

#: A protector that takes longer is shown as silent.
SURVEY_S = 0.8


@dataclass(frozen=True, slots=True)
class SocketAnswer:
    """What became of one socket: the answer, or in one word why there is none."""

    path: str
    result: Message | None = None
    pid: int = 0  # SO_PEERCRED's; 0 where no process listens
    why: str = ""  # dead, denied, silent, or what it refused with

    @property
    def alive(self) -> bool:
        """Whether a process listens there."""
        return self.why != "dead"


@dataclass(slots=True)
class _Pending:
    path: str
    socket: socket.socket
    pid: int
    got: bytearray


def ask_all(
    paths: Iterable[str], command: str = "status", within_s: float = SURVEY_S
) -> list[SocketAnswer]:
    """Ask all of them the same, without arguments; return what each said, in their order."""
    paths = list(paths)
    found: dict[str, SocketAnswer] = {}
    line = json.dumps({"v": VERSION, "command": command}).encode() + b"\n"
    until = time.monotonic() + within_s
    with selectors.DefaultSelector() as selector:
        for path in dict.fromkeys(paths):
            try:
                sock = connect(path, 0)
            except PermissionDenied:
                found[path] = SocketAnswer(path, why="denied")
                continue
            except NoProtector as error:
                full = isinstance(error.__cause__, BlockingIOError)
                found[path] = SocketAnswer(path, why="silent" if full else "dead")
                continue
            asked = _Pending(path, sock, peer_pid(sock), bytearray())
            try:
                sock.send(line)
            except OSError:
                pass  # told and gone: what it said can still be read
            selector.register(sock, selectors.EVENT_READ, asked)
        while selector.get_map() and (left_s := until - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                if (answer := _read(key.data)) is not None:
                    found[key.data.path] = answer
                    selector.unregister(key.data.socket)
                    key.data.socket.close()
        for key in list(selector.get_map().values()):
            found[key.data.path] = SocketAnswer(key.data.path, pid=key.data.pid, why="silent")
            key.data.socket.close()
    return [found[path] for path in paths]


def _read(asked: _Pending) -> SocketAnswer | None:
    """Take what is there; None while it is not a whole line."""
    try:
        data = asked.socket.recv(65536)
    except BlockingIOError:
        return None
    except OSError:
        data = b""
    asked.got += data
    if b"\n" in data or not data or len(asked.got) > LONGEST_LINE:
        return _found(asked)
    return None


def _found(asked: _Pending) -> SocketAnswer:
    if not asked.got:
        return SocketAnswer(asked.path, why="dead")
    try:
        message = json.loads(asked.got.partition(b"\n")[0])
    except ValueError:
        message = None
    if not isinstance(message, dict):
        return SocketAnswer(asked.path, pid=asked.pid, why="no protector")
    result = message.get("result")
    if message.get("ok") is not True or not isinstance(result, dict):
        return SocketAnswer(asked.path, pid=asked.pid, why=str(message.get("code")))
    return SocketAnswer(asked.path, result, asked.pid)
