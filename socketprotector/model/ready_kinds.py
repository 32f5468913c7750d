"""The kinds of --ready: which are probed, how each is shown, and what a start timeout says.

READY_BY has the values of `ready_by` in `status`, which say what made a worker ready.

Pure.  launch/option_values.py parses the values.  A kind with a number or a text needs a field of
Settings, as an option does (CONTRIBUTING.md).  system/readiness.py carries out the kinds, with
daemon/worker_messages.py (READY=1) and daemon/ready_probe.py (probes).
"""

from __future__ import annotations

from .lazy_dataclass import frozen


@frozen
class ReadyKind:
    """One kind of --ready.  Settings.ready_text fills {after}, {fd} and {question}."""

    hint: str = ""  # what to check if no worker is ready in time
    written: str = ""  # the value of the option; "": the kind's name
    shown: str = ""  # the value in status; "": as written
    #: A new generation is probed before it gets its first client.  READY=1, an ack or a line also
    #: makes a worker ready.  Exception: with needs_answer only the probe's answer does.
    is_probed: bool = False
    needs_answer: bool = False


#: No values of --ready.  ANY: the default of --handoff listener.  LEGACY: the hint of that mode.
ANY, LEGACY = "any", "legacy"
KINDS = {
    "notify": ReadyKind(
        "no worker sent READY=1; use socketprotector_client, `systemd-notify --ready`, or "
        "another --ready"
    ),
    "ack": ReadyKind("no worker sent einhorn's ACK; send it, or use another --ready"),
    "fd": ReadyKind(
        "no worker wrote a line to the descriptor of --ready fd:N; write it, or use another "
        "--ready",
        "fd:{fd}",
        "fd {fd}",
    ),
    "accept": ReadyKind(is_probed=True, needs_answer=True),
    "http": ReadyKind(written="{question}", is_probed=True, needs_answer=True),
    "https": ReadyKind(written="{question}", is_probed=True, needs_answer=True),
    "check": ReadyKind("the command of --ready check: did not succeed; try it while a worker runs"),
    "after": ReadyKind(
        "--ready after: is longer than --start-timeout; raise --start-timeout",
        "after:{after}",
        "after {after} (only a timer)",
    ),
    ANY: ReadyKind(
        "no worker accepted on its socket, sent READY=1 or einhorn's ACK, or wrote to "
        "{fd:ready}; see --ready",
        shown="notify, ack, a line or accept",
        is_probed=True,
    ),
    LEGACY: ReadyKind(
        "the daemon did not connect to the abstract socket sock_srv_PORT; link it with the "
        "library of the C++ SocketProtector"
    ),
}
PROBED = tuple(name for name, each in KINDS.items() if each.is_probed)
NEED_ANSWER = tuple(name for name, each in KINDS.items() if each.needs_answer)

#: Two values of `ready_by` that are no kinds: a line to the descriptor of `fd`, and the timer.
LINE, TIMER = "line", "timer"
#: Every value of `ready_by` of a ready worker (control.schema.json).  A probe's answer counts for
#: all workers of its generation.
READY_BY = ("notify", "ack", LINE, "check", TIMER, *NEED_ANSWER)
