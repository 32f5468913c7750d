"""The port by which a generation is asked that takes connections from a channel."""

from __future__ import annotations

import socket
from contextlib import ExitStack, closing

import pytest
from socketprotector_client import wire

from socketprotector.daemon.delivery.queue.probe_port import ProbePort, is_probe
from socketprotector.daemon.delivery.queue.queue_watch import QueueWatch
from socketprotector.system.channel import Channel
from socketprotector.system.loop import Loop
from tests.generation_channel import generation_channel
from tests.running import eventually


def turn(loop: Loop) -> None:
    """Let it do what is to be done now."""
    loop.running = True
    loop.call_after("turned", 0.0, lambda: setattr(loop, "running", False))
    loop.run()


def fill(channel: Channel, fd: int) -> int:
    """Send what may be clients until there is no room; return how many."""
    header = wire.HEADER.pack(wire.VERSION, wire.KIND_CONNECTION, 0, 0, 1)
    for count in range(10_000):
        try:
            channel.send(header, fd)
        except BlockingIOError:
            return count
    raise AssertionError("there is always room")


def test_what_finds_no_room_waits_and_is_sent_when_there_is_some(loop: Loop) -> None:
    with ExitStack() as stack:
        channel = stack.enter_context(closing(Channel.make(4)))
        way = stack.enter_context(closing(ProbePort(loop, channel, 0).target))
        clients = fill(channel, channel.read.fileno())
        ours = stack.enter_context(socket.create_connection(way.address))
        ours.setblocking(False)
        for _ in range(3):
            turn(loop)
            with pytest.raises(BlockingIOError):
                ours.recv(1)
            assert way.waits(ours)
            assert channel.depth() == clients

        for _ in range(clients):
            taken = channel.take_back()
            assert taken is not None
            assert not is_probe(taken[0])
            socket.close(taken[1])
        eventually(lambda: turn(loop) or channel.depth() == 1, "it is sent")  # type: ignore[func-returns-value]
        assert way.waits(ours)
        taken = channel.take_back()
        assert taken is not None
        assert is_probe(taken[0])
        socket.close(taken[1])
        assert not way.waits(ours)


def test_a_question_that_was_taken_does_not_wait_behind_another_ports(loop: Loop) -> None:
    """A worker that serves one after the other has it, and waits for its end.

    Whoever took the other one for it would not end it, and so the other one would never be taken.
    """
    with ExitStack() as stack:
        channel = stack.enter_context(closing(generation_channel(4)))
        clients = QueueWatch(
            loop, accepted=lambda: 0, send_again=lambda _: None, untaken=lambda *_: None
        )
        clients.follow(channel)
        ways = [
            stack.enter_context(closing(ProbePort(loop, channel, 0, lambda: clients).target))
            for _ in "ab"
        ]
        connections = []
        for count, way in enumerate(ways, 1):
            connections.append(stack.enter_context(socket.create_connection(way.address)))
            while channel.depth() < count:
                turn(loop)
        assert [way.waits(one) for way, one in zip(ways, connections, strict=True)] == [True, True]

        taken = channel.take_back()
        assert taken is not None
        stack.callback(socket.close, taken[1])
        assert [way.waits(one) for way, one in zip(ways, connections, strict=True)] == [False, True]
