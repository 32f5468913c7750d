"""Selects the delivery by the handoff mode, and loads only that delivery."""

from __future__ import annotations

from ...model.handoff_modes import HandoffMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import Delivery


def delivery_for(mode: HandoffMode) -> type[Delivery]:
    """Return the delivery class of a handoff mode.

    This function imports the class.  Call the function at the start of the resident process: a
    package upgrade may later replace the class's file.
    """
    if mode.workers_accept:
        import array

        from .shared.shared_delivery import SharedDelivery

        # `array` may be a stand-in, which loads the real module at its first use
        # (system/late_stdlib.py).  system/bpf.py uses the module later, when a package upgrade may
        # have removed the module's file.  So load the module now.
        array.array("B")
        return SharedDelivery
    from .queue.queue_delivery import QueueDelivery

    return QueueDelivery
