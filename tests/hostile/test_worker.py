"""A hostile worker, on each thing that it has of the protector: clients are served beside it.

Each attack is a function of tests/workers/hostile.py.  It goes on in one worker while the other
one of its generation serves clients; then a good release is loaded.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Iterable, Mapping
from contextlib import suppress

import pytest

from socketprotector.model.fd_budget import LEFT_BEHIND
from tests.hostile.attacked import GOOD, Attacked
from tests.procfs import descriptors
from tests.running import eventually, wait_gone
from tests.scenarios.tools import worker

pytestmark = pytest.mark.timeout(120)

#: Attacks that never end, by what they reach; none takes clients, as every worker may.
ENDLESS = {
    "notify socket": ("floods_notify", "floods_descriptors", "says_the_worst"),
    "scoreboard": ("writes_the_scoreboard",),
    "control socket": ("calls_the_control_socket",),
}
#: Those that end, and have left something.
ENDING = {
    "notify socket": (
        *("claims_what_is_not_its_own", "sends_what_lingers", "sends_what_lingers_in_a_queue"),
    ),
    "RETURN line": ("floods_its_return_line", "returns_what_lingers"),
    "channel": ("writes_to_the_channel", "turns_every_switch"),
    "pipes": ("prints_a_line_without_end", "prints_lines_without_end", "has_its_pipes_full"),
}
#: What a worker of the protector's own user reaches, beside all of that.
OF_ITS_USER = ("calls_the_control_socket", "writes_the_scoreboard")
ACK = '{"command":"worker:ack","pid":1}'


def named(attacks: Mapping[str, Iterable[str]]) -> list[str]:
    return [each for found in attacks.values() for each in found]


def attack(one: Attacked, name: str) -> None:
    """Load a release of which one worker attacks, and the other one serves."""
    words = (str(one.control),) if name == "calls_the_control_socket" else ()
    one.release.becomes(*worker("hostile", name, *words))
    one.start.reload()
    if name in named(ENDING):
        one.start.wait_for("(?m)^done$")


@pytest.mark.parametrize(
    ("name", "isolated"),
    [
        *((name, True) for name in (*named(ENDLESS), *named(ENDING))),
        *((name, False) for name in OF_ITS_USER),
    ],
)
def test_clients_are_served_beside_it(attacked: Attacked, name: str, isolated: bool) -> None:
    one = attacked.up("--workers", "2", isolated=isolated)
    with one.unharmed():
        attack(one, name)
        one.serves()
        one.is_listed()
        one.release.becomes(*GOOD)
        one.start.reload()
        assert wait_gone(one.workers(2)) == []
        one.start.wait_for("event=drained generation=2")
    assert "it could " not in one.start.log
    one.works()


@pytest.mark.parametrize(
    ("name", "room"),
    [("floods_descriptors", 0), ("floods_descriptors", 4), ("sends_what_lingers", 1)],
)
@pytest.mark.costly
def test_clients_are_served_beside_it_near_the_limit_of_descriptors(
    attacked: Attacked, name: str, room: int
) -> None:
    """What it sends takes none of those that are left; without one more no client could come."""
    one = attacked.up("--workers", "2", isolated=False)
    attack(one, name)
    with one.unharmed(), one.room_for(1 + room):
        one.serves()
    one.release.becomes(*GOOD)
    one.works()


@pytest.mark.parametrize("guarded", [(), ("--guard",)], ids=["alone", "guarded"])
def test_one_that_is_not_ready_yet_holds_up_no_client(
    attacked: Attacked, guarded: tuple[str, ...]
) -> None:
    """By what it sends in the place of an ACK; it ends, and the reload fails."""
    good = ("/bin/sh", "-c", f"echo '{ACK}' >&$EINHORN_SOCK_FD; exec {shlex.join(GOOD)} --silent")
    attacked.release.becomes(*good)
    one = attacked.up(*guarded, "--ready", "ack")
    with one.unharmed():
        one.release.becomes(*worker("hostile", "floods_its_ack_line"))
        one.start.send(signal.SIGHUP)
        [hostile] = one.workers(2)
        one.serves()
        one.is_listed()
        os.kill(hostile, signal.SIGKILL)
        one.start.wait_for("event=reload-failed")
    one.release.becomes(*good)
    one.works()


#: Is ready, and leaves a process that has its pipe and says `heard` when the gate closes.  The
#: worker of the first slot serves.
LEAVES = f"""
case $SOCKETPROTECTOR_WORKER in
    0) echo '{ACK}' >&$EINHORN_SOCK_FD; exec {shlex.join(GOOD)} --silent;;
