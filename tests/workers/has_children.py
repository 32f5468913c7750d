"""Starts a process of its own in its group, says its number, and then ignores everything."""

import _signal as signal
import os

from plain import answer, say, take

signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = os.fork()
if child == 0:
    signal.pause()
say(b"READY=1")
os.write(2, b"child=%d\n" % child)
while taken := take():
    with taken[1] as client:
        answer(client)
signal.pause()
