"""A worker that is an enemy: what it does harms its own generation at most.

Each attack is a function in tests/workers/hostile.py.  After it a release that behaves is
loaded, and all clients are served.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.procfs import memory_kib, wake_ups
from tests.running import Client, Protector, ask, eventually, wait_gone
from tests.scenarios.managers import Manager
from tests.scenarios.tools import Release, kinds_at_rest, no_more_open, spawned, worker

Start = Callable[..., Protector]

#: It may make the protector work, not grow.
GROWTH_KIB = 8192
QUICK = ("--drain-timeout", "0.1s", "--kill-timeout", "0.1s")

#: These leave the queue of their generation alone, so what waits there is not lost.
SPARE_THE_QUEUE = [
    "floods_notify",
    "floods_descriptors",
    "sends_what_lingers",
    "sends_what_lingers_in_a_queue",
    "returns_what_lingers",
    "claims_what_is_not_its_own",
    "floods_its_return_line",
    "writes_to_the_channel",
    "turns_every_switch",
]
#: These take from it what is theirs to take.
TAKE_WHAT_IS_QUEUED = [
    "shuts_the_channel_down",
    "leaves_a_child_with_the_channel",
    "steals_connections",
    "drops_connections_in_the_kernel",
    "asks_for_credentials",
]
#: These never come to an end.
ENDLESS = {"floods_notify", "floods_descriptors", "steals_connections"}
#: These are replaced again and again, or end.
GO_AWAY = {"shuts_the_channel_down", "leaves_a_child_with_the_channel"}


@pytest.mark.parametrize("attack", [*SPARE_THE_QUEUE, *TAKE_WHAT_IS_QUEUED])
@pytest.mark.costly
def test_a_hostile_worker_harms_its_own_generation_at_most(
    attack: str, protector: Start, tmp_path: Path
) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*worker("hostile", attack))
    daemon = protector(*QUICK, "127.0.0.1:0", "--", release.path).ready()
    if attack not in ENDLESS | GO_AWAY:
        daemon.log.wait_for("^done$")
    before = memory_kib(daemon.pid)
    address = ("127.0.0.1", daemon.port)

    with ExitStack() as stack:
        waiting = [stack.enter_context(Client(address, "early")) for _ in range(5)]
        release.becomes(*worker("many"))
        daemon.reload()

        if attack in SPARE_THE_QUEUE:
            for client in waiting:
                assert client.hear().endswith("] early"), "it waited, and was handed on"
    for _ in range(5):
        assert ask(address).endswith("] hello")
    daemon.log.wait_for("event=exited generation=1 ")
    daemon.reload()
    assert ask(address).endswith("] hello")
    assert memory_kib(daemon.pid) < before + GROWTH_KIB
    daemon.stop()


def test_nothing_of_it_is_kept(protector: Start, tmp_path: Path) -> None:
    """Descriptors that it has sent are closed, and no process is woken by them."""
    release = Release(tmp_path / "daemon")
    release.becomes(*worker("many"))
    daemon = protector(*QUICK, "127.0.0.1:0", "--", release.path).ready()
    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    clean = kinds_at_rest(daemon)

    release.becomes(*worker("hostile", "floods_descriptors"))
    daemon.reload()
    [hostile] = spawned(daemon, 2)
    release.becomes(*worker("many"))
    daemon.reload()
    daemon.log.wait_for("event=exited generation=2 ")

    assert not wait_gone([hostile])
    no_more_open(clean, daemon.pid)
    calm = wake_ups(daemon.pid)
    assert ask(("127.0.0.1", daemon.port)).endswith("] hello")
    assert wake_ups(daemon.pid) - calm < 100
    daemon.stop()


def test_what_it_says_is_passed_on_to_no_other_process(protector: Start, tmp_path: Path) -> None:
    """The protector sends nothing to the service manager in a worker's words."""
    manager = Manager(str(tmp_path / "notify"))
    try:
        attack = worker("hostile", "claims_what_is_not_its_own")
        options = ("-v", "--kill-timeout", "0.1s")
        daemon = protector(*options, "127.0.0.1:0", "--", *attack, NOTIFY_SOCKET=manager.address)
        daemon.ready()
        heard = manager.rest()  # its queue holds a few at a time
        daemon.log.wait_for("^done$")
        daemon.signal(signal.SIGINT)
        while "EXIT_STATUS" not in (fields := manager.hear()):
            heard.append(fields)
        assert daemon.wait() == 0, daemon.log.text()
    finally:
        manager.close()
    said = {f"{name}={value}" for fields in heard for name, value in fields.items()}
    assert f"MAINPID={daemon.pid}" in said
    assert "MAINPID=1" not in said
    for wrong in ("ERRNO", "WATCHDOG=trigger", "NOTIFYACCESS", "RELOADING", "X_EX"):
        assert not [each for each in said if each.startswith(wrong)], said


def test_it_cannot_write_into_the_channel(protector: Start, tmp_path: Path) -> None:
    release = Release(tmp_path / "daemon")
    release.becomes(*worker("hostile", "writes_to_the_channel"))
    daemon = protector("-v", *QUICK, "127.0.0.1:0", "--", release.path).ready()

    daemon.log.wait_for("^done$")
    mark = daemon.signal(signal.SIGUSR1)
    daemon.log.wait_for("event=reopened", after=mark)

    assert daemon.log.count("could be written to") == 0
    daemon.signal(signal.SIGINT)
    daemon.wait()


def test_it_cannot_hold_up_a_start_for_ever_against_the_operator(
    protector: Start, tmp_path: Path
) -> None:
    """EXTEND_TIMEOUT_USEC of thirty years: a second signal ends it all the same."""
    attack = worker("hostile", "claims_what_is_not_its_own")
    options = ("--stop-timeout", "0.1s", "--kill-timeout", "0.1s")
    daemon = protector(*options, "127.0.0.1:0", "--", *attack).ready()
    daemon.log.wait_for("^done$")

    daemon.signal(signal.SIGTERM)
    daemon.signal(signal.SIGTERM)

    assert daemon.wait() == 0


def test_control_characters_of_its_words_do_not_reach_the_log(protector: Start) -> None:
    daemon = protector("-v", "127.0.0.1:0", "--", *worker("says_nonsense")).ready()

    line = daemon.log.wait_for("event=status ")

    assert re.search(r"[\x00-\x1f\x7f]", line) is None
    eventually(lambda: daemon.log.count("event=ready") == 1, "one ready")
    daemon.stop()
