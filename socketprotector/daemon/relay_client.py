"""Starts the relay (programs/log_relay.py), which carries the workers' output to the log.

A worker's last words are its last output: we request them from the relay when the worker fails.
Our socket to the relay is called the line.

The protector keeps a copy of the read end of every pipe.  So if the relay dies, workers can still
write, and the next relay continues reading.  We keep a pipe until its last writer has exited.
Exception: of the pipes whose writers have all left the worker's process group, we keep only the
newest, about LEFT_BEHIND (model/fd_budget.py).

If the relay is suspended (SIGSTOP), each worker blocks once its pipe is full.  The relay's pidfd
does not report the suspension, and we must not poll while idle.  So we start a timer when a worker
writes.  If a pipe is not empty when the timer fires, we check the relay's state.

Source: proc(5) for a process's state, pipe(7), epoll(7) for an epoll set in another set.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from functools import partial

from ..model.fd_budget import LEFT_BEHIND
from ..model.lazy_dataclass import frozen
from ..system import inherited
from ..system.cleanup import on_error
from ..system.helper import BackOff, HelperProcess
from ..system.polling import events_of, read_now
from ..system.process import Process
from .runtime import Runtime

_STDERR = 2
_NOFILE = resource.RLIMIT_NOFILE
_LINE_FD = 3
_DESCRIPTOR = struct.Struct("i")
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
#: The longest answer: last words (TAIL_BYTES of programs/log_relay.py) and a number.
_ANSWER_BYTES = 4096 + 64
#: How long we wait for last words: long enough for a new relay if the old relay has just died.
_WORDS_S = 2.0
#: The most unanswered requests for a worker's last words.  Without this limit, a worker could cause
#: any number of requests.
_MOST_REQUESTS = 256
#: How long the relay may take to read output before we check its state.
_READS_S = 0.5
#: The first and the longest wait before another relay is started.  A relay that ignores _END is
#: killed after _LONGEST_S.
_RESTART_S = 0.1
_LONGEST_S = 10.0
#: The pause before we try again to send a message to a full line, or to close a pipe.
_AGAIN_S = 0.1
#: The pause before we repeat a message for which the relay had no free descriptor.
_ROOM_S = 1.0
#: How long our exit waits for the relay.  The relay exits when no process can write to its pipes.
_END_S = 3.0
#: Our messages: read this pipe, close the pipe, send last words, write to this stderr, exit.
_PIPE, _CLOSE, _WORDS, _NEW_STDERR, _END = "+", "-", "?", "=", "!"
_LACKS_HINT = "the relay's nofile limit fell; SocketProtector raises it, or restarts the relay"
_CLOSED_HINT = (
    "a process that writes to the pipe gets SIGPIPE; find the process: "
    "ls -l /proc/*/fd/* | grep pipe:.{pipe}"
)


@frozen
class WorkerPipe:
    """Our copy of the read end of a worker's output pipe."""

    read: int
    generation: int
    pid: int

    def name(self, number: int) -> str:
        """Return the name by which the next program (after an upgrade or kill) finds this pipe."""
        return f"{inherited.OUTPUT}{number}.{self.generation}.{self.pid}"


