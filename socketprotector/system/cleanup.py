"""Clean-up for a block that fails before its new resources have an owner.

contextlib.ExitStack would also clean up after a block that succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_error(undo: Callable[..., object], *arguments: object) -> Iterator[None]:
    """Call `undo` if the block raises any exception, then raise it again."""
    try:
        yield
    except BaseException:
        undo(*arguments)
        raise
