"""When a helper process counts as working."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from socketprotector.system import helper
from socketprotector.system.helper import HelperProcess
from socketprotector.system.loop import Loop
from socketprotector.system.process import Process


def test_a_helper_has_proved_itself_after_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then its end is a failed start, after which the next start waits longer."""
    now = [1000.0]
    monkeypatch.setattr(helper, "time", SimpleNamespace(monotonic=lambda: now[0]))
    process = cast("Process", SimpleNamespace(pidfd=-1))
    loop = cast("Loop", SimpleNamespace(watch=lambda *_: None))
    running = HelperProcess(process, loop, lambda _: None)

    for age_s, proven in ((0.0, False), (59.0, False), (61.0, True), (3600.0, True)):
        now[0] = 1000.0 + age_s
        assert running.proven == proven
