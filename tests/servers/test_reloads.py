"""Unmodified servers under --handoff listener, reloaded under load; docs/servers.md tells of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import Protector
from tests.servers.catalogue import SERVERS, Server
from tests.servers.traffic import Traffic

Start = Callable[..., Protector]

RELOADS = 20
#: How long an application takes for an answer, so that requests are under way when the signal
#: comes.
WAIT_S = "0.005"


def tried(servers: list[Server]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("server", servers, ids=[each.name for each in servers])


@pytest.fixture
def serve(protector: Start, tmp_path: Path) -> Callable[[Server], Protector]:
    def start(server: Server) -> Protector:
        server.needed()
        return protector(*server.arguments(tmp_path), WAIT_S=WAIT_S).ready()

    return start


def newest(protector: Protector) -> int:
    """The worker that was started last."""
    found = re.findall(r"event=spawned .*\bpid=(\d+)", protector.log.text())
    return int(found[-1])


@tried([each for each in SERVERS.values() if not each.loses])
def test_twenty_reloads_under_load_fail_no_connection(
    serve: Callable[[Server], Protector], server: Server
) -> None:
    protector = serve(server)

    with Traffic(protector.port, pause_s=0.002) as traffic:
        traffic.wait_for(newest(protector))
        for _ in range(RELOADS):
            protector.reload()
            traffic.wait_for(newest(protector))
    protector.stop()

    assert not traffic.seen.failures
