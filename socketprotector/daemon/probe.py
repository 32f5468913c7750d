"""Sends a probe to a generation, and reports the verdict (verdicts.py).

The delivery knows how to reach the generation (`ProbeTarget` in delivery/probe_target.py).  There
are three kinds of probe:

- accept: a worker must accept a connection of ours;
- HTTP: the prober process sends a request over a connection of ours (prober_client.py);
- check: a command makes connections of its own.

A probe is *late* if its limit has passed without a result.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ..model import probe_spec
from ..model.errors import what_failed
from ..model.probe_spec import ProbeSpec
from ..system.check_command import CheckCommand
from ..system.loop import Loop
from ..system.polling import events_of
from . import verdicts
from .check_probe import CheckProbes
from .delivery.probe_target import PROBE, SHUT_DOWN, ProbeTarget, Reach
from .generation import OpenGeneration
from .prober_client import Prober
from .verdicts import Verdict

#: The pause between two looks at a connection that waits for a worker: a share of the connection's
#: age, within these limits.
_FIRST_LOOK_S, _LAST_LOOK_S, _LOOK_SHARE = 0.005, 1.0, 0.1
#: How much longer than the probe's limit the prober may take: the prober may be starting.
_PROBER_S = 10.0
#: The errors of connect() to an address where no process listens.
_NOT_THERE = (errno.ECONNREFUSED, errno.ENOENT)


class Probe:
    """Probes one generation until close(), with one probe at a time."""

    def __init__(
        self,
        loop: Loop,
        reach: Reach,
        *,
        as_client: bool = False,
        addresses: CheckProbes | None = None,
        input_of: Callable[[int], bytes] = lambda number: b"",
    ) -> None:
        """as_client: reach the serving generation as clients do, with a new target for each probe.

        addresses: the addresses at which commands reach a generation (check_probe.py); None:
        commands connect to the target itself.  input_of: returns a command's stdin; its argument is
        the generation's number.
        """
        self._loop, self._reach, self._as_client = loop, reach, as_client
        self._addresses, self._input_of = addresses, input_of
        self._report: Callable[[Verdict], None] | None = None
        self._spec = ProbeSpec("")
        self._sent_at = self._until = 0.0
        self._target: ProbeTarget | None = None
        #: The connection of the present probe.  A connection that no worker has accepted is reused,
        #: so that connections do not pile up at a server that does not accept.
        self._connection: socket.socket | None = None
        self._made_at = 0.0
        self._was_reset = False  # the last look found the connection reset
        self._prober: Prober | None = None
        #: The running command.  A late command may survive its kill if it runs as another user, or
        #: while it waits for a disk.
        self._command: CheckCommand | None = None
        #: Why the last late probe failed.  Its connection may still wait, or its command may still
        #: run.
        self._late = ""

    def send(
        self,
        generation: OpenGeneration,
        spec: ProbeSpec,
        limit_s: float,
        report: Callable[[Verdict], None],
    ) -> None:
        """Send a probe, and call `report` once: perhaps before send() returns, never after close().

        One exception: if an earlier late command still runs, this probe starts no command.  Then
        `report` is called at this probe's limit, but not if the earlier command ends first.
        """
        self._spec, self._report = spec, report
        self._sent_at = time.monotonic()
        self._until = self._sent_at + limit_s
        try:
            if spec.kind == probe_spec.CHECK:
                self._run(generation, limit_s)
            elif not self._continue_earlier():
                self._connect(generation, limit_s)
        except (OSError, ValueError) as error:
            self._finish(verdicts.CANNOT, what_failed(error))

    @property
    def is_pending(self) -> bool:
        """Return whether a probe is under way."""
        return self._report is not None

    @property
    def connection(self) -> socket.socket | None:
        """The probe's TCP connection, also after the verdict until a worker accepts it; or None."""
        return self._connection if self._target is not None and not self._target.is_unix else None

    @property
    def target_is_closed(self) -> bool:
        """Return whether the probed socket may be closed to clients (ProbeTarget.is_closed)."""
        return self._target is not None and self._target.is_closed()

    def close(self) -> None:
        """Abandon the probe of this generation."""
        self._report = None
        self._loop.cancel(self)
        with suppress(OSError):
            if self._target is not None and self._connection is not None and self._waits():
                self._target.abandon(self._connection)
        self._disconnect()
        self._close_target()
        if self._command is not None:
            self._command.close()
            self._command = None
        self._was_reset = False

    def end(self) -> None:
        """Abandon the probe, and end the prober process."""
        self.close()
        if self._prober is not None:
            self._prober.close()
            self._prober = None

    # -- inside --------------------------------------------------------------------

    def _finish(self, kind: str, why: str = "") -> None:
        """Report the verdict; MOVED if another generation may have answered."""
        self._loop.cancel(self)
        is_unchanged = self._target is None or self._target.is_unchanged()
        if not is_unchanged:
            kind, why = verdicts.MOVED, SHUT_DOWN
        if kind not in (verdicts.UNMADE, verdicts.UNTAKEN):
            self._disconnect()
        if self._connection is None and (self._as_client or not is_unchanged):
            self._close_target()
        report, self._report = self._report, None
        if report is not None:
            report(Verdict(kind, why))

    def _connect(self, generation: OpenGeneration, limit_s: float) -> None:
        """Connect to the generation.  Raises OSError if the generation cannot be reached now."""
        spec = self._spec
        self._target = self._target or self._reach(generation, spec.listener)
        target = self._target
        if target is None:
            one_socket = "both generations share one socket"
            none = "the probed listener does not exist"
            self._finish(verdicts.NO_TARGET, none if self._as_client else one_socket)
            return
        if spec.by_http and self._prober is None:
            try:
                self._prober = Prober(
                    self._loop, heard=self._on_answer, late=self._on_late, ended=self._on_ended
                )
            except OSError as error:
                error.strerror = f"the probe process cannot be started: {error.strerror}"
                raise
        self._connection = client = target.connecting()
        self._made_at = self._sent_at
        failed = client.connect_ex(target.connect_address)
        if failed == errno.EAGAIN and target.is_unix:  # the socket's backlog is full: try again
            self._disconnect()
            if self._left_s:
                self._look_later(partial(self._connect_again, generation, limit_s))
            else:
                self._finish(verdicts.UNMADE, self._cannot_connect(failed))
        elif failed not in (0, errno.EINPROGRESS):
            kind = verdicts.REFUSED if failed in _NOT_THERE else verdicts.UNREACHED
            self._finish(kind, self._cannot_connect(failed))
        elif spec.by_http:
            assert self._prober is not None
            self._prober.send(client, target, spec, limit_s, self._left_s)
            self._loop.call_after(self, self._left_s + _PROBER_S, self._prober.kill)
        else:
            self._look_later(self._look)

    def _connect_again(self, generation: OpenGeneration, limit_s: float) -> None:
        try:
            self._connect(generation, limit_s)
        except OSError as error:
            self._finish(verdicts.CANNOT, what_failed(error))

    @property
    def _left_s(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def _cannot_connect(self, number: int) -> str:
        why = "its backlog is full" if number == errno.EAGAIN else os.strerror(number)
        if self._spec.by_http:
            refused = number == errno.ECONNREFUSED
            return f"GET {self._spec.path}: {'refused' if refused else why}"
        where = self._target.in_words if self._target is not None else "it"
        return f"cannot connect to {where}: {why}"

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.close()
            self._connection = None

    def _close_target(self) -> None:
        if self._target is not None:
            self._target.close()
            self._target = None

    # -- whether a worker has accepted the connection ----------------------------------

    def _waits(self) -> bool:
        """Return whether our connection waits for a worker.

        Raises OSError if the connection is lost.
        """
        target, connection = self._target, self._connection
        assert target is not None
        assert connection is not None
        # A connection that the kernel delays, because the backlog is full, waits for a worker, too.
        return not events_of(connection, select.POLLOUT) or target.waits(connection)

    def _continue_earlier(self) -> bool:
        """Use an earlier probe's connection for this probe; return False if that is impossible."""
        if self._connection is None:
            return False
        waits: bool | None = None
        with suppress(OSError):  # the connection is lost
            if not self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                waits = self._waits()
        # If a worker has accepted an HTTP probe's connection meanwhile, the answer comes too late.
        if waits is None or (self._spec.by_http and not waits):
            self._disconnect()
            if self._as_client:
                self._close_target()
            return False
        if self._spec.by_http:  # no worker has accepted the connection: send no second request
            self._finish(self._not_accepted()[0], self._late)
        else:
            self._look()
        return True

    def _not_accepted(self) -> tuple[str, str]:
        """Return the verdict, and the reason, for a connection that no worker has accepted."""
        assert self._connection is not None
        made = events_of(self._connection, select.POLLOUT)
        where = self._target.in_words if self._target is not None else "it"
        if not made:
            return verdicts.UNMADE, f"a connection to {where} could not be made"
        why = f"no worker accepted the probe at {where}"
        return verdicts.UNTAKEN, f"{why}; is the server listening on the socket it was given?"

    def _look_later(self, look: Callable[[], None]) -> None:
        waited_s = time.monotonic() - self._made_at
        delay_s = min(max(_FIRST_LOOK_S, _LOOK_SHARE * waited_s), _LAST_LOOK_S)
        self._loop.call_after(self, delay_s, look)

    def _look(self) -> None:
        target, connection = self._target, self._connection
        assert target is not None
        assert connection is not None
        failed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        was_reset, self._was_reset = self._was_reset, failed == errno.ECONNRESET
        try:
            waits = not failed and self._waits()
        except OSError as error:
            failed = error.errno or errno.EIO
        if not target.is_unchanged():
            self._finish(verdicts.MOVED, SHUT_DOWN)
        elif failed and not (was_reset and self._was_reset):
            # Perhaps the listening socket was shut down, which delivery/shared/socket_repair.py
            # repairs.  So report REFUSED for a first reset.  If the next probe's first look finds a
            # reset, too, a server has accepted and reset the connection: the next branch reports
            # GOOD.
            self._finish(verdicts.REFUSED, self._cannot_connect(failed))
        elif failed or not waits:
            self._finish(verdicts.GOOD)
        elif not self._left_s:
            self._finish(*self._not_accepted())
        else:
            self._look_later(self._look)

    # -- by HTTP ---------------------------------------------------------------------

    def _on_answer(self, why: str) -> None:
        if self.is_pending:  # otherwise the probe was abandoned
            self._finish(verdicts.BAD if why else verdicts.GOOD, why)

    def _on_late(self, why: str) -> None:
        self._late, kind = why, verdicts.BAD
        with suppress(OSError):
            if self._connection is not None and self._waits():
                kind, _ = self._not_accepted()
        if self.is_pending:
            self._finish(kind, why)

    def _on_ended(self, how: str) -> None:
        self._prober = None
        if self.is_pending:
            self._finish(verdicts.CANNOT, f"the probe process {how}")

    # -- by a command ----------------------------------------------------------------

    def _run(self, generation: OpenGeneration, limit_s: float) -> None:
        """Run the check command.  Raises OSError or ValueError."""
        if self._command is not None:  # an earlier late command still runs: start no other
            self._loop.call_after(self, limit_s, lambda: self._finish(verdicts.BAD, self._late))
            return
        if self._addresses is not None:
            address = self._addresses.address(generation)
        else:
            self._target = target = self._reach(generation, "")
            if target is None:
                self._finish(verdicts.NO_TARGET, "no listener is left")
                return
            address = target.text
        number = generation.record.number

        def ended(why: str) -> None:
            command, self._command = self._command, None
            if command is not None and command.is_late:
                # late() has reported this command's verdict.  Forget a later probe that has waited
                # for the end of this command: the timer of health.py sends another probe.  (A late
                # command fails a settling generation, so no later probe waits there.)
                self._loop.cancel(self)
                self._report = None
                return
            if self._addresses is not None:
                why = self._addresses.judge(generation, why)
            kind = verdicts.MOVED if why == SHUT_DOWN else verdicts.BAD if why else verdicts.GOOD
            self._finish(kind, why)

        def late(why: str) -> None:
            self._late = why
            self._finish(verdicts.BAD, why)

        self._command = CheckCommand(
            self._loop,
            generation.program,
            self._spec.path,
            {PROBE: address} if address else {},
            ended=ended,
            late=late,
            limit_s=limit_s,
            stdin=self._input_of(number),
        )
