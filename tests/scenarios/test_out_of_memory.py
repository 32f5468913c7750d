"""The kernel kills workers in a real cgroup that has no memory left, and others kill them, too."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import needs
from tests.rounds import rounds
from tests.running import Client, Protector
from tests.scenarios.tools import spawned

LIMIT = 96 << 20
BY_LIMIT = f'"was killed by SIGKILL: out of memory (the service\'s limit of {LIMIT >> 20}M)"'
BY_OTHERS = '"was killed by SIGKILL"'
GREEDY = """
import subprocess, sys
from socketprotector_client import connections
for client, _ in connections():
    with client:
        said = client.recv(9)
        if said == b"eat\\n":
            kept = b"x" * (1 << 30)
        if said == b"feed\\n":
            subprocess.run([sys.executable, "-c", "kept = b'x' * (1 << 30)"])
        client.sendall(b"well")
"""
FILES = {"/sys/fs/cgroup": "memory.max", "/sys/fs/cgroup/memory": "memory.limit_in_bytes"}

pytestmark = needs.ROOT


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup of our own, with a limit."""
    for parent, limit in FILES.items():
        folder = Path(parent) / f"sp-test-{os.getpid()}"
        with suppress(OSError):
            folder.mkdir()
            if (folder / limit).exists():
                (folder / limit).write_text(str(LIMIT))
                with suppress(OSError):
                    (folder / "memory.swap.max").write_text("0")
                break
            folder.rmdir()
    else:
        needs.skip("a memory cgroup of its own")
    yield folder
    folder.rmdir()


@pytest.mark.parametrize("life", range(rounds(1, 100)))
def test_a_kill_for_want_of_memory_is_not_confused_with_another(
    marked_environment: dict[str, str], group: Path, life: int
) -> None:
    enter = ("/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    words = ("127.0.0.1:0", "--", sys.executable, "-c", GREEDY)
    daemon = Protector(words, marked_environment, through=enter).ready()

    for of_memory in (True, False) if life % 2 else (False, True):
        mark = len(daemon.log.seen)
        if of_memory:
            with Client(("127.0.0.1", daemon.port), "eat"):
                end = daemon.log.wait_for("event=exited ", after=mark)
        else:
            os.kill(spawned(daemon, 1)[-1], signal.SIGKILL)
            end = daemon.log.wait_for("event=exited ", after=mark)
        assert f"how={BY_LIMIT if of_memory else BY_OTHERS}" in end
        daemon.log.wait_for("event=worker-ready ", after=mark)
    daemon.stop()


@pytest.mark.costly
def test_a_kill_of_a_program_of_a_worker_explains_no_end_of_a_worker(
    marked_environment: dict[str, str], group: Path
) -> None:
    enter = ("/bin/sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    words = ("127.0.0.1:0", "--", sys.executable, "-c", GREEDY)
    daemon = Protector(words, marked_environment, through=enter).ready()

    with Client(("127.0.0.1", daemon.port), "feed") as client:
        assert client.hear() == "well"
    line = daemon.log.wait_for("event=out-of-memory ")
    assert f'killed=1 reason="out of memory (the service\'s limit of {LIMIT >> 20}M)"' in line
    os.kill(spawned(daemon, 1)[-1], signal.SIGKILL)
    assert f"how={BY_OTHERS}" in daemon.log.wait_for("event=exited ")
    daemon.stop()
