"""The listeners that a program inherits: which sockets each of them has."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..model.settings import ListenerSettings
from ..system import inherited
from ..system.inherited import Inherited
from ..system.listener import Listener
from ..system.listeners import listener_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    pass


def adopt(left: Inherited, settings: Sequence[ListenerSettings], shared: bool) -> list[Listener]:
    """Adopt the listeners that there are; those in no place are of a reload that never came to be.

    Each may have several sockets, of which the newest is in use: a number stands behind the name.
    """
    made = []
    for index, each in enumerate(settings):
        first, again = _newest(left.take(inherited.LISTENER, index))
        second, second_again = _newest(left.take(inherited.SIBLING, index))
        third, third_again = _newest(left.take(inherited.RESERVED, index))
        if first >= 0:  # else it was closed already
            numbers = again, second_again, third_again
            made.append(
                listener_of(
                    first, index, each, shared=shared, sibling=second, reserved=third, again=numbers
                )
            )
            continue
        for fd in (second, third):
            if fd >= 0:
                os.close(fd)
    ours = [each for each in made if not shared and not each.settings.foreign]
    for listener in [each for each in ours if not each.listens]:
        made.remove(listener)  # an earlier program was about to close it
        listener.close()
    return made


def _newest(found: dict[str, int]) -> tuple[int, int]:
    """Return the newest of some sockets and its number, and close the others; -1 for none."""
    numbered = {int(name or 0): fd for name, fd in found.items()}
    newest = max(numbered, default=0)
    fd = numbered.pop(newest, -1)
    for other in numbered.values():
        os.close(other)
    return fd, newest
