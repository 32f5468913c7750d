"""What a descriptor is ready for at this moment, and has: calls that do not wait."""

from __future__ import annotations

import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from socket import socket
    from typing import Any


def events_of(one: int | socket, wanted: int) -> int:
    """Return which of these events there are, POLLHUP and POLLERR unasked.  Raises OSError."""
    poll = select.poll()
    poll.register(one, wanted)
    found = poll.poll(0)
    return found[0][1] if found else 0


def read_now(read: Callable[..., bytes], *arguments: Any) -> bytes | None:
    """Return what `read`, which does not wait, finds.

    b"": the end, also where whoever wrote there has ended in a bad way.  None: nothing yet, as
    after a wake-up for a number that was another's before.
    """
    try:
        return read(*arguments)
    except BlockingIOError:
        return None
    except OSError:
        return b""
