"""Serves one connection at a time, and stays at end of file; TERM ends it."""

import _signal as signal

from plain import answer, say, take

say(b"READY=1")
while taken := take():
    with taken[1] as client:
        answer(client)
signal.pause()
