"""Serves one connection at a time, and neither end of file nor TERM makes it leave."""

import _signal as signal

from plain import answer, say, take

signal.signal(signal.SIGTERM, signal.SIG_IGN)
say(b"READY=1")
while taken := take():
    with taken[1] as client:
        answer(client)
while True:
    signal.pause()
