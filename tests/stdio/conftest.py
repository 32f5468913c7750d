from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.protector import Protector


@pytest.fixture
def given(tmp_path: Path) -> Iterator[Protector]:
    """A protector without policy: the test says what the pool gets, and hears what it says."""
    one = Protector(tmp_path / "stderr.log")
    yield one
    one.close()
    if one.log.exists():
        print(one.log.read_text())
