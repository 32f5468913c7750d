"""The waiting process, in every order of what it hears and what befalls it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from socketprotector.launch.await_verdict import file_identity

CALLS_OFF = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)

WAITS = """
import socket, sys
from socketprotector.launch.await_verdict import wait
sys.exit(wait(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])))
"""


class Waiting:
    """A process that waits, the resident process's end of its line, and the pipe before that."""

    def __init__(self, process: subprocess.Popen[str], line: socket.socket, pipe: int) -> None:
        self.process = process
        self.line = line
        self.pipe = pipe

    def say(self, **words: object) -> None:
        os.write(self.pipe, json.dumps(words).encode() + b"\n")

    def is_told(self, **words: object) -> None:
        """What it is told before the exec, which closes the pipe."""
        self.say(**words)
        self.executes()

    def executes(self) -> None:
        os.close(self.pipe)
        self.pipe = -1

    def hears(self, **words: object) -> None:
        self.line.send(json.dumps(words).encode() + b"\n")

    def ends(self) -> tuple[int, str]:
        """Wait for its end; return its exit status and what it said."""
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said

    def is_called_off(self) -> None:
        """Interrupt it, and wait until it has hung up."""
        self.process.send_signal(signal.SIGINT)
        while (heard := self.line.recv(1)) == b"?":
            pass
        assert heard == b""


@contextmanager
def signals_blocked() -> Iterator[None]:
    """As they are when it begins to wait; inherited, so that none comes too early for it."""
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told, telling = os.pipe()
    with signals_blocked():
        process = subprocess.Popen(
            [sys.executable, "-c", WAITS, str(theirs.fileno()), str(told)],
            pass_fds=[theirs.fileno(), told],
            stderr=subprocess.PIPE,
            text=True,
        )
    theirs.close()
    os.close(told)
    ours.settimeout(30)
    with ours, process:
        yield (made := Waiting(process, ours, telling))
        if made.pipe >= 0:
            made.executes()
        process.kill()


@contextmanager
def resident() -> Iterator[subprocess.Popen[bytes]]:
    """Stands for the resident process: lives until it gets a signal."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_ready_is_success(waiting: Waiting) -> None:
    with resident() as protector:
        waiting.is_told(pid=protector.pid)
        waiting.hears(ready=True)

        assert waiting.ends() == (0, "")
        assert protector.poll() is None


def test_a_failure_is_reported_once_the_process_has_ended(waiting: Waiting) -> None:
    with resident() as protector:
        waiting.is_told(pid=protector.pid)
        waiting.hears(failed="two\nlines", status=3)
        waiting.line.close()
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.process.wait(0.1)  # right it never does, however slow the machine is
        protector.kill()

        assert waiting.ends() == (3, "SocketProtector: two\nlines\n")


def test_a_failure_before_the_exec_is_reported(waiting: Waiting, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.touch()
    with resident() as protector:
        waiting.say(
            pid=protector.pid, made={str(made): file_identity(made.lstat())}, notices=["note"]
        )
        protector.kill()
    waiting.is_told(failed="why", status=3)
    waiting.line.close()

    assert waiting.ends() == (3, "SocketProtector: note\nSocketProtector: why\n")
    assert not made.exists()


def test_only_what_comes_before_the_exec_names_process_and_files(
    waiting: Waiting, tmp_path: Path
) -> None:
    """A worker of the service's user can send later messages."""
    made, victim = tmp_path / "made", tmp_path / "victim"
    for each in (made, victim):
        each.touch()
    with resident() as protector:
        waiting.is_told(
            pid=protector.pid, made={str(made): file_identity(made.lstat())}, notices=[]
        )
        waiting.hears(pid=1, made={str(victim): file_identity(victim.lstat())}, notices=["no"])
        protector.kill()

        status, said = waiting.ends()
    assert status == 111
    assert "was killed before" in said
    assert (made.exists(), victim.exists()) == (False, True)


