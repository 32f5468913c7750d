"""What the protector reads from its guard."""

from __future__ import annotations

import socket

import pytest

from socketprotector.daemon.parents import Parents
from socketprotector.system.loop import Loop


def test_all_waiting_reports_of_the_guard_come_before_a_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A timer would call the statuses of the other workers unknown, and a clean exit a failure."""
    monkeypatch.setenv("FDSTORE", "")  # so that it is restored
    ours, guard = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parents, loop = Parents(ours.detach(), {}, lambda again: None), Loop()
    heard: list[tuple[int, bool]] = []
    parents.watch(loop, lambda pid, clean, how: heard.append((pid, clean)), lambda: None)
    reports = [(pid, pid % 2 == 0) for pid in range(1, 101)]
    for pid, clean in reports:
        guard.send(b"X_EXITED=%d %d" % (pid, 0 if clean else 256))
    loop.call_after("unknown", 0.0, lambda: setattr(loop, "running", False))

    loop.run()

    parents.guard.close()
    guard.close()
    loop.close()
    assert heard == reports
