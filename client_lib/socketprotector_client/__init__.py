"""Client library for daemons that get their connections from SocketProtector.

The same program runs under the protector and without it.  Choose one way to
get connections: `connections`, `serve`, `aserve`, `Listener` for a framework, `Channel`
for an event loop of your own, or `SocketServer` for forked children that share one queue.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .channel import Channel as Channel
    from .connection import Connection as Connection
    from .errors import Drained as Drained
    from .errors import OutOfDescriptors as OutOfDescriptors
    from .errors import ProtocolError as ProtocolError
    from .listener import Listener as Listener
    from .process import draining as draining
    from .process import listener_of as listener_of
    from .process import on_drain as on_drain
    from .process import post_fork as post_fork
    from .process import ready as ready
    from .sd_notify import notify as notify
    from .server import SocketServer as SocketServer
    from .serving import connections as connections
    from .serving import serve as serve
    from .streams import aserve as aserve

__version__ = "0.9.0"

#: Public name -> its module, loaded at first use.  So the protector loads only `wire` of this
#: package, and a blocking daemon loads no asyncio.
_MODULES = {
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
    "post_fork": "process",
    "ready": "process",
    "serve": "serving",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imported here, because the protector would pay 0.06 MB for it.
    from importlib import import_module

    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
