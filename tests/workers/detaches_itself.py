"""Detaches itself as daemons do, and what lives on is deaf to TERM."""

import os
import signal

if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.pause()
