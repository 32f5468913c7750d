"""After each test: the same descriptors as before, no child, and the place and limits unchanged."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from socketprotector.system.loop import Loop


def _state() -> dict[str, object]:
    umask = os.umask(0)
    os.umask(umask)
    folder = os.open("/proc/self/fd", os.O_RDONLY)
    try:
        descriptors = {fd for fd in os.listdir(folder) if int(fd) != folder}
    finally:
        os.close(folder)
    own = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii")
    return {
        "descriptors": {fd for fd in descriptors if os.path.lexists(f"/proc/self/fd/{fd}")},
        "children": own.split(),
        "directory": os.getcwd(),
        "umask": umask,
        "limits": resource.getrlimit(resource.RLIMIT_NOFILE),
    }


class Turns:
    """Time as a loop sees it: a millisecond for each turn, however long that takes.

    tick() is to be called once a turn, by what is always readable, or after each wait.
    """

    def __init__(self) -> None:
        self._now_s = 1000.0
        self.monotonic_ns = time.monotonic_ns

    def monotonic(self) -> float:
        return self._now_s

    def tick(self, seconds: float = 0.001) -> None:
        self._now_s += seconds


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    """The time of all loops."""
    made = Turns()
    monkeypatch.setattr("socketprotector.system.loop.time", made)
    return made


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def in_root_directory() -> Iterator[None]:
    """The protector lives in /, and a spawn goes back there."""
    before = os.getcwd()
    os.chdir("/")
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _nothing_is_left_or_changed() -> Iterator[None]:
    before = _state()
    yield
    assert _state() == before
