"""When the system, or the protector's share of it, is out of something; and when all is quiet.

What it holds back while it is out of something are connections that pass through it: where workers
accept there are none, and what takes descriptors are reloads and replacements.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import pytest

from socketprotector.system.late_modules import PACK_AFTER_S
from tests import needs
from tests.load import Load
from tests.procfs import children_of, descriptors, in_backlog, kinds_of, memory_kib, wake_ups
from tests.rounds import rounds
from tests.running import LISTENER, Client, Protector, ask, eventually
from tests.scenarios.tools import (
    EITHER_HANDOFF,
    hold,
    kinds_at_rest,
    no_more_open,
    pid_in,
    spawned,
    watch_for_spinning,
    worker,
    worker_for_any_user,
)

Start = Callable[..., Protector]
needs_root = needs.ANOTHER_USER

WITH_40_DESCRIPTORS = ("/bin/sh", "-c", 'ulimit -n 40 && exec "$@"', "-")


def test_emfile_in_the_protector_holds_connections_and_does_not_spin(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    ask(("127.0.0.1", daemon.port))
    soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    kinds_at_rest(daemon)
    taken = descriptors(daemon.pid)
    free = next(fd for fd in range(len(taken) + 1) if fd not in taken)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (free, hard))

    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(50)]
    daemon.log.wait_for("event=resources-exhausted call=accept error=.Too many open files")
    watch_for_spinning(daemon.pid, 5, daemon)
    eventually(lambda: in_backlog(daemon.port) == 50, "the queue")
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (soft, hard))

    for number, client in enumerate(clients):
        assert client.hear().endswith(f" line {number}")
        client.close()
    daemon.stop()


@pytest.mark.costly
def test_emfile_where_workers_accept_costs_only_the_replacement_its_time(
    protector: Start,
) -> None:
    daemon = protector(*LISTENER, "127.0.0.1:0", "--", *worker("many")).ready()
    (pid,) = spawned(daemon)
    kinds = kinds_at_rest(daemon)
    soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (0, hard))

    assert ask(("127.0.0.1", daemon.port)).startswith(f"[{pid}] ")
    hold(pid)
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(50)]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: daemon.log.count("cannot start: Too many open files") >= 3, "its tries")
    watch_for_spinning(daemon.pid, 1, daemon)
    eventually(lambda: in_backlog(daemon.port) == 50, "the queue")
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (soft, hard))

    for number, client in enumerate(clients):
        assert client.hear() == f"[{spawned(daemon)[-1]}] line {number}"
        client.close()
    no_more_open(kinds, daemon.pid)
    daemon.stop()


@EITHER_HANDOFF
def test_emfile_at_a_reload_keeps_what_serves_and_what_is_queued(
    protector: Start, handoff: str
) -> None:
    daemon = protector("--no-log-relay", "127.0.0.1:0", "--", *worker("many")).ready()
    (pid,) = spawned(daemon)
    kinds = kinds_at_rest(daemon)
    hold(pid)
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(20)]
    if handoff == "connection":
        eventually(lambda: in_backlog(daemon.port) == 0, "all of them in the queue")
    soft, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)

    for spare in range(20):  # so that each step of opening and spawning fails once
        taken = descriptors(daemon.pid)
        free = [fd for fd in range(len(taken) + spare + 1) if fd not in taken][spare]
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (free, hard))
        mark = daemon.signal(signal.SIGHUP)
        said = daemon.log.wait_for("event=(reload-failed|reloaded)", after=mark)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (soft, hard))
        if "event=reloaded" in said:
            break
        assert "Too many open files" in said
        eventually(
            lambda: children_of(daemon.pid) == [pid] and kinds_of(daemon.pid) == kinds,
            "nothing left of the failed one",
        )
    assert "event=reloaded" in said
    os.kill(pid, signal.SIGCONT)

    for number, client in enumerate(clients):
        answer = client.hear()
        assert answer.endswith(f" line {number}")
        # To a listener they had come; those in the queue are taken back for the new one, unless
        # the protector still waits for descriptors.
        assert pid_in(answer) == pid or handoff == "connection"
        client.close()
    daemon.stop()


@EITHER_HANDOFF
@pytest.mark.costly
def test_a_low_hard_limit_stops_reloads_and_not_service(
    marked_environment: dict[str, str], handed_over: tuple[str, ...]
) -> None:
    """Each generation that drains costs descriptors; when they are used up, the rest goes on."""
    with ExitStack() as stack:
        daemon = Protector(
            [*handed_over, "127.0.0.1:0", "--", *worker("many")],
            marked_environment,
            through=WITH_40_DESCRIPTORS,
        ).ready()
        stack.callback(daemon.end)
        clients = []
        failed = False
        for _ in range(12):
            client = stack.enter_context(Client(("127.0.0.1", daemon.port)))
            clients.append((client, client.ask().partition(" ")[0]))
            mark = daemon.signal(signal.SIGHUP)
            said = daemon.log.wait_for("event=(reload-failed|reloaded)", after=mark)
            failed = failed or "event=reload-failed" in said
        assert failed

        load = Load(f"127.0.0.1:{daemon.port}", concurrency=4, count=200).start()
        assert load.join().failures == ()
        for client, owner in clients:
            assert client.ask("still") == f"{owner} still"
            client.close()
        eventually(lambda: len(daemon.worker_pids()) == 1, "the end of all that drained")
        daemon.reload()
        daemon.stop()


@needs_root
@pytest.mark.costly
def test_etoomanyrefs_as_another_user_holds_connections_and_does_not_spin(
    marked_environment: dict[str, str],
) -> None:
    """More descriptors in flight than RLIMIT_NOFILE, which root is not held to."""
    options = ("--user", "nobody", "--chdir", "/", "127.0.0.1:0")
    with ExitStack() as stack:
        daemon = Protector(
            [*options, "--", *worker_for_any_user()],
            marked_environment,
            through=WITH_40_DESCRIPTORS,
        ).ready()
        stack.callback(daemon.end)
        (pid,) = spawned(daemon)
        hold(pid)

        connect = partial(Client, ("127.0.0.1", daemon.port))
        clients = [stack.enter_context(connect(f"line {n}")) for n in range(30)]
        eventually(lambda: in_backlog(daemon.port) == 0, "all of them in flight")
        clients += [stack.enter_context(connect(f"line {n}")) for n in range(30, 100)]
        daemon.log.wait_for("event=resources-exhausted call=sendmsg error=.Too many references")
        watch_for_spinning(daemon.pid, 5, daemon)
        assert in_backlog(daemon.port) > 40
        os.kill(pid, signal.SIGCONT)

        for number, client in enumerate(clients):
            assert client.hear() == f"[{pid}] line {number}, number {number + 1}"
            client.close()
        daemon.stop()


@EITHER_HANDOFF
def test_an_idle_protector_does_not_wake_up(protector: Start) -> None:
    daemon = protector(
        "--settle", "0.2s", "--drain-timeout", "60s", "127.0.0.1:0", "--", *worker("many")
    ).ready()
    for _ in range(3):
        daemon.reload()
        ask(("127.0.0.1", daemon.port))
    eventually(lambda: len(daemon.worker_pids()) == 1, "the end of all that drained")
    daemon.log.wait_for("event=drained generation=3")
    # A look at the queue comes 50 ms after the last connection, the count of connections is written
    # a second later, and the kept code is compressed some seconds after the start.
    resting, at_rest = wake_ups(daemon.pid), time.monotonic()

    def rests() -> bool:
        nonlocal resting, at_rest
        found = wake_ups(daemon.pid)
        if found != resting:
            resting, at_rest = found, time.monotonic()
        return time.monotonic() - at_rest > PACK_AFTER_S + 0.5

    awake = wake_ups(daemon.pid)
    eventually(rests, "seconds without a wake-up")
    # To the end of its turn, for the look, to write the count, to compress, a late event.
    assert resting - awake <= 5
    # --no-control: another of the same name looks whether the control socket of that name is alive.
    silent = ("--no-control", "--start-timeout", "2s", "127.0.0.1:0")
    other = protector(*silent, "--", *worker("never_ready"))

    assert other.wait() == 3  # two seconds have passed

    assert wake_ups(daemon.pid) == resting
    daemon.stop()


@pytest.mark.slow
@pytest.mark.timeout(300)
@EITHER_HANDOFF
def test_reload_after_reload_leaks_nothing(protector: Start, handoff: str) -> None:
    """Where workers accept each takes a second, in which the old ones read their clients."""
    daemon = protector("--no-log-relay", "127.0.0.1:0", "--", *worker("many")).ready()

    def settle() -> None:
        eventually(lambda: len(daemon.worker_pids()) == 1, "the end of all that drained")

    # What a heap takes for its holes grows ever less: a leak is what does not.
    first, more = (
        (rounds(6, 250), rounds(10, 250))
        if handoff == "connection"
        else (rounds(2, 10), rounds(4, 50))
    )
    for _ in range(first):
        daemon.reload()
    settle()
    kinds, memory = kinds_at_rest(daemon), memory_kib(daemon.pid)
    for _ in range(more):
        daemon.reload()
        ask(("127.0.0.1", daemon.port))
    settle()

    no_more_open(kinds, daemon.pid)
    assert memory_kib(daemon.pid) < memory + 512
    daemon.stop()
