"""The daemon that owns the listening sockets of another daemon.

Under connection handoff all workers of a generation take from one queue; none of them is chosen.
legacy.py, relay.py, watch.py and stdio/ only lead older programs to programs/, until 1.0.
"""

__version__ = "0.1.0"
