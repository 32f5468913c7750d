"""Probes of a generation that takes connections from a channel: real connections."""

from __future__ import annotations

import select
import socket
from contextlib import ExitStack, closing

import pytest
from socketprotector_client import wire

from socketprotector.daemon.delivery.queue.probe_sender import ProbeSender, is_probe
from socketprotector.daemon.delivery.queue.queue_watch import QueueWatch
from socketprotector.system.channel import Channel
from socketprotector.system.loop import Loop
from tests.generation_channel import generation_channel
from tests.running import DEADLINE_S, eventually

ADDRESS = "127.0.0.1", 80


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


def test_a_probe_that_could_not_be_sent_was_not_taken(loop: Loop) -> None:
    """It is closed, which looks the same to the client."""
    channel = Channel.make(4)
    target = ProbeSender(loop, channel, 0).target(ADDRESS)
    with closing(channel), closing(target):
        channel.read.shutdown(socket.SHUT_RD)
        client, code = target.connect()
        with client:
            assert code == 0
            assert select.select([client], [], [], DEADLINE_S)[0]
            assert client.recv(1) == b""
            with pytest.raises(BrokenPipeError):
                target.waits(client)


def test_a_probe_without_room_waits_and_is_sent_when_there_is_some(loop: Loop) -> None:
    with ExitStack() as stack:
        channel = stack.enter_context(closing(Channel.make(4)))
        target = stack.enter_context(closing(ProbeSender(loop, channel, 0).target(ADDRESS)))
        clients = fill(channel, channel.read.fileno())
        ours, code = target.connect()
        stack.enter_context(ours)
        assert code == 0
        for _ in range(3):
            turn(loop)
            with pytest.raises(BlockingIOError):
                ours.recv(1)
            assert target.waits(ours)
            assert channel.depth() == clients

        for _ in range(clients):
            taken = channel.take_back()
            assert taken is not None
            assert not is_probe(taken[0])
            socket.close(taken[1])
        eventually(lambda: turn(loop) or channel.depth() == 1, "it is sent")  # type: ignore[func-returns-value]
        assert target.waits(ours)
        taken = channel.take_back()
        assert taken is not None
        assert is_probe(taken[0])
        socket.close(taken[1])
        assert not target.waits(ours)


def test_a_probe_that_was_taken_does_not_wait_behind_another_senders(loop: Loop) -> None:
    """A worker that serves one after the other has it, and waits for its end.

    If we took the other for it, we would not end it, and the other would never be taken.
    """
    with ExitStack() as stack:
        channel = stack.enter_context(closing(generation_channel(4)))
        clients = QueueWatch(
            loop, accepted=lambda: 0, send_again=lambda _: None, untaken=lambda *_: None
        )
        clients.follow(channel)
        targets = [
            stack.enter_context(
                closing(ProbeSender(loop, channel, 0, lambda: clients).target(ADDRESS))
            )
            for _ in "ab"
        ]
        probes = [stack.enter_context(each.connect()[0]) for each in targets]
        waits = [each.waits(one) for each, one in zip(targets, probes, strict=True)]
        assert waits == [True, True]

        taken = channel.take_back()
        assert taken is not None
        stack.callback(socket.close, taken[1])
        waits = [each.waits(one) for each, one in zip(targets, probes, strict=True)]
        assert waits == [False, True]
