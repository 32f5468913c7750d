"""A release that is asked, and what asks it."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from tests.certificates import self_signed
from tests.procfs import children_of
from tests.running import DEADLINE_S, WORKERS, Protector
from tests.scenarios.tools import Release

#: With site, which has the client library.
ANSWERS = (sys.executable, str(WORKERS / "answers.py"))


class Asked:
    """A release that answers to /healthz what a file says."""

    def __init__(self, folder: Path, release: Release) -> None:
        self.says, self.release = folder / "says", release
        self.good()
        self.becomes()

    def good(self) -> None:
        self._say("200 fine")

    def bad(self) -> None:
        self._say("500 database gone")

    def silent(self) -> None:
        self._say("")

    def becomes(self, *options: str | Path) -> None:
        self.release.becomes(*ANSWERS, str(self.says), *map(str, options))

    def speaks_tls(self) -> None:
        self.becomes("--tls", self_signed(self.says.parent))

    def _say(self, text: str) -> None:
        new = self.says.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.rename(self.says)


def get(port: int, path: str = "/") -> str:
    """The body of an answer."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
        client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        with client.makefile("rb") as stream:
            return stream.read().partition(b"\r\n\r\n")[2].decode().strip()


def probers(daemon: Protector) -> list[int]:
    """The processes that make TLS connections to the release, or forward a check's."""
    found = []
    for pid in children_of(daemon.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"prober.py" in words:
            found.append(pid)
    return found
