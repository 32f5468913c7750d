"""Chooses the listener class for an address, TCP or UNIX."""

from __future__ import annotations

from ..model.settings import ListenerSettings
from .listener import Listener
from .tcp_listener import TcpListener
from .unix_listener import UnixListener


def listener_of(
    fd: int,
    index: int,
    settings: ListenerSettings,
    *,
    shared: bool = False,
    sibling: int = -1,
    reserved: int = -1,
    again: tuple[int, ...] = (0, 0, 0),
) -> Listener:
    """Return the listener that owns a bound, listening descriptor; see Listener."""
    kind = UnixListener if settings.address.startswith("unix:") else TcpListener
    return kind(fd, index, settings, shared=shared, sibling=sibling, reserved=reserved, again=again)
