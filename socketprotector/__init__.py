"""The daemon that owns the listening sockets of another daemon.

Under connection handoff all workers of a generation take from one queue; none of them is chosen.
"""

__version__ = "0.9.0"
