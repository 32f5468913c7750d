"""What a process must see to before it forks children that serve.

Children share the pages of their parent's memory until one of them writes there.  The garbage
collector writes to each object that it examines.  So the parent moves all objects out of its sight
(gc.freeze) right before it forks.
"""

from __future__ import annotations

import gc
import os
import sys
import threading

from .log import Logger

_log = Logger(__name__)


def prepare(*, allow_threads: bool) -> None:
    """Freeze the loaded objects, so that children share them.

    Raises RuntimeError if other threads run: a lock that a thread holds stays locked in a child.
    """
    others = [each for each in threading.enumerate() if each is not threading.current_thread()]
    if others and not allow_threads:
        names = ", ".join(repr(each.name) for each in others[:5])
        raise RuntimeError(
            f"cannot fork while threads run ({names}): a lock that such a thread holds would stay "
            f"locked in the children; start threads in a post_fork hook, or allow them "
            f"(allow_threads=True, --allow-threads)"
        )
    if native := _native_threads():
        _log.warning(
            "%d native threads run at the fork, such as numpy's; children do not have these "
            "threads, and a call that waits for one hangs (numpy: set OMP_NUM_THREADS=1)",
            native,
        )
    gc.collect()
    gc.freeze()


def _native_threads() -> int:
    """Return how many threads of this process run no Python code; 0 if /proc does not say."""
    try:
        return max(0, len(os.listdir("/proc/self/task")) - len(sys._current_frames()))
    except OSError:
        return 0
