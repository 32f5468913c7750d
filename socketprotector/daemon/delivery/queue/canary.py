"""Sends a canary its share of the new connections; the route gets the rest.

A canary is a new generation that at first gets only a share of the clients.  The route is the
generation that gets all other clients.  We number the connections to listeners that both
generations know.  A connection's number decides whether the canary gets it (in_share() of
model/share.py).  If sending to the canary fails, the route gets the connection at once.

The route cannot get a connection to a listener that only the canary knows.  If sending a newly
accepted connection of this kind fails, undelivered.py keeps it, and a timer sends it later.  Until
then we accept nothing from listeners that only the canary knows.
"""

from __future__ import annotations

from collections.abc import Callable

from ....core.events import Event, Untaken
from ....model.share import in_share
from ....system.loop import Loop
from .. import UNTAKEN_S, untaken_message
from .acceptor import Send
from .generation_channel import GenerationChannel
from .outlet import Outlet
from .probe_sender import is_probe
from .queue_watch import QueueWatch
from .undelivered import listener_of

#: The canary fails if connections wait in its queue, and its workers take none for this time.
#: After the workers have taken a connection, the limit is UNTAKEN_S: the workers may just be busy.
CANARY_NEVER_TAKEN_S = 2.0
#: The longest pause between two looks at the canary's queue.
_LAST_LOOK_S = 0.5
#: The pause before we try again to send the kept connections.
_AGAIN_S = 0.05
_AGAIN = "canary-again"


