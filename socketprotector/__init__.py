"""The daemon that owns the listening sockets of another daemon."""

__version__ = "0.1.0"
