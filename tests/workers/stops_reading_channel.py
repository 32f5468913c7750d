"""Says that it is ready and never takes a connection; leaves at TERM."""

import signal

from plain import say

say(b"READY=1")
signal.pause()
