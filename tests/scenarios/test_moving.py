"""docs/moving.md: each command that is marked as ours starts, serves, reloads and stops.

Its server is a stand-in that takes the socket as the server of that name does.  All other commands
of the page are run by tests/pages, with the real tools.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.c.building import PLAIN, compiled, shared_folder
from tests.procfs import children_of
from tests.running import DEADLINE_S, ROOT, Lines, Protector, ask, eventually
from tests.scenarios.managers import Giver
from tests.scenarios.tools import pid_in

TEXT = (ROOT / "docs/moving.md").read_text(encoding="utf-8")
STANDINS = Path(__file__).parent / "standins.py"
NAMES = (
    *("chaussette", "haproxy", "nginx", "uwsgi"),
    *("handler", "ported-daemon", "worker", "wrapper"),
)
COMMAND = re.compile(r"^((?:SocketProtector|python) .*)$", re.MULTILINE)


@dataclass(frozen=True)
class Ours:
    """A command of ours."""

    section: str
    line: str


def ours() -> list[Ours]:
    found = []
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        section = part.partition("\n")[0]
        for block in re.findall(r"^```\w+ ours\n(.*?)^```$", part, re.MULTILINE | re.DOTALL):
            lines = COMMAND.findall(block.replace("\\\n", " "))
            assert lines, f"nothing is started by {block!r}"
            found += [Ours(section, line) for line in lines]
    return found


LINES = ours()


@pytest.fixture
def folder(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of the text are found, by ./name and by name."""
    for name in NAMES:
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{STANDINS}" {name} "$@"\n')
        path.chmod(0o755)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shutil.copy(ROOT / "client_lib" / "examples" / "shared_queue.py", tmp_path)
    return tmp_path


class Runs:
    """Starts a line of the text, with a free port and a folder of its own in the place of /run."""

    def __init__(
        self,
        folder: Path,
        giver: Giver,
        factory: pytest.TempPathFactory,
        free_port: Callable[[], int],
    ) -> None:
        self.folder = folder
        self.giver = giver
        self.factory = factory
        self.free_port = free_port
        self.address: tuple[str, int] | str = ""
        self.environment = {
            **giver.environment,
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        }

    def words(self, line: str) -> list[str]:
        """The words of a line, as a shell makes them."""
        port = re.search(r"(?<!\d)[1-9]\d{3}(?!\d)", line)
        if port is not None:
            number = self.free_port()
            line = re.sub(rf"(?<!\d){port[0]}(?!\d)", str(number), line)
            self.address = ("127.0.0.1", number)
        words = [word.replace("/run/", f"{self.folder}/") for word in shlex.split(line)]
        for word in words:
            if word.startswith("unix:"):
                self.address = word.removeprefix("unix:").partition("?")[0]
        return words

    def protector(self, line: str) -> Protector:
        program, *words = self.words(line)
        assert program == "SocketProtector"
        if "./daemon" in words:
            built = compiled(shared_folder(self.factory), "original", *PLAIN)
            (self.folder / "daemon").symlink_to(built)
        self.giver.environment = {**self.environment, "PWD": str(self.folder)}
        return self.giver.start(*words, cwd=self.folder).ready()

    def ask(self) -> str:
        answer = ask(self.address)
        assert answer.endswith("hello")
        return answer


@pytest.fixture
def runs(
    folder: Path,
    marked_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    free_port: Callable[[], int],
) -> Iterator[Runs]:
    giver = Giver(marked_environment)
    yield Runs(folder, giver, tmp_path_factory, free_port)
    giver.close()


@pytest.mark.parametrize(
    "one",
    [each for each in LINES if each.line.startswith("SocketProtector ")],
    ids=lambda each: re.sub(r"\W+", "-", f"{each.section} {each.line}")[:70],
)
def test_a_line_of_ours_starts_serves_reloads_and_stops(runs: Runs, one: Ours) -> None:
    daemon = runs.protector(one.line)
    before = runs.ask()

    mark = len(daemon.log.seen)
    daemon.signal(signal.SIGHUP)
    line = daemon.log.wait_for(r"event=(reloaded|reload-failed)\b", after=mark)
    assert "event=reloaded" in line
    # Under --handoff listener the old one may accept until it has seen its signal.
    daemon.log.wait_for("event=drained generation=1", after=mark)
    after = runs.ask()

    if before != "hello":
        assert pid_in(before) != pid_in(after)
    if "--pid-file" in one.line:
        assert (runs.folder / "web.pid").read_text().strip() == str(daemon.pid)
    daemon.stop()
    assert daemon.log.count(" error ") == 0


def test_the_queue_without_a_protector_serves_and_grows(runs: Runs) -> None:
    (line,) = [each.line for each in LINES if each.line.startswith("python ")]
    words = runs.words(line)
    read, write = os.pipe()
    process = subprocess.Popen(
        words, cwd=runs.folder, env={**os.environ, **runs.environment}, stdout=write
    )
    os.close(write)
    said = Lines(read)
    try:
        said.wait_for("listens on")
        children = int(words[-1])
        eventually(lambda: len(children_of(process.pid)) == children + 1, "its children")
        pid_in(runs.ask())
        process.send_signal(signal.SIGUSR1)
        eventually(lambda: len(children_of(process.pid)) == children + 2, "one child more")
    finally:
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
    said.join()


def test_no_line_of_ours_is_left_out() -> None:
    assert len(LINES) == len(re.findall(r"^```\w+ ours$", TEXT, re.MULTILINE)) >= 11


def test_a_stand_in_that_is_not_given_its_socket_does_not_start() -> None:
    """So that a line without its placeholder or variable fails here."""
    for name in ("chaussette", "uwsgi", "worker", "nginx"):
        with socket.socket() as none:
            done = subprocess.run(
                [sys.executable, "-S", STANDINS, name],
                pass_fds=[none.fileno()],
                capture_output=True,
            )
        assert done.returncode == 1
