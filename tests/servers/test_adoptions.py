"""Unmodified servers under --handoff listener while the protector itself is replaced, under load.

What they share with it (docs/modes.md, "What is shared") stays as they have set it, or
they would hang in accept().
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rounds import rounds
from tests.running import Protector
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.tools import spawned
from tests.servers.catalogue import PAUSE_S, SERVERS, WAIT_S
from tests.web import Connection, Traffic

Start = Callable[..., Protector]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["upgrade", "guard"])
@pytest.mark.parametrize("name", ["uvicorn-asyncio", "uvicorn", "gunicorn", "node", "nginx"])
@pytest.mark.costly
def test_another_protector_goes_on_and_no_request_fails(
    protector: Start, tmp_path: Path, free_port: Callable[[], int], name: str, how: str
) -> None:
    server = SERVERS[name]
    server.needed()
    guard = ("--guard",) if how == "guard" else ()
    daemon = protector(*guard, *server.arguments(tmp_path, free_port), WAIT_S=WAIT_S).ready()
    with Traffic(("127.0.0.1", daemon.port), pause_s=PAUSE_S) as traffic:
        traffic.wait_for(spawned(daemon)[-1])
        for _ in range(rounds(1, 10)):
            if how == "guard":
                revived(daemon, kill_protector(daemon))
            else:
                assert "event=resumed" in upgrade(daemon)
            for _ in range(3):  # one by one, so that each is followed by an accept() of none
                with Connection(("127.0.0.1", daemon.port)) as one:
                    assert one.ask(last=True)
        mark = daemon.signal(signal.SIGHUP)
        daemon.log.wait_for("event=reloaded", after=mark)
        traffic.wait_for(spawned(daemon)[-1])
    daemon.stop()

    assert not traffic.seen.failures
