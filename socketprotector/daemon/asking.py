"""Asks a generation that gets no clients yet, as a client would: --ready accept, http:, https:.

One generation at a time is asked: the one that starts.  How it is reached (`Way`) its delivery
knows: where workers accept its socket gets connections with a mark (system/reuseport.py), else what
comes to a port of loopback is sent into its channel.

`accept` is asked here: one connection, that must not wait any more.  Under the default of
listener, a generation that cannot even be connected to may be ready nevertheless, so that time
tells.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from ..model import question
from ..model.errors import what_failed
from ..system.polling import events_of
from .asker_client import KeptAsker
from .delivery.way import SHUT_DOWN, Reach, Way
from .generation import OpenGeneration
from .runtime import Runtime

_TIMER = "ask"
#: How soon to look, or to try, again: a tenth of the time that it has taken so far.
_FIRST_LOOK_S = 0.01
_LAST_LOOK_S = 1.0
_LOOK_SHARE = 0.1
#: A handshake is the kernel's, and takes no time: what takes longer does not depend on the workers.
_CONNECTED_S = 1.0


class Asking:
    """Carries out Ask and StopAsking."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        reach: Reach,
        answered: Callable[[int, str], None],
        not_asked: Callable[[int], None],
    ) -> None:
        """answered: a generation has, to this kind of question.

        not_asked: it cannot be asked, and need not be.
        """
        self._loop, self._log = runtime.loop, runtime.log
        self._reach = reach
        self._answered, self._not_asked = answered, not_asked
        self._generation: OpenGeneration | None = None
        self._opened = ExitStack()  # the way, and who asks by it
        self._way: Way | None = None
        self._connection: socket.socket | None = None
        self._began = self._connected_at = 0.0
        self._was_reset = False
        #: What the last answer was, for people: why it is not ready.
        self.last = ""

    def ask(self, generation: OpenGeneration) -> None:
        """Ask until it has answered, or until it is said that this does not matter any more."""
        self.stop()
        program = generation.program
        if program.ready == "any" and program.ready_after_s is None:
            return  # it was given {fd:ready}
        self._generation, self._was_reset = generation, False
        self._began = time.monotonic()
        self._begin()

    def stop(self) -> None:
        """Ask no more."""
        self.suspend()
        self._generation, self.last = None, ""

    def suspend(self) -> None:
        """Ask no more in this program; the next one begins anew."""
        self._loop.cancel(_TIMER)
        self._disconnect()
        self._opened.close()
        self._way = None

    def go_on(self) -> None:
        """There was no next one."""
        if self._generation is not None:
            self._begin()

    # -- inside ------------------------------------------------------------------

    def _begin(self) -> None:
        generation = self._generation
        assert generation is not None
        asked = question.read(generation.program.ready_question or "accept")
        try:
            self._way = self._reach(generation, asked.listener)
        except OSError as error:
            self._again(f"cannot be asked: {what_failed(error)}", self._begin)
            return
        if self._way is None:
            self.last = "cannot be asked: there is one socket for it and the one before"
            self._give_up()
            return
        self._opened.callback(self._way.close)
        if asked.kind == "accept":
            self._connect()
        else:
            self._send_asker(asked)

    def _send_asker(self, asked: question.Question) -> None:
        way, generation = self._way, self._generation
        assert way is not None
        assert generation is not None

        def heard(why: str) -> None:
            if not way.holds():
                self._ask_anew()
            elif why:
                self._is_not_ready(why)
            else:
                self.stop()
                self._answered(generation.record.number, asked.kind)

        def ended(how: str) -> None:
            self._is_not_ready(f"the process that asks {how}")

        self.last = self.last or f"GET {asked.path}: not answered yet"
        asker = KeptAsker.repeating(self._loop, way, asked, heard, ended)
        self._opened.callback(asker.close)

    def _ask_anew(self) -> None:
        """What was answered may have been by another generation."""
        self.suspend()
        self._again(SHUT_DOWN, self._begin)

    def _is_not_ready(self, why: str) -> None:
        """Remember the last answer, and log it where it is another one."""
        if why != self.last and self._generation is not None:
            number = self._generation.record.number
            self._log.write("info", "not-answered", generation=number, reason=why)
        self.last = why

    def _give_up(self) -> None:
        """Let time tell, where it may."""
        generation, way = self._generation, self._way
        if generation is None or generation.program.ready != "any":
            return
        if way is None or not way.is_closed():
            self._not_asked(generation.record.number)

    def _again(self, why: str, what: Callable[[], None]) -> None:
        self._is_not_ready(why)
        self._later(what)

    def _later(self, what: Callable[[], None]) -> None:
        for_s = time.monotonic() - self._began
        delay_s = min(max(_FIRST_LOOK_S, _LOOK_SHARE * for_s), _LAST_LOOK_S)
        self._loop.call_after(_TIMER, delay_s, what)

    def _connect(self) -> None:
        way = self._way
        assert way is not None
        self._connected_at = time.monotonic()
        try:
            one = self._connection = way.connecting()
            failed = one.connect_ex(way.target)
        except OSError as error:
            failed = error.errno or errno.EIO
        if failed not in (0, errno.EINPROGRESS):
            self._failed(failed)
        else:
            self._later(self._look)

    def _failed(self, number: int) -> None:
        """It cannot be connected to, which is none of its workers' doing."""
        self._disconnect()
        where = self._way.in_words if self._way is not None else "it"
        self._give_up()
        self._again(f"cannot connect to {where}: {os.strerror(number)}", self._connect)

    def _look(self) -> None:
        way, one, generation = self._way, self._connection, self._generation
        assert way is not None
        assert one is not None
        assert generation is not None
        if not way.holds():
            self._ask_anew()
            return
        connected = bool(events_of(one, select.POLLOUT))
        failed = one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failed == errno.ECONNRESET:
            # By what has accepted it, else it would have been refused; or because the listening
            # socket was shut down, which is mended, and does not come twice in a row.
            failed = 0 if self._was_reset else failed
            self._was_reset = True
        try:
            taken = connected and not failed and not way.waits(one)
        except OSError as error:
            failed = error.errno or errno.EIO
        if failed:
            self._failed(failed)
        elif taken:  # it may be closed already
            self.stop()
            self._answered(generation.record.number, "accept")
        else:
            if not connected and time.monotonic() - self._connected_at >= _CONNECTED_S:
                self._give_up()
            what = "was accepted by no worker" if connected else "could not be made"
            self.last = f"a connection to {way.in_words} {what}"
            self._later(self._look)

    def _disconnect(self) -> None:
        if self._connection is not None:
            with suppress(OSError):
                self._connection.close()
            self._connection = None
