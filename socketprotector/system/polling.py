"""Polling and reading a descriptor without waiting."""

from __future__ import annotations

import errno
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket
    from typing import Any


def events_of(fd: int | socket, wanted: int, wait_s: float = 0.0) -> int:
    """Return the current events among `wanted`, and POLLHUP and POLLERR.  Raises OSError.

    wait_s: how long to wait for the first event.

    Returns 0 while another process has lowered our descriptor limit to 0 (prlimit(2)).  Then
    poll(2) fails, and the caller should try again later.
    """
    poll = select.poll()
    poll.register(fd, wanted)
    try:
        found = poll.poll(wait_s * 1000)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0
    return found[0][1] if found else 0


def read_now(read: Callable[..., bytes], *arguments: Any) -> bytes | None:
    """Return the bytes that `read` returns without waiting.

    b"" means end of file, also after a crash of the writer.  None means that no data waits, for
    example after a wake-up for another file that had this number before.
    """
    try:
        return read(*arguments)
    except BlockingIOError:
        return None
    except OSError:
        return b""
