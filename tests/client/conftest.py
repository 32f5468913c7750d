from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.client.protector import Protector


def _descriptors() -> dict[str, str]:
    found = {}
    for entry in os.scandir("/proc/self/fd"):
        try:
            found[entry.name] = os.readlink(entry.path)
        except FileNotFoundError:
            pass  # the one that lists them
    return found


def _children() -> set[str]:
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found |= set((task / "children").read_text().split())
        except FileNotFoundError:
            pass  # a thread that has just ended; its children are another's now
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = _descriptors(), _children(), threading.active_count()
    yield
    assert (_descriptors(), _children(), threading.active_count()) == before


@pytest.fixture
def protector(tmp_path: Path) -> Iterator[Protector]:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # As under nohup; workers start with default dispositions.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    log = tmp_path / "stderr.log"
    one = Protector(log)
    yield one
    one.close()
    if log.exists():
        print(log.read_text())  # pytest shows it with a failure
