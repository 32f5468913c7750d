"""What a descriptor is ready for at this moment: poll(2) that does not wait."""

from __future__ import annotations

import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket


def events_of(one: int | socket, wanted: int) -> int:
    """Return which of these events there are, POLLHUP and POLLERR unasked.  Raises OSError."""
    poll = select.poll()
    poll.register(one, wanted)
    found = poll.poll(0)
    return found[0][1] if found else 0
