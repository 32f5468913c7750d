"""An upgrade when the protector has hardly a descriptor to spare: it is refused, in words."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable

import pytest

from tests.procfs import descriptors
from tests.running import Protector, ask
from tests.scenarios.tools import EITHER_HANDOFF, worker


@pytest.mark.parametrize("spare", [0, 1, 2, 4])
@EITHER_HANDOFF
def test_an_upgrade_without_descriptors_is_refused_and_the_old_program_goes_on(
    protector: Callable[..., Protector], spare: int
) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    used = max(descriptors(daemon.pid)) + 1
    _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)

    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (used + spare, hard))
    mark = daemon.signal(signal.SIGUSR2)

    daemon.log.wait_for("event=upgrade-failed .*Too many open files", after=mark)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
    assert ask(("127.0.0.1", daemon.port))
    mark = daemon.signal(signal.SIGUSR2)
    daemon.log.wait_for("event=resumed", after=mark)
    daemon.stop()