class LogRelay:
    """The relay process, and the pipes that it reads."""

    def __init__(
        self, name: str, kind: str, runtime: Runtime, named: inherited.Named, *, prefixed: bool
    ) -> None:
        """name: the name of the output in syslog.  kind: "syslog", "journal" or "lines".

        named: gets the workers' pipes by WorkerPipe.name().  prefixed: whether --log-prefix is set.
        """
        self._named = named
        self._name = name
        self._kind = kind
        self._loop, self._log, self._persist = runtime.loop, runtime.log, runtime.persist
        self._prefixed = prefixed
        self._shared = -1  # under syslog: the read end of the pipe that is our stderr; -1: none
        self._helper: HelperProcess | None = None
        self._line: socket.socket | None = None
        self._pipes: dict[int, WorkerPipe] = {}  # by the worker's number
        self._back_off = BackOff(_RESTART_S, _LONGEST_S)
        self._unsent: deque[tuple[str, int]] = deque()  # kind and the worker's number
        #: Callbacks that wait for last words, by the worker's number, in the order of the requests.
        self._word_requests: dict[int, list[Callable[[bytes], None]]] = {}
        #: Readable as soon as any pipe has output.
        self._output_ready = select.epoll()
        self._was_stopped = False  # the relay was suspended at our last check
        self._lacks_descriptor = False  # the relay had no free descriptor for a message
        self._must_end = False  # the relay must exit: its descriptor limit cannot be raised

    # -- the process -----------------------------------------------------------

    def start(self, shared: int) -> None:
        """Start the relay.  shared: the relay's stdin (see _shared); -1: none.  Raises OSError."""
        self._shared = shared
        self._begin_to_watch()
        self._spawn()

    def adopt(
        self, relay: Mapping[str, dict[str, int]], outputs: Mapping[str, Mapping[str, int]]
    ) -> None:
        """Adopt an earlier program's relay; takes ownership of the descriptors.

        relay, outputs: the inherited descriptors whose names begin with RELAY and OUTPUT.
        """
        self._shared = relay.get("read", {}).get("", -1)
        lines = relay.get("line", {})
        for number, fds in outputs.items():
            for name, fd in fds.items():
                generation, _, pid = name.partition(".")
                self._add_pipe(int(number), WorkerPipe(fd, int(generation), int(pid)))
        found = [
            (Process(int(pid), fd), lines.pop(pid, -1))
            for pid, fd in relay.get("process", {}).items()
        ]
        for fd in lines.values():
            os.close(fd)
        self._begin_to_watch()
        self._adopt_one(found)

    def _adopt_one(self, found: list[tuple[Process, int]]) -> None:
        """Adopt one of the relays, and end the others; start a relay if none is left.

        There are two relays if the protector was killed while it replaced a relay.
        """
        if not found:
            self._spawn()
            return
        # Without a line a relay cannot learn of new workers.
        usable = [each for each in found if not each[0].has_ended() and each[1] >= 0]
        chosen, line = (usable or found)[-1]
        for process, relay_line in found:
            # If no relay is usable, kill the chosen one, too: _ended() then starts a new relay.
            if process is not chosen or not usable:
                process.signal(signal.SIGKILL)
            if process is not chosen:
                process.close()
                if relay_line >= 0:
                    os.close(relay_line)
        if line >= 0:
            self._watch_line(socket.socket(fileno=line))
        self._helper = HelperProcess(chosen, self._loop, self._ended)
        self._send_all()

    def descriptors(self) -> dict[str, int]:
        """Return the descriptors that the next program needs, except the workers' pipes."""
        found = {f"{inherited.RELAY}read": self._shared} if self._shared >= 0 else {}
        if self._helper is not None:
            process = self._helper.process
            found[f"{inherited.RELAY}process.{process.pid}"] = process.pidfd
            if self._line is not None:
                found[f"{inherited.RELAY}line.{process.pid}"] = self._line.fileno()
        return found

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        given = (self._name, self._kind, str(int(self._prefixed)), str(_LINE_FD))
        with on_error(ours.close), theirs, open(os.devnull, "r+b", buffering=0) as file:
            null = file.fileno()
            # Under syslog our stderr is the write end of the shared pipe.  If the relay inherited
            # our stderr, the relay would never see end of file on that pipe.
            out = null if self._kind == "syslog" else _STDERR
            shared = self._shared if self._shared >= 0 else null
            descriptors = {0: shared, 1: out, 2: null, _LINE_FD: theirs.fileno()}
            # SCHED_BATCH: the relay should wake up once for many lines.
            self._helper = HelperProcess.start_own(
                "log_relay.py", given, descriptors, self._loop, self._ended, batch=True
            )
        self._watch_line(ours)
        self._send_all()

    def _ended(self, how: str) -> None:
        assert self._helper is not None
        if not self._must_end:
            self._log.write("error", "relay-ended", pid=self._helper.process.pid)
        self._loop.cancel("relay-end")
        if self._helper.proven:
            self._back_off.reset()
        self._helper = None
        self._was_stopped = self._lacks_descriptor = self._must_end = False
        self._close_line()
        self._persist()
        self._restart_later()

    def _restart_later(self) -> None:
        def again() -> None:
            try:
                self._spawn()
            except OSError:  # out of descriptors: meanwhile the pipes hold the output
                self._restart_later()
            else:
                self._persist()  # otherwise the next program would start a second relay

        self._loop.call_after("relay", self._back_off.wait_s(), again)

    def _watch_line(self, line: socket.socket) -> None:
        self._line = line
        with suppress(OSError):  # out of memory: we get no last words, but the log gets all output
            self._loop.watch(line.fileno(), self._receive)

    def _close_line(self) -> None:
        if self._line is not None:
            self._loop.unwatch(self._line.fileno())
            self._line.close()
            self._line = None

    # -- whether the relay reads --------------------------------------------------

    def _begin_to_watch(self) -> None:
        if self._shared >= 0:
            self._output_ready.register(self._shared, select.EPOLLIN)
        self._wait_for_output()

    def _wait_for_output(self) -> None:
        """Check the relay _READS_S after the next output of a worker."""
        try:
            self._loop.watch(self._output_ready.fileno(), self._on_output)
        except OSError:  # out of memory: check by a timer
            self._loop.call_after("relay-reads", _READS_S, self._check_relay)

    def _on_output(self) -> None:
        self._loop.unwatch(self._output_ready.fileno())
        self._loop.call_after("relay-reads", _READS_S, self._check_relay)

    def _check_relay(self) -> None:
        """Send CONT to a suspended relay if output is unread; send KILL if it stays suspended."""
        if not self._output_ready.poll(0, 1):
            self._was_stopped = False
            self._wait_for_output()
            return
        self._loop.call_after("relay-reads", _READS_S, self._check_relay)
        if self._helper is None:
            return
        process = self._helper.process
        stopped = process.is_stopped()
        if stopped and not self._was_stopped:
            self._log.write("warning", "relay-stopped", pid=process.pid)
        # CONT comes first, because a kill loses the output that the relay has read and not written.
        # Without /proc the relay's state is unknown: send CONT, which a running relay ignores.
        if stopped is not False:
            process.signal(signal.SIGKILL if stopped and self._was_stopped else signal.SIGCONT)
        self._was_stopped = bool(stopped)

    # -- workers -------------------------------------------------------------

    def read_from(self, number: int, pipe: WorkerPipe) -> None:
        """Let the relay read a worker's output from now on.  Takes ownership of the read end."""
        self._add_pipe(number, pipe)
        self._unsent.append((_PIPE, number))
        self._send_unsent()

    def _add_pipe(self, number: int, pipe: WorkerPipe) -> None:
        # If the protector was killed before it saved the state, an older pipe may have this number.
        if number in self._pipes:
            self._close_pipe(number)
        self._pipes[number] = pipe
        self._named[pipe.name(number)] = pipe.read
        try:
            # With events 0, epoll still reports that the last writer has closed the pipe.
            self._loop.watch(pipe.read, lambda: self._close_if_done(number), 0)
            self._output_ready.register(pipe.read, select.EPOLLIN)
        except OSError:  # out of descriptors or memory: check by a timer
            self._check_later(number)

    def _close_if_done(self, number: int) -> None:
        """Close a pipe that has no writer and no unread output."""
        pipe = self._pipes[number]
        has_hung_up = events_of(pipe.read, 0)
        # If the pipe stays open, a timer repeats this check.  With a descriptor limit of 0,
        # events_of() returns 0; if we kept the watch, the loop would then call us without a pause.
        self._loop.unwatch(pipe.read)
        # Check for hang-up first, then for output: a single call might miss the last output.
        if not has_hung_up or events_of(pipe.read, select.POLLIN) & select.POLLIN:
            self._check_later(number)
            return
        self._close_pipe(number)
        self._persist()

    def _close_pipe(self, number: int) -> None:
        """Close our copy of a worker's pipe; the relay keeps its own copy."""
        pipe = self._pipes.pop(number)
        del self._named[pipe.name(number)]
        self._loop.cancel(("output", number))
        self._loop.unwatch(pipe.read)
        with suppress(FileNotFoundError):  # _add_pipe() could not register it
            self._output_ready.unregister(pipe.read)
        os.close(pipe.read)

    def close_oldest(self, living: int, numbers: Callable[[], Set[int]]) -> None:
        """Close the oldest pipes of workers whose process group has ended; keep about LEFT_BEHIND.

        living, numbers: see Output.close_oldest().
        """
        excess = len(self._pipes) - living - LEFT_BEHIND
        if excess <= 0:
            return
        for number in sorted(self._pipes.keys() - numbers())[:excess]:
            pipe = self._pipes[number]
            if not events_of(pipe.read, 0):  # a writer is left, so the relay sees no end of file
                self._log.write(
                    "warning",
                    "output-closed",
                    generation=pipe.generation,
                    worker=number,
                    pid=pipe.pid,
                    hint=_CLOSED_HINT.format(pipe=os.fstat(pipe.read).st_ino),
                )
                self._unsent.append((_CLOSE, number))
            self._close_pipe(number)
        self._send_unsent()

    def _check_later(self, number: int) -> None:
        self._loop.call_after(("output", number), _AGAIN_S, lambda: self._close_if_done(number))

    def reopened(self) -> None:
        """Send our new stderr, the reopened log, to the relay; do nothing under syslog."""
        if self._kind != "syslog":
            self._unsent.append((_NEW_STDERR, 0))
            self._send_unsent()

    def _send_all(self) -> None:
        """Send a new or adopted relay all pipes, our stderr and the requests for last words."""
        self._unsent.clear()
        self._unsent.extend((_PIPE, number) for number in self._pipes)
        if self._kind != "syslog":
            self._unsent.append((_NEW_STDERR, 0))
        self._unsent.extend(
            (_WORDS, number) for number, each in self._word_requests.items() for _ in each
        )
        self._send_unsent()

    def _send_unsent(self) -> None:
        while self._unsent and self._line is not None:
            kind, number = self._unsent[0]
            pipe = self._pipes.get(number)
            fd, text = _STDERR if kind == _NEW_STDERR else -1, f"{kind}{number}"
            if kind == _PIPE and pipe is not None:
                fd, text = pipe.read, f"{text} {pipe.generation} {pipe.pid}"
            if fd >= 0 or kind in (_WORDS, _CLOSE, _END):  # skip _PIPE for a closed pipe
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(fd))]
                try:
                    self._line.sendmsg([text.encode()], rights if fd >= 0 else [], _FLAGS)
                except (BrokenPipeError, ConnectionResetError):
                    return  # the relay has died: the next relay gets all messages
                except OSError:  # the line is full: the relay is behind
                    self._loop.call_after("relay-line", _AGAIN_S, self._send_unsent)
                    return
            self._unsent.popleft()

    # -- last words ----------------------------------------------------------

    def request_last_words(self, number: int, done: Callable[[bytes], None]) -> None:
        """Request a worker's last words; `done` gets them, or b"" if no answer comes in time."""
        requests = self._word_requests.setdefault(number, [])
        if len(requests) >= _MOST_REQUESTS:
            done(b"")
            return
        requests.append(done)
        too_late = partial(self._finish_without_words, number)
        self._loop.call_after((_WORDS, number), _WORDS_S, too_late)
        self._unsent.append((_WORDS, number))
        self._send_unsent()

    def _receive(self) -> None:
        if self._line is None:
            return
        data = read_now(self._line.recv, _ANSWER_BYTES, socket.MSG_DONTWAIT)
        if data is None:
            return
        if not data:
            self._loop.unwatch(self._line.fileno())  # the relay has exited: _ended() follows
            return
        kind = chr(data[0])
        if kind in (_PIPE, _NEW_STDERR):
            self._repeat_later(kind, int(data[1:]))
            return
        number, _, words = data.partition(b"\n")
        self._on_words(int(number), words)

    def _repeat_later(self, kind: str, number: int) -> None:
        """Repeat a message later, because the relay had no free descriptor to receive it."""
        if not self._lacks_descriptor and self._helper is not None:
            pid = self._helper.process.pid
            self._log.write("warning", "relay-short", pid=pid, hint=_LACKS_HINT)
            ours, self._lacks_descriptor = resource.getrlimit(_NOFILE), True
            try:  # the relay had our limit until another process lowered it
                resource.prlimit(pid, _NOFILE, ours)
            except (OSError, ValueError):
                with suppress(OSError):
                    self._must_end = resource.prlimit(pid, _NOFILE)[1] < ours[1]
        if self._must_end:  # only root could raise the relay's limit; the next relay gets our limit
            self._unsent.appendleft((_END, 0))
            self._send_unsent()
            if self._helper is not None:  # a blocked relay, or an older version, ignores _END
                kill = partial(self._helper.process.signal, signal.SIGKILL)
                self._loop.call_after("relay-end", _LONGEST_S, kill)
            return
        self._unsent.append((kind, number))
        self._loop.call_after("relay-line", _ROOM_S, self._send_unsent)

    def _on_words(self, number: int, words: bytes) -> None:
        requests = self._word_requests.get(number)
        if requests is None:
            return  # the answer came too late
        done = requests.pop(0)
        if not requests:
            del self._word_requests[number]
            self._loop.cancel((_WORDS, number))
        done(words)

    def _finish_without_words(self, number: int) -> None:
        """Call each callback that waits for a worker's last words, with b""."""
        while number in self._word_requests:
            self._on_words(number, b"")

    # -- the end -------------------------------------------------------------

    def finish(self) -> None:
        """Close the line, and wait up to _END_S for the relay's exit."""
        self._close_line()
        if self._helper is not None:
            self._helper.process.signal(signal.SIGCONT)
            poll = select.poll()
            poll.register(self._helper.process.pidfd, select.POLLIN)
            with suppress(OSError):  # under a descriptor limit of 0 we cannot wait for the relay
                poll.poll(_END_S * 1000)
