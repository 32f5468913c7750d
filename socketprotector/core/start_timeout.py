"""Makes the reason of a start timeout: "not ready within 60 s; ...".

The reason names the missing message: a program that never sends READY looks like a slow program.
"""

from __future__ import annotations

from ..model.policy import Policy
from ..model.text import in_units

#: What to check, for each kind of readiness (--ready).
READY_HINTS = {
    "notify": "no worker sent READY=1; use socketprotector_client, `systemd-notify --ready`, or "
    "another --ready",
    "ack": "no worker sent einhorn's ACK; send it, or use another --ready",
    "fd": "no worker wrote a line to the descriptor of --ready fd:N; write it, or use another "
    "--ready",
    "check": "the command of --ready check: did not succeed; try it while a worker runs",
    "after": "--ready after: is longer than --start-timeout; raise --start-timeout",
    "legacy": "the daemon did not connect to the abstract socket sock_srv_PORT; link it with the "
    "library of the C++ SocketProtector",
    "any": "no worker accepted on its socket, sent READY=1 or einhorn's ACK, or wrote to "
    "{fd:ready}; see --ready",
}


def not_ready(policy: Policy, advice: str) -> str:
    """Return the reason of a start timeout.  advice: see DeadlinePassed."""
    hints = "; ".join(filter(None, (advice, READY_HINTS.get(policy.ready, ""))))
    return f"not ready within {in_units(policy.start_timeout_s)}; {hints}"
