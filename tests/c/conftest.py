"""Fixtures of the tests of the C client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.c.building import Build, compiled, shared_folder
from tests.client.protector import Protector as Channel


@pytest.fixture(scope="session")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs are, and what was tried to install."""
    return shared_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def build(built_in: Path) -> Build:
    """Compile a program: build("probe", *flags)."""
    return lambda name, *flags: compiled(built_in, name, *flags)


@pytest.fixture
def channel(tmp_path: Path) -> Iterator[Channel]:
    """A channel and its workers, without a protector: says what a protector would not, too."""
    log = tmp_path / "stderr.log"
    one = Channel(log)
    yield one
    one.close()
    if log.exists():
        print(log.read_text())
