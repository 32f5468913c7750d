"""Says that it is ready and never takes a connection; leaves at TERM."""

import _signal as signal

from plain import say

say(b"READY=1")
signal.pause()
