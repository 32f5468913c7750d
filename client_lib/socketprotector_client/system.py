"""The system's own sockets, epoll and poll, also in a program that gevent has patched.

gevent puts others in their place, in the modules themselves.  Its sockets set O_NONBLOCK, which
for the channel is everybody's; and epoll it takes away.
"""

from __future__ import annotations

import select
import socket
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Socket", "epoll", "poll"]


def _own(module: ModuleType, name: str) -> Any:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return getattr(module, name)
    return monkey.get_original(module.__name__, name)


if TYPE_CHECKING:
    from select import epoll as epoll
    from select import poll as poll
    from socket import socket as Socket
else:
    Socket = _own(socket, "socket")
    epoll = _own(select, "epoll")
    poll = _own(select, "poll")
