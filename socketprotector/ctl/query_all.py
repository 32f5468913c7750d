"""Requests the status from many control sockets at once, in one loop with one timeout.

So a query of 100 protectors takes as long as the slowest answer, and at most the timeout.
"""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

from .client import LONGEST_LINE, Client, Message
from .errors import NoProtector, RequestRefused

#: The default timeout for all answers.  A socket without an answer by then counts as silent.
_ALL_ANSWERS_S = 0.8
#: The most bytes of all incomplete answers together: enough for four answers of LONGEST_LINE.
#: Above this limit, query_all() closes the connection with the longest incomplete answer.
_MOST_BYTES = 4 * LONGEST_LINE


@dataclass(frozen=True, slots=True)
class SocketAnswer:
    """The answer from one socket, or why there is no answer."""

    path: str
    result: Message | None = None
    #: Client.peer; 0 as the pid: no process listens, or the connection failed or ended.
    pid: int = 0
    uid: int = 0
    why: str = ""  # why there is no answer: the code of NoProtector or RequestRefused

    @property
    def alive(self) -> bool:
        """False if `why` is "dead" (see NoProtector); silence or a refusal counts as alive."""
        return self.why != "dead"


def query_all(paths: Iterable[str], within_s: float = _ALL_ANSWERS_S) -> list[SocketAnswer]:
    """Request the status from each socket; return the answers in the order of the paths."""
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
            # An answer replaces this entry.
            found[path] = SocketAnswer(path, None, *client.peer, why="silent")
        while selector.get_map() and (left_s := until - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                client = key.data
                if client.fileno() < 0:
                    continue  # an earlier turn of this loop closed this client as `longest`
                answer = _answer_of(client)
                if answer is None and (longest := _longest_if_too_much(selector)) is not None:
                    client, code = longest, longest.foreign_peer_error().code
                    answer = SocketAnswer(client.path, None, *client.peer, why=code)
                if answer is not None:
                    found[client.path] = answer
                    selector.unregister(client)
                    client.close()
    return [found[path] for path in paths]


def _answer_of(client: Client) -> SocketAnswer | None:
    """Return a client's answer or error; None while the answer is incomplete."""
    try:
        result = client.answer(0.0)  # 0.0: only read what has arrived
    except (NoProtector, RequestRefused) as error:
        pid, uid = (0, 0) if error.code == "dead" else client.peer
        return SocketAnswer(client.path, None, pid, uid, error.code)
    return None if result is None else SocketAnswer(client.path, result, *client.peer)


def _longest_if_too_much(selector: selectors.BaseSelector) -> Client | None:
    """Return the client with the longest incomplete answer, so that the caller closes it.

    Returns None unless all incomplete answers together exceed _MOST_BYTES.
    """
    clients: list[Client] = [key.data for key in selector.get_map().values()]
    if sum(each.unread_bytes for each in clients) <= _MOST_BYTES:
        return None
    return max(clients, key=lambda each: each.unread_bytes)
