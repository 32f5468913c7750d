"""Keep a forked child of a worker from disturbing its parent.

A child inherits epoll descriptors, pipes and signal handlers that it shares
with its parent: a SIGTERM to the child alone would make the parent drain.
Objects that own such things register here and put themselves right in the
child.

The set below is the only state of a module in this library: a fork hook
cannot be taken back, so there is one, and it holds its objects weakly.
"""

from __future__ import annotations

import os
import weakref
from functools import lru_cache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Forkable(Protocol):
        def after_fork_in_child(self) -> None:
            """Give up what is shared with the parent; runs in the child, right after the fork."""


def register(owner: Forkable) -> None:
    """Call owner.after_fork_in_child() in every child forked while owner lives."""
    _owners().add(owner)


@lru_cache(maxsize=None)
def _owners() -> weakref.WeakSet[Forkable]:
    owners: weakref.WeakSet[Forkable] = weakref.WeakSet()

    def put_right() -> None:
        for owner in list(owners):
            owner.after_fork_in_child()

    os.register_at_fork(after_in_child=put_right)
    return owners
