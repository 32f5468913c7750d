"""The protector's side of the relay process: what it reads, what it has kept, another if it dies.

The protector keeps the read end of every pipe, too, so that the relay's death breaks nobody's
output; the next relay reads on.  A worker's pipe is kept until its last writer has gone, which
may be a process that the worker has left behind.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
import sys
import termios
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import door, relay
from .loop import Loop
from .process import Process, spawn
from .records import Program

_STDERR = 2
_TAIL_FD, _LINE_FD = 3, 4
_DESCRIPTOR = struct.Struct("i")
#: How long the last words of a worker may take through the relay: a moment, but longer
#: when it is just being started, and for ever when it has died.
_LOOK_MS = 5
_LOOKS = 200
#: Before another relay is started; longer each time in a row.
_RESTART_S = 1.0
_LONGEST_S = 10.0
#: One that has lived so long was no failure from the beginning.
_PROVEN_S = 60.0
#: How soon to tell it again what its line had no room for, and to look at a pipe that the last
#: writer has left and that is not read to its end.
_AGAIN_S = 0.1
#: How long the end waits for the relay, which ends at once unless somebody still writes.
_END_S = 3.0


@dataclass(frozen=True, slots=True)
class WorkerPipe:
    """Our copy of the read end of a worker's output."""

    read: int
    generation: int
    pid: int

    @property
    def prefix(self) -> bytes:
        return b"[%d %d] " % (self.generation, self.pid)


