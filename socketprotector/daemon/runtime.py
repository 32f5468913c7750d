"""The objects that nearly every part of the resident process uses.

They are created first, and passed to the parts.
"""

from __future__ import annotations

from collections.abc import Callable

from ..core.events import Event
from ..model.lazy_dataclass import mutable
from ..system.log import Log
from ..system.loop import Loop


@mutable
class Runtime:
    """The loop, the log, and the functions that post an event and write the state."""

    loop: Loop
    log: Log
    #: Adds an event to the supervisor's queue (EventQueue.post).
    post: Callable[[Event], None]
    #: Gives new descriptors to the guard or systemd, and writes the state if it has changed
    #: (Checkpoint.save); returns whether the write succeeded.  If there is neither guard nor fd
    #: store, writes nothing, and returns True.  The supervisor calls persist() for each event.  Any
    #: other part calls persist() after a change that no event reports.
    persist: Callable[[], bool]
