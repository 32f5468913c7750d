"""The soak's books: which kill accounts for which failure, and which failure none does."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from bench.account import LATE_S, SOON_S, Kill, account
from bench.service import unix_clients_of
from socketprotector.demo.load import Load
from socketprotector.demo.seen import Failure, Kind


def failure(
    kind: Kind = "reset",
    *,
    at_s: float = 10.1,
    started_s: float = 9.9,
    pid: int | None = None,
    port: int = 4000,
) -> Failure:
    return Failure(kind, at_s, started_s, pid, "", port)


def worker(*ports: int, at_s: float = 10.0, pid: int = 7) -> Kill:
    return Kill("worker", pid, at_s, at_s + 0.001, frozenset(ports))


PROTECTOR = Kill("protector", 5, 10.0, 10.001)
PROTECTOR_AGAIN = Kill("protector", 6, 10.05, 10.06)


def test_what_a_killed_worker_had_noted_is_accounted_for_even_when_the_client_looks_late() -> None:
    late = failure(at_s=10.0 + LATE_S, pid=7)

    assert account([late], [worker(4000)]).held == [late]


def test_a_connection_begun_after_the_kill_was_not_the_killed_workers() -> None:
    later = failure(started_s=10.2, at_s=10.3)

    assert account([later], [worker(4000)]).unaccounted == [later]


def test_a_connection_that_another_worker_had_answered_is_not_accounted_for() -> None:
    others = failure(pid=8)

    assert account([others], [worker(4000), PROTECTOR]).unaccounted == [others]


def test_each_kill_of_a_worker_accounts_for_one_unnoted_connection_at_most() -> None:
    first, second = failure(port=1), failure(port=2, at_s=10.2)

    judged = account([second, first], [worker()])

    assert (judged.being_taken, judged.unaccounted) == ([first], [second])


def test_each_kill_of_a_protector_accounts_for_one_connection_at_most() -> None:
    failures = [failure(port=port) for port in (1, 2, 3)]

    judged = account(failures, [PROTECTOR, PROTECTOR_AGAIN])

    assert (judged.undelivered, judged.unaccounted) == (failures[:2], failures[2:])


def test_only_soon_after_the_kill_does_its_time_account_for_a_failure() -> None:
    late = failure(at_s=10.0 + SOON_S + 0.01)
    early = failure(at_s=9.99)

    assert account([late, early], [PROTECTOR]).unaccounted == [early, late]


def test_refused_timed_out_and_wrong_are_excused_by_no_kill() -> None:
    kinds: tuple[Kind, ...] = ("refused", "timed_out", "wrong", "local")
    failures = [failure(kind) for kind in kinds]

    assert account(failures, [worker(4000), PROTECTOR]).unaccounted == failures


def test_the_kill_of_the_guard_excuses_nothing() -> None:
    lost = failure()

    assert account([lost], [Kill("guard", 4, 10.0, 10.001)]).unaccounted == [lost]


def test_a_process_that_holds_a_unix_client_is_known_by_the_number_that_its_failure_has(
    tmp_path: Path,
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()
        load = Load(f"unix:{tmp_path}/socket", concurrency=1, count=1, timeout_s=60).start()
        held, _ = listener.accept()
        pidfd = os.pidfd_open(os.getpid())
        with held:
            held.recv(100)
            found = unix_clients_of(os.getpid(), pidfd)
        os.close(pidfd)
        (failed,) = load.join().failures

    assert failed.kind == "empty"
    assert failed.port in found
    assert failed.port != 0


def test_a_unix_client_that_finds_the_backlog_full_for_too_long_has_failed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(0)
        first.connect(str(tmp_path / "socket"))
        with Load(f"unix:{tmp_path}/socket", concurrency=1, timeout_s=0.1) as load:
            seen = load.wait_for(lambda now: bool(now.failures))

    assert {each.kind for each in seen.failures} == {"timed_out"}
    assert {each.detail for each in seen.failures} == {"a full backlog"}
