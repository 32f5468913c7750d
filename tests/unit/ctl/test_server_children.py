"""A worker's own children, as /proc shows them to the command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from socketprotector.ctl.server_children import children_of
from socketprotector.system import procfs
from tests import needs
from tests.unit.ctl.fake import generation, status, worker

#: Starts two children, one of them by a thread, and a third that has ended and is not reaped.
_FORKS = """
import subprocess, sys, threading
def more():
    children.append(subprocess.Popen(["sleep", "1000"]))
children = [subprocess.Popen(["sleep", "1000"]), subprocess.Popen(["true"])]
thread = threading.Thread(target=more)
thread.start()
thread.join()
import os
os.waitid(os.P_PID, children[1].pid, os.WEXITED | os.WNOWAIT)
print(children[0].pid, children[2].pid, flush=True)
sys.stdin.read()
for each in (children[0], children[2]):
    each.kill()
    each.wait()
"""


class Server:
    """A process that has children, and says which."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", _FORKS], stdin=pipe, stdout=pipe)
        assert self.process.stdout is not None
        self.children = sorted(map(int, self.process.stdout.readline().split()))


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.process.communicate()


def test_living_children_of_all_threads_are_found(server: Server) -> None:
    pid = server.process.pid
    if not Path(f"/proc/{pid}/task/{pid}/children").exists():
        needs.skip("a kernel with CONFIG_PROC_CHILDREN")

    found = children_of(status(generation(8, "serving", worker(14, pid)), handoff="listener"))

    assert found == {pid: server.children}


def test_the_programs_of_clients_are_not_shown(server: Server) -> None:
    there = generation(8, "serving", worker(14, server.process.pid))

    assert children_of(status(there, handoff="stdio")) == {}
    assert children_of(status(there, handoff="of a newer program")) == {}


def test_without_proc_there_are_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    there = generation(8, "serving", worker(14, server.process.pid))

    monkeypatch.setattr(procfs, "is_ours", lambda: False)

    assert children_of(status(there, handoff="listener")) == {}


def test_a_hidden_process_has_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid=2 the folder of another user's process is not there."""
    there = generation(8, "serving", worker(14, server.process.pid))

    def hidden(pid: int) -> list[int]:
        raise FileNotFoundError

    monkeypatch.setattr(procfs, "children_of", hidden)

    assert children_of(status(there, handoff="listener")) == {}
