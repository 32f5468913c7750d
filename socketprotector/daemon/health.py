"""--health: asks the generation that serves, every now and then, and says what it answers.

Nothing follows from that but what is said: status, metrics, /readyz of the exporter, and an event
when it changes.  What generations share, such as a database, fails for all of them at once, on
every host: to start any of them anew would make it worse.

A question is a connection of ours, beside all that is counted.  `accept` only wants it taken; by
HTTP the asker asks, a process that is kept for that (asker_client.py).  A command asks by itself.

Four things may come of a question: a good answer, a failure, that no worker has taken it yet
(`busy`: nothing is known of the answer, and it is not asked anew before one has), or that it could
not be asked, which is no fault of the generation's.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from ..model import question
from ..model.errors import what_failed
from ..model.history import HEALTHY, History
from ..model.question import Question
from ..model.settings import Settings
from ..system.check_command import CheckCommand, shown
from ..system.helper import Ended
from ..system.polling import events_of
from .asker_client import Asker, KeptAsker
from .delivery import Delivery
from .delivery.way import PROBE, Way
from .generation import OpenGeneration
from .runtime import Runtime

#: What is known of the generation.  Of one that has just begun to serve nothing is.
UNKNOWN, UNHEALTHY = "unknown", "unhealthy"
_TIMER, _LIMIT = "health", "health-limit"
#: How soon to look whether a connection was taken: each time twice as late.
_FIRST_LOOK_S = 0.005
_LAST_LOOK_S = 0.25
#: How much longer than its limit the asker may take: it is starting, or the machine is busy.
_ASKER_S = 10.0
#: What connecting says where nothing listens; all else is for want of something of ours.
_NOT_THERE = (errno.ECONNREFUSED, errno.ENOENT)


class Health:
    """What is known of the generation that new clients come to."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        settings: Callable[[], Settings],
        delivery: Delivery,
        remember: Callable[[Callable[[History], History]], None],
    ) -> None:
        """settings: those that hold.  remember: changes the history by the function given."""
        self._loop, self._log = runtime.loop, runtime.log
        self._persist, self._remember = runtime.persist, remember
        self._settings, self._delivery = settings, delivery
        self._generation: OpenGeneration | None = None
        self._held_to: tuple[object, ...] = ()
        self._asked = Question("")
        self._asker: KeptAsker | None = None
        self._cannot = ""  # why there is no asker
        # Of the question that is under way, or that no worker has taken yet.
        self._way: Way | None = None
        self._connection: socket.socket | None = None
        self._command: CheckCommand | None = None
        self._until = 0.0
        self._busy = False
        self._reset()

    def _reset(self) -> None:
        self.state = UNKNOWN
        self.since_at = time.time()
        #: What came of the last question, in words; "": a good answer, or none was asked yet.
        self.last = ""
        #: How many answers were bad, since the last good one, and the last of them.
        self.failures = 0
        self.reason = ""
        self.answered_at: float | None = None
        self._missed = 0  # in a row

    @property
    def asks(self) -> str:
        """What is asked, as `status` says it; "": nothing."""
        return shown(self._settings().health)

    @property
    def tcp_connection(self) -> socket.socket | None:
        """That of the question which is under way, if it has one by TCP."""
        way = self._way
        return self._connection if way is not None and not way.is_unix else None

    # -- whom --------------------------------------------------------------------

    def serves(self, generation: OpenGeneration | None) -> None:
        """New clients come to this generation from now on; None: to none."""
        if generation is not self._generation:
            self._generation = generation
            self._begin()

    def settings_are(self) -> None:
        """A reload may have changed them."""
        if self._held_to != self._options():
            self._begin()

    def suspend(self) -> None:
        """Ask no more in this program; the next one begins anew."""
        self._loop.cancel(_TIMER)
        self._give_up()
        if self._asker is not None:
            self._asker.close()
            self._asker = None

    def go_on(self) -> None:
        """There was no next one."""
        text = self._settings().health
        if self._generation is None or not text:
            return
        self._asked = question.read_health(text)
        if self._asked.by_http and self._asker is None:
            self._asker = KeptAsker(self._loop, self._start_asker, self._asker_ended)
        self._loop.call_after(_TIMER, 0.0, self._ask)

    def _options(self) -> tuple[object, ...]:
        its = self._settings()
        return its.health, its.health_every_s, its.health_failures, its.health_timeout_s

    def _begin(self) -> None:
        options = self._options()
        if self._generation is None or options != self._held_to:
            self.suspend()
        self._held_to = options
        self._give_up()
        self._reset()
        self.go_on()

    # -- a question --------------------------------------------------------------

    def _ask(self) -> None:
        self._loop.call_after(_TIMER, self._settings().health_every_s, self._ask)
        if self._command is not None and self._command.is_late:
            # It lives on: as another user's, or waiting for a disk.  No other is started beside it.
            if self._loop.due(_LIMIT) is None:
                limit_s = self._settings().health_timeout_s
                self._loop.call_after(_LIMIT, limit_s, lambda: self._is_bad(self.reason))
            return
        under_way = self._connection is not None or self._command is not None
        if self._delivery.is_silent or (under_way and not self._busy):
            return
        try:
            if self._busy and self._waits():
                self._is_busy()
                return
        except OSError:
            pass  # it came to no worker: it is asked anew
        self._forget()
        try:
            self._send()
        except (OSError, ValueError) as error:
            self._could_not(what_failed(error))

    def _send(self) -> None:
        """Raises OSError or ValueError where it cannot be asked."""
        generation, asked = self._generation, self._asked
        assert generation is not None
        if asked.by_http and (self._asker is None or self._asker.now is None):
            raise OSError(errno.ESRCH, self._cannot or "the process that asks is starting")
        limit_s = self._settings().health_timeout_s
        self._until = time.monotonic() + limit_s
        self._way = way = self._delivery.reach(generation, asked.listener, as_client=True)
        if way is None:
            raise OSError(errno.ENOENT, "there is no such listener any more")
        if asked.kind == question.CHECK:
            self._run(generation, way, asked.path)
            return
        self._connection = one = way.connecting()
        failed = one.connect_ex(way.target)
        if failed == errno.EAGAIN and way.is_unix:
            self._is_busy()  # its backlog is full; it is asked anew
            self._forget()
        elif failed in _NOT_THERE:
            self._is_bad(f"cannot connect: {os.strerror(failed)}")
        elif failed not in (0, errno.EINPROGRESS):
            raise OSError(failed, f"cannot connect: {os.strerror(failed)}")
        elif self._asker is not None and self._asker.now is not None:
            self._asker.now.ask(one, way, asked, limit_s)
            self._loop.call_after(_LIMIT, limit_s + _ASKER_S, self._asker_hangs)
        else:
            self._look_later(_FIRST_LOOK_S)

    def _look(self, after_s: float) -> None:
        one = self._connection
        assert one is not None
        failed = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        try:
            waits = not failed and self._waits()
        except OSError as error:
            failed = error.errno or errno.EIO
        if failed:
            self._is_bad(f"cannot connect: {os.strerror(failed)}")
        elif not waits:
            self._is_good()
        elif time.monotonic() >= self._until:
            self._is_busy()
        else:
            self._look_later(min(2 * after_s, _LAST_LOOK_S))

    def _look_later(self, after_s: float) -> None:
        self._loop.call_after(_LIMIT, after_s, lambda: self._look(after_s))

    def _waits(self) -> bool:
        """Whether no worker has taken our connection yet.  Raises OSError: it came to none."""
        way, one = self._way, self._connection
        if way is None or one is None:
            return False
        # Nor has the kernel where its backlog is full.
        return not events_of(one, select.POLLOUT) or way.waits(one)

    def _give_up(self) -> None:
        """Another generation is to be asked, or none."""
        with suppress(OSError):
            if self._way is not None and self._connection is not None and self._waits():
                self._way.give_up(self._connection)
        self._forget()
        self._close_command()

    def _forget(self) -> None:
        """The question is over, whatever came of it."""
        self._busy = False
        self._loop.cancel(_LIMIT)
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._command is not None and not self._command.is_late:
            self._close_command()
        if self._way is not None:
            self._way.close()
            self._way = None

    def _close_command(self) -> None:
        if self._command is not None:
            self._command.close()
            self._command = None

    # -- the asker ---------------------------------------------------------------

    def _start_asker(self, ended: Ended) -> Asker:
        return Asker(self._loop, heard=self._heard, late=self._is_late, ended=ended)

    def _asker_ended(self, how: str) -> None:
        self._cannot = f"the process that asks {how}"
        if self._connection is not None and not self._busy:
            self._forget()
            self._could_not(self._cannot)

    def _asker_hangs(self) -> None:
        if self._asker is not None and self._asker.now is not None:
            self._asker.now.kill()  # its end is told, and another one started

    def _heard(self, why: str) -> None:
        if self._asker is not None:
            self._asker.works()
        if self._connection is None or self._busy:
            return  # it was given up
        if why:
            self._is_bad(why)
        else:
            self._is_good()

    def _is_late(self, why: str) -> None:
        waits = False
        with suppress(OSError):
            waits = self._connection is not None and not self._busy and self._waits()
        if waits:
            self._is_busy()
        else:
            self._heard(why)

    # -- the command -------------------------------------------------------------

    def _run(self, generation: OpenGeneration, way: Way, command: str) -> None:
        """Raises OSError or ValueError."""

        def over(why: str) -> None:
            command, self._command = self._command, None
            if command is not None and command.is_late:
                self._forget()  # that was its answer
                return
            if why:
                self._is_bad(why)
            else:
                self._is_good()

        self._command = CheckCommand(
            self._loop,
            generation.program,
            command,
            {PROBE: way.text},
            over=over,
            late=self._is_bad,
            limit_s=self._settings().health_timeout_s,
        )

    # -- what came of it ---------------------------------------------------------

    def _is_good(self) -> None:
        self._is_answered("")
        self.reason, self.failures = "", 0
        self._becomes(HEALTHY)

    def _is_bad(self, why: str) -> None:
        self._is_answered(why)
        self.reason = why
        self.failures += 1
        if self.failures >= self._settings().health_failures:
            self._becomes(UNHEALTHY)

    def _is_answered(self, what: str) -> None:
        self._forget()
        self._missed = 0
        self.last, self.answered_at = what, time.time()

    def _is_busy(self) -> None:
        """It stays, so that a server that takes nothing does not get one after the other."""
        self._loop.cancel(_LIMIT)
        self._busy = True
        self._missed = 0
        self.last = "busy: no worker has taken the question yet"

    def _could_not(self, why: str) -> None:
        self._forget()
        self.last = f"not asked: {why}"
        self._missed += 1
        if self._missed >= self._settings().health_failures:
            self._becomes(UNKNOWN)

    def _becomes(self, state: str) -> None:
        if state != self.state and self._generation is not None:
            self.state, self.since_at = state, time.time()
            number, reason = self._generation.record.number, self.last or None
            self._note(number)
            if state == HEALTHY:
                self._log.write("info", "healthy", generation=number)
            else:
                self._log.write(
                    "warning",
                    "unhealthy" if state == UNHEALTHY else "health-unknown",
                    generation=number,
                    reason=reason,
                )

    def _note(self, number: int) -> None:
        state, reason, at = self.state, self.last, self.since_at
        self._remember(lambda history: history.health_changed(number, state, reason, at))
        self._persist()  # no decision follows, which would write it
