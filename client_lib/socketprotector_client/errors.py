"""The library's own exceptions; all other errors are the OSError of the system call."""

from __future__ import annotations

import errno
import os


class Drained(Exception):
    """No more connections will come: finish the open ones, then exit."""


class ProtocolError(Exception):
    """The library does not understand a message of the protector or an environment variable."""


class OutOfDescriptors(OSError):
    """A connection was lost, because the process had no free descriptor to receive it.

    Only `Channel.take` raises it: the rest of the library keeps a descriptor
    free for each connection that it takes.
    """

    def __init__(self) -> None:
        super().__init__(
            errno.EMFILE,
            f"cannot receive a connection: {os.strerror(errno.EMFILE)}; it is lost",
        )
