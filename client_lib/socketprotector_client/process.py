"""The functions about the whole process: draining, ready, and the listener of a connection."""

from __future__ import annotations

from .worker import current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Optional, Protocol, Union

    class HasFileno(Protocol):
        def fileno(self) -> int: ...

    class HasExtraInfo(Protocol):
        def get_extra_info(self, name: str, default: object = None) -> object: ...


def draining(connection: Optional[Union[HasFileno, HasExtraInfo]] = None) -> bool:
    """Return True if this worker gets no more connections and should finish.

    A server with keep-alive connections calls this after each request; if the result is true, the
    server answers with `Connection: close`.  Once true, the result stays true; before that, each
    call costs one poll().

    connection: as for listener_of.  Under --drain-spread and --stop-spread, the result becomes true
    only when this connection's own turn to end has come.
    """
    worker = current()
    if connection is None or worker.spread is None:
        return worker.drain.begun()
    return worker.drain.begun() and worker.spread.is_due(_number_of(connection))


def on_drain(callback: Callable[[], object]) -> None:
    """Call callback() once when the drain begins, or now if the drain has already begun.

    The callback runs in a thread of the library, which logs exceptions.  If the drain has already
    begun, the callback may run in your thread instead.  In asyncio, use loop.call_soon_threadsafe
    to reach the event loop.  `serve`, `aserve` and `connections` return after the callback has
    ended.
    """
    current().drain.on_begin(callback)


def ready() -> None:
    """Send READY=1, once, for a program that takes from a Channel itself.

    All other ways to get connections send READY=1 automatically.
    """
    current().ready(retires=False)


def post_fork(hook: Callable[[int], object]) -> Callable[[int], object]:
    """Call hook(number) in each forked child of a SocketServer before it serves; return hook.

    This can be used as a decorator.  The number is the lowest, from 0, that no living sibling has.
    An exception ends the child.
    """
    current().post_fork.append(hook)
    return hook


def listener_of(connection: Union[HasFileno, HasExtraInfo]) -> str:
    """Return the listen address of an open connection, such as `tcp:0.0.0.0:80`.

    connection: a socket (also wrapped in TLS), an asyncio transport or a StreamWriter.
    Raises KeyError for a socket that this library did not hand out.
    """
    return current().listener_by_fd[_number_of(connection)]


def _number_of(connection: Union[HasFileno, HasExtraInfo]) -> int:
    if not hasattr(connection, "fileno"):
        connection = connection.get_extra_info("socket")  # type: ignore[assignment]
    return connection.fileno()  # type: ignore[union-attr]
