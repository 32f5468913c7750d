"""One idle worker is woken for a connection.  If it never takes it, another one is woken."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.running import Client
from tests.scenarios.operating import Operating
from tests.scenarios.tools import library_worker, spawned

WAYS = ["connections", "serve", "listener", "aserve", "stdio"]
PROGRAM = ("--at-once", "6", "--of", "3", "--", "sh", "-c", "echo [$$] served")


@pytest.mark.parametrize("end", ["stop", "kill"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.costly
def test_a_client_of_a_worker_that_was_woken_and_never_took_is_served_by_another(
    operated: Operating, tmp_path: Path, way: str, end: str
) -> None:
    flag = tmp_path / "flag"
    rest = PROGRAM if way == "stdio" else ()
    command = library_worker("stumbles", str(flag), end, way, *rest)
    web = operated("--workers", "3", command=command)
    for _ in range(6):  # a loop that has begun to wait for the queue itself
        with Client(web.address) as client:
            assert "served" in client.hear()

    flag.touch()
    with Client(web.address) as client:
        stumbled = int(re.findall(r"stumbles=(\d+)", web.daemon.log.wait_for("stumbles="))[0])
        try:
            assert "served" in client.hear()
        finally:
            if end == "stop":
                os.kill(stumbled, signal.SIGCONT)

    assert stumbled in spawned(web.daemon)