esac
setsid sh -c 'exec 3<"$0"; echo there-$$; read x <&3; echo heard-$1; exec sleep 600' GATE \
    $SOCKETPROTECTOR_GENERATION &
echo '{ACK}' >&$EINHORN_SOCK_FD
exec sleep 600
"""


@pytest.mark.parametrize("options", [(), ("--guard", "--log-prefix")], ids=["alone", "guarded"])
@pytest.mark.costly
def test_what_its_processes_in_other_sessions_keep_open_is_bounded(
    attacked: Attacked, options: tuple[str, ...]
) -> None:
    """Each has its worker's pipe: those of the workers that ended last can still be read."""
    folder, each, releases = attacked.start.folder, 25, 4
    gate = folder / "gate"
    os.mkfifo(gate)
    holds = os.open(gate, os.O_RDWR)
    attacked.release.becomes("/bin/sh", "-c", LEAVES.replace("GATE", str(gate)))
    leaves = attacked.release.path.read_text()
    good = f"echo '{ACK}' >&$EINHORN_SOCK_FD; exec {shlex.join(GOOD)} --silent"
    attacked.release.becomes("/bin/sh", "-c", good)
    one = attacked.up(*options, "--workers", str(each + 1), "--ready", "ack")
    # A few come and go: a request, what the guard is just told.
    before = {pid: len(descriptors(pid)) + 8 for pid in one.processes()}

    one.release.write(leaves)
    for left in range(each, each * releases + 1, each):
        one.start.reload()
        one.serves()
        eventually(lambda left=left: one.start.log.count("there-") == left, "them all")  # type: ignore[misc]
    one.release.becomes("/bin/sh", "-c", good)
    one.start.reload()
    one.start.wait_for(f"event=drained generation={releases + 1}")

    eventually(
        lambda: all(len(descriptors(pid)) <= n + LEFT_BEHIND for pid, n in before.items()),
        "a bound",
    )
    closed = each * releases - LEFT_BEHIND
    eventually(lambda: one.start.log.count("event=output-closed") == closed, "all the lines")
    os.close(holds)
    eventually(lambda: one.start.log.count("heard-") == LEFT_BEHIND, "the newest ones' lines")
    assert len(re.findall(r"heard-5$", one.start.log, re.MULTILINE)) == each
    # By the number that each has printed: a process in execve(2) has no environment that finds it.
    # A line in a closed pipe has ended most of them, but the guard may have closed its copy later.
    for pid in re.findall(r"there-(\d+)$", one.start.log, re.MULTILINE):
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    eventually(
        lambda: all(len(descriptors(pid)) <= n for pid, n in before.items()), "those of before"
    )
    one.works()


@pytest.mark.costly
def test_what_a_child_that_outlives_it_keeps_open_ends_with_it(attacked: Attacked) -> None:
    """The child may still write to the log; it has nothing else of the protector."""
    one = attacked.up()
    with one.unharmed():
        for generation in (2, 4):
            one.release.becomes(*worker("hostile", "leaves_a_child_with_its_pipes"))
            one.start.reload()
            one.start.wait_for("(?m)^done$")
            one.release.becomes(*GOOD)
            one.start.reload()
            assert wait_gone(one.workers(generation)) == []
        left = one.strays()
        one.serves()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert len(left) == 2
    one.works()
