"""The objects that nearly every part of the resident process uses, made before the parts."""

from __future__ import annotations

from collections.abc import Callable

from ..core.events import Event
from ..model.lazy_dataclass import mutable
from ..system.log import Log
from ..system.loop import Loop


@mutable
class Runtime:
    """The loop, the log, the event queue and the checkpoint, shared by all parts."""

    loop: Loop
    log: Log
    #: Brings an event to the supervisor.
    post: Callable[[Event], None]
    #: Writes the state after a change without an event; returns whether that succeeded.
    persist: Callable[[], bool]
