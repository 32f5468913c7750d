"""The relay as a process: what it passes on, what it remembers, and when it ends."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from socketprotector.daemon.relay_client import LogRelay, WorkerPipe
from socketprotector.daemon.runtime import Runtime
from socketprotector.programs import log_relay
from socketprotector.system import inherited
from socketprotector.system.log import Log
from socketprotector.system.loop import Loop
from tests.procfs import sleeps
from tests.running import DEADLINE_S, Lines, eventually


class RelayProcess:
    """A relay with our end of its line."""

    def __init__(self, process: subprocess.Popen[bytes], line: socket.socket) -> None:
        self.process = process
        self.line = line

    def pipe(self, number: int, generation: int, pid: int) -> int:
        """Give it a worker's pipe; return the end that the worker writes to."""
        receive, send = os.pipe()
        os.set_blocking(receive, False)
        self.say(b"+%d %d %d" % (number, generation, pid), receive)
        os.close(receive)
        return send

    def say(self, text: bytes, fd: int = -1) -> None:
        if fd >= 0:
            socket.send_fds(self.line, [text], [fd])
        else:
            self.line.send(text)

    def ask(self, number: int) -> bytes:
        """Return a worker's last words."""
        self.line.send(b"?%d" % number)
        asked, _, words = self.line.recv(65536).partition(b"\n")
        assert int(asked) == number
        return words

    def end(self) -> int:
        """Hang up, and wait for its end; return the exit status."""
        self.line.close()
        return self.process.wait(DEADLINE_S)


@contextmanager
def running(
    kind: str, *, prefixed: bool = False, stdin: int = subprocess.DEVNULL, out: int
) -> Iterator[RelayProcess]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(DEADLINE_S)
    words = ["test", kind, str(int(prefixed)), str(theirs.fileno())]
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(log_relay.__file__), *words],
        stdin=stdin,
        stdout=out,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    try:
        yield RelayProcess(process, ours)
    finally:
        ours.close()
        process.kill()
        process.wait()