class CanaryQueue:
    """The canary's channel and share; without a channel there is no canary."""

    def __init__(
        self,
        loop: Loop,
        post: Callable[[Event], None],
        outlet: Outlet,
        resume: Callable[[], None],
        *,
        count: int,
    ) -> None:
        """resume: sends the kept connections, and accepts again.

        count: the value of `self.count` before the last upgrade or kill of the protector.
        """
        self._loop, self._post, self._outlet, self._resume = loop, post, outlet, resume
        self.channel: GenerationChannel | None = None
        self._share = 0
        #: How many connections we have numbered (see the module docstring), for all canaries.
        self.count = count
        #: How many connections we accepted for the queues of canaries.
        self.accepted = 0
        self._will_retry = False  # True: a timer will send the kept connections
        self.watch = QueueWatch(
            loop,
            accepted=lambda: self.accepted,
            send_again=self._send_again,
            untaken=self._untaken,
            limits_s=(CANARY_NEVER_TAKEN_S, UNTAKEN_S),
            last_look_s=_LAST_LOOK_S,
            timer="canary-look",
        )

    def lead_to(self, channel: GenerationChannel | None, share: int) -> None:
        """Send this share of the connections to a canary's channel; None: there is no canary.

        share: in ten-thousandths.
        """
        if channel is not self.channel:
            self._loop.cancel(_AGAIN)
            self._will_retry = False
        self.channel, self._share = channel, share
        self.watch.follow(channel)

    def only_canary_knows(self, index: int) -> bool:
        """Return whether the canary knows this listener, but the route does not."""
        channel, route = self.channel, self._outlet.route
        knows = channel is not None and channel.knows_of(index)
        return knows and route is not None and not route.knows_of(index)

    def sender(self, index: int) -> Send | None:
        """Return the function that sends a listener's connections.

        None: the canary gets none of these connections, or must first get the kept connections.
        """
        channel, route = self.channel, self._outlet.route
        if channel is None or route is None or not channel.knows_of(index):
            return None
        if route.knows_of(index):
            return self._send_shared(channel, route)
        return None if self._will_retry else self._send_alone(channel)

    def _send_shared(self, channel: GenerationChannel, route: GenerationChannel) -> Send:
        send_to_canary, send_to_route = channel.write.sendmsg, route.write.sendmsg
        share = self._share

        def send(buffers: list[bytes], rights: list[tuple[int, int, bytes]], flags: int) -> None:
            count = self.count
            self.count = count + 1
            if in_share(count, share):
                try:
                    send_to_canary(buffers, rights, flags)
                except OSError:
                    pass  # the route gets the connection at once
                else:
                    self._count_sent()
                    return
            send_to_route(buffers, rights, flags)

        return send

    def _send_alone(self, channel: GenerationChannel) -> Send:
        send_to_canary = channel.write.sendmsg

        def send(buffers: list[bytes], rights: list[tuple[int, int, bytes]], flags: int) -> None:
            try:
                send_to_canary(buffers, rights, flags)
            except OSError:
                # The connection was meant for the canary, so count it in our `accepted`.  The
                # canary's QueueWatch adds this count to its `sent`.  The route's QueueWatch
                # subtracts this count from all accepted connections.  Neither queue got the
                # connection, so the two calls below undo both changes.  (The acceptor catches this
                # error.  The acceptor also adds the connection to the route's `sent`, and subtracts
                # the connection again.  So the acceptor's changes need no correction here.)
                self.accepted += 1
                self.watch.subtract_counted()
                self._outlet.queue_watch.add_uncounted()
                raise
            self._count_sent()

        return send

    def _count_sent(self) -> None:
        self.accepted += 1
        if not self.watch.runs:
            self.watch.start()

    # -- failures --------------------------------------------------------------

    def _untaken(self, seconds: float, waiting: int, ever: bool) -> None:
        if self.channel is not None:
            reason = f"{untaken_message(seconds, ever=ever)}; clients waiting: {waiting}"
            self._post(Untaken(self.channel.generation.record.number, reason))

    def keep(self, header: bytes, fd: int) -> None:
        """Keep a connection for the canary, and send it again later.  Takes ownership of fd."""
        self._outlet.undelivered.keep_first(header, fd)
        self._send_later()

    def _send_later(self) -> None:
        self._will_retry = True
        self._loop.call_after(_AGAIN, _AGAIN_S, self._end_wait)

    def _end_wait(self) -> None:
        self._will_retry = False
        self._resume()

    def send_kept(self) -> None:
        """Send the kept connections that only the canary can get, until a send fails."""
        kept, channel = self._outlet.undelivered, self.channel
        while channel is not None and not self._will_retry and kept.has(self.only_canary_knows):
            taken = kept.take(self.only_canary_knows) if channel.has_room() else None
            if taken is None:  # no room, or the state cannot be written
                self._send_later()
            elif not self._send(channel, *taken):
                self.keep(*taken)

    def _send_again(self, channel: GenerationChannel) -> None:
        """Send all queued connections again, in the same order (queue_watch.py says why)."""
        shortage, last_number = self._outlet.shortage, self._outlet.undelivered.number
        for _ in range(channel.depth()):
            taken = shortage.take_back(channel) if not shortage.lasts else None
            if taken is None:
                return
            self.watch.subtract_counted()
            header, fd = taken
            if fd < 0:
                self._outlet.lost += not is_probe(header)
            elif not self._send(channel, header, fd):
                self._send_elsewhere(header, fd, last_number)

    def _send(self, channel: GenerationChannel, header: bytes, fd: int) -> bool:
        """Send one connection and close fd.  If that fails, return False and leave fd open."""
        try:
            channel.send(header, fd)
        except OSError:
            return False
        self.watch.add_uncounted()
        self._outlet.let_go(fd)
        return True

    def _send_elsewhere(self, header: bytes, fd: int, last_number: int) -> None:
        """Send a client's connection to the route, or keep it; drop a probe.

        last_number: see Undelivered.keep_older().  Takes ownership of fd.
        """
        route = self._outlet.route
        if is_probe(header):
            self._outlet.let_go(fd)
        elif route is None or not route.knows_of(listener_of(header)):
            # This connection is older than the connections kept before _send_again() began, so
            # keep it in front of them.
            self._outlet.undelivered.keep_older(header, fd, last_number)
            self._send_later()
        elif self._outlet.is_free:
            self._outlet.send(route, header, fd)
        else:
            self._outlet.undelivered.keep_last(header, fd)  # Outlet.send_kept() sends it
