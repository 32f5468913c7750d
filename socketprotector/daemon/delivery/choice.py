"""Selects a process's delivery by its handoff mode; the other delivery is never loaded."""

from __future__ import annotations

from ...model.handoff_modes import HandoffMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import Delivery


def delivery_for(mode: HandoffMode) -> type[Delivery]:
    """Return the delivery class of a handoff mode.

    Call it at the start of a program: later an upgrade may have replaced the class's file.
    """
    if mode.workers_accept:
        import array

        from .shared.shared_delivery import SharedDelivery

        array.array("B")  # loads the module while its file is there; for steering (system/bpf.py)
        return SharedDelivery
    from .queue.queue_delivery import QueueDelivery

    return QueueDelivery
