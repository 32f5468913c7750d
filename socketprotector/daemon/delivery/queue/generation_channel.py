"""The queue of one generation: a channel that knows the generation's record."""

from __future__ import annotations

from ....system.channel import Channel
from ...generation import OpenGeneration


class GenerationChannel(Channel):
    """A generation's channel.  When the channel ends, the generation's record notes the end."""

    def __init__(self, ends: Channel, generation: OpenGeneration, *, adopted: bool = False) -> None:
        """Take ownership of both ends.  adopted: an earlier program made the channel."""
        super().__init__(ends.read, ends.write)
        self.generation = generation
        #: Whether a worker has taken a connection; assumed True for an adopted channel.
        self.taken_from = adopted
        #: Whether it was reported that no worker takes connections.
        self.said_untaken = False
        #: met: how many new connections were sent here, except those that a QueueWatch counts now
        #: (QueueWatch.new_in).  sent: QueueWatch.sent when a QueueWatch last left this channel.
        self.met = self.sent = 0

    @property
    def known(self) -> frozenset[int] | None:
        """The indices of the listeners that its workers know; None: all listeners."""
        return self.generation.record.knows

    def knows_of(self, index: int) -> bool:
        """Return whether the workers know a listener, and so can get the listener's connections."""
        return self.generation.knows(index)

    def end(self) -> None:
        """Let the workers read end of file, and record the end."""
        super().end()
        self.generation.note_ended()
