"""System calls that fail in the real command, at its start and while it runs.

Run each way is what becomes of workers without their protector: those that accept have no channel
that ends.  What fails at the start, and how the loop waits, is the same for both.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from socketprotector.model.backoff import backoff_s
from socketprotector.model.errors import NO_PROCESSES
from tests.load import Load
from tests.procfs import state_of
from tests.rounds import rounds
from tests.running import DEADLINE_S, LISTENER, Client, Protector, ask, eventually, wait_gone
from tests.scenarios.adopting import at_rest, revived, upgrade
from tests.scenarios.faults import injected
from tests.scenarios.starting import MINIMAL, Start
from tests.scenarios.tools import EITHER_HANDOFF, hold, pid_in, spawned, worker

Starter = Callable[..., Protector]

MEMFD_FAILS = """
real = os.memfd_create
def memfd_create(name, *flags):
    if name == {name!r}:
        raise fault({code!r})
    return real(name, *flags)
os.memfd_create = memfd_create
"""


@pytest.mark.parametrize("code", ["EMFILE", "ENOMEM", "EPERM"])
@pytest.mark.parametrize(
    ("name", "mode", "reason"),
    [
        ("sp.settings", (), "cannot pass descriptors to the resident process"),
        ("sp.settings", ("-f",), "cannot pass descriptors to the resident process"),
        ("sp.state", ("--log-file", "log"), "cannot keep the state in memory"),
        ("sp.state", ("-f",), "cannot keep the state in memory"),
        ("sp.state", ("--guard", "--log-file", "log"), "cannot keep the state in memory"),
    ],
    ids=["launch", "launch -f", "resident", "resident -f", "guarded"],
)
def test_without_a_memfd_the_start_fails_in_one_line_and_leaves_nothing(
    start: Start, name: str, mode: tuple[str, ...], reason: str, code: str
) -> None:
    environment = injected(start.folder / "fault.py", MEMFD_FAILS.format(name=name, code=code))

    ended = start(*mode, "unix:s?mode=0600", "--", *MINIMAL, environment=environment)

    assert ended.status == 111, ended
    [line] = ended.lines
    assert line.startswith(f"SocketProtector: {reason}: {os.strerror(getattr(errno, code))}")
    assert start.left() == []
    assert "Traceback" not in start.log


EXEC_FAILS = """
def execve(*_):
    raise MemoryError
if not resident():
    os.execve = execve
"""


@pytest.mark.parametrize("mode", [(), ("-f",), ("--guard",)], ids=["detached", "-f", "guarded"])
def test_without_memory_the_start_fails_in_one_line_and_leaves_nothing(
    start: Start, mode: tuple[str, ...]
) -> None:
    environment = injected(start.folder / "fault.py", EXEC_FAILS)

    ended = start(*mode, "unix:s?mode=0600", "--", *MINIMAL, environment=environment)

    assert ended.status == 111, ended
    [line] = ended.lines
    assert "out of memory: raise the limit (ulimit -v, LimitAS= of a unit)" in line
    assert start.left() == []


@pytest.mark.parametrize("mode", [(), ("-f",), ("--guard",)], ids=["detached", "-f", "guarded"])
@pytest.mark.parametrize("limit", ["-n 10", "-f 1", "-f 100"])
def test_with_too_low_a_limit_the_start_says_which_and_leaves_nothing(
    start: Start, limit: str, mode: tuple[str, ...]
) -> None:
    limited = ("/bin/sh", "-c", f'ulimit {limit} && exec "$@"', "sh")
    # Under a limit of file sizes Python would put half a file there.
    environment = {"PYTHONDONTWRITEBYTECODE": "1"}

    ended = start(
        *(*mode, "--log-file", "log", "unix:s?mode=0600", "--", *MINIMAL),
        before=limited,
        environment=environment,
    )

    assert ended.status == 111, ended
    *_, line = ended.lines
    if "n" in limit:
        assert line.startswith("SocketProtector: cannot pass descriptors to the resident process: ")
        assert "ulimit -Hn" in line
    else:
        assert "for files (ulimit -f, LimitFSIZE= of a unit) is too low for a start; allow" in line
    assert start.left() == []
    assert "Traceback" not in start.log


def test_with_the_lowest_limit_of_file_sizes_it_starts(start: Start) -> None:
    limited = ("/bin/sh", "-c", 'ulimit -f 2048 && exec "$@"', "sh")  # of 512 bytes each

    ended = start("unix:s?mode=0600", "--", *MINIMAL, before=limited)

    assert ended.status == 0, ended
    start.stop()


NO_DEV_NULL = """
real = os.open
def open(path, *more, **named):
    if path == os.devnull:
        raise FileNotFoundError(2, os.strerror(2), path)
    return real(path, *more, **named)
