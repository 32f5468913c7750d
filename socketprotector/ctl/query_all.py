"""One question to many control sockets at once, in one loop; each answer in its time or never.

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
from .errors import Denied, NoProtector

#: Whoever takes longer is shown as silent.
SURVEY_S = 0.8


@dataclass(frozen=True, slots=True)
class Found:
    """What became of one socket: the answer, or in one word why there is none."""

    path: str
    result: Message | None = None
    pid: int = 0  # SO_PEERCRED's; 0 where nobody listens
    why: str = ""  # dead, denied, silent, or what it refused with

    @property
    def alive(self) -> bool:
        """Whether somebody listens there."""
        return self.why != "dead"


@dataclass(slots=True)
class _Asked:
    path: str
    socket: socket.socket
    pid: int
    got: bytearray


def ask_all(
    paths: Iterable[str], command: str = "status", within_s: float = SURVEY_S
) -> list[Found]:
    """Ask all of them the same, without arguments; return what each said, in their order."""
    paths = list(paths)
    found: dict[str, Found] = {}
    line = json.dumps({"v": VERSION, "command": command}).encode() + b"\n"
    until = time.monotonic() + within_s
    with selectors.DefaultSelector() as selector:
        for path in dict.fromkeys(paths):
            try:
                sock = connect(path, 0)
            except Denied:
                found[path] = Found(path, why="denied")
                continue
            except NoProtector as error:
                full = isinstance(error.__cause__, BlockingIOError)
                found[path] = Found(path, why="silent" if full else "dead")
                continue
            asked = _Asked(path, sock, peer_pid(sock), bytearray())
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
            found[key.data.path] = Found(key.data.path, pid=key.data.pid, why="silent")
            key.data.socket.close()
    return [found[path] for path in paths]


def _read(asked: _Asked) -> Found | None:
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


def _found(asked: _Asked) -> Found:
    if not asked.got:
        return Found(asked.path, why="dead")
    try:
        message = json.loads(asked.got.partition(b"\n")[0])
    except ValueError:
        message = None
    if not isinstance(message, dict):
        return Found(asked.path, pid=asked.pid, why="no protector")
    result = message.get("result")
    if message.get("ok") is not True or not isinstance(result, dict):
        return Found(asked.path, pid=asked.pid, why=str(message.get("code")))
    return Found(asked.path, result, asked.pid)
