"""O_NONBLOCK of listening sockets that were passed in: recorded, and restored by the next program.

Workers may set it as they like.  It belongs to the open file description, so it is shared with the
process that passed the socket in.  systemd sets it again at each start of the service (NonBlocking=
of the unit), under running workers that have set it otherwise; not on those from its fd store.

Source: systemd.service(5), fcntl(2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from ....system.listener import Listener
from ...runtime import Runtime

#: A server that has just been started sets up its sockets: looked at after so long, then after
#: twice that, and so on, until it is this.
_FIRST_S = 1.0
_LAST_S = 64.0
_TIMER = "listener-flags"


class ListenerFlags:
    """The non-blocking ones among the listeners that were passed in."""

    def __init__(self, listeners: Callable[[], Collection[Listener]], runtime: Runtime) -> None:
        """listeners: all that there are."""
        self._listeners = listeners
        self._runtime = runtime
        self._nonblocking: tuple[int, ...] = ()

    @property
    def _passed_in(self) -> list[Listener]:
        return [each for each in self._listeners() if each.shared and each.settings.foreign]

    def record(self) -> tuple[int, ...]:
        """Return which do not block now, by index."""
        self._nonblocking = tuple(each.index for each in self._passed_in if not each.blocks)
        return self._nonblocking

    def watch(self, after_s: float = _FIRST_S) -> None:
        """See for a while whether workers set them: nothing tells of it."""
        if self._passed_in:
            if self._nonblocking != self.record():
                self._runtime.persist()
            if after_s <= _LAST_S:
                again = 2 * after_s
                self._runtime.loop.call_after(_TIMER, after_s, lambda: self.watch(again))

    def adopt(self, nonblocking: Collection[int]) -> None:
        """Put them back to what an earlier program has written down."""
        for each in self._passed_in:
            each.socket.setblocking(each.index not in nonblocking)