if not resident():
    os.open = open
"""


def test_without_dev_null_the_start_names_it_and_leaves_nothing(start: Start) -> None:
    environment = injected(start.folder / "fault.py", NO_DEV_NULL)

    ended = start("-f", "unix:s?mode=0600", "--", *MINIMAL, environment=environment)

    assert ended.status == 111, ended
    said = "SocketProtector: cannot start: /dev/null: No such file or directory"
    assert ended.lines[-1] == said
    assert start.left() == []


@pytest.mark.costly
def test_where_workers_accept_a_few_descriptors_too_few_are_one_line_each_time(
    start: Start,
) -> None:
    words = (*LISTENER, "--no-control", "--log-file", "log", "127.0.0.1:0", "--", *worker("many"))
    for most in range(14, 25, rounds(5, 1)):
        limited = ("/bin/sh", "-c", f'ulimit -n {most} && exec "$@"', "sh")

        ended = start("-f", *words, before=limited)

        assert ended.status in (3, 111), (most, ended)
        assert "Too many open files: raise the hard limit (ulimit -Hn" in ended.lines[-1], ended
        assert "Traceback" not in start.log
        assert start.left() == []


RELAY_FAILS = """
import os
real = os.posix_spawn
def posix_spawn(path, argv, *more, **named):
    if any(each.endswith("log_relay.py") for each in argv):
        raise fault("EAGAIN")
    return real(path, argv, *more, **named)
os.posix_spawn = posix_spawn
"""


@pytest.mark.parametrize(
    ("mode", "what"),
    [
        ((), "to syslog"),
        (("--log-prefix",), "to syslog for --log-prefix"),
        (("--log-prefix", "--log-file", "log"), "of workers' output for --log-prefix"),
    ],
    ids=["syslog", "prefix to syslog", "prefix"],
)
def test_without_a_process_for_the_relay_the_start_fails_in_one_line_and_leaves_nothing(
    start: Start, mode: tuple[str, ...], what: str
) -> None:
    environment = injected(start.folder / "fault.py", RELAY_FAILS)

    ended = start(*mode, "unix:s?mode=0600", "--", *MINIMAL, environment=environment)

    assert ended.status == 111, ended
    assert ended.lines[0].startswith(f"SocketProtector: cannot start the relay {what}: ")
    assert start.left() == []
    assert "Traceback" not in start.log


def test_without_a_process_for_a_relay_that_was_not_asked_for_it_starts_and_says_so(
    start: Start,
) -> None:
    environment = injected(start.folder / "fault.py", RELAY_FAILS)

    ended = start("--log-file", "log", "unix:s?mode=0600", "--", *MINIMAL, environment=environment)

    assert ended.status == 0, ended
    assert "event=notice text=\"cannot start the relay of workers' output" in start.log
    start.stop()
    assert start.left() == []


def test_without_a_process_for_a_relay_a_failed_start_blames_no_option(start: Start) -> None:
    environment = injected(start.folder / "fault.py", RELAY_FAILS)
    command = ("sh", "-c", "exit 1")

    ended = start("--log-file", "log", "unix:s", "--", *command, environment=environment)

    assert ended.status == 3, ended
    assert ended.lines[-1].endswith(f"; see {start.folder}/log")


@pytest.mark.parametrize(
    ("call", "code", "reason"),
    [
        ("socket.socketpair", "EMFILE", "cannot detach"),
        ("select.epoll", "EMFILE", "cannot start"),
    ],
)
def test_without_what_else_it_takes_the_start_fails_in_one_line_and_leaves_nothing(
    start: Start, call: str, code: str, reason: str
) -> None:
    fails = f"import select, socket\ndef fails(*_):\n    raise fault({code!r})\n{call} = fails\n"
    environment = injected(start.folder / "fault.py", fails)

    ended = start("--log-file", "log", "unix:s?mode=0600", "--", *MINIMAL, environment=environment)

    assert ended.status == 111, ended
    [line] = ended.lines
    assert line.startswith(f"SocketProtector: {reason}: {os.strerror(getattr(errno, code))}")
    assert start.left() == []
    assert "Traceback" not in start.log


FORK_FAILS = """
real, started = os.fork, []
def fork():
    started.append(1)
    if len(started) == {which}:
        raise fault("EAGAIN")
    return real()
