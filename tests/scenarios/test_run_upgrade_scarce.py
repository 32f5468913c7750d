"""An upgrade when the protector has hardly a descriptor to spare: it is refused, in words."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable

import pytest

from tests.running import WORKERS, Protector, ask


@pytest.mark.parametrize("spare", [0, 1, 2, 4])
def test_an_upgrade_without_descriptors_is_refused_and_the_old_program_goes_on(
    protector: Callable[..., Protector], spare: int
) -> None:
    command = (sys.executable, str(WORKERS / "minimal.py"))
    daemon = protector("127.0.0.1:0", "--", *command).ready()
    used = max(map(int, os.listdir(f"/proc/{daemon.pid}/fd"))) + 1
    _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)

    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (used + spare, hard))
    mark = daemon.signal(signal.SIGUSR2)

    daemon.log.wait_for("event=upgrade-failed .*Too many open files", after=mark)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert ask(("127.0.0.1", daemon.port))
    mark = daemon.signal(signal.SIGUSR2)
    daemon.log.wait_for("event=adopted", after=mark)
    daemon.stop()
