"""Asks many control sockets for their status at once, in one loop, each with a timeout.

A hundred instances, some of them dead or stopped, take no longer than the slowest answer.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from .client import Client, Message
from .errors import NoProtector, RequestRefused

#: A protector that takes longer is shown as silent.
SURVEY_S = 0.8
#: What may be read of all answers that are not whole: above it the longest is no protector's, of
#: which one with 1,000 workers has 300 KB.
_MOST_BYTES = 4 * 1024 * 1024
#: What has been read of all answers that are not whole.  Above it the longest is given up: that of
#: a protector with 1,000 workers has 300 KB.
_MOST_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class SocketAnswer:
    """The answer of one socket, or in one word why there is none."""

    path: str
    result: Message | None = None
    pid: int = 0  # SO_PEERCRED's; 0 where no process listens
    why: str = ""  # the code of a NoProtector (dead, silent, no protector) or of a refusal

    @property
    def alive(self) -> bool:
        """Whether a process listens there."""
        return self.why != "dead"


def ask_all(paths: Iterable[str], within_s: float = SURVEY_S) -> list[SocketAnswer]:
    """Ask all of them for their status; return each one's answer, in their order."""
    paths = list(paths)
    found: dict[str, SocketAnswer] = {}
    until = time.monotonic() + within_s
    with ExitStack() as opened, selectors.DefaultSelector() as selector:
        for path in dict.fromkeys(paths):
            try:
                client = opened.enter_context(Client(path, 0))
                client.send("status", {}, until)
            except (NoProtector, RequestRefused) as error:
                found[path] = SocketAnswer(path, why=error.code)
                continue
            selector.register(client, selectors.EVENT_READ, client)
            found[path] = SocketAnswer(path, pid=client.peer_pid, why="silent")  # so far
        while selector.get_map() and (left_s := until - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                client = key.data
                if client.fileno() < 0:
                    continue  # the longest, a moment ago
                try:
                    result = client.answer(0.0)
                    if result is None:  # not yet a whole line
                        longest = _longest(selector)
                        if longest is None:
                            continue
                        client = longest
                        raise client.foreign()
                    found[client.path] = SocketAnswer(client.path, result, client.peer_pid)
                except (NoProtector, RequestRefused) as error:
                    pid = 0 if error.code == "dead" else client.peer_pid
                    found[client.path] = SocketAnswer(client.path, None, pid, error.code)
                selector.unregister(client)
                client.close()
    return [found[path] for path in paths]


def _longest(selector: selectors.BaseSelector) -> Client | None:
    """Return the client that has read the most, where all together have read too much."""
    clients = [key.data for key in selector.get_map().values()]
    too_much = sum(each.unread_bytes for each in clients) > _MOST_BYTES
    return max(clients, key=lambda each: each.unread_bytes) if too_much else None
