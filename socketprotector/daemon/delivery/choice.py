"""Which delivery a process builds, by its handoff mode; the other one is never loaded."""

from __future__ import annotations

from ...model.handoff_modes import HandoffMode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import Delivery


def delivery_for(mode: HandoffMode) -> type[Delivery]:
    """Return the class.  At the start: later its file may be another version's."""
    if mode.workers_accept:
        import array  # noqa: F401  for steering (system/bpf.py)

        from .shared.shared_delivery import SharedDelivery

        return SharedDelivery
    from .queue.queue_delivery import QueueDelivery

    return QueueDelivery
