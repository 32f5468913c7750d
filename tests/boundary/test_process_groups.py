"""What a dead worker leaves, and lost workers: each gets one order to finish."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any, cast

import pytest

from socketprotector.model.records import WorkerRecord
from socketprotector.system.loop import Loop
from socketprotector.system.process import Process
from socketprotector.system.process_groups import Groups
from tests.boundary.ending import until

SAYS = "trap 'echo USR1' USR1; trap 'echo TERM' TERM; echo; while :; do sleep 0.01; done"


@pytest.mark.parametrize("order", [lambda groups: groups.drain(1), lambda groups: groups.retire(1)])
def test_a_group_gets_its_drain_signal_once(loop: Loop, order: Callable[[Groups], None]) -> None:
    descriptors: dict[str, int] = {}
    gone: list[bool] = []
    log = cast("Any", type("Log", (), {"write": lambda *_, **__: None})())
    groups = Groups(loop, log, descriptors)
    with subprocess.Popen(
        ["/bin/sh", "-c", SAYS], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        leader = Process(process.pid, os.pidfd_open(process.pid))
        record = WorkerRecord(1, 1, process.pid, 0)
        groups.keep(record, leader, signal.SIGUSR1, lambda: gone.append(True))
        groups.drain(2)
        assert not groups.records()[0].asked_to_exit
        order(groups)
        assert process.stdout.readline() == b"USR1\n"
        assert groups.records()[0].asked_to_exit, "the next program sends it no second one"
        groups.drain(1)
        groups.signal(1, signal.SIGTERM)
        assert process.stdout.readline() == b"TERM\n"
        groups.signal(1, signal.SIGKILL)
        process.wait()
        until(loop, lambda: bool(gone))
    assert descriptors == {}
