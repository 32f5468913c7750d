"""A channel as QueueDelivery has it for a generation, without a protector."""

from __future__ import annotations

from socketprotector.daemon.delivery.queue.generation_channel import GenerationChannel
from socketprotector.daemon.generation import OpenGeneration
from socketprotector.model.records import GenerationRecord, Program
from socketprotector.system.channel import Channel

_PROGRAM = Program("/w", ("w",), "/", (), 0, (), 0)


def generation_channel(queue: int = 64, knows: frozenset[int] | None = None) -> GenerationChannel:
    """Make the channel of a generation that knows these listeners; None: all."""
    generation = OpenGeneration(GenerationRecord(1, _PROGRAM, knows=knows))
    return GenerationChannel(Channel.make(queue), generation)
