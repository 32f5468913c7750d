"""Which changes of a value are written."""

from __future__ import annotations

from dataclasses import dataclass, replace

from socketprotector.model.codec import Codec
from tests.together import together


@dataclass(frozen=True)
class Thing:
    size: int
    parts: tuple[int, ...] = ()


@together(("kept", "gone"), [(0, 1), (0, 5), (3, 1), (3, 5), (598, 1)])
def test_items_that_have_replaced_the_oldest_are_written_alone(kept: int, gone: int) -> None:
    """As in the history of crashes once it is full."""
    codec = Codec([Thing])
    before = Thing(1, parts=tuple(range(600)))
    newest = tuple(range(600, 600 + gone))
    after = replace(before, parts=(*before.parts[:kept], *before.parts[kept + gone :], *newest))

    changes = codec.changes(before, after)

    assert codec.decode(codec.encode(before), [changes]) == after
    assert len(changes) < 150
