"""Fixtures of the tests of the C client."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.c.building import Build, compiled, shared_folder


@pytest.fixture(scope="session")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs are, and what was tried to install."""
    return shared_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def build(built_in: Path) -> Build:
    """Compile a program: build("probe", *flags)."""
    return lambda name, *flags: compiled(built_in, name, *flags)
