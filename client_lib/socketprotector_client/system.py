"""The system's own sockets, epoll, poll and threads, also in a program that gevent has patched.

gevent replaces these in the standard modules.  gevent's sockets set O_NONBLOCK, a flag of the
channel that all processes share.  And gevent removes epoll.
"""

from __future__ import annotations

import _thread
import select
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

__all__ = ["Socket", "allocate_lock", "epoll", "poll", "running_asyncio", "start_thread"]


def running_asyncio() -> Any:
    """Return asyncio's running loop, or None; without importing asyncio, which is large."""
    asyncio = sys.modules.get("asyncio")
    return asyncio._get_running_loop() if asyncio is not None else None


def _own(module: ModuleType, name: str) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return getattr(module, name)
    return monkey.get_original(module.__name__, name)


if TYPE_CHECKING:
    from select import epoll as epoll
    from socket import socket as Socket
else:
    Socket = _own(socket, "socket")
    epoll = _own(select, "epoll")
poll = _own(select, "poll")
allocate_lock = _own(_thread, "allocate_lock")
start_thread = _own(_thread, "start_new_thread")
