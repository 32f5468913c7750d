"""What a protector from before an upgrade of its files executes, by paths and names of then."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.running import DEADLINE_S, ROOT

PACKAGE = ROOT / "socketprotector"


def test_the_relay_writes_what_it_reads(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    log = tmp_path / "log"
    given = ("name", "file", "0", str(theirs.fileno()))
    with log.open("wb") as file:
        with theirs:
            relay = subprocess.Popen(
                [sys.executable, "-I", "-S", str(PACKAGE / "relay.py"), *given],
                stdin=subprocess.PIPE,
                stdout=file,
                pass_fds=[theirs.fileno()],
            )
        ours.close()  # it stays as long as a client may ask it for last words
        relay.communicate(b"a line\n", DEADLINE_S)

    assert (relay.returncode, log.read_text()) == (0, "a line\n")


def test_the_watcher_says_what_is_not_there(tmp_path: Path) -> None:
    needs.module("watchfiles")
    ours, theirs = socket.socketpair()
    words = (str(theirs.fileno()), str(tmp_path / "gone"), "--")
    with ours, theirs:
        command = [sys.executable, str(PACKAGE / "watch.py"), *words]
        done = subprocess.run(command, pass_fds=[theirs.fileno()], check=False)
        said = ours.recv(4096)

    assert done.returncode == 1
    assert said.startswith(b"!")
    assert b"gone: No such file" in said


@pytest.mark.parametrize("module", ["stdio.__main__", "legacy"])
def test_the_adapters_are_imported_by_the_names_of_then(module: str) -> None:
    """Workers of a generation from before are started again as it was, by what stands in it."""
    code = f"from socketprotector.{module} import main; print(main.__module__)"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.startswith(f"socketprotector.programs.{module}")
