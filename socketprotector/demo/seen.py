"""The results of a load: failures by kind and time, latencies, and the workers that answered.

Values only; load.py fills them.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["refused", "reset", "timed_out", "empty", "wrong", "local"]
KINDS: tuple[Kind, ...] = ("refused", "reset", "timed_out", "empty", "wrong", "local")

SUB_BITS = 5  # 32 buckets for each doubling, so latencies are accurate to 3 %
BUCKETS = 34 << SUB_BITS  # up to an hour


def bucket_of(taken_s: float) -> int:
    """Return the index of the bucket that counts this latency."""
    taken_us = int(taken_s * 1e6)
    shift = max(0, taken_us.bit_length() - SUB_BITS - 1)
    return min(BUCKETS - 1, (shift << SUB_BITS) + (taken_us >> shift))


def smallest_in_bucket_us(index: int) -> float:
    """Return the smallest latency that the bucket counts."""
    shift = max(0, (index >> SUB_BITS) - 1)
    return float((index - (shift << SUB_BITS)) << shift)


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed conversation.  Times are CLOCK_MONOTONIC seconds."""

    kind: Kind
    at_s: float
    started_s: float
    pid: int | None  # of the worker that answered an earlier line of the same conversation
    detail: str
    port: int = 0  # the client's own; of a UNIX client the number in its automatic name


@dataclass(frozen=True)
class Snapshot:
    """The results at one moment.  `pids` is in the order of the workers' first answers."""

    at_s: float
    begun: int
    open_now: int
    connections: int  # conversations without a failure
    failures: tuple[Failure, ...]
    pids: dict[int, int]  # answers by each worker
    backlog_full: int
    buckets: array[int] = field(repr=False)

    @property
    def failed(self) -> dict[str, int]:
        """The number of failures of each kind; kinds that did not happen are 0."""
        counted = Counter(failure.kind for failure in self.failures)
        return {kind: counted[kind] for kind in KINDS}

    def latency_us(self, share: float) -> float:
        """Return the latency (connect to first reply) that `share` of clients did not exceed."""
        wanted = share * sum(self.buckets)
        seen = 0
        for index, count in enumerate(self.buckets):
            seen += count
            if count and seen >= wanted:
                return smallest_in_bucket_us(index)
        return 0.0

    def since(self, earlier: Snapshot) -> Snapshot:
        """Return the results between an earlier snapshot of the same load and this one."""
        answers = Counter(self.pids)
        answers.subtract(earlier.pids)
        return Snapshot(
            self.at_s,
            self.begun - earlier.begun,
            self.open_now,
            self.connections - earlier.connections,
            self.failures[len(earlier.failures) :],
            {pid: count for pid, count in answers.items() if count},
            self.backlog_full - earlier.backlog_full,
            array(
                "Q", (now - then for now, then in zip(self.buckets, earlier.buckets, strict=True))
            ),
        )


@dataclass(frozen=True)
class Kill:
    """A SIGKILL at `at_s` (CLOCK_MONOTONIC), and the ports of the clients that the process held."""

    at_s: float
    held: frozenset[int]

    def has_ended(self, failure: Failure) -> bool:
        """Return whether a connection failed because the process that held it was killed.

        A kill never excuses refused, timed out and wrong conversations.  Nor does it excuse a
        connection begun after the kill: an earlier connection may have had the same port.
        """
        return (
            failure.kind in ("reset", "empty")
            and failure.port in self.held
            and failure.started_s <= self.at_s
        )


def split_by_kills(
    failures: Iterable[Failure], kills: Iterable[Kill]
) -> tuple[list[Failure], list[Failure]]:
    """Return (failures of connections that a killed process held, all other failures)."""
    known = list(kills)
    ended: list[Failure] = []
    others: list[Failure] = []
    for failure in failures:
        (ended if any(each.has_ended(failure) for each in known) else others).append(failure)
    return ended, others
