"""Fixtures: a fake protector in a folder of its own, and the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from socketprotector.ctl.__main__ import main
from tests import forked
from tests.running import DEADLINE_S, Ended
from tests.unit.ctl.fake import Fake

COMMAND = (sys.executable, forked.ALONE, "socketprotector.ctl")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where control sockets are looked for; short, because a socket's path has 107 bytes."""
    run = Path(os.environ["XDG_RUNTIME_DIR"])
    monkeypatch.setattr("socketprotector.system.control_path.SYSTEM", str(tmp_path / "system"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    made = run / "socketprotector"
    made.mkdir()
    return made


@pytest.fixture
def fakes(folder: Path) -> Iterator[Callable[[str], Fake]]:
    """Make fake protectors by name."""
    made: list[Fake] = []

    def make(name: str) -> Fake:
        made.append(Fake(folder / f"{name}.control"))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture
def fake(fakes: Callable[[str], Fake]) -> Fake:
    """One fake protector, `web`."""
    return fakes("web")


@pytest.fixture
def ctl(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run the command in this process."""

    def run(*arguments: str) -> Ended:
        capfd.readouterr()
        status = main(arguments)
        out, err = capfd.readouterr()
        return Ended(status, out, err)

    return run


def run(*arguments: str | Path, **environment: str) -> Ended:
    """Run the command as a process of its own."""
    with forked.popen(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Ended(process.returncode, out, err)


def run_into(where: str, *words: str) -> Ended:
    """Run it with a stdout that is a full disk, is closed, or has lost its reader."""
    how = {"full": ">/dev/full", "closed": ">&-", "gone": ""}[where]
    receive, send = os.pipe()
    os.close(receive)
    with open(send, "wb") as lost:
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "$@" {how}', "sh", *COMMAND, *words],
            stdout=lost,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE_S,
        )
    return Ended(done.returncode, "", done.stderr)
