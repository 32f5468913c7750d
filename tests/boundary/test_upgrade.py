"""The probe of an upgrade, as its loop sees it."""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from socketprotector.daemon import upgrade
from socketprotector.daemon.upgrade import Upgrade
from socketprotector.system import inherited
from socketprotector.system.log import Log
from socketprotector.system.loop import Loop

DEADLINE_S = 20.0


@pytest.mark.usefixtures("in_root_directory")
@pytest.mark.parametrize(
    ("command", "limit_s", "why"),
    [
        ("exec sleep 60", 0.5, "the new program did not answer in 500ms: it said nothing"),
        ("echo no >&2; exit 3", DEADLINE_S, "the new program exited with status 3: no"),
    ],
    ids=["silent", "ended"],
)
def test_the_reason_says_whether_the_new_program_was_too_slow(
    command: str,
    limit_s: float,
    why: str,
    loop: Loop,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upgrade, "TRIAL_S", limit_s)
    reasons: list[object] = []

    def noted(level: str, event: str, fields: Mapping[str, object]) -> None:
        reasons.append(fields["reason"])
        loop.running = False

    log = Log("info")
    log.observe(noted)
    descriptors = {name: os.memfd_create(name) for name in (inherited.SETTINGS, inherited.STATE)}
    try:
        probed = Upgrade(("/bin/sh", "-c", command), loop, log, keeps_capabilities=False)
        probed.begin(descriptors, lambda: pytest.fail("it has not said yes"))
        loop.call_after("deadline", DEADLINE_S, lambda: pytest.fail("no end of the probe"))
        loop.run()
    finally:
        log.close()
        for fd in descriptors.values():
            os.close(fd)

    assert reasons == [why]
