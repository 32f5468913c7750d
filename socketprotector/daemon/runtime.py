"""What nearly every part of the resident process works with, made before any of them."""

from __future__ import annotations

from collections.abc import Callable

from ..core.events import Event
from ..model.lazy_dataclass import mutable
from ..system.log import Log
from ..system.loop import Loop


@mutable
class Runtime:
    """The same for all parts; none of them owns it."""

    loop: Loop
    log: Log
    #: Brings an event to the supervisor.
    post: Callable[[Event], None]
    #: Writes the state, which has changed without an event; returns whether that is done.
    persist: Callable[[], bool]
