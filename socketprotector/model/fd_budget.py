"""How many workers there can be: each uses some of the protector's descriptors.

Pure.  docs/reliability.md, How many workers, has the same in words.
"""

from __future__ import annotations

from . import question
from .settings import Settings

#: For all else: standard files, listeners, state, channels, guard, relay, and what a start takes.
_OTHERS = 32
#: So many ended workers' pipes are kept, beside those of the workers, for processes that they left.
LEFT_BEHIND = 32
_RAISE = "raise that (ulimit -Hn, LimitNOFILE= of a unit)"


def of_a_worker(settings: Settings) -> int:
    """Return how many descriptors one worker keeps: process, notify socket, line, what is asked."""
    acks = settings.ready in ("ack", *question.ASKED)
    return 3 + _relayed(settings) + acks


def most(settings: Settings, hard: int) -> int:
    """Return how many workers a hard limit of descriptors has room for; one is always tried."""
    others = _OTHERS + LEFT_BEHIND * _relayed(settings)
    return max(1, (hard - others) // of_a_worker(settings))


def _relayed(settings: Settings) -> bool:
    ours = settings.log_file is not None or not settings.foreground
    return settings.log_prefix or (ours and settings.log_relay)


def refused(settings: Settings, wanted: int, hard: int) -> str | None:
    """Say why there cannot be so many workers at once, and what to do; None: there can be.

    hard: the limit that the protector raises its own to; below 0 there is none.
    """
    room = most(settings, hard)
    if hard < 0 or wanted <= room:
        return None
    return (
        f"{wanted} workers take {of_a_worker(settings)} descriptors each, and the hard limit of "
        f"{hard} has room for {room}; {_RAISE}, or ask for fewer"
    )


def doubtful(settings: Settings, wanted: int, hard: int) -> str | None:
    """Say that there is no room for those of a reload beside so many workers; None: there is."""
    if hard < 0 or settings.policy.stop_first or 2 * wanted <= most(settings, hard):
        return None
    return (
        f"{wanted} workers: a reload starts as many beside them, and is likely to fail: the hard "
        f"limit of {hard} descriptors has no room for both; {_RAISE}, ask for fewer, or have "
        "--reload-order stop-first"
    )
