"""Unmodified servers under --handoff listener while the protector itself is replaced, under load.

What they share with it (docs/handoff.md, "What is shared") stays as they have set it, or they would
hang in accept().
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rounds import rounds
from tests.running import Protector
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.servers.catalogue import SERVERS
from tests.servers.traffic import PAUSE_S, WAIT_S, Connection, Traffic, newest

Start = Callable[..., Protector]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["upgrade", "guard"])
@pytest.mark.parametrize("name", ["uvicorn-asyncio", "uvicorn", "gunicorn", "node", "nginx"])
def test_another_protector_goes_on_and_no_request_fails(
    protector: Start, tmp_path: Path, free_port: Callable[[], int], name: str, how: str
) -> None:
    server = SERVERS[name]
    server.needed()
    guard = ("--guard",) if how == "guard" else ()
    daemon = protector(*guard, *server.arguments(tmp_path, free_port), WAIT_S=WAIT_S).ready()
    with Traffic(daemon.port, pause_s=PAUSE_S) as traffic:
        traffic.wait_for(newest(daemon))
        for _ in range(rounds(1, 10)):
            if how == "guard":
                revived(daemon, kill_protector(daemon))
            else:
                assert "event=adopted" in upgrade(daemon)
            for _ in range(3):  # one by one, so that each is followed by an accept() of nobody
                one = Connection(daemon.port)
                one.ask(last=True)
                assert one.answer()
                one.close()
        mark = daemon.signal(signal.SIGHUP)
        daemon.log.wait_for("event=reloaded", after=mark)
        traffic.wait_for(newest(daemon))
    daemon.stop()

    assert not traffic.seen.failures
