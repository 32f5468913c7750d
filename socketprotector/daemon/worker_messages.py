"""Reads the workers' notify sockets (sd_notify(3)), and detects workers whose WATCHDOG=1 is late.

If a message causes an event, the message is removed from its socket only after the event is handled
and the state is written.  If the protector is killed before the removal, the next program reads the
message again.

Exception: under --handoff stdio, a worker's report that a program failed early (first_programs.py)
may be removed before the report's event is handled.  Before the removal we write only two facts:
the failure count, and how the program ended.  If the protector is killed after the removal,
recovery.py makes the event again from these facts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from socketprotector_client import wire

from ..core.events import Deadline, ReplaceRequested, TimeExtended, TimerKind
from ..model.text import in_units
from .first_programs import FirstPrograms
from .runtime import Runtime
from .worker_spawn import Worker

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .post_mortem import PostMortem

#: How much of a STATUS= line is kept.
_STATUS_CHARACTERS = 500
#: The most messages that one read() handles: a worker that sends without end must not block us.
#: A socket's queue holds fewer messages than this (net.unix.max_dgram_qlen, usually 10 to 512).
#: So one read() after a worker's exit gets all messages of the worker.
_READ_AT_ONCE = 1024
#: The most messages of a worker that one turn of the loop handles.  Without this limit, a worker
#: that sends without end would delay the other workers and operators.
_READ_IN_A_TURN = 64
#: How long to wait before reading again from a socket that could not be read.
_READ_AGAIN_S = 0.1
#: If a watchdog timer is handled this much later than it was due, we did not run for a while.
_LATE_S = 0.1
#: The most digits of EXTEND_TIMEOUT_USEC: about 30 years.
_USEC_DIGITS = 15
#: The name and the value of X_SOCKETPROTECTOR_RETIRE=1 (socketprotector_client/wire.py).
_RETIRES = wire.RETIRES_ON_RETURN.split("=")


class WorkerMessages:
    """The notify sockets of all running workers."""

    def __init__(
        self,
        runtime: Runtime,
        workers: Mapping[int, Worker],
        first_programs: FirstPrograms,
        note: Callable[..., None],
        ready: Callable[..., None],
        post_mortem: Callable[[], PostMortem],
    ) -> None:
        """workers: the running workers by number, always up to date.

        note: changes fields of a worker's record.  ready: called for a worker's READY=1.
        post_mortem: returns the object that handles failures of forked children.
        """
        self._loop, self._log, self._post = runtime.loop, runtime.log, runtime.post
        self._workers, self._first_programs = workers, first_programs
        self._note, self._ready, self._post_mortem = note, ready, post_mortem

    def watch(self, number: int, worker: Worker) -> None:
        """Read a worker's messages from now on.  Raises OSError."""
        self._loop.watch(worker.notify.fileno(), lambda: self.read(number, _READ_IN_A_TURN))

    def unwatch(self, number: int, worker: Worker) -> None:
        """Stop reading a worker's messages, and cancel its timers."""
        self._loop.unwatch(worker.notify.fileno())
        self._loop.cancel(("read-again", number))
        self._loop.cancel(("watchdog", number))

    def read(self, number: int, most: int = _READ_AT_ONCE) -> None:
        """Handle up to `most` of the messages that wait in a worker's socket."""
        worker = self._workers[number]
        for _ in range(most):
            try:
                fields = worker.notify.peek(worker.process.pid)
                if fields is None:
                    return
                self._handle(number, worker, fields)
                worker.notify.remove()
            except OSError as error:
                self._read_later(number, worker, error)
                return

    def catch_up(self, deadline: Deadline) -> None:
        """Before a deadline ends workers' start, read all their messages: one may be READY=1."""
        starts = deadline.wait is TimerKind.START
        for number, worker in tuple(self._workers.items()):
            target = worker.record.generation if starts else number
            if target == deadline.target and (starts or deadline.wait is TimerKind.WORKER_START):
                self.read(number)

    def _handle(self, number: int, worker: Worker, fields: Mapping[str, str]) -> None:
        if fields.get("READY") == "1" and worker.readiness.by_message:
            self._ready(number, "notify", retires=fields.get(_RETIRES[0]) == _RETIRES[1])
        usec = fields.get("EXTEND_TIMEOUT_USEC", "")
        # isdigit() alone accepts digits that int() rejects.
        if usec.isascii() and usec.isdigit() and len(usec) <= _USEC_DIGITS:
            self._post(TimeExtended(number, int(usec) / 1_000_000))
        if "STATUS" in fields:
            status = fields["STATUS"][:_STATUS_CHARACTERS]
            self._note(worker, status=status)
            self._log.write("debug", "status", worker=number, status=status)
        if wire.PROGRAM in fields:
            self._first_programs.handle(worker, fields[wire.PROGRAM])
        if wire.CHILD in fields:
            self._post_mortem().child_failed(worker, fields[wire.CHILD])
        if fields.get("WATCHDOG") == "1":
            if not worker.record.watched:
                self._note(worker, watched=True)
            self.await_watchdog(number, worker)

    def _read_later(self, number: int, worker: Worker, error: OSError) -> None:
        """Read again after a pause: if we kept watching, the loop would call us again and again."""
        self._log.write("error", "cannot-read-messages", worker=number, error=error.strerror)
        self._loop.unwatch(worker.notify.fileno())
        self._loop.call_after(
            ("read-again", number), _READ_AGAIN_S, lambda: self._read_again(number)
        )

    def _read_again(self, number: int) -> None:
        worker = self._workers[number]
        try:
            self.watch(number, worker)
        except OSError as error:
            self._read_later(number, worker, error)

    def await_watchdog(self, number: int, worker: Worker, *, again: bool = False) -> None:
        """Replace a worker if its next WATCHDOG=1 does not come in time.

        Do nothing until the worker is ready and has sent a first WATCHDOG=1.  (--start-timeout
        limits the worker's start.)
        again: the worker gets a second period, because we did not run when the first ended.
        """
        limit_s = worker.generation.program.watchdog_s
        if limit_s and worker.record.watched and worker.became_ready:
            due_at = time.monotonic() + limit_s

            def on_late() -> None:
                self.read(number)  # the message may have come while we were too busy to read
                if self._loop.due(("watchdog", number)) is not None:
                    return  # the message has come, and has set this timer again
                if time.monotonic() > due_at + _LATE_S and not again:
                    # If the machine or container was suspended, the worker could send nothing.
                    self.await_watchdog(number, worker, again=True)
                    return
                reason = f"no WATCHDOG=1 for {in_units(limit_s)}"
                self._log.write("error", "worker-stuck", worker=number, reason=reason)
                self._post(ReplaceRequested(number, reason, hung=True))

            self._loop.call_after(("watchdog", number), limit_s, on_late)
