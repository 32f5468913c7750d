"""Directs our and the workers' output, reopens the log file, and obtains workers' last words.

Each worker has its own pipe in two cases:

* --log-prefix is set.
* The log is syslog, the journal, a pipe or the file of --log-file, and --no-log-relay is not set.

Otherwise workers write to our stdout and stderr: for example a terminal, or FILE under
`-f 2>FILE`.

A relay process (programs/log_relay.py) reads the pipes and writes the log.  So running workers need
not reopen a rotated log, and the relay knows which worker wrote a line.

If the relay cannot start, we exit in two cases: --log-prefix is set, or the log is syslog.
Otherwise we continue without a relay, and workers write to our stdout and stderr.

A worker's last words are its last lines of output.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager

from ..model import text
from ..model.lazy_dataclass import field, mutable
from ..model.log_format import is_own
from ..model.settings import Settings
from ..system import cgroups, inherited, log_file
from ..system.cleanup import on_error
from ..system.inherited import Inherited
from ..system.terminal import is_journal
from . import relay_client
from .runtime import Runtime

_STDOUT, _STDERR = 1, 2
LAST_LINES = 20
_LAST_BYTES = 4096
_WRITE = f"{inherited.RELAY}write"
#: Advice that where_to_look() gives.  Once the operator has followed the advice, the message about
#: a failed worker includes that worker's output.
_USE_PREFIX = "set --log-prefix to see the output here"
_USE_RELAY = "remove --no-log-relay to see the output here"
_USE_BOTH = "remove --no-log-relay and set --log-prefix to see the output here"
#: The mode of a worker's pipe: all users may write, because a worker that runs as another user must
#: be able to open /dev/stdout.  This mode is safe, because only root, the worker's user and our
#: user can reach the pipe.
_PIPE_MODE = 0o622


@mutable
class WorkerOutput:
    """The output descriptors of a worker that is about to start."""

    #: Descriptor number in the worker -> our descriptor that the worker gets under this number.
    descriptors: dict[int, int] = field(default_factory=dict)
    pid: int = 0  # the caller sets it once the worker has started


class Output:
    """The destination of stdout and stderr, for the protector and its workers."""

    def __init__(self, settings: Settings, *, relay_failed: bool = False) -> None:
        """relay_failed: True if the relay could not be started; workers then get no pipes."""
        self._settings, self._relay_failed = settings, relay_failed
        self._log_file, self._to_syslog = settings.log_file, settings.to_syslog
        ours = self._to_syslog or self._log_file is not None
        #: Whether each worker has a pipe of its own if neither --log-prefix nor --no-log-relay is
        #: set.
        self._pipes_by_default = ours or _is_stream()
        #: Whether each worker has a pipe of its own.
        self._relayed = not relay_failed and (
            settings.log_prefix or (settings.log_relay and self._pipes_by_default)
        )
        #: Why the log file could not be opened; "": it is our stderr, or there is none.
        self._open_error = self._open_if_lost()
        #: The workers' descriptors that the next program needs after an upgrade or a kill.
        #: LogRelay adds the workers' pipes; WorkerPool adds all other descriptors.
        self.named = inherited.Named()
        self._relay: relay_client.LogRelay | None = None

    def _open_if_lost(self) -> str:
        """Open the log file if our stderr is another file; return why that failed, or "".

        After a crash, systemd starts us with the journal, or with a file of the unit, as stderr.
        Without the relay, a regular file counts as the log file, perhaps renamed: positions in that
        file must stay valid (last_words()).
        """
        try:
            path = self._log_file
            if path is not None and not _is_stderr(path, may_be_renamed=not self._relayed):
                self._redirect_to(log_file.open_log(path))
        except OSError as error:
            return str(error.strerror)
        return ""

    def begin(self, unclaimed: Inherited, runtime: Runtime) -> None:
        """Start the relay if the log needs one; after an upgrade or a crash, adopt the old relay.

        Takes ownership of the relay's descriptors.  Raises OSError.
        """
        if self._open_error:
            error = self._open_error
            runtime.log.write("error", "reopen-failed", file=self._log_file, error=error)
        if not (self._to_syslog or self._relayed):
            return
        kind = "syslog" if self._to_syslog else "journal" if is_journal() else "lines"
        name, prefixed = self._settings.name, self._settings.log_prefix
        self._relay = relay_client.LogRelay(name, kind, runtime, self.named, prefixed=prefixed)
        given = unclaimed.take_one(_WRITE)
        if given is not None:  # only after a crash: after an upgrade our stderr is still this pipe
            self._redirect_to(given)
        relay, outputs = unclaimed.take_all(inherited.RELAY), unclaimed.take_all(inherited.OUTPUT)
        if relay or outputs:
            self._relay.adopt(relay, outputs)
            return
        read = -1
        if self._to_syslog:
            read, write = os.pipe2(os.O_CLOEXEC)
            self._redirect_to(write)
        self._relay.start(read)

    def _redirect_to(self, fd: int) -> None:
        """Redirect stdout and stderr to fd; takes ownership of fd."""
        for standard in (_STDOUT, _STDERR):
            os.dup2(fd, standard, inheritable=True)
        os.close(fd)

    def descriptors(self) -> dict[str, int]:
        """Return the relay's descriptors that are needed after an upgrade or a crash, by name."""
        if self._relay is None:
            return {}
        shared = {_WRITE: _STDERR} if self._to_syslog else {}
        return {**self._relay.descriptors(), **shared}

    @contextmanager
    def opened(self, number: int, generation: int) -> Iterator[WorkerOutput]:
        """Open the output of a worker, which the caller starts inside the `with` statement.

        number: the worker's number.  generation: the number of the worker's generation.
        Raises OSError.  If the start fails, nothing stays open.
        """
        if self._relay is None or not self._relayed:
            yield WorkerOutput()
            return
        read, write = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read, False)  # the worker's end is unaffected
        os.fchmod(write, _PIPE_MODE)
        # If the protector's stdout and stderr differ, stdout is relayed only with --log-prefix.
        relays_stdout = self._settings.log_prefix or os.path.sameopenfile(_STDOUT, _STDERR)
        relayed = (_STDOUT, _STDERR) if relays_stdout else (_STDERR,)
        given = WorkerOutput(dict.fromkeys(relayed, write))
        try:
            with on_error(os.close, read):
                yield given
        finally:
            os.close(write)
        self._relay.read_from(number, relay_client.WorkerPipe(read, generation, given.pid))

    def close_oldest(self, living: int, numbers: Callable[[], Set[int]]) -> None:
        """Close the oldest pipes of exited workers without orphans.

        The newest of these pipes, about LEFT_BEHIND (model/fd_budget.py), stay open.
        living: how many workers keep their pipes: running workers, and exited workers with orphans.
        numbers: returns these workers' numbers.
        """
        if self._relay is not None:
            self._relay.close_oldest(living, numbers)

    def reopen(self) -> None:
        """Open the log file again by its name, after a rotation.  Raises OSError."""
        if self._log_file is not None:
            self._redirect_to(log_file.open_log(self._log_file))
            if self._relay is not None:
                self._relay.reopened()

    def finish(self) -> None:
        """Close our socket to the relay, and wait for the relay's exit.

        The wait lasts at most 3 s (_END_S of relay_client.py).  The relay reads the workers' pipes
        and, under syslog, the pipe that is our stderr.  The relay exits once no process can write
        to these pipes any more, and all output is in the log.
        """
        if self._relay is not None:
            if self._to_syslog:
                self._redirect_to(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
            self._relay.finish()

    def position(self) -> int:
        """Return the size of the log file: the output of a worker that starts now begins there.

        Returns -1 if the log is not a regular file, or if the relay provides last words.
        """
        if self._relayed:
            return -1
        found = os.fstat(_STDERR)
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    def last_words(self, number: int, start: int, done: Callable[[str], None]) -> None:
        """Call `done` with a worker's last lines, escaped, or with "" if none are known.

        If workers have pipes, the relay provides the lines.  Then the call comes after the relay's
        answer, or after 2 s without an answer (_WORDS_S of relay_client.py).  If workers have no
        pipes, the call comes at once.
        start: what position() returned at the worker's start; -1 if other workers may have written
        to the log file since then.
        """
        if self._relay is not None and self._relayed:
            self._relay.request_last_words(number, lambda data: done(_lines(data)))
        elif start >= 0:
            path = self._log_file or f"/proc/self/fd/{_STDERR}"
            done(_lines(_last_bytes(path, start), shared=True))
        else:
            done("")

    def where_to_look(self) -> str:
        """Return where to find the output of a worker whose last words are unknown.

        If other options would make last words known, the text also advises these options.

        If the log goes to stderr (and not to the journal), the text names the process,
        SocketProtector -f, because the operator may read the text at another terminal.
        """
        if self._log_file is not None:
            where = f"see {text.escape(self._log_file)}"
        elif self._to_syslog:
            where = "see syslog"
        elif is_journal():
            where = f"see `{journal_command()}`"
        else:
            place = "the terminal" if os.isatty(_STDERR) else "stderr"
            where = f"see {place} of SocketProtector -f"
        if self._relayed or self._relay_failed:
            return where
        return f"{where}; {self._advice()}"

    def _advice(self) -> str:
        if self._settings.log_relay:
            return _USE_PREFIX
        return _USE_RELAY if self._pipes_by_default else _USE_BOTH

    @property
    def keeps_words(self) -> bool:
        """Return whether last words are known even if several workers write at the same time."""
        return self._relayed


def _is_stderr(path: str, *, may_be_renamed: bool) -> bool:
    """Return whether our stderr is this file, or may have been this file before a rotation."""
    found = os.fstat(_STDERR)
    is_file = stat.S_ISREG(found.st_mode)
    if may_be_renamed and is_file:
        return True
    try:
        return os.path.samestat(os.stat(path), found)
    except FileNotFoundError:
        return False
    except PermissionError:  # root has opened the file, in a folder that is closed to us
        return is_file


def _is_stream() -> bool:
    """Return whether stderr is a pipe or a socket (the journal), which we cannot read back."""
    mode = os.fstat(_STDERR).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def journal_command(proc: str = cgroups.PROC) -> str:
    """Return the shell command that shows the journal of our unit."""
    try:
        parts = [part.rstrip() for part in cgroups.names(proc).split("/")]
    except OSError:
        parts = []
    units = [text.escape(part) for part in parts if part.endswith(".service")]
    if not units:
        return "journalctl"
    # A user manager's units have cgroups below user@UID.service, the manager's own unit.
    of_user = units[0].startswith("user@") and units[-1] != units[0]
    return f"journalctl {'--user-unit' if of_user else '-u'} {units[-1]}"


def _lines(data: bytes, *, shared: bool = False) -> str:
    """Return the last lines, escaped.  shared: data may contain our own lines; leave them out."""
    lines = data[-_LAST_BYTES:].decode("utf-8", "replace").splitlines()
    lines = [line for line in lines if not (shared and is_own(line))]
    return "\n".join(text.output_line(line) for line in lines[-LAST_LINES:])


def _last_bytes(path: str, start: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return b""  # without root we may lack permission for the folder
    try:
        found = os.fstat(fd)
        if not os.path.samestat(found, os.fstat(_STDERR)):
            return b""  # another file has that name now, perhaps a private file
        size = found.st_size
        return os.pread(fd, _LAST_BYTES, max(start, size - _LAST_BYTES))
    finally:
        os.close(fd)