Start = Callable[..., RelayProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a relay; `written` is what it has written once it has ended."""
    contexts = []

    def begin(kind: str, out: int, **more: object) -> RelayProcess:
        contexts.append(running(kind, out=out, **more))  # type: ignore[arg-type]
        return contexts[-1].__enter__()

    yield begin
    for each in contexts:
        each.__exit__(None, None, None)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    yield fd
    os.close(fd)


def written(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"a line\n",
        b"no end",
        b"\xff\xfe\0\n<3>an error\n<9>odd\n<\n<3\n",
        b"x" * 100_000,
        b"\n" * 1000,
    ],
    ids=["nothing", "a line", "no end", "odd bytes", "very long", "empty lines"],
)
def test_to_syslog_it_takes_whatever_comes_and_ends_with_its_last_writer(
    start: Start, data: bytes
) -> None:
    receive, send = os.pipe()
    relay = start("syslog", subprocess.DEVNULL, stdin=receive)
    os.close(receive)
    worker = relay.pipe(1, 1, 11)
    for fd in (send, worker):
        rest = data
        while rest:
            rest = rest[os.write(fd, rest) :]
    assert relay.ask(1) == data[-log_relay.TAIL_BYTES :]
    relay.line.close()
    os.close(send)
    assert relay.process.poll() is None  # another process may still write
    os.close(worker)

    assert relay.process.wait(DEADLINE_S) == 0


def test_each_of_several_pipes_has_its_prefix(start: Start, file: int) -> None:
    relay = start("lines", file, prefixed=True)
    for number, generation, pid, data in (
        (1, 1, 11, b"one\ntwo"),
        (2, 1, 22, b"<4>three\n\n"),
        (3, 2, 33, b""),
    ):
        pipe = relay.pipe(number, generation, pid)
        os.write(pipe, data)
        os.close(pipe)

    assert relay.end() == 0
    lines = written(file).splitlines()
    assert sorted(lines) == [b"[1 11] one", b"[1 11] two", b"[1 22] ", b"[1 22] <4>three"]


def test_without_prefixes_lines_are_as_they_were_and_none_is_torn_apart(
    start: Start, file: int
) -> None:
    relay = start("lines", file)
    one, other = relay.pipe(1, 1, 11), relay.pipe(2, 1, 22)
    long = b"{" + b"x" * 50_000 + b"}\n"
    os.write(one, b"be")
    assert relay.ask(1) == b"be"
    os.write(other, long + b"whole\nrest")
    assert relay.ask(2).endswith(b"whole\nrest")
    os.write(one, b"gun\n")
    for fd in (one, other):
        os.close(fd)

    assert relay.end() == 0
    assert written(file) in (long + b"whole\nbegun\nrest\n", long + b"whole\nrest\nbegun\n")


def test_a_line_that_has_no_end_is_not_held_for_ever(start: Start, file: int) -> None:
    relay = start("lines", file)
    pipe = relay.pipe(1, 1, 11)
    data = b"x" * (log_relay.HELD_BYTES + 65536)
    rest = data
    while rest:
        rest = rest[os.write(pipe, rest) :]
    relay.ask(1)
    assert len(written(file)) >= log_relay.HELD_BYTES
    os.close(pipe)

    assert relay.end() == 0
    assert written(file).rstrip(b"\n") == data


def test_for_the_journal_the_priority_stays_in_front(start: Start, file: int) -> None:
    relay = start("journal", file, prefixed=True)
    pipe = relay.pipe(1, 1, 11)
    os.write(pipe, b"<4>three\nfour\n")
    os.close(pipe)

    assert relay.end() == 0
    assert written(file) == b"<4>[1 11] three\n[1 11] four\n"


def test_a_pipe_that_is_announced_again_is_the_same(start: Start, file: int) -> None:
    relay = start("lines", file)
    pipe, again = relay.pipe(1, 1, 11), relay.pipe(1, 1, 11)
    os.write(pipe, b"one\n")
    assert relay.ask(1) == b"one\n"
    with pytest.raises(BrokenPipeError):
        os.write(again, b"never read\n")
    for fd in (pipe, again):
        os.close(fd)

    assert relay.end() == 0
    assert written(file) == b"one\n"


@pytest.mark.parametrize("what", [b"+1 1 11", b"="])
def test_what_it_has_no_descriptor_for_it_says_again(
    start: Start, file: int, tmp_path: Path, what: bytes
) -> None:
    """And reads all of it, or writes there, as soon as it is asked again and has room."""
    relay = start("lines", file)
    assert relay.ask(0) == b""  # so it runs
    pid = relay.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    opened = {int(each) for each in os.listdir(f"/proc/{pid}/fd")}
    full = next(each for each in range(len(opened) + 1) if each not in opened)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (full, limits[1]))
    receive, send = os.pipe()
    os.set_blocking(receive, False)
    os.write(send, b"early\n")
    relay.say(what, receive if what[:1] == b"+" else file)
    assert relay.line.recv(100) == what.partition(b" ")[0]

    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    relay.say(what, receive if what[:1] == b"+" else file)
    if what == b"=":
        relay.say(b"+1 1 11", receive)
    assert relay.ask(1) == b"early\n"
    os.close(send)
    os.close(receive)
    assert relay.end() == 0
    assert written(file) == b"early\n"


def test_a_pipe_that_is_to_be_closed_is_read_to_where_it_is(start: Start, file: int) -> None:
    """Though a process that the worker left could still write; the others are read on."""
    relay = start("lines", file, prefixed=True)
    closed, other = relay.pipe(1, 1, 11), relay.pipe(2, 1, 22)
    os.write(closed, b"one\nno end")
    relay.say(b"-1")
    relay.say(b"-99")
    assert relay.ask(1) == b"one\nno end"
    with pytest.raises(BrokenPipeError):
        os.write(closed, b"never read\n")
    os.write(other, b"read on\n")
    for fd in (closed, other):
        os.close(fd)

    assert relay.end() == 0
    assert written(file) == b"[1 11] one\n[1 11] no end\n[1 22] read on\n"


def test_last_words_are_one_s_own_and_known_after_its_end(start: Start, file: int) -> None:
    relay = start("lines", file)
    pipes = {number: relay.pipe(number, 1, number) for number in range(8)}
    for number, fd in pipes.items():
        for turn in range(1000):
            os.write(fd, b"worker %d, line %d\n" % (number, turn))
            if turn % 100 == 0:
                relay.ask(number)  # else the pipe would be full
    for number, fd in pipes.items():
        os.close(fd)
        words = relay.ask(number)
        assert len(words) == log_relay.TAIL_BYTES
        assert words.endswith(b"worker %d, line 999\n" % number)
        assert b"worker %d" % (number + 1) not in words
    assert relay.ask(99) == b""
    assert relay.ask(3) == relay.ask(3)  # a second question gets the same answer

    assert relay.end() == 0
    assert written(file).count(b"\n") == 8000


def test_a_pipe_that_is_announced_again_after_its_end_keeps_the_last_words(
    start: Start, file: int
) -> None:
    """As by a new protector, if a worker has failed while no protector was running."""
    relay = start("lines", file)
    receive, send = os.pipe()
    os.set_blocking(receive, False)
    relay.say(b"+1 2 11", receive)
    os.write(send, b"why\n")
    os.close(send)
    assert relay.ask(1) == b"why\n"
    relay.say(b"+1 2 11", receive)
    assert relay.ask(1) == b"why\n"
    assert relay.ask(1) == b"why\n"  # its end of file has been read again
    os.close(receive)
    os.close(relay.pipe(1, 2, 22))  # another worker: an unwritten state has given the number twice
    assert relay.ask(1) == b""

    assert relay.end() == 0
    assert written(file) == b"why\n"


def test_lines_go_to_the_new_file_from_then_on(start: Start, file: int, tmp_path: Path) -> None:
    relay = start("lines", file)
    pipe = relay.pipe(1, 1, 11)
    os.write(pipe, b"before\n")
    relay.ask(1)
    new = os.open(tmp_path / "new", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    relay.say(b"=0", new)
    os.write(pipe, b"after\n")
    os.close(pipe)

    assert relay.end() == 0
    assert (written(file), written(new)) == (b"before\n", b"after\n")
    os.close(new)


def test_a_place_that_takes_nothing_does_not_end_it(start: Start) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    relay = start("lines", full, prefixed=True)
    os.close(full)
    pipe = relay.pipe(1, 1, 11)
    os.write(pipe, b"one\n")
    assert relay.ask(1) == b"one\n"
    os.close(pipe)

    assert relay.end() == 0


def test_a_full_pipe_is_waited_for_though_it_is_non_blocking(start: Start) -> None:
    """As below a parent such as Node, which sets O_NONBLOCK on the pipe of its own stderr."""
    receive, send = os.pipe()
    fcntl.fcntl(send, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(send, False)
    relay = start("lines", send)
    os.close(send)
    pipe = relay.pipe(1, 1, 11)
    data = b"a line\n" * 8000
    os.write(pipe, data)
    os.close(pipe)
    relay.line.close()
    full = (4096).to_bytes(4, sys.byteorder)
    eventually(lambda: fcntl.ioctl(receive, termios.FIONREAD, bytes(4)) == full, "a full pipe")
    eventually(lambda: relay.process.poll() is not None or sleeps(relay.process.pid), "a wait")

    with open(receive, "rb") as reader:
        assert reader.read() == data


def test_after_a_line_that_was_cut_the_next_one_begins_a_new_line(start: Start, file: int) -> None:
    """As on a full disk that has room again later."""
    relay = start("lines", file)
    assert relay.ask(0) == b""  # so it runs
    limits = resource.prlimit(relay.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(relay.process.pid, resource.RLIMIT_FSIZE, (4, limits[1]))
    pipe = relay.pipe(1, 1, 11)
    os.write(pipe, b"one line\n")
    assert relay.ask(1) == b"one line\n"
    resource.prlimit(relay.process.pid, resource.RLIMIT_FSIZE, limits)
    os.write(pipe, b"two\nthree\n")
    os.close(pipe)

    assert relay.end() == 0
    assert written(file) == b"one \ntwo\nthree\n"


def test_a_client_that_asks_and_does_not_read_does_not_hold_it_up(start: Start) -> None:
    receive, send = os.pipe()
    out = Lines(receive)
    relay = start("lines", send)
    os.close(send)
    pipe = relay.pipe(1, 1, 11)
    os.write(pipe, b"x" * log_relay.TAIL_BYTES + b"\n")
    poll = select.poll()
    poll.register(relay.line, select.POLLOUT)
    for _ in range(500):  # more than there is room for answers
        assert poll.poll(DEADLINE_S * 1000)
        relay.line.send(b"?1")
    os.write(pipe, b"it goes on\n")
    out.wait_for("^it goes on$")
    os.close(pipe)

    assert relay.end() == 0
    out.join()


class Meanwhile:
    """Stands in for the time in which lines are gathered: does something instead."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def poll(self, _: int) -> None:
        self.act()

    def unregister(self, _: int) -> None:
        pass


class Noted(log_relay.Relay):
    """One in this process, that notes what it would write."""

    noted: list[bytes]

    def write(self, data: bytes) -> None:
        self.noted.append(data)


def test_lines_that_follow_one_another_are_passed_on_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each would wake the relay, and on a busy machine the worker would wait for it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    receive, send = os.pipe()
    noted = Noted(theirs.detach(), "lines", prefixed=False)
    noted.noted = []
    noted.add(log_relay.Stream(receive, 1, b""))

    def act() -> None:
        if ours.fileno() >= 0:
            for number in range(10):
                os.write(send, b"%d\n" % number)
            os.close(send)
            ours.close()

    monkeypatch.setattr(noted, "gathering", Meanwhile(act))
    os.write(send, b"the first one at once\n")
    noted.run()
    noted.epoll.close()

    assert list(filter(None, noted.noted)) == [
        b"the first one at once\n",
        b"".join(b"%d\n" % number for number in range(10)),
    ]


def test_a_writer_of_very_much_does_not_wait_for_the_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    here = log_relay.Relay(theirs.detach(), "lines", prefixed=False)
    gathered: list[float] = []
    monkeypatch.setattr(here, "gathering", Meanwhile(lambda: gathered.append(time.monotonic())))
    for now, most in ((100.0, 200), (101.0, 65536), (101.05, 200), (102.0, 200)):
        with monkeypatch.context() as patched:
            patched.setattr(time, "monotonic", lambda now=now: now)
            here.gather(most)
    ours.close()
    here.run()
    here.epoll.close()

    assert gathered == [100.0, 102.0]


@pytest.mark.usefixtures("in_root_directory")
def test_a_number_that_an_unwritten_state_has_given_twice_ends_no_protector() -> None:
    """The next program finds the pipe of worker 2, knows of no such worker, and starts one."""
    loop, log, named = Loop(), Log("error"), inherited.Named()
    runtime = Runtime(loop, log, lambda _: None, lambda: True)
    relay = LogRelay("test", "lines", runtime, named, prefixed=False)
    receive, send = os.pipe2(os.O_CLOEXEC)
    again, send_again = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(again, False)
    relay.adopt({}, {"2": {"1.100": receive}})
    relay.read_from(2, WorkerPipe(again, 1, 101))
    assert [*named.values()] == [again]

    os.close(send)
    os.close(send_again)
    until = time.monotonic() + DEADLINE_S

    def look() -> None:
        loop.running = bool(named) and time.monotonic() < until
        loop.call_after("look", 0.01, look)

    look()
    loop.run()

    assert named == {}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(receive)
    relay.finish()
    assert relay._helper is not None
    assert relay._helper.process.reap()
    relay._helper.close()
    relay._output_ready.close()
    log.close()
    loop.close()
