"""Finds and retires the forked children of a worker.

A worker that uses the client library's SocketServer forks children, which share its memory.  Only
the worker starts, reaps and replaces its children.  We read the children's pids and counts from the
scoreboard (system/scoreboard.py).  A worker could write any pid into the scoreboard, so we signal
only processes of the worker's own session.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

from ..model.lazy_dataclass import frozen
from ..model.records import Counts, WorkerRecord
from ..system import procfs
from .generation import OpenGeneration


@frozen
class Child:
    """A living child of a worker."""

    number: int  # from 0, among the worker's children
    pid: int
    counts: Counts | None
    slot: int  # which record of the scoreboard the child writes


def children_of(record: WorkerRecord, generation: OpenGeneration) -> list[Child]:
    """Return the living children of a worker."""
    if record.orphaned:
        return []  # another worker may have got the exited worker's slot by now
    return [each for each in _recorded(record, generation) if _is_in_session(each.pid, record.pid)]


def _recorded(record: WorkerRecord, generation: OpenGeneration) -> Iterator[Child]:
    board = generation.board
    if board is None:
        return
    try:
        for number, slot in enumerate(board.child_slots(record.slot)):
            if pid := board.pid(slot):
                yield Child(number, pid, board.read_any(slot), slot)
    except OSError:
        return


def left_open(record: WorkerRecord, generation: OpenGeneration) -> int:
    """Return how many connections are open in the children of a worker that has just exited.

    A child that has got SIGKILL, for example with its whole process group, keeps none open.  Call
    this before the record is `orphaned`; after that, children_of() returns no children.
    """
    if record.killed:
        return 0  # the children are killed, too
    living = children_of(record, generation)
    if procfs.is_ours():
        living = [each for each in living if not procfs.is_ending(each.pid)]
    return sum(each.counts.active for each in living if each.counts is not None)


def retire(child: int, leader: int) -> bool:
    """Send a child SIGTERM, so that it finishes its connections; return whether we sent SIGTERM.

    child: the child's pid.  leader: the worker's pid, also the id of its session.  Returns
    False if the session has no such child.  Raises OSError.
    """
    try:
        pidfd = os.pidfd_open(child)
    except ProcessLookupError:
        return False
    try:
        # Check after pidfd_open(): if we checked earlier, the pid could be reused in between.
        if child == leader or not _is_in_session(child, leader):
            return False
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


def _is_in_session(pid: int, leader: int) -> bool:
    try:
        return os.getsid(pid) == leader
    except OSError:
        return False
