"""Detects workers that take no connections from the queue of the route or of a canary (canary.py).

The route is the generation that gets all new clients, except the share of a canary.

The kernel may wake only one worker for a connection (EPOLLEXCLUSIVE).  If that worker is killed or
suspended before it reads, the other workers stay asleep while a client waits.  So while the queue
is not empty, a timer calls _look(), which peeks at the oldest connection (the head).  If two looks
in a row find the same head, we take back the whole queue and send it again in the same order.
That wakes another worker.  If the head stays the same for too long, we report the workers.  When a
look finds the queue empty, the timer stops.

If we accepted connections since the last save, a look starts a timer that saves the state after
SAVE_S.  So the saved count of accepted connections is almost up to date.  If the protector is
killed, the program that replaces it continues this count.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ....model.lazy_dataclass import KW_ONLY, mutable
from ....system.loop import Loop
from .. import NEVER_TAKEN_S, UNTAKEN_S
from .generation_channel import GenerationChannel

#: The first and the longest pause before a look at the queue's head; the pause doubles while the
#: head stays the same.
FIRST_LOOK_S = 0.05
LAST_LOOK_S = 1.6
#: The time from a look until the state is saved.
SAVE_S = 1.0
_SAVE = "forwarder-save"


@mutable
class QueueWatch:
    """Looks at one channel's queue at intervals, from the first send until the queue is empty."""

    loop: Loop
    _: KW_ONLY
    #: Returns how many connections this program has accepted for the present and earlier routes.
    #: Connections that could not be sent count, too.  In a canary's watch: how many connections
    #: this program has accepted for the present and earlier canaries.
    accepted: Callable[[], int]
    #: Sends all queued connections again.
    send_again: Callable[[GenerationChannel], None]
    #: See Forwarder.__init__().
    untaken: Callable[[float, int, bool], None]
    #: How long the head may stay the same before untaken() is called.  The first limit applies
    #: until a worker has taken a connection from the channel.  The second limit applies afterwards.
    limits_s: tuple[float, float] = (NEVER_TAKEN_S, UNTAKEN_S)
    #: Saves the state.  None, for a canary: the watch of the route saves the state.
    save: Callable[[], object] | None = None
    last_look_s: float = LAST_LOOK_S
    timer: str = "forwarder-look"
    #: Whether the timer runs; otherwise the next send must call start().
    runs: bool = False
    _saved: int = 0  # the result of accepted() when the state was last saved
    _extra: int = 0  # the difference between `sent` and accepted()
    _accepted_before: int = 0  # the result of accepted() when follow() was called
    _channel: GenerationChannel | None = None  # the channel of the route, or of a canary
    _head: bytes | None = None  # the header of the oldest queued connection, at the last look
    _head_since: float = 0.0
    _look_s: float = FIRST_LOOK_S

    def follow(self, channel: GenerationChannel | None) -> None:
        """Watch this channel from now on; None: watch no channel."""
        before, accepted = self._channel, self.accepted()
        if channel is before and channel is not None:
            return
        if before is not None:
            before.met += self.new_in(before)
            before.sent = self.sent
        self._channel, self._head = channel, None
        queued = channel.depth() if channel is not None else 0
        self._extra = max(queued, channel.sent if channel is not None else 0) - accepted
        self._accepted_before = accepted
        if queued:  # sent earlier, for example before an upgrade or a kill
            self.start()

    def new_in(self, channel: GenerationChannel) -> int:
        """Return how many new connections we accepted for a channel since follow().

        0: we follow another channel.
        """
        return self.accepted() - self._accepted_before if channel is self._channel else 0

    def start(self) -> None:
        """Start the looks after a connection was sent."""
        self.runs = self._channel is not None
        if self.runs:
            self.loop.call_after(self.timer, self._look_s, self._look)

    @property
    def sent(self) -> int:
        """Return how many connections were counted as sent to the channel.

        follow() sets this number to the count of the channel's earlier QueueWatch.  That count
        lacks connections that were sent while no QueueWatch followed the channel, such as early
        probes.  So if more connections are queued, follow() sets this number to the number of
        queued connections.  Connections that listener_drain.py sends later do not count.
        """
        return self.accepted() + self._extra

    def add_uncounted(self) -> None:
        """Count a sent connection that accepted() does not count."""
        self._extra += 1
        if not self.runs:
            self.start()

    def subtract_counted(self) -> None:
        """Subtract a counted connection that could not be sent, or was taken back."""
        self._extra -= 1

    def untaken_s(self, channel: GenerationChannel) -> float | None:
        """Return for how long the looks have found the same connection at the head of the queue.

        None: the time is below the limit in `limits_s`, no connection was queued at the last look,
        or we do not follow this channel.
        """
        if channel is not self._channel or self._head is None:
            return None
        seconds = time.monotonic() - self._head_since
        return seconds if seconds >= self.limits_s[channel.taken_from] else None

    def is_stuck(self, channel: GenerationChannel) -> bool:
        """Return whether a connection waits, and no worker has taken one since the last look.

        If the last look found an empty queue, or if there was no look yet, return True if any
        connection waits.
        """
        if channel is not self._channel or not self.runs:
            return False
        try:
            head = channel.peek()
        except OSError:  # out of memory: assume that the connections are stuck
            return True
        return head is not None and self._head in (None, head)

    def _look(self) -> None:
        is_saved = self.save is None or self._saved == self.accepted()
        if not is_saved and self.loop.due(_SAVE) is None:
            self.loop.call_after(_SAVE, SAVE_S, self._save)
        channel = self._channel
        if channel is None:
            self.runs = False
            return
        try:
            head = channel.peek()
        except OSError:  # out of memory: try again at the next look
            self.start()
            return
        if head is not None and head == self._head:
            self._look_s = min(2 * self._look_s, self.last_look_s)
            seconds = self.untaken_s(channel)
            if seconds is not None and not channel.untaken_reported:
                channel.untaken_reported = True
                self.untaken(seconds, channel.depth(), channel.taken_from)
                if self._channel is not channel:  # the report has ended the canary
                    self.start()
                    return
            self.send_again(channel)
        else:
            # A worker has taken a connection if the head has changed, if the queue is empty, or if
            # fewer connections are queued than were sent.
            channel.taken_from = (
                channel.taken_from
                or self._head is not None
                or head is None
                or self.sent > channel.depth()
            )
            self._look_s, self._head_since = FIRST_LOOK_S, time.monotonic()
        self._head = head
        if head is None:
            self.runs = False
        else:
            self.start()

    def _save(self) -> None:
        if self.save is not None:
            self._saved = self.accepted()
            self.save()
