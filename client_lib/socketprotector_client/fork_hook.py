"""The fork hook that keeps a worker's forked child from disturbing its parent.

A child shares epoll descriptors, pipes and signal handlers with its parent:
a SIGTERM to the child alone would make the parent drain.  The owners of
such things register here and repair themselves in the child.

The set below is the only module state in this library.  A fork hook cannot be removed, so there
is a single hook with weak references to its objects.
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
            """Drop what is shared with the parent; runs in the child, right after the fork."""


def register(owner: Forkable) -> None:
    """Call owner.after_fork_in_child() in every child forked while owner lives."""
    _owners().add(owner)


@lru_cache(maxsize=None)
def _owners() -> weakref.WeakSet[Forkable]:
    owners: weakref.WeakSet[Forkable] = weakref.WeakSet()

    def repair() -> None:
        for owner in list(owners):
            owner.after_fork_in_child()

    os.register_at_fork(after_in_child=repair)
    return owners
