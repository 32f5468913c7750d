"""The queue of one generation: its channel, and the counts of its connections."""

from __future__ import annotations

from ....system.channel import Channel
from ...generation import OpenGeneration


class GenerationChannel(Channel):
    """A generation's channel; end() also notes the end in the GenerationRecord."""

    def __init__(self, ends: Channel, generation: OpenGeneration, *, adopted: bool = False) -> None:
        """Take ownership of both ends.

        adopted: whether an earlier program made the channel, before an upgrade or a kill.
        """
        super().__init__(ends.read, ends.write)
        self.generation = generation
        #: Whether a worker has taken a connection; assumed True for an adopted channel.
        self.taken_from = adopted
        #: Whether we have reported that no worker takes connections.
        self.untaken_reported = False
        #: How many new connections we accepted for this channel before the present QueueWatch
        #: (queue_watch.py) began to follow the channel.  Forwarder.met() adds the connections
        #: accepted since then.  When the QueueWatch stops following, it adds them to this number.
        self.met = 0
        #: How many connections were counted as sent to this channel, by QueueWatches that followed
        #: it.  The next QueueWatch continues the count.
        self.sent = 0

    @property
    def known(self) -> frozenset[int] | None:
        """The indices of the listeners that the workers know; None: all listeners."""
        return self.generation.record.knows

    def knows_of(self, index: int) -> bool:
        """Return whether the workers know a listener, and so can get the listener's connections."""
        return self.generation.knows(index)

    def end(self) -> None:
        """Let the workers read end of file after the queued connections, and note the end."""
        super().end()
        self.generation.note_finishing()
