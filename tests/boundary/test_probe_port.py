"""The port by which a generation is asked that takes connections from a channel."""

from __future__ import annotations

import socket
from contextlib import closing

import pytest

from socketprotector.daemon.delivery.queue.probe_port import ProbePort
from socketprotector.system.channel import Channel
from socketprotector.system.loop import Loop
from tests.running import eventually


def test_a_connection_that_could_not_be_sent_was_not_taken(loop: Loop) -> None:
    """It is closed, which looks the same to who has connected."""
    channel = Channel.make(4)
    way = ProbePort(loop, channel, 0).target
    with closing(channel), closing(way), socket.create_connection(way.address) as ours:
        assert way.waits(ours)
        channel.read.shutdown(socket.SHUT_RD)

        eventually(lambda: sent(loop, ours), "it is closed")

        with pytest.raises(BrokenPipeError):
            way.waits(ours)


def sent(loop: Loop, ours: socket.socket) -> bool:
    """Turn the loop once; return whether its end is closed."""
    loop.running = True
    loop.call_after("turned", 0.0, lambda: setattr(loop, "running", False))
    loop.run()
    try:
        return ours.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
