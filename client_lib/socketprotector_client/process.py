"""Questions and messages that concern the whole process."""

from __future__ import annotations

from .worker import current

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Callable, Protocol, Union

    class HasFileno(Protocol):
        def fileno(self) -> int: ...

    class HasExtraInfo(Protocol):
        def get_extra_info(self, name: str, default: object = None) -> object: ...


def draining() -> bool:
    """Return whether this worker gets no more connections and should finish.

    A server of long-lived connections asks after each request, and then answers
    with `Connection: close`.  Costs one poll() until it is true; it stays true.
    """
    return current().drain.begun()


def on_drain(callback: Callable[[], object]) -> None:
    """Call callback once when the drain begins; at once if it has begun already.

    It runs in a thread of the library's own (in asyncio, pass on with
    loop.call_soon_threadsafe).  `serve`, `aserve` and `connections` wait for it
    before they end.  An exception in it is logged.
    """
    current().drain.on_begin(callback)


def ready() -> None:
    """Say READY=1, once, for a program that takes from the Channel itself.

    All other ways to get connections say it on their own.
    """
    current().ready(retires=False)


def listener_of(connection: Union[HasFileno, HasExtraInfo]) -> str:
    """Return the listen address that an open connection came through: `tcp:0.0.0.0:80`.

    Takes what the framework has: a socket (wrapped in TLS, too), an asyncio
    transport or a StreamWriter.  Raises KeyError for any other socket.
    """
    if not hasattr(connection, "fileno"):
        connection = connection.get_extra_info("socket")  # type: ignore[assignment]
    return current().listener_by_fd[connection.fileno()]  # type: ignore[union-attr]
