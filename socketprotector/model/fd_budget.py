"""Computes how many workers the limit of descriptors allows: each needs several in the protector.

Pure.  docs/reliability.md explains the numbers, in "How many workers".
"""

from __future__ import annotations

from .listen_fds import ready_fd
from .ready_kinds import PROBED
from .settings import Settings

#: Descriptors that do not depend on the workers: standard files, listeners, state, channels, guard,
#: relay, and the descriptors for starting a process.
_OTHERS = 32
#: How many output pipes of exited workers without orphans are kept, because other processes still
#: write to these pipes.
LEFT_BEHIND = 32
_RAISE = "raise that (ulimit -Hn, LimitNOFILE= of a unit)"


def of_a_worker(settings: Settings) -> int:
    """Return the number of descriptors for one worker.

    They are: pidfd, notify socket, line, output, einhorn's ack, the pipe of --ready fd:N.
    """
    has_ack = settings.ready in ("ack", *PROBED)
    has_pipe = settings.ready in ("fd", *PROBED) and ready_fd(settings) >= 0
    return 3 + settings.log_relay + has_ack + has_pipe


def most(settings: Settings, hard: int) -> int:
    """Return how many workers fit into a hard limit of descriptors; at least 1."""
    others = _OTHERS + LEFT_BEHIND * settings.log_relay
    return max(1, (hard - others) // of_a_worker(settings))


def refused(settings: Settings, wanted: int, hard: int) -> str | None:
    """Return why so many workers are impossible, and what to do; None if they are possible.

    hard: the hard limit, to which the protector raises its soft limit; below 0: no limit.
    """
    room = most(settings, hard)
    if hard < 0 or wanted <= room:
        return None
    return (
        f"{wanted} workers need {of_a_worker(settings)} descriptors each, and the hard limit of "
        f"{hard} has room for {room} workers; {_RAISE}, or lower --workers"
    )


def doubtful(settings: Settings, wanted: int, hard: int) -> str | None:
    """Return a warning if a reload of so many workers would exceed the limit; None otherwise."""
    policy = settings.policy
    added = policy.surge_of(wanted) if policy.rolls else wanted
    if hard < 0 or policy.stop_first or wanted + added <= most(settings, hard):
        return None
    added_words = f"{added} more" if policy.rolls else "as many new ones"
    advice = (
        "lower --workers or --surge"
        if policy.rolls
        else "lower --workers, or set --reload-order rolling or stop-first"
    )
    return (
        f"{wanted} workers: a reload starts {added_words} first, for which the hard limit of "
        f"{hard} descriptors has no room; {_RAISE}, {advice}"
    )
