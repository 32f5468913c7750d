"""Reads the configuration again, in another process: the reader process.

Reading may block, and needs modules that must not stay in the resident process.  The reader process
gets the settings in force, reads the configuration as the launching process did, sends an answer,
and exits.  launch/reload_child.py is the reader process's program, and documents the answer.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Hashable

from ..model.lazy_dataclass import field, mutable
from ..model.settings import Settings, SettingsError, dump, load
from ..model.text import in_units
from ..system import inherited
from ..system.helper import HelperProcess, last_line
from ..system.loop import Loop

#: An answer consists of records, each with a name and a descriptor.  A record's name has at most
#: this many bytes.
_RECORD_BYTES = 64
#: The descriptors of some records (such as `settings`) are memfds that contain text.  We read at
#: most this many bytes of the text.
_MOST_BYTES = 16 * 1024 * 1024
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


@mutable
class ConfigAnswer:
    """The new settings, or why the reading failed.  The receiver owns the descriptors.

    After read(dry=True) either `changes` and `fixed` are set, or `failure` and `code`.
    """

    failure: str = ""  # in words, perhaps in several lines; "": success
    code: str = "refused"  # the failure's error code in the answer to `diff`
    settings: Settings | None = None
    listeners: dict[int, int] = field(default_factory=dict)  # listener index -> descriptor
    siblings: dict[int, int] = field(default_factory=dict)  # listener index -> its second socket
    reserved: dict[int, int] = field(default_factory=dict)  # listener index -> its third socket
    changes: tuple[str, ...] = ()  # what differs from the settings in force, in words
    fixed: tuple[str, ...] = ()  # the changes that a reload would refuse


@mutable
class ConfigReader:
    """Runs one reader process at a time."""

    #: The command that executes the protector's program.
    command: tuple[str, ...]
    loop: Loop
    #: The key of this reader's timer in the loop.
    key: Hashable
    _process: HelperProcess | None = None
    _line: socket.socket | None = None  # our socket to the reader process
    _output: int = -1  # a memfd with the reader process's stdout and stderr; -1: none
    _records: dict[str, int] = field(default_factory=dict)  # received so far: name -> descriptor
    _failure: str = ""
    _done: Callable[[ConfigAnswer], None] = lambda answer: None

    @property
    def busy(self) -> bool:
        return self._process is not None

    def read(
        self, settings: Settings, done: Callable[[ConfigAnswer], None], *, dry: bool = False
    ) -> None:
        """Read the configuration, bind new listeners, and call `done` with the answer.

        The reader process is killed after --start-timeout.  If it cannot start, `done` is called
        before this method returns.

        dry: only test whether new listeners can be bound, and report only what would change.
        """
        assert not self.busy
        self._failure = ""
        self._done = done
        try:
            self._start(settings, dry=dry)
        except OSError as error:
            self._release()
            file = f"{error.filename}: " if error.filename else ""
            done(ConfigAnswer(f"cannot read the configuration: {file}{error.strerror}"))
            return
        limit_s = settings.policy.start_timeout_s
        self.loop.call_after(self.key, limit_s, lambda: self._on_timeout(limit_s))

    def call_off(self, answer: ConfigAnswer | None = None) -> None:
        """Call off a read() that is in progress; then call its `done` with `answer`, if given."""
        if self._process is not None:
            done, self._done = self._done, _discard_answer
            self._release()
            if answer is not None:
                done(answer)

    def _start(self, settings: Settings, *, dry: bool) -> None:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        name = inherited.READER_DRY if dry else inherited.READER
        with theirs:
            self._output = os.memfd_create("sp.reader", os.MFD_CLOEXEC)
            content = inherited.memory_file(inherited.SETTINGS, dump(settings))
            with open(content, "rb", buffering=0):  # closed once the reader process has its copy
                # The reader process binds added UNIX sockets.  Without `?mode=` its umask decides
                # their mode, so it gets the umask with which SocketProtector was started.
                self._process = HelperProcess.start_protector(
                    self.command,
                    {inherited.SETTINGS: content, name: theirs.fileno()},
                    self._output,
                    self.loop,
                    self._on_ended,
                    umask=settings.origin.umask,
                )
        self.loop.watch(self._line.fileno(), self._receive)

    def _receive(self) -> None:
        assert self._line is not None
        while True:
            try:
                # Not CMSG_SPACE: its padding has room for a second descriptor, which we would not
                # close.
                data, control, flags, _ = self._line.recvmsg(
                    _RECORD_BYTES, socket.CMSG_LEN(4), _FLAGS
                )
            except BlockingIOError:
                return
            except OSError as error:
                self._failure = f"cannot receive the new configuration: {error.strerror}"
                data, control, flags = b"", [], 0
            fds = [int.from_bytes(each[2][:4], sys.byteorder) for each in control]
            if flags & socket.MSG_CTRUNC:
                self._failure = (
                    "no descriptor is free for the new listeners: raise the hard limit"
                    " (ulimit -Hn, LimitNOFILE= of a unit)"
                )
            if not data:
                self.loop.unwatch(self._line.fileno())
                return
            for fd in fds:
                self._records[data.decode("ascii", "replace")] = fd

    def _on_timeout(self, limit_s: float) -> None:
        self._failure = f"the configuration was not read within {in_units(limit_s)}"
        if self._process is not None:
            self._process.process.kill_group()

    def _on_ended(self, how: str) -> None:
        if self._line is not None:
            self._receive()
        done, self._done = self._done, _discard_answer
        try:
            answer = self._answer(f"the reader process {how}")
        except OSError as error:
            answer = ConfigAnswer(f"cannot read the new configuration: {error.strerror}")
        self._release()
        done(answer)

    def _answer(self, how: str) -> ConfigAnswer:
        if self._failure:
            return ConfigAnswer(self._failure)
        if "refused" in self._records:
            return ConfigAnswer(_text(self._records["refused"]) or "refused")
        if "changes" in self._records:
            return ConfigAnswer(changes=self._lines("changes"), fixed=self._lines("fixed"))
        if not {"differences", "settings"} <= self._records.keys():
            last = last_line(self._output)
            return ConfigAnswer(f"the configuration was not read; {how}: {last}")
        try:
            settings = load(_text(self._records["settings"]).encode())
        except SettingsError as error:
            return ConfigAnswer(str(error))
        return ConfigAnswer(
            settings=settings,
            changes=self._lines("differences"),
            listeners=self._take_records("listener "),
            siblings=self._take_records("twin "),
            reserved=self._take_records("reserved "),
        )

    def _lines(self, name: str) -> tuple[str, ...]:
        return tuple(_text(self._records[name]).splitlines()) if name in self._records else ()

    def _take_records(self, kind: str) -> dict[int, int]:
        """Remove and return the descriptors of a kind, by listener index."""
        names = [name for name in self._records if name.startswith(kind)]
        return {int(name.removeprefix(kind)): self._records.pop(name) for name in names}

    def _release(self) -> None:
        self.loop.cancel(self.key)
        for fd in self._records.values():
            os.close(fd)
        self._records.clear()
        if self._line is not None:
            self.loop.unwatch(self._line.fileno())
            self._line.close()
            self._line = None
        if self._process is not None:
            self._process.discard()
            self._process = None
        if self._output >= 0:
            os.close(self._output)
            self._output = -1


def _text(fd: int) -> str:
    return os.pread(fd, _MOST_BYTES, 0).decode("utf-8", "replace")


def _discard_answer(answer: ConfigAnswer) -> None:
    """Close the descriptors of an answer that is no longer awaited."""
    for each in (answer.listeners, answer.siblings, answer.reserved):
        for fd in each.values():
            os.close(fd)
