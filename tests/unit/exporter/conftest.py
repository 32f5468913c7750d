"""Fixtures: fake protectors in a folder of their own, and the exporter that asks them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests import forked
from tests.running import DEADLINE_S, Ended, Lines
from tests.unit.ctl.fake import Fake

COMMAND = (sys.executable, forked.ALONE, "socketprotector_exporter")


class Exporter:
    """The program, and where it answers."""

    def __init__(
        self,
        *arguments: str | Path,
        environment: dict[str, str],
        through: Sequence[str] = (),
    ) -> None:
        """through: a command that executes the exporter in its place."""
        receive, send = os.pipe()
        self.process = forked.popen(
            [*through, *COMMAND, "--listen", "127.0.0.1:0", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=send,
            stderr=send,
            env={**os.environ, **environment},
        )
        os.close(send)
        self.said = Lines(receive)

    @property
    def address(self) -> str:
        found = re.search(r"(https?://\S+)/metrics", self.said.wait_for("serves metrics at"))
        assert found
        return found[1]

    @property
    def page(self) -> str:
        """Where it shows the page: an address without the last slash, or the path of a socket."""
        found = re.search(r"serves the page at (\S+?)/?$", self.said.wait_for("serves the page at"))
        assert found
        return found[1].removeprefix("unix:")

    def end(self) -> int:
        self.process.terminate()
        status = self.process.wait(DEADLINE_S)
        self.said.join()
        return status


def run(*arguments: str) -> Ended:
    """Run the program until it ends by itself, as where it refuses something."""
    with forked.popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return Ended(process.returncode, out, err)


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where control sockets are looked for; short, for a socket's path has 107 bytes."""
    made = tmp_path_factory.mktemp("x") / "run" / "socketprotector"
    made.mkdir(parents=True)
    return made


@pytest.fixture
def fakes(runtime: Path) -> Iterator[Callable[[str], Fake]]:
    """Make fake protectors by name."""
    made: list[Fake] = []

    def make(name: str) -> Fake:
        made.append(Fake(runtime / f"{name}.control"))
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.fixture
def exporter(
    runtime: Path, marked_environment: dict[str, str]
) -> Iterator[Callable[..., Exporter]]:
    """Start the exporter."""
    started: list[Exporter] = []

    def start(*arguments: str | Path, through: Sequence[str] = ()) -> Exporter:
        environment = {**marked_environment, "XDG_RUNTIME_DIR": str(runtime.parent)}
        started.append(Exporter(*arguments, environment=environment, through=through))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.end()
