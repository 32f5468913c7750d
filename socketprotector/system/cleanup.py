"""What is undone where a block fails: what it has opened has no owner yet.

contextlib.ExitStack would undo it at the end of a block that succeeds, too.
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
