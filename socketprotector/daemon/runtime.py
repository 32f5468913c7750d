"""The objects that nearly every part of the resident process uses, made before the parts."""

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
    #: Adds an event to the queue, which the supervisor then handles (EventQueue.post).
    post: Callable[[Event], None]
    #: Stores changed descriptors and writes a changed state (Checkpoint.save); returns whether the
    #: write succeeded.  The supervisor calls it for each event; any other part calls it after a
    #: change that comes without an event.
    persist: Callable[[], bool]
