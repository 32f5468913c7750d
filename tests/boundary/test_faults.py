"""The fault table: each system call of the path and of supervision fails once, in each way.

A row names the call, what it fails with and what is to happen.  The world is the simulated
one of tests/simulation: the protector's own modules and a kernel in which exactly this call
fails.  After each row everything must have been delivered and nothing be left over.  What can
be made to fail for real (limits, full disks, closed terminals) is in
tests/scenarios/test_faults_*.py.

The classes: EAGAIN and EINTR retry (Python itself repeats a call on EINTR, PEP 475), EMFILE,
ENOBUFS, ENOMEM and ENOSPC out of resources, EPIPE and ECONNRESET peer gone, EBADF and EINVAL
faults of ours.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest

from socketprotector.core.events import Deadline
from socketprotector.core.fleet import Policy
from tests.simulation.world import World

SCARCE = (errno.EMFILE, errno.ENOBUFS, errno.ENOMEM)
FATAL = (errno.EBADF, errno.EINVAL)
GONE = (errno.EPIPE, errno.ECONNRESET)

LATER = "tried again by a timer, told once, nothing lost"
NEXT = "the next wake-up brings it"
BROKEN = "the generation is replaced, what it had goes to the next"
RELOAD_FAILS = "the reload fails, what serves goes on"
GOES_ON = "told, and goes on"

#: The descriptor to spare, once the queue of the old generation was taken back.
TAKING_BACK = "open", 3
#: call, errnos, which of its calls fail (counted from the reload on), what is to happen
TABLE: tuple[tuple[str, tuple[int, ...], int, str], ...] = (
    ("accept", (errno.EAGAIN, errno.ECONNABORTED), 0, NEXT),
    ("accept", (*SCARCE, *FATAL), 0, LATER),
    ("sendmsg", (errno.EAGAIN, *SCARCE, errno.ETOOMANYREFS, *FATAL), 0, LATER),
    ("sendmsg", GONE, 0, BROKEN),
    ("recvmsg", (errno.EAGAIN, *SCARCE, *FATAL, *GONE), 0, LATER),
    ("recvmsg", (errno.EAGAIN, *SCARCE, *FATAL, *GONE), 1, LATER),
    ("open", SCARCE, 0, RELOAD_FAILS),  # a place for the pidfd of each worker
    ("open", SCARCE, 3, LATER),
    ("hear", (errno.EAGAIN,), 0, NEXT),
    ("hear", (*SCARCE, *FATAL, *GONE), 0, GOES_ON),
    ("socketpair", (*SCARCE, errno.EINVAL), 0, RELOAD_FAILS),
    ("socketpair", (*SCARCE, errno.EINVAL), 1, RELOAD_FAILS),
    ("setsockopt", (*SCARCE, *FATAL), 0, GOES_ON),  # two sockets of each ended worker are emptied
    ("setsockopt", (*SCARCE, *FATAL), 6, RELOAD_FAILS),  # the channel
    ("setsockopt", (*SCARCE, *FATAL), 7, RELOAD_FAILS),  # a worker's notify socket
    ("socket", SCARCE, 0, RELOAD_FAILS),
    ("bind", (errno.ENOMEM, errno.EADDRINUSE), 0, RELOAD_FAILS),
    ("dup", SCARCE, 0, GOES_ON),  # for the guard or the fd store
    ("fcntl", (*SCARCE, errno.EINVAL), 0, GOES_ON),  # the scoreboard's seals: not counted
    ("fcntl", (*SCARCE, errno.EINVAL), 1, RELOAD_FAILS),
    ("fcntl", (*SCARCE, errno.EINVAL), 2, RELOAD_FAILS),
    ("memfd_create", (errno.EMFILE, errno.ENOMEM), 0, GOES_ON),
    ("resolve", (errno.ENOENT, errno.EACCES, errno.EIO), 0, RELOAD_FAILS),
    (
        "posix_spawn",
        (errno.EAGAIN, errno.ENOMEM, errno.ENOENT, errno.EACCES, errno.E2BIG, errno.EINVAL),
        0,
        RELOAD_FAILS,
    ),
    ("pidfd_open", (*SCARCE, errno.EINVAL), 0, RELOAD_FAILS),
    ("epoll_ctl", (errno.ENOSPC, errno.ENOMEM, errno.EINVAL), 0, RELOAD_FAILS),  # channel
    ("epoll_ctl", (errno.ENOSPC, errno.ENOMEM, errno.EINVAL), 1, RELOAD_FAILS),  # pidfd
    ("epoll_ctl", (errno.ENOSPC, errno.ENOMEM, errno.EINVAL), 2, RELOAD_FAILS),  # notify
    ("epoll_ctl", (errno.ENOSPC, errno.ENOMEM, errno.EINVAL), 7, LATER),  # listener
    ("pwrite", (errno.ENOSPC, errno.ENOMEM, errno.EIO, errno.EBADF), 0, GOES_ON),
    ("line", (errno.EAGAIN, errno.ENOBUFS, errno.ETOOMANYREFS), 0, GOES_ON),
)
#: Of the errors of one class the code knows no difference: `make test` tries one of each.
ALIKE = {each: kind for kind in (SCARCE, FATAL, GONE) for each in kind[1:]}
ROWS = [
    pytest.param(
        *(call, code, nth, then),
        id=f"{call}-{nth}-{errno.errorcode[code]}",
        marks=pytest.mark.costly if ALIKE.get(code, (code,))[0] in {*codes} - {code} else (),
    )
    for call, codes, nth, then in TABLE
    for code in codes
]


class OneFault(World):
    """A calm world with a reload in the middle, in which one call fails."""

    UNUSUAL = False

    def __init__(self, call: str, code: int, nth: int) -> None:
        self.said: list[str] = []
        super().__init__(seed=1, steps=0, note=self.said.append)
        if (call, nth) == TAKING_BACK:  # else the old ones finish what they have got
            self.settings = replace(self.settings, policy=Policy())
        self._fails = call, code
        self._fails_in = nth
        self.failed = False
        self._script: list[Callable[[], None]] = []

    def _strike(self, call: str) -> int:
        self.kernel.quiet_calls = 1
        if self.failed or not self._script_done or call != self._fails[0]:
            return 0
        if self._fails_in > 0:
            self._fails_in -= 1
            return 0
        self.failed = True
        return self._fails[1]

    _script_done = False

    def _be_calm(self) -> None:
        super()._be_calm()
        self.kernel.quiet_calls = 1

    def _all_do_well(self) -> None:
        """First all serve; then three wait in the queue, a reload comes, and three more."""
        if not self._script_done and self._serves():
            self._script_done = True
            for worker in self.workers:
                worker.hangs = True
            for _ in range(3):
                self._connect()
            self._hup()
            self._rounds = 6
        if self._script_done and self._rounds:
            self._rounds -= 1
            if self._rounds == 3:
                for _ in range(3):
                    self._connect()
            self._keep()
            for worker in self.workers:
                if not worker.ended and not worker.ready:
                    worker.ready = True
                    self._tell(worker, b"READY=1")
            assert self.kernel.epoll is not None
            if self.kernel.epoll.told() or self._loop._timers:
                return
            while self._rounds:  # nothing else is going to happen
                self._rounds -= 1
                if self._rounds == 3:
                    for _ in range(3):
                        self._connect()
        super()._all_do_well()

    _rounds = 0

    def _serves(self) -> bool:
        fleet = self._supervisor.fleet if self._supervisor is not None else None
        return fleet is not None and fleet.served and not fleet.timers


@pytest.mark.parametrize(("call", "code", "nth", "then"), ROWS)
def test_a_call_that_fails(call: str, code: int, nth: int, then: str) -> None:
    world = OneFault(call, code, nth)
    world.fd_store = "guard"

    world.live()  # which looks for spinning, leaks, order and rest by itself

    said = "\n".join(world.said)
    assert world.failed, f"{call} was never called:\n{said}"
    assert world.lost == {}
    assert world.delivered == world.connections == 6
    news = [line.split()[1] for line in world.said if line.startswith("  log: ")]
    if then == LATER:
        assert news.count("resources-exhausted") <= 1
    if then == RELOAD_FAILS:
        assert "reload-failed" in news
        assert "reloaded" not in news
    else:
        assert "reload-failed" not in news
    assert not any(isinstance(key, Deadline) for key in world._loop._timers)
