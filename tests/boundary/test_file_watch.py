"""The watcher as a process: which changes it reports."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import needs
from tests.running import DEADLINE_S, ROOT

needs.module("watchfiles", outside_of_tests=True)
WATCHER = ROOT / "socketprotector" / "programs" / "file_watch.py"


@contextmanager
def watching(folder: Path) -> Iterator[socket.socket]:
    """Start a watcher of a folder; give our end of its line once it watches."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(DEADLINE_S)
    with theirs:
        number = theirs.fileno()
        words = [sys.executable, "-I", str(WATCHER), str(number), str(folder), "--"]
        process = subprocess.Popen(words, pass_fds=[number])
    try:
        assert ours.recv(100) == b"="
        yield ours
    finally:
        ours.close()
        process.wait(DEADLINE_S)


def test_a_folder_that_takes_the_place_of_the_watched_one_is_watched(tmp_path: Path) -> None:
    watched, other = tmp_path / "source", tmp_path / "other"
    for each in (watched, other):
        each.mkdir()
        (each / "a.py").touch()

    with watching(watched) as line:
        watched.rename(tmp_path / "old")
        other.rename(watched)
        said = [line.recv(4096)]
        while said[-1] != b"=":
            said.append(line.recv(4096))
        assert line.recv(4096) == b"+1 %s" % bytes(watched)
        (watched / "a.py").write_text("changed")
        path = bytes(watched / "a.py")
        while not line.recv(4096).endswith(b" " + path):
            pass
