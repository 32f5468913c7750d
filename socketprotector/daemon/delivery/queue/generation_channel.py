"""The queue of one generation: its channel, and what its record says about its workers."""

from __future__ import annotations

from ....system.channel import Channel
from ...generation import OpenGeneration


class GenerationChannel(Channel):
    """A generation's channel; its end goes into the generation's record."""

    def __init__(self, ends: Channel, generation: OpenGeneration, *, adopted: bool = False) -> None:
        """Take ownership of both ends.  adopted: an earlier program made the channel."""
        super().__init__(ends.read, ends.write)
        self.generation = generation
        #: Whether a worker has taken a connection from it; assumed for an adopted channel.
        self.taken_from = adopted
        #: Whether it was reported that no worker takes from it.
        self.said_untaken = False
        #: The counts of a QueueWatch when it left the channel: new clients, and all records sent.
        self.met = self.sent = 0

    @property
    def knows(self) -> frozenset[int] | None:
        """The indices of the listeners that its workers know; None: all listeners."""
        return self.generation.record.knows

    def knows_of(self, index: int) -> bool:
        """Return whether its workers know a listener, so that they can get its connections."""
        return self.generation.knows(index)

    def end(self) -> None:
        """Let the workers read end of file, and record that."""
        super().end()
        self.generation.note_ended()
