"""Fixtures of the scenarios."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.starting import Start


@pytest.fixture
def start(tmp_path: Path, marked_environment: dict[str, str]) -> Iterator[Start]:
    """Run the command detached, in a folder of its own; its end is seen to."""
    starter = Start(tmp_path, marked_environment)
    yield starter
    starter.end()
    print(f"--- {starter.log_file} ---\n{starter.log}")
