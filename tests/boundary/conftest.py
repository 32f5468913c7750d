"""The command line in this process, and the loop with its time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from socketprotector.launch import cli
from socketprotector.system.loop import Loop
from tests.running import Ended


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


class Typed:
    """The command line, run in this process up to where it would launch."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capture = capture

    def __call__(self, *words: str | Path) -> Ended:
        self._capture.readouterr()
        status = cli.main([str(each) for each in words])
        return Ended.of_start(status, *self._capture.readouterr())

    def left(self) -> list[str]:
        """The files in its folder."""
        return sorted(file.name for file in self.folder.iterdir())


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Typed]:
    """Run the command line in a folder of its own; to get as far as to launch fails the test."""

    def launched(*_: object) -> int:
        raise AssertionError("it would have been launched")

    monkeypatch.setattr(cli, "launch", launched)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    term = signal.getsignal(signal.SIGTERM)
    yield Typed(tmp_path, capfd)
    signal.signal(signal.SIGTERM, term)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


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
