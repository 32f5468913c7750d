"""Fixtures of the scenarios."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scenarios.adopting import Installation
from tests.scenarios.starting import Start


@pytest.fixture
def start(tmp_path: Path, marked_environment: dict[str, str]) -> Iterator[Start]:
    """Run the command detached, in a folder of its own; its end is seen to."""
    starter = Start(tmp_path, marked_environment)
    yield starter
    starter.end()
    print(f"--- {starter.log_file} ---\n{starter.log}")


@pytest.fixture
def installation(
    tmp_path_factory: pytest.TempPathFactory, marked_environment: dict[str, str]
) -> Iterator[Installation]:
    """Releases of the protector itself, in folders of their own behind a symlink."""
    made = Installation(tmp_path_factory.mktemp("installation"), marked_environment)
    yield made
    made.end()
