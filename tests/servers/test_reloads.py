"""Unmodified servers under --handoff listener, reloaded under load; see docs/servers.md.

Each is started by its own command where that can take a listener.  That the new one is ready too
early fails no client: those that come then wait in its backlog.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.processes import descendants
from tests.procfs import is_accepted
from tests.rounds import rounds
from tests.running import Protector, eventually
from tests.scenarios.tools import spawned
from tests.servers.catalogue import PAUSE_S, SERVERS, WAIT_S, Server
from tests.web import Connection, Traffic

Start = Callable[..., Protector]
Serve = Callable[[Server], Protector]

RELOADS = rounds(1, 20)

pytestmark = pytest.mark.slow


def tried(servers: list[Server]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("server", servers, ids=[each.name for each in servers])


@pytest.fixture
def serve(protector: Start, tmp_path: Path, free_port: Callable[[], int]) -> Serve:
    def start(server: Server) -> Protector:
        server.needed()
        return protector(*server.arguments(tmp_path, free_port), WAIT_S=WAIT_S).ready()

    return start


@tried(list(SERVERS.values()))
@pytest.mark.parametrize("ready", ["accept", "http:/"])
def test_each_can_be_asked(
    protector: Start, tmp_path: Path, free_port: Callable[[], int], server: Server, ready: str
) -> None:
    server.needed()
    words = server.arguments(tmp_path, free_port)
    at = next(n for n, word in enumerate(words) if word.startswith("http="))
    words[at:at] = ["--ready", ready]
    daemon = protector(*words, WAIT_S=WAIT_S).ready()

    daemon.reload()

    with Traffic(("127.0.0.1", daemon.port), pause_s=PAUSE_S) as traffic:
        traffic.wait_for(spawned(daemon)[-1])
    assert not traffic.seen.failures
    daemon.stop()


class Outcome:
    """What clients have seen of reloads."""

    def __init__(self, protector: Protector, times: int) -> None:
        """Reload under load, each time when the generation before has answered; stop."""
        idle = Connection(("127.0.0.1", protector.port))
        idle.ask()
        with Traffic(("127.0.0.1", protector.port), pause_s=PAUSE_S) as traffic:
            traffic.wait_for(spawned(protector)[-1])
            for _ in range(times):
                protector.reload()
                traffic.wait_for(spawned(protector)[-1])
            self.idle_ended = idle.ended(within_s=20)
        idle.close()
        protector.stop()
        self.failures = traffic.seen.failures
        self.generations = len(traffic.seen.workers)


@tried([*SERVERS.values()])
def test_reloads_under_load_fail_no_connection_and_end_idle_ones_without_a_word(
    serve: Serve, server: Server
) -> None:
    seen = Outcome(serve(server), RELOADS)

    assert not seen.failures
    assert seen.generations == RELOADS + 1
    assert seen.idle_ended


@tried([each for each in SERVERS.values() if each.waits])
def test_a_connection_that_was_accepted_and_asks_late_is_answered_by_the_old_one(
    serve: Serve, server: Server
) -> None:
    protector = serve(server)
    idle, late = (
        Connection(("127.0.0.1", protector.port)),
        Connection(("127.0.0.1", protector.port)),
    )
    idle.ask()
    eventually(lambda: is_accepted(protector.port, late.port), "the connection accepted")
    old = [spawned(protector)[-1], *descendants(spawned(protector)[-1])]

    protector.reload()
    assert idle.ended(within_s=20)  # so the old one has heard
    late.send()

    assert late.answer() in old
    idle.close()
    late.close()
    protector.log.wait_for(r"event=exited generation=1\b.*exited with status 0")
    protector.stop()
