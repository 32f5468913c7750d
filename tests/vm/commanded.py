"""A machine that a test commands from outside, over a serial line: obey.py runs in it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from tests.running import Lines

#: An emulated processor is some twenty times slower; a boot of it takes minutes.
LIMIT_S = 1800.0
#: For the kernel: with this it boots its default target, as a machine does, and obeys.
WORDS = ("systemd.wants=commands.service",)


class Commanded:
    """The machine that qemu runs; a context manager, whose end kills it."""

    def __init__(self, command: Sequence[str], console: Path) -> None:
        """command: as machine.qemu() makes it, and what stands before and behind it."""
        self._command, self._console = command, console
        self._asked = 0
        self._at = 0  # behind the last boot that was waited for

    def __enter__(self) -> Self:
        receive, send = os.pipe()
        self._qemu = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=send, stderr=subprocess.STDOUT
        )
        os.close(send)
        self._lines = Lines(receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._qemu.kill()
        self._qemu.wait()
        assert self._qemu.stdin is not None
        self._qemu.stdin.close()
        self._lines.join()

    def booted(self) -> None:
        """Wait until it has booted, or booted again.  Raises AssertionError."""
        line = self._hear('^{"boot": ', after=self._at)
        self._at = self._lines.seen.index(line) + 1

    @property
    def boots(self) -> int:
        """How often it has booted so far."""
        return sum(line.startswith('{"boot": ') for line in self._lines.seen)

    def tell(self, *words: str, text: str = "") -> None:
        """Have it run a command, without waiting for its end.  text: for its stdin."""
        self._asked += 1
        order = {"number": self._asked, "words": words, "text": text}
        assert self._qemu.stdin is not None
        self._qemu.stdin.write(json.dumps(order).encode() + b"\n")
        self._qemu.stdin.flush()

    def run(self, *words: str, text: str = "") -> str:
        """Run a command to its end, and return its output.  Raises AssertionError if it fails."""
        self.tell(*words, text=text)
        answer = self._answer(self._asked)
        assert answer["status"] == 0, f"{words}: {answer}"
        out: str = answer["out"]
        return out

    def write(self, path: str, *lines: str) -> None:
        """Write a file."""
        self.run("install", "-D", "-m", "644", "/dev/stdin", path, text="\n".join(lines) + "\n")

    @property
    def last_words(self) -> str:
        """The end of what its console shows."""
        return self._console.read_text(encoding="utf-8", errors="replace")[-4000:]

    def _answer(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._hear(f'^{{"answer": {number},', after=0))
        return found

    def _hear(self, pattern: str, *, after: int) -> str:
        try:
            return self._lines.wait_for(pattern, after=after, deadline_s=LIMIT_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n--- console ---\n{self.last_words}") from error
