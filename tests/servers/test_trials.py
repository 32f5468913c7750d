"""What docs/servers.md promises of each unmodified server, tried with each; and its table.

What is `costly` is tried with a server of the tests each time: in tests/scenarios, test_question,
test_dry_run, test_settle_check and test_lame_duck.
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
from tests.servers import table, trials
from tests.servers.catalogue import PAUSE_S, SERVERS, WAIT_S, Server
from tests.servers.trials import Place
from tests.web import Connection

pytestmark = pytest.mark.slow

Start = Callable[..., Protector]


@pytest.fixture(params=list(SERVERS.values()), ids=list(SERVERS))
def at(
    request: pytest.FixtureRequest,
    protector: Start,
    tmp_path: Path,
    free_port: Callable[[], int],
) -> Place:
    server: Server = request.param
    server.needed()
    return Place(
        server,
        protector,
        tmp_path,
        free_port,
        reloads=rounds(1, 20),
        answers=rounds(50, 200),
        clients=4,
        pause_s=PAUSE_S,
    )


@pytest.mark.costly
def test_reloads_under_load_fail_no_connection_and_end_idle_ones_without_a_word(at: Place) -> None:
    assert not trials.reloads(at).failures


@pytest.mark.costly
def test_a_release_that_answers_500_gets_no_client(at: Place) -> None:
    assert not trials.answers_500(at).failures


@pytest.mark.costly
def test_a_release_that_never_accepts_gets_no_client(at: Place) -> None:
    assert not trials.never_accepts(at).failures


@pytest.mark.costly
def test_clients_of_a_release_that_dies_at_once_go_back(at: Place) -> None:
    trials.dies(at)


@pytest.mark.costly
def test_a_release_that_is_tried_gets_no_client(at: Place) -> None:
    assert not trials.dry_run(at).failures


@pytest.mark.costly
def test_a_release_that_is_found_out_while_it_settles_loses_its_clients(at: Place) -> None:
    trials.settle_check(at)


@pytest.mark.costly
def test_a_lame_duck_serves_all_who_come(at: Place) -> None:
    assert not trials.lame_duck(at).failures


def test_the_table_has_each_server_and_each_trial() -> None:
    rows = table.read(table.PAGE.read_text(encoding="utf-8"))

    assert list(rows) == list(SERVERS)
    assert {tuple(cells) for cells in rows.values()} == {tuple(trials.TRIALS)}
    assert all(all(cells.values()) for cells in rows.values())


@pytest.mark.parametrize("name", [name for name, each in SERVERS.items() if each.waits])
@pytest.mark.costly
def test_a_connection_that_was_accepted_and_asks_late_is_answered_by_the_old_one(
    protector: Start, tmp_path: Path, free_port: Callable[[], int], name: str
) -> None:
    server = SERVERS[name]
    server.needed()
    daemon = protector(*server.arguments(tmp_path, free_port), WAIT_S=WAIT_S).ready()
    address = "127.0.0.1", daemon.port
    with Connection(address) as idle, Connection(address) as late:
        idle.ask()
        eventually(lambda: is_accepted(daemon.port, late.port), "the connection accepted")
        old = [spawned(daemon)[-1], *descendants(spawned(daemon)[-1])]

        daemon.reload()
        assert idle.ended(within_s=20)  # so the old one has heard
        late.send()

        assert late.answer() in old
    daemon.log.wait_for(r"event=exited generation=1\b.*exited with status 0")
    daemon.stop()
