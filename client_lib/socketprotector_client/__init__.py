"""Client library for daemons that SocketProtector hands their connections to.

The same program runs under the protector and without it.  Choose one way to
get connections: `connections`, `serve`, `aserve`, `Listener` for a framework, `Channel`
for a loop of your own, or `SocketServer` for children that share what their parent accepts.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .channel import Channel
    from .connection import Connection
    from .errors import Drained, OutOfDescriptors, ProtocolError
    from .listener import Listener
    from .process import draining, listener_of, on_drain, ready
    from .sd_notify import notify
    from .server import SocketServer
    from .serving import connections, serve
    from .streams import aserve

__version__ = "0.1.0"

#: Public name -> its module.  Loaded at first use: the protector wants only `wire` of this
#: package in its memory, and a blocking daemon no asyncio.
_HOMES = {
    "Channel": "channel",
    "Connection": "connection",
    "Drained": "errors",
    "Listener": "listener",
    "OutOfDescriptors": "errors",
    "ProtocolError": "errors",
    "SocketServer": "server",
    "aserve": "streams",
    "connections": "serving",
    "draining": "process",
    "listener_of": "process",
    "notify": "sd_notify",
    "on_drain": "process",
    "ready": "process",
    "serve": "serving",
}

__all__ = [
    "Channel",
    "Connection",
    "Drained",
    "Listener",
    "OutOfDescriptors",
    "ProtocolError",
    "SocketServer",
    "aserve",
    "connections",
    "draining",
    "listener_of",
    "notify",
    "on_drain",
    "ready",
    "serve",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value
