"""A hostile release under --handoff listener: how long the clients wait that it has taken.

The kernel cannot give them to the socket of another process.  So they wait as long as the release
lives, and until another generation has started on that socket.
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from tests.hostile.attacked import LONGER_S, ROUNDS, run_delay_s
from tests.running import Client, Protector, ask
from tests.scenarios.operating import Operated
from tests.scenarios.tools import Gate, Release, pid_in, spawned, worker

MODE = ("--handoff", "listener", "--ready", "notify", "--kill-timeout", "0.1s")
GOOD = worker("accepts")


class Served:
    """An instance whose release is exchanged, and its clients."""

    def __init__(self, start: Callable[..., Protector], folder: Path) -> None:
        self.folder, self.gate = folder, Gate(folder / "gate")
        self.deploys("good", *GOOD)
        control, current = folder / "control", folder / "current" / "daemon"
        options = (*MODE, "--control", control)
        self.daemon = start(*options, "127.0.0.1:0", "--", current).ready()
        self.address = "127.0.0.1", self.daemon.port
        self.operated = Operated(self.daemon, control)

    def deploys(self, name: str, *command: str) -> None:
        """Make a release the current one."""
        made = self.folder / name
        made.mkdir(exist_ok=True)
        Release(made / "daemon").becomes(*command)
        new = self.folder / "new"
        new.symlink_to(name)
        new.rename(self.folder / "current")

    @contextmanager
    def taken(self) -> Iterator[list[Client]]:
        """Clients, of which the release has taken the last one, as it still lives."""
        self.deploys("takes", *worker("takes_clients", str(self.gate.path)))
        mark, found = self.daemon.signal(signal.SIGHUP), []
        try:
            while not self.daemon.log.look_for("^taken$", after=mark, within_s=0.01):
                found.append(Client(self.address, "hello"))
            yield found
        finally:
            for each in found:
                each.close()

    def said_s(self, event: str) -> float:
        """Return when a line was written last."""
        line = [each for each in self.daemon.log.seen if f" event={event} " in f"{each} "][-1]
        return datetime.fromisoformat(line.partition(" ")[0]).timestamp()


@pytest.mark.costly
def test_clients_that_a_failing_release_has_taken_wait_for_its_end_and_for_a_start(
    protector: Callable[..., Protector], tmp_path: Path
) -> None:
    """Each time: a second release that fails like the first one postpones nothing."""
    one, longer_s = Served(protector, tmp_path), []
    for _ in range(ROUNDS):
        with one.taken() as clients:
            failed = one.daemon.log.count("event=reload-failed")
            tasks = [f"{one.daemon.pid}", "thread-self"]
            without, mark = sum(map(run_delay_s, tasks)), len(one.daemon.log.seen)
            one.gate.open()
            answers = {pid_in(each.hear()) for each in clients}
            heard_s, delay_s = time.time(), sum(map(run_delay_s, tasks)) - without
            one.daemon.log.wait_for("event=recovered", after=mark)
        assert one.daemon.log.count("event=reload-failed") == failed + 1
        assert spawned(one.daemon)[-1] in answers
        start_s = one.said_s("route") - one.said_s("reloading")
        longer_s.append(heard_s - one.said_s("drained") - start_s - delay_s)
    assert min(longer_s[1:]) < LONGER_S, longer_s
    assert pid_in(ask(one.address)) == spawned(one.daemon)[-1]


@pytest.mark.costly
def test_a_release_that_closes_its_socket_and_lives_is_named_and_the_next_one_serves_its_clients(
    protector: Callable[..., Protector], tmp_path: Path
) -> None:
    """The kernel says to nobody that it can accept no more: only that it accepts none."""
    one = Served(protector, tmp_path)
    one.deploys("closes", *worker("hostile_listener", "closes_it"))
    mark = one.daemon.signal(signal.SIGHUP)
    one.daemon.log.wait_for("^done$", after=mark)
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(one.address, "hello")) for _ in range(3)]

        line = one.daemon.log.wait_for("event=queue-stalled ", after=mark)
        one.deploys("good", *GOOD)
        one.daemon.reload()

        # A call of accept() that is under way still takes the first one.
        assert re.search(r" generation=2 waiting=[23] ", line)
        assert {pid_in(each.hear()) for each in clients} <= {*spawned(one.daemon)}
    assert one.daemon.log.count("event=queue-stalled ") == 1


@pytest.mark.costly
def test_a_reload_that_was_requested_meanwhile_begins_once_they_are_served(
    protector: Callable[..., Protector], tmp_path: Path
) -> None:
    """It may fail as well, and that late: here as late as the test wants."""
    one, stuck = Served(protector, tmp_path), Gate(tmp_path / "stuck")
    with one.taken() as clients:
        one.deploys("later", *stuck.before("/bin/false"))
        mark = len(one.daemon.log.seen)
        one.daemon.signal(signal.SIGHUP)
        one.operated.until("reload_wanted", True)
        one.gate.open()

        answers = {pid_in(each.hear()) for each in clients}

        assert spawned(one.daemon)[-1] in answers
    for event in ("reload-failed", "stranded", "recovered", "spawned generation=4"):
        one.daemon.log.wait_for(f"event={event} ", after=mark)
    stuck.open()
    one.daemon.log.wait_for("event=reload-failed generation=4 ", after=mark)
    assert pid_in(ask(one.address)) in spawned(one.daemon)
