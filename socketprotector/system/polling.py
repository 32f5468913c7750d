"""What a descriptor is ready for at this moment, and has: calls that do not wait."""

from __future__ import annotations

import errno
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket
    from typing import Any


def events_of(one: int | socket, wanted: int) -> int:
    """Return which of these events there are, POLLHUP and POLLERR unasked.  Raises OSError.

    None is known of while another process has our limit of descriptors lowered to 0 (prlimit(2)):
    then poll(2) looks at nothing, and what we were about to do must wait, not end us.
    """
    poll = select.poll()
    poll.register(one, wanted)
    try:
        found = poll.poll(0)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return 0
    return found[0][1] if found else 0


def read_now(read: Callable[..., bytes], *arguments: Any) -> bytes | None:
    """Return what `read`, which does not wait, finds.

    b"": the end, also if the writer has crashed.  None: nothing yet, as
    after a wake-up for a number that was another's before.
    """
    try:
        return read(*arguments)
    except BlockingIOError:
        return None
    except OSError:
        return b""
