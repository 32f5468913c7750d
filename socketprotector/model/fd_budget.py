"""The most workers that the limit of descriptors allows: the protector keeps some for each.

Pure.  docs/reliability.md, How many workers, has the same in words.
"""

from __future__ import annotations

from . import question
from .settings import Settings

#: The descriptors for standard files, listeners, state, channels, guard, relay, and a start.
_OTHERS = 32
#: So many output pipes of ended workers are kept, for the processes that these workers left.
LEFT_BEHIND = 32
_RAISE = "raise that (ulimit -Hn, LimitNOFILE= of a unit)"


def of_a_worker(settings: Settings) -> int:
    """Return the number of descriptors for one worker: pidfd, notify socket, line, output, ack."""
    acks = settings.ready in ("ack", *question.ASKED)
    return 3 + settings.log_relay + acks


def most(settings: Settings, hard: int) -> int:
    """Return the most workers within a hard limit of descriptors; at least 1."""
    others = _OTHERS + LEFT_BEHIND * settings.log_relay
    return max(1, (hard - others) // of_a_worker(settings))


def refused(settings: Settings, wanted: int, hard: int) -> str | None:
    """Return why so many workers are impossible, and what to do; None if they are possible.

    hard: the hard limit, to which the protector raises its own; below 0: no limit.
    """
    room = most(settings, hard)
    if hard < 0 or wanted <= room:
        return None
    return (
        f"{wanted} workers take {of_a_worker(settings)} descriptors each, and the hard limit of "
        f"{hard} has room for {room}; {_RAISE}, or ask for fewer"
    )


def doubtful(settings: Settings, wanted: int, hard: int) -> str | None:
    """Return a warning if a reload of so many workers would exceed the limit; None otherwise."""
    if hard < 0 or settings.policy.stop_first or 2 * wanted <= most(settings, hard):
        return None
    return (
        f"{wanted} workers: a reload starts as many beside them, and is likely to fail: the hard "
        f"limit of {hard} descriptors has no room for both; {_RAISE}, ask for fewer, or have "
        "--reload-order stop-first"
    )
