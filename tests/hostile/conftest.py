"""A loop, false, good and real instances in folders of their own, and the command."""

from __future__ import annotations

import os
import pwd
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from socketprotector.system.loop import Loop
from tests.hostile.attacked import NAME, Attacked, users
from tests.scenarios.starting import Start
from tests.scenarios.users import A
from tests.unit.ctl.conftest import ctl, fake, fakes, folder
from tests.unit.exporter.conftest import exporter

__all__ = ["ctl", "exporter", "fake", "fakes", "folder", "loop"]


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def runtime(folder: Path) -> Path:
    """Where the exporter looks for instances."""
    return folder


@pytest.fixture
def attacked(folder: Path, marked_environment: dict[str, str]) -> Iterator[Attacked]:
    """An instance that a test starts; its files are in a folder that every user may look into."""
    with tempfile.TemporaryDirectory(prefix="h-") as name:
        Path(name).chmod(0o755)
        if users():
            os.chown(name, pwd.getpwnam(A).pw_uid, -1)
        start = Start(Path(name), marked_environment)
        yield Attacked(start, folder / f"{NAME}.control")
        start.end()
        print(start.log[-20_000:])
