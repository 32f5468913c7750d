"""Workers, their parents and guards killed again and again under load: what is lost, and left.

A test suspends a process and notes its connections before it kills it, so the port of a lost client
shows whose client it was.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest

from socketprotector.demo.kill import kill
from socketprotector.demo.seen import Kill, Snapshot, split_by_kills
from tests import needs
from tests.load import Load
from tests.procfs import in_sessions
from tests.rounds import rounds
from tests.running import ROOT, Client, Protector, eventually, wait_gone
from tests.scenarios.adopting import kill_protector, protector_pid, revived, served
from tests.scenarios.operating import Operated, Operating
from tests.scenarios.tools import EITHER_HANDOFF, hold, library_worker, pid_in, spawned
from tests.web import Connection

#: After the drain timeout TERM must suffice; KILL would only hide what does not end by it.
LIMITS = ("--drain-timeout", "2s", "--kill-timeout", "20s")
#: Before the back-off for quick deaths would make a slot wait long, a reload forgets them.
KILLS_A_RELEASE = 8
#: Conversations begun in a second: more would take the processors from what starts.  And how long
#: one may take: with a busy machine's pauses, in which nothing of ours runs, longer than usual.
PACE: dict[str, Any] = {"rate_per_s": 150, "timeout_s": 100}

needs_both = needs.unless(None not in map(find_spec, ("uvicorn", "waitress")), "uvicorn, waitress")
APPLICATION = pytest.mark.parametrize("program", ["asgi", "wsgi"])


def run(program: str, *options: str) -> tuple[str, ...]:
    """Return the command of an application in processes that each have a child."""
    module = "tests.frameworks.programs.has_children"
    words = ("-m", "socketprotector_client.run", *options, f"{module}:{program}")
    return (sys.executable, *words)


def started(operated: Operating, *options: str, command: tuple[str, ...]) -> Operated:
    return operated(*LIMITS, "--chdir", str(ROOT), *options, command=command)


def load_of(web: Operated, program: str) -> Load:
    address = f"127.0.0.1:{web.address[1]}"
    if program == "serve":
        return Load(address, concurrency=16, **PACE, lines=3, pause_s=0.002)
    return Load(address, concurrency=16, **PACE, http=True)


@contextmanager
def taken(web: Operated, program: str) -> Iterator[tuple[int, int, Callable[[], bool]]]:
    """Keep a connection that a process has answered: yield its pid, our port, and whether it ended.

    So whichever process is killed has taken one connection at least.
    """
    if program == "serve":
        with Client(web.address, "hello") as client:
            pid, port = pid_in(client.hear()), client.socket.getsockname()[1]

            def ended() -> bool:
                try:
                    return client.hear() == ""
                except ConnectionResetError:
                    return True

            yield pid, port, ended
    else:
        with Connection(web.address) as asked:
            yield asked.ask(), asked.port, asked.ended


class Killed:
    """The kills of a test."""

    def __init__(self) -> None:
        self.kills: list[Kill] = []
        self.clients = 0  # that one_that_answers() has had, beside those of the load

    def add(self, pid: int) -> Kill:
        self.kills.append(kill(pid))
        return self.kills[-1]

    def one_that_answers(self, web: Operated, program: str) -> int:
        """Kill the process that takes the next client, and check that the client sees the end."""
        with taken(web, program) as (pid, port, ended):
            assert port in self.add(pid).held
            assert ended()
        self.clients += 1
        return pid

    def see(self, seen: Snapshot) -> None:
        """See that nothing was lost but what a killed process had taken."""
        by_kills, others = split_by_kills(seen.failures, self.kills)
        held = sum(len(each.held) for each in self.kills)
        print(
            f"{len(self.kills)} kills of processes with {held} connections; "
            f"{seen.connections} answered, {len(by_kills)} + {self.clients} lost"
        )
        assert others == []


def is_whole(web: Operated, workers: int, children: int = 0) -> bool:
    """Whether one generation is left, and all its workers and their children serve."""
    generations = web.status()["generations"]
    found = [each for generation in generations for each in generation["workers"]]
    forked = [len(each.get("processes", ())) for each in found]
    return (
        len(generations) == 1
        and [each["state"] for each in found] == ["ready"] * workers
        and forked == [children] * workers
    )


def _no_process_of(workers: Collection[int]) -> None:
    eventually(lambda: not in_sessions(workers), "the end of all processes of these workers")


def nothing_is_left(web: Operated, workers: int, children: int = 0) -> None:
    """See that the fleet has its size, and that of all other workers no process is left."""
    eventually(lambda: is_whole(web, workers, children), "the whole fleet")
    [generation] = web.status()["generations"]
    serving = {each["pid"] for each in generation["workers"]}
    old = {*spawned(web.daemon)} - serving
    _no_process_of(old)
    alive = in_sessions(serving)
    assert len(alive) == workers * 2 + children * 2, alive


@needs_both
@pytest.mark.slow
@pytest.mark.costly
@pytest.mark.timeout(rounds(300, 1800))
@EITHER_HANDOFF
@pytest.mark.parametrize("program", ["serve", "asgi", "wsgi"])
def test_each_kill_of_a_plain_worker_costs_only_what_it_had_taken(
    operated: Operating, program: str
) -> None:
    command = library_worker("echo", "8", "grandchild") if program == "serve" else run(program)
    web = started(operated, "--workers", "4", command=command)
    killed = Killed()
    with load_of(web, program) as load:
        for number in range(rounds(9, 100)):
            if number % KILLS_A_RELEASE == KILLS_A_RELEASE - 1:
                web.daemon.reload()
            mark = len(web.daemon.log.seen)
            killed.one_that_answers(web, program)
            web.daemon.log.wait_for("event=worker-ready ", after=mark)
            served(load)
    killed.see(load.snapshot())
    nothing_is_left(web, 4)


@needs_both
@pytest.mark.slow
@pytest.mark.costly
@pytest.mark.timeout(rounds(300, 1800))
@EITHER_HANDOFF
@APPLICATION
def test_each_kill_of_a_child_costs_what_it_had_taken_and_of_its_parent_nothing(
    operated: Operating, program: str
) -> None:
    web = started(operated, command=run(program, "--processes", "2"))
    killed = Killed()
    with load_of(web, program) as load:
        for number in range(1, rounds(4, 50) + 1):
            [parent] = web.pids(number)
            child = killed.one_that_answers(web, program)
            if number % 2:  # the other time the parent is just forking another child
                web.daemon.log.wait_for(f"event=child-failed .*pid={child} ")
                served(load)
            mark = len(web.daemon.log.seen)
            assert killed.add(parent).held == frozenset()
            web.daemon.log.wait_for("event=worker-ready ", after=mark)
            served(load)
            web.daemon.reload()
            eventually(lambda: is_whole(web, 1, 2), "the end of the old release")
    killed.see(load.snapshot())
    nothing_is_left(web, 1, 2)


# -- the guard -------------------------------------------------------------------------------


def terminated(daemon: Protector) -> None:
    os.kill(protector_pid(daemon), signal.SIGTERM)


def guard_killed(daemon: Protector) -> None:
    daemon.process.kill()
    daemon.log.wait_for("event=guard-died")


def protector_killed(daemon: Protector) -> None:
    os.kill(protector_pid(daemon), signal.SIGKILL)


def both_killed(daemon: Protector) -> None:
    """Kill the protector while its guard cannot start another one, and then the guard."""
    hold(daemon.pid)
    protector_killed(daemon)
    daemon.process.kill()


#: What ends an instance whose processes share; whether the guard is killed before it; whether a
#: protector is there to end what the children have started.
ENDS: Sequence[tuple[Callable[[Protector], None], bool, bool]] = (
    (terminated, True, True),
    (protector_killed, True, False),
    (both_killed, False, False),
)


@pytest.mark.slow
@pytest.mark.costly
@pytest.mark.timeout(rounds(300, 1800))
@EITHER_HANDOFF
def test_guards_parents_and_protectors_killed_in_turn_leave_nothing(
    protector: Callable[..., Protector], free_port: Callable[[], int], handoff: str
) -> None:
    """Nothing replaces a guard in place, so each one is another instance's, on the same port."""
    port = free_port()
    answered = lost = 0
    lives = rounds(3, 15)
    for life in range(lives):
        end, is_unguarded, is_tidied = ENDS[life % len(ENDS)]
        way = ("grandchild",) if is_tidied else ()
        command = library_worker("shares", "2", *way)
        daemon = protector(*LIMITS, "--guard", f"127.0.0.1:{port}", "--", *command).ready()
        with Load(f"127.0.0.1:{port}", **PACE) as load:
            served(load)
            _kill_parent(daemon, load)
            revived(daemon, kill_protector(daemon))
            served(load)
            _kill_parent(daemon, load)
            if is_unguarded:
                _kill_parent(daemon, load, guard_killed)
                _kill_parent(daemon, load)
        seen = load.snapshot()
        # The killed protector may lose the one connection that it was handing over.
        assert len(seen.failures) <= (handoff == "connection"), seen.failures
        answered, lost = answered + seen.connections, lost + len(seen.failures)
        end(daemon)
        assert wait_gone([protector_pid(daemon), daemon.pid]) == []
        _no_process_of(spawned(daemon))
    print(f"{lives} instances, {answered} answered, {lost} lost")


def _kill_parent(
    daemon: Protector, load: Load, then: Callable[[Protector], None] = lambda _: None
) -> None:
    mark = len(daemon.log.seen)
    os.kill(spawned(daemon)[-1], signal.SIGKILL)
    then(daemon)
    daemon.log.wait_for("event=worker-ready ", after=mark)
    served(load)
