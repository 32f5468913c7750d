"""Records and restores the O_NONBLOCK flag of listening sockets that systemd passed in.

Workers may change the flag.  The flag belongs to the open file description, so a change affects all
processes that share the socket.  When systemd starts the protector again after a crash, systemd
sets the flag to the unit's NonBlocking=.  The workers that changed the flag may still run, and rely
on their change.  So we restore the recorded flag after such a start.  Sockets that we bound need no
record: after a crash they come from the guard or systemd's fd store, which do not change flags.

Source: systemd.service(5), fcntl(2).
"""

from __future__ import annotations

from collections.abc import Collection

from ....system.listener import Listener
from .shared_listeners import SharedListeners

#: A worker sets up its sockets soon after its start.  So we check the flags after _FIRST_S, then
#: after pauses that double; the last pause is _LAST_S.
_FIRST_S = 1.0
_LAST_S = 64.0
_TIMER = "listener-flags"


class ListenerFlags:
    """Records and restores the O_NONBLOCK flags of the listeners that were passed in."""

    def __init__(self, listeners: SharedListeners) -> None:
        self._listeners = listeners
        self._runtime = listeners.host.runtime
        self._nonblocking: tuple[int, ...] = ()

    @property
    def _passed_in(self) -> list[Listener]:
        return [each for each in self._listeners.all if each.shared and each.settings.foreign]

    def record(self) -> tuple[int, ...]:
        """Record and return the indices of the passed-in listeners that are non-blocking now."""
        self._nonblocking = tuple(each.index for each in self._passed_in if not each.blocks)
        return self._nonblocking

    def watch(self, after_s: float = _FIRST_S) -> None:
        """Check the flags now and for a while, because the kernel does not report a change.

        after_s: the pause before the next check.
        """
        if self._passed_in:
            if self._nonblocking != self.record():
                self._runtime.persist()
            if after_s <= _LAST_S:
                next_s = 2 * after_s
                self._runtime.loop.call_after(_TIMER, after_s, lambda: self.watch(next_s))

    def adopt(self, nonblocking: Collection[int]) -> None:
        """Restore the flags.  nonblocking: the result of record() before an upgrade or a kill."""
        for each in self._passed_in:
            each.socket.setblocking(each.index not in nonblocking)
