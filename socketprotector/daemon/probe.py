"""Sends a probe to a generation, and reports the verdict (verdicts.py).

The delivery knows how to reach the generation (`ProbeTarget` in delivery/probe_target.py).  There
are three kinds of probe:

- accept: we connect, and a worker must accept the connection;
- HTTP: we connect, and send a request over the connection (http_exchange.py), for HTTPS by the
  prober process (prober_client.py);
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
from ..model.text import in_units
from ..system.check_command import CheckCommand
from ..system.loop import Loop
from ..system.polling import events_of
from . import verdicts
from .check_probe import CheckAddress, CheckProbes
from .delivery.probe_target import PROBE, SHUT_DOWN, ProbeTarget, Reach
from .generation import OpenGeneration
from .http_exchange import HttpExchange, request
from .prober_client import Prober
from .verdicts import Verdict

#: The pause before we retry one of two steps: the check whether a worker has accepted our
#: connection, or connect() to a UNIX socket with a full backlog.  The pause is a tenth of the time
#: since the probe was sent, but at least _FIRST_PAUSE_S and at most _LAST_PAUSE_S.  If the probe
#: reuses an earlier probe's connection, the time runs from that connection's first probe.
_FIRST_PAUSE_S, _LAST_PAUSE_S, _PAUSE_SHARE = 0.005, 1.0, 0.1
#: A silent prober gets this much time after the probe's limit, because it may be slow to start.
#: Then we kill the prober.
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
        """as_client: reach the serving generation as clients do.

        With as_client, each probe that opens a new connection first asks `reach` for a new target.

        addresses: the probe addresses for check commands (check_probe.py); None: commands connect
        to the target itself.  input_of: takes a generation's number, returns a command's stdin.
        """
        self._loop, self._reach, self._as_client = loop, reach, as_client
        self._addresses, self._input_of = addresses, input_of
        self._report: Callable[[Verdict], None] | None = None
        self._spec = ProbeSpec("")
        self._sent_at = self._until = 0.0
        self._target: ProbeTarget | None = None
        self._address: CheckAddress | None = None  # for the command, without `addresses`
        #: The connection of the present probe.  If no worker accepts the connection, the next probe
        #: reuses it, so that connections do not pile up at a server that does not accept.
        self._connection: socket.socket | None = None
        self._connecting_since = 0.0
        self._was_reset = False  # the last accept probe ended with a reset of its connection
        self._exchange: HttpExchange | None = None  # of the present HTTP probe
        self._prober: Prober | None = None  # for HTTPS
        self._answer: socket.socket | None = None  # from the prober
        #: The running command.  We kill a late command.  The kill may fail if the command runs as
        #: another user, and takes effect late if the command waits for a disk.
        self._command: CheckCommand | None = None
        #: Why the last HTTP probe or command was late.  While that probe's connection waits, or
        #: that command runs, later probes report the same reason.
        self._late_why = ""

    def send(
        self,
        generation: OpenGeneration,
        spec: ProbeSpec,
        limit_s: float,
        report: Callable[[Verdict], None],
    ) -> None:
        """Send a probe, and call `report` once: perhaps before send() returns, never after close().

        Exception: if the late command of an earlier probe is running, this probe starts no command.
        If the late command ends before this probe's limit, `report` is never called.  Otherwise
        `report` is called at the limit.
        """
        self._spec, self._report = spec, report
        self._sent_at = time.monotonic()
        self._until = self._sent_at + limit_s
        try:
            if spec.kind == probe_spec.CHECK:
                self._run_command(generation, limit_s)
            elif not self._reuse_connection():
                self._connect(generation, limit_s)
        except (OSError, ValueError) as error:
            self._finish(verdicts.CANNOT, what_failed(error))

    @property
    def is_pending(self) -> bool:
        """Return whether a probe is under way."""
        return self._report is not None

    @property
    def connection(self) -> socket.socket | None:
        """The probe's TCP connection; None: no connection, or a UNIX connection.

        After the verdicts UNMADE and UNTAKEN the connection stays open.
        """
        return self._connection if self._target is not None and not self._target.is_unix else None

    @property
    def target_may_refuse_clients(self) -> bool:
        """Whether the probed and the serving socket differ in an option that may keep clients out.

        False without a target.
        """
        return self._target is not None and self._target.may_refuse_clients()

    def close(self) -> None:
        """Abandon the probe, so that another generation can be probed."""
        self._report = None
        self._loop.cancel(self)
        self._end_exchange()
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
        """Do what close() does, and end the prober process."""
        self.close()
        if self._prober is not None:
            self._prober.close()
            self._prober = None

    # -- inside --------------------------------------------------------------------

    def _finish(self, kind: str, why: str = "") -> None:
        """Report this verdict, or MOVED if another generation may have answered."""
        self._loop.cancel(self)
        self._end_exchange()
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
        """Connect to the generation, and begin the probe.

        Raises OSError if we cannot even try, for example because no descriptor is free.
        """
        spec = self._spec
        self._target = self._target or self._reach(generation, spec.listener)
        target = self._target
        if target is None:
            missing = "the probed listener does not exist"
            either = f"{missing}, or both generations share its socket"
            self._finish(verdicts.NO_TARGET, missing if self._as_client else either)
            return
        if spec.kind == "https" and self._prober is None:
            try:
                self._prober = Prober(
                    self._loop,
                    answered=self._on_report,
                    late=self._on_late,
                    ended=self._on_prober_end,
                )
            except OSError as error:
                error.strerror = f"the probe process cannot be started: {error.strerror}"
                raise
        client, code = target.connect()
        self._connection = client
        self._connecting_since = self._sent_at
        if code == errno.EAGAIN:  # for example a UNIX socket's backlog is full: try again
            self._disconnect()
            if self._left_s:
                self._call_later(partial(self._connect_again, generation, limit_s))
            else:
                self._finish(verdicts.UNMADE, self._cannot_connect(code))
        elif code not in (0, errno.EINPROGRESS):
            kind = verdicts.REFUSED if code in _NOT_THERE else verdicts.UNREACHED
            self._finish(kind, self._cannot_connect(code))
        elif spec.by_http:
            self._begin_exchange(client, target, limit_s)
        else:
            self._call_later(self._check_accepted)

    def _connect_again(self, generation: OpenGeneration, limit_s: float) -> None:
        try:
            self._connect(generation, limit_s)
        except OSError as error:
            self._finish(verdicts.CANNOT, what_failed(error))

    @property
    def _left_s(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def _cannot_connect(self, code: int) -> str:
        is_full = code == errno.EAGAIN and self._target is not None and self._target.give is None
        why = "the socket's backlog is full" if is_full else os.strerror(code)
        if self._spec.by_http:
            refused = code == errno.ECONNREFUSED
            return f"GET {self._spec.path}: {'refused' if refused else why}"
        where = self._target.in_words if self._target is not None else "it"
        return f"cannot connect to {where}: {why}"

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                if self._spec.kind == "https":  # end the prober's copy, too
                    self._connection.shutdown(socket.SHUT_RDWR)
            with suppress(OSError):
                self._connection.close()
            self._connection = None

    def _close_target(self) -> None:
        if self._address is not None:
            self._address.close()
            self._address = None
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
        # Without POLLOUT the connection is not established yet, because the backlog is full.  Such
        # a connection waits for a worker, too.
        return not events_of(connection, select.POLLOUT) or target.waits(connection)

    def _reuse_connection(self) -> bool:
        """Use an earlier probe's connection for this probe; return False if that is impossible."""
        if self._connection is None:
            return False
        waits: bool | None = None
        with suppress(OSError):  # the connection is lost
            if not self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                waits = self._waits()
        # If a worker has since accepted the earlier HTTP probe's connection, connect again: the
        # worker's answer belongs to the earlier probe.
        if waits is None or (self._spec.by_http and not waits):
            self._disconnect()
            if self._as_client:
                self._close_target()
            return False
        if self._spec.by_http:  # no worker has accepted the connection: send no second request
            self._finish(self._not_accepted()[0], self._late_why)
        else:
            self._check_accepted()
        return True

    def _not_accepted(self) -> tuple[str, str]:
        """Return the verdict, and the reason, for a connection that no worker has accepted."""
        assert self._connection is not None
        is_connected = events_of(self._connection, select.POLLOUT)
        where = self._target.in_words if self._target is not None else "it"
        if not is_connected:
            return verdicts.UNMADE, f"a connection to {where} could not be made"
        why = f"no worker accepted the probe at {where}"
        return verdicts.UNTAKEN, f"{why}; is the server listening on the socket it was given?"

    def _call_later(self, call: Callable[[], None]) -> None:
        waited_s = time.monotonic() - self._connecting_since
        delay_s = min(max(_FIRST_PAUSE_S, _PAUSE_SHARE * waited_s), _LAST_PAUSE_S)
        self._loop.call_after(self, delay_s, call)

    def _check_accepted(self) -> None:
        target, connection = self._target, self._connection
        assert target is not None
        assert connection is not None
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        waits = False
        try:
            waits = not code and self._waits()
        except OSError as error:
            code = error.errno or errno.EIO
        is_unchanged = target.is_unchanged()
        if is_unchanged and waits and self._left_s:
            self._call_later(self._check_accepted)
            return
        was_reset, self._was_reset = self._was_reset, code == errno.ECONNRESET
        if not is_unchanged:
            self._finish(verdicts.MOVED, SHUT_DOWN)
        elif code and not (was_reset and self._was_reset):
            # A reset has one of two causes: the listening socket was shut down, or a server has
            # accepted and reset the connection.  One reset does not tell which, so report REFUSED.
            # Before the next probe, delivery/shared/socket_repair.py repairs a shut-down socket.
            # If the next probe is reset, too, a server accepts: the last branch reports GOOD.
            self._finish(verdicts.REFUSED, self._cannot_connect(code))
        elif waits:
            self._finish(*self._not_accepted())
        else:
            self._finish(verdicts.GOOD)

    # -- by HTTP ---------------------------------------------------------------------

    def _begin_exchange(self, client: socket.socket, target: ProbeTarget, limit_s: float) -> None:
        """Send the request.  Raises OSError."""
        spec, left_s = self._spec, self._left_s
        text = request(spec.path, spec.host or target.host_header)
        if spec.kind == "http":
            late = partial(self._on_late, f"no answer within {in_units(limit_s)}")
            self._exchange = HttpExchange(self._loop, client, text, spec.good, self._on_answer)
            self._loop.call_after(self, left_s, late)
        else:
            assert self._prober is not None
            self._answer = answer = self._prober.send(
                text, spec.host, client, limit_s=limit_s, left_s=left_s
            )
            self._exchange = HttpExchange(self._loop, answer, b"", spec.good, self._on_answer)
            self._loop.call_after(self, left_s + _PROBER_S, self._prober.kill)

    def _end_exchange(self) -> None:
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def _on_answer(self, why: str) -> None:
        if why:
            self._finish(verdicts.BAD, f"GET {self._spec.path}: {why}")
        else:
            self._finish(verdicts.GOOD)

    def _on_report(self, why: str) -> None:
        if self._exchange is not None:  # otherwise the verdict is known, or the probe was abandoned
            self._exchange.end(why)

    def _on_late(self, why: str) -> None:
        if self._exchange is None:
            return
        if by_header := self._exchange.why_by_header:
            self._on_answer(by_header)
            return
        self._late_why, kind = f"GET {self._spec.path}: {why}", verdicts.BAD
        with suppress(OSError):
            if self._connection is not None and self._waits():
                kind, _ = self._not_accepted()
        self._finish(kind, self._late_why)

    def _on_prober_end(self, how: str) -> None:
        self._prober = None
        if self.is_pending:
            self._finish(verdicts.CANNOT, f"the probe process {how}")

    # -- by a command ----------------------------------------------------------------

    def _run_command(self, generation: OpenGeneration, limit_s: float) -> None:
        """Run the check command.  Raises OSError or ValueError."""
        if self._command is not None:  # the late command of an earlier probe is running
            self._loop.call_after(self, limit_s, lambda: self._finish(verdicts.BAD, self._late_why))
            return
        if self._addresses is not None:
            address = self._addresses.address(generation)
        else:
            self._target = target = self._reach(generation, "")
            if target is None:
                self._finish(verdicts.NO_TARGET, "no listener is left")
                return
            address = target.text
            if target.give is not None:
                self._address = CheckAddress(self._loop, generation, target)
                address = self._address.text
        number = generation.record.number

        def ended(why: str) -> None:
            command, self._command = self._command, None
            if command is not None and command.is_late:
                # late() has reported this command's verdict.  If a later probe is
                # pending, drop that probe: the timer of health.py sends another.
                # (settle_check.py sends none after a late command: the generation has failed.)
                self._loop.cancel(self)
                self._report = None
                return
            if self._addresses is not None:
                why = self._addresses.judge(generation, why)
            kind = verdicts.MOVED if why == SHUT_DOWN else verdicts.BAD if why else verdicts.GOOD
            self._finish(kind, why)

        def late(why: str) -> None:
            self._late_why = why
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
