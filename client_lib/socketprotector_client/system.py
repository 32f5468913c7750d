"""The system's own sockets, epoll, poll and threads, also in a program that gevent has patched.

gevent puts others in their place, in the modules themselves.  Its sockets set O_NONBLOCK, which
for the channel is everybody's; and epoll it takes away.
"""

from __future__ import annotations

import _thread
import select
import socket
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Socket", "allocate_lock", "epoll", "poll", "start_thread"]


def _own(module: ModuleType, name: str) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return getattr(module, name)
    return monkey.get_original(module.__name__, name)


if TYPE_CHECKING:
    from _thread import allocate_lock as allocate_lock
    from _thread import start_new_thread as start_thread
    from select import epoll as epoll
    from select import poll as poll
    from socket import socket as Socket
else:
    Socket = _own(socket, "socket")
    epoll = _own(select, "epoll")
    poll = _own(select, "poll")
    allocate_lock = _own(_thread, "allocate_lock")
    start_thread = _own(_thread, "start_new_thread")
