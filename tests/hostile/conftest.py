"""A loop for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from socketprotector.system.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()
