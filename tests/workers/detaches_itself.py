"""Detaches itself as daemons do, and what lives on is deaf to TERM.

The first process ends when the last one has left its process group, and is deaf.
"""

import os
import signal

detached, done = os.pipe()
if os.fork():
    os.close(done)
    os.read(detached, 1)
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.close(detached)
os.close(done)
signal.pause()
