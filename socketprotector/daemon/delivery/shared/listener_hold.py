"""Holds new clients under --handoff listener: they reach no worker, but are not refused.

Workers accept every client that comes to their sockets.  So during a hold, we steer new clients to
a third socket of each listener, the reserved socket, which no worker has.  TCP clients get no
answer from this socket (system/reuseport.py), so their kernels try again.  UNIX clients wait in the
reserved socket's backlog.  With a guard or an fd store, the reserved socket and the hold survive
the protector's death.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable

from ....model.lazy_dataclass import field, mutable
from ....model.records import HoldRecord
from ....system.listener import RESOURCE_ERRNOS, Listener
from .shared_listeners import SharedListeners

#: After a hold, held TCP clients still retry, at intervals that grow with their waiting time.  A
#: stop waits for these retries, but at most for this time.
_LAST_S = 10.0


@mutable
class ListenerHold:
    """The hold, and the time until which clients still retry after a hold has ended."""

    listeners: SharedListeners
    #: What the next program needs, after an upgrade or a kill.
    record: HoldRecord = field(default_factory=HoldRecord)

    @property
    def on(self) -> bool:
        """Return whether a hold is in force."""
        return self.record.began_at > 0.0

    def turn(self, on: bool) -> None:
        """Begin the hold, or end it if `on` is False; Steering.steer() must follow."""
        now, tried_until = time.monotonic(), self.record.tried_until
        if on and not self.on:
            self.record = HoldRecord(now, tried_until)
        elif self.on and not on:
            # A TCP client that has waited for N seconds retries within the next N + 1 seconds.
            # UNIX clients do not retry: they wait in a backlog.
            if any(each.can_be_held and not each.path for each in self.listeners.all):
                retry_s = min(now - self.record.began_at + 1.0, _LAST_S)
                tried_until = max(tried_until, now + retry_s)
            self.record = HoldRecord(tried_until=tried_until)

    @property
    def late_s(self) -> float:
        """Return for how many more seconds held TCP clients may retry; 0: none retries."""
        return max(0.0, self.record.tried_until - time.monotonic())

    def prepare(self) -> str | None:
        """Make the reserved sockets; return why a hold is impossible; None: it is possible."""
        listeners = self.listeners.all
        refused = self.refusal(listeners)
        for each in listeners if refused is None else ():
            try:
                if each.can_be_held:
                    each.reserve()
            except OSError as error:
                why = f"{each.settings.address}: {error.strerror}"
                # EEXIST: another program's file is at the path, and `why` says what to do.
                if error.errno in RESOURCE_ERRNOS or error.errno == errno.EEXIST:
                    return why
                # TCP: perhaps we no longer have the privilege that binding the address needs.
                when = "after a restart"
                if each.path:
                    when = "once files can be made in the socket's directory"
                return f"{why}; a hold is possible {when}"
        return refused

    def loss(self, listeners: Iterable[Listener]) -> str | None:
        """Return which clients would be lost if a reload removed these listeners; None: no clients.

        During a hold, clients of a UNIX path wait at the reserved socket, which no worker has.  TCP
        clients are not connected yet, so they are refused, not lost.
        """
        lost = [each.settings.address for each in listeners if each.is_reserved_for_clients]
        return f"the clients that wait at {' '.join(lost)} would be reset" if lost else None

    def refusal(self, listeners: Iterable[Listener]) -> str | None:
        """Return why clients cannot be held at one of these listeners; None: they can."""
        for each in listeners:
            if not each.shared or each.lost or each.can_be_held:
                continue
            address = each.settings.address
            if each.settings.foreign:
                return f"{address}: another program opened this socket, and keeps listening there"
            return (
                f"{address} has one socket for all generations, from which workers accept directly"
            )
        return None
