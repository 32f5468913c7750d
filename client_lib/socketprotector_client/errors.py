"""What this library raises of its own; everything else stays the OSError it was."""

from __future__ import annotations

import errno
import os


class Drained(Exception):
    """No connection will come any more: finish what you have, then exit."""


class ProtocolError(Exception):
    """The protector, or the environment, said what this library does not understand."""


class OutOfDescriptors(OSError):
    """A connection was lost because there was no descriptor to receive it with.

    Only `Channel.take` can raise it: the rest of the library never takes a
    connection unless a descriptor is to spare.
    """

    def __init__(self) -> None:
        super().__init__(
            errno.EMFILE,
            f"cannot receive a connection: {os.strerror(errno.EMFILE)}; it is lost",
        )
