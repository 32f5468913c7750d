"""Which kill has cost which connection: pure book-keeping for the soak.

A failure is accounted for only by a kill of the process that held the connection at that
instant.  What a worker held is known port by port (held.py); beyond that each kill of a
worker accounts for one connection at most (taken, not noted yet), each kill of a protector
for one (accepted, not sent yet), and only as a reset or an empty end soon after the kill.
No kill excuses refused, timed out and wrong.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from socketprotector.demo.seen import Failure

#: A worker, or a child that serves for it; a grandchild serves nobody.
Victim = Literal["worker", "grandchild", "protector", "guard"]

#: After a kill, where only the time shows whose connection it was.
SOON_S = 0.5
#: Where the port does: the client may be slow to look.
LATE_S = 5.0
#: At most between the two times of a kill.
SLOW_S = 1.0


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.  Times are CLOCK_MONOTONIC seconds, noted around the sending."""

    victim: Victim
    pid: int
    before_s: float
    after_s: float
    held: frozenset[int] = field(default=frozenset(), repr=False)  # ports of clients

    def held_by_worker(self, failure: Failure) -> bool:
        """Say whether the killed worker had noted that it held this very connection."""
        return (
            failure.port in self.held
            and failure.started_s <= self.after_s
            and self.before_s <= failure.at_s <= self.after_s + LATE_S
            and failure.pid in (None, self.pid)
        )

    def soon_before(self, failure: Failure) -> bool:
        """Say whether it could have been in the hands of the killed process, unnoted."""
        return (
            failure.pid is None
            and failure.started_s <= self.after_s
            and 0 <= failure.at_s - self.before_s <= SOON_S
        )


@dataclass
class Account:
    """Every failure, in exactly one of these lists."""

    held: list[Failure] = field(default_factory=list)
    being_taken: list[Failure] = field(default_factory=list)
    undelivered: list[Failure] = field(default_factory=list)
    unaccounted: list[Failure] = field(default_factory=list)


def account(failures: Sequence[Failure], kills: Sequence[Kill]) -> Account:
    """Put each failure down to the kill that explains it, if one does."""
    result = Account()
    in_order = sorted(kills, key=lambda kill: kill.before_s)
    times = [kill.before_s for kill in in_order]

    def shortly_before(failure: Failure, victim: Victim) -> list[Kill]:
        # Of thousands of each, only some kills are near enough to be asked.
        first = bisect_left(times, failure.at_s - LATE_S - SLOW_S)
        near = in_order[first : bisect_right(times, failure.at_s)]
        return [kill for kill in near if kill.victim == victim]

    rest: list[Failure] = []
    for failure in failures:
        lost = failure.kind in ("reset", "empty")
        if lost and any(k.held_by_worker(failure) for k in shortly_before(failure, "worker")):
            result.held.append(failure)
        elif lost:
            rest.append(failure)
        else:
            result.unaccounted.append(failure)
    spent: set[int] = set()  # each of these kills has its one connection already
    explanations: tuple[tuple[Victim, list[Failure]], ...] = (
        ("worker", result.being_taken),
        ("protector", result.undelivered),
    )
    for failure in sorted(rest, key=lambda each: each.at_s):
        for victim, into in explanations:
            candidates = shortly_before(failure, victim)
            found = [k for k in candidates if id(k) not in spent and k.soon_before(failure)]
            if found:
                spent.add(id(found[0]))
                into.append(failure)
                break
        else:
            result.unaccounted.append(failure)
    return result
