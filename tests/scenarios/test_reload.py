"""Reloads of the real command with real workers."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tests.running import WORKERS, Protector, ask


def test_a_reload_gives_new_connections_to_the_new_generation(
    protector: Callable[..., Protector],
) -> None:
    daemon = protector("127.0.0.1:0", "--", sys.executable, WORKERS / "echo.py").ready()
    first = ask(("127.0.0.1", daemon.port))

    daemon.reload()

    second = ask(("127.0.0.1", daemon.port))
    assert first.endswith("] hello")
    assert second.endswith("] hello")
    assert first != second
    daemon.stop()
