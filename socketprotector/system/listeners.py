"""Chooses the listener class for an address, TCP or UNIX."""

from __future__ import annotations

from ..model.settings import ListenerSettings
from . import tcp_listener, unix_listener
from .listener import Listener


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
    is_unix = settings.address.startswith("unix:")
    kind = unix_listener.UnixListener if is_unix else tcp_listener.TcpListener
    return kind(fd, index, settings, shared=shared, sibling=sibling, reserved=reserved, again=again)
