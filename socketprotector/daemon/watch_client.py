"""--watch: reloads when files change.

A watcher process (programs/file_watch.py) reports changed files over a socket.  The watcher
survives an upgrade and, with the guard or systemd's fd store, a kill of the protector.  It exits
when our end of the socket is closed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from ..core.events import ReloadRequested
from ..model.settings import Settings
from ..system import inherited
from ..system.helper import BackOff, HelperProcess, Line
from ..system.process import Process
from .runtime import Runtime

_LINE_FD = 3
_FIRST_DELAY_S = 1.0
_LAST_DELAY_S = 60.0
_UNIX_PREFIX = "unix:/"  # how the address of a socket with a file begins


class FileWatch:
    """Keeps a watcher process running, and handles its reports."""

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self._settings = settings
        self._runtime = runtime
        self._loop, self._log = runtime.loop, runtime.log
        self._process: HelperProcess | None = None
        self._line: Line | None = None
        self._back_off = BackOff(_FIRST_DELAY_S, _LAST_DELAY_S)
        self._warned = False  # whether the first of several failures in a row was logged

    def start(self, watchers: Mapping[str, Mapping[str, int]]) -> None:
        """Adopt the watcher that has survived an upgrade or a kill; if there is none, start one.

        watchers: the surviving watchers' descriptors, by pid.  Takes ownership of the descriptors.
        """
        for pid, descriptors in watchers.items():
            if self._settings.watch and self._process is None and len(descriptors) == 2:
                process = Process(int(pid), descriptors["process"])
                self._process = HelperProcess(process, self._loop, self._ended)
                line = socket.socket(fileno=descriptors["line"])
                self._line = Line(self._loop, line, self._handle)
            else:  # --watch is off, we have a watcher already, or a descriptor was not stored
                for fd in descriptors.values():
                    os.close(fd)
        if self._line is None and self._settings.watch:
            self._spawn()

    def descriptors(self) -> dict[str, int]:
        """Return, by name, the descriptors of the watcher, which survives an upgrade or a kill."""
        if self._process is None or self._line is None:
            return {}
        process = self._process.process
        prefix = f"{inherited.WATCH}{process.pid}"
        return {f"{prefix}.process": process.pidfd, f"{prefix}.line": self._line.socket.fileno()}

    def close(self) -> None:
        """Stop watching: the watcher exits."""
        self._loop.cancel("watch")
        self._forget()

    def _spawn(self) -> None:
        settings = self._settings
        files = [settings.log_file, settings.pid_file, settings.current]
        sockets = [*settings.listeners, *([settings.control] if settings.control else [])]
        unix = [s.address for s in sockets if s.address.startswith(_UNIX_PREFIX)]
        files += [each[len(_UNIX_PREFIX) - 1 :] for each in unix]
        own_files = [file for file in files if file]
        arguments = (str(_LINE_FD), *settings.watch, "--", *own_files)
        try:
            self._line, theirs = Line.make(self._loop, self._handle)
            with theirs:
                descriptors = {_LINE_FD: theirs.fileno()}
                self._process = HelperProcess.start_own(
                    *("file_watch.py", arguments, descriptors, self._loop, self._ended),
                    options=("-P",),
                )
        except OSError as error:
            self._forget()
            self._spawn_later(error.strerror or str(error))
            return
        self._runtime.persist()  # the descriptors have changed

    def _handle(self, text: str) -> None:
        match text[:1]:
            case "=":
                self._log.write("info", "watching", paths=" ".join(self._settings.watch))
            case "+":
                count, _, path = text[1:].partition(" ")
                self._log.write("info", "files-changed", path=path, files=int(count))
                self._runtime.post(ReloadRequested())
            case "!":
                self._warn(text[1:])

    def _ended(self, how: str) -> None:
        assert self._process is not None
        if self._process.proven:
            self._back_off.reset()
            self._warned = False
        if self._line is not None:
            self._line.handle_waiting()
        self._forget()
        self._runtime.persist()
        self._spawn_later(how)

    def _forget(self) -> None:
        """Close the watcher's pidfd and our end of the socket, so that the watcher exits."""
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is not None:
            self._process.close()
            self._process = None

    def _spawn_later(self, why: str) -> None:
        """Start another watcher, after a pause that grows with each failure in a row."""
        self._warn(why)
        self._loop.call_after("watch", self._back_off.wait_s(), self._spawn)

    def _warn(self, why: str) -> None:
        """Log the first of several failures in a row."""
        if not self._warned:
            self._warned = True
            self._log.write(
                "warning", "watch-ended", reason=why, hint="another watcher starts soon"
            )
