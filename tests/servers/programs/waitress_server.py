"""waitress that finishes what it has before it leaves.  Usage: waitress_server.py FD

waitress.serve() ends its loop by an exception and drops all that is under way.  So here the loop
runs turn by turn, and after TERM on without the listener until nothing is left to do.
"""

from __future__ import annotations

import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

import waitress
from ready import ready
from waitress import wasyncore
from waitress.channel import HTTPChannel
from wsgi_app import app

GRACE_S = 1.0  # for requests that are on their way in connections that were accepted already
told_at: list[float] = []
channels: dict[int, Any] = {}
listener = socket.socket(fileno=int(sys.argv[1]))
server = waitress.create_server(app, map=channels, sockets=[listener])


def leave(number: int, frame: FrameType | None) -> None:
    told_at.append(time.monotonic())
    server.pull_trigger()


def busy() -> bool:
    """Whether requests are under way, or answers not sent yet."""
    found = [each for each in channels.values() if isinstance(each, HTTPChannel)]
    return any(each.requests or each.total_outbufs_len for each in found)


signal.signal(signal.SIGTERM, leave)
ready()
while not told_at:
    wasyncore.loop(timeout=1, map=channels, use_poll=True, count=1)
server.del_channel(channels)
while time.monotonic() < told_at[0] + GRACE_S or busy():
    wasyncore.loop(timeout=0.05, map=channels, use_poll=True, count=1)
