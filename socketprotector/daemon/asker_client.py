"""Talks to the asker (programs/asker.py).

One that asks a generation that starts is told by one message how that is reached and what to ask.
One that is kept (--health) is given a connection with each question.  Either ends when its line is
closed: by us, or because we have ended.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable

from ..model.question import Question
from ..model.text import in_units
from ..system.channel import rights_of
from ..system.cleanup import on_error
from ..system.helper import BackOff, Ended, HelperProcess, Line
from ..system.loop import Loop
from .delivery.way import Way

_LINE_FD, _LISTENING_FD = 3, 4
#: Of one that is kept running.
_FIRST_DELAY_S = 0.1
_LAST_DELAY_S = 5.0
#: The same where a release waits for it.
_LAST_DELAY_SOON_S = 1.0


class Asker:
    """One such process."""

    def __init__(
        self,
        loop: Loop,
        way: Way | None = None,
        asked: Question | None = None,
        *,
        heard: Callable[[str], None],
        ended: Callable[[str], None],
        late: Callable[[str], None] | None = None,
        listening: socket.socket | None = None,
    ) -> None:
        """Start it.  Raises OSError.

        way, asked: what it asks again and again; without, see ask().  heard: called with why an
        answer was not good, "" for one that was.  late: called instead where none came in time.
        ended: it has ended by itself, and how.  listening: it is to forward what comes there
        instead.
        """
        self._heard, self._ended, self._late = heard, ended, late or heard
        self._process: HelperProcess | None = None
        self._number = 0  # of the last question, of those that are asked once
        words = [str(_LINE_FD)]
        self._line, theirs = Line.make(loop, self._hear)
        descriptors = {_LINE_FD: theirs.fileno()}
        if listening is not None:
            words.append(str(_LISTENING_FD))
            descriptors[_LISTENING_FD] = listening.fileno()
        with on_error(self.close), theirs:
            if way is not None and asked is not None:
                self._line.socket.send(_told(way, asked), socket.MSG_DONTWAIT)
            self._process = HelperProcess.start_own(
                "asker.py", words, descriptors, loop, self._has_ended
            )

    def ask(self, connection: socket.socket, way: Way, asked: Question, limit_s: float) -> None:
        """Have this asked once, by a connection that is being made; it stays the caller's.

        What is said of an earlier one is not heard any more.  Raises OSError.
        """
        self._number += 1
        limit = {"limit_s": limit_s, "limit": in_units(limit_s)}
        told = [_told(way, asked, **limit, number=self._number)]
        self._line.socket.sendmsg(told, [rights_of(connection.fileno())], socket.MSG_DONTWAIT)

    def close(self) -> None:
        """Let it end."""
        self._line.close()
        if self._process is not None:
            self._process.close()
            self._process = None

    def kill(self) -> None:
        """Kill it, as it does not answer; that it has ended is told as ever."""
        if self._process is not None:
            self._process.process.kill_group()

    def _hear(self, text: str) -> None:
        why = text[1:]
        if self._number:
            number, _, why = why.partition(" ")
            if number != str(self._number):
                return
        (self._late if text[:1] == "~" else self._heard)(why)

    def _has_ended(self, how: str) -> None:
        self.close()
        self._ended(how)


class KeptAsker:
    """Keeps one running: started again, later each time in a row, where it has ended."""

    def __init__(
        self,
        loop: Loop,
        start: Callable[[Ended], Asker],
        ended: Ended = lambda how: None,
        *,
        last_delay_s: float = _LAST_DELAY_S,
    ) -> None:
        """start: starts one that calls back with how it has ended.  Raises OSError.

        ended: called with that, or with why none could be started.
        """
        self._loop, self._start, self._tell = loop, start, ended
        self._back_off = BackOff(_FIRST_DELAY_S, last_delay_s)
        #: The one that runs.
        self.now: Asker | None = None
        self._begin()

    @classmethod
    def repeating(
        cls, loop: Loop, way: Way, asked: Question, heard: Callable[[str], None], ended: Ended
    ) -> KeptAsker:
        """Keep one that asks this again and again; heard: see Asker."""

        def answered(why: str) -> None:
            kept.works()
            heard(why)

        def start(ended: Ended) -> Asker:
            return Asker(loop, way, asked, heard=answered, ended=ended)

        kept = cls(loop, start, ended, last_delay_s=_LAST_DELAY_SOON_S)
        return kept

    def close(self) -> None:
        """Have none."""
        self._loop.cancel(self)
        if self.now is not None:
            self.now.close()
            self.now = None

    def works(self) -> None:
        """It does what it is for: the next one need not wait as long as the last."""
        self._back_off.reset()

    def _begin(self) -> None:
        try:
            self.now = self._start(self._ended)
        except OSError as error:
            self._ended(f"cannot be started: {error.strerror}")

    def _ended(self, how: str) -> None:
        self.now = None
        self._loop.call_after(self, self._back_off.wait_s(), self._begin)
        self._tell(how)


def _told(way: Way, asked: Question, **more: object) -> bytes:
    mark = way.mark
    return json.dumps(
        {
            "address": way.address,
            "source": mark.source if mark is not None else "",
            "options": mark.options if mark is not None else (),
            "kind": asked.kind,
            "host": asked.host,
            "path": asked.path,
            "good": asked.good,
            **more,
        }
    ).encode()
