"""What a reload waits for is in its progress and in status, also after USR2 and a kill."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.running import Client, eventually
from tests.scenarios.adopting import kill_protector, revived, upgrade
from tests.scenarios.operating import OBEYS, Operated, Operating
from tests.scenarios.probed import Asked
from tests.scenarios.running_ctl import Running
from tests.scenarios.tools import Release

BAD = 'last answer to GET /healthz: 500, "database gone"'
OPEN = "generation 1 still has 1 connection"


@pytest.fixture
def release(tmp_path: Any) -> Release:
    return Release(tmp_path / "release")


@contextmanager
def reloading(one: Operated) -> Iterator[Running]:
    trying = Running("--control", str(one.path), "reload")
    try:
        yield trying
    finally:
        trying.end()


def reasons(one: Operated) -> list[str]:
    return [each["reason"] for each in one.status().get("waits_for", [])]


def says(one: Operated, reason: str) -> None:
    eventually(lambda: any(reason in each for each in reasons(one)), f"{reason} in {reasons(one)}")


def says_so_after_each_change_of_program(one: Operated, reason: str) -> None:
    says(one, reason)
    assert "event=resumed" in upgrade(one.daemon)
    says(one, reason)
    revived(one.daemon, kill_protector(one.daemon))
    says(one, reason)


@pytest.mark.costly
def test_a_bad_answer_to_a_probe_is_named_while_it_is_waited_for(
    operated: Operating, asked: Asked
) -> None:
    http = ("--ready", "http:/healthz", "--start-timeout", "600s")
    one = operated("--guard", *http, command=(str(asked.release.path),))
    assert "waits_for" not in one.status()
    asked.bad()

    with reloading(one) as trying:
        assert trying.err.wait_for(r"^waiting: .*500").startswith(
            f"waiting: generation 2 starts: {BAD}, "
        )
        says_so_after_each_change_of_program(one, BAD)
        asked.good()
        assert trying.wait() == 0, trying.err.text()

    eventually(lambda: reasons(one) == [], "the end of all waits")
    one.daemon.stop()


def test_stop_first_names_the_connection_that_it_waits_for(operated: Operating) -> None:
    order = ("--reload-order", "stop-first", "--drain-timeout", "600s")
    one = operated("--guard", *order, command=(*OBEYS, "8"))
    with Client(one.address, "pid") as client, reloading(one) as trying:
        client.hear()
        assert trying.err.wait_for(rf"^waiting: {OPEN}, ")
        says_so_after_each_change_of_program(one, OPEN)
        client.close()
        assert trying.wait() == 0, trying.err.text()

    eventually(lambda: reasons(one) == [], "the end of all waits")
    one.daemon.stop()
