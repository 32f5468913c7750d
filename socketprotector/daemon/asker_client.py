"""Talks to the asker (programs/asker.py): one process for each question, gone after it.

It is told by one message how the generation is reached and what to ask, and ends when its line is
closed: by us, or because we have ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable

from ..model.question import Question
from ..system.cleanup import on_error
from ..system.helper import HelperProcess
from ..system.loop import Loop
from .probe_port import Way

#: The program, by its file: to import it here would load http.client and ssl.
_SCRIPT = os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "programs", "asker.py"
)
_LINE_FD, _LISTENING_FD = 3, 4
_MESSAGE_BYTES = 4096


class Asker:
    """One such process."""

    def __init__(
        self,
        loop: Loop,
        way: Way,
        asked: Question,
        *,
        heard: Callable[[str], None],
        ended: Callable[[str], None],
        listening: socket.socket | None = None,
    ) -> None:
        """Start it.  Raises OSError.

        heard: called with why an answer was not good, "" for one that was.  ended: it has ended by
        itself, and how.  listening: it is to forward what comes there instead.
        """
        self._loop, self._heard, self._ended = loop, heard, ended
        self._process: HelperProcess | None = None
        argv: tuple[str, ...] = (sys.executable, "-I", "-S", _SCRIPT, str(_LINE_FD))
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptors = {_LINE_FD: theirs.fileno()}
        if listening is not None:
            argv, descriptors[_LISTENING_FD] = (*argv, str(_LISTENING_FD)), listening.fileno()
        with on_error(self.close):
            with theirs:
                self._line.send(_told(way, asked), socket.MSG_DONTWAIT)
                self._process = HelperProcess.start(argv, descriptors, loop, self._has_ended)
            loop.watch(self._line.fileno(), self._hear)

    def close(self) -> None:
        """Let it end."""
        self._loop.unwatch(self._line.fileno())
        self._line.close()
        if self._process is not None:
            self._process.close()
            self._process = None

    def _hear(self) -> None:
        while self._process is not None:
            try:
                data = self._line.recv(_MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._loop.unwatch(self._line.fileno())
                return  # its end comes by its pidfd
            self._heard(data[1:].decode("utf-8", "replace"))

    def _has_ended(self, how: str) -> None:
        self.close()
        self._ended(how)


def _told(way: Way, asked: Question) -> bytes:
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
        }
    ).encode()
