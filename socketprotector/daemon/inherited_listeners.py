"""Builds the listeners from the sockets that the protector inherits."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..model.settings import ListenerSettings
from ..system import inherited
from ..system.inherited import Inherited
from ..system.listener import Listener
from .delivery import Delivery


def adopt(
    unclaimed: Inherited, settings: Sequence[ListenerSettings], delivery: type[Delivery]
) -> list[Listener]:
    """Return the inherited listeners; take ownership of their descriptors.

    delivery: makes the listeners.

    A listener has up to three sockets, each with a role: the first, its sibling and the reserved
    socket (system/listener.py).  If several sockets are inherited for one role, only the newest is
    in use: the socket whose name ends in the highest number.
    """
    made = []
    for index, each in enumerate(settings):
        first, first_number = _newest(unclaimed.take(inherited.LISTENER, index))
        second, second_number = _newest(unclaimed.take(inherited.SIBLING, index))
        third, third_number = _newest(unclaimed.take(inherited.RESERVED, index))
        # A socket may change its role.  If the protector was killed during the change, the guard
        # or the fd store may have the socket under two names, so we inherit two copies.  Close one
        # copy.  Its name, which consists of a role and a number, stays in the store, and must never
        # be reused.  So the next socket in that role needs a higher number.
        if _close_if_same(second, (first,)):
            second = -1  # UnixListener._place() will raise the number
        if _close_if_same(third, (first, second)):
            third, third_number = -1, third_number + 1
        if first >= 0:
            numbers = first_number, second_number, third_number
            made.append(delivery.make_listener(index, each, (first, second, third), numbers))
            continue
        # The listener has no first socket: we closed the socket before an upgrade or a kill, or
        # the kill lost the socket.  So close the listener's other sockets.
        for fd in (second, third):
            if fd >= 0:
                os.close(fd)
    # Close the listeners whose closing had begun before an upgrade or a kill.
    for listener in [each for each in made if each.is_ending]:
        made.remove(listener)
        listener.close()
    return made


def _close_if_same(fd: int, kept: Sequence[int]) -> bool:
    """Close `fd` if a kept descriptor has the same socket; return whether `fd` was closed."""
    inodes = {os.fstat(each).st_ino for each in kept if each >= 0}
    same = fd >= 0 and os.fstat(fd).st_ino in inodes
    if same:
        os.close(fd)
    return same


def _newest(found: dict[str, int]) -> tuple[int, int]:
    """Return the newest socket and its number (-1 and 0 if there is none); close the others."""
    numbered = {int(name or 0): fd for name, fd in found.items()}
    newest = max(numbered, default=0)
    fd = numbered.pop(newest, -1)
    for other in numbered.values():
        os.close(other)
    return fd, newest