os.fork = fork
"""


@pytest.mark.parametrize("which", [1, 2, 3])
def test_without_a_process_to_detach_into_the_start_says_what_to_raise(
    start: Start, which: int
) -> None:
    environment = injected(start.folder / "fault.py", FORK_FAILS.format(which=which))

    ended = start("--log-file", "log", "unix:s?mode=0600", "--", *MINIMAL, environment=environment)

    assert ended.status == 111, ended
    [line] = ended.lines
    assert line == f"SocketProtector: cannot detach: {NO_PROCESSES}"
    assert start.left() == []


# -- epoll_wait ----------------------------------------------------------------

EPOLL_WAIT_FAILS = """
import select
real = select.epoll
class Epoll:
    def __init__(self):
        self.real = real()
    def __getattr__(self, name):
        return getattr(self.real, name)
    def poll(self, timeout):
        if os.path.exists({flag!r}):
            os.unlink({flag!r})
            raise fault({code!r})
        return self.real.poll(timeout)
select.epoll = Epoll
"""


def refused(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == errno.ECONNREFUSED


def fail_once(daemon: Protector, flag: Path) -> int:
    """Let the next wait fail, and bring it about; return the log's length before it."""
    flag.touch()
    return daemon.signal(signal.SIGUSR1)


@pytest.mark.parametrize(
    ("code", "handoff"),
    [("EBADF", "connection"), ("ENOMEM", "connection"), ("EBADF", "listener")],
    indirect=["handoff"],
)
def test_a_wait_that_fails_ends_the_protector_and_its_workers_finish(
    protector: Starter, tmp_path: Path, code: str, handoff: str
) -> None:
    """Those that accept go on, with the port, until they are ended by hand."""
    flag, pid_file = tmp_path / "flag", tmp_path / "pid"
    fault = injected(tmp_path / "fault", EPOLL_WAIT_FAILS.format(flag=str(flag), code=code))
    words = ("--pid-file", pid_file, "127.0.0.1:0", "--", *worker("many"))
    daemon = protector(*words, **fault).ready()
    (pid,) = spawned(daemon)
    address = ("127.0.0.1", daemon.port)
    with Client(address) as held:
        assert pid_in(held.ask()) == pid

        fail_once(daemon, flag)

        assert daemon.process.wait(DEADLINE_S) == 111
        daemon.log.wait_for(f"^OSError: .*{os.strerror(getattr(errno, code))}")
        assert not pid_file.exists()
        assert pid_in(held.ask()) == pid
        if handoff == "listener":
            assert pid_in(ask(address)) == pid
            os.kill(pid, signal.SIGTERM)
            assert pid_in(held.ask()) == pid
        else:
            assert refused(address)
    assert wait_gone([pid]) == []
    assert refused(address)


