"""Asks a generation one question: reaches it, has it answer, and says what came of that.

How it is reached (`Way`) its delivery knows.  `accept` is asked here: a connection, that must not
wait any more.  By HTTP another process asks, by a connection of ours (asker_client.py).  A command
asks by itself.
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

from ..model import question
from ..model.errors import what_failed
from ..model.question import Question
from ..system.check_command import CheckCommand
from ..system.loop import Loop
from ..system.polling import events_of
from . import verdicts
from .asker_client import Asker
from .check_probe import CheckProbes
from .delivery.way import PROBE, SHUT_DOWN, Reach, Way
from .generation import OpenGeneration
from .verdicts import Verdict

#: How soon to look whether a connection was taken: a tenth of the time that it waits, within these.
_FIRST_LOOK_S, _LAST_LOOK_S, _LOOK_SHARE = 0.005, 1.0, 0.1
#: How much longer than its limit the asker may take: it is starting, or the machine is busy.
_ASKER_S = 10.0
#: What connecting says where nothing listens.
_NOT_THERE = (errno.ECONNREFUSED, errno.ENOENT)


class Probe:
    """One question at a time, to one generation until close()."""

    def __init__(
        self,
        loop: Loop,
        reach: Reach,
        *,
        as_client: bool = False,
        addresses: CheckProbes | None = None,
        reads: Callable[[int], bytes] = lambda number: b"",
    ) -> None:
        """as_client: it reaches what serves, and each question has a way of its own.

        addresses: where commands reach a generation, if not as the other questions do.
        reads: what they read, of a generation.
        """
        self._loop, self._reach, self._as_client = loop, reach, as_client
        self._addresses, self._reads = addresses, reads
        self._heard: Callable[[Verdict], None] | None = None
        self._asked = Question("")
        self._asked_at = self._until = 0.0
        self._way: Way | None = None
        #: Of a question that is under way, or that no worker has taken yet: so a server that takes
        #: none does not get one after the other.
        self._connection: socket.socket | None = None
        self._made_at = 0.0
        self._was_reset = False
        self._asker: Asker | None = None
        #: One that was late may live on: as another user's, or waiting for a disk.
        self._command: CheckCommand | None = None
        self._late = ""

    def ask(
        self,
        generation: OpenGeneration,
        asked: Question,
        limit_s: float,
        heard: Callable[[Verdict], None],
    ) -> None:
        """Ask; heard is called once, maybe at once, unless close() is before."""
        self._asked, self._heard = asked, heard
        self._asked_at = time.monotonic()
        self._until = self._asked_at + limit_s
        try:
            if asked.kind == question.CHECK:
                self._run(generation, limit_s)
            elif not self._still_waits():
                self._send(generation, limit_s)
        except (OSError, ValueError) as error:
            self._over(verdicts.CANNOT, what_failed(error))

    @property
    def asks(self) -> bool:
        """Whether a question is under way."""
        return self._heard is not None

    @property
    def connection(self) -> socket.socket | None:
        """That of the question by TCP that is under way, or was not taken yet."""
        return self._connection if self._way is not None and not self._way.is_unix else None

    @property
    def is_closed(self) -> bool:
        """Whether workers keep clients out: see Way."""
        return self._way is not None and self._way.is_closed()

    def close(self) -> None:
        """Give up what was asked of this generation."""
        self._heard = None
        self._loop.cancel(self)
        with suppress(OSError):
            if self._way is not None and self._connection is not None and self._waits():
                self._way.give_up(self._connection)
        self._disconnect()
        self._leave()
        if self._command is not None:
            self._command.close()
            self._command = None
        self._was_reset = False

    def end(self) -> None:
        """Do that, and keep no process."""
        self.close()
        if self._asker is not None:
            self._asker.close()
            self._asker = None

    # -- inside --------------------------------------------------------------------

    def _over(self, kind: str, why: str = "") -> None:
        """Say what came of it, unless that may be of another generation."""
        self._loop.cancel(self)
        holds = self._way is None or self._way.holds()
        if not holds:
            kind, why = verdicts.MOVED, SHUT_DOWN
        if kind not in (verdicts.UNMADE, verdicts.UNTAKEN):
            self._disconnect()
        if self._connection is None and (self._as_client or not holds):
            self._leave()
        heard, self._heard = self._heard, None
        if heard is not None:
            heard(Verdict(kind, why))

    def _send(self, generation: OpenGeneration, limit_s: float) -> None:
        """Raises OSError where it cannot be reached now."""
        asked = self._asked
        self._way = self._way or self._reach(generation, asked.listener)
        way = self._way
        if way is None:
            one_socket = "there is one socket for it and the one before"
            none = "there is no such listener any more"
            self._over(verdicts.NO_WAY, none if self._as_client else one_socket)
            return
        if asked.by_http and self._asker is None:
            try:
                self._asker = Asker(
                    self._loop, heard=self._answered, late=self._is_late, ended=self._asker_ended
                )
            except OSError as error:
                error.strerror = f"the process that asks cannot be started: {error.strerror}"
                raise
        self._connection = one = way.connecting()
        self._made_at = self._asked_at
        failed = one.connect_ex(way.target)
        if failed == errno.EAGAIN and way.is_unix:  # its backlog is full, and no kernel waits
            self._disconnect()
            if self._left_s:
                self._look_later(partial(self._send_again, generation, limit_s))
            else:
                self._over(verdicts.UNMADE, self._cannot_connect(failed))
        elif failed not in (0, errno.EINPROGRESS):
            kind = verdicts.REFUSED if failed in _NOT_THERE else verdicts.UNREACHED
            self._over(kind, self._cannot_connect(failed))
        elif asked.by_http:
            assert self._asker is not None
            self._asker.ask(one, way, asked, limit_s, self._left_s)
            self._loop.call_after(self, self._left_s + _ASKER_S, self._asker.kill)
        else:
            self._look_later(self._look)

    def _send_again(self, generation: OpenGeneration, limit_s: float) -> None:
        try:
            self._send(generation, limit_s)
        except OSError as error:
            self._over(verdicts.CANNOT, what_failed(error))

    @property
    def _left_s(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def _cannot_connect(self, number: int) -> str:
        why = "its backlog is full" if number == errno.EAGAIN else os.strerror(number)
        if self._asked.by_http:
            refused = number == errno.ECONNREFUSED
            return f"GET {self._asked.path}: {'refused' if refused else why}"
        where = self._way.in_words if self._way is not None else "it"
        return f"cannot connect to {where}: {why}"

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.close()
            self._connection = None

    def _leave(self) -> None:
        if self._way is not None:
            self._way.close()
            self._way = None

    # -- whether it was taken --------------------------------------------------------

    def _waits(self) -> bool:
        """Whether no worker has taken our connection yet.  Raises OSError: it came to none."""
        way, one = self._way, self._connection
        assert way is not None
        assert one is not None
        # Nor has the kernel where its backlog is full.
        return not events_of(one, select.POLLOUT) or way.waits(one)

    def _still_waits(self) -> bool:
        """Go on with what was asked before, and was not taken; else nothing of it is left."""
        if self._connection is None:
            return False
        waits: bool | None = None
        with suppress(OSError):  # it came to no worker
            if not self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                waits = self._waits()
        if waits is None or (self._asked.by_http and not waits):
            self._disconnect()
            if self._as_client:
                self._leave()
            return False
        if self._asked.by_http:
            self._over(self._waiting()[0], self._late)
        else:
            self._look()
        return True

    def _waiting(self) -> tuple[str, str]:
        """Return of what kind that is, and why."""
        assert self._connection is not None
        made = events_of(self._connection, select.POLLOUT)
        what = "was accepted by no worker" if made else "could not be made"
        where = self._way.in_words if self._way is not None else "it"
        kind = verdicts.UNTAKEN if made else verdicts.UNMADE
        return kind, f"a connection to {where} {what}"

    def _look_later(self, look: Callable[[], None]) -> None:
        waited_s = time.monotonic() - self._made_at
        delay_s = min(max(_FIRST_LOOK_S, _LOOK_SHARE * waited_s), _LAST_LOOK_S)
        self._loop.call_after(self, delay_s, look)

    def _look(self) -> None:
        way, one = self._way, self._connection
        assert way is not None
        assert one is not None
        failed = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        was_reset, self._was_reset = self._was_reset, failed == errno.ECONNRESET
        try:
            waits = not failed and self._waits()
        except OSError as error:
            failed = error.errno or errno.EIO
        if not way.holds():
            self._over(verdicts.MOVED, SHUT_DOWN)
        elif failed and not (was_reset and self._was_reset):
            # A reset is by what has accepted it, else it would have been refused; or as the
            # listening socket was shut down, which is mended, and does not come twice in a row.
            self._over(verdicts.REFUSED, self._cannot_connect(failed))
        elif failed or not waits:
            self._over(verdicts.GOOD)
        elif not self._left_s:
            self._over(*self._waiting())
        else:
            self._look_later(self._look)

    # -- by HTTP ---------------------------------------------------------------------

    def _answered(self, why: str) -> None:
        if self.asks:  # else it was given up
            self._over(verdicts.BAD if why else verdicts.GOOD, why)

    def _is_late(self, why: str) -> None:
        self._late, kind = why, verdicts.BAD
        with suppress(OSError):
            if self._connection is not None and self._waits():
                kind, _ = self._waiting()
        if self.asks:
            self._over(kind, why)

    def _asker_ended(self, how: str) -> None:
        self._asker = None
        if self.asks:
            self._over(verdicts.CANNOT, f"the process that asks {how}")

    # -- by a command ----------------------------------------------------------------

    def _run(self, generation: OpenGeneration, limit_s: float) -> None:
        """Raises OSError or ValueError."""
        if self._command is not None:  # beside one that lives on no other is started
            self._loop.call_after(self, limit_s, lambda: self._over(verdicts.BAD, self._late))
            return
        if self._addresses is not None:
            address = self._addresses.address(generation)
        else:
            self._way = way = self._reach(generation, "")
            if way is None:
                self._over(verdicts.NO_WAY, "there is no listener any more")
                return
            address = way.text
        number = generation.record.number

        def over(why: str) -> None:
            command, self._command = self._command, None
            if command is not None and command.is_late:
                self._loop.cancel(self)  # that was its answer
                self._heard = None
                return
            if self._addresses is not None:
                why = self._addresses.judge(generation, why)
            kind = verdicts.MOVED if why == SHUT_DOWN else verdicts.BAD if why else verdicts.GOOD
            self._over(kind, why)

        def late(why: str) -> None:
            self._late = why
            self._over(verdicts.BAD, why)

        self._command = CheckCommand(
            self._loop,
            generation.program,
            self._asked.path,
            {PROBE: address} if address else {},
            over=over,
            late=late,
            limit_s=limit_s,
            told=self._reads(number),
        )
