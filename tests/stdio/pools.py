"""What the tests of the pool share: its command, and clients that talk in lines."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from typing import Any

from tests.running import DEADLINE_S

PROGRAMS = Path(__file__).parent / "programs"
#: Tells its pid, then repeats what it is told; ends with its client.
TALKS = "echo $$; exec cat"
#: How many programs its pool has, itself among them; then it waits for its client's end.
COUNTS = "set -- $(cat /proc/$PPID/task/$PPID/children); echo $#; read line"
#: Answers one line as bench.load expects it.
ANSWERS = 'read line; echo "[$$] $line"'


def pool(at_once: int, *command: str | Path, of: int = 1, shell: bool = False) -> tuple[str, ...]:
    """The command of a worker that starts programs."""
    return (
        *(sys.executable, "-I", "-m", "socketprotector.stdio"),
        *("--at-once", str(at_once), "--of", str(of)),
        *(("--shell",) if shell else ()),
        *("--", *map(str, command)),
    )


def refusing(full: Path, number: int, at_once: int, *command: str) -> tuple[str | Path, ...]:
    """A pool that can start nothing while the file is there."""
    return (
        sys.executable,
        PROGRAMS / "refused.py",
        full,
        str(number),
        *pool(at_once, *command)[4:],
    )


def waited_for(pid: int) -> set[int]:
    """The descriptors in the epoll sets of a process."""
    infos = [file.read_text() for file in Path(f"/proc/{pid}/fdinfo").iterdir()]
    return {int(number) for info in infos for number in re.findall(r"tfd:\s*(\d+)", info)}


class Caller:
    """A client that talks in lines; a context manager."""

    def __init__(self, address: Any, source: Any = None) -> None:
        family = socket.AF_UNIX if isinstance(address, (str, bytes)) else socket.AF_INET
        if family == socket.AF_INET and ":" in address[0]:
            family = socket.AF_INET6
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(DEADLINE_S)
        if source is not None:
            self.socket.bind(source)
        self.socket.connect(address)
        self._lines = self.socket.makefile("rb")

    def say(self, line: str) -> None:
        self.socket.sendall(line.encode() + b"\n")

    def hear(self) -> str:
        """The next line, "" at the end."""
        return self._lines.readline().decode().rstrip("\n")

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()

    def rest(self) -> list[str]:
        """Say no more, and return all lines until the end."""
        self.socket.shutdown(socket.SHUT_WR)
        return [line.decode().rstrip("\n") for line in self._lines]

    def close(self) -> None:
        self._lines.close()
        self.socket.close()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def told(lines: list[str]) -> dict[str, str]:
    """The environment that `env` has printed."""
    return dict(line.split("=", 1) for line in lines if "=" in line)
