"""Selects the delivery by the handoff mode, and loads only that delivery."""

from __future__ import annotations

from ...model.handoff_modes import HandoffMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import Delivery


def delivery_for(mode: HandoffMode) -> type[Delivery]:
    """Return the delivery class of a handoff mode.

    Call this function at the start of the resident process: a package upgrade may later replace the
    class's file.
    """
    if mode.workers_accept:
        import array

        from .shared.shared_delivery import SharedDelivery

        # `array` may be a stand-in (system/late_stdlib.py).  Load the real module now, while its
        # file surely exists: system/bpf.py needs the module later.
        array.array("B")
        return SharedDelivery
    from .queue.queue_delivery import QueueDelivery

    return QueueDelivery