@EITHER_HANDOFF
def test_a_wait_that_fails_under_a_guard_costs_no_connection(
    protector: Starter, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    fault = injected(tmp_path / "fault", EPOLL_WAIT_FAILS.format(flag=str(flag), code="EBADF"))
    daemon = protector("--guard", "127.0.0.1:0", "--", *worker("many"), **fault).ready()
    (pid,) = spawned(daemon)
    with Client(("127.0.0.1", daemon.port)) as held:
        assert pid_in(held.ask()) == pid

        mark = fail_once(daemon, flag)

        # What wakes it may be something else; then the signal meets one that exits, and kills it.
        daemon.log.wait_for("event=protector-died", after=mark)
        revived(daemon, mark)
        assert pid_in(held.ask()) == pid
        with Client(("127.0.0.1", daemon.port)) as new:
            assert pid_in(new.ask()) == pid
    daemon.stop()


NO_MEMORY = """
import select
def fails(module, name):
    real = getattr(module, name)
    def call(*given, **named):
        if os.path.exists({flag!r}):
            os.unlink({flag!r})
            raise MemoryError
        return real(*given, **named)
    setattr(module, name, call)
if resident():
    fails({module}, {name!r})
"""


@EITHER_HANDOFF
@pytest.mark.parametrize(("module", "name"), [("os", "waitid"), ("select", "poll")])
@pytest.mark.costly
def test_out_of_memory_under_a_guard_costs_no_connection(
    protector: Starter, tmp_path: Path, module: str, name: str
) -> None:
    """The state says where to go on: nothing that is half done stays so."""
    flag = tmp_path / "flag"
    text = NO_MEMORY.format(flag=str(flag), module=module, name=name)
    fault = injected(tmp_path / "fault", text)
    daemon = protector("--guard", "127.0.0.1:0", "--", *worker("many"), **fault).ready()
    load = Load(f"127.0.0.1:{daemon.port}", concurrency=2).start()
    load.wait_for(lambda now: now.connections > 10)
    with Client(("127.0.0.1", daemon.port)) as held:
        first = pid_in(held.ask())
        flag.touch()

        mark = len(daemon.log.seen)
        daemon.signal(signal.SIGHUP)
        daemon.log.wait_for("event=protector-died", after=mark)
        daemon.log.wait_for("event=resumed", after=mark)

        assert "out of memory: raise the limit" in daemon.log.text()
        assert pid_in(held.ask()) == first
    seen = load.stop()
    assert seen.failures == ()
    assert seen.connections == seen.begun
    at_rest(daemon)  # the killed reload fails first
    daemon.reload()
    daemon.stop()


def test_an_interrupted_wait_goes_on_with_its_timers(protector: Starter) -> None:
    """EINTR for real: a stop and SIGCONT interrupt epoll_wait without any handler (signal(7))."""
    limit = ("--drain-timeout", "0.5s")
    daemon = protector(*limit, "127.0.0.1:0", "--", *worker("many")).ready()
    with Client(("127.0.0.1", daemon.port)) as held:
        held.ask()
        daemon.reload()
        for _ in range(20):
            eventually(lambda: state_of(daemon.pid) == "S", "it waiting")
            hold(daemon.pid)
            os.kill(daemon.pid, signal.SIGCONT)
        daemon.log.wait_for("event=signalled .*signal=TERM")
        with Client(("127.0.0.1", daemon.port)) as new:
            assert new.ask().endswith("hello")
    daemon.log.wait_for("event=exited generation=1")
    daemon.stop()


# -- the wall clock --------------------------------------------------------------

CLOCK_JUMPS = """
import itertools, time
real, hours = time.time, itertools.cycle((0, 3, -30, 8760))
time.time = lambda: real() + 3600 * next(hours)
"""


@pytest.mark.costly
def test_a_wall_clock_that_jumps_moves_the_dates_in_the_log_and_nothing_else(
    protector: Starter, tmp_path: Path
) -> None:
    """Each look at it is hours or a year off; what was to take its time still takes it."""
    jumps = injected(tmp_path / "fault", CLOCK_JUMPS)
    limit = ("--drain-timeout", "0.5s")
    daemon = protector(*limit, "127.0.0.1:0", "--", *worker("many"), **jumps).ready()
    with Client(("127.0.0.1", daemon.port)) as held:
        held.ask()
        began = time.monotonic()
        daemon.reload()
        assert "event=resumed" in upgrade(daemon)
        daemon.log.wait_for("event=signalled .*signal=TERM")
        assert time.monotonic() - began >= 0.5
        held.ask()
    daemon.log.wait_for("event=exited generation=1")

    for deaths in range(1, 6):
        mark = len(daemon.log.seen)
        began = time.monotonic()
        os.kill(spawned(daemon)[-1], signal.SIGKILL)
        daemon.log.wait_for("event=worker-ready", after=mark)
        assert time.monotonic() - began >= backoff_s(deaths)
    with Client(("127.0.0.1", daemon.port)) as new:
        assert new.ask().endswith("hello")
    dates = {line[:4] for line in daemon.log.seen if " event=" in line}
    assert len(dates) > 1
    daemon.stop()
