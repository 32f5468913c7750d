"""The reason of a start that was not ready in time: "not ready within 60 s; ...".

It names the missing message: a program that never sends READY looks like a slow program.
"""

from __future__ import annotations

from ..model.policy import Policy
from ..model.text import in_units

#: What to check, for each kind of readiness (--ready).
READY_HINTS = {
    "notify": "a worker says READY=1 to NOTIFY_SOCKET, as socketprotector_client does for it",
    "ack": "a worker sends einhorn's ACK",
    "fd": "a worker writes a line to the descriptor of --ready fd:N",
    "check": "the command of --ready check: did not succeed; try it while a worker runs",
    "after": "--ready after: is longer than --start-timeout",
    "legacy": "the daemon has not connected to the abstract socket sock_srv_PORT, as the library "
    "of the C++ SocketProtector does",
    "any": "a worker accepts a connection from the socket that it is handed, says READY=1 to "
    "NOTIFY_SOCKET, sends einhorn's ACK or writes to {fd:ready}",
}


def not_ready(policy: Policy, advice: str) -> str:
    """Return the reason.  advice: the daemon's findings about the cause, or empty."""
    hints = "; ".join(filter(None, (advice, READY_HINTS.get(policy.ready, ""))))
    return f"not ready within {in_units(policy.start_timeout_s)}; {hints}"
