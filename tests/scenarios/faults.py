"""Faults for the real command: calls that fail in its own processes, disks of a few pages."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.running import ask, eventually

#: In front of each fault: whether this process is the resident one, and an error by its name.
_FIRST = """
import errno, os, sys

def resident():
    return "LISTEN_FDS" in os.environ

def fault(name):
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))
"""


def injected(folder: Path, text: str) -> dict[str, str]:
    """An environment in which each Python of the protector begins with `text`.

    Not the guard and the relay, nor the workers of tests: they are told to do without (-I, -E).
    """
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_FIRST + text, encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


class Disk:
    """A file system of a few pages, in a mount namespace of its own."""

    def __init__(self, path: Path, size: str) -> None:
        """`path` is where it is to whatever is started by `before`."""
        self.path = path
        path.mkdir()
        script = 'mount -t tmpfs -o size="$1" none "$0" && echo mounted && exec cat'
        self._holder = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", script, str(path), size],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        self.mounted = self._holder.stdout.readline() == b"mounted\n"
        #: The same folder as the test sees it.
        self.seen = Path(f"/proc/{self._holder.pid}/root{path}")

    @property
    def before(self) -> tuple[str, ...]:
        """Words in front of a command that is to see it."""
        here = ("sh", "-c", 'cd "$0" && exec "$@"', str(self.path.parent))
        return ("nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", *here)

    def fill(self) -> None:
        with (self.seen / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(b"x" * 4096)
            except OSError:
                pass  # full

    def make_room(self) -> None:
        (self.seen / "filler").unlink()

    def write_protect(self) -> None:
        remount = ("mount", "-o", "remount,ro", str(self.path))
        subprocess.run([*self.before, *remount], check=True)

    def cover(self) -> None:
        """Write-protect it where a process has a file open to write: mount it again, read-only."""
        for how in ((), ("-o", "remount,ro")):
            words = ("mount", "--bind", *how, str(self.path), *((str(self.path),) * (not how)))
            subprocess.run([*self.before, *words], check=True)

    def close(self) -> None:
        self._holder.communicate()


def listens(address: str) -> bool:
    try:
        return bool(ask(address))
    except (FileNotFoundError, ConnectionRefusedError):
        return False


def reload_unseen(process: subprocess.Popen[bytes], address: str) -> None:
    """Reload, and wait until another worker answers: the log says nothing here."""
    before = ask(address).partition(" ")[0]
    process.send_signal(signal.SIGHUP)
    eventually(lambda: ask(address).partition(" ")[0] != before, "an answer by a new worker")
