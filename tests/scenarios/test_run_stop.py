"""Ends: graceful, quick, and with things in the way."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.procfs import in_backlog
from tests.rounds import rounds
from tests.running import Client, Protector, eventually, wait_gone
from tests.scenarios.tools import EITHER_HANDOFF, hold, pid_in, spawned, worker

Start = Callable[..., Protector]
TERM = signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
@EITHER_HANDOFF
def test_a_graceful_stop_finishes_what_is_served(
    number: signal.Signals, protector: Start, handoff: str
) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        client.ask()

        mark = daemon.signal(number)

        daemon.log.wait_for("event=stopping", after=mark)
        # The listeners are closed a moment later, when no client has come any more.
        eventually(lambda: refused(daemon.port), "refused connections")
        assert client.ask("still") == f"[{spawned(daemon)[0]}] still"
    assert daemon.wait() == 0
    assert daemon.log.count("event=signalled") == (0 if handoff == "connection" else 1)


def refused(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def test_term_answers_200_connections_that_wait_in_the_backlog(protector: Start) -> None:
    daemon = protector("--queue", "16", "127.0.0.1:0", "--", *worker("in_order")).ready()
    (pid,) = spawned(daemon)
    hold(pid)
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(300)]
    eventually(lambda: 200 <= in_backlog(daemon.port) < 300, "a full queue before the backlog")

    mark = daemon.signal(TERM)
    daemon.log.wait_for("event=stopping", after=mark)
    os.kill(pid, signal.SIGCONT)

    for number, client in enumerate(clients):
        assert client.hear() == f"[{pid}] line {number}, number {number + 1}"
        client.close()
    assert daemon.wait() == 0


@EITHER_HANDOFF
def test_term_answers_what_waits_in_the_backlog_of_a_unix_socket(
    protector: Start, tmp_path: Path
) -> None:
    path = str(tmp_path / "socket")
    daemon = protector("--queue", "16", f"unix:{path}", "--", *worker("in_order")).ready()
    (pid,) = spawned(daemon)
    hold(pid)
    clients = [Client(path, f"line {n}") for n in range(100)]

    mark = daemon.signal(TERM)
    daemon.log.wait_for("event=stopping", after=mark)
    os.kill(pid, signal.SIGCONT)

    for number, client in enumerate(clients):
        assert client.hear() == f"[{pid}] line {number}, number {number + 1}"
        client.close()
    assert daemon.wait() == 0
    assert not os.path.lexists(path)


@EITHER_HANDOFF
def test_term_with_several_full_listeners_loses_nothing(protector: Start, tmp_path: Path) -> None:
    """Each listener in turn finds the channel full while a connection is undelivered already."""
    path = str(tmp_path / "socket")
    addresses = ("127.0.0.1:0", f"unix:{path}", "[::1]:0")
    daemon = protector("--queue", "6", *addresses, "--", *worker("in_order")).ready()
    (pid,) = spawned(daemon)
    hold(pid)
    port6 = int(daemon.addresses[2].rpartition(":")[2])
    places = (("127.0.0.1", daemon.port), path, ("::1", port6))
    clients = [Client(place, f"line {n}") for n in range(30) for place in places]

    mark = daemon.signal(TERM)
    daemon.log.wait_for("event=stopping", after=mark)
    os.kill(pid, signal.SIGCONT)

    for client in clients:
        assert client.hear().startswith(f"[{pid}] ")
        client.close()
    assert daemon.wait() == 0
    assert "lost=" not in daemon.log.text()


@EITHER_HANDOFF
def test_a_worker_killed_during_a_graceful_stop_is_replaced_for_what_it_had_not_taken(
    protector: Start,
) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("in_order")).ready()
    (pid,) = spawned(daemon)
    hold(pid)
    clients = [Client(("127.0.0.1", daemon.port), f"line {n}") for n in range(50)]
    mark = daemon.signal(TERM)
    daemon.log.wait_for("event=stopping", after=mark)
    eventually(lambda: refused(daemon.port), "closed listeners")

    os.kill(pid, signal.SIGKILL)

    for number, client in enumerate(clients):
        assert client.hear().endswith(f" line {number}, number {number + 1}")
        client.close()
    assert daemon.wait() == 0


@EITHER_HANDOFF
def test_stop_timeout_ends_with_term_then_kill(protector: Start) -> None:
    limits = ("--stop-timeout", "0.3s", "--kill-timeout", "0.3s")
    daemon = protector(*limits, "127.0.0.1:0", "--", *worker("ignores_sigterm")).ready()

    daemon.signal(TERM)

    assert daemon.wait() == 0
    said = daemon.log.text()
    assert said.index("signal=TERM") < said.index("signal=KILL") < said.index("SIGKILL")


@EITHER_HANDOFF
def test_a_second_term_is_quick(protector: Start) -> None:
    limit = ("--kill-timeout", "0.3s")
    daemon = protector(*limit, "127.0.0.1:0", "--", *worker("many")).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        client.ask()
        mark = daemon.signal(TERM)
        daemon.log.wait_for("event=stopping", after=mark)
        eventually(lambda: refused(daemon.port), "refused connections")
        assert client.ask() == f"[{spawned(daemon)[0]}] hello"

        daemon.signal(TERM)

        assert daemon.wait() == 0
    assert daemon.log.count('how="was killed by SIGKILL"') == 1


@pytest.mark.parametrize("guard", [(), ("--guard",)], ids=["alone", "guarded"])
def test_a_term_amid_the_exit_is_not_its_status(protector: Start, guard: tuple[str, ...]) -> None:
    daemon = protector(*guard, "127.0.0.1:0", "--", *worker("many")).ready()

    mark = daemon.signal(TERM)
    daemon.log.wait_for("event=stopped", after=mark)
    while daemon.process.poll() is None:
        daemon.signal(TERM)

    assert daemon.wait() == 0


@EITHER_HANDOFF
def test_int_is_quick(protector: Start, handoff: str) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("ignores_end_of_file")).ready()

    daemon.signal(signal.SIGINT)

    assert daemon.wait() == 0
    sent = 1 if handoff == "connection" else 2  # --drain-signal first, which is TERM here
    assert daemon.log.count("event=signalled worker=1 signal=TERM") == sent


@EITHER_HANDOFF
def test_int_ends_the_draining_generations_too(protector: Start) -> None:
    daemon = protector("--kill-timeout", "0.3s", "127.0.0.1:0", "--", *worker("many")).ready()
    clients = []
    for _ in range(rounds(1, 3)):
        clients.append(Client(("127.0.0.1", daemon.port)))
        clients[-1].ask()
        daemon.reload()

    daemon.signal(signal.SIGINT)

    assert daemon.wait() == 0
    assert wait_gone(spawned(daemon)) == []
    for client in clients:
        client.close()


@EITHER_HANDOFF
def test_term_while_the_first_worker_starts(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("never_ready"))
    daemon.log.wait_for("event=spawned")

    daemon.signal(TERM)

    daemon.wait()
    assert wait_gone(spawned(daemon)) == []


@EITHER_HANDOFF
def test_term_while_every_worker_is_dead(protector: Start, tmp_path: Path) -> None:
    copy = tmp_path / "worker"
    copy.write_text(f"#!/bin/sh\nexec {' '.join(worker('many'))}\n")
    copy.chmod(0o755)
    daemon = protector("127.0.0.1:0", "--", copy).ready()
    copy.unlink()
    os.kill(spawned(daemon)[0], signal.SIGKILL)
    eventually(lambda: daemon.log.count("cannot start") >= 4, "the back-off")

    daemon.signal(TERM)

    assert daemon.wait() == 0


@EITHER_HANDOFF
def test_hup_while_stopping_is_refused(protector: Start) -> None:
    daemon = protector("127.0.0.1:0", "--", *worker("many")).ready()
    with Client(("127.0.0.1", daemon.port)) as client:
        serves = pid_in(client.ask())
        mark = daemon.signal(TERM)
        daemon.log.wait_for("event=stopping", after=mark)

        mark = daemon.signal(signal.SIGHUP)

        daemon.log.wait_for("event=refused", after=mark)
        assert pid_in(client.ask()) == serves
    assert daemon.wait() == 0
    assert len(spawned(daemon)) == 1
