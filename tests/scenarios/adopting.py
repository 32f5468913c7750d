"""Protectors that are replaced or killed and go on: which process it is now, and releases of it."""

from __future__ import annotations

import os
import random
import re
import select
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests import needs
from tests.copies import copy_package
from tests.load import Load, Snapshot
from tests.procfs import state_of
from tests.rounds import rounds
from tests.running import ROOT, WORKERS, Protector, eventually

ROUNDS = rounds(5, 100)
ECHO = (sys.executable, str(WORKERS / "echo.py"))
AS_ANOTHER_USER = needs.ANOTHER_USER


class Chance:
    """Random moments from a seed that is printed; SOCKETPROTECTOR_SEED repeats them."""

    def __init__(self) -> None:
        seed = int(os.environ.get("SOCKETPROTECTOR_SEED") or random.SystemRandom().getrandbits(32))
        print(f"SOCKETPROTECTOR_SEED={seed}")
        self.random = random.Random(seed)

    def moment(self, at_most_s: float) -> None:
        """Let a random time pass: what is tested must hold after any."""
        select.select([], [], [], self.random.random() * at_most_s)


def protector_pid(daemon: Protector) -> int:
    """The process that protects now; under a guard that is not the one we started."""
    found = [
        int(match[1])
        for line in list(daemon.log.seen)
        if (match := re.search(r"event=(?:start|resumed|adopted) pid=(\d+)", line))
    ]
    return found[-1]


def kill_protector(daemon: Protector) -> int:
    """SIGKILL the protector of a guard; return the log's length before it."""
    mark = len(daemon.log.seen)
    os.kill(protector_pid(daemon), signal.SIGKILL)
    return mark


def revived(daemon: Protector, mark: int) -> int:
    """Wait until another protector has gone on; return its pid."""
    daemon.log.wait_for(r"event=resumed\b", after=mark)
    # The line is written before all is adopted: a signal is answered after that.
    return protector_pid(daemon)


def at_rest(daemon: Protector) -> None:
    """Wait until it has done all that it was asked before."""
    mark = daemon.signal(signal.SIGUSR1)
    daemon.log.wait_for("event=reopened", after=mark)


def upgrade(daemon: Protector) -> str:
    """USR2, and wait until the new program has gone on or the old one says why not."""
    mark = daemon.signal(signal.SIGUSR2)
    return daemon.log.wait_for(r"event=(resumed|upgrade-failed)\b", after=mark)


def served(load: Load, more: int = 20) -> Snapshot:
    """Wait until so many more connections were served."""
    now = load.snapshot()
    return load.wait_for(lambda then: then.connections >= now.connections + more)


class Installation:
    """Releases of the protector; `current` leads to one, as a deploy leaves it."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], options: tuple[str, ...] = ()
    ) -> None:
        """options: in front of those that a protector is started with."""
        self.folder = folder
        self.environment = environment
        self.options = options
        self.started: list[Protector] = []
        self.add("one")
        self.switch("one")

    @property
    def command(self) -> tuple[str, ...]:
        return (str(self.folder / "current" / "bin" / "SocketProtector"),)

    def add(self, name: str, version: str | None = None) -> Path:
        """Install a release: this very package, and a script that runs it."""
        release = self.folder / name
        copy_package(ROOT / "socketprotector", release / "socketprotector")
        (release / "bin").mkdir()
        self.script(name, "from socketprotector.__main__ import main\nmain()\n")
        if version is not None:
            self.change(name, "__init__", r'__version__ = ".*"', f'__version__ = "{version}"')
        return release

    def script(self, name: str, text: str, interpreter: str = sys.executable) -> None:
        path = self.folder / name / "bin" / "SocketProtector"
        path.write_text(
            f"#!{interpreter}\nimport os, sys\n"
            f"sys.path.insert(0, {str(self.folder / name)!r})\n{text}"
        )
        path.chmod(0o755)

    def change(self, name: str, module: str, old: str, new: str) -> None:
        """Change a module of a release."""
        path = self.folder / name / "socketprotector" / f"{module}.py"
        text, count = re.subn(old, lambda _: new, path.read_text(), count=1)
        assert count == 1, f"no {old} in {path}"
        path.unlink()  # a loaded one is not written over
        path.write_text(text)

    def switch(self, name: str) -> None:
        """Make a release the current one, at once."""
        new = self.folder / "new"
        new.symlink_to(name)
        new.rename(self.folder / "current")

    def start(self, *arguments: str | Path, **more: Any) -> Protector:
        words = [*self.options, *(str(each) for each in arguments)]
        daemon = Protector(words, self.environment, command=self.command, **more)
        self.started.append(daemon)
        return daemon

    def end(self) -> None:
        for each in self.started:
            each.end()
            print(f"--- log of protector {each.pid} ---\n{each.log.text()}")


def gone(pid: int) -> Callable[[], bool]:
    return lambda: not state_of(pid)


def wait_dead(pid: int) -> None:
    """Wait until a process has ended, reaped or not."""
    eventually(lambda: state_of(pid) in ("", "Z"), f"the end of process {pid}")
