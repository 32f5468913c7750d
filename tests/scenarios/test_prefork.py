"""Workers that fork children, which take connections as well."""

from __future__ import annotations

from tests.running import Client
from tests.scenarios.operating import Operating, nothing_of, say_watchdog
from tests.scenarios.tools import library_worker, pid_in


def test_a_worker_whose_children_wait_beside_it_is_not_taken_for_one_that_hangs(
    operated: Operating,
) -> None:
    web = operated("--watchdog", "4s", command=library_worker("prefork", "8"))
    line = web.line(follows=True)
    [pid] = web.pids(1)
    say_watchdog(pid)

    nothing_of(line, ["worker-stuck"], 5.0)

    assert web.pids(1) == [pid]
    with Client(web.address, "hello") as client:
        assert pid_in(client.hear()) > 0
