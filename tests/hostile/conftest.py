"""A loop, false and good instances in a folder of their own, and the command."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from socketprotector.system.loop import Loop
from tests.unit.ctl.conftest import ctl, fake, fakes, folder

__all__ = ["ctl", "fake", "fakes", "folder", "loop"]


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()