@pytest.mark.parametrize(
    "packet",
    [
        b"\n",
        b"{",
        b"\xff",
        b"3",
        b"[" * 100_000,
        b'{"failed": "' + b"x" * 100_000 + b'"}',
        b'{"waits_for": 3}',
        b'{"waits_for": [3, {"kind": [], "generation": "x", "reason": 1, "left_s": {}}]}',
        b'{"waits_for": [{"kind": "k", "generation": 1e999, "reason": "r", "left_s": 1e999}]}',
        b'{"waits_for": [{"kind": "k", "generation": null, "reason": "r", "left_s": NaN}]}',
        b'{"failed": {"\\u001b": 1}, "status": -1}',
        b'{"status": "x", "made": 1, "pid": {}, "notices": 1, "ready": 1}',
    ],
    ids=range(12),
)
def test_a_packet_that_is_no_message_neither_ends_nor_delays_the_wait(
    waiting: Waiting, packet: bytes
) -> None:
    with resident() as protector:
        waiting.is_told(pid=protector.pid, made={}, notices=[])
        for _ in range(2):
            waiting.line.send(packet)
        waiting.hears(failed="\x1b[2J", status=1000)
        protector.kill()

        assert waiting.ends() == (111, "SocketProtector: \\x1b[2J\n")


def test_a_flood_of_messages_does_not_outlive_the_resident_process(waiting: Waiting) -> None:
    """Any process of its user can send them."""
    flood = f"""
import socket
line, first = socket.socket(fileno={waiting.line.fileno()}), True
try:
    while True:
        line.send(b'{{"waits_for": [' + b"3," * 20_000 + b"3]}}")
        if first:
            print(flush=True)
        first = False
except OSError:
    pass
"""
    with resident() as protector, ExitStack() as stack:
        waiting.is_told(pid=protector.pid, made={}, notices=[])
        waiting.line.settimeout(None)  # the flag is shared with the processes below
        floods = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-S", "-c", flood],
                    pass_fds=[waiting.line.fileno()],
                    stdout=subprocess.PIPE,
                )
            )
            for _ in range(4)
        ]
        for each in floods:
            stack.callback(each.kill)
            assert each.stdout is not None
            assert each.stdout.readline() == b"\n"
        protector.kill()
        status, said = waiting.ends()
    assert status == 111
    assert "was killed before" in said


def test_an_end_of_the_connection_is_passed_on_to_the_resident_process(waiting: Waiting) -> None:
    """Another process of its user has ended it; the resident process then stops."""
    with resident() as protector:
        waiting.is_told(pid=protector.pid)
        waiting.line.shutdown(socket.SHUT_WR)
        assert waiting.line.recv(1) == b""
        protector.kill()

        assert waiting.ends()[0] == 111


def test_an_end_without_a_word_is_reported(waiting: Waiting) -> None:
    waiting.executes()
    waiting.line.close()

    status, said = waiting.ends()
    assert status == 111
    assert "was killed before a generation was serving" in said


def test_a_pid_that_is_gone_is_no_trouble(waiting: Waiting) -> None:
    with resident() as protector:
        protector.kill()
        protector.wait()
    waiting.is_told(pid=protector.pid)
    waiting.hears(failed="why", status=3)
    waiting.line.close()

    assert waiting.ends() == (3, "SocketProtector: why\n")


@pytest.mark.parametrize("number", CALLS_OFF)
def test_a_start_that_is_called_off_has_ended_before_it_says_so(
    waiting: Waiting, number: signal.Signals
) -> None:
    with resident() as protector:
        waiting.is_told(pid=protector.pid)
        waiting.process.send_signal(number)
        assert waiting.line.recv(1) == b""
        waiting.process.send_signal(number)  # once more changes nothing
        waiting.hears(failed="stopped before a generation was serving", status=100)
        waiting.line.close()
        protector.kill()

        assert waiting.ends() == (
            130,
            "SocketProtector: interrupted; nothing was started\n",
        )


def test_what_was_ready_when_it_was_called_off_is_stopped(waiting: Waiting) -> None:
    with resident() as protector:
        waiting.is_told(pid=protector.pid)
        waiting.is_called_off()
        waiting.hears(ready=True)

        assert waiting.ends()[0] == 130
        assert protector.wait(30) == -signal.SIGINT


def test_a_long_start_is_said_to_wait_for_what_the_resident_process_answers(
    waiting: Waiting,
) -> None:
    waiting.executes()
    start = {"kind": "start", "reason": "generation 1 starts", "generation": 1, "left_s": 49.5}
    for _ in range(2):
        assert waiting.line.recv(1) == b"?"
        waiting.hears(waits_for=[start])
    waiting.hears(failed="not ready", status=3)
    waiting.line.shutdown(socket.SHUT_WR)

    assert waiting.ends() == (
        3,
        "SocketProtector: waiting: generation 1 starts, 50 s left\nSocketProtector: not ready\n",
    )
