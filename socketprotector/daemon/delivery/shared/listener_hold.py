"""A hold under --handoff listener: new clients get no answer, so their kernels try again.

Workers accept whatever comes to a socket of theirs, so during a hold new clients are steered to one
that no worker has, and that answers nobody (system/reuseport.py).  It is ours alone: it outlives us
with a guard or an fd store, as the hold does; without, it is gone with us, and so is the hold.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from ....model.lazy_dataclass import field, mutable
from ....model.records import HoldRecord
from ....system.listener import SCARCE, Listener

#: A client tries again after as long as it has tried, and a second; for those that have tried for
#: longer than this a stop does not stay open.
_LAST_S = 10.0


@mutable
class ListenerHold:
    """Whether there is one, and who may still be trying after it."""

    listeners: Callable[[], Sequence[Listener]]
    #: What another program would have to know.
    record: HoldRecord = field(default_factory=HoldRecord)

    @property
    def on(self) -> bool:
        """Whether there is one."""
        return self.record.began_at > 0.0

    def turn(self, on: bool) -> None:
        """Begin or end it; to be told to the kernel."""
        now, tried_until = time.monotonic(), self.record.tried_until
        if on and not self.on:
            self.record = HoldRecord(now, tried_until)
        elif self.on and not on:
            # Those of a UNIX socket wait in its backlog, and try once.
            if any(each.can_be_held and not each.path for each in self.listeners()):
                its_s = min(now - self.record.began_at + 1.0, _LAST_S)
                tried_until = max(tried_until, now + its_s)
            self.record = HoldRecord(tried_until=tried_until)

    @property
    def late_s(self) -> float:
        """For how long clients that it has kept out may come yet."""
        return max(0.0, self.record.tried_until - time.monotonic())

    def cannot(self) -> str | None:
        """Say why there can be none; None: there can."""
        listeners = self.listeners()
        refused = self.refusal(listeners)
        for each in listeners if refused is None else ():
            try:
                if each.can_be_held:
                    each.reserve()
            except OSError as error:
                why = f"{each.settings.address}: {error.strerror}"
                if error.errno in SCARCE:
                    return why
                # One of TCP would have been bound at the start, maybe by another user.
                when = "once files can be made in its directory" if each.path else "after a restart"
                return f"{why}; possible {when}"
        return refused

    def refusal(self, listeners: Iterable[Listener]) -> str | None:
        """Say why one of these cannot be held; None: each can."""
        for each in listeners:
            if not each.shared or each.lost or each.can_be_held:
                continue
            address = each.settings.address
            if each.settings.foreign:
                return f"{address} was passed in, and its owner goes on listening there"
            return f"{address} has one socket for all, from which workers accept directly"
        return None