class Relaying:
    """One relay process, and all that it reads from."""

    def __init__(
        self, name: str, kind: str, loop: Loop, *, prefixed: bool, ended: Callable[[], None]
    ) -> None:
        """name: in syslog.  kind: where lines go (relay.py).  ended: called when it has died."""
        self._name = name
        self._kind = kind
        self._loop = loop
        self.prefixed = prefixed
        self._ended = ended
        #: Called when other descriptors are to be kept than before.
        self.changed: Callable[[], object] = lambda: None
        self._tail = -1
        self._shared = -1  # the read end of what has no prefix, on its way to syslog
        self._process: Process | None = None
        self._line: socket.socket | None = None
        self._workers: dict[int, WorkerPipe] = {}  # by the worker's number
        self._delay_s = _RESTART_S
        self._unsaid: deque[int | None] = deque()  # of which worker to tell; None: of the log

    # -- begin and go on -----------------------------------------------------

    def start(self, shared: int) -> None:
        """Start the relay.  shared: what it reads on stdin, or -1.  Raises OSError."""
        self._tail = os.memfd_create("sp.tail", os.MFD_CLOEXEC)
        self._shared = shared
        self._spawn()

    def adopt(self, descriptors: Mapping[str, int]) -> None:
        """Go on with the relay that an earlier program started; takes ownership.

        Raises KeyError when the memfd is missing.
        """
        mine = {name.removeprefix(door.RELAY): fd for name, fd in descriptors.items()}
        self._tail, self._shared = mine["tail"], mine.get("read", -1)
        lines = door.under(mine, "line.")
        for number, fds in door.under(descriptors, door.OUTPUT).items():
            for name, fd in fds.items():
                generation, _, pid = name.partition(".")
                self._keep(int(number), WorkerPipe(fd, int(generation), int(pid)))
        found = [
            (Process(int(pid), fds[""]), lines.pop(pid, {}).get("", -1))
            for pid, fds in door.under(mine, "process.").items()
        ]
        for fds in lines.values():
            os.close(fds[""])
        self._choose(found)

    def _choose(self, found: list[tuple[Process, int]]) -> None:
        """Go on with one of the relays.

        Two, if the program before was killed between giving one away and the other.
        """
        if not found:
            self._spawn()
            return
        # One that cannot be told of new workers is of no use where that has to be.
        usable = [
            (process, line)
            for process, line in found
            if not process.has_ended() and (line >= 0 or not self.prefixed)
        ]
        self._process, line = (usable or found)[-1]
        for process, other in found:
            if self.prefixed and (process is not self._process or not usable):
                process.signal(signal.SIGKILL)
            if process is not self._process:
                process.close()
                if other >= 0:
                    os.close(other)
        self._line = socket.socket(fileno=line) if line >= 0 else None
        self._attend(self._process)
        self._unsaid.extend(self._workers)  # it may not have been told of the last
        self._say()

    def descriptors(self) -> dict[str, int]:
        """Return what the next program needs to go on with it, by name."""
        found = {f"{door.RELAY}tail": self._tail}
        if self._shared >= 0:
            found[f"{door.RELAY}read"] = self._shared
        if self._process is not None:
            found[f"{door.RELAY}process.{self._process.pid}"] = self._process.pidfd
            if self._line is not None:
                found[f"{door.RELAY}line.{self._process.pid}"] = self._line.fileno()
        for number, pipe in self._workers.items():
            found[f"{door.OUTPUT}{number}.{pipe.generation}.{pipe.pid}"] = pipe.read
        return found

    def _spawn(self) -> None:
        theirs: socket.socket | None = None
        argv = [sys.executable, "-I", "-S", relay.__file__, self._name, str(_TAIL_FD)]
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        # It must not hold the write end, or it would never see its last writer go.
        out = null if self._kind == "syslog" else _STDERR
        shared = self._shared if self._shared >= 0 else null
        descriptors = {0: shared, 1: out, 2: null, _TAIL_FD: self._tail}
        try:
            if self.prefixed:
                self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                argv += [str(_LINE_FD), self._kind]
                descriptors[_LINE_FD] = theirs.fileno()
            program = Program(
                path=sys.executable,
                argv=tuple(argv),
                directory="/",
                environment=tuple(os.environ.items()),
                umask=0o077,
                limits=(),
                nice=0,
            )
            self._process = spawn(program, {}, descriptors)
        except BaseException:
            self._hang_up()
            raise
        finally:
            os.close(null)
            if theirs is not None:
                theirs.close()
        self._attend(self._process)
        self._unsaid.clear()
        self._unsaid.extend(self._workers)
        self._say()

    def _attend(self, process: Process) -> None:
        since = time.monotonic()

        def gone() -> None:
            try:
                if process.reap() is None:
                    return  # a wake-up for a number that was another's before
            except ChildProcessError:
                pass  # an earlier program's child: reaped by whoever adopted it
            self._loop.unwatch(process.pidfd)
            process.close()
            self._process = None
            self._hang_up()
            self._ended()
            self.changed()
            if time.monotonic() - since >= _PROVEN_S:
                self._delay_s = _RESTART_S
            later()

        def later() -> None:
            self._loop.call_after("relay", self._delay_s, again)
            self._delay_s = min(self._delay_s * 2, _LONGEST_S)

        def again() -> None:
            try:
                self._spawn()
            except OSError:  # out of descriptors: what is written waits in the pipes
                later()
            else:
                self.changed()  # else the next program starts another one, beside this one

        self._loop.watch(process.pidfd, gone)

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None

    # -- workers -------------------------------------------------------------

    def read_from(self, number: int, pipe: WorkerPipe) -> None:
        """Carry what a worker writes; takes ownership of the read end."""
        self._keep(number, pipe)
        self._unsaid.append(number)
        self._say()

    def _keep(self, number: int, pipe: WorkerPipe) -> None:
        self._workers[number] = pipe
        try:
            # For nothing but the end of the last writer, which is told of unasked.
            self._loop.watch(pipe.read, lambda: self._left(number), 0)
        except OSError:  # the system is short of something: then we look
            self._look_later(number)

    def _left(self, number: int) -> None:
        """Let go of a pipe that the last writer has left, once it is read to its end."""
        pipe = self._workers[number]
        self._loop.unwatch(pipe.read)
        if _waiting(pipe.read) or not _is_left(pipe.read):
            self._look_later(number)
            return
        del self._workers[number]
        os.close(pipe.read)
        self.changed()

    def _look_later(self, number: int) -> None:
        self._loop.call_after(("output", number), _AGAIN_S, lambda: self._left(number))

    def reopened(self) -> None:
        """Tell it that stderr leads elsewhere now, where lines go there."""
        if self.prefixed and self._kind != "syslog":
            self._unsaid.append(None)
            self._say()

    def _say(self) -> None:
        """Tell it what it has not been told yet, without ever waiting for it."""
        while self._unsaid and self._line is not None:
            number = self._unsaid[0]
            pipe = self._workers.get(number) if number is not None else None
            fd, text = _STDERR, b"="
            if pipe is not None:
                fd, text = pipe.read, b"+%d %d %d" % (number or 0, pipe.generation, pipe.pid)
            if pipe is not None or number is None:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(fd))]
                try:
                    self._line.sendmsg([text], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except (BrokenPipeError, ConnectionResetError):
                    return  # it has died: the next one is told of all
                except OSError:  # it is behind, as its own reader may be
                    self._loop.call_after("relay-line", _AGAIN_S, self._say)
                    return
            self._unsaid.popleft()

    # -- what it has kept ----------------------------------------------------

    def mark(self) -> int:
        """Return where the output stands now."""
        return relay.written(self._tail)

    def kept(self, mark: int, pid: int, *, wait: bool) -> bytes:
        """Return what was said since a mark; where lines have a prefix, by that worker only.

        wait: until it has all of it, which may take a second where it is busy.
        """
        pipe = next((each for each in self._workers.values() if each.pid == pid), None)
        if wait:
            self._wait(pipe)
        data = relay.kept(self._tail, mark)
        if not self.prefixed:
            return data
        lines = (line.partition(b"] ") for line in data.splitlines(keepends=True))
        mine = b" %d" % pid
        return b"".join(rest for head, _, rest in lines if head[:1] == b"[" and head.endswith(mine))

    def _wait(self, pipe: WorkerPipe | None) -> None:
        """Wait until the relay has read, and kept, all that is in the pipe."""
        read = pipe.read if pipe is not None else self._shared
        for _ in range(_LOOKS):
            if (read < 0 or not _waiting(read)) and relay.is_idle(self._tail):
                return
            select.poll().poll(_LOOK_MS)

    def finish(self) -> None:
        """Let it pass on the last; it stays if somebody still writes."""
        self._hang_up()
        if self._process is not None:
            poll = select.poll()
            poll.register(self._process.pidfd, select.POLLIN)
            poll.poll(_END_S * 1000)


def _waiting(fd: int) -> bool:
    """Whether there is something in a pipe."""
    waiting = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, waiting)
    return any(waiting)


def _is_left(fd: int) -> bool:
    """Whether nobody can write to a pipe any more."""
    poll = select.poll()
    poll.register(fd, 0)
    return bool(poll.poll(0))
