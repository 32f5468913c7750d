"""The watcher as a process: which changes it reports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from socketprotector.system import socket_file
from tests import needs
from tests.running import DEADLINE_S, ROOT

needs.module("watchfiles", outside_of_tests=True)
WATCHER = ROOT / "socketprotector" / "programs" / "file_watch.py"


@contextmanager
def watching(folder: Path, *ignored: str) -> Iterator[socket.socket]:
    """Start a watcher of a folder; give our end of its line once it watches."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(DEADLINE_S)
    with theirs:
        number = theirs.fileno()
        words = [sys.executable, "-I", str(WATCHER), str(number), str(folder), "--", *ignored]
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


def test_the_sockets_of_a_path_in_the_folder_are_no_change(tmp_path: Path) -> None:
    """Each generation binds its own socket beside the path: each reload would cause another.

    The watcher does not know the path of a listener that a reload has added.
    """
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as first, watching(tmp_path) as line:
        first.bind(path)
        first.listen()
        with socket_file.bind(path, 1, socket_file.rights_of(path), os.chown) as second:
            socket_file.lead_to(path, second, [first, second])
        (tmp_path / "a.py").touch()
        assert line.recv(4096) == b"+1 %s" % bytes(tmp_path / "a.py")


def test_the_link_current_and_the_files_beside_it_are_no_change(tmp_path: Path) -> None:
    """With --releases, each reload writes the history."""
    current = str(tmp_path / "current")
    others = {"yarn.lock", "something.next", "data.history.js", "current.history.js"}
    with watching(tmp_path, current) as line:
        for name in ("", ".lock", ".next", ".history", ".history.next.0123456789abcdef"):
            Path(f"{current}{name}").touch()
        for name in others:
            (tmp_path / name).touch()
        assert line.recv(4096) == b"+4 %s" % bytes(tmp_path / "current.history.js")


def test_our_files_are_no_change_in_a_folder_that_is_watched_by_a_link(tmp_path: Path) -> None:
    """Each reload writes into the log file: it would cause another."""
    (tmp_path / "real").mkdir()
    watched = tmp_path / "link"
    watched.symlink_to("real")
    with watching(watched, f"{tmp_path}/real/log", f"{watched}/current") as line:
        for name in ("log", "current", "current.history"):
            (watched / name).touch()
        (watched / "a.py").touch()
        assert line.recv(4096) == b"+1 %s" % bytes(watched / "a.py")
